"""Products of whole matrices without torch (tests/csrc/cpu_matrix.cpp): a short form of `make sanitize`, and planted faults."""

from __future__ import annotations

import pytest

from . import planted
from .planted import LEFT, WRONG, Fault, cpu, program


@pytest.mark.parametrize("level", cpu.MULTIPLIED)
def test_odd_sizes(level):
    assert not cpu.failure(program(level, cpu.MATRIX, *cpu.SANITIZERS["plain"]), "300")


KERNELS = "matrix_product_avx512_bf16.cpp"


def wrong(name: str, old: str, new: str, seen: str = WRONG, file: str = KERNELS) -> Fault:
    return Fault(name, file, old, new, seen, level="avx512_bf16", cases=cpu.MATRIX)


FAULTS = [
    wrong("whole vectors written at the end of a row", "sum[r][v], columns - v * W", "sum[r][v], W", f"{WRONG}|{LEFT}"),
    wrong("whole vectors read at the end of a row", "d, min(kSquare, count - d)", "d, kSquare", f"{WRONG}|{LEFT}"),
    wrong("the first vector's bias for both", "load(bias + v * W,", "load(bias,", WRONG),
    wrong("the bias of a matrix's first columns", "(own.right->bias) + own.column + column", "(own.right->bias)"),
    wrong("negative sums stay", "relu ? Math<float>::relu(sum[r][v] + added) : sum[r][v] + added", "sum[r][v] + added"),
    wrong("negative sums stay where there is no bias", "if (bias || relu)", "if (bias)"),
    wrong("another panel of the packed columns", "= own.panel + column / kPanel, begin", "= column / kPanel, begin"),
    wrong("another block of the packed rows", "const Block block{left + b * block_step()", "const Block block{left"),
    wrong("rows of another block written", "(first_row + begin) * stride", "begin * stride", f"{WRONG}|{LEFT}"),
    wrong("a segment's panels counted from its matrix's first", "columns, panel + skipped", "columns, panel", f"{WRONG}|{LEFT}",
          "matrix_product.h"),
    wrong("the last depth left out where it has no partner", "lines_of(count), sums +", "count / kDepths, sums +"),
    wrong("sums of the runs before left out", "sum[r][v] += sums[r * 2 + v];", "(void)sums;"),
    wrong("sums of runs kept for one block", "(panel * row_blocks + b) * kSums", "panel * row_blocks * kSums"),
    wrong("the depths of a pair exchanged", "wide(first) | wide(second) << 16", "wide(second) | wide(first) << 16"),
    wrong("a last depth taken twice", "depths > 1 ? mask : 0", "mask"),
    wrong("sums of rows of the last run alone", "of_rows[b] += ", "of_rows[b] = "),
    wrong("sums of a block's rows in the first", "+ (first_row + begin_of(b)) * own.right->stride", "", f"{WRONG}|{LEFT}"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_faults_are_seen(fault, tmp_path):
    planted.expect(fault, tmp_path)
