"""How the time of a call is told: by the host's clock or by a GPU's, behind one interface."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

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
