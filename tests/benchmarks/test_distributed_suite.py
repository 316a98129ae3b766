from __future__ import annotations

import json

import pytest
import torch.distributed as dist

from fastseq.benchmarks import cli
from fastseq.benchmarks.measure.case import Options
from fastseq.benchmarks.measure.ranks import ATTENTION, RECURRENCE, Found, RanksWorkload
from fastseq.benchmarks.measure.results import Row
from fastseq.benchmarks.providers.ranks import RANK_PROVIDERS
from fastseq.benchmarks.suites import distributed
from fastseq.benchmarks.workloads.over_ranks import METHODS, ONE, PAIRS, TORCH, WAVES, Attention, Recurrence, Scan

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")


@pytest.mark.parametrize("quick", [True, False])
def test_the_plan(quick):
    cases = distributed.plan(Options("cpu", "float32", (1,), quick))
    assert {p.provider for c in cases for p in c.participants} == {ONE, TORCH, PAIRS, *METHODS, *WAVES} == set(RANK_PROVIDERS)
    assert {c.group for c in cases} == set(distributed.CURVES.groups)
    for case in cases:
        assert case.participants[0].workload.T % (2 * case.participants[0].workload.ranks) == 0


def test_formulas_of_two_ranks():
    """Four runs of two steps: of the first three K and V go once to the other rank; of 4 heads each rank has 2. Of recurrence
    one rank sends states, the other what they are at the end, and both the gradients of what they were given."""
    shape = Attention(ranks=2, B=1, T=8, heads=4, kv_heads=2, E=16, rounds=1)
    run = 2 * 2 * 2 * 16 * 4
    assert shape.sent("ring") == shape.sent("all_gather") == 3 * 3 * run
    assert shape.sent("all_to_all") == 2 * 4 * (4 * (2 + 1) * 16 * 4 + 2 * 4)
    lstm, scan = Recurrence(ranks=2, B=3, T=8, rounds=1, H=5, layers=2), Scan(ranks=2, B=3, T=8, rounds=1, C=5)
    assert all(lstm.sent(name) == 4 * (2 * 3 * 2 * 5 * 4) for name in WAVES)
    assert scan.sent(PAIRS) == 2 * 4 * (3 * (5 + 5) + 2 * 3 + 3 * (5 + 5))
    assert shape.sent(ONE) is lstm.sent(ONE) is scan.sent(ONE) is None


def made(group, provider, ranks, value):
    function = RECURRENCE if group.startswith("recurrence") else ATTENTION
    w = RanksWorkload(function, 512, 1, 256, 256, "training", ranks=ranks, what=group.split()[-1])
    row = Row.of(distributed.NAME, group, provider, w)
    row.metric = {"median": value, "low": value, "high": value}
    return row


def test_memory_and_model_follow_from_rows():
    rows = [made("memory", ONE, 4, 800.0), made("memory", "ring", 4, 220.0), made("seconds", ONE, 4, 1.6)]
    wave = next(iter(WAVES))
    rows += [made("recurrence memory", ONE, 4, 400.0), made("recurrence memory", wave, 4, 90.0)]
    assert distributed.memory(rows) == [
        {"program": "ring", "ranks": 4, "of its share": 1.1},
        {"program": wave, "ranks": 4, "of its share": 0.9},
    ]
    found = distributed.model(rows)
    assert found["block"] == pytest.approx(0.1) and found["message"] == 3 * 128 * 2 * 4 * 64 * 4
    slow, _, fast = ([line["busy"][i] for line in found["lines"]] for i in range(3))
    assert fast == pytest.approx([1.0] * len(distributed.RANKS)) and slow == pytest.approx(fast)
    assert found["lines"][-1]["ranks"] == 1024 and found["lines"][-1]["seconds"][-1] == pytest.approx(1024 * 0.1)
    assert distributed.model([]) == {}


def test_what_is_wrong_has_no_figure(monkeypatch):
    monkeypatch.setattr(
        "fastseq.benchmarks.measure.ranks.measured", lambda ranks, shapes: {shapes[0]: {"ring": Found(reason="off by 1")}}
    )
    w = RanksWorkload(ATTENTION, 512, 1, 256, 256, "training")
    assert RANK_PROVIDERS["ring"].unavailable(w) == "off by 1"


def test_a_run_from_end_to_end(tmp_path, capsys):
    argv = ["--suite", "distributed", "--quick", "--threads", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    by = {(r["group"], r["provider"]): r for r in rows}
    for (group, provider), row in by.items():
        assert row["status"] == "ok" or provider == TORCH, (group, provider, row["reason"])
    for begin, names in (("", ("ring",)), ("recurrence ", WAVES), ("scan ", (PAIRS,))):
        one = by[f"{begin}memory", ONE]["metric"]["median"]
        for name in names:
            assert by[f"{begin}memory", name]["metric"]["median"] <= distributed.LINEAR * one / 2, name
            assert by[f"{begin}bytes", name]["metric"]["median"] > 0
    printed = capsys.readouterr().out
    assert "A model, not a measurement" in printed and "Memory is linear" in printed
