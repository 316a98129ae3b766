"""The recurrent op on the persistent kernels of ``csrc/recurrent``.

A team of CTAs holds a lane's recurrent weights for the whole launch and exchanges every step's states (forward), or gate
gradients or partial sums of what they lead to (backward); ``plan.py`` says how the work is cut. Tests run the same kernels
without a GPU, on another `Machine`. docs/design/recurrence-on-a-gpu.md explains the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ops.types import Backward, Call, Forward
from ..dense import dense
from ..forms import form_of_query, measured_form
from ..notes import note
from ..precision import fp32_precision
from ..query import RecurrentQuery
from .plan import Device, Plan, plan_of

CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru")
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_MOST_LANES = 63  # their directions are the bits of one number
PLAN, WORTH = "plan ", 3
RANKS = (0, 0)  # of the plans taken forward and backward, for whoever tries others than the best by the model

# runs "forward" or "backward": direction, cell, precision, plan, the other arguments by their names in the native op
Run = Callable[[str, str, str, Plan, dict[str, Any]], None]


class Machine(NamedTuple):
    """Where the kernels run: a GPU, or its model on the host."""

    device: Callable[[torch.device], Device]
    precision: Callable[[], str]  # of fp32: "tf32" or "ieee"
    run: Run


def precision_of(dtype: torch.dtype, machine: Machine) -> str:
    """Of a call's products: "fp16", "bf16", "tf32" or "ieee"."""
    return machine.precision() if dtype == torch.float32 else DTYPES[dtype]


def _plan(call: Call | RecurrentQuery, backward: bool, where: torch.device, machine: Machine, form: str = "") -> Plan:
    """``form``: the plan that was measured to be the fastest for a query; of a call it is looked up."""
    facts = call.cell, precision_of(call.dtype, machine), backward, call.batch, call.lanes, call.hidden, machine.device(where)
    rank = RANKS[backward]
    if not rank:
        form = form if isinstance(call, RecurrentQuery) else measured_form("cuda", call, backward)
        rank = max(0, min(int(form.removeprefix(PLAN)), plan_of(*facts).of - 1)) if form else 0
    return plan_of(*facts, rank)


def forms(query: RecurrentQuery) -> tuple[str, ...]:
    """The best plans by the model, the first unnamed: those that are worth a measurement."""
    return ("", *(f"{PLAN}{rank}" for rank in range(1, min(WORTH, _plan(query, False, query.device, GPU).of))))


def obstacles(query: RecurrentQuery, machine: Machine) -> list[str]:
    """Why the kernels cannot run a call on a machine."""
    against = []
    if query.cell not in CELLS:
        against.append(f"cell {query.cell} is not one of {', '.join(CELLS)}")
    if query.dtype not in DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        against.append(f"dtype {str(query.dtype).removeprefix('torch.')} is not one of {accepted}")
    if query.projected:
        against.append("a projection (proj_size) is not in its kernels")
    if query.zoned:
        against.append("zoneout is not in its kernels")
    if query.lanes > _MOST_LANES:
        against.append(f"{query.lanes} lanes are more than {_MOST_LANES}")
    if not against and query.batch and query.hidden:
        against.append(_plan(query, query.backward, query.device, machine).obstacle)
    return [reason for reason in against if reason]


def variant_on(query: RecurrentQuery, family: str, machine: Machine, form: str = "") -> str:
    """The form of the plan that runs a call."""
    return _plan(query, family == "backward", query.device, machine, form).numbers.form


def forward(call: Forward, machine: Machine) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, h_n, c_n, c, gates, as the op's contract has them."""
    results = y, h_n, c_n, c, gates = call.empty_results(zeros=True)
    _run(
        call, machine, "forward", x_gates=call.input_gates().contiguous(), weight=call.weight.contiguous(),
        vectors=dense(call.vectors), h0=dense(call.h0, call.dtype), c0=dense(call.c0, call.wide), y=y, h_n=h_n, c_n=c_n, c=c,
        gates=gates, **_resets(call),
    )  # fmt: skip
    return results


def backward(call: Backward, machine: Machine) -> tuple[Tensor, ...]:
    """dgates, drecurrent, doutput, dh0, dc0, dreset_h, dreset_c, as the op's contract has them."""
    dtype, wide = call.dtype, call.wide
    results = dgates, drecurrent, _, dh0, dc0, dreset_h, dreset_c = call.empty_results(zeros=True)
    _run(
        call, machine, "backward", dy=dense(call.dy, dtype), dh_n=dense(call.dh_n, dtype), dc_n=dense(call.dc_n, wide),
        dc=dense(call.dc, wide), weight=call.weight.contiguous(), vectors=dense(call.vectors), h0=dense(call.h0, dtype),
        c0=dense(call.c0, wide), y=call.y.contiguous(), c=call.c.contiguous(), gates=call.gates.contiguous(), dgates=dgates,
        drecurrent=drecurrent, dh0=dh0, dc0=dc0, **_resets(call), dreset_h=dreset_h, dreset_c=dreset_c,
    )  # fmt: skip
    return results


def _resets(call: Call) -> dict[str, Tensor | None]:
    rows = None if call.resets is None else call.resets.contiguous().view(torch.uint8)
    return {"resets": rows, "reset_h": dense(call.reset_h, call.dtype), "reset_c": dense(call.reset_c, call.wide)}


def _run(call: Call, machine: Machine, direction: str, **tensors: Tensor | None) -> None:
    if not (call.batch and call.hidden):
        return
    chosen = _plan(call, direction == "backward", call.rows.device, machine)
    note(chosen)
    starts, lengths = call.row_offsets()
    sizes = {"steps": call.steps, "batch": call.batch, "lanes": call.lanes, "hidden": call.hidden, "reverse": call.reverse_bits}
    arguments = tensors | {"starts": starts, "lengths": lengths} | sizes | chosen.exchange_buffers(call.rows)
    machine.run(direction, call.cell, precision_of(call.dtype, machine), chosen, arguments)


@lru_cache
def _device(index: int) -> Device:
    multiprocessors, shared_bytes, cluster, cooperative = torch.ops.fastseq_native.cuda_limits(index)
    return Device(multiprocessors, shared_bytes, cluster, bool(cooperative))


def _launch(direction: str, cell: str, precision: str, chosen: Plan, arguments: dict[str, Any]) -> None:
    native = torch.ops.fastseq_native
    op = native.recurrent_cuda_forward if direction == "forward" else native.recurrent_cuda_backward
    op.default(cell=cell, precision=precision, plan=chosen.native, **arguments)


def _limits(device: torch.device) -> Device:
    return _device(torch.cuda.current_device() if device.index is None else device.index)


GPU = Machine(_limits, fp32_precision, _launch)


def why_not(query: RecurrentQuery) -> list[str]:
    return obstacles(query, GPU)


def form(query: RecurrentQuery, family: str) -> str:
    """The plan that was measured to be the fastest for a call; "": the best by the model."""
    return form_of_query("cuda", query, family == "backward")


def variant(query: RecurrentQuery, family: str) -> str:
    return variant_on(query, family, GPU, form(query, family))


def recurrent_forward(call: Forward) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return forward(call, GPU)


def recurrent_backward(call: Backward) -> tuple[Tensor, ...]:
    return backward(call, GPU)
