"""Which targets the rows of the suite recurrent on a GPU reached."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

from ..measure.results import Row, reliable
from ..report.statistics import geometric_mean, mean_of
from ..workloads.base import MODES
from .recurrent_gpu import GROUPS, detail, forced_of, graph_ratio, is_own, name, own_of, points_of

LEAST = 0.9  # no single point of fastseq's choice below this
OF_ROOFLINE = 1.5  # times its roofline that a row may take


class Target(NamedTuple):
    """The least that every one of some rows must reach."""

    title: str
    mode: str
    counts: Callable[[Row], bool]
    least: float
    backend: str = ""  # fastseq on it; else fastseq's own choice
    of_roofline: bool = False  # the fraction of the roofline; else the speed-up over torch.nn
    strip: str = ""  # the group on whose strips of the figure it is marked


def _plain(row: Row) -> bool:
    return not row.packed and detail(row, "layers") == detail(row, "directions") == 1


def _gated(row: Row) -> bool:
    return row.function in ("lstm", "gru")


def _small(row: Row) -> bool:
    return _plain(row) and _gated(row) and row.H <= 128 and row.B <= 64 and detail(row, "precision") == "bfloat16"


def _packed(row: Row) -> bool:
    return row.packed and row.T >= 128


def _every(row: Row) -> bool:
    return True


def _wide(row: Row) -> bool:
    """In precisions that cuDNN has no persistent kernel for."""
    precise = detail(row, "precision") in ("bfloat16", "tf32", "float32")
    return _plain(row) and _gated(row) and precise and row.B <= 64 and 256 <= row.H <= 1024


def _many_rows(row: Row) -> bool:
    return _plain(row) and _gated(row) and not detail(row, "persistent") and 128 <= row.B <= 256 and row.H <= 1024


def _persistent(row: Row) -> bool:
    return row.function == "lstm" and bool(detail(row, "persistent"))


def _both_directions(row: Row) -> bool:
    return bool(detail(row, "directions") == 2)


def _widest(row: Row) -> bool:
    return _plain(row) and _gated(row) and row.H == 2048 and row.B <= 32


def _pair(title: str, counts: Callable[[Row], bool], *least: float, **more: Any) -> list[Target]:
    """Forward, and forward + backward."""
    return [Target(title, mode, counts, value, **more) for mode, value in zip(MODES, least, strict=True)]


TARGETS = [
    *_pair("H ≤ 128, B ≤ 64, bf16, LSTM and GRU", _small, 2.0, 1.5, strip="small"),
    *_pair("packed, T ≥ 128", _packed, 5.0, 5.0, strip="packed"),
    *_pair("every point", _every, LEAST, LEAST),
]
CUDA_TARGETS = [
    *_pair("256 ≤ H ≤ 1024, B ≤ 64, bf16, TF32 and fp32, LSTM and GRU", _wide, 3.0, 2.5, backend="cuda"),
    *_pair("H ≤ 1024, 128 ≤ B ≤ 256, cuDNN not persistent, LSTM and GRU", _many_rows, 2.0, 1.5, backend="cuda"),
    *_pair("LSTM in fp16 where cuDNN may be persistent", _persistent, 1.0, 0.9, backend="cuda"),
    *_pair("both directions", _both_directions, 3.0, 2.5, backend="cuda"),
    *_pair("packed, T ≥ 128", _packed, 5.0, 5.0, backend="cuda"),
    *_pair("H = 2048, B ≤ 32, LSTM and GRU", _widest, 1.5, 1.3, backend="cuda"),
    *_pair(f"every point within {OF_ROOFLINE:g}× its roofline", _every, *[1 / OF_ROOFLINE] * 2, backend="cuda", of_roofline=True),
]


def derive(rows: list[Row]) -> dict[str, Any]:
    points = points_of(rows)
    own = [r for r in rows if is_own(r)]
    timed = [(r.ratio["median"], r) for r in own if r.ok and r.ratio]
    in_graphs = [(value, o) for p in points if (o := own_of(p)) and (value := graph_ratio(p)) is not None]
    of_backend = {
        backend: [row for p in points if (row := forced_of(p, backend))] for backend in {t.backend for t in CUDA_TARGETS}
    }
    return {
        "targets": [_verdict(own, target) for target in TARGETS],
        "CUDA targets": [_verdict(of_backend[target.backend], target) for target in CUDA_TARGETS],
        "means": _means(own),
        "below least": [name(r) for value, r in timed if value < LEAST],
        "below least in a graph": [name(r) for value, r in in_graphs if value < LEAST],
        "losses": [name(r) for value, r in timed if value < 1],
    }


def _verdict(rows: list[Row], target: Target) -> dict[str, Any]:
    """Its lowest point; not reached unless every one of its points has a time."""
    points = [r for r in rows if r.mode == target.mode and target.counts(r) and r.status != "skipped"]
    timed = {name(r): value for r in points if (value := _reached(r, target)) is not None}
    lowest = min(timed, key=lambda point: timed[point], default=None)
    return {
        "target": target.title,
        "mode": target.mode,
        "least": target.least,
        "of roofline": target.of_roofline,
        "found": None if lowest is None else timed[lowest],
        "mean": geometric_mean(list(timed.values())) if timed else None,
        "lowest": lowest,
        "points": len(timed),
        "untimed": len(points) - len(timed),
        "reliable": reliable(points),
        "reached": lowest is not None and len(timed) == len(points) and timed[lowest] >= target.least,
    }


def _reached(row: Row, target: Target) -> float | None:
    if not row.ok or not (row.roofline if target.of_roofline else row.ratio):
        return None
    return row.of_roofline if target.of_roofline else row.ratio["median"] if row.ratio else None


def _means(own: list[Row]) -> list[dict[str, Any]]:
    found = []
    for group, mode in product(GROUPS, MODES):
        timed = [r for r in own if (r.group, r.mode) == (group, mode) and r.ok and r.ratio]
        if timed:
            found.append({"group": group, "mode": mode} | mean_of(timed))
    return found
