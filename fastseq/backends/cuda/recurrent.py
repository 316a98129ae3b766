"""The recurrent op on the persistent kernels of ``csrc/recurrent``.

A team of CTAs holds a lane's recurrent weights for the whole launch and exchanges every step's states (forward), or gate
gradients or partial sums of what they lead to (backward). ``csrc/recurrent/plan.cpp`` cuts the work, a pure function of sizes
and device. The backend "cuda-host" runs the same kernels without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ops.types import Backward, Call, Forward
from ..dense import dense
from ..precision import fp32_precision
from ..query import RecurrentQuery

CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru")
_PRECISIONS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_MOST_LANES = 63  # their directions are the bits of one number


class Device(NamedTuple):
    """What a plan depends on (csrc/recurrent/plan.h)."""

    multiprocessors: int
    shared_bytes: int  # that a CTA may have
    cluster: int  # CTAs of a cluster at most; 0: no clusters
    cooperative: bool  # whether a launch can demand that all its CTAs run at the same time


class Numbers(NamedTuple):
    """Of a plan, as the kernels are given them (`Split` in csrc/recurrent/params.h, `Plan` in plan.h)."""

    units: int
    ctas: int
    parts: int
    rows: int
    chunks: int
    column_bits: int
    m_bits: int
    k_warps: int
    depths: int
    segments: int
    cluster: int
    scatter: int
    wide: int
    teams: int
    teams_at_once: int
    shared_bytes: int
    operand_bytes: int

    @property
    def exchange(self) -> str:
        return ("cluster" if self.cluster else "flags") + (", partial sums" if self.scatter else "")


class Plan(NamedTuple):
    """How a call is cut."""

    obstacle: str
    step_us: float  # predicted, by a model
    numbers: Numbers
    of: int  # that the device allows; this is one of them

    def __str__(self) -> str:
        n = self.numbers
        return (
            f"{n.teams} teams of {n.ctas} CTAs with {n.units} units each for {n.rows} sequences"
            + (f", {n.teams_at_once} at a time" if n.teams_at_once < n.teams else "")
            + (f", {n.chunks} chunks" if n.chunks > 1 else "")
            + (f", {n.segments} segments" if n.segments > 1 else "")
            + (", wide" if n.wide else "")
            + f", {n.exchange} (a model predicts {self.step_us:.2f} us a step)"
        )

    def meeting(self, like: Tensor) -> dict[str, Tensor]:
        """Room for what the CTAs of a team exchange."""
        n = self.numbers
        return {
            "operands": like.new_empty(n.teams * n.operand_bytes, dtype=torch.uint8),
            "flags": like.new_zeros(0 if n.cluster else n.teams * n.ctas, dtype=torch.int32),
        }


# runs "forward" or "backward": direction, cell, precision, plan, arguments by name in the order of the native op
Run = Callable[[str, str, str, Plan, dict[str, Any]], None]


class Machine(NamedTuple):
    """Where the kernels run: a GPU, or its model on the host."""

    device: Callable[[torch.device], Device]
    precision: Callable[[], str]  # of fp32: "tf32" or "ieee"
    run: Run
    ranks: tuple[int, int] = (0, 0)  # of the plans to be taken forward and backward; 0: the best by the model


@lru_cache(1024)
def _cut(cell: str, precision: str, backward: bool, batch: int, lanes: int, hidden: int, device: Device, rank: int = 0) -> Plan:
    numbers = [int(number) for number in device]
    obstacle, step_us, found, count = torch.ops.fastseq_native.recurrent_plan(
        cell, precision, backward, batch, lanes, hidden, numbers, rank
    )
    return Plan(obstacle, step_us, Numbers(*found), count)


def _precision(dtype: torch.dtype, machine: Machine) -> str:
    return machine.precision() if dtype == torch.float32 else _PRECISIONS[dtype]


def _plan(call: Call | RecurrentQuery, backward: bool, where: torch.device, machine: Machine) -> Plan:
    sizes = (call.batch, call.lanes, call.hidden)
    return _cut(call.cell, _precision(call.dtype, machine), backward, *sizes, machine.device(where), machine.ranks[backward])


def obstacles(query: RecurrentQuery, machine: Machine) -> list[str]:
    """Why the kernels cannot run a call on a machine."""
    against = []
    if query.cell not in CELLS:
        against.append(f"cell {query.cell} is not one of {', '.join(CELLS)}")
    if query.dtype not in _PRECISIONS:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in _PRECISIONS)
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


def forward(call: Forward, machine: Machine) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, h_n, c_n, c, gates, as the op's contract has them."""
    results = y, h_n, c_n, c, gates = call.empty_results(zeros=True)
    _run(
        call, machine, "forward", x_gates=call.input_gates().contiguous(), weight=call.weight.contiguous(),
        vectors=dense(call.vectors), h0=dense(call.h0, call.dtype), c0=dense(call.c0, call.wide), y=y, h_n=h_n, c_n=c_n, c=c,
        gates=gates,
    )  # fmt: skip
    return results


def backward(call: Backward, machine: Machine) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dgates, drecurrent, doutput, dh0, dc0, as the op's contract has them."""
    dtype, wide = call.dtype, call.wide
    results = dgates, drecurrent, _, dh0, dc0 = call.empty_results(zeros=True)
    _run(
        call, machine, "backward", dy=dense(call.dy, dtype), dh_n=dense(call.dh_n, dtype), dc_n=dense(call.dc_n, wide),
        dc=dense(call.dc, wide), weight=call.weight.contiguous(), vectors=dense(call.vectors), h0=dense(call.h0, dtype),
        c0=dense(call.c0, wide), y=call.y.contiguous(), c=call.c.contiguous(), gates=call.gates.contiguous(), dgates=dgates,
        drecurrent=drecurrent, dh0=dh0, dc0=dc0,
    )  # fmt: skip
    return results


def _run(call: Call, machine: Machine, direction: str, **tensors: Tensor | None) -> None:
    if not (call.batch and call.hidden):
        return
    from .. import note  # which imports this module

    chosen = _plan(call, direction == "backward", call.rows.device, machine)
    note(chosen)
    starts, lengths = call.row_offsets()
    sizes = {"steps": call.steps, "batch": call.batch, "lanes": call.lanes, "hidden": call.hidden, "reverse": call.reverse_bits}
    arguments = tensors | {"starts": starts, "lengths": lengths} | sizes | chosen.meeting(call.rows)
    machine.run(direction, call.cell, _precision(call.dtype, machine), chosen, arguments)


@lru_cache
def _device(index: int) -> Device:
    multiprocessors, shared_bytes, cluster, cooperative = torch.ops.fastseq_native.cuda_limits(index)
    return Device(multiprocessors, shared_bytes, cluster, bool(cooperative))


def _launch(direction: str, cell: str, precision: str, chosen: Plan, arguments: dict[str, Any]) -> None:
    native = torch.ops.fastseq_native
    op = native.recurrent_cuda_forward if direction == "forward" else native.recurrent_cuda_backward
    op.default(cell, precision, chosen.numbers, *arguments.values())


def _limits(device: torch.device) -> Device:
    return _device(torch.cuda.current_device() if device.index is None else device.index)


GPU = Machine(_limits, fp32_precision, _launch)


def why_not(query: RecurrentQuery) -> list[str]:
    return obstacles(query, GPU)


def recurrent_forward(call: Forward) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return forward(call, GPU)


def recurrent_backward(call: Backward) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return backward(call, GPU)
