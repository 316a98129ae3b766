"""The form that reads the recurrent weights in every step: one launch, and two buffers through which a step hears of another."""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import fp32_precision
from .recurrent_args import BackwardLaunch, ForwardLaunch


def forward(launch: ForwardLaunch) -> None:
    from fastseq.kernels.recurrent import streamed

    call, weight = launch.call, _padded(launch)
    h = call.rows.new_zeros(call.lanes, 2, call.batch, weight.shape[-1])
    if launch.h0 is not None:
        h[:, 0, :, : call.hidden] = launch.h0
    _start(launch.c_n, launch.c0)
    streamed.forward[launch.grid(call.hidden)](
        launch.x_gates, weight, launch.vectors, h, launch.c_n, launch.y, launch.h_n, launch.c, launch.gates, launch.layout,
        launch.zoneout, launch.resets, call.hidden, weight.shape[-1], STEP=launch.math.step, PRECISION=fp32_precision(),
        **launch.options,
    )  # fmt: skip


def backward(launch: BackwardLaunch) -> None:
    from fastseq.kernels.recurrent import streamed

    call, weight = launch.call, _padded(launch)
    dr_gates = call.rows.new_empty(call.lanes, 2, call.batch, weight.shape[1] * weight.shape[-1])
    dr_gates[:, 0] = 0
    dh = launch.dh0.new_empty(launch.dh0.shape, dtype=call.wide)
    _start(dh, launch.dh_n)
    _start(launch.dc0, launch.dc_n)
    streamed.backward[launch.grid(call.hidden)](
        launch.dy, dh, launch.dc0, launch.dc, dr_gates, weight, launch.vectors, launch.h0, launch.c0, launch.y, launch.c,
        launch.gates, launch.dgates, launch.drecurrent, launch.dh0, launch.layout, launch.zoneout, launch.resets,
        call.hidden, weight.shape[-1], PRECISION=fp32_precision(), **launch.options,
    )  # fmt: skip


def _padded(launch: ForwardLaunch | BackwardLaunch) -> Tensor:
    """[D, G, HP, HP]: the recurrent weights, with zeros up to a multiple of 16 units."""
    call = launch.call
    more = -call.hidden % 16
    weight = launch.weight.unflatten(1, (-1, call.hidden))
    return torch.nn.functional.pad(weight, (0, more, 0, more)) if more else weight


def _start(state: Tensor, first: Tensor | None) -> None:
    if first is None:
        state.zero_()
    else:
        state.copy_(first)
