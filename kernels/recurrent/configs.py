"""Which form runs, its tiles and its warps, in one place, with the reasons."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastseq.kernels.recurrent.args import Cell
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
# Recurrent weights that a program reads from L2 while two kernels are launched: 64 bytes a clock, 2 to 3 us for each of the two.
_STREAMED = 512 << 10
# Batches beyond leave more blocks than there are multiprocessors, and a product that shares the weights among rows is full.
_STREAMED_BATCH = 1024
# Rows of one matrix instruction; more of them are work enough for products of torch's.
_SINGLE_BATCH = 16
# Registers of a thread: else the compiler spills a few to make room for another program, which these kernels have no use for.
_ALL_REGISTERS = 255
FORMS = ("single", "whole", "streamed", "stepwise")


class Config(NamedTuple):
    """How a call is launched."""

    form: str  # of FORMS
    tiles: dict[str, int]
    options: dict[str, int]
    reason: str

    def grid(self, batch: int, width: int, lanes: int) -> tuple[int, ...]:
        blocks = triton.cdiv(batch, self.tiles["BB"])
        walks = self.form in ("whole", "streamed")
        return (blocks, lanes) if walks else (blocks, triton.cdiv(width, self.tiles["BH"]), lanes)


def accumulator(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def shared_memory(device: torch.device) -> int:
    """Bytes that one program may have."""
    if device.type != "cuda":
        return 32 << 10  # the interpreter has no limit: so little that small sizes take several forms
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def recurrent(
    shared: int,
    dtype: torch.dtype,
    gates: int,
    hidden: int,
    batch: int,
    projected: bool,
    normalized: bool = False,
    form: str | None = None,
    one_step: bool = False,
    backward: bool = False,
    exact: bool = False,
) -> Config:
    """Forward or backward pass of one layer, on a device with that much shared memory for a program.

    A pure function. ``form`` forces one, unless it cannot run the call. ``exact``: fp32 is multiplied without tensor cores.
    """
    divided = not projected and not normalized  # units of a step among programs, or one after another
    able = {"single": divided and one_step and not backward, "whole": not projected, "streamed": divided, "stepwise": True}
    padded = max(16, triton.next_power_of_2(hidden))
    if form is not None and able.get(form):
        chosen, reason = form, "forced by FASTSEQ_TRITON_RECURRENT"
    elif one_step:
        chosen, reason = _one_step(batch, projected, normalized, backward)
    else:
        # such a product loads all that a thread multiplies before it begins: beyond 64 units it spills kilobytes, going forward
        crowded = exact and padded > 64 and not backward
        resident, read = gates * padded**2 * dtype.itemsize, gates * hidden**2 * dtype.itemsize
        chosen, reason = _many_steps(shared, resident, read, batch, able, crowded)
    if chosen == "single":
        return Config("single", *_single(dtype, gates, batch), reason)
    if chosen == "whole":
        # 16 rows is the least a matrix instruction takes; the batch goes to as many programs as there can be. Going
        # backward a normalized cell has its saved products beside the saved gates, more than 4 warps hold
        warps = 8 if padded > 64 or dtype.itemsize > 2 or (normalized and backward) else 4
        return Config("whole", {"BB": 16, "BH": padded}, {"num_warps": warps, "num_stages": 1}, reason)
    if chosen == "streamed":
        return Config("streamed", *_streamed(shared, dtype, gates, hidden, backward, exact), reason)
    if normalized:
        # a program for each row, which sees all its units: 16 of a gate for each thread at most
        warps = min(16, max(1, padded // 256))
        return Config("stepwise", {"BB": 1, "BH": padded}, {"num_warps": warps, "num_stages": 1}, reason)
    # elementwise: a few units for each thread, whole cache lines of a gate
    return Config("stepwise", {"BB": 4, "BH": min(128, padded)}, {"num_warps": 4, "num_stages": 1}, reason)


def _one_step(batch: int, projected: bool, normalized: bool, backward: bool) -> tuple[str, str]:
    if projected:
        return "stepwise", "a projection needs all units of a step"
    if normalized:
        return "stepwise", "one step; its normalization needs all units of a row in one program"
    if backward:
        return "stepwise", "one step backward is elementwise work before a single product"
    if batch > _SINGLE_BATCH:
        return "stepwise", f"one step for {batch} rows, more than {_SINGLE_BATCH}: torch's products are better"
    return "single", f"one step for {batch} rows, at most {_SINGLE_BATCH}: one launch, every weight read once"


def _many_steps(shared: int, resident: int, read: int, batch: int, able: dict[str, bool], crowded: bool) -> tuple[str, str]:
    """``resident``, ``read``: bytes of recurrent weights that a program holds, or reads in a step."""
    if not able["whole"]:
        return "stepwise", "a projection needs all units of a step"
    reason = f"recurrent weights take {resident >> 10} KiB of {(shared - _RESERVE) >> 10} KiB of shared memory"
    if crowded:
        reason = "exact products of fp32 with more than 64 units at once spill"
    elif resident <= shared - _RESERVE:
        return "whole", reason
    if not able["streamed"]:
        return "stepwise", f"{reason}, and normalization needs all units of a row in one program"
    if batch > _STREAMED_BATCH:
        return (
            "stepwise",
            f"{reason}, and a batch of {batch} is more than {_STREAMED_BATCH}: products share the weights among rows",
        )
    if read > _STREAMED:
        return "stepwise", f"{reason}, and reading {read >> 10} KiB from L2 takes a program longer than two launches a step"
    return "streamed", f"{reason}, but reading {read >> 10} KiB from L2 takes a program no longer than two launches a step"


def _single(dtype: torch.dtype, gates: int, batch: int) -> tuple[dict[str, int], dict[str, int]]:
    power = triton.next_power_of_2(gates)
    if batch <= 4:
        rows = triton.next_power_of_2(batch)
        # 16 rows of weights, at most 64 bytes of them under way for each thread, and 64 sums
        depth = min(512 // dtype.itemsize, 512 // rows)
        tiles = {"BB": rows, "GP": power, "BH": 16 // power, "BK": depth, "DOT": False}
        return tiles, {"num_warps": 4, "num_stages": 1, "maxnreg": _ALL_REGISTERS}
    # 8 rows of weights for each warp; of each row two cache lines at a time, three times under way
    tiles = {"BB": 16, "GP": power, "BH": 32 // power, "BK": 256 // dtype.itemsize, "DOT": True}
    return tiles, {"num_warps": 4, "num_stages": 4}


def _streamed(
    shared: int, dtype: torch.dtype, gates: int, hidden: int, backward: bool, exact: bool
) -> tuple[dict[str, int], dict[str, int]]:
    # As few blocks of units, each of which waits for its first weights, as registers allow: 8 or 4 values of a tile a thread.
    # Rows that are no whole vectors take more registers, for addresses; exact products, for all that a thread multiplies.
    light = dtype.itemsize == 2 and not backward and (gates < 4 or hidden % 16 == 0)
    units = min(128 if light else 32 if exact and not backward else 64, max(16, triton.next_power_of_2(hidden)))
    # tiles of 8 KiB, of every gate one beside the other, or of 16 KiB: enough under way for the latency of L2
    depth = 256 // dtype.itemsize if backward else 32
    stage = (units * (1 if backward else gates) + 16) * depth * dtype.itemsize
    stages = max(1, min(4, (shared - _RESERVE) // stage + 1))  # one is in registers
    options = {"num_warps": 8, "num_stages": stages}
    return {"BB": 16, "BH": units, "BK": depth}, options if backward else options | {"maxnreg": _ALL_REGISTERS}


def forced_form() -> str | None:
    """The environment variable FASTSEQ_TRITON_RECURRENT forces a form, to compare them."""
    form = os.environ.get("FASTSEQ_TRITON_RECURRENT") or None
    accepted = (*FORMS, "parallel")  # the last has no kernel here: the backward pass of a scan
    if form is not None and form not in accepted:
        raise ValueError(f"FASTSEQ_TRITON_RECURRENT={form} is none of {', '.join(accepted)}")
    return form


def of(
    device: torch.device,
    dtype: torch.dtype,
    gates: int,
    hidden: int,
    batch: int,
    projected: bool,
    normalized: bool,
    one_step: bool,
    backward: bool,
    exact: bool,
    measured: str | None = None,
) -> Config:
    """The config on a device. ``measured``: the form that was the fastest there."""
    shared, form = shared_memory(device), forced_form()
    config = recurrent(shared, dtype, gates, hidden, batch, projected, normalized, form or measured, one_step, backward, exact)
    return config._replace(reason="as measured") if measured and not form and config.form == measured else config
