"""The form for one step: both matrix products and the gates in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import fp32_precision
from .recurrent_args import ForwardLaunch
from .recurrent_stepwise import begin


def forward(launch: ForwardLaunch) -> None:
    from fastseq.kernels.recurrent import single

    call = launch.call
    h0, c0, resets = launch.h0, launch.c0, launch.resets.rows
    if launch.resets.h is not None or launch.resets.c is not None:
        h0 = _started(launch, h0, launch.h_n, launch.resets.h)
        c0, resets = _started(launch, c0, launch.c_n, launch.resets.c), None
    x, w_ih, b_ih = (None if tensor is None else tensor.contiguous() for tensor in (call.x, call.w_ih, call.b_ih))
    single.forward[launch.grid(call.hidden)](
        x, w_ih, b_ih, launch.weight, launch.vectors, h0, c0, launch.y, launch.h_n, launch.c_n, launch.c,
        launch.gates, resets, None if resets is None else call.reverse_bits, launch.zoneout, call.batch, call.lanes,
        call.x.shape[-1], call.hidden, STEP=launch.math.step, PRECISION=fp32_precision(), **launch.options,
    )  # fmt: skip


def _started(launch: ForwardLaunch, first: Tensor | None, like: Tensor, again: Tensor | None) -> Tensor | None:
    """The state that the step starts from, where it begins anew from others than zeros."""
    if not like.numel():
        return None
    state = torch.zeros_like(like) if first is None else first.clone()
    begin(launch, state, again)
    return state
