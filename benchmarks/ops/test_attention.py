"""The attention op through pytest-benchmark: torch and fastseq on every case, each checked before it is timed."""

from __future__ import annotations

from typing import Any

import pytest

from fastseq.benchmarks.ops.timer import TIMER
from fastseq.benchmarks.providers.attention import ATTENTION_PROVIDERS, OWN, SDPA
from fastseq.benchmarks.workloads.base import ALL_MODES

pytest.importorskip("pytest_benchmark")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("dense", {}),
    "causal": ("dense", {"causal": True}),
    "grouped": ("dense", {"causal": True, "kv_heads": 1}),
    "window": ("window", {"causal": True, "window": 64}),
    "blocks": ("blocks", {"causal": True, "block": 32}),
    "bias": ("bias", {}),
    "t5": ("t5", {}),
    "transformer-xl": ("transformer-xl", {"causal": True}),
}


@pytest.mark.bench
@pytest.mark.benchmark(timer=TIMER)
@pytest.mark.parametrize("library", [SDPA, OWN])
@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("case", CASES)
def test_attention(measure_attention, device, case, mode, library):
    function, more = CASES[case]
    T, B, W = (2048, 8, 2048) if device.startswith("cuda") else (256, 2, 128)
    measure_attention(f"{case} {ALL_MODES[mode]}", ATTENTION_PROVIDERS[library], function, mode, T=T, B=B, W=W, **more)
