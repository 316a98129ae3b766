"""The compiler's gate: what Triton makes of every scan kernel for four architectures, without a GPU.

The table is written by `python tests/kernels/scan_launches.py --write`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.triton_gate import GateTests, kernel_of, loaded, point_of

pytest.importorskip("triton")
launches = loaded(Path(__file__).with_name("scan_launches.py"))
GATE = launches.GATE


class TestGate(GateTests):
    GATE = GATE
    # Each kernel, kind, cut, dtype and architecture once.
    NORMAL = (
        "forward real plain bfloat16 whole sm_80",
        "backward real plain float16 chunks sm_90",
        "forward complex plain float32 chunks sm_100",
        "backward blocks plain float32 whole sm_120",
    )
    ROW = {
        "key": "forward real plain float32 whole sm_90: forward",
        "registers": 68,
        "spilled": 0,
        "shared": 0,
        "warps": 2,
        "stages": 1,
        "products": "",
        "resident": 14,
    }

    @pytest.mark.slow
    @pytest.mark.timeout(3600)
    @pytest.mark.parametrize("capability", launches.CAPABILITIES)
    def test_every_kernel_compiles_as_the_table_says(self, capability):
        self.check(p.key for p in GATE.points() if p.capability == capability)

    def test_the_normal_run_has_every_kernel(self):
        table = GATE.read()["kernels"]
        assert {kernel_of(key) for key in table} == {kernel_of(key) for key in table if point_of(key) in self.NORMAL}

    def test_a_fault_is_seen(self):
        for change, fault in (
            ({"failed": "out of resources"}, "does not compile: out of resources"),
            ({"registers": 256}, "256 registers, 255 are there"),
            ({"spilled": 4}, "spills 4 bytes of each thread into local memory"),
            ({"shared": 256}, "takes 256 bytes of shared memory, where nothing is shared"),
            ({"products": "mma.sync"}, "multiplies by mma.sync, where nothing is to"),
            ({"resident": 13}, "13 blocks on a multiprocessor, were 14"),
        ):
            assert fault in GATE.faults(self.ROW | change, self.ROW)

    def test_what_costs_nothing_is_no_fault(self):
        for change in ({}, {"registers": 255}):
            assert not GATE.faults(self.ROW | change, self.ROW)

    def test_what_may_spill_may_spill_a_quarter_more(self):
        assert all(row["spilled"] == 0 for row in GATE.read()["kernels"].values())  # nothing may
