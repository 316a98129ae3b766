"""The suite recurrent on a GPU: what is measured, in order of worth, and how its rows are found again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from ..measure.case import Case, Options, Participant
from ..measure.results import Row
from ..measure.timing import Effort
from ..providers.base import RECURRENT
from ..providers.recurrent import FORCED, forced_name
from ..workloads.base import MODES
from ..workloads.recurrent import PRECISIONS, RecurrentWorkload, precise

GROUPS = {
    "small": "one layer, H ≤ 128, bf16",
    "packed": "PackedSequence, lengths uniform in 1…T",
    "large": "one layer, H ≥ 256, bf16",
    "precision": "one layer in fp16, and in fp32 with TF32 or IEEE products",
    "bidirectional": "one layer, both directions",
    "2 layers": "two layers",
    "4 layers": "four layers",
    "length": "one layer, bf16, other lengths",
    "programs": "beside torch.compile and a loop over torch's cell",
}
OF_BF16 = ("small", "large", "length")
ONE_LAYER = (*OF_BF16, "precision", "programs")  # they divide the same map
STRUCTURES: dict[str, dict[str, Any]] = {
    "packed": {"packed": True},
    "bidirectional": {"bidirectional": True},
    "2 layers": {"layers": 2},
    "4 layers": {"layers": 4},
}
BATCHES, WIDTHS, LENGTHS = (1, 8, 16, 64, 256), (64, 128, 256, 512, 1024, 2048), (1024, 128, 4096)
LARGEST = 1 << 28  # elements of a saved activation, beyond which fp64 references do not fit
LONG, SHORT = 1024, 128  # steps of a point where nothing else is asked for; short from BUSY rows times units on
BUSY = 1 << 15

Point = tuple[str, RecurrentWorkload]  # its group, and what is computed


def torch_name(cell: str) -> str:
    return f"torch.nn.{cell}"


def own_name(cell: str) -> str:
    return f"fastseq.{cell}"


def compiled_name(cell: str) -> str:
    return f"torch.compile {cell}"


def loop_name(cell: str) -> str:
    return f"eager {cell}Cell loop"


def plan(options: Options) -> list[Case]:
    """Quick: a handful. Else the points of `chosen`, meant for ten minutes of an H200. Full: after them the rest of the grid."""
    threads = options.threads[-1] if options.threads else torch.get_num_threads()
    effort = Effort(seconds=0.15, min_rounds=3, max_rounds=15) if options.quick else Effort(seconds=0.25, max_rounds=40)
    points = quick() if options.quick else chosen()
    if options.full:
        points = [*points, *everything()]
    cases: dict[tuple[str, RecurrentWorkload], Case] = {}
    for (group, shape), mode in product(points, MODES):
        w = replace(shape, mode=mode, threads=threads, device=options.device)
        if options.dtype != "float32":
            w = replace(w, dtype=options.dtype, tf32=False)
        if w.precision != "bfloat16" and group in OF_BF16:
            group = "precision"
        cell = cell_of(w.function)
        others = (compiled_name(cell), loop_name(cell)) if group == "programs" else tuple(forced_name(cell, b) for b in FORCED)
        names = (torch_name(cell), own_name(cell), *others)
        key = ("programs" if group == "programs" else "", w)
        cases.setdefault(
            key,
            Case("recurrent", group, tuple(Participant(n, w) for n in names), effort, tuple((n, names[0]) for n in names[1:])),
        )
    return list(cases.values())


def point(cell: str, B: int, H: int, T: int = 0, precision: str = "bfloat16", structure: str = "") -> Point:
    """A group and a workload of it. T = 0: the usual length."""
    usual = LONG if B * H <= BUSY else SHORT
    w = RecurrentWorkload(cell.lower(), T or usual, B, H, H, **precise(precision), **STRUCTURES.get(structure, {}))
    if structure:
        return structure, w
    if precision != "bfloat16":
        return "precision", w
    return ("length" if w.T != usual else "small" if H <= 128 else "large"), w


def quick() -> list[Point]:
    return [
        point("GRU", 16, 128, SHORT, structure="packed"),
        point("GRU", 16, 128),
        point("LSTM", 16, 128),
        point("LSTM", 64, 512),
        point("LSTM", 64, 512, precision="float16"),
    ]


def chosen() -> list[Point]:
    """The points that say most, the most telling first."""
    gated, layered = ("LSTM", "GRU"), [structure for structure in STRUCTURES if structure != "packed"]
    sizes = ((16, 128), (64, 512))
    large = [*product((1, 16, 64), (256, 512, 1024, 2048)), (256, 512), (256, 1024)]
    found = [point(cell, B, H) for H, cell, B in product((128, 64), gated, (1, 8, 16, 64))]
    found += [point(cell, B, H, T, structure="packed") for (B, H), T, cell in product(sizes, (LONG, SHORT), gated)]
    found += [point(cell, B, H) for (B, H), cell in product(large, gated)]
    found += [point("RNN", B, H) for B, H in ((16, 128), (16, 256), (64, 512), (64, 1024))]
    found += [point(cell, B, H, precision="float16") for cell, B, H in product(("LSTM", "RNN"), (8, 64), (512, 1024))]
    found += [point(cell, B, H, precision=p) for p, (B, H), cell in product(PRECISIONS[1:], sizes, gated)]
    found += [point(cell, B, H, structure=s) for s, B, H, cell in product(layered, (16,), (128, 512), gated)]
    found += [point(cell, 16, H, T) for T, H, cell in product((SHORT, 4096), (128, 512), gated)]
    found += [("programs", point(cell, B, H, SHORT)[1]) for (B, H), cell in product(sizes, gated)]
    return list(dict.fromkeys(sorted(found, key=lambda p: list(GROUPS).index(p[0]))))


def everything() -> Iterator[Point]:
    """The whole grid, as far as its fp64 references fit."""
    for structure, precision, T, cell, H, B in product(("", *STRUCTURES), PRECISIONS, LENGTHS, RECURRENT, WIDTHS, BATCHES):
        found = point(cell, B, H, T, precision, structure)
        if found[1].elements <= LARGEST:
            yield found


def cell_of(function: str) -> str:
    return next(cell for cell in RECURRENT if cell.lower() == function)


def is_own(row: Row) -> bool:
    return row.provider == own_name(cell_of(row.function))


def detail(row: Row, key: str) -> Any:
    return (row.detail or {})[key]


def points_of(rows: list[Row]) -> list[dict[str, Row]]:
    """Rows by provider, for every point that was measured."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for r in rows:
        sizes = tuple(detail(r, key) for key in ("precision", "layers", "directions"))
        found.setdefault((r.group, r.function, r.mode, r.T, r.B, r.H, r.packed, *sizes), {})[r.provider] = r
    return list(found.values())


def base_of(participants: dict[str, Row]) -> Row | None:
    return participants.get(torch_name(cell_of(next(iter(participants.values())).function)))


def own_of(participants: dict[str, Row]) -> Row | None:
    return participants.get(own_name(cell_of(next(iter(participants.values())).function)))


def forced_of(participants: dict[str, Row], backend: str) -> Row | None:
    """fastseq on a backend that it was forced to take, or that it took by itself."""
    found, own = participants.get(forced_name(cell_of(next(iter(participants.values())).function), backend)), own_of(participants)
    if found and not found.ok and own and [c for c in own.chose if c.startswith("backend: ")] == [f"backend: {backend}"]:
        return own
    return found


def graph_ratio(participants: dict[str, Row]) -> float | None:
    """Speed-up over torch.nn with both as CUDA graphs, where both could be captured."""
    base, own = base_of(participants), own_of(participants)
    if not base or not own or not base.graph or not own.graph:
        return None
    return base.graph["median"] / own.graph["median"]


def name(row: Row) -> str:
    sizes = f"T={row.T} B={row.B} H={row.H}"
    return f"{row.group} {cell_of(row.function)} {detail(row, 'precision')} {MODES[row.mode]} {sizes}"
