from __future__ import annotations

import json

import pytest
from torch import nn

from fastseq.benchmarks import cli
from fastseq.benchmarks.measure.case import Options
from fastseq.benchmarks.measure.results import Results
from fastseq.benchmarks.providers.custom import add_provider, remove_provider
from fastseq.benchmarks.providers.registry import EVERY_PROVIDER
from fastseq.benchmarks.report.custom import present
from fastseq.benchmarks.suites import SUITES, joined


def own_lstm(w):
    return nn.LSTM(w.I, w.H, **w.options)


@pytest.fixture
def mine():
    yield add_provider("mine", own_lstm, like="torch.nn.LSTM")
    remove_provider("mine")


def test_it_takes_part_wherever_the_other_does(mine):
    assert EVERY_PROVIDER["mine"] is mine and (mine.function, mine.layout) == ("lstm", "time")
    joining = 0
    for suite in ("sequential-vs-parallel", "recurrent", "memory", "attention"):
        for case in SUITES[suite].plan(Options("cpu", "float32", (1,), True)):
            found = {p.provider: p.workload for p in joined(case).participants}
            assert ("mine" in found) is ("torch.nn.LSTM" in found)
            if "mine" in found:
                joining += 1
                assert found["mine"] == found["torch.nn.LSTM"] and ("mine", "torch.nn.LSTM") in joined(case).baseline
            else:
                assert joined(case) == case
    assert joining > 10


def test_it_is_gone_when_removed():
    add_provider("mine", own_lstm, like="torch.nn.LSTM")
    remove_provider("mine")
    case = SUITES["memory"].plan(Options("cpu", "float32", (1,), True))[0]
    assert "mine" not in EVERY_PROVIDER and joined(case) == case
    with pytest.raises(ValueError, match="'mine' was not added; added are: none"):
        remove_provider("mine")


@pytest.mark.parametrize(
    ("name", "build", "like", "error", "message"),
    [
        ("new", nn.LSTM(1, 1).weight_ih_l0, "torch.nn.LSTM", TypeError, "build must be callable, a function of a workload, not"),
        ("", own_lstm, "torch.nn.LSTM", ValueError, "got ''"),
        ("naive attention", own_lstm, "torch.nn.LSTM", ValueError, "got 'naive attention'"),
        ("fastseq.Mine", own_lstm, "torch.nn.LSTM", ValueError, "begin with neither torch nor fastseq, got 'fastseq.Mine'"),
        ("new", own_lstm, "torch.LSTM", ValueError, "got 'torch.LSTM'; there are: eager LSTMCell loop, torch.nn.LSTM"),
        ("new", own_lstm, "mine", ValueError, "like must be the name of a provider of the suites, got 'mine'"),
    ],
)
def test_bad_input_is_named(mine, name, build, like, error, message):
    before = dict(EVERY_PROVIDER)
    with pytest.raises(error, match=message):
        add_provider(name, build, like=like)
    assert before == EVERY_PROVIDER


def test_runs_from_end_to_end(tmp_path, capsys, mine):
    """One that is right and one that is not, in a suite whose own tables do not know them."""

    class Wrong(nn.LSTM):
        def forward(self, x, hx=None):
            y, state = super().forward(x, hx)
            return 1.01 * y, state

    add_provider("wrong", lambda w: Wrong(w.I, w.H), like="torch.nn.LSTM")
    try:
        only = "T=32 mode=inference provider=mine,wrong"
        argv = ["--quick", "--threads", "1", "--device", "cpu", "--only", only, "--out", str(tmp_path)]
        assert cli.main(argv) == 1, "one provider is wrong"
        rows = {r["provider"]: r for r in json.loads((tmp_path / "results.json").read_text())["rows"]}
        assert set(rows) == {"torch.nn.LSTM", "mine", "wrong"}
        assert rows["mine"]["ratio"]["baseline"] == "torch.nn.LSTM" and rows["wrong"]["time"] is None
        said = capsys.readouterr().out
        assert "Custom providers" in said and "wrong result" in said
    finally:
        remove_provider("wrong")


def test_results_of_another_process_show_theirs(tmp_path, synthetic):
    results = synthetic.grid(lambda *point: 2.0)
    assert present(results) == []
    results.rows[0].provider = "of yesterday"
    results.save(tmp_path / "results.json")
    (section,) = present(Results.load(tmp_path / "results.json"))
    assert [row[0] for row in section.tables[0].rows] == ["of yesterday"]
