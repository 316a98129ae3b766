from __future__ import annotations

from dataclasses import replace

import pytest

from fastseq.benchmarks.measure.case import Options
from fastseq.benchmarks.measure.runner import Runner
from fastseq.benchmarks.providers.registry import EVERY_PROVIDER
from fastseq.benchmarks.suites import memory_use


def few(mode, T):
    """A case of the plan, made small."""
    case = next(c for c in memory_use.plan(Options("cpu", "float32", (1,), True)) if c.participants[0].workload.mode == mode)
    small = tuple(replace(p, workload=replace(p.workload, T=T, I=32, H=32)) for p in case.participants)
    return replace(case, participants=small)


def test_memory_is_observed_and_nothing_is_timed():
    def timer(*given):
        raise AssertionError("timed")

    clock = type("Clock", (), {"name": "", "prepare": timer, "measure": timer})()
    runner = Runner("cpu", clock=clock)
    rows = {
        (r.provider, r.mode, r.T): r for T in (16, 64) for mode in ("inference", "training") for r in runner.run(few(mode, T))
    }
    assert len(rows) == 4 * len(memory_use.NAMES) and not runner.peaks, "no peaks are needed where there is no roofline"
    for (_, mode, _), row in rows.items():
        assert row.ok, row.reason
        assert row.time is None and row.memory > 0 and (row.kept or 0) >= 0 and (row.kept is None) == (mode == "inference")

    def kept(provider, T):
        return rows[provider, "training", T].kept

    assert kept("fastseq.LSTM (recompute)", 64) < kept("fastseq.LSTM", 64)
    assert (
        kept("naive attention", 64) / kept("naive attention", 16) > 5 > kept("fused attention", 64) / kept("fused attention", 16)
    )


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_plan(device, quick):
    cases = memory_use.plan(Options(device, "float32", (), quick))
    assert not any(c.timed for c in cases)
    for case in cases:
        assert [p.provider for p in case.participants] == list(memory_use.NAMES)
        assert all(EVERY_PROVIDER[p.provider].function == p.workload.function for p in case.participants)
        assert (
            len({(p.workload.T, p.workload.B, p.workload.H, p.workload.mode, p.workload.device) for p in case.participants}) == 1
        )
    lengths = {c.participants[0].workload.T for c in cases}
    assert len(cases) == 2 * len(lengths) and (max(lengths) > 4096) is (device == "cuda" and not quick)
