"""What answers a claim: lines measured over a length, an answer for each of their points, and the words for it.

Pure functions of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ..measure.results import DOUBTFUL, Row
from ..report.findings import FAILS, HOLDS, INCONCLUSIVE, PARTLY, UNDECIDED, Line, Meeting, Part
from ..report.statistics import Crossover, crossover

EQUAL = 0.03  # relative differences below this decide nothing


@dataclass(frozen=True)
class Answers:
    """An answer for each x, None where the difference decides nothing; at `doubtful` ones the rows are no ground for any."""

    firm: Mapping[float, bool | None]
    doubtful: frozenset[float] = frozenset()
    measured: bool = False  # from values with a spread: an answer that comes and goes is chance

    def __bool__(self) -> bool:
        return bool(self.firm or self.doubtful)

    @property
    def places(self) -> list[float]:
        """Where the figures behind them may be told: of firm answers if there are any."""
        return sorted(self.firm or self.doubtful)

    def turned(self, into: Callable[[bool | None], bool | None]) -> Answers:
        return replace(self, firm={x: into(v) for x, v in self.firm.items()})


def by_size(rows: Iterable[Row], *, width: bool = True) -> dict[str, list[Row]]:
    """Rows that may be compared: of one batch, width (or, without it, number of parameters), precision and number of threads."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(sizes(row, width=width), []).append(row)
    return found


def sizes(row: Row, *, width: bool = True) -> str:
    precision = (row.detail or {}).get("precision", row.dtype)
    threads = "" if row.device.startswith("cuda") else f", {row.threads} thread" + "s" * (row.threads > 1)
    return f"B = {row.B}, {f'width {row.H}' if width else 'equal parameters'}, {precision}{threads}"


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
    """Of every row that passed its check: `value`, or else what it measured, a time or a metric, over `per`, with its spread.

    A time that was contended or is noisy is doubtful; a value that does not follow from the time is not.
    """
    values, spread, doubtful, timed = {}, {}, set(), False
    for row in rows:
        measured = None if value else row.metric or row.time
        found = (value(row) if value else measured["median"] / per(row) if measured else None) if row.ok else None
        if found is None or not math.isfinite(found):
            continue
        values[x(row)] = float(found)
        if measured:
            low, high = (measured["low"], measured["high"]) if row.metric else row.interval
            spread[x(row)] = (low / per(row), high / per(row))
            timed = timed or not row.metric
            if row.doubtful and not row.metric:
                doubtful.add(x(row))
    return Line(name, dict(sorted(values.items())), spread, color, dashed, frozenset(doubtful), timed)


def lowest(lines: Sequence[Line], name: str) -> Line:
    """Where every line that has points was measured, the lowest of them."""
    return _best(lines, name, 1)


def highest(lines: Sequence[Line], name: str) -> Line:
    """Where every line that has points was measured, the highest of them."""
    return _best(lines, name, -1)


def _best(lines: Sequence[Line], name: str, sign: int) -> Line:
    """Doubtful where the best line is, or where another one that is doubtful could have been."""
    lines = [a for a in lines if a]
    values, spread, doubtful = {}, {}, set()
    for x in sorted(set.intersection(*(set(a.values) for a in lines)) if lines else set()):
        best = min(lines, key=lambda a: sign * a.values[x])
        values[x] = best.values[x]
        if x in best.spread:
            spread[x] = best.spread[x]
        if x in best.doubtful or any(_reaches(a, x, best.values[x], sign) for a in lines):
            doubtful.add(x)
    return Line(name, values, spread, doubtful=frozenset(doubtful), timed=any(a.timed for a in lines))


def _reaches(a: Line, x: float, y: float, sign: int) -> bool:
    """Whether a doubtful value could be as good as y."""
    return x in a.doubtful and min(sign * end for end in a.spread[x]) <= sign * y


def less(a: Line, b: Line) -> Answers:
    """At every x measured for both: is a less than b? None where they are equal within 3 %, or their spreads meet."""
    found: dict[float, bool | None] = {}
    shared = sorted(a.values.keys() & b.values.keys())
    doubtful = frozenset(shared) & (a.doubtful | b.doubtful)
    for x in shared:
        p, q = a.values[x], b.values[x]
        if x not in doubtful:
            equal = p == q or _overlap(a, b, x) or (min(p, q) > 0 and abs(math.log(p / q)) < EQUAL)
            found[x] = None if equal else p < q
    return Answers(found, doubtful, bool(a.spread or b.spread))


def _overlap(a: Line, b: Line, x: float) -> bool:
    return x in a.spread and x in b.spread and a.spread[x][0] <= b.spread[x][1] and b.spread[x][0] <= a.spread[x][1]


def unreliable(a: Line, about: str = "") -> Part | None:
    """The answer where a line is doubtful at more than a fifth of its lengths."""
    count, doubtful = len(a.values), len(a.doubtful)
    if doubtful <= DOUBTFUL * count:
        return None
    return Part(INCONCLUSIVE, f"inconclusive, contended or noisy at {doubtful} of {count} lengths", about)


def judge(holds: Answers | Mapping[float, bool | None], about: str = "", letter: str = "T") -> Part:
    """An answer from one for each length; None where the difference decides nothing.

    None at all follows where too many lengths are doubtful, or where a measured order changes more than once.
    """
    if not isinstance(holds, Answers):
        holds = Answers(holds)
    count, doubtful = len(holds.firm) + len(holds.doubtful), len(holds.doubtful)
    if doubtful > DOUBTFUL * count:
        return Part(INCONCLUSIVE, f"inconclusive, contended or noisy at {doubtful} of {count} lengths", about)
    points = sorted(holds.firm)
    answers = [holds.firm[x] for x in points]
    turns = [one != other for one, other in pairwise(v for v in answers if v is not None)]
    if holds.measured and sum(turns) > 1:
        return Part(INCONCLUSIVE, f"inconclusive, the order changes {sum(turns)} times over {_span(points, letter)}", about)
    span = _span(points, letter)
    if all(answers):
        return Part(HOLDS, f"holds for {span}", about)
    if not any(answers):
        if None not in answers:
            return Part(FAILS, f"does not hold here, {span}", about)
        if False not in answers:
            return Part(UNDECIDED, f"undecided, no difference for {span}", about)
        equal = ", ".join(f"{x:g}" for x, v in zip(points, answers, strict=True) if v is None)
        return Part(FAILS, f"does not hold here, {span} (no difference at {letter} = {equal})", about)
    first, last = answers.index(True), len(answers) - 1 - answers[::-1].index(True)
    if not all(answers[first : last + 1]):
        true = ", ".join(f"{x:g}" for x, v in zip(points, answers, strict=True) if v)
        return Part(PARTLY, f"holds only at {letter} = {true}", about)
    if last == len(answers) - 1:
        return Part(PARTLY, f"holds only from {letter} = {points[first]:g} on, measured to {points[-1]:g}", about)
    if first == 0:
        return Part(PARTLY, f"holds only up to {letter} = {points[last]:g}, measured to {points[-1]:g}", about)
    return Part(PARTLY, f"holds only for {_span(points[first : last + 1], letter)}", about)


def _span(points: Sequence[float], letter: str) -> str:
    return f"{letter} = {points[0]:g}" + (f"…{points[-1]:g}" if len(points) > 1 else "")


def meet(a: Line, b: Line, about: str = "", letter: str = "T") -> tuple[Meeting, ...]:
    """The crossover of two lines, if they have one and no more in the measured range, on ground that is firm enough."""
    shared = a.values.keys() & b.values.keys()
    found = crossing(a, b)
    if not found or found.count != 1 or len(shared & (a.doubtful | b.doubtful)) > DOUBTFUL * len(shared):
        return ()
    if found.at is None or found.low is None or found.high is None:
        return ()
    first, second = (a.name, b.name) if found.after == "b" else (b.name, a.name)
    return (Meeting(first, second, found.at, found.low, found.high, about, letter),)


def crossing(a: Line, b: Line) -> Crossover | None:
    """Of positive values that are not doubtful; the interval follows from the spreads where both are known everywhere."""
    p, q = a.firm, b.firm
    shared = [x for x in sorted(p.keys() & q.keys()) if p[x] > 0 < q[x]]
    known = all(x in a.spread and x in b.spread and min(a.spread[x] + b.spread[x]) > 0 for x in shared)
    spread = [(a.spread[x][0] / b.spread[x][1], a.spread[x][1] / b.spread[x][0]) for x in shared] if known else None
    return crossover(shared, [p[x] for x in shared], [q[x] for x in shared], tolerance=EQUAL, spread=spread)
