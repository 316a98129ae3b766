"""The lines that a claim follows from, as pictures: one for each panel, narrow enough for a phone."""

from __future__ import annotations

from functools import partial
from typing import Any

from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from ..findings import FORMATS, Finding, Panel
from ..model import BYTE_UNITS, NARROW, TIME_UNITS, Figure, curve_of, tick_text
from .style import plain

# Told apart with every kind of color vision; every line has a shape of its own as well.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#c2649a", "#b97d00", "#3a8fd0", "#7c889e")
MARKERS = "osD^vP*X<>"
LONG = 22  # letters of a name that leaves no room for another beside it
UNITS = {"seconds": TIME_UNITS, "bytes": BYTE_UNITS}


def figures(finding: Finding) -> list[Figure]:
    return [
        Figure(
            panel.title,
            f"{finding.sizes}. Medians; the bands are the 20 % to 80 % quantiles, or of an experiment the extremes over seeds."
            if any(line.spread for line in panel.lines)
            else f"{finding.sizes}.",
            partial(draw, panel=panel),
            (NARROW, 2.6 + 0.17 * ((len(panel.lines) + 1) // 2)),
            alt=panel.words(),
            curves=frozenset(curve_of(line.name, line.values) for line in panel.lines if line),
        )
        for panel in finding.panels
        if any(panel.lines)
    ]


def draw(canvas: Any, theme: Any, panel: Panel) -> None:
    axes = canvas.subplots()
    plain(axes, theme, "")
    places = sorted({x for line in panel.lines for x in line.values})
    axes.set_xscale("log", base=2)
    if panel.log:
        axes.set_yscale("log", base=4 if panel.unit == "bytes" else 10)
        axes.yaxis.set_minor_formatter(NullFormatter())
    for i, line in enumerate(line for line in panel.lines if line):
        color = line.color or COLORS[i % len(COLORS)]
        style: dict[str, Any] = {"marker": MARKERS[i % len(MARKERS)], "markersize": 4, "linewidth": 1.6, "color": color}
        style["linestyle"] = "--" if line.dashed else "-"
        points = {x: y for x, y in line.values.items() if y > 0 or not panel.log}
        axes.plot(list(points), list(points.values()), label=line.name, **style)
        known = [x for x in points if x in line.spread]
        if known:
            low, high = zip(*(line.spread[x] for x in known), strict=True)
            axes.fill_between(known, low, high, color=color, alpha=0.18, linewidth=0)
    axes.set_xticks(places, [f"{x:g}" for x in places])
    axes.xaxis.set_minor_locator(NullLocator())
    units, form = UNITS.get(panel.unit), FORMATS[panel.unit]
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: tick_text(v, units) if units else form(v)))
    axes.set_xlabel(panel.x_label, color=theme.ink, fontsize=8.5)
    axes.grid(True, which="major", color=theme.faint, linewidth=0.7)
    columns = 1 if any(len(line.name) > LONG for line in panel.lines) else 2
    canvas.legend(loc="outside upper left", ncols=columns, frameon=False, fontsize=8, labelcolor=theme.ink, borderpad=0)
