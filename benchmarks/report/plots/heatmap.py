"""Speed-ups over batch and width as maps: blue where fastseq is faster, orange and marked where it loses, every value told."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.ticker import NullLocator

from ...measure.results import Row
from ...workloads.base import MODES
from ..model import NARROW, Figure
from .style import contrast

# Told apart with every kind of color vision; a loss is orange however small it is. Darker to four times either way.
LOSSES = LinearSegmentedColormap.from_list("losses", ["#fdd3a8", "#e08214", "#8f3a00"])
GAINS = LinearSegmentedColormap.from_list("gains", ["#f1f5f8", "#8fbfe0", "#3a8ac4", "#08407e"])
DARKEST = 4.0
LOSS = "▼"
WORDS = {"padded": "rows of equal length", "data": "rows of equal length, input without a gradient", "packed": "PackedSequence"}
COLUMNS = 2
INKS = ("#000000", "#ffffff")  # one of them can be read on any color


@dataclass(frozen=True)
class Map:
    """Speed-ups at (B, H) over one program of others."""

    title: str
    baseline: str
    points: dict[tuple[int, int], float]

    @property
    def batches(self) -> list[int]:
        return sorted({B for B, _ in self.points})

    @property
    def widths(self) -> list[int]:
        return sorted({H for _, H in self.points})

    def words(self) -> str:
        values = sorted(self.points.values())
        lost = [f"B = {B}, H = {H}" for (B, H), v in sorted(self.points.items()) if v < 1]
        losses = f"slower at {len(lost)} of {len(values)} points: {', '.join(lost)}" if lost else "slower nowhere"
        return f"{self.title}: {values[0]:.2f} to {values[-1]:.2f} times as fast as {self.baseline}, {losses}."


def maps(rows: Iterable[Row], one_layer: Collection[str]) -> dict[tuple[str, str], list[Map]]:
    """By group and mode, of fastseq's rows that have a speed-up; only where two batches and two widths were measured.

    `one_layer`: groups that divide the same map.
    """
    found: dict[tuple[str, str], dict[tuple[str, str], dict[tuple[int, int], float]]] = {}
    for row in rows:
        if row.ok and row.ratio and row.provider.startswith("fastseq.") and "(" not in row.provider:
            group = "one layer" if row.group in one_layer else row.group
            of_kind = found.setdefault((group, row.mode), {})
            points = of_kind.setdefault((_title(row), row.ratio["baseline"]), {})
            points.setdefault((row.B, row.H), row.ratio["median"])
    every = {kind: [Map(*key, points) for key, points in of_kind.items()] for kind, of_kind in found.items()}
    wide = {kind: [m for m in of_kind if len(m.batches) > 1 and len(m.widths) > 1] for kind, of_kind in every.items()}
    return {kind: of_kind for kind, of_kind in wide.items() if of_kind}


def figures(rows: Iterable[Row], one_layer: Collection[str] = ()) -> list[Figure]:
    return [_figure(group, mode, of_kind) for (group, mode), of_kind in maps(rows, one_layer).items()]


def _title(row: Row) -> str:
    precision = (row.detail or {}).get("precision", row.dtype)
    how = precision if row.device.startswith("cuda") else f"{row.threads} thread" + "s" * (row.threads > 1)
    return f"{row.provider.removeprefix('fastseq.')}, T={row.T}, {how}"


def _figure(group: str, mode: str, of_kind: list[Map]) -> Figure:
    lines = math.ceil(len(of_kind) / COLUMNS)
    height = sum(0.95 + 0.3 * max(len(m.batches) for m in of_kind[i * COLUMNS : (i + 1) * COLUMNS]) for i in range(lines))
    return Figure(
        f"Speed-up over batch and width, {WORDS.get(group, group)}, {MODES.get(mode, mode)}",
        f"Times as fast as {', '.join(dict.fromkeys(m.baseline for m in of_kind))}. Blue: fastseq is faster; orange and "
        f"{LOSS}: it is slower. Empty: not measured.",
        lambda canvas, theme: draw(canvas, theme, of_kind),
        (NARROW, height),
        alt=" ".join(m.words() for m in of_kind),
    )


def draw(canvas: Any, theme: Any, of_kind: list[Map]) -> None:
    columns = min(COLUMNS, len(of_kind))
    every = canvas.subplots(math.ceil(len(of_kind) / columns), columns, squeeze=False)
    for axes in every.flat[len(of_kind) :]:
        axes.set_visible(False)
    for axes, m in zip(every.flat, of_kind, strict=False):
        _map(axes, theme, m)


def _map(axes: Any, theme: Any, m: Map) -> None:
    for y, B in enumerate(m.batches):
        for x, H in enumerate(m.widths):
            value = m.points.get((B, H))
            if value is None:
                continue
            color = (LOSSES if value < 1 else GAINS)(abs(math.log(value, DARKEST)))
            axes.fill([x, x + 1, x + 1, x], [y, y, y + 1, y + 1], color=color, linewidth=0)
            ink = max(INKS, key=lambda ink: contrast(to_rgb(ink), color))
            text = f"{value:.2f}{LOSS}" if value < 1 else f"{value:.2f}" if value < 99.5 else f"{value:.0f}"
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=8, color=ink, in_layout=False)
    axes.set_title(m.title, color=theme.ink, fontsize=8.5, loc="left", pad=4)
    axes.set_facecolor("none")
    axes.set_xlim(0, len(m.widths))
    axes.set_ylim(len(m.batches), 0)
    axes.set_xticks([x + 0.5 for x in range(len(m.widths))], ["H=" * (x == 0) + str(H) for x, H in enumerate(m.widths)])
    axes.set_yticks([y + 0.5 for y in range(len(m.batches))], ["B=" * (y == 0) + str(B) for y, B in enumerate(m.batches)])
    axes.tick_params(colors=theme.ink, labelsize=8, length=0)
    for which in (axes.xaxis, axes.yaxis):
        which.set_minor_locator(NullLocator())
    for spine in axes.spines.values():
        spine.set_visible(False)
