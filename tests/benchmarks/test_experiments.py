"""The experiments of the suites long-range and small-data: what they find with layers of which it is known."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from fastseq.benchmarks import cli
from fastseq.benchmarks.measure.case import Case, Options, Participant
from fastseq.benchmarks.measure.runner import Runner
from fastseq.benchmarks.measure.timing import Effort
from fastseq.benchmarks.providers.base import PROVIDERS, Provider
from fastseq.benchmarks.providers.registry import EVERY_PROVIDER
from fastseq.benchmarks.suites import long_range, small_data
from fastseq.benchmarks.workloads import experiments
from fastseq.benchmarks.workloads.base import Metric
from fastseq.benchmarks.workloads.experiments import SYMBOLS, TASKS, Experiment

GRADIENT = Experiment("lstm", 6, 16, 8, 8, dtype="float64", task="gradient", seeds=2)
RECALL = Experiment("attention", 5, 16, 16, 16, task="recall", budget=80, seeds=2, heads=2, rate=1e-2)


class Fades(nn.Module):
    """h = keep h + x, step by step."""

    def __init__(self, keep: float) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, x):
        h, outputs = torch.zeros_like(x[0]), []
        for step in x:
            h = self.keep * h + step
            outputs.append(h)
        return torch.stack(outputs), h


class OfNow(nn.Module):
    """No memory at all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return self.linear(x)


def of(build, layout="time", function="lstm"):
    return Provider("mine", function, layout, build)


@pytest.mark.parametrize("distance", [1, 6, 60])
def test_the_gradient_of_a_known_recurrence(distance):
    """Its Jacobian is keep^T times the identity; a probe of 16 x 8 normal numbers estimates the norm to a few per cent."""
    found = replace(GRADIENT, T=distance).measure(of(lambda w: Fades(0.5)))
    assert found.median == pytest.approx(0.5**distance, rel=0.25) and found.low <= found.median <= found.high
    half, tenth = (replace(GRADIENT, T=distance).measure(of(lambda w, k=keep: Fades(k))).median for keep in (0.5, 0.1))
    assert half / tenth == pytest.approx(5.0**distance, rel=1e-9)


def test_what_has_no_memory_has_no_gradient():
    assert GRADIENT.measure(of(lambda w: OfNow(w.H))).high == 0


def test_recall_is_learned_across_a_distance_or_not():
    attention = RECALL.measure(PROVIDERS["fused attention"])
    assert attention.low > 0.9 and attention.seeds == 2
    nothing = RECALL.measure(of(lambda w: OfNow(w.H)))
    assert nothing.high < 2 / SYMBOLS


def test_parity_is_counted_by_gates_that_read_the_state_alone():
    """The quick form of the suite: a GRU is exact beyond the lengths that it was trained on, minGRU does not leave chance."""
    (case,) = [c for c in long_range.plan(Options("cpu", "float32", (), quick=True)) if c.group == "parity"]
    names = ("fastseq.GRU", "fastseq.MinGRU")
    found = {p.provider: p.workload.measure(EVERY_PROVIDER[p.provider]) for p in case.participants if p.provider in names}
    T = case.participants[0].workload.T
    assert T > experiments.COUNTED and found["fastseq.GRU"].low > 0.98
    chance = 4 * 0.5 / math.sqrt(experiments.TESTED)  # four standard deviations
    assert 0.5 - chance < found["fastseq.MinGRU"].low <= found["fastseq.MinGRU"].high < 0.5 + chance


@pytest.mark.parametrize(("since", "found"), [(0, 1.0), (1, 0.5)])
def test_parity_is_that_of_every_bit(monkeypatch, since, found):
    """Who counts them all is always right, who overlooks the first is right by chance."""

    class Counts(nn.Linear):
        def __init__(self, *given):
            super().__init__(1, 1)

        def forward(self, bits):
            assert bits.shape == (50, experiments.TESTED), "as long as it says, not as what is trained on"
            seen = bits.clone()
            seen[:since] = 0
            return nn.functional.one_hot(seen.cumsum(0) % 2, 2)

    monkeypatch.setattr(experiments, "Model", Counts)
    w = Experiment("gru", 50, 32, 8, 8, task="parity", seeds=1)
    assert w.measure(PROVIDERS["fastseq.GRU"]).median == pytest.approx(found, abs=0.09 * since)


@pytest.mark.parametrize("name", ["fastseq.GRU", "attention block"])
@pytest.mark.parametrize("task", ["recall", "parity", "text", "series"])
def test_an_experiment_repeats_itself(task, name):
    w = replace(RECALL, function=PROVIDERS[name].function, task=task, budget=3, samples=500, B=4)
    torch.manual_seed(1)
    first = w.measure(PROVIDERS[name])
    torch.manual_seed(2)
    assert w.measure(PROVIDERS[name]) == first
    assert first.high > first.low, "seeds differ"


def test_a_seed_draws_the_same_data_for_every_provider(monkeypatch):
    seen = []

    def watched(w, model, loss_of):
        embedding = model.embedding.register_forward_hook(lambda module, given, result: seen.append(given[0]))
        loss_of()
        embedding.remove()

    monkeypatch.setattr(experiments, "learn", watched)
    for name in ("fastseq.GRU", "attention block"):
        replace(RECALL, function=PROVIDERS[name].function).measure(PROVIDERS[name])
    (gru, gru_too), (block, block_too) = seen[:2], seen[2:]
    assert torch.equal(gru, block) and torch.equal(gru_too, block_too) and not torch.equal(gru, gru_too)


def test_more_of_a_novel_teaches_more():
    """Untrained is as good as guessing among the letters; trained is better, and better with more text."""
    w = Experiment("gru", 16, 16, 32, 32, task="text", seeds=1, samples=60000)
    untrained, trained, starved = (
        replace(w, **more).measure(PROVIDERS["fastseq.GRU"]).median
        for more in ({"budget": 0}, {"budget": 40}, {"budget": 40, "samples": 40})
    )
    letters = len(set(experiments.TEXT.read_text()))
    assert untrained == pytest.approx(math.log(letters), rel=0.05)
    assert trained < 0.9 * untrained and trained < starved


def test_sunspots_are_compared_with_persistence():
    """A layer that hands its input on can only learn to repeat this month, whose error is 1."""
    w = Experiment("rnn", 12, 16, 8, 8, task="series", seeds=1, samples=2000, budget=300, rate=2e-2)
    assert w.measure(of(lambda w: nn.Identity(), function="rnn")).median == pytest.approx(1, abs=0.1)


def test_nothing_of_the_held_out_end_is_trained_on():
    record = torch.arange(1000.0)[:, None]
    seen = []

    class Sees(nn.Linear):
        def forward(self, x):
            seen.append((torch.is_grad_enabled(), x.min().item(), x.max().item()))
            return super().forward(x)

    w = Experiment("rnn", 10, 4, 8, 8, task="series", samples=300, budget=50)
    experiments.predict(w, Sees(1, 1), record, torch.Generator().manual_seed(0), nn.functional.mse_loss)
    trained, tested = ([s for s in seen if s[0] is grad] for grad in (True, False))
    assert min(s[1] for s in trained) >= 600 and max(s[2] for s in trained) < 900
    assert min(s[1] for s in tested) == 900 and len(trained) == 50


def test_metrics_are_medians_between_extremes():
    assert Metric.of("accuracy", "", [0.5, 0.1, 0.9, 0.6]).as_dict() == {
        "name": "accuracy", "unit": "", "median": 0.55, "low": 0.1, "high": 0.9, "seeds": 4,
    }  # fmt: skip


def run(w, providers):
    case = Case("s", "g", tuple(Participant(name, w) for name in providers), Effort())
    return Runner("cpu", providers=providers).run(case)


def test_an_experiment_is_gated_and_not_timed():
    class Wrong(nn.LSTM):
        def forward(self, x, hx=None):
            y, state = super().forward(x, hx)
            return 1.01 * y, state

    w = replace(GRADIENT, dtype="float32")
    right, wrong = run(w, {"a": of(lambda w: nn.LSTM(w.I, w.H)), "b": of(lambda w: Wrong(w.I, w.H))})
    assert right.ok and right.metric["name"] == "gradient norm" and right.parameters == 4 * (8 * 16 + 16)
    assert right.time is None and right.roofline is None and right.check["ok"]
    assert wrong.status == "wrong" and wrong.metric is None and "is off by" in wrong.reason


def test_a_figure_that_is_not_finite_is_wrong(monkeypatch):
    monkeypatch.setitem(TASKS, "gradient", replace(TASKS["gradient"], run=lambda *given: math.nan))
    (row,) = run(replace(GRADIENT, dtype="float32"), {"a": of(lambda w: nn.LSTM(w.I, w.H))})
    assert row.status == "wrong" and row.reason == "gradient norm is not finite" and row.metric is None


def test_a_record_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setitem(TASKS, "text", replace(TASKS["text"], file=tmp_path / "persuasion.txt"))
    (row,) = run(replace(RECALL, task="text"), {"a": PROVIDERS["fused attention"]})
    assert row.status == "unavailable" and row.reason == "needs persuasion.txt of a checkout's examples/data"


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("suite", [long_range, small_data])
def test_the_plan(suite, device, quick):
    cases = suite.plan(Options(device, "float32", (), quick))
    tasks = {"gradient", "recall", "parity"} if suite is long_range else {"text", "series"}
    assert {c.group for c in cases} == tasks == {p.workload.task for c in cases for p in c.participants}
    for case in cases:
        assert {p.provider for p in case.participants} == set(suite.COUNT if case.group == "parity" else suite.NAMES)
        given = [asdict(replace(p.workload, function="")) for p in case.participants]
        assert all(one == given[0] for one in given), "all but the layer is the same for all"
        for p in case.participants:
            assert p.workload.function == EVERY_PROVIDER[p.provider].function and p.workload.mode == "training"
            assert p.workload.device == device and p.workload.seeds > 1
            assert p.workload.dtype == ("float64" if case.group == "gradient" else "float32")
    keys = [key for case in cases for key in case.keys()]
    assert len(keys) == len(set(keys))
    steps = sum(p.workload.budget * p.workload.seeds for c in cases for p in c.participants)
    assert (steps < 5000) is quick


@pytest.mark.parametrize(
    ("suite", "only", "metric", "said"),
    [
        ("long-range", "group=gradient T=2,8 provider=fastseq.GRU", "gradient norm", "factor for a step"),
        ("small-data", "group=series provider=fastseq.GRU", "test error", "n=2048"),
    ],
)
def test_a_run_from_end_to_end(tmp_path, capsys, suite, only, metric, said):
    argv = ["--suite", suite, "--quick", "--device", "cpu", "--only", only, "--out", str(tmp_path)]
    assert cli.main([*argv, "--picture", str(tmp_path / "picture.svg")]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert len(rows) == 2
    for row in rows:
        assert row["status"] == "ok" and row["check"]["ok"] and row["time"] is None
        assert (
            row["metric"]["name"] == metric and 0 < row["metric"]["low"] <= row["metric"]["high"] and row["metric"]["seeds"] == 2
        )
    assert said in capsys.readouterr().out and (tmp_path / "picture.svg").stat().st_size > 5000
