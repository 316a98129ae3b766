"""The recurrent op through pytest-benchmark: torch.nn and fastseq, each checked before it is timed."""

from __future__ import annotations

import pytest
import torch

from fastseq.benchmarks.measure import memory
from fastseq.benchmarks.measure.check import check_provider, problem_of
from fastseq.benchmarks.ops.timer import BenchmarkTimer
from fastseq.benchmarks.providers.base import PROVIDERS
from fastseq.benchmarks.roofline.model import roofline_of
from fastseq.benchmarks.roofline.peaks import Peaks, measure_peaks
from fastseq.benchmarks.workloads.base import MODES, Call, Workload
from fastseq.benchmarks.workloads.clocks import clock_for

pytest.importorskip("pytest_benchmark")

TIMER = BenchmarkTimer()  # wall clock on the CPU, CUDA events on a GPU; the clock is set by the first test
ROUNDS, WARMUP_ROUNDS = 15, 2
SHAPES = [(1, 128), (8, 256), (32, 256)]  # B, H


@pytest.fixture(scope="session")
def peaks(device: str) -> Peaks:
    return measure_peaks(device, torch.get_num_threads(), "float32", quick=True)


@pytest.mark.bench
@pytest.mark.benchmark(timer=TIMER)
@pytest.mark.parametrize("library", ["torch.nn", "fastseq"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(("B", "H"), SHAPES, ids=lambda n: str(n))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_recurrent(benchmark, request, device, cell, mode, B, H, packed, library):
    provider = PROVIDERS[f"{library}.{cell}"]
    w = Workload(provider.function, 128, B, H, H, mode, packed=packed, threads=torch.get_num_threads(), device=device)
    missing = provider.unavailable(w)
    if missing:
        pytest.skip(missing)
    check = check_provider(lambda shape: (provider.build(shape), provider.layout), w)
    assert check.ok, check.reason

    call = Call(provider.build(w), problem_of(w), provider.layout)
    TIMER.clock = TIMER.clock or clock_for(device)
    benchmark.group = f"{cell} {MODES[mode]} B={B} H={H} {'packed' if packed else 'padded'}"
    benchmark.extra_info.update(
        shape=f"T={w.T} B={B} I={H} H={H}",
        dtype=w.dtype,
        device=device,
        clock=TIMER.clock.name,
        tokens=w.tokens,
        max_error=check.error,
        threads=w.threads,
    )
    with call.context():
        if not benchmark.disabled:
            seen = memory.observe(call.run, device)
            benchmark.extra_info.update(peak_bytes=seen.peak_bytes, chose=provider.chose(call) + seen.chose)
        benchmark.pedantic(TIMER.target(call.run), rounds=ROUNDS, warmup_rounds=WARMUP_ROUNDS)
    if not benchmark.disabled:
        roofline = roofline_of(w, request.getfixturevalue("peaks"))
        median = benchmark.stats.stats.median
        benchmark.extra_info.update(
            roofline_seconds=roofline.seconds,
            bound_by=roofline.bound,
            of_roofline=roofline.seconds / median,
            tokens_per_second=w.tokens / median,
        )
