"""Speed-ups as bars: a bar for each kind of call up to the geometric mean of its rows, a line from the slowest to the fastest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..statistics import geometric_mean
from .strip import TICKS
from .style import plain

LOSS = "#d1650f"  # what is slower than the baseline, whatever the bar's color


@dataclass(frozen=True)
class Bar:
    """Speed-ups of a kind of call, at least one."""

    label: str
    color: str
    values: Sequence[float]

    @property
    def mean(self) -> float:
        return geometric_mean(list(self.values))

    @property
    def losses(self) -> int:
        return sum(value < 1 for value in self.values)

    def words(self) -> str:
        lost = f", slower at {self.losses} of {len(self.values)} points" if self.losses else ""
        return f"{self.label} {self.mean:.2f}× ({min(self.values):.2f} to {max(self.values):.2f}){lost}"


def height(groups: Sequence[tuple[str, Sequence[Bar]]]) -> float:
    """Inches of a figure that holds these groups."""
    return 0.9 + 0.27 * sum(1 + len(bars) for _, bars in groups)


def draw(canvas: Any, theme: Any, groups: Sequence[tuple[str, Sequence[Bar]]], title: str) -> None:
    """Groups of bars one below the other, each under its heading."""
    axes = canvas.subplots()
    plain(axes, theme, title)
    axes.set_xscale("log")
    values = [1.0, *(value for _, bars in groups for bar in bars for value in bar.values)]
    low, high = min(values) / 1.15, max(values) * 1.15
    axes.set_xlim(low, high * 2.4)  # room for the figures behind the bars
    y, places, labels = 0.0, [], []
    for heading, bars in groups:
        axes.text(low, y, heading, va="center", ha="left", fontsize=9, color=theme.ink, fontweight="bold")
        y -= 1
        for bar in bars:
            axes.barh(y, bar.mean - 1, left=1.0, height=0.62, color=bar.color if bar.mean >= 1 else LOSS, zorder=3)
            axes.plot([max(1.0, min(bar.values)), max(bar.values)], [y, y], color=theme.ink, linewidth=1.2, zorder=4)
            lost = f"   slower at {bar.losses} of {len(bar.values)} points" if bar.losses else ""
            if bar.losses:
                axes.plot([min(bar.values), min(1.0, max(bar.values))], [y, y], color=LOSS, linewidth=2.6, zorder=5)
            end = max(1.0, *bar.values) * 1.04
            axes.text(end, y, f"{bar.mean:.2f}×{lost}", va="center", ha="left", fontsize=8.5, color=LOSS if lost else theme.ink)
            places.append(y)
            labels.append(bar.label)
            y -= 1
    axes.set_yticks(places, labels)
    axes.set_ylim(y + 0.4, 0.7)
    ticks = [tick for tick in TICKS if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.minorticks_off()
    axes.axvline(1.0, color=theme.ink, linewidth=1.1, alpha=0.7, zorder=2)
    axes.grid(True, axis="x", color=theme.faint, linewidth=0.7)
