"""The compiler's gate: what Triton makes of every attention kernel for four architectures, without a GPU.

The table is written by `python tests/kernels/attention_launches.py --write`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.triton_gate import GateTests, kernel_of, loaded, point_of

pytest.importorskip("triton")
launches = loaded(Path(__file__).with_name("attention_launches.py"))
GATE = launches.GATE


class TestGate(GateTests):
    GATE = GATE
    # One of each kernel, and each architecture, dtype and odd head dim once.
    NORMAL = (
        "forward causal bfloat16 E=128 sm_90",
        "forward causal float16 E=96 sm_80",
        "backward causal float16 E=64 sm_100",
        "backward bias bfloat16 E=128 sm_90",
        "weights full bfloat16 E=64 sm_120",
        "decode full bfloat16 E=128 sm_90",
    )
    ROW = {
        "key": "forward full bfloat16 E=128 sm_90: forward",
        "registers": 168,
        "spilled": 0,
        "shared": 100000,
        "warps": 8,
        "stages": 2,
        "products": "wgmma.mma_async",
        "resident": 1,
    }
    SPILLING = ROW | {"key": "forward everything bfloat16 E=128 sm_90: forward", "spilled": 400}

    @pytest.mark.slow
    @pytest.mark.timeout(3600)
    @pytest.mark.parametrize("call", launches.CALLS)
    @pytest.mark.parametrize("capability", launches.CAPABILITIES)
    def test_every_kernel_compiles_as_the_table_says(self, call, capability):
        self.check(p.key for p in GATE.points() if (p.call, p.capability) == (call, capability))

    def test_the_normal_run_has_every_kernel(self):
        table = GATE.read()["kernels"]
        seen = {kernel_of(key) for key in table if point_of(key) in self.NORMAL}
        assert {kernel_of(key) for key in table} - seen <= {"delta_of_weights", "bwd_drelbias"}  # in the slow run

    @pytest.mark.parametrize(
        ("products", "fault"),
        [("", "has no matrix instruction"), ("mma.sync", "multiplies by mma.sync, sm_90 has wgmma.mma_async")],
    )
    def test_wrong_products_are_seen(self, products, fault):
        assert GATE.faults(self.ROW | {"products": products}, None) == [fault]

    def test_two_words_may_spill_and_no_more(self):
        assert GATE.faults(self.ROW | {"spilled": 8}, None) == []
        assert GATE.faults(self.ROW | {"spilled": 16}, None) == ["spills 16 bytes of each thread into local memory"]


def test_resident_blocks_by_hand():
    from fastseq.benchmarks.gpu.triton_compile import resident_blocks

    assert resident_blocks(128, 0, 4, 90) == 4  # 65536 registers over 128 x 128
    assert resident_blocks(129, 0, 4, 90) == 3  # given in eights: 136
    assert resident_blocks(32, 100 << 10, 4, 90) == 2  # 228 KiB over 101
    assert resident_blocks(32, 100 << 10, 4, 120) == 0  # 99 KiB for a block
    assert resident_blocks(16, 0, 16, 120) == 3  # 48 warps
