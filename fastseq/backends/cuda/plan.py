"""How a call of the recurrence is cut for a GPU: what ``csrc/recurrent/plan.cpp`` answers, a pure function of sizes and device.

docs/design/recurrence-on-a-gpu.md explains the words.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Device(NamedTuple):
    """What a plan depends on (csrc/recurrent/plan.h)."""

    multiprocessors: int
    shared_bytes: int  # that a CTA may have
    cluster: int  # CTAs of a cluster at most; 0: no clusters
    cooperative: bool  # whether a launch can demand that all its CTAs run at the same time


class Numbers(NamedTuple):
    """Of a plan, by the library's names for them (`FASTSEQ_PLAN_FIELDS` in csrc/recurrent/plan.h; params.h: meanings)."""

    units: int
    ctas: int
    parts: int
    rows: int
    batch_tiles: int
    column_bits: int
    m_bits: int
    k_warps: int
    k_tiles: int
    k_segments: int
    cluster: int
    reduce_scatter: int
    n_tiles: int
    teams: int
    teams_at_once: int
    shared_bytes: int
    operand_bytes: int

    @property
    def exchange(self) -> str:
        return ("cluster" if self.cluster else "flags") + (", partial sums" if self.reduce_scatter else "")

    @property
    def form(self) -> str:
        """What of a plan other code runs for: "flags, wide, batch tiles"."""
        features = {
            "wide": self.n_tiles > 1,
            "batch tiles": self.batch_tiles > 1,
            "segments": self.k_segments > 1,
            "waves": self.teams_at_once < self.teams,
            "alone": self.ctas == 1,
            "in blocks": self.units.bit_count() > 1,
        }
        return ", ".join([self.exchange, *(word for word, there in features.items() if there)])


class Plan(NamedTuple):
    """How a call is cut."""

    obstacle: str
    step_us: float  # predicted, by a model
    numbers: Numbers
    of: int  # that the device allows; this is one of them
    native: list[int]  # the numbers as the native ops give and take them

    def __str__(self) -> str:
        n = self.numbers
        return (
            f"{n.teams} teams of {n.ctas} CTAs with {n.units} units each for {n.rows} sequences"
            + (f", {n.teams_at_once} at a time" if n.teams_at_once < n.teams else "")
            + (f", {n.batch_tiles} batch tiles" if n.batch_tiles > 1 else "")
            + (f", {n.k_segments} segments" if n.k_segments > 1 else "")
            + (", wide" if n.n_tiles > 1 else "")
            + f", {n.exchange} (a model predicts {self.step_us:.2f} us a step)"
        )

    def exchange_buffers(self, like: Tensor) -> dict[str, Tensor]:
        """Room for what the CTAs of a team send each other."""
        n = self.numbers
        return {
            "operands": like.new_empty(n.teams * n.operand_bytes, dtype=torch.uint8),
            "flags": like.new_zeros(0 if n.cluster else n.teams * n.ctas, dtype=torch.int32),
        }


@lru_cache(1)
def fields() -> tuple[str, ...]:
    """Names of a plan's numbers, in the library's order."""
    return tuple(torch.ops.fastseq_native.recurrent_plan_fields())


@lru_cache(1024)
def plan_of(
    cell: str, precision: str, backward: bool, batch: int, lanes: int, hidden: int, device: Device, rank: int = 0
) -> Plan:
    """The plan of a rank, 0 for the best by the model; one with an obstacle alone if nothing fits.

    Raises:
        RuntimeError: if there are fewer plans, or cell, precision or sizes are none of the kernels'.
    """
    limits = [int(number) for number in device]
    obstacle, step_us, found, count = torch.ops.fastseq_native.recurrent_plan(
        cell, precision, backward, batch, lanes, hidden, limits, rank
    )
    return Plan(obstacle, step_us, Numbers(**dict(zip(fields(), found, strict=True))), count, found)
