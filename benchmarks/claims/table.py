"""What people say about recurrence and attention, and what the figures of this run say to it.

A verdict is computed from rows; there is none without them. To answer a claim, write a function from rows to findings in
this folder and enter it in CLAIMS with the suites whose rows it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..measure.results import Results, Row
from ..report.findings import Finding, Verdict
from ..suites import (
    attention,
    decode,
    long_range,
    memory_use,
    sequential_vs_parallel,
    small_data,
    statements,
    systems,
    variable_length,
)
from . import cost, learning, serving


@dataclass(frozen=True)
class Claim:
    statement: str
    experiment: str
    suites: tuple[str, ...]
    answer: Callable[[list[Row]], list[Finding]]


MEMORY = (sequential_vs_parallel.NAME, memory_use.NAME, decode.NAME)

CLAIMS = {
    "parallel-ops": Claim(
        "Attention needs O(1) sequential operations per layer, recurrence O(T)",
        "Time of one layer against T at fixed batch and width, with fitted exponents; beside them recurrence that is parallel in "
        "time, and the parity that it cannot count.",
        (sequential_vs_parallel.NAME, long_range.NAME),
        cost.parallel_ops,
    ),
    "train-faster": Claim(
        "Transformers train faster than LSTM/GRU because they are parallel",
        "One training step of an attention block and of an LSTM with as many parameters, on the same tokens, against T.",
        (sequential_vs_parallel.NAME,),
        cost.train_faster,
    ),
    "infer-faster": Claim(
        "Transformers also infer faster",
        "An attention block with a cache and an LSTM with as many parameters: prefill of T tokens, then token by token.",
        (decode.NAME,),
        serving.infer_faster,
    ),
    "memory-more": Claim(
        "Transformers need more memory than RNNs",
        "Peak memory of a training step against T: the smallest recurrent layer, attention with and without a T × T matrix; "
        "the state and the cache that generation keeps.",
        MEMORY,
        cost.memory_more,
    ),
    "memory-less": Claim(
        "Transformers need less memory, since they keep no hidden state",
        "The figures of the claim before, with the opposite question.",
        MEMORY,
        cost.memory_less,
    ),
    "long-range": Claim(
        "Recurrence forgets; attention reaches any distance",
        "Norm of d output / d input across a distance at initialization, and accuracy of recall across it after training.",
        (long_range.NAME,),
        learning.long_range,
    ),
    "vanishing": Claim(
        "RNN gradients vanish or explode, LSTM/GRU mitigate it",
        "Norm of d output / d input across a distance at initialization, with the fitted factor for each step.",
        (long_range.NAME,),
        learning.vanishing,
    ),
    "variable-length": Claim(
        "RNNs must pad; attention handles variable length without padding",
        "Rows of skewed lengths in one batch, padded, packed, with lengths, nested, concatenated: time against the longest row.",
        (variable_length.NAME,),
        serving.variable_length,
    ),
    "fixed-context": Claim(
        "A Transformer sees a fixed window; Transformer-XL's segment recurrence goes beyond it",
        "Loss of the last token against the distance of the token that it needs: Transformer-XL on segments, with the memory of "
        "those before and without.",
        (statements.NAME,),
        learning.fixed_context,
    ),
    "order": Claim(
        "Attention alone does not know the order, so positions must be added",
        "Change of the last output when the steps before it change places: a Transformer's encoder and its decoder, with and "
        "without positions; LSTMs, and a stack of both.",
        (statements.NAME,),
        learning.order,
    ),
    "small-data": Claim(
        "RNNs do better on short dependencies and small data",
        "Test loss of an LSTM and of an attention block with as many parameters, against the amount of text and of sunspots.",
        (small_data.NAME,),
        learning.small_data,
    ),
    "hybrid": Claim(
        "Recurrence and attention combined get the best of both",
        "Blocks of an LSTM and attention beside an LSTM and GPT, all with as many parameters: time and memory of a training "
        "step, time of a token, the loss on a text after equal time, recall.",
        (systems.NAME, statements.NAME),
        learning.hybrid,
    ),
    "overhead": Claim(
        "Sparse, windowed and hashed attention cut the cost of attention",
        "Time and peak memory of a training step against T: full causal attention, a sliding window, a block-sparse layout, and "
        "Reformer's hashed chunks; Longformer, Reformer and Transformer-XL as whole systems beside BERT and GPT.",
        (attention.NAME, systems.NAME),
        cost.overhead,
    ),
}


def verdicts(results: Results) -> list[Verdict]:
    """One for every statement, in their order."""
    run, device = results.suites(), str(results.environment.get("device name", "this device"))
    found = []
    for name, claim in CLAIMS.items():
        rows = [row for suite in claim.suites for row in results.of_suite(suite)]
        missing = tuple(suite for suite in claim.suites if suite not in run)
        found.append(Verdict(name, claim.statement, claim.experiment, device, tuple(claim.answer(rows)), missing))
    return found
