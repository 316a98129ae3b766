"""What answers a claim: lines measured over a length, an answer for each of their points, and the words for it.

Pure functions of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from ..measure.results import Row
from ..report.findings import FAILS, HOLDS, PARTLY, UNDECIDED, Line, Meeting, Part
from ..report.statistics import Crossover, crossover

EQUAL = 0.03  # relative differences below this decide nothing


def by_size(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows that may be compared: of one batch, width, precision and number of threads."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(sizes(row), []).append(row)
    return found


def sizes(row: Row) -> str:
    precision = (row.detail or {}).get("precision", row.dtype)
    threads = "" if row.device.startswith("cuda") else f", {row.threads} thread" + "s" * (row.threads > 1)
    return f"B = {row.B}, width {row.H}, {precision}{threads}"


def line(
    rows: Iterable[Row],
    name: str,
    value: Callable[[Row], float | None] | None = None,
    *,
    x: Callable[[Row], float] = lambda row: row.T,
    per: Callable[[Row], float] = lambda row: 1.0,
    color: str | None = None,
    dashed: bool = False,
) -> Line:
    """Of every row that passed the gate: `value`, or else what it measured, a time or a metric, over `per`, with its spread."""
    values, spread = {}, {}
    for row in rows:
        measured = None if value else row.metric or row.time
        found = (value(row) if value else measured["median"] / per(row) if measured else None) if row.ok else None
        if found is None or not math.isfinite(found):
            continue
        values[x(row)] = float(found)
        if measured:
            low, high = (measured["low"], measured["high"]) if row.metric else row.interval
            spread[x(row)] = (low / per(row), high / per(row))
    return Line(name, dict(sorted(values.items())), spread, color, dashed)


def lowest(lines: Sequence[Line], name: str) -> Line:
    """Where every line that has points was measured, the lowest of them."""
    return _best(lines, name, min)


def highest(lines: Sequence[Line], name: str) -> Line:
    """Where every line that has points was measured, the highest of them."""
    return _best(lines, name, max)


def _best(lines: Sequence[Line], name: str, choose: Callable[..., Line]) -> Line:
    lines = [a for a in lines if a]
    shared = set.intersection(*(set(a.values) for a in lines)) if lines else set()
    best = {x: choose(lines, key=lambda a, x=x: a.values[x]) for x in sorted(shared)}
    return Line(name, {x: a.values[x] for x, a in best.items()}, {x: a.spread[x] for x, a in best.items() if x in a.spread})


def less(a: Line, b: Line, *, apart: bool = False) -> dict[float, bool | None]:
    """At every x measured for both: is a less than b? None where they are equal within 3 %, or `apart` and their spreads meet."""
    found: dict[float, bool | None] = {}
    for x in sorted(a.values.keys() & b.values.keys()):
        p, q = a.values[x], b.values[x]
        meets = (
            apart and x in a.spread and x in b.spread and a.spread[x][0] <= b.spread[x][1] and b.spread[x][0] <= a.spread[x][1]
        )
        found[x] = None if meets or p == q or (min(p, q) > 0 and abs(math.log(p / q)) < EQUAL) else p < q
    return found


def judge(holds: Mapping[float, bool | None], about: str = "", letter: str = "T") -> Part:
    """An answer from one for each length; None where the difference decides nothing."""
    points = sorted(holds)
    answers = [holds[x] for x in points]
    span = _span(points, letter)
    if all(answers):
        return Part(HOLDS, f"holds for {span}", about)
    if not any(answers):
        if None not in answers:
            return Part(FAILS, f"does not hold here, {span}", about)
        if False not in answers:
            return Part(UNDECIDED, f"undecided, no difference for {span}", about)
        equal = ", ".join(f"{x:g}" for x in points if holds[x] is None)
        return Part(FAILS, f"does not hold here, {span} (no difference at {letter} = {equal})", about)
    first, last = answers.index(True), len(answers) - 1 - answers[::-1].index(True)
    if not all(answers[first : last + 1]):
        return Part(PARTLY, f"holds only at {letter} = " + ", ".join(f"{x:g}" for x in points if holds[x]), about)
    if last == len(answers) - 1:
        return Part(PARTLY, f"holds only from {letter} = {points[first]:g} on, measured to {points[-1]:g}", about)
    if first == 0:
        return Part(PARTLY, f"holds only up to {letter} = {points[last]:g}, measured to {points[-1]:g}", about)
    return Part(PARTLY, f"holds only for {_span(points[first : last + 1], letter)}", about)


def _span(points: Sequence[float], letter: str) -> str:
    return f"{letter} = {points[0]:g}" + (f"…{points[-1]:g}" if len(points) > 1 else "")


def meet(a: Line, b: Line, about: str = "", letter: str = "T") -> tuple[Meeting, ...]:
    """The crossover of two lines, if they have one in the measured range."""
    found = crossing(a, b)
    if not found or found.at is None or found.low is None or found.high is None:
        return ()
    first, second = (a.name, b.name) if found.after == "b" else (b.name, a.name)
    return (Meeting(first, second, found.at, found.low, found.high, about, letter),)


def crossing(a: Line, b: Line) -> Crossover | None:
    """Of positive values; the interval follows from the spreads where both are known everywhere."""
    shared = [x for x in sorted(a.values.keys() & b.values.keys()) if a.values[x] > 0 < b.values[x]]
    known = all(x in a.spread and x in b.spread and min(a.spread[x] + b.spread[x]) > 0 for x in shared)
    spread = [(a.spread[x][0] / b.spread[x][1], a.spread[x][1] / b.spread[x][0]) for x in shared] if known else None
    return crossover(shared, [a.values[x] for x in shared], [b.values[x] for x in shared], tolerance=EQUAL, spread=spread)
