"""How far every program is from the time that the measured peaks allow: a line for each provider, a point for each row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...measure.results import Row
from ...workloads.base import MODES
from ..model import NARROW, Figure
from ..statistics import geometric_mean
from .style import plain

# Told apart by color, with every kind of color vision, and by shape.
BOUNDS = {"weights": ("#0072b2", "o"), "arithmetic": ("#d55e00", "s"), "memory": ("#009e73", "^")}
OTHER = ("#7c889e", "D")
TICKS = (0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def distances(rows: Sequence[Row]) -> dict[str, list[tuple[str, float]]]:
    """Per provider, of every row with a time and a roofline: what binds it, and its distance to the roofline."""
    found: dict[str, list[tuple[str, float]]] = {}
    for row in rows:
        if row.ok and row.roofline and row.time:
            found.setdefault(row.provider, []).append((row.roofline["bound"], 1 / row.of_roofline))
    return found


def figures(rows: Sequence[Row]) -> list[Figure]:
    """One for each mode that was measured."""
    found = []
    for mode in dict.fromkeys(row.mode for row in rows):
        by_provider = distances([row for row in rows if row.mode == mode])
        if by_provider:
            found.append(_figure(MODES.get(mode, mode), by_provider))
    return found


def _figure(mode: str, by_provider: dict[str, list[tuple[str, float]]]) -> Figure:
    bounds = dict.fromkeys(bound for points in by_provider.values() for bound, _ in points)
    means = [f"{name} {geometric_mean([d for _, d in points]):.1f}" for name, points in by_provider.items()]
    return Figure(
        f"Distance to the roofline, {mode}",
        "1×: the time that the peaks measured in this run allow. The bar is the geometric mean; left of 1× a program reads its "
        "weights from somewhere faster than the roofline assumes.",
        lambda canvas, theme: draw(canvas, theme, by_provider, list(bounds)),
        (NARROW, 1.1 + 0.34 * len(by_provider)),
        alt=f"Geometric mean of the distance to the roofline, bound by {', '.join(bounds)}: {', '.join(means)}.",
    )


def draw(canvas: Any, theme: Any, by_provider: dict[str, list[tuple[str, float]]], bounds: list[str]) -> None:
    axes = canvas.subplots()
    plain(axes, theme, "")
    axes.set_xscale("log")
    values = [1.0, *(d for points in by_provider.values() for _, d in points)]
    axes.set_xlim(min(values) / 1.2, max(values) * 1.2)  # of a single distance matplotlib makes limits without a width
    spread = np.random.default_rng(0)
    for y, points in enumerate(reversed(by_provider.values())):
        axes.axhline(y + 0.5, color=theme.faint, linewidth=0.7)
        for bound in bounds:
            own = [d for b, d in points if b == bound]
            color, marker = BOUNDS.get(bound, OTHER)
            jitter = y + spread.uniform(-0.2, 0.2, len(own))
            axes.scatter(own, jitter, s=14, color=color, marker=marker, alpha=0.6, linewidth=0, zorder=3)
        mean = geometric_mean([d for _, d in points])
        axes.plot([mean, mean], [y - 0.32, y + 0.32], color=theme.ink, linewidth=2.2, zorder=4)
    for bound in bounds if len(bounds) > 1 else ():
        color, marker = BOUNDS.get(bound, OTHER)
        axes.scatter([], [], color=color, marker=marker, label=bound)
    if len(bounds) > 1:
        legend = canvas.legend(
            loc="outside upper left", ncols=4, frameon=False, fontsize=8, labelcolor=theme.ink, title="bound by"
        )
        legend.get_title().set(color=theme.ink, fontsize=8)
    axes.set_yticks(range(len(by_provider)), list(reversed(by_provider)))
    axes.set_ylim(-0.6, len(by_provider) - 0.4)
    shown = [t for t in TICKS if min(values) / 1.5 <= t <= max(values) * 1.5]
    shown = shown[:: math.ceil(len(shown) / 7)]
    axes.set_xticks(shown, [f"{t:g}×" for t in shown])
    axes.minorticks_off()
    axes.axvline(1.0, color=theme.ink, linewidth=1.1, alpha=0.7, zorder=2)
    axes.grid(True, axis="x", color=theme.faint, linewidth=0.7)
