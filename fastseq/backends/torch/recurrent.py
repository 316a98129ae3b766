"""LSTM, GRU and RNN by torch's kernels: a single step, and whole stacks of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import library
from ..cpu import recurrent as native
from ..query import RecurrentQuery

# the LSTM returns h and c, the others h
STEPS: dict[str, Any] = {
    "lstm": torch._VF.lstm_cell,
    "gru": torch._VF.gru_cell,
    "rnn_tanh": torch._VF.rnn_tanh_cell,
    "rnn_relu": torch._VF.rnn_relu_cell,
}
# of the cells that torch has
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
LAYERS: dict[str, Any] = {
    "lstm": torch._VF.lstm,
    "gru": torch._VF.gru,
    "rnn_tanh": torch._VF.rnn_tanh,
    "rnn_relu": torch._VF.rnn_relu,
}


def step(
    cell: str,
    input: Tensor,
    hx: Sequence[Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, ...]:
    """One step: the new states [B, H], from input [B, I] and states [B, H] (None: zeros)."""
    if hx is None:
        zeros = input.new_zeros(input.shape[0], w_hh.shape[1])
        hx = (zeros, zeros) if cell == "lstm" else (zeros,)
    results = STEPS[cell](input, tuple(hx) if cell == "lstm" else hx[0], w_ih, w_hh, b_ih, b_hh)
    return results if isinstance(results, tuple) else (results,)


def layers(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor] | None,
    params: Sequence[Tensor],
    *,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output and final states of a whole stack; arguments and shapes are those of ``functional.recurrent``."""
    lanes, each = num_layers * (2 if bidirectional else 1), 2 + 2 * has_biases
    projected = cell == "lstm" and len(params) > each * lanes
    if states is None:
        batch: Any = batch_sizes[0] if batch_sizes is not None else input.shape[0 if batch_first else 1]
        zeros = input.new_zeros(lanes, batch, params[0].shape[0] // GATES[cell])
        h = input.new_zeros(lanes, batch, params[1].shape[1]) if projected else zeros
        states = (h, zeros) if cell == "lstm" else (h,)
    hx = tuple(states) if cell == "lstm" else states[0]
    if batch_sizes is None:
        arguments: tuple[Any, ...] = (input, hx, list(params))
        results = LAYERS[cell](*arguments, has_biases, num_layers, float(dropout), training, bidirectional, batch_first)
    else:
        arguments = (input, batch_sizes, hx, list(params))
        results = LAYERS[cell](*arguments, has_biases, num_layers, float(dropout), training, bidirectional)
    return results[0], tuple(results[1:])


MOST_STEPS = 65_535  # that cuDNN counts


def serves(query: RecurrentQuery) -> bool:
    """Whether torch has such layers: of one or two directions, without heads."""
    return query.cell in GATES and not (query.zoned or query.resets) and query.layout != "lengths" and query.lanes <= 2


def fuses(query: RecurrentQuery) -> bool:
    """Whether torch has a kernel for such layers (cuDNN's, oneDNN's) or for such a step (on a GPU)."""
    q = query
    if not serves(q):
        return False
    if q.device.type == "cuda":
        return q.op == "recurrent_cell" or (_has_cudnn() and q.steps <= MOST_STEPS)
    return q.op == "recurrent" and not q.projected  # a projected LSTM is not oneDNN's


def _has_cudnn() -> bool:
    return torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled


def lacking(query: RecurrentQuery) -> str | None:
    """Why no kernel of ours runs a call on a CPU; None: one does, or it is on a GPU."""
    if query.device.type != "cpu":
        return None
    if query.dtype not in native.DTYPES:
        return f"fastseq has no kernel for {str(query.dtype).removeprefix('torch.')} on a CPU"
    return library.reason()
