"""What lies between the products of a transformer's layer, without torch (tests/csrc/cpu_layer_norm.cpp): a short form of
`make sanitize`, and planted faults.
"""

from __future__ import annotations

import pytest

from . import planted
from .planted import LEFT, WRONG, Fault, cpu, program


@pytest.mark.parametrize("level", ["default", "avx2", "avx512"])
def test_odd_sizes(level):
    assert not cpu.failure(program(level, cpu.LAYER_NORM, *cpu.SANITIZERS["plain"]), "130")


def wrong(name: str, old: str, new: str, seen: str = WRONG, file: str = "layer_norm.inl", **where: str) -> Fault:
    return Fault(name, file, old, new, seen, cases=cpu.LAYER_NORM, **where)


FAULTS = [
    wrong("the mean with the rounding of its sum", "return {first + left,", "return {first,"),
    wrong("squares of what is beyond the features", "i + W <= n; i += W", "i < n; i += W", f"{WRONG}|{LEFT}"),
    wrong("the last features left out", "i + lane < n; ++lane) rest", "i + lane + 1 < n; ++lane) rest"),
    wrong("the sum of bfloat16 normalized before it is rounded", "if (y) s = In::rounded(s);", ""),
    wrong("a whole vector written at the end of a row", "+ r * E + e, s, E - e", "+ r * E + e, s, W", f"{WRONG}|{LEFT}"),
    wrong("factors of another row", "if (dy) fill_factors(n.dropout, r, E", "if (dy) fill_factors(n.dropout, r + 1, E"),
    wrong("random numbers of another group", "group / 4 + part", "group / 8 + part"),
    wrong("half of a seed", "uint32_t(seed >> 32)", "uint32_t(seed)", file="philox.inl"),
    wrong("a zero of a sign taken for dropped", "y = y * factor + A(0);", "y = y * factor;"),
    wrong("what was dropped has a gradient", "if (drops) d = (I)after", "if (!drops) d = (I)after"),
    wrong("gelu's gradient without the slope of its factor", "of_x.below + x * of_x.density", "of_x.below"),
    wrong("the bias of n whole where its gate is shut", "* In::load(gates + u, H - u);", ";"),
    wrong("rows after the first run of them", "begin + kRun < end ? begin + kRun : end", "begin + kRun < end ? begin : end"),
    wrong("the scale of c for its shift", "Own::load(scale + H + u, H - u)", "Own::load(scale + u, H - u)"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_faults_are_seen(fault, tmp_path):
    planted.expect(fault, tmp_path)
