"""Where torch's own kernels are the faster ones on a CPU. A backend that is forced overrides this table.

One thread, Intel Xeon with AVX-512 and AMX, torch 2.13, minima of CPU time. A call of ours costs some 70 us of Python, twice that
in training, before its kernel starts. torch's GRU and RNN start several small kernels for every step, so ours win from a number
of steps on; its LSTM is one call of oneDNN, which ours overtake late or not at all, but where oneDNN lays out large weights anew
for few rows. With short sequences torch keeps the scores of attention in cache, and needs no second pass for the weights.
"""

from __future__ import annotations

from typing import NamedTuple

from ..query import RecurrentQuery

_WIDE = 192  # hidden units from which weights outweigh calls
_MANY = 5  # rows of a batch likewise


class Steps(NamedTuple):
    """The longest sequence that torch's kernel runs faster than ours, and the shortest."""

    inference: int
    training: int
    first: int = 1


_RNN = (Steps(0, 12), Steps(0, 10), Steps(0, 6)), (Steps(0, 5), Steps(0, 6), Steps(0, 8))
# narrow and wide: one direction of few rows, of many rows, both directions
_STEPS: dict[str, tuple[tuple[Steps, Steps, Steps], tuple[Steps, Steps, Steps]]] = {
    "gru": ((Steps(0, 5), Steps(0, 4), Steps(0, 2)), (Steps(0, 3), Steps(0, 7), Steps(0, 5))),
    "rnn_tanh": _RNN,
    "rnn_relu": _RNN,
    "lstm": ((Steps(0, 32), Steps(0, 32), Steps(0, 16)), (Steps(0, 0), Steps(0, 16, 2), Steps(0, 32, 2))),
}
LONGEST_STEPS = max(max(row) for widths in _STEPS.values() for rows in widths for row in rows)

DROPOUT = "fastseq has no CPU kernel with dropout"
BIAS_GRADIENT = "fastseq has no CPU kernel with a gradient of the bias"
FAST = "torch's fused path for inference is faster for short sequences"

# keys up to which torch's products and softmax are faster than our tiles where weights are returned
_KEYS_WITH_WEIGHTS = 256
# tokens up to which nn.MultiheadAttention's path for inference is faster than ours: with weights, without
FAST_PATH = {True: 512, False: 256}


def steps_of(cell: str, hidden: int, batch: int, lanes: int) -> Steps:
    """The row for LSTM, GRU or RNN of ``lanes`` directions."""
    return _STEPS[cell][hidden >= _WIDE][2 if lanes == 2 else batch >= _MANY]


def short_layers(query: RecurrentQuery, gradients: bool) -> str | None:
    """Why torch's LSTM, GRU or RNN takes a call; None: ours does."""
    inference, training, first = steps_of(query.cell, query.hidden, query.batch, query.lanes)
    limit = training if gradients else inference
    if not first <= query.steps <= limit:
        return None
    return f"torch's kernel is faster up to {limit} steps {'in training' if gradients else 'without gradients'}"


def short_weights(keys: int) -> str | None:
    """Why torch's products and softmax take a call that returns the weights; None: ours do."""
    if keys > _KEYS_WITH_WEIGHTS:
        return None
    return f"torch's products and softmax are faster up to {_KEYS_WITH_WEIGHTS} keys, with the weights returned"
