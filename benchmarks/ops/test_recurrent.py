"""The recurrent op through pytest-benchmark: torch.nn and fastseq, each checked before it is timed."""

from __future__ import annotations

import pytest
import torch

from fastseq.benchmarks import floors, gate, memory
from fastseq.benchmarks.providers import PROVIDERS
from fastseq.benchmarks.timing import BenchmarkTimer, clock_for
from fastseq.benchmarks.workloads import MODES, Call, Workload

pytest.importorskip("pytest_benchmark")

TIMER = BenchmarkTimer()  # wall clock on the CPU, CUDA events on a GPU; the clock is set by the first test
ROUNDS, WARMUP_ROUNDS = 15, 2
SHAPES = [(1, 128), (8, 256), (32, 256)]  # B, H


@pytest.fixture(scope="session")
def peaks(device: str) -> floors.Peaks:
    return floors.measure(device, torch.get_num_threads(), "float32", quick=True)


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
    check = gate.check(lambda shape: (provider.build(shape), provider.layout), w)
    assert check.ok, check.reason

    call = Call(provider.build(w), gate.problem(w), provider.layout)
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
        floor = floors.floor_of(w, request.getfixturevalue("peaks"))
        median = benchmark.stats.stats.median
        benchmark.extra_info.update(
            floor_seconds=floor.seconds,
            bound_by=floor.bound,
            of_floor=floor.seconds / median,
            tokens_per_second=w.tokens / median,
        )
