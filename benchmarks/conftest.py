"""`pytest benchmarks/`: operator benchmarks. `--benchmark-disable` runs each of them once, as a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastseq.benchmarks.cli import device_of
from fastseq.benchmarks.measure import environment, memory
from fastseq.benchmarks.measure.check import check_provider, problem_of
from fastseq.benchmarks.ops.timer import BenchmarkTimer
from fastseq.benchmarks.providers.attention import ATTENTION_PROVIDERS
from fastseq.benchmarks.roofline.model import roofline_of
from fastseq.benchmarks.roofline.peaks import Peaks, measure_peaks
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


@pytest.fixture(scope="session")
def attention_dtype(device: str) -> str:
    return "bfloat16" if device.startswith("cuda") else "float32"


@pytest.fixture(scope="session")
def attention_peaks(device: str, attention_dtype: str) -> Peaks:
    return measure_peaks(device, torch.get_num_threads(), attention_dtype, quick=True)


@pytest.fixture
def measure_attention(benchmark: Any, request: pytest.FixtureRequest, device: str, attention_dtype: str) -> Callable[..., None]:
    """Checks a provider on a workload of heads of 64 features, then times it; what is known of the point goes into extra_info."""

    def measure(
        timer: BenchmarkTimer, group: str, library: str, function: str, mode: str, *, T: int, B: int, W: int, **more: Any
    ) -> None:
        provider = ATTENTION_PROVIDERS[library]
        common = {"threads": torch.get_num_threads(), "dtype": attention_dtype, "device": device}
        w = AttentionWorkload(function, T, B, W, W, mode, heads=W // 64, **common, **more)
        missing = provider.unavailable(w)
        if missing:
            pytest.skip(missing)
        check = check_provider(lambda shape: (provider.build(shape), provider.layout), w)
        assert check.ok, check.reason

        call = w.call(provider.build(w), problem_of(w))
        timer.clock = timer.clock or clock_for(device)
        benchmark.group = group
        shape = f"T={w.T} S={w.S} B={w.B} H={w.heads} G={w.G} E={w.E}"
        benchmark.extra_info.update(common, shape=shape, clock=timer.clock.name, max_error=check.error)
        with call.context():
            run = call.run
            if not benchmark.disabled:
                seen = memory.observe(run, device)
                benchmark.extra_info.update(peak_bytes=seen.peak_bytes, chose=provider.chose(call) + seen.chose)
            benchmark.pedantic(timer.target(run), rounds=ROUNDS, warmup_rounds=WARMUP_ROUNDS)
        if not benchmark.disabled:
            roofline = roofline_of(w, request.getfixturevalue("attention_peaks"))
            median = benchmark.stats.stats.median
            benchmark.extra_info.update(
                roofline_seconds=roofline.seconds,
                bound_by=roofline.bound,
                of_roofline=roofline.seconds / median,
                flops_per_second=w.flops / median,
                bytes_per_second=w.bytes / median,
            )

    return measure
