"""What a suite has to say. The terminal and the HTML page render the same objects."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..measure.results import Row

NARROW = 4.1  # inches of a figure that a phone shows whole


@dataclass(frozen=True)
class Cell:
    """`tone`: "good", "bad", "weak" or "" for neutral."""

    text: str
    tone: str = ""
    hint: str = ""


@dataclass
class Table:
    title: str
    columns: list[str]
    rows: list[list[Cell | str]]
    note: str = ""
    folded: bool = False  # long: closed in the page at first, left out of the terminal
    heat: bool = False  # color whole cells by tone instead of their text


Curve = tuple[str, tuple[tuple[float, float], ...]]  # a name, and its points


@dataclass
class Figure:
    title: str
    caption: str
    draw: Callable[[Any, Any], None]  # (matplotlib Figure, plots.Theme)
    size: tuple[float, float] = (10.5, 4.4)  # inches
    alt: str = ""  # what it shows, for those who do not see it; without it the caption
    curves: frozenset[Curve] = frozenset()  # all that it draws: a page that has drawn them already links there instead


@dataclass
class Card:
    """One headline figure."""

    value: str
    label: str
    tone: str = ""


@dataclass
class Section:
    title: str
    text: list[str] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def curve_of(name: str, points: Mapping[Any, float]) -> Curve:
    """For `Figure.curves`."""
    return name, tuple((float(x), float(y)) for x, y in points.items())


def time_text(seconds: float) -> str:
    """Three digits and a unit; a dash for NaN."""
    if not math.isfinite(seconds):
        return "–"
    for limit, scale, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (math.inf, 1.0, "s")):
        if seconds < limit:
            return f"{three_digits(seconds * scale)} {unit}"
    raise AssertionError


def bytes_text(count: float | None) -> str:
    if count is None or not math.isfinite(count):
        return "–"
    for limit, scale, unit in ((2**20, 2**10, "KiB"), (2**30, 2**20, "MiB"), (math.inf, 2**30, "GiB")):
        if count < limit:
            return f"{three_digits(count / scale)} {unit}"
    raise AssertionError


def tick_text(value: float, units: tuple[tuple[float, str], ...]) -> str:
    """A round number in the largest unit that it reaches."""
    scale, unit = next(((s, u) for s, u in units if value >= s * 0.999), units[-1])
    return f"{value / scale:.3g} {unit}"


TIME_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
BYTE_UNITS = ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"))


SUPERSCRIPTS = str.maketrans("0123456789.-", "⁰¹²³⁴⁵⁶⁷⁸⁹·⁻")


def power(exponent: float, of: str = "T") -> str:
    """T¹·²⁷"""
    return of + f"{exponent:.2f}".translate(SUPERSCRIPTS)


def three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def _untimed(row: Row) -> Cell:
    text = {"wrong": "wrong result", "unavailable": "–"}.get(row.status, row.status)
    return Cell(text, "bad" if row.status == "wrong" else "weak", row.reason or "")


def ratio_cell(row: Row | None, *, losing: float = 1.0) -> Cell:
    """Speed-up over the row's baseline; below `losing` it is marked as a loss."""
    if row is None:
        return Cell("", "weak")
    if not row.ok:
        return _untimed(row)
    if row.ratio is None:
        return Cell("–", "weak")
    value = row.ratio["median"]
    tone = "weak" if row.doubtful else "bad" if value < losing else "good" if value > 1.05 else ""
    hint = f"{row.ratio['low']:.2f} to {row.ratio['high']:.2f} over {row.ratio['baseline']}"
    return Cell(f"{value:.2f}×", tone, hint + _restarts_hint(row, "ratio_") + _doubt_hint(row))


def heat_cell(row: Row | None, *, least: float, mark: str = "") -> Cell:
    """Speed-up for a table colored by it; below `least` no point should be."""
    cell = ratio_cell(row)
    if row is None or not row.ok or not row.ratio:
        return cell
    value = row.ratio["median"]
    tone = (
        "weak"
        if row.doubtful
        else "worst"
        if value < least
        else "bad"
        if value < 1
        else "best"
        if value >= 2
        else "good"
        if value >= 1.2
        else ""
    )
    return Cell(cell.text + mark, tone, cell.hint)


def speed_tone(ratio: float) -> str:
    return "good" if ratio > 1.05 else "bad" if ratio < 1 else ""


def target_cell(target: dict[str, Any]) -> Cell:
    """Whether a target was reached: "reached", "found" and "reliable" of it."""
    if target["found"] is None:
        return Cell("not measured", "bad")
    if not target["reliable"]:
        return Cell("inconclusive", "weak", "too many of its rows were contended or noisy")
    return Cell("reached", "good") if target["reached"] else Cell("not reached", "bad")


def time_cell(row: Row | None) -> Cell:
    if row is None:
        return Cell("–", "weak")
    if not row.ok:
        return _untimed(row)
    assert row.time is not None
    hint = f"{time_text(row.time['low'])} to {time_text(row.time['high'])}, {row.time['rounds']} rounds"
    return Cell(time_text(row.seconds), "weak" if row.doubtful else "", hint + _restarts_hint(row) + _doubt_hint(row))


def _restarts_hint(row: Row, of: str = "") -> str:
    if not row.restarts or row.restarts[f"{of}between"] is None:
        return ""
    between, within = (f"{row.restarts[of + name]:.1%}" for name in ("between", "within"))
    return f", {row.restarts['count']} processes: {between} between them, {within} within"


def _doubt_hint(row: Row) -> str:
    redone = row.contention and row.contention["redone"]
    said = [("timed once more", redone), ("contended", row.contended), ("noisy", f"spread {row.spread:.0%}" if row.noisy else "")]
    return "".join(f"; {what}: {why}" for what, why in said if why)


_NUMBER = re.compile(r"\d|\w[⁰¹²³⁴⁵⁶⁷⁸⁹·⁻]+$|–")


def sides(table: Table) -> list[str]:
    """Per column "left" or "right": numbers are set right, words left."""
    found = []
    for column in range(len(table.columns)):
        texts = [text for row in table.rows if (text := as_cell(row[column]).text)]
        words = sum(not _NUMBER.match(text) for text in texts)
        found.append("left" if column == 0 or 2 * words > len(texts) else "right")
    return found


def as_cell(value: Cell | str) -> Cell:
    return value if isinstance(value, Cell) else Cell(value)
