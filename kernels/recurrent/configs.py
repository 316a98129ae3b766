"""Which form runs, its tiles and its warps, in one place, with the reasons."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastseq.kernels.recurrent.cells import (
    coupled_lstm,
    gru,
    layer_norm_gru,
    layer_norm_lstm,
    lstm,
    peephole_lstm,
    rnn,
    slstm,
)
from fastseq.kernels.recurrent.parts import Cell

CELLS = {
    "rnn_tanh": Cell(rnn.step_tanh, rnn.step_backward_tanh, reads="h"),
    "rnn_relu": Cell(rnn.step_relu, rnn.step_backward_relu, reads="h"),
    "lstm": Cell(lstm.step, lstm.step_backward, lstm.candidate),
    "gru": Cell(gru.step, gru.step_backward, reads="h_prev"),
    "coupled_lstm": Cell(coupled_lstm.step, coupled_lstm.step_backward, coupled_lstm.candidate),
    "peephole_lstm": Cell(peephole_lstm.step, peephole_lstm.step_backward, lstm.candidate),
    "layer_norm_lstm": Cell(layer_norm_lstm.step, layer_norm_lstm.step_backward, lstm.candidate),
    "layer_norm_gru": Cell(layer_norm_gru.step, layer_norm_gru.step_backward, reads="h_prev"),
    "slstm": Cell(slstm.step, slstm.step_backward),
}

# Shared memory that a program leaves for everything but its recurrent weights: the state as an operand, the compiler's own.
_RESERVE = 24 << 10
FORMS = ("whole", "stepwise")


class Config(NamedTuple):
    """How a call is launched."""

    form: str  # of FORMS
    tiles: dict[str, int]
    options: dict[str, int]
    reason: str

    def grid(self, batch: int, width: int, lanes: int) -> tuple[int, ...]:
        blocks = triton.cdiv(batch, self.tiles["BB"])
        return (blocks, lanes) if self.form == "whole" else (blocks, triton.cdiv(width, self.tiles["BH"]), lanes)


def accumulator(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def shared_memory(device: torch.device) -> int:
    """Bytes that one program may have."""
    if device.type != "cuda":
        return 32 << 10  # the interpreter has no limit: so little that small sizes take both forms
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def recurrent(
    shared: int,
    dtype: torch.dtype,
    gates: int,
    hidden: int,
    batch: int,
    projected: bool,
    normalised: bool = False,
    form: str | None = None,
) -> Config:
    """Forward or backward pass of one layer, on a device with that much shared memory for a program.

    A pure function. ``form`` forces one, unless a projection stands against it.
    """
    padded = max(16, triton.next_power_of_2(hidden))
    need = gates * padded * padded * dtype.itemsize
    reason = f"recurrent weights {need >> 10} KiB of {(shared - _RESERVE) >> 10} KiB"
    chosen = form or ("whole" if need <= shared - _RESERVE else "stepwise")
    if projected:
        chosen, reason = "stepwise", "a projection needs all units of a step"
    if chosen == "whole":
        # 16 rows is the least a matrix instruction takes; the batch goes to as many programs as there can be
        warps = 8 if padded > 64 or dtype.itemsize > 2 else 4
        return Config("whole", {"BB": 16, "BH": padded}, {"num_warps": warps, "num_stages": 1}, reason)
    if normalised:
        # a program for each row, which sees all its units: 16 of a gate for each thread at most
        warps = min(16, max(1, padded // 256))
        return Config("stepwise", {"BB": 1, "BH": padded}, {"num_warps": warps, "num_stages": 1}, reason)
    # elementwise: a few units for each thread, whole cache lines of a gate
    return Config("stepwise", {"BB": 4, "BH": min(128, padded)}, {"num_warps": 4, "num_stages": 1}, reason)


def forced_form() -> str | None:
    """The environment variable FASTSEQ_TRITON_RECURRENT forces a form, to compare them."""
    form = os.environ.get("FASTSEQ_TRITON_RECURRENT") or None
    if form is not None and form not in FORMS:
        raise ValueError(f"FASTSEQ_TRITON_RECURRENT={form} is none of {', '.join(FORMS)}")
    return form


def of(
    device: torch.device, dtype: torch.dtype, gates: int, hidden: int, batch: int, projected: bool, normalised: bool
) -> Config:
    """The config on a device."""
    return recurrent(shared_memory(device), dtype, gates, hidden, batch, projected, normalised, forced_form())
