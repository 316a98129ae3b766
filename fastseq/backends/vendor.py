"""PyTorch's own kernels, where none of ours is known to be faster: a single step of LSTM, GRU and RNN.

torch's cell is two matrix products and one fused kernel, called without a detour through Python; on a CPU that is 1.3 to 6 times
faster than a sequence of one. On a GPU the fused step of ``kernels/recurrent/single.py`` has not been measured against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .query import Query

name = "torch"
devices = ("any",)
ops: tuple[str, ...] = ()  # the step is called before an op would be

# the LSTM returns h and c, the others h
_FUNCTIONS: dict[str, Any] = {
    "lstm": torch._VF.lstm_cell,
    "gru": torch._VF.gru_cell,
    "rnn_tanh": torch._VF.rnn_tanh_cell,
    "rnn_relu": torch._VF.rnn_relu_cell,
}


def available() -> str | None:
    return None


def why_not(query: Query) -> list[str]:
    return ["runs single steps of LSTM, GRU and RNN only"]


def recurrent_cell(
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
    results = _FUNCTIONS[cell](input, tuple(hx) if cell == "lstm" else hx[0], w_ih, w_hh, b_ih, b_hh)
    return results if isinstance(results, tuple) else (results,)
