"""The machine while a case is timed: how much of it other programs used, its clocks, and whether it was throttled."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import psutil

from . import gpu_clocks
from .environment import Others
from .gpu_clocks import Gpu, Reading

OTHERS = 0.10  # of all CPU time: a case during which other programs used more is contended
THROTTLED = 0.10  # of the readings of a GPU: a case in which more of them name a reason to throttle is throttled
SHORTEST = 0.25  # seconds of a case of which a share of CPU time can be told: the system counts it in steps of 10 ms
DEAREST = 0.01  # seconds; a look at the CPU's clock that takes longer is the last one


@dataclass(frozen=True)
class Contention:
    """None: not known, or nothing of the kind. Clocks in MHz."""

    others: float | None = None  # share of all CPU time that other programs used
    cpu_clock: float | None = None  # mean of before and after
    clock: float | None = None  # of the GPU, median over readings
    highest: float | None = None  # seen on the GPU in this run
    allowed: float | None = None  # at most, by the GPU's driver
    throttled: float | None = None  # share of the readings with a reason to throttle
    reasons: str | None = None  # these reasons
    redone: str | None = None  # why the case was timed once more
    contended: str | None = None  # why its figures are doubtful

    @property
    def trouble(self) -> str | None:
        """What is beyond its bound, in words."""
        found = []
        if (self.others or 0.0) > OTHERS:
            found.append(f"other programs used {self.others:.0%} of the CPU")
        if (self.throttled or 0.0) > THROTTLED:
            top = self.allowed or self.highest
            at = f", at {self.clock:.0f} of {top:.0f} MHz" if self.clock and top else ""
            found.append(f"the GPU was throttled ({self.reasons}) in {self.throttled:.0%} of the readings{at}")
        return " and ".join(found) or None

    @property
    def severity(self) -> float:
        """In units of the bounds."""
        return max((self.others or 0.0) / OTHERS, (self.throttled or 0.0) / THROTTLED)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Watch:
    """`begin` before and `end` after something is timed. Both together take about a millisecond, outside of the timing.

    `others`, `cpu_clock`, `gpu` and `now` can be replaced, for tests.
    """

    def __init__(
        self,
        device: str,
        *,
        others: Callable[[], Others] = Others,
        cpu_clock: Callable[[], float | None] | None = None,
        gpu: Gpu | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.gpu = gpu or (gpu_clocks.find(device) if device.startswith("cuda") else None)
        self.now, self._others, self._cpu_clock = now, others, cpu_clock or _cpu_clock
        self._highest: float | None = None
        self._dear = False

    def begin(self) -> None:
        self._before = self._megahertz()
        if self.gpu:
            self.gpu.begin()
        self._since, self._start = self._others(), self.now()

    def end(self) -> Contention:
        seconds = self.now() - self._start
        others = round(self._since.share(), 3) if seconds >= SHORTEST else None
        clocks = [clock for clock in (self._before, self._megahertz()) if clock]
        cpu_clock = round(sum(clocks) / len(clocks)) if clocks else None
        return Contention(others, cpu_clock, **self._of_gpu(self.gpu.end() if self.gpu else []))

    def close(self) -> None:
        if self.gpu:
            self.gpu.close()

    def _of_gpu(self, readings: list[Reading]) -> dict[str, Any]:
        clocks = [r.clock for r in readings if r.clock is not None]
        told = [r for r in readings if r.mask is not None]
        slow = [r for r in told if r.reasons]
        self._highest = max([*clocks, self._highest or 0.0]) or None
        reasons = dict.fromkeys(reason for r in slow for reason in r.reasons)
        return {
            "clock": median(clocks) if clocks else None,
            "highest": self._highest if clocks else None,
            "allowed": next((r.allowed for r in readings if r.allowed is not None), None),
            "throttled": round(len(slow) / len(told), 3) if told else None,
            "reasons": ", ".join(reasons) or None,
        }

    def _megahertz(self) -> float | None:
        if self._dear:
            return None
        start = self.now()
        found = self._cpu_clock()
        self._dear = self.now() - start > DEAREST  # with many processors, each of which is asked for its own
        return found


def _cpu_clock() -> float | None:
    try:
        found = psutil.cpu_freq() if hasattr(psutil, "cpu_freq") else None
    except (NotImplementedError, OSError):
        return None
    return found.current if found and found.current else None
