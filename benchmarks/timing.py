"""Timing: clocks for the host and for a GPU behind one interface, and the round-robin of all comparisons.

Providers are measured in turn, round after round, each round starting with another one, so that a drifting
clock frequency or a busy neighbour hits all of them alike. The figure is the median over rounds, with its 20
% and 80 % quantiles.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch

Run = Callable[[], object]


class Clock(Protocol):
    """A way to time a call: `prepare` it once (a graph is captured there), `measure` it for each sample."""

    name: str

    def prepare(self, run: Run) -> Run: ...

    def measure(self, run: Run, calls: int) -> float:
        """Seconds per call, over `calls` calls."""
        ...


class HostClock:
    """Wall-clock time of the calling thread, for devices that work synchronously."""

    name = "wall clock"

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now

    def prepare(self, run: Run) -> Run:
        return run

    def measure(self, run: Run, calls: int) -> float:
        start = self.now()
        for _ in range(calls):
            run()
        return (self.now() - start) / calls


class CudaClock:
    """Device time between two events around each call, after a write of `flush_bytes` (cold L2).

    Includes the gaps in which the device waits for launches. `cuda` is torch.cuda, or a stand-in with Event
    and synchronize.
    """

    name = "CUDA events, cold L2"

    def __init__(self, cuda: Any = None, flush_bytes: int | None = None, device: str = "cuda") -> None:
        self.cuda = torch.cuda if cuda is None else cuda
        if flush_bytes is None:
            flush_bytes = max(256 << 20, 2 * self.cuda.get_device_properties(device).L2_cache_size)
        self.flushed = torch.empty(flush_bytes, dtype=torch.int8, device=device) if flush_bytes else None

    def prepare(self, run: Run) -> Run:
        return run

    def measure(self, run: Run, calls: int) -> float:
        events = []
        for _ in range(calls):
            if self.flushed is not None:
                self.flushed.zero_()
            start, end = self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            events.append((start, end))
        self.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / calls / 1e3


class GraphClock(CudaClock):
    """Device time of the call as a CUDA graph: the kernels without the host as a hindrance. Cold L2 too."""

    name = "CUDA graph, cold L2"

    def prepare(self, run: Run) -> Run:
        side = self.cuda.Stream()
        side.wait_stream(self.cuda.current_stream())
        with self.cuda.stream(side):  # warm-up outside the capture, on another stream, as torch asks for
            for _ in range(3):
                run()
        self.cuda.current_stream().wait_stream(side)
        graph = self.cuda.CUDAGraph()
        with self.cuda.graph(graph):
            run()
        return graph.replay


class IssueClock:
    """Host time that a call takes to return on an asynchronous device: what launching costs."""

    name = "host time per call"

    def __init__(self, cuda: Any = None, now: Callable[[], float] = time.perf_counter) -> None:
        self.cuda, self.now = torch.cuda if cuda is None else cuda, now

    def prepare(self, run: Run) -> Run:
        return run

    def measure(self, run: Run, calls: int) -> float:
        self.cuda.synchronize()
        start = self.now()
        for _ in range(calls):
            run()
        taken = self.now() - start
        self.cuda.synchronize()
        return taken / calls


def clock_for(device: str) -> Clock:
    return CudaClock(device=device) if device.startswith("cuda") else HostClock()


class BenchmarkTimer:
    """A pytest-benchmark `timer` on top of any Clock.

    pytest-benchmark reads a timer before and after the target. This one stands still except for what the
    target itself advances it by: `target(run)` measures one call of `run` with the clock. Use it with
    `benchmark.pedantic`; calibration would wait forever for a timer that only its target moves.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock
        self.elapsed = 0.0

    def __call__(self) -> float:
        return self.elapsed

    def target(self, run: Run) -> Run:
        if self.clock is None:
            raise RuntimeError("BenchmarkTimer has no clock yet: set timer.clock = clock_for(device) before the first target")
        clock, run = self.clock, self.clock.prepare(run)

        def measured() -> None:
            self.elapsed += clock.measure(run, 1)

        return measured


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
    spent = 0.0
    with no_garbage_collection():
        for turn in range(effort.max_rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                sample = clock.measure(prepared[name], calls[name])
                seconds[name].append(sample)
                spent += sample * calls[name]
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
