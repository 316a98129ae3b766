"""Which form runs, its tiles and its warps, in one place, with the reasons."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastseq.kernels.recurrent.cells import gru, lstm, rnn
from fastseq.kernels.recurrent.parts import Cell

CELLS = {
    "rnn_tanh": Cell(rnn.step_tanh, rnn.step_backward_tanh),
    "rnn_relu": Cell(rnn.step_relu, rnn.step_backward_relu),
    "lstm": Cell(lstm.step, lstm.step_backward),
    "gru": Cell(gru.step, gru.step_backward),
}

# Shared memory that a program leaves for everything but its recurrent weights: the state as an operand, the compiler's own.
_RESERVE = 24 << 10


class Config(NamedTuple):
    """How a call is launched."""

    whole: bool  # one launch for the sequence; else one per step
    tiles: dict[str, int]
    options: dict[str, int]
    reason: str

    def grid(self, batch: int, width: int, lanes: int) -> tuple[int, ...]:
        blocks = triton.cdiv(batch, self.tiles["BB"])
        return (blocks, lanes) if self.whole else (blocks, triton.cdiv(width, self.tiles["BH"]), lanes)


def accumulator(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def shared_memory(device: torch.device) -> int:
    """Bytes that one program may have."""
    if device.type != "cuda":
        return 32 << 10  # the interpreter has no limit: so little that small sizes take both forms
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def recurrent(
    shared: int, dtype: torch.dtype, gates: int, hidden: int, batch: int, projected: bool, form: str | None = None
) -> Config:
    """Forward or backward pass of one layer, on a device with that much shared memory for a program.

    A pure function. ``form`` ("whole" or "stepwise") forces one.
    """
    padded = max(16, triton.next_power_of_2(hidden))
    need = gates * padded * padded * dtype.itemsize
    reason = f"recurrent weights {need >> 10} KiB of {(shared - _RESERVE) >> 10} KiB"
    fits = need <= shared - _RESERVE and not projected
    if projected:
        reason = "a projection needs all units of a step"
    whole = fits if form is None else form == "whole"
    if whole:
        # 16 rows is the least a matrix instruction takes; the batch goes to as many programs as there can be
        warps = 8 if padded > 64 or dtype.itemsize > 2 else 4
        return Config(True, {"BB": 16, "BH": padded}, {"num_warps": warps, "num_stages": 1}, reason)
    # elementwise: a few units for each thread, whole cache lines of a gate
    return Config(False, {"BB": 4, "BH": min(128, padded)}, {"num_warps": 4, "num_stages": 1}, reason)


def of(device: torch.device, dtype: torch.dtype, gates: int, hidden: int, batch: int, projected: bool) -> Config:
    """The config on a device; the environment variable FASTSEQ_TRITON_RECURRENT forces a form, to compare the two."""
    return recurrent(shared_memory(device), dtype, gates, hidden, batch, projected, os.environ.get("FASTSEQ_TRITON_RECURRENT"))
