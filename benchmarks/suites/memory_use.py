"""Peak memory against sequence length: what a layer allocates in a call, and what it keeps for the backward pass."""

from __future__ import annotations

from itertools import product
from typing import Any

from ..measure.case import Case, Options, Participant
from ..measure.timing import Effort
from ..providers.base import PROVIDERS
from ..report.curves import KEPT, PEAK, Curves
from ..workloads.base import MODES, Workload

NAME = "memory"
SUMMARY = "peak memory and what is kept for backward against T: recurrence (saved, recomputed) and attention (naive, fused)"

CELLS = ("LSTM", "GRU")
NAMES = (
    *(name for cell in CELLS for name in (f"torch.nn.{cell}", f"fastseq.{cell}", f"fastseq.{cell} (recompute)")),
    "naive attention",
    "fused attention",
    "fastseq attention",
    "attention block",
)


def plan(options: Options) -> list[Case]:
    cuda = options.device.startswith("cuda")
    threads = options.threads[-1] if options.threads else 1  # nothing is timed
    common: dict[str, Any] = {"threads": threads, "dtype": options.dtype, "device": options.device}
    cases = []
    for mode, T in product(MODES, _lengths(cuda, options.quick)):
        B, W = (2, 512) if cuda else (2, 64) if options.quick else (4, 128)
        works = {name: Workload(PROVIDERS[name].function, T, B, W, W, mode, **common) for name in NAMES}
        participants = tuple(Participant(name, w) for name, w in works.items())
        cases.append(Case(NAME, "layer", participants, Effort(), timed=False))
    return cases


def _lengths(cuda: bool, quick: bool) -> tuple[int, ...]:
    if cuda:
        return (512, 2048) if quick else (256, 512, 1024, 2048, 4096, 8192)
    return (64, 128, 256) if quick else (128, 256, 512, 1024, 2048, 4096)


CURVES = Curves(
    NAME,
    "Peak memory against sequence length",
    (
        "What torch's allocator handed out during one call above parameters and input: forward in inference mode, or a training "
        "step. Kept: what is alive between forward and backward, output included; layers of a model add up. Nothing is timed.",
        "Equal batch, width and input, projections included. Memory that a library takes past torch's allocator is not seen on a "
        "CPU.",
    ),
    {"layer": "one layer"},
    {"layer": (PEAK, KEPT)},
)
derive, present, picture = CURVES.derive, CURVES.present, CURVES.picture
