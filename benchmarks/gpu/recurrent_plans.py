"""The plans of the CUDA kernels of the recurrence for one call: listed, checked and timed.

Letters: T time, B batch, H hidden; lanes are directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastseq.backends.cuda import recurrent
from fastseq.backends.cuda.plan import Device, Numbers, Plan, plan_of
from fastseq.backends.cuda.recurrent import Machine
from fastseq.cells import CELLS
from fastseq.ops.types import Backward, Forward, state_dtype

from ..measure.check import Check, check_provider
from ..measure.timing import Effort, Samples, interleave
from ..providers.base import fastseq_layer
from ..providers.recurrent import Forced
from ..workloads.clocks import Clock, Run
from ..workloads.recurrent import PRECISIONS, RecurrentWorkload, precise
from .cuda_plans import ranked

MODULES = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN"}  # rnn_relu does the same work as rnn_tanh
WORKLOADS = dict(zip(("bf16", "fp16", "tf32", "ieee"), PRECISIONS, strict=True))  # the planner's precisions by those of workloads
DIRECTIONS = ("forward", "backward")
FIELDS = Numbers._fields
EXCHANGES = ("flags", "cluster", "flags, partial sums", "cluster, partial sums")
CHECKED_STEPS = 7
SECONDS = 0.02  # for each of the interleaved runs, unless `ROUNDS` take longer
ROUNDS, MOST_ROUNDS = 7, 50


class Point(NamedTuple):
    """A call whose plans are compared."""

    cell: str
    precision: str
    direction: str
    T: int
    B: int
    H: int
    lanes: int

    def __str__(self) -> str:
        return f"{self.cell} {self.precision} {self.direction} T={self.T} B={self.B} H={self.H} lanes={self.lanes}"

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, precise(WORKLOADS[self.precision])["dtype"])

    def plan(self, limits: Device, rank: int) -> Plan:
        backward = self.direction == "backward"
        return plan_of(self.cell, self.precision, backward, self.B, self.lanes, self.H, limits, rank)

    def plans(self, limits: Device) -> dict[int, Plan]:
        """By rank, the best by the model first. None fits: the one of rank 0 says why."""
        return {rank: self.plan(limits, rank) for rank in range(self.plan(limits, 0).of)}

    def checked(self, device: str) -> Checked:
        mode = "training" if self.direction == "backward" else "inference"
        function, sizes = MODULES[self.cell].lower(), (CHECKED_STEPS, self.B, self.H, self.H)
        more = precise(WORKLOADS[self.precision])
        return Checked(function, *sizes, mode, device=device, bidirectional=self.lanes == 2, **more)


class Checked(RecurrentWorkload):
    """A plan follows from everything but the number of steps, so a few, or a single one, run on the one that is timed."""

    def small(self) -> Checked:
        return replace(self, T=1)


class Target(NamedTuple):
    """Where plans run; without a machine they are only predicted."""

    name: str
    limits: Device
    machine: Machine | None = None
    backend: str = ""
    device: str = "meta"
    clocks: tuple[Clock, ...] = ()  # the first that works is taken


class OnPlan(Forced):
    """A layer on the plan of a rank in one direction, and on the model's choice in the other."""

    def __init__(self, module: nn.Module, backend: str, **ranks: int) -> None:
        super().__init__(module, backend)
        self.ranks = ranks

    @contextmanager
    def around(self) -> Iterator[None]:
        with super().around(), ranked(**self.ranks):
            yield


def candidates(point: Point, here: Target, most: int | None = None) -> Iterator[dict[str, Any]]:
    """A row for each of at most `most` plans, by rank: its numbers, its prediction, what was measured if there is a machine."""
    common: dict[str, Any] = {"device": here.name, "limits": here.limits._asdict(), **point._asdict()}
    plans = point.plans(here.limits)
    if plans[0].obstacle:
        yield common | {"obstacle": plans[0].obstacle}
        return
    common |= {"of": len(plans)}
    rows = {rank: common | {"rank": rank, **described(plans[rank])} for rank in list(plans)[:most]}
    if here.machine is not None:
        with point.checked(here.device).settings():
            for rank, row in rows.items():
                found = check(point, rank, here)
                row |= {"check": found.as_dict()} | ({} if found.ok else {"failed": found.reason})
            sound = {rank: plans[rank] for rank, row in rows.items() if "failed" not in row}
            try:
                measured = measure(point, sound, here)
            except RuntimeError as error:
                measured = dict.fromkeys(sound, {"failed": f"raised {type(error).__name__}: {str(error).strip()[:200]}"})
            for rank, figures in measured.items():
                rows[rank] |= figures
    yield from rows.values()


def described(plan: Plan) -> dict[str, Any]:
    """A plan's numbers by name, its exchange in a word, and room for what is measured."""
    numbers = plan.numbers
    found = {"exchange": numbers.exchange, "predicted_us": plan.step_us, "check": None, "measured_us": None}
    return numbers._asdict() | found


def check(point: Point, rank: int, here: Target) -> Check:
    """Outputs, and backward all gradients, of a layer on this plan against fp64."""
    layer = fastseq_layer(MODULES[point.cell])
    return check_provider(
        lambda w: (OnPlan(layer(w), here.backend, **{point.direction: rank}), "time"),
        point.checked(here.device),
    )


def measure(point: Point, plans: dict[int, Plan], here: Target) -> dict[int, dict[str, Any]]:
    """Microseconds of a step on each plan, all of them timed in turn, round after round.

    Raises:
        RuntimeError: if there is no room, or a launch fails.
    """
    half = point.T // 2
    whole_of, half_of = (launches(point, steps, here) for steps in (point.T, half))
    runs: dict[str, Run] = {}
    for rank, plan in plans.items():
        runs |= {f"{rank} whole": whole_of(plan), f"{rank} half": half_of(plan)}
    samples, clock = _timed(runs, here.clocks)
    return {
        rank: step(samples[f"{rank} whole"], samples[f"{rank} half"], point.T - half) | {"clock": clock.name} for rank in plans
    }


def step(whole: Samples, half: Samples, between: int) -> dict[str, Any]:
    """Microseconds of one of the steps `between` both: median, and 20 % and 80 % quantiles, over rounds."""
    each = (np.asarray(whole.seconds) - np.asarray(half.seconds)) / between * 1e6
    low, median, high = np.quantile(each, (0.2, 0.5, 0.8)).tolist()
    return {"measured_us": median, "low_us": low, "high_us": high, "rounds": len(each)}


def launches(point: Point, steps: int, here: Target) -> Callable[[Plan], Run]:
    """From a plan to the kernel on it. All share their tensors but for the exchange buffers, whose flags start at zero."""
    assert here.machine is not None
    run, given = here.machine.run, []
    call = arguments(point, steps, here.device)
    recorder = here.machine._replace(run=lambda *launch: given.append(launch))
    if isinstance(call, Forward):
        recurrent.forward(call, recorder)
    else:
        recurrent.backward(call, recorder)
    direction, cell, precision, _, shared = given[0]

    def launch(plan: Plan) -> Run:
        own = shared | plan.exchange_buffers(call.rows)

        def once() -> None:
            own["flags"].zero_()
            run(direction, cell, precision, plan, own)

        return once

    return launch


def arguments(point: Point, steps: int, device: str) -> Forward | Backward:
    """A call on random numbers, also in place of what a forward pass has left: a step takes as long on them."""
    cell, wide = CELLS[point.cell], state_dtype(point.dtype)
    lanes, B, H, gates = point.lanes, point.B, point.H, len(cell.gates)

    def uniform(*shape: int, dtype: torch.dtype = point.dtype, low: float = -1.0, high: float = 1.0) -> Tensor:
        return torch.empty(shape, device=device).uniform_(low, high).to(dtype)

    weight = uniform(lanes, gates * H, H, low=-(H**-0.5), high=H**-0.5)
    vectors = uniform(lanes, len(cell.vectors) * H) if cell.vectors else None
    h0, c0 = uniform(lanes, B, H), uniform(lanes, B, cell.wide_states * H, dtype=wide) if cell.has_c else None
    common: dict[str, Any] = dict(
        cell=point.cell, reverse=[0, 1][:lanes], weight=weight, vectors=vectors, projection=None, h0=h0, c0=c0, lengths=None,
        batch_sizes=None, hold_h=None, hold_c=None, zoneout_h=0.0, zoneout_c=0.0,
    )  # fmt: skip
    if point.direction == "forward":
        x = uniform(steps, B, lanes * gates * H)  # projected
        return Forward(x=x, w_ih=None, b_ih=None, save_c=True, save_gates=True, **common)
    rows = (steps, B, lanes)
    dy, y = uniform(*rows, H), uniform(*rows, H)
    c = uniform(*rows, cell.wide_states * H, dtype=wide) if cell.has_c else weight.new_empty(0, dtype=wide)
    saved = uniform(*rows, len(cell.saved) * H, low=0.0) if cell.saved else weight.new_empty(0)
    return Backward(dy=dy, dh_n=None, dc_n=None, dc=None, y=y, c=c, gates=saved, **common)


def _timed(runs: dict[str, Run], clocks: Sequence[Clock]) -> tuple[dict[str, Samples], Clock]:
    """Samples, and the clock that took them."""
    effort = Effort(SECONDS * len(runs), ROUNDS, MOST_ROUNDS, patience=math.inf)
    for clock in clocks[:-1]:
        try:
            return interleave(runs, clock, effort), clock
        except RuntimeError:  # this one needs to capture the launch, which cannot be
            continue
    return interleave(runs, clocks[-1], effort), clocks[-1]
