"""A clock of the suites as pytest-benchmark's timer."""

from __future__ import annotations

from ..workloads.clocks import Clock, Run


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


TIMER = BenchmarkTimer()  # of every test here: wall clock on the CPU, CUDA events on a GPU; the first test sets its clock
