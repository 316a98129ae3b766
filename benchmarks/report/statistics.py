"""Mathematics on measured curves: power laws, crossovers, means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..measure.results import Row, reliable


@dataclass(frozen=True)
class PowerLaw:
    """y = factor * x ** exponent by least squares in log-log; `start` is the first x that took part."""

    exponent: float
    factor: float
    r2: float
    start: float


def power_law(x: Sequence[float], y: Sequence[float], *, upper_half: bool = True) -> PowerLaw | None:
    """Fit over the upper half of x (three points at least, if there are as many); None below two points."""
    points = sorted((a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b) and b > 0)
    if upper_half:
        points = points[-max(3, math.ceil(len(points) / 2)) :]
    if len(points) < 2:
        return None
    exponent, offset, r2 = _line(*np.log(np.array(points)).T)
    return PowerLaw(exponent, math.exp(offset), r2, points[0][0])


@dataclass(frozen=True)
class Crossover:
    """Where curve `a` meets curve `b`.

    `lower` tells which one is lower ("a", "b" or "neither", when they are within the tolerance) before and
    after `at`; without a crossing, `at` is None and `before == after`. More than one crossing: the last one,
    and `count` says how many there are. Between `low` and `high` the spread of the curves, or a difference within the
    tolerance, leaves open which one is lower.
    """

    at: float | None
    before: str
    after: str
    count: int
    first: float  # range that was measured for both
    last: float
    low: float | None = None
    high: float | None = None


def crossover(
    x: Sequence[float],
    a: Sequence[float],
    b: Sequence[float],
    *,
    tolerance: float = 0.03,
    spread: Sequence[tuple[float, float]] | None = None,
) -> Crossover | None:
    """Crossing interpolated in log-log; points closer than `tolerance` decide nothing.

    `spread` is the range of a / b at every x; without it, the interval follows from the tolerance alone.
    """
    ranges = spread or [(math.inf, -math.inf)] * len(x)
    together = sorted(zip(x, a, b, ranges, strict=True))
    points = [(p, math.log(q / r), s) for p, q, r, s in together if math.isfinite(q) and math.isfinite(r)]
    if not points:
        return None
    first, last = points[0][0], points[-1][0]
    decided = [(p, r) for p, r, _ in points if abs(r) > tolerance]
    if not decided:
        return Crossover(None, "neither", "neither", 0, first, last)
    crossings = [(low, high) for low, high in zip(decided, decided[1:], strict=False) if (low[1] > 0) != (high[1] > 0)]
    lower = ["b" if r > 0 else "a" for _, r in decided]
    if not crossings:
        return Crossover(None, lower[0], lower[-1], 0, first, last)
    (left, before), (right, behind) = crossings[-1]
    sign = 1 if behind > 0 else -1  # times it, the difference turns from negative to positive
    bands = []
    for p, r, (low, high) in points:
        bottom, top = sorted((sign * min(r - tolerance, _log(low)), sign * max(r + tolerance, _log(high))))
        bands.append((p, bottom, top))
    at = _turns([(left, sign * before), (right, sign * behind)])[0]
    from_x = max(_turns([(p, top) for p, _, top in bands if p <= right]), default=first)
    to_x = min(_turns([(p, bottom) for p, bottom, _ in bands if p >= left]), default=last)
    names = ("a", "b") if sign > 0 else ("b", "a")
    return Crossover(at, *names, len(crossings), first, last, min(from_x, at), max(to_x, at))


def _log(value: float) -> float:
    """Of a limit; an infinite one, which stands for a spread that nobody knows, stays as it is."""
    return math.log(value) if 0 < value < math.inf else value


def _turns(points: Sequence[tuple[float, float]]) -> list[float]:
    """Every x > 0 where y turns from negative to positive, y taken as linear over log x."""
    pairs = [pair for pair in zip(points, points[1:], strict=False) if pair[0][1] < 0 <= pair[1][1]]
    return [x0 * (x1 / x0) ** (y0 / (y0 - y1)) for (x0, y0), (x1, y1) in pairs]


def geometric_mean(values: Sequence[float]) -> float:
    """NaN for no values."""
    return float(np.exp(np.mean(np.log(values)))) if len(values) else math.nan


def mean_of(rows: Sequence[Row]) -> dict[str, Any]:
    """The geometric mean of their speed-ups, of how many, and whether it may be a headline."""
    ratios = [row.ratio["median"] for row in rows if row.ratio]
    return {"points": len(ratios), "mean": geometric_mean(ratios), "reliable": reliable(rows)}


def local_exponents(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float, float]]:
    """(x_low, x_high, slope in log-log) between neighbors."""
    points = sorted((a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b) and b > 0)
    return [(x0, x1, math.log(y1 / y0) / math.log(x1 / x0)) for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False)]


@dataclass(frozen=True)
class Exponential:
    """y = start * factor ** x by least squares over log y."""

    factor: float
    start: float
    r2: float


def exponential(x: Sequence[float], y: Sequence[float]) -> Exponential | None:
    """Fit over all points above zero; None below two."""
    points = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b) and b > 0]
    if len(points) < 2:
        return None
    places, values = np.array(points).T
    slope, offset, r2 = _line(places, np.log(values))
    return Exponential(math.exp(slope), math.exp(offset), r2)


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Slope, offset and r2 of a least-squares line."""
    slope, offset = np.polyfit(x, y, 1)
    residual, total = ((y - slope * x - offset) ** 2).sum(), ((y - y.mean()) ** 2).sum()
    return float(slope), float(offset), 1.0 if total < 1e-12 else float(1 - residual / total)
