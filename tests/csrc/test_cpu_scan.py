"""Linear recurrences without torch (tests/csrc/cpu_scan.cpp): a short form of `make sanitize`, and planted faults."""

from __future__ import annotations

import pytest

from . import planted
from .planted import LEFT, WRONG, Fault, cpu, program


def test_odd_sizes():
    level = "avx2" if "avx2" in cpu.levels() else "default"
    assert not cpu.failure(program(level, cpu.SCAN, *cpu.SANITIZERS["plain"]), "33")


KERNEL, CELLS = "scan_kernel.inl", "scan_cells.inl"


def wrong(name: str, old: str, new: str, file: str = KERNEL, seen: str = WRONG) -> Fault:
    return Fault(name, file, old, new, seen, cases=cpu.SCAN)


FAULTS = [
    wrong("whole vectors at the end of a row", "if (c < n) at(c, n - c);", "if (c < n) at(c, W);", KERNEL, f"{WRONG}|{LEFT}"),
    wrong("a reset one step late, backwards", "const int64_t behind = s.reverse ? t + 1 : t;", "const int64_t behind = t;"),
    wrong("sums of the last run of steps lost", "if (sums_up) join(row, r);", ""),
    wrong("one gate's logit, the other's slope", "of_addend * z * (i.open * i.shut)", "of_addend * z * (f.open * f.shut)", CELLS),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_faults_are_seen(fault, tmp_path):
    planted.expect(fault, tmp_path)
