"""Speed-ups as strips: a line for each kind of call, a point for each of its rows, a bar at their geometric mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...measure.results import Row
from ..statistics import geometric_mean
from .style import plain

TICKS = (0.25, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128)


@dataclass(frozen=True)
class Strip:
    """Rows that have a ratio; `target` is marked by a triangle."""

    label: str
    color: str
    rows: Sequence[Row]
    target: float | None = None


def draw(canvas: Any, theme: Any, panels: Sequence[tuple[str, Sequence[Strip]]], *, width_unit: int = 8) -> None:
    """Panels side by side whose strips have the same labels, the first on top. Points grow with H / width_unit."""
    every = canvas.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, strips) in zip(every, panels, strict=True):
        plain(axes, theme, title)
        axes.set_xscale("log")
        spread = np.random.default_rng(0)
        values = [1.0]
        for y, strip in enumerate(reversed(strips)):
            axes.axhline(y + 0.5, color=theme.faint, linewidth=0.7)
            if not strip.rows:
                continue
            x = [r.ratio["median"] for r in strip.rows if r.ratio]
            values += x
            jitter = y + spread.uniform(-0.2, 0.2, len(x))
            sizes = [8 + r.H / width_unit for r in strip.rows]
            axes.scatter(x, jitter, s=sizes, color=strip.color, alpha=0.6, linewidth=0, zorder=3)
            mean = geometric_mean(x)
            axes.plot([mean, mean], [y - 0.32, y + 0.2], color=theme.ink, linewidth=2.4, zorder=4)
            axes.annotate(
                f"{mean:.2f}×",
                (mean, y + 0.2),
                textcoords="offset points",
                xytext=(0, 1),
                ha="center",
                va="bottom",
                fontsize=8,
                color=theme.ink,
            )
            if strip.target is not None:
                axes.plot([strip.target], [y - 0.38], marker="^", markersize=5, color=theme.ink, alpha=0.6, zorder=4)
        axes.set_yticks(range(len(strips)), [strip.label for strip in reversed(strips)])
        axes.set_ylim(-0.6, len(strips) - 0.2)
        ticks = [t for t in TICKS if min(values) / 1.3 <= t <= max(values) * 1.3]
        axes.set_xticks(ticks, [f"{t:g}×" for t in ticks])
        axes.minorticks_off()
        axes.axvline(1.0, color=theme.ink, linewidth=1.1, alpha=0.7, zorder=2)
        axes.grid(True, axis="x", color=theme.faint, linewidth=0.7)
