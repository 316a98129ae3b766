"""Linear recurrence, which needs no loop: the scan against a loop over time and against torch's ways of doing without one; layers
of it against loops, torch.nn.GRU and the closed form in logarithms."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from ..measure.case import Case, Options, Participant
from ..measure.results import Results, Row
from ..measure.timing import Effort
from ..providers.linear import IN_LOGARITHMS, LAYERS, LINEAR_PROVIDERS, loop_name
from ..providers.scan import LOOP, OWN, TREE
from ..report.curves import PEAK, TIME, Curves
from ..report.model import Section
from ..workloads.base import MODES, Workload
from ..workloads.linear import LinearWorkload
from ..workloads.scan import ScanWorkload
from . import gates

NAME = "scan"
SUMMARY = "h_t = a_t h_{t-1} + b_t: fastseq's scan, a loop over time, torch's associative_scan; layers of it, torch.nn.GRU"

GROUP, LAYER_GROUP = "scan", "layers"
GRU = "torch.nn.GRU"
PROVIDERS = (LOOP, TREE, OWN)
BASELINE = ((OWN, LOOP), (TREE, LOOP))


def plan(options: Options) -> list[Case]:
    threads = options.threads[-1] if options.threads else torch.get_num_threads()
    common: dict[str, Any] = {"threads": threads, "dtype": "float32", "device": options.device}
    lengths, shapes = _grid(options.device.startswith("cuda"), options.quick)
    effort = Effort(seconds=0.4, min_rounds=3, max_rounds=10) if options.quick else Effort(seconds=2.0, max_rounds=40)
    cases = []
    for (B, H), mode, T in product(shapes, MODES, lengths):
        w = ScanWorkload("scan", T, B, H, H, mode, **common)
        participants = tuple(Participant(name, w) for name in PROVIDERS)
        cases.append(Case(NAME, GROUP, participants, effort, BASELINE))
    lengths, shapes = _layer_grid(options.device.startswith("cuda"), options.quick)
    for (B, H), mode, T in product(shapes, MODES, lengths):
        for cls in LAYERS:
            names = [loop_name(cls), f"fastseq.{cls}", *([IN_LOGARITHMS] if cls == "MinGRU" else [])]
            layers = [
                Participant(name, LinearWorkload(LINEAR_PROVIDERS[name].function, T, B, H, H, mode, **common)) for name in names
            ]
            gru = Participant(GRU, Workload("gru", T, B, H, H, mode, **common))
            baseline = tuple((name, GRU) for name in names)
            cases.append(Case(NAME, f"{LAYER_GROUP} {cls}", (*layers, gru), effort, baseline))
    return cases


def _grid(cuda: bool, quick: bool) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Lengths; batches and channels."""
    if cuda:
        return ((2048,), ((8, 1024),)) if quick else ((512, 2048, 8192, 32768), ((1, 512), (8, 1024)))
    return ((128, 1024), ((1, 256),)) if quick else ((128, 512, 2048, 8192), ((1, 256), (8, 128)))


def _layer_grid(cuda: bool, quick: bool) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    if cuda:
        return ((1024,), ((8, 512),)) if quick else ((512, 2048, 8192), ((1, 512), (32, 512)))
    return ((128,), ((1, 64),)) if quick else ((128, 1024), ((1, 256), (8, 256)))


# What the scan and the layers must reach: title, least ratio, ratio to aim at, provider, what it is compared with, point.
GATES = (
    ("scan, T = 8192, C = 256", 40, 80, OWN, LOOP, dict(T=8192, B=1, H=256, mode="inference")),
    ("scan, T = 8192, C = 256", 20, 40, OWN, TREE, dict(T=8192, B=1, H=256, mode="inference")),
    ("MinGRU training, T = 1024, C = 256", 2, 4, "fastseq.MinGRU", GRU, dict(T=1024, H=256, mode="training")),
    ("MinGRU training, T = 1024, C = 256", 5, 10, "fastseq.MinGRU", IN_LOGARITHMS, dict(T=1024, H=256, mode="training")),
)


def verdicts(rows: list[Row]) -> list[dict[str, Any]]:
    """Of the gates whose points were measured."""
    found = []
    for title, must, goal, own, over, point in GATES:
        asked = [r for r in rows if r.provider in (own, over) and all(getattr(r, name) == value for name, value in point.items())]
        others = {(r.T, r.B): r.seconds for r in asked if r.provider == over and r.ok and r.time}

        def ratio(row: Row, others: dict[tuple[int, int], float] = others) -> float | None:
            return others[row.T, row.B] / row.seconds if row.ok and row.time and (row.T, row.B) in others else None

        counted = [r for r in asked if r.provider == own]
        gate = gates.Gate(title, must, goal, lambda r: True, over=over)
        if counted:
            found.append(gates.verdict(gate, counted, ratio, lambda r: f"T={r.T}, B={r.B}"))
    return found


CURVES = Curves(
    NAME,
    "Linear recurrence",
    (
        "Every step's a and b are given; h is wanted, and in training the gradients of both. The roofline is every stream once "
        "through memory: a, b and h, and back a, h and the three gradients.",
        "The closed form in logarithms (cumsum, logcumsumexp) takes no part in the scan: it fails the check, by an error that "
        "grows with T. As a minGRU it is held to its own rounding, not to that of a loop.",
        "Layers: projections, gates and recurrence of one layer; torch.nn.GRU is another function of the same sizes.",
    ),
    {GROUP: "scan"} | {f"{LAYER_GROUP} {cls}": cls for cls in LAYERS},
    {group: (TIME, PEAK) for group in (GROUP, *(f"{LAYER_GROUP} {cls}" for cls in LAYERS))},
)
picture = CURVES.picture


def derive(results: Results) -> dict[str, Any]:
    return CURVES.derive(results) | {"gates": verdicts(results.of_suite(NAME))}


def present(results: Results) -> list[Section]:
    sections = CURVES.present(results)
    table = gates.table(verdicts(results.of_suite(NAME)))
    if table.rows:
        sections[0].tables.insert(0, table)
    return sections
