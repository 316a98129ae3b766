"""The recurrent op through pytest-benchmark: torch.nn and fastseq, each checked before it is timed."""

from __future__ import annotations

import pytest
import torch

from fastseq.benchmarks.ops.timer import TIMER
from fastseq.benchmarks.providers.base import PROVIDERS
from fastseq.benchmarks.workloads.base import MODES, Workload

pytest.importorskip("pytest_benchmark")

SHAPES = [(1, 128), (8, 256), (32, 256)]  # B, H


@pytest.mark.bench
@pytest.mark.benchmark(timer=TIMER)
@pytest.mark.parametrize("library", ["torch.nn", "fastseq"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(("B", "H"), SHAPES, ids=lambda n: str(n))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_recurrent(measure, device, cell, mode, B, H, packed, library):
    provider = PROVIDERS[f"{library}.{cell}"]
    w = Workload(provider.function, 128, B, H, H, mode, packed=packed, threads=torch.get_num_threads(), device=device)
    measure(provider, w, f"{cell} {MODES[mode]} B={B} H={H} {'packed' if packed else 'padded'}")
