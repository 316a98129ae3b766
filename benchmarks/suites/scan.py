"""Linear recurrence, which needs no loop: the scan against a loop over time and against torch's ways of doing without one."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from ..measure.case import Case, Options, Participant
from ..measure.timing import Effort
from ..providers.scan import LOOP, OWN, TREE
from ..report.curves import PEAK, TIME, Curves
from ..workloads.base import MODES
from ..workloads.scan import ScanWorkload

NAME = "scan"
SUMMARY = "h_t = a_t h_{t-1} + b_t: fastseq's scan, a loop over time, torch's associative_scan"

GROUP = "scan"
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
    return cases


def _grid(cuda: bool, quick: bool) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Lengths; batches and channels."""
    if cuda:
        return ((2048,), ((8, 1024),)) if quick else ((512, 2048, 8192, 32768), ((1, 512), (8, 1024)))
    return ((128, 1024), ((1, 256),)) if quick else ((128, 512, 2048, 8192), ((1, 256), (8, 128)))


CURVES = Curves(
    NAME,
    "Linear recurrence",
    (
        "Every step's a and b are given; h is wanted, and in training the gradients of both. The roofline is every stream once "
        "through memory: a, b and h, and back a, h and the three gradients.",
        "The closed form in logarithms (cumsum, logcumsumexp) takes no part: it fails the check, by an error that grows with T.",
    ),
    {GROUP: "scan"},
    {GROUP: (TIME, PEAK)},
)
derive, present, picture = CURVES.derive, CURVES.present, CURVES.picture
