"""Mathematics on measured curves: power laws, crossovers, means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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
    log_x, log_y = np.log(np.array(points)).T
    exponent, offset = np.polyfit(log_x, log_y, 1)
    residual = ((log_y - exponent * log_x - offset) ** 2).sum()
    total = ((log_y - log_y.mean()) ** 2).sum()
    r2 = 1.0 if total < 1e-12 else 1 - residual / total
    return PowerLaw(float(exponent), float(np.exp(offset)), float(r2), points[0][0])


@dataclass(frozen=True)
class Crossover:
    """Where curve `a` meets curve `b`.

    `lower` tells which one is lower ("a", "b" or "neither", when they are within the tolerance) before and
    after `at`; without a crossing, `at` is None and `before == after`. More than one crossing: the last one,
    and `count` says how many there are.
    """

    at: float | None
    before: str
    after: str
    count: int
    first: float  # range that was measured for both
    last: float


def crossover(x: Sequence[float], a: Sequence[float], b: Sequence[float], *, tolerance: float = 0.03) -> Crossover | None:
    """Crossing interpolated in log-log; points closer than `tolerance` decide nothing."""
    points = [(p, q / r) for p, q, r in sorted(zip(x, a, b, strict=True)) if math.isfinite(q) and math.isfinite(r)]
    if not points:
        return None
    first, last = points[0][0], points[-1][0]
    decided = [(p, r) for p, r in points if abs(math.log(r)) > tolerance]
    if not decided:
        return Crossover(None, "neither", "neither", 0, first, last)
    crossings = [(low, high) for low, high in zip(decided, decided[1:], strict=False) if (low[1] > 1) != (high[1] > 1)]
    lower = ["b" if r > 1 else "a" for _, r in decided]
    if not crossings:
        return Crossover(None, lower[0], lower[-1], 0, first, last)
    (x0, r0), (x1, r1) = crossings[-1]
    share = math.log(r0) / (math.log(r0) - math.log(r1))
    at = math.exp(math.log(x0) + share * (math.log(x1) - math.log(x0)))
    after = "b" if r1 > 1 else "a"
    return Crossover(at, "a" if after == "b" else "b", after, len(crossings), first, last)


def geometric_mean(values: Sequence[float]) -> float:
    """NaN for no values."""
    return float(np.exp(np.mean(np.log(values)))) if len(values) else math.nan


def local_exponents(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float, float]]:
    """(x_low, x_high, slope in log-log) between neighbours."""
    points = sorted((a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b) and b > 0)
    return [(x0, x1, math.log(y1 / y0) / math.log(x1 / x0)) for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False)]
