"""Attention of one query against a cache through pytest-benchmark: torch and fastseq, each checked before it is timed."""

from __future__ import annotations

import pytest

from fastseq.benchmarks.ops.timer import TIMER
from fastseq.benchmarks.providers.attention import ATTENTION_PROVIDERS, OWN, SDPA

pytest.importorskip("pytest_benchmark")


@pytest.mark.bench
@pytest.mark.benchmark(timer=TIMER)
@pytest.mark.parametrize("library", [SDPA, OWN])
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("B", [1, 8])
def test_attention_decode(measure_attention, device, B, group, library):
    S, W = (8192, 2048) if device.startswith("cuda") else (1024, 512)
    more = {"keys": S, "kv_heads": W // 64 // group}
    measure_attention(f"decode B={B} GQA={group}", ATTENTION_PROVIDERS[library], "decode", "inference", T=1, B=B, W=W, **more)
