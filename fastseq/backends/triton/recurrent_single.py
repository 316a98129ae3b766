"""The form for one step: both matrix products and the gates in one launch."""

from __future__ import annotations

from ..precision import fp32_precision
from .recurrent_args import ForwardLaunch


def forward(launch: ForwardLaunch) -> None:
    from fastseq.kernels.recurrent import single

    call = launch.call
    x, w_ih, b_ih = (None if tensor is None else tensor.contiguous() for tensor in (call.x, call.w_ih, call.b_ih))
    single.forward[launch.grid(call.hidden)](
        x, w_ih, b_ih, launch.weight, launch.vectors, launch.h0, launch.c0, launch.y, launch.h_n, launch.c_n, launch.c,
        launch.gates, launch.zoneout, call.batch, call.lanes, call.x.shape[-1], call.hidden,
        STEP=launch.math.step, PRECISION=fp32_precision(), **launch.options,
    )  # fmt: skip
