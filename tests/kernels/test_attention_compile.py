"""The compiler's gate: what Triton makes of every attention kernel for four architectures, without a GPU.

The table is written by `python tests/kernels/attention_launches.py --write`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("attention_launches.py")
_spec = importlib.util.spec_from_file_location("attention_launches", SCRIPT)
launches = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = launches
_spec.loader.exec_module(launches)

# One of each kernel, and each architecture, dtype and odd head dim once.
NORMAL = (
    "forward causal bfloat16 E=128 sm_90",
    "forward causal float16 E=96 sm_80",
    "backward causal float16 E=64 sm_100",
    "backward bias bfloat16 E=128 sm_90",
    "weights full bfloat16 E=64 sm_120",
    "decode full bfloat16 E=128 sm_90",
)


def compiled(keys):
    """Figures by key, from other processes: this one may run Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--json", "--processes", "2", "--keys", ";".join(keys)]
    done = subprocess.run(command, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["key"].split(":")[0] for row in rows} == set(keys)
    return rows


@pytest.fixture(scope="module")
def table():
    return json.loads(launches.TABLE.read_text())


def judged(rows, table):
    """Every fault by key. Another compiler than the table's is held to the limits, not to the table."""
    import triton

    same = table["triton"] == triton.__version__
    before = {row["key"]: table["kernels"].get(row["key"]) for row in rows}
    missing = {key: ["is not in the table: write it again"] for key, known in before.items() if known is None}
    found = {row["key"]: launches.faults(row, before[row["key"]] if same else None) for row in rows}
    return missing | {key: faults for key, faults in found.items() if faults}


def test_kernels_compile_as_the_table_says(table):
    assert judged(compiled(NORMAL), table) == {}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("call", launches.CALLS)
@pytest.mark.parametrize("capability", launches.CAPABILITIES)
def test_every_kernel_compiles_as_the_table_says(table, call, capability):
    keys = [p.key for p in launches.points() if (p.call, p.capability) == (call, capability)]
    assert judged(compiled(keys), table) == {}


def test_the_table_has_every_point_and_no_fault(table):
    rows = [{"key": key, **row} for key, row in table["kernels"].items()]
    assert {row["key"].split(":")[0] for row in rows} == {p.key for p in launches.points()}
    assert {row["key"]: launches.faults(row, None) for row in rows if launches.faults(row, None)} == {}
    assert all(row.get("reason") for row in rows if row.get("spilled"))


def test_the_normal_run_has_every_kernel(table):
    every = {key.rpartition(" ")[2] for key in table["kernels"]}
    seen = {key.rpartition(" ")[2] for key in table["kernels"] if key.split(":")[0] in NORMAL}
    assert every - seen <= {"delta_of_weights", "distances_backward"}  # in the slow run


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


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"registers": 200, "shared": 120000}, None),
        ({"spilled": 8}, "spills 8 bytes"),
        ({"products": ""}, "has no matrix instruction"),
        ({"products": "mma.sync"}, "matrix instruction mma.sync, was wgmma.mma_async"),
        ({"products": "mma.sync"}, "multiplies by mma.sync, sm_90 has wgmma.mma_async"),
        ({"shared": 240000}, "a block may have 232448"),
        ({"resident": 0}, "0 blocks on a multiprocessor, were 1"),
        ({"registers": 300}, "300 registers"),
        ({"failed": "out of resources"}, "does not compile: out of resources"),
    ],
)
def test_a_fault_is_seen(change, fault):
    found = launches.faults(ROW | change, ROW)
    assert (found == []) if fault is None else any(fault in text for text in found)


def test_two_words_may_spill_and_no_more():
    assert launches.faults(ROW | {"spilled": 8}, None) == []
    assert launches.faults(ROW | {"spilled": 16}, None) == ["spills 16 bytes of each thread into local memory"]


def test_what_may_spill_may_not_spill_ever_more():
    before = ROW | {"key": "forward everything bfloat16 E=128 sm_90: forward", "spilled": 400}
    assert launches.faults(before, before) == []
    assert launches.faults(before | {"spilled": 504}, before) == ["spills 504 bytes of each thread, were 400"]


def test_resident_blocks_by_hand():
    from fastseq.testing.triton_compile import resident_blocks

    assert resident_blocks(128, 0, 4, 90) == 4  # 65536 registers over 128 x 128
    assert resident_blocks(129, 0, 4, 90) == 3  # given in eights: 136
    assert resident_blocks(32, 100 << 10, 4, 90) == 2  # 228 KiB over 101
    assert resident_blocks(32, 100 << 10, 4, 120) == 0  # 99 KiB for a block
    assert resident_blocks(16, 0, 16, 120) == 3  # 48 warps
