"""What a suite shows that is a table of cases and no more: quantities against T, or another size, a line for each provider.

Rows of one group, mode and size make a panel. A suite names its groups and quantities, and takes `derive`, `present` and
`picture` from here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..measure.results import Results, Row
from ..providers.registry import EVERY_PROVIDER
from ..workloads.base import ALL_MODES
from .model import (
    BYTE_UNITS,
    TIME_UNITS,
    Card,
    Cell,
    Figure,
    Section,
    Table,
    bytes_text,
    curve_of,
    power,
    ratio_cell,
    speed_tone,
    three_digits,
    tick_text,
    time_cell,
    time_text,
)
from .plots.style import end_labels, log_axes
from .statistics import exponential, mean_of, power_law


@dataclass(frozen=True)
class Quantity:
    """A figure of a row, NaN where it has none. `base`: of the logarithmic axis; 0: a linear one."""

    title: str
    of: Callable[[Row], float]
    text: Callable[[float], str]
    tick: Callable[[float], str]
    base: int = 10
    decays: bool = False  # fitted by a factor for each step as well


def of_bytes(title: str, of: Callable[[Row], float | None]) -> Quantity:
    def value(row: Row) -> float:
        found = of(row)
        return math.nan if found is None else float(found)

    return Quantity(title, value, bytes_text, lambda v: tick_text(v, BYTE_UNITS), 4)


def of_metric(title: str, text: Callable[[float], str], base: int, *, decays: bool = False) -> Quantity:
    return Quantity(title, lambda r: r.metric["median"] if r.metric else math.nan, text, text, base, decays)


def time_tick(seconds: float) -> str:
    return tick_text(seconds, TIME_UNITS)


TIME = Quantity("Time", lambda r: r.seconds, time_text, time_tick)
PER_STEP = Quantity("Time per token", lambda r: r.seconds * r.B / r.tokens, time_text, time_tick)
PEAK = of_bytes("Peak memory", lambda r: r.memory)
KEPT = of_bytes("Kept for the backward pass", lambda r: r.kept)


@dataclass(frozen=True)
class Curves:
    """`groups`: their headings; `shown`: the quantities of each; `x`: what `at` gives, the place of a row on the axis."""

    name: str
    title: str
    text: tuple[str, ...]
    groups: dict[str, str]
    shown: dict[str, tuple[Quantity, ...]]
    x_label: str = "T, sequence length"
    x: str = "T"
    at: Callable[[Row], int] = lambda row: row.T
    notes: dict[str, str] = field(default_factory=dict)  # of a group's tables
    split: tuple[str, ...] = ("B", "H", "threads", "dtype")  # what a panel has one of
    drawn: Callable[[Row], bool] = lambda row: True  # whether figures show it
    height: float = 4.2  # of a panel in a figure, in inches

    def panels(self, rows: list[Row]) -> dict[str, list[Row]]:
        """Rows by heading, which names what differs between them."""
        said = {"B": "B={}", "H": "H={}", "threads": "threads={}", "dtype": "{}"}
        said = {name: form for name, form in said.items() if name in self.split and name != self.x}
        varied = [name for name in said if len({(getattr(r, name), r.group) for r in rows}) > len(_groups(rows))]
        modes = len({r.mode for r in rows}) > 1
        found: dict[str, list[Row]] = {}
        for row in sorted(rows, key=lambda r: (list(self.groups).index(r.group), list(ALL_MODES).index(r.mode))):
            parts = [self.groups[row.group], *([ALL_MODES[row.mode]] if modes else [])]
            parts += [said[name].format(getattr(row, name)) for name in varied]
            found.setdefault(", ".join(parts), []).append(row)
        return found

    def curve(self, rows: list[Row], provider: str, quantity: Quantity) -> dict[int, float]:
        """x -> value of a provider in the rows of one panel; only where the check passed and there is a value."""
        found = {self.at(r): quantity.of(r) for r in rows if r.provider == provider and r.ok}
        return {T: value for T, value in sorted(found.items()) if math.isfinite(value)}

    def derive(self, results: Results) -> dict[str, Any]:
        """Fits of every curve, means of the speed-ups, losses, and what has no figure."""
        rows = results.of_suite(self.name)
        fits, means = [], []
        for heading, panel in self.panels(rows).items():
            for provider in _providers(panel):
                fits += [fit | {"panel": heading, "provider": provider} for fit in self._fits(panel, provider)]
                timed = [r for r in panel if r.provider == provider and r.ok and r.ratio]
                if timed:
                    over = timed[0].ratio["baseline"] if timed[0].ratio else ""
                    means.append({"panel": heading, "provider": provider, "over": over} | mean_of(timed))
        own = [(heading, r) for heading, panel in self.panels(rows).items() for r in panel if r.ratio and "fastseq" in r.provider]
        return {
            "fits": fits,
            "means": means,
            "losses": [
                {"point": self._point(heading, r), "to": r.ratio["baseline"], "ratio": r.ratio["median"]}
                for heading, r in own
                if r.ok and r.ratio and r.ratio["median"] < 1
            ],
            "untimed": [
                {"point": self._point(heading, r), "status": r.status, "reason": r.reason}
                for heading, panel in self.panels(rows).items()
                for r in panel
                if not r.ok
            ],
        }

    def _fits(self, panel: list[Row], provider: str) -> list[dict[str, Any]]:
        found = []
        for quantity in self.shown[panel[0].group]:
            points = self.curve(panel, provider, quantity)
            fit = power_law(list(points), list(points.values())) if quantity.base else None
            if fit:
                found.append({"quantity": quantity.title, "exponent": fit.exponent, "r2": fit.r2})
            decay = exponential(list(points), list(points.values())) if quantity.decays else None
            if fit and decay:
                found[-1] |= {"factor": decay.factor, "factor r2": decay.r2}
        return found

    def _point(self, heading: str, row: Row) -> str:
        return f"{row.provider}, {heading}, {self.x}={self.at(row)}"

    def present(self, results: Results) -> list[Section]:
        rows, derived = results.of_suite(self.name), self.derive(results)
        first = rows[0]
        where = f"threads={first.threads}" if first.device == "cpu" else "times by CUDA events with a cold L2"
        sizes = f"H={_all(r.H for r in rows)}, B={_all(r.B for r in rows)}, {_all(r.dtype for r in rows)}, {where}."
        tables = []
        for heading, panel in self.panels(rows).items():
            tables += [self._table(heading, panel, quantity, derived) for quantity in self.shown[panel[0].group]]
            tables.append(self._speed_ups(heading, panel))
        tables += [_losses(derived), _what_ran(rows)]
        drawn = [r for r in rows if self.drawn(r)]
        figures = [self._figure(drawn, title) for title in self._titles(drawn)]
        return [Section(self.title, [*self.text, sizes], _cards(derived), figures, [t for t in tables if t.rows])]

    def picture(self, results: Results) -> Figure:
        rows = [r for r in results.of_suite(self.name) if self.drawn(r)]
        titles = self._titles(rows)
        if not titles:
            raise ValueError(f"--picture: this run of the suite {self.name} has nothing to draw")
        return self._figure(rows, titles[0])

    def _titles(self, rows: list[Row]) -> list[str]:
        """Of the quantities that have values, each once."""
        panels = self.panels(rows).values()
        found = [q.title for panel in panels for q in self.shown[panel[0].group] if self._drawn(panel, q)]
        return list(dict.fromkeys(found))

    def _drawn(self, panel: list[Row], quantity: Quantity) -> bool:
        return any(self.curve(panel, provider, quantity) for provider in _providers(panel))

    def _table(self, heading: str, panel: list[Row], quantity: Quantity, derived: dict[str, Any]) -> Table:
        places = sorted({self.at(r) for r in panel})
        if not self._drawn(panel, quantity):
            return Table("", [], [])
        fits = {f["provider"]: f for f in derived["fits"] if (f["panel"], f["quantity"]) == (heading, quantity.title)}
        body: list[list[Cell | str]] = []
        for provider in _providers(panel):
            at = {self.at(r): r for r in panel if r.provider == provider}
            fit = fits.get(provider)
            body.append([provider, *(_value(at.get(T), quantity) for T in places)])
            if quantity.base:
                body[-1].append(power(fit["exponent"], self.x) if fit else "–")
            if quantity.decays:
                body[-1].append(f"{fit['factor']:.3g}" if fit and "factor" in fit else "–")
        columns = ["", *(f"{self.x}={T}" for T in places)]
        columns += ["grows as"] * bool(quantity.base) + ["factor for a step"] * quantity.decays
        return Table(f"{quantity.title}: {heading}", columns, body, self.notes.get(panel[0].group, ""))

    def _speed_ups(self, heading: str, panel: list[Row]) -> Table:
        places = sorted({self.at(r) for r in panel})
        body: list[list[Cell | str]] = []
        for provider in _providers(panel):
            at = {self.at(r): r for r in panel if r.provider == provider and r.ratio}
            if at:
                base = next(r.ratio["baseline"] for r in at.values() if r.ratio)
                last = at[max(at)]
                roofline = (
                    Cell(f"{last.of_roofline:.0%}", "", f"{last.roofline['bound']}: {last.roofline['note']}")
                    if last.roofline
                    else "–"
                )
                body.append([provider, base, *(ratio_cell(at.get(T)) for T in places), roofline])
        columns = ["", "over", *(f"{self.x}={T}" for T in places), "of roofline, last"]
        return Table(f"Speed-up: {heading}", columns, body)

    def _figure(self, rows: list[Row], title: str) -> Figure:
        shown = {
            heading: (panel, quantity)
            for heading, panel in self.panels(rows).items()
            for quantity in self.shown[panel[0].group]
            if quantity.title == title and self._drawn(panel, quantity)
        }

        def draw(canvas: Any, theme: Any) -> None:
            every = canvas.subplots(-(-len(shown) // 2), min(2, len(shown)), squeeze=False)
            for axes in every.flat[len(shown) :]:
                axes.set_visible(False)
            for axes, (heading, (panel, quantity)) in zip(every.flat, shown.items(), strict=False):
                self._draw(axes, theme, heading, panel, quantity)

        caption = "Median, with its 20 % and 80 % quantiles or, of an experiment, the extremes over seeds."
        drawn = {
            curve_of(provider, points)
            for panel, quantity in shown.values()
            for provider in _providers(panel)
            if (points := self.curve(panel, provider, quantity))
        }
        size = (12.5, self.height * -(-len(shown) // 2))
        return Figure(f"{title} against {self.x_label}", caption, draw, size, curves=frozenset(drawn))

    def _draw(self, axes: Any, theme: Any, heading: str, panel: list[Row], quantity: Quantity) -> None:
        places = [float(T) for T in sorted({self.at(r) for r in panel})]
        log_axes(
            axes,
            theme,
            title=f"{quantity.title}: {heading}",
            x=places,
            y_format=quantity.tick,
            y_base=quantity.base or 10,
            x_label=self.x_label,
        )
        if not quantity.base:
            axes.set_yscale("linear")
        ends = []
        for provider in _providers(panel):
            points = {T: v for T, v in self.curve(panel, provider, quantity).items() if v > 0 or not quantity.base}
            if not points:
                continue
            known, own = EVERY_PROVIDER.get(provider), "fastseq" in provider
            color = known.color if known else "#888888"
            style = {"linestyle": "--" if known and known.dashed else "-", "linewidth": 2.4 if own else 1.5}
            axes.plot(list(points), list(points.values()), color=color, marker="o", markersize=3.5, label=provider, **style)
            drawn = [r for r in panel if r.provider == provider and self.at(r) in points]
            band = [(self.at(r), *spread) for r in drawn if (spread := _spread(r, quantity))]
            if band:
                T, low, high = zip(*sorted(band), strict=True)
                axes.fill_between(T, low, high, color=color, alpha=0.15, linewidth=0)
            ends.append((list(points.values())[-1], provider, color))
        if not ends:
            return
        if len(places) > 1:
            axes.set_xlim(places[0] / 1.12, places[-1] * 1.06)
        if quantity.base:
            end_labels(axes, ends)
        else:
            axes.legend(frameon=False, fontsize=8, labelcolor=theme.ink)


def _spread(row: Row, quantity: Quantity) -> tuple[float, float] | None:
    """Low and high of what the quantity is taken from, where it is a time or a metric."""
    source = row.metric or (row.time if quantity in (TIME, PER_STEP) else None)
    if not source or (quantity.base and source["low"] <= 0):
        return None
    scale = quantity.of(row) / source["median"] if source["median"] else 1.0
    return source["low"] * scale, source["high"] * scale


def _groups(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(r.group for r in rows))


def _providers(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(r.provider for r in rows))


def _all(values: Any) -> str:
    return ", ".join(str(v) for v in dict.fromkeys(values))


def _value(row: Row | None, quantity: Quantity) -> Cell:
    if row is None or not row.ok:
        return time_cell(row)
    value = quantity.of(row)
    if not math.isfinite(value):
        return Cell("–", "weak")
    spread = _spread(row, quantity)
    return Cell(quantity.text(value), "", f"{quantity.text(spread[0])} to {quantity.text(spread[1])}" if spread else "")


def _cards(derived: dict[str, Any]) -> list[Card]:
    return [
        Card(f"{m['mean']:.2f}×", f"{m['provider']} over {m['over']}, {m['panel']}", speed_tone(m["mean"]))
        for m in derived["means"]
        if "fastseq" in m["provider"] and m["reliable"]
    ][:8]


def _losses(derived: dict[str, Any]) -> Table:
    lost = sorted(derived["losses"], key=lambda x: x["ratio"])
    body: list[list[Cell | str]] = [[x["point"], Cell(f"{x['ratio']:.2f}×", "bad"), x["to"]] for x in lost]
    return Table(f"Points that fastseq loses: {len(body)}", ["point", "speed-up", "over"], body)


def _what_ran(rows: list[Row]) -> Table:
    """Per provider: errors against fp64, host time and implementations, or why it has no figure."""
    body: list[list[Cell | str]] = []
    for provider in _providers(rows):
        own = [r for r in rows if r.provider == provider]
        checks = [r.check for r in own if r.check and r.check["error"] is not None]
        wrong = [r for r in own if r.status == "wrong"]
        error = max((c["error"] for c in checks), default=math.nan)
        share = max((c["error"] / c["bound"] for c in checks if c["bound"]), default=math.nan)
        status = Cell(f"{len(wrong)} wrong", "bad", wrong[0].reason or "") if wrong else Cell(f"{error:.1e}" if checks else "–")
        host = [r.host["median"] for r in own if r.host]
        first = [r.first for r in own if r.first is not None]
        count = f"{max(r.parameters or 0 for r in own):,}" if any(r.parameters for r in own) else "–"
        chosen = ", ".join(sorted({name for r in own for name in r.chose}))
        reasons = "; ".join(dict.fromkeys(r.reason for r in own if r.reason))
        line: list[Cell | str] = [
            provider,
            f"{sum(r.ok for r in own)} of {len(own)}",
            count,
            status,
            f"{share:.0%}" if checks else "–",
        ]
        line += [time_text(max(found)) if found else "–" for found in (first, host)]
        body.append([*line, chosen or reasons or "–"])
    return Table(
        "What ran",
        [
            "",
            "points",
            "parameters",
            "error against fp64",
            "of its bound",
            "first call",
            "host time",
            "implementations, or why none",
        ],
        body,
        "Error: the largest deviation of outputs and gradients, relative to the tensor's largest value. A provider that refuses "
        "a call, or was wrong, has no figure. First call: compiling, warming up and allocating, which no other figure holds; the "
        "longest, as of the host time.",
        folded=True,
    )


def number(value: float) -> str:
    return three_digits(value) if 0.01 <= abs(value) < 1000 or value == 0 else f"{value:.1e}"


def share(value: float) -> str:
    return f"{value:.0%}"
