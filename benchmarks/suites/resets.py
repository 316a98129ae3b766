"""States that start anew inside a sequence, as rollouts of environments want it: one call against a loop with masks."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import torch

from ..measure.case import Case, Options, Participant
from ..measure.results import Results, Row
from ..measure.timing import Effort
from ..providers.resets import CELLS, loop_name, own_name, plain_name
from ..report.curves import PEAK, TIME, Curves
from ..report.model import Section
from ..workloads.base import MODES
from ..workloads.resets import EPISODE, RolloutWorkload
from . import gates
from .gates import Gate

NAME = "resets"
SUMMARY = "rollouts in which episodes end, LSTM and GRU: masked loop over torch.nn, fastseq's one call, and without resets"

T = 128
LOOP, PLAIN = "the masked loop", "the same call without resets"  # over which the gates are


def plan(options: Options) -> list[Case]:
    threads = options.threads[-1] if options.threads else torch.get_num_threads()
    common: dict[str, Any] = {"threads": threads, "dtype": options.dtype, "device": options.device}
    batches, widths = _grid(options.device.startswith("cuda"), options.quick)
    effort = Effort(seconds=0.3, min_rounds=3, max_rounds=10) if options.quick else Effort(seconds=1.5, max_rounds=40)
    cases = []
    for cell, mode, H, B in product(CELLS, MODES, widths, batches):
        w = RolloutWorkload(cell.lower(), T, B, H, H, mode, **common)
        participants = (
            Participant(loop_name(cell), w),
            Participant(own_name(cell), w),
            Participant(plain_name(cell), replace(w, episode=0)),
        )
        cases.append(Case(NAME, cell.lower(), participants, effort, ((own_name(cell), loop_name(cell)),)))
    return cases


def _grid(cuda: bool, quick: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Environments and widths."""
    if cuda:
        return ((64,), (256,)) if quick else ((8, 64, 256, 1024), (128, 512))
    return ((8, 32), (64,)) if quick else ((8, 16, 64, 256), (64, 128, 256))


def _own(r: Row) -> bool:
    return r.provider in map(own_name, CELLS)


def _training(r: Row) -> bool:
    return _own(r) and r.group == "lstm" and r.mode == "training" and r.B <= 64


GATES = (
    Gate("LSTM, training, up to 64 environments", 5.0, 10.0, _training, over=LOOP),
    Gate("every point", 1 / 1.1, 1.0, _own, over=PLAIN),
)

CURVES = Curves(
    NAME,
    "States that start anew inside a sequence",
    (
        f"T = {T} steps of B environments, one layer, I = H, states given; episodes end after {EPISODE} steps in the mean. The "
        "masked loop calls torch's layer for each step, with states multiplied by 0 where an episode starts, as sb3-contrib and "
        "CleanRL do it. Without resets is the same call where no episode ends.",
    ),
    {cell.lower(): cell for cell in CELLS},
    {cell.lower(): (TIME, PEAK) for cell in CELLS},
    x_label="B, environments",
    x="B",
    at=lambda row: row.B,
)


def derive(results: Results) -> dict[str, Any]:
    rows = results.of_suite(NAME)
    return CURVES.derive(results) | {"gates": [_verdict(gate, rows) for gate in GATES]}


def _verdict(gate: Gate, rows: list[Row]) -> dict[str, Any]:
    at = {(r.provider, *_point_of(r)): r for r in rows}
    return gates.verdict(gate, [r for r in rows if gate.counts(r)], lambda r: _value(r, gate, at), _name)


def _point_of(r: Row) -> tuple[Any, ...]:
    return r.mode, r.B, r.H, r.threads, r.dtype


def _value(own: Row, gate: Gate, at: dict[tuple[Any, ...], Row]) -> float | None:
    """How many times as fast as what the gate compares with; None where that has no figure."""
    other = at.get(((loop_name if gate.over == LOOP else plain_name)(own.group.upper()), *_point_of(own)))
    if other is None or not (own.ok and other.ok and own.time and other.time):
        return None
    return own.ratio["median"] if gate.over == LOOP and own.ratio else other.seconds / own.seconds


def _name(r: Row) -> str:
    return f"{r.provider} {r.mode} B={r.B} H={r.H}"


def present(results: Results) -> list[Section]:
    sections = CURVES.present(results)
    table = gates.table(derive(results)["gates"])
    sections[0].tables.insert(0, replace(table, note="Times as fast as what it is over, computed from the points below."))
    return sections


picture = CURVES.picture
