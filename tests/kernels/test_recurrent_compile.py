"""The compiler's gate: what Triton makes of every recurrent kernel for four architectures, without a GPU.

The table is written by `python tests/kernels/recurrent_launches.py --write`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.triton_gate import GateTests, kernel_of, loaded, point_of

pytest.importorskip("triton")
launches = loaded(Path(__file__).with_name("recurrent_launches.py"))
GATE = launches.GATE
WORDS, MOST, _ = launches.REASONS[0]
FORM, CELL, DTYPE, HIDDEN = WORDS.split()


class TestGate(GateTests):
    GATE = GATE
    # One of each kernel in each form, and each architecture, dtype and cell of torch.nn once.
    NORMAL = (
        "forward whole lstm plain bfloat16 H=128 B=64 sm_90",
        "backward whole gru plain float16 H=128 B=64 sm_80",
        "forward streamed lstm plain bfloat16 H=256 B=64 sm_100",
        "backward streamed lstm plain bfloat16 H=256 B=64 sm_90",
        "forward single gru plain tf32 H=1024 B=16 sm_120",
        "forward single rnn_tanh plain float32 H=1024 B=1 sm_90",
        "forward stepwise lstm projection-resets bfloat16 H=256 B=64 sm_90",
        "backward stepwise lstm projection-resets bfloat16 H=256 B=64 sm_90",
    )
    ROW = {
        "key": "forward whole lstm plain bfloat16 H=128 B=64 sm_90: forward",
        "registers": 174,
        "spilled": 0,
        "shared": 139264,
        "warps": 8,
        "stages": 1,
        "products": "mma.sync",
        "resident": 1,
    }
    SPILLING = ROW | {"key": f"forward {FORM} {CELL} plain {DTYPE} {HIDDEN} B=64 sm_90: forward", "spilled": MOST // 2}

    @pytest.mark.slow
    @pytest.mark.timeout(3600)
    @pytest.mark.parametrize("call", launches.CALLS)
    @pytest.mark.parametrize("capability", launches.CAPABILITIES)
    def test_every_kernel_compiles_as_the_table_says(self, call, capability):
        self.check(p.key for p in GATE.points() if (p.call, p.capability) == (call, capability))

    def test_every_form_is_in_the_table_and_every_kernel_in_the_normal_run(self):
        from fastseq.kernels.recurrent import configs

        def kernels(keys):
            return {(point_of(key).split()[1], kernel_of(key)) for key in keys}

        table = GATE.read()["kernels"]
        assert {form for form, _ in kernels(table)} == set(configs.FORMS)
        assert kernels(table) == kernels(key for key in table if point_of(key) in self.NORMAL)

    @pytest.mark.parametrize(
        ("change", "fault"),
        [
            ({"products": ""}, "multiplies by no matrix instruction, 16 rows take mma.sync"),
            ({"products": "wgmma.mma_async"}, "multiplies by wgmma.mma_async, 16 rows take mma.sync"),
            ({"key": ROW["key"].replace("bfloat16", "float32")}, "multiplies by mma.sync, where nothing is to"),
            ({"key": ROW["key"].replace("whole", "stepwise")}, "multiplies by mma.sync, where nothing is to"),
        ],
    )
    def test_wrong_products_are_seen(self, change, fault):
        assert GATE.faults(self.ROW | change, None) == [fault]

    def test_a_reason_excuses_no_more_than_it_says(self):
        assert GATE.faults(self.SPILLING | {"spilled": MOST}, None) == []
        found = GATE.faults(self.SPILLING | {"spilled": MOST + 4}, None)
        assert found == [f"spills {MOST + 4} bytes of each thread into local memory"]

    def test_what_has_no_reason_may_not_spill(self):
        assert GATE.faults(self.ROW | {"spilled": 8}, None) == ["spills 8 bytes of each thread into local memory"]

    def test_every_reason_excuses_a_kernel(self):
        spilling = [(set(point_of(key).split()), row["spilled"]) for key, row in GATE.read()["kernels"].items() if row["spilled"]]
        for words, most, _ in launches.REASONS:
            found = [spilled for those, spilled in spilling if set(words.split()) <= those]
            assert found and max(found) <= most, words
