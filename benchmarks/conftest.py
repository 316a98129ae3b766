"""`pytest benchmarks/`: one case at a time under pytest-benchmark, for its own `--benchmark-compare` and its statistics.

The suites (`python -m fastseq bench`) measure in turn, watch the machine and judge; this is the door for a quick look at one
call. `--benchmark-disable` runs each of them once, as a test.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from fastseq.benchmarks.cli import device_of
from fastseq.benchmarks.measure import environment, memory
from fastseq.benchmarks.measure.check import check_provider, problem_of
from fastseq.benchmarks.ops.timer import TIMER
from fastseq.benchmarks.roofline.model import roofline_of
from fastseq.benchmarks.roofline.peaks import measure_peaks
from fastseq.benchmarks.workloads.attention import AttentionWorkload
from fastseq.benchmarks.workloads.clocks import clock_for

ROUNDS, WARMUP_ROUNDS = 15, 2


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["fastseq"] = environment.collect(device_of("auto"))


@pytest.fixture(scope="session")
def device() -> str:
    """The device that `python -m fastseq bench` would use."""
    return device_of("auto")


peaks_of = cache(lambda device, dtype: measure_peaks(device, torch.get_num_threads(), dtype, quick=True))


@pytest.fixture
def measure(benchmark: Any, device: str) -> Callable[..., None]:
    """`measure(provider, workload, group)`: checked, then timed; what is known of the point goes into extra_info."""

    def run(provider: Any, w: Any, group: str) -> None:
        missing = provider.unavailable(w)
        if missing:
            pytest.skip(missing)
        check = check_provider(lambda shape: (provider.build(shape), provider.layout), w)
        assert check.ok, check.reason

        call = w.call(provider.build(w), problem_of(w), provider.layout)
        TIMER.clock = TIMER.clock or clock_for(device)
        benchmark.group = group
        benchmark.extra_info.update(vars(w), clock=TIMER.clock.name, tokens=w.tokens, max_error=check.error)
        with call.context():
            if not benchmark.disabled:
                seen = memory.observe(call.run, device)
                benchmark.extra_info.update(peak_bytes=seen.peak_bytes, chose=provider.chose(call) + seen.chose)
            benchmark.pedantic(TIMER.target(call.run), rounds=ROUNDS, warmup_rounds=WARMUP_ROUNDS)
        if not benchmark.disabled:
            roofline, median = roofline_of(w, peaks_of(device, w.dtype)), benchmark.stats.stats.median
            benchmark.extra_info.update(
                roofline_seconds=roofline.seconds,
                bound_by=roofline.bound,
                of_roofline=roofline.seconds / median,
                tokens_per_second=w.tokens / median,
            )

    return run


@pytest.fixture
def measure_attention(measure: Callable[..., None], device: str) -> Callable[..., None]:
    """The same for attention over heads of 64 features."""

    def run(group: str, provider: Any, function: str, mode: str, *, T: int, B: int, W: int, **more: Any) -> None:
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
        common = {"threads": torch.get_num_threads(), "dtype": dtype, "device": device}
        measure(provider, AttentionWorkload(function, T, B, W, W, mode, heads=W // 64, **common, **more), group)

    return run
