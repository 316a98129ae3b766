"""Timing: the round-robin of all comparisons, and medians and quantiles of its rounds.

Providers are measured in turn, round after round, each round starting with another one, so that a drifting
clock frequency or a busy neighbor hits all of them alike. After a sample that was much longer, a provider runs
once untimed: what the longer one left in the caches is not its own cost, and not always the same provider's. The
figure is the median over rounds, with its 20 % and 80 % quantiles.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np

from ..workloads.clocks import Clock, Run

LONGER = 3.0  # times a provider's own sample, and it warms up after the one before it


@dataclass(frozen=True)
class Effort:
    """How long to measure: until the medians are known to `precision`, or `seconds` are spent."""

    seconds: float = 2.0
    min_rounds: int = 5
    max_rounds: int = 100
    sample_seconds: float = 1e-3  # a sample repeats the call until it lasts this long
    precision: float = 0.01
    patience: float = 5.0  # times `seconds`, after which it ends even before `min_rounds`


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    low: float  # 20 % quantile over rounds
    high: float  # 80 %
    fastest: float
    rounds: int
    calls: int  # per round

    @classmethod
    def of(cls, samples: list[float], calls: int) -> Timing:
        low, median, high = np.quantile(samples, (0.2, 0.5, 0.8)).tolist()
        return cls(median, low, high, min(samples), len(samples), calls)

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Ratio:
    """How many times faster than the baseline: ratio of medians, with quantiles of the ratios per round."""

    baseline: str
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, baseline: str, base: list[float], samples: list[float]) -> Ratio:
        paired = np.asarray(base) / np.asarray(samples)
        low, high = np.quantile(paired, (0.2, 0.8)).tolist()
        return cls(baseline, float(np.median(base) / np.median(samples)), low, high)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Samples:
    seconds: list[float]
    calls: int

    def timing(self) -> Timing:
        return Timing.of(self.seconds, self.calls)


def interleave(runs: Mapping[str, Run], clock: Clock, effort: Effort) -> dict[str, Samples]:
    """Samples of every run, taken in turn. The budget counts the time measured, not the time around it."""
    if not runs:
        return {}
    names = list(runs)
    prepared = {name: clock.prepare(run) for name, run in runs.items()}
    calls = {}
    for name in names:
        once = clock.measure(prepared[name], 1)  # also the warm-up
        if once < 20 * effort.sample_seconds:
            once = clock.measure(prepared[name], 1)
        calls[name] = max(1, min(1000, math.ceil(effort.sample_seconds / max(once, 1e-9))))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    spent = before = 0.0
    with no_garbage_collection():
        for turn in range(effort.max_rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                if seconds[name] and before > LONGER * seconds[name][-1] * calls[name]:
                    clock.measure(prepared[name], 1)
                sample = clock.measure(prepared[name], calls[name])
                seconds[name].append(sample)
                before = sample * calls[name]
                spent += before
            if turn + 1 < effort.min_rounds and spent < effort.patience * effort.seconds:
                continue
            if spent >= effort.seconds or all(_uncertainty(s) < effort.precision for s in seconds.values()):
                break
    return {name: Samples(seconds[name], calls[name]) for name in names}


def _uncertainty(samples: list[float]) -> float:
    """Half width of the 95 % interval of the median, relative to it (McGill's notch: 1.57 IQR / sqrt(n))."""
    if len(samples) < 5:
        return math.inf
    q1, median, q3 = np.quantile(samples, (0.25, 0.5, 0.75))
    return float(1.57 * (q3 - q1) / math.sqrt(len(samples)) / median) if median > 0 else 0.0


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """The cycle collector does not run inside the block, nor release what the block did not make."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
