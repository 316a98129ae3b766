"""The recurrent op on the Triton kernels of ``kernels/recurrent``.

One step of a small batch in one launch; whole sequences in one launch where a program can hold the recurrent weights, or can read
them fast enough in every step; else a matrix product and one fused kernel per step. ``kernels/recurrent/configs.py`` says which
and why. Where no unit sees another, back through all steps at once, if that was measured to be faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...cells import CELLS
from ...ops.types import Backward, Forward
from ...reference import recurrent_parallel
from ..forms import form_of_query, measured_form
from ..notes import note
from ..precision import fp32_precision
from ..query import RecurrentQuery
from . import recurrent_single, recurrent_stepwise, recurrent_streamed
from ._launch import dtype_obstacles, on
from .recurrent_args import BackwardLaunch, ForwardLaunch
from .scan import scan_backward

PARALLEL = "parallel"  # the form of a backward pass by one scan, where no unit sees another


def why_not(query: RecurrentQuery) -> list[str]:
    from fastseq.kernels.recurrent import configs

    unknown = [] if query.cell in configs.CELLS else [f"no Triton cell {query.cell}"]
    return unknown + dtype_obstacles(query)


def forms(query: RecurrentQuery) -> tuple[str, ...]:
    """The form by the rules, unnamed, and the others that can walk a sequence; or go back through it at once."""
    if query.steps == 1 or query.projected:
        return ("",)
    return ("", "whole", "streamed", "stepwise", *((PARALLEL,) if _may_be_parallel(query) else ()))


def _may_be_parallel(query: RecurrentQuery) -> bool:
    return query.hidden == 1 and bool(CELLS[query.cell].jacobian) and not query.zoned and not query.resets


def form(query: RecurrentQuery, family: str) -> str:
    """The form that was measured to be the fastest for a call; "": the rules choose."""
    return form_of_query("triton", query, family == "backward")


def variant(query: RecurrentQuery, family: str) -> str:
    """The form and tiles that run a call."""
    from fastseq.kernels.recurrent import configs

    row = CELLS[query.cell]
    if family == "backward" and _may_be_parallel(query) and (configs.forced_form() or form(query, family)) == PARALLEL:
        return PARALLEL
    config = configs.of(
        query.device, query.dtype, len(row.gates), query.hidden, query.batch, query.projected, row.normalized,
        one_step=query.steps == 1 and query.layout == "padded", backward=family == "backward",
        exact=query.dtype == torch.float32 and fp32_precision() == "ieee", measured=form(query, family) or None,
    )  # fmt: skip
    return " ".join((config.form, *(f"{name}={size}" for name, size in config.tiles.items())))


def recurrent_forward(call: Forward) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    launch = ForwardLaunch(call)
    if call.batch and call.hidden:
        note(f"{launch.config.form} ({launch.config.reason})")
        with on(call.x.device):
            _FORWARD[launch.config.form](launch)
    return launch.results


def recurrent_backward(call: Backward) -> tuple[Tensor, ...]:
    if recurrent_parallel.serves(call) and _form_of(call) == PARALLEL:
        note(f"backward {PARALLEL} in time")
        return recurrent_parallel.backward(call, scan_backward)
    launch = BackwardLaunch(call)
    if call.batch and call.hidden:
        with on(call.y.device):
            _BACKWARD[launch.config.form](launch)
    return launch.results


def _form_of(call: Backward) -> str:
    """The form that is forced, or was measured to be the fastest."""
    from fastseq.kernels.recurrent import configs

    return configs.forced_form() or measured_form("triton", call, True)


def _whole_forward(launch: ForwardLaunch) -> None:
    from fastseq.kernels.recurrent import whole

    whole.forward[launch.grid(launch.call.hidden)](
        launch.x_gates, launch.weight, launch.vectors, launch.h0, launch.c0, launch.y, launch.h_n, launch.c_n, launch.c,
        launch.gates, launch.layout, launch.zoneout, launch.resets, launch.call.hidden,
        STEP=launch.math.step, PRECISION=fp32_precision(), **launch.options,
    )  # fmt: skip


def _whole_backward(launch: BackwardLaunch) -> None:
    from fastseq.kernels.recurrent import whole

    whole.backward[launch.grid(launch.call.hidden)](
        launch.dy, launch.dh_n, launch.dc_n, launch.dc, launch.weight, launch.vectors, launch.h0, launch.c0, launch.y, launch.c,
        launch.gates, launch.dgates, launch.drecurrent, launch.doutput, launch.dh0, launch.dc0, launch.layout, launch.zoneout,
        launch.resets, launch.call.hidden, PRECISION=fp32_precision(), **launch.options,
    )  # fmt: skip


_FORWARD = {
    "single": recurrent_single.forward,
    "whole": _whole_forward,
    "streamed": recurrent_streamed.forward,
    "stepwise": recurrent_stepwise.forward,
}
# a single step goes backward stepwise
_BACKWARD = {"whole": _whole_backward, "streamed": recurrent_streamed.backward, "stepwise": recurrent_stepwise.backward}
