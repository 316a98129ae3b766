"""Attention's CPU kernels without torch (tests/csrc/cpu_attention.cpp): a short form of `make sanitize`, and planted faults."""

from __future__ import annotations

import pytest

from . import planted
from .planted import LEFT, WRONG, Fault, cpu, program


@pytest.mark.parametrize("level", ["avx2", "avx512_bf16", "amx"])
def test_odd_sizes(level):
    if level == "avx2" and "avx2" not in cpu.levels():
        level = "default"
    assert not cpu.failure(program(level, cpu.attention_cases(level), *cpu.SANITIZERS["plain"]), "70")


KERNEL, FEW, BY_AMX, BY_PAIRS = (f"attention_{part}.inl" for part in ("kernel", "few", "products_amx", "products_pairs"))
ALL, TILES = ("X(float)", "X(bfloat16)"), ("X(bfloat16)",)
OF_QUERY = "a_.q.offset(part_.batch, row.head,"
FAULTS = [
    Fault("the gradient of an average whole for each head", KERNEL, "A(g.dweights_factor)", "A(1)", WRONG, cases=("X(float)",)),
    Fault("delta without the weights' own gradients", KERNEL, "delta[v] += sum[v] / total,", "", WRONG, cases=("X(float)",)),
    Fault(
        "another head of the group", FEW, OF_QUERY, OF_QUERY.replace("row.head", "(row.head ^ (a_.heads > 1))"), WRONG, cases=ALL
    ),
    Fault(
        "another page",
        FEW,
        "max(0, min(table[page], a_.pages - 1))",
        "max(0, min(int64_t(page), a_.pages - 1))",
        WRONG,
        cases=ALL,
    ),
    Fault("keys behind the end have weights", FEW, "|| j + at + W / L > group.end", "", WRONG, cases=ALL),
    Fault("sums of a part of the keys lost", FEW, "+ load(from + at + f) * share[i]", "", WRONG, cases=ALL),
    Fault(
        "features read beyond the end",
        FEW,
        "(uint32_t(1) << n) - 1, p) : _mm512",
        "~0u, p) : _mm512",
        LEFT,
        level="amx",
        cases=TILES,
    ),
    Fault(
        "pages taken for even rows",
        FEW,
        "!a_.block_table || j % a_.page_size + kTile <=",
        "0 * j <=",
        f"{WRONG}|{LEFT}",
        level="amx",
        cases=TILES,
    ),
    Fault("stale weights behind the end", FEW, "at % kDepth; at += 2)", "at % 2; at += 2)", WRONG, level="amx", cases=TILES),
    Fault(
        "one of the six products of parts left out",
        BY_AMX,
        "load_left<M>(left + kTileBytes, a), multiply_loaded<M, N>();",
        "load_left<M>(left + kTileBytes, a);",
        WRONG,
        level="amx",
        cases=("X(float)",),
    ),
    Fault(
        "vectors take the left-hand tile for one of eight rows",
        BY_PAIRS,
        "+ m % kTileRows * a.row",
        "",
        WRONG,
        level="avx512_bf16",
        cases=TILES,
    ),
    Fault(
        "pairs of a group of rows beside one another",
        FEW,
        "P = tiled_ ? 1 : W / group.lanes;",
        "P = 1;",
        WRONG,
        level="avx512_bf16",
        cases=TILES,
    ),
    Fault(
        "stale values behind the end",
        FEW,
        "values[i] = zeros_;",
        "values[i] = zeros_ + 1;",
        f"{WRONG}|{LEFT}",
        level="amx",
        cases=TILES,
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_faults_are_seen(fault, tmp_path):
    planted.expect(fault, tmp_path)
