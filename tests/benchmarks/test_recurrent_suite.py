from __future__ import annotations

import pytest

from fastseq.benchmarks.measure.case import Options
from fastseq.benchmarks.report.model import Cell
from fastseq.benchmarks.suites import recurrent


def targets(results):
    return {(m["group"], m["mode"], m["cell"]): m for m in recurrent.derive(results)["means"]}


def test_means_and_targets(synthetic):
    results = synthetic.grid(lambda group, mode, cell, B, H: 4.0 if B == 1 else 1.0)
    found = targets(results)
    assert all(m["mean"] == pytest.approx(2.0) and m["reached"] for m in found.values())
    assert found["packed", "training", "any"]["points"] == 12


def test_a_target_just_missed(synthetic):
    results = synthetic.grid(lambda group, mode, cell, B, H: 1.59 if cell == "GRU" else 1.61)
    found = targets(results)
    assert not found["padded", "inference", "GRU"]["reached"]
    assert found["padded", "inference", "RNN"]["reached"]
    assert not found["padded", "training", "RNN"]["reached"]


def test_losses_are_listed(synthetic):
    results = synthetic.grid(lambda group, mode, cell, B, H: 0.85 if (group, cell, B, H) == ("packed", "RNN", 1, 64) else 2.0)
    derived = recurrent.derive(results)
    assert derived["worst"]["ratio"] == 0.85
    assert derived["below least"] == derived["losses"]
    assert derived["losses"] == [f"packed RNN {m} B=1 H=64 threads=1" for m in ("inference", "training")]
    (section,) = recurrent.present(results)
    table = next(t for t in section.tables if t.title == "Points that fastseq loses: 2")
    assert isinstance(table.rows[0][1], Cell) and table.rows[0][1].text == "0.85×"


def test_a_point_without_a_time_reaches_no_target(synthetic):
    results = synthetic.grid(lambda *point: 5.0)
    row = next(r for r in results.rows if r.provider == "fastseq.LSTM")
    row.status, row.reason, row.time, row.ratio = "wrong", "output is off by 0.1", None, None
    found = targets(results)[row.group, row.mode, "LSTM"]
    assert found["untimed"] == 1 and not found["reached"]
    (section,) = recurrent.present(results)
    assert any(t.title == "Points that fastseq loses: 1" for t in section.tables)


def test_the_plan_covers_the_grid():
    cases = recurrent.plan(Options("cpu", "float32", (1, 2), quick=False))
    padded = [c for c in cases if c.group == "padded"]
    assert len(padded) == 3 * 3 * 4 * 2 * 2  # cells, B, H, modes, threads
    assert len([c for c in cases if c.group == "packed"]) == len(padded)
    data = [c for c in cases if c.group == "data"]
    assert len(data) == len(padded) / 2 and {p.workload.mode for c in data for p in c.participants} == {"training"}
    for case in cases:
        assert len({(p.workload.mode, p.workload.threads) for p in case.participants}) == 1
    assert len(recurrent.plan(Options("cpu", "float32", (), quick=True))) < 80
