"""Scans through pytest-benchmark: fastseq, the loop over time and torch's associative_scan, each checked before it is timed; and
layers on them, with torch.nn.GRU."""

from __future__ import annotations

import pytest
import torch

from fastseq.benchmarks.ops.timer import TIMER
from fastseq.benchmarks.providers.base import PROVIDERS
from fastseq.benchmarks.providers.linear import LINEAR_PROVIDERS
from fastseq.benchmarks.providers.scan import SCAN_PROVIDERS
from fastseq.benchmarks.workloads.base import Workload
from fastseq.benchmarks.workloads.linear import LinearWorkload
from fastseq.benchmarks.workloads.scan import ScanWorkload

pytest.importorskip("pytest_benchmark")


@pytest.mark.bench
@pytest.mark.benchmark(timer=TIMER)
@pytest.mark.parametrize("library", SCAN_PROVIDERS)
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize(("T", "C"), [(1024, 256), (8192, 256)])
def test_scan(measure, device, T, C, mode, library):
    w = ScanWorkload("scan", T, 1, C, C, mode, threads=torch.get_num_threads(), device=device)
    measure(SCAN_PROVIDERS[library], w, f"scan {mode} T={T} C={C}")


@pytest.mark.bench
@pytest.mark.benchmark(timer=TIMER)
@pytest.mark.parametrize("layer", [*LINEAR_PROVIDERS, "torch.nn.GRU"])
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_layer(measure, device, mode, layer, T=1024, H=256):
    provider = LINEAR_PROVIDERS.get(layer) or PROVIDERS[layer]
    kind = LinearWorkload if layer in LINEAR_PROVIDERS else Workload
    w = kind(provider.function, T, 1, H, H, mode, threads=torch.get_num_threads(), device=device)
    measure(provider, w, f"layer {mode} T={T} H={H}")
