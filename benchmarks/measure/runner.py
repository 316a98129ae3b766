"""From a case to rows: build every participant, check it, observe memory and operators, time all in turn."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter
from typing import Any

import psutil
import torch

from ..providers.base import Provider
from ..providers.registry import EVERY_PROVIDER
from ..roofline.model import roofline_of
from ..roofline.peaks import Peaks, measure_peaks
from ..workloads.base import Workload
from ..workloads.clocks import Clock, GraphClock, IssueClock, clock_for
from . import memory
from .case import Case
from .check import check_provider, problem_of
from .contention import Contention, Watch
from .results import Row
from .timing import Ratio, Samples, interleave

IN_VAIN = 3  # cases one after another that were contended both times: from then on a contended case is not timed once more


class Runner:
    """Runs cases on one device. `providers`, `clock` and `watch` can be replaced, for tests and for other programs."""

    def __init__(
        self,
        device: str,
        *,
        providers: dict[str, Provider] | None = None,
        clock: Clock | None = None,
        watch: Watch | None = None,
        quick: bool = False,
    ) -> None:
        self.device, self.quick = device, quick
        self.providers = EVERY_PROVIDER if providers is None else providers
        self.clock = clock or clock_for(device)
        self.watch = watch or Watch(device)
        self.peaks: dict[tuple[int, str], Peaks] = {}
        self._last_peak: dict[tuple[str, ...], tuple[int, int]] = {}
        self._in_vain = 0

    def close(self) -> None:
        """Ends what watches the device."""
        self.watch.close()

    def peaks_for(self, w: Workload) -> Peaks:
        """Measured on first use under the workload's settings, then kept."""
        if (w.threads, w.precision) not in self.peaks:
            known = next((peaks for (threads, _), peaks in self.peaks.items() if threads == w.threads), None)
            peaks = measure_peaks(self.device, w.threads, w.dtype, quick=self.quick, known=known)
            self.peaks[w.threads, w.precision] = replace(peaks, dtype=w.precision)
        return self.peaks[w.threads, w.precision]

    def run(self, case: Case, progress: Callable[[str], None] = lambda step: None) -> list[Row]:
        first = case.participants[0].workload
        before = torch.get_num_threads()
        torch.set_num_threads(first.threads)
        try:
            with first.settings():
                return self._run(case, progress)
        finally:
            torch.set_num_threads(before)

    def _run(self, case: Case, progress: Callable[[str], None]) -> list[Row]:
        rows: dict[str, Row] = {}
        calls: dict[str, Any] = {}
        for participant in case.participants:
            name, w = participant.provider, participant.workload
            progress(f"{case.label}: {name}")
            row = rows[name] = Row.of(case.suite, case.group, name, w)
            call = self._prepare(self.providers[name], w, row, check=case.check, timed=case.timed)
            if call is not None:
                calls[name] = call
                if case.timed:
                    row.roofline = roofline_of(w, self.peaks_for(case.participants[0].workload)).as_dict()
        if calls and case.timed:
            progress(f"{case.label}: timing")
            with next(iter(calls.values())).context():
                self._time(case, {name: call.run for name, call in calls.items()}, rows, progress)
        return list(rows.values())

    def _prepare(self, provider: Provider, w: Workload, row: Row, *, check: bool, timed: bool) -> Any:
        """The call ready to be timed, or None with the reason, or what an experiment found, in the row."""
        row.reason = w.missing() or provider.unavailable(w)
        if row.reason:
            row.status = "unavailable"
            return None
        row.reason = self._too_large(provider, w)
        if row.reason:
            row.status = "skipped"
            return None
        first = self._first_call(provider, w) if timed else None  # before the check, which would compile
        if check:
            result = check_provider(lambda shape: (provider.build(shape), provider.layout), w)
            row.check = result.as_dict()
            if not result.ok:
                row.status, row.reason = "wrong", result.reason
                return None
        row.first = first
        call = w.call(provider.build(w), problem_of(w), provider.layout)
        row.parameters = sum(p.numel() for p in call.parameters)
        metric = w.measure(provider)
        if metric is not None:
            row.metric, row.chose = metric.as_dict(), provider.chose(call)
            if not math.isfinite(metric.low + metric.high):
                row.status, row.reason, row.metric = "wrong", f"{metric.name} is not finite", None
            return None
        with call.context():
            seen = memory.observe(call.run, w.device)
            row.chose, row.launches = provider.chose(call) + seen.chose, seen.launches
        row.memory = seen.peak_bytes
        row.kept = memory.kept(call.forward, w.device) if w.mode == "training" else getattr(call, "state_bytes", None)
        self._last_peak[self._series(provider, w)] = (w.T, seen.peak_bytes)
        return call

    def _first_call(self, provider: Provider, w: Workload) -> float | None:
        """Seconds; None if it raises, which the gate reports."""
        problem = problem_of(w)
        try:
            call = w.call(provider.build(w), problem, provider.layout)
            with call.context():
                run, start = call.run, perf_counter()
                run()
                if w.device.startswith("cuda"):
                    torch.cuda.synchronize(w.device)
                return perf_counter() - start
        except Exception:  # noqa: BLE001  whatever a provider raises is its result
            return None

    def _time(
        self, case: Case, runs: dict[str, Callable[[], object]], rows: dict[str, Row], progress: Callable[[str], None]
    ) -> None:
        """Once more if the machine was contended meanwhile; the figures that stay are those of the quieter time."""
        figures, contention = self._watched(case, runs)
        trouble = contention.trouble
        if trouble and self._in_vain < IN_VAIN:
            progress(f"{case.label}: timing once more, {trouble}")
            again, then = self._watched(case, runs)
            self._in_vain = self._in_vain + 1 if then.trouble else 0
            if then.severity < contention.severity:
                figures, contention = again, then
            contention = replace(contention, redone=trouble)
        elif not trouble:
            self._in_vain = 0
        for name, found in figures.items():
            rows[name].contention = replace(contention, contended=contention.trouble).as_dict()
            for column, value in found.items():
                setattr(rows[name], column, value)

    def _watched(self, case: Case, runs: dict[str, Callable[[], object]]) -> tuple[dict[str, dict[str, Any]], Contention]:
        self.watch.begin()
        figures = self._figures(case, runs)
        return figures, self.watch.end()

    def _figures(self, case: Case, runs: dict[str, Callable[[], object]]) -> dict[str, dict[str, Any]]:
        """By provider, what becomes a column of its row."""
        samples = interleave(runs, self.clock, case.effort)
        figures: dict[str, dict[str, Any]] = {name: {"time": sample.timing().as_dict()} for name, sample in samples.items()}
        for name, base in case.baseline:
            if name in samples and base in samples and base != name:
                figures[name]["ratio"] = Ratio.of(base, samples[base].seconds, samples[name].seconds).as_dict()
        if not self.device.startswith("cuda"):
            return figures
        brief = replace(case.effort, seconds=case.effort.seconds / 4)
        for name, sample in interleave(runs, IssueClock(), brief).items():
            figures[name]["host"] = sample.timing().as_dict()
        if case.participants[0].workload.mode == "backward":
            return figures  # its kernels go to the stream of the forward, which no capture of the backward holds
        for (
            name,
            run,
        ) in runs.items():  # one graph alive at a time; a call that cannot be captured has no such figure
            try:
                captured: dict[str, Samples] = interleave({name: run}, GraphClock(device=self.device), brief)
            except RuntimeError:
                torch.cuda.synchronize(self.device)
                continue
            figures[name]["graph"] = captured[name].timing().as_dict()
        return figures

    def _series(self, provider: Provider, w: Workload) -> tuple[str, ...]:
        return (provider.name, w.mode, str(w.B), str(w.H), w.dtype, str(w.options))

    def _too_large(self, provider: Provider, w: Workload) -> str | None:
        """Extrapolates the provider's last peak over T, twice over for the references of the check."""
        T, peak = self._last_peak.get(self._series(provider, w), (w.T, 0))
        needed = 2 * peak * max(1, w.T / T) ** w.growth
        free = _free_memory(self.device)
        if needed <= 0.8 * free:
            return None
        return f"would need up to {needed / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free"


def _free_memory(device: str) -> int:
    """Bytes; in a container also below its own limit."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as current:
            text = limit.read().strip()
            return free if text == "max" else min(free, int(text) - int(current.read()))
    except (OSError, ValueError):
        return free
