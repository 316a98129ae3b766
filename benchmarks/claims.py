"""What people say about recurrence and attention, and what the figures of this run say to it.

A verdict is computed from rows; there is none without them. To answer a claim, write a function from the rows
of a suite to a Verdict and enter it in ANSWERS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

from .analysis import local_exponents, power_law
from .attention_providers import OWN
from .presentation import bytes_text, time_text
from .results import Results, Row
from .suites import attention as alone
from .suites import sequential_vs_parallel as length
from .suites.sequential_vs_parallel import curve

STATEMENTS = {
    "parallel-ops": "Attention needs O(1) sequential operations per layer, recurrence O(T)",
    "train-faster": "Transformers train faster than LSTM/GRU because they are parallel",
    "infer-faster": "Transformers also infer faster",
    "memory-more": "Transformers need more memory than RNNs",
    "memory-less": "Transformers need less memory, since they keep no hidden state",
    "long-range": "Recurrence forgets; attention reaches any distance",
    "vanishing": "RNN gradients vanish or explode, LSTM/GRU mitigate it",
    "variable-length": "RNNs must pad; attention handles variable length without padding",
    "fixed-context": "A Transformer sees a fixed window; Transformer-XL's segment recurrence goes beyond it",
    "order": "Attention alone does not know the order, so positions must be added",
    "small-data": "RNNs do better on short dependencies and small data",
    "hybrid": "Recurrence and attention combined get the best of both",
    "overhead": "Sparse, windowed and hashed attention cut the cost of attention",
}
NOT_MEASURED = "not measured yet"
FLAT = 0.5  # below this exponent the time counts as not growing with T
EQUAL = 0.03  # relative differences below this decide nothing
# Transformers and recurrent layers in the comparison at equal parameters.
TRANSFORMER, LSTMS = "attention block", ("torch.nn.LSTM", "fastseq.LSTM")
ATTENTION = ("naive attention", "fused attention")


@dataclass(frozen=True)
class Verdict:
    claim: str
    statement: str
    verdict: str  # "holds", "holds only …", "does not hold here" or NOT_MEASURED
    figures: str = ""  # the numbers it follows from

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def over_lengths(holds: dict[int, bool | None]) -> str:
    """A verdict from one answer per length; None where the difference decides nothing."""
    lengths = sorted(holds)
    answers = [holds[T] for T in lengths]
    span = f"T = {lengths[0]}…{lengths[-1]}"
    if all(answers):
        return f"holds for {span}"
    if not any(answers):
        return f"does not hold here, {span}"
    first, last = answers.index(True), len(answers) - 1 - answers[::-1].index(True)
    if all(answers[first : last + 1]):
        if last == len(answers) - 1:
            return f"holds only from T = {lengths[first]} on"
        if first == 0:
            return f"holds only up to T = {lengths[last]}"
        return f"holds only for T = {lengths[first]}…{lengths[last]}"
    return "holds only at T = " + ", ".join(str(T) for T in lengths if holds[T])


def less(a: dict[int, float], b: dict[int, float]) -> dict[int, bool | None]:
    """Per length measured for both: is a less than b?"""
    shared = sorted(a.keys() & b.keys())
    return {T: None if abs(a[T] / b[T] - 1) < EQUAL else a[T] < b[T] for T in shared}


def lowest(curves: Iterable[dict[int, float]]) -> dict[int, float]:
    """Per length the lowest value, where every curve that has points was measured."""
    curves = [c for c in curves if c]
    shared = set.intersection(*(set(c) for c in curves)) if curves else set()
    return {T: min(c[T] for c in curves) for T in sorted(shared)}


def parallel_ops(rows: list[Row]) -> tuple[str, str] | None:
    """O(1) sequential operations would show as a time that does not grow with T, O(T) as one that does."""
    attention = curve(rows, "fused attention", "inference")
    recurrence = lowest(curve(rows, name, "inference") for name in (*LSTMS, "torch.nn.GRU", "fastseq.GRU"))
    if len(attention) < 2 or len(recurrence) < 2:
        return None
    steps = local_exponents(list(attention), list(attention.values()))
    flat = 0
    for _, high, slope in steps:
        if slope >= FLAT:
            break
        flat = int(high)
    fits = [power_law(list(c), list(c.values())) for c in (attention, recurrence)]
    assert fits[0] and fits[1]
    linear = FLAT <= fits[1].exponent
    if not linear:
        verdict = "does not hold here: the recurrence does not grow with T"
    elif flat == max(attention):
        verdict = f"holds for T = {min(attention)}…{flat}: attention takes no longer for longer sequences"
    elif flat:
        verdict = f"holds only up to T = {flat}: beyond it the device is full and attention grows with T as well"
    else:
        verdict = (
            f"does not hold here as time: from T = {min(attention)} on the device is full and attention grows with T as well"
        )
    T = max(recurrence)
    figures = (
        f"forward time grows as T^{fits[0].exponent:.2f} for fused attention and T^{fits[1].exponent:.2f} "
        f"for the fastest recurrent layer, which takes {time_text(recurrence[T] / T)} per step"
    )
    return verdict, figures


def train_faster(rows: list[Row]) -> tuple[str, str] | None:
    """One training step at equal parameters and equal tokens: an attention block against the fastest LSTM."""
    block = curve(rows, TRANSFORMER, "training")
    lstm = lowest(curve(rows, name, "training") for name in LSTMS)
    holds = less(block, lstm)
    if not holds:
        return None
    crossing = length.compare(block, lstm)
    ends = sorted({min(holds), max(holds)})
    tokens = {r.T: r.tokens for r in rows}
    figures = ", ".join(
        f"T = {T}: {tokens[T] / block[T]:,.0f} tokens/s against {tokens[T] / lstm[T]:,.0f} for the LSTM" for T in ends
    )
    where = f"; crossover at T ≈ {crossing.at:.0f}" if crossing and crossing.at else "; no crossover in the measured range"
    return over_lengths(holds), figures + where + " (equal parameters, best of torch.nn.LSTM and fastseq.LSTM)"


def _memory(rows: list[Row], *, more: bool) -> tuple[str, str] | None:
    recurrence = lowest(curve(rows, name, "training", "memory") for name in (*LSTMS, "torch.nn.GRU", "fastseq.GRU"))
    verdicts, figures = [], []
    for name in ATTENTION:
        attention = curve(rows, name, "training", "memory")
        holds = less(recurrence, attention) if more else less(attention, recurrence)
        if not holds:
            continue
        T = max(holds)
        verdicts.append(f"{name} {over_lengths(holds)}")
        figures.append(f"{name} {bytes_text(attention[T])}")
    if not verdicts:
        return None
    text = (
        f"peak of a training step at T = {T}, equal width: {', '.join(figures)}, "
        f"smallest recurrent layer {bytes_text(recurrence[T])}"
    )
    return "; ".join(verdicts), text


def memory_more(rows: list[Row]) -> tuple[str, str] | None:
    return _memory(rows, more=True)


def memory_less(rows: list[Row]) -> tuple[str, str] | None:
    return _memory(rows, more=False)


def overhead(rows: list[Row]) -> tuple[str, str] | None:
    """Training step of causal attention over a window, and over blocks, against all keys, by the same program."""
    verdicts, figures = [], []
    for quantity, what, text in (("seconds", "time", time_text), ("memory", "memory", bytes_text)):
        full = alone.curve(rows, alone.FULL, OWN, quantity)
        for kind, name in ((alone.WINDOW, "sliding window"), (alone.BLOCKS, "block-sparse")):
            sparse = alone.curve(rows, kind, OWN, quantity)
            holds = less(sparse, full)
            if not holds:
                continue
            T = max(holds)
            verdicts.append(f"{what}, {name}: {over_lengths(holds)}")
            figures.append(f"{what}, {name} {text(sparse[T])} against {text(full[T])} at T = {T}")
    return (
        ("; ".join(verdicts), f"{OWN}, forward + backward: {'; '.join(figures)}; hashed attention not measured")
        if verdicts
        else None
    )


ANSWERS: dict[str, tuple[str, Callable[[list[Row]], tuple[str, str] | None]]] = {
    "parallel-ops": (length.NAME, parallel_ops),
    "train-faster": (length.NAME, train_faster),
    "memory-more": (length.NAME, memory_more),
    "memory-less": (length.NAME, memory_less),
    "overhead": (alone.NAME, overhead),
}


def verdicts(results: Results) -> list[Verdict]:
    """One for every statement, in their order."""
    found = []
    for claim, statement in STATEMENTS.items():
        suite, answer = ANSWERS.get(claim, ("", lambda rows: None))
        result = answer(results.of_suite(suite))
        found.append(Verdict(claim, statement, *(result or (NOT_MEASURED, ""))))
    return found
