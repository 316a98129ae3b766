from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastseq.benchmarks import cli
from fastseq.benchmarks.measure.case import Options
from fastseq.benchmarks.measure.check import check_provider
from fastseq.benchmarks.measure.results import Results, Row
from fastseq.benchmarks.providers.resets import CELLS, RESET_PROVIDERS, loop_name, own_name, plain_name
from fastseq.benchmarks.report.plots import style
from fastseq.benchmarks.suites import resets
from fastseq.benchmarks.workloads.base import FUNCTIONS, Call
from fastseq.benchmarks.workloads.resets import MaskedLoop, OneCall, RolloutWorkload

SMALL = RolloutWorkload("lstm", 30, 4, 24, 24, "training", episode=6)


def of(provider, w):
    cell = provider.function.removeprefix("rollout ")
    return replace(w, function=cell, episode=0 if "(no resets)" in provider.name else w.episode)


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("name", RESET_PROVIDERS)
def test_every_provider_passes_the_gate(name, mode):
    provider = RESET_PROVIDERS[name]
    result = check_provider(lambda w: (provider.build(w), provider.layout), of(provider, replace(SMALL, mode=mode)))
    assert result.ok, result.reason
    assert 0 < result.error <= result.bound < 1e-5


class Late(OneCall):
    """States start anew a step after they should."""

    def told(self, starts):
        return starts.roll(1, 0)


class Never(OneCall):
    def told(self, starts):
        return torch.zeros_like(starts)


class Forgets(MaskedLoop):
    """c of an LSTM outlives its episode."""

    def forward(self, x):
        (h, c), outputs = self.states, []
        for step, start in zip(x, self.starts, strict=True):
            output, (h, c) = self.layer(step[None], ((1 - start).view(1, -1, 1) * h, c))
            outputs.append(output)
        return torch.cat(outputs), (h, c)


@pytest.mark.parametrize("wrong", [Late, Never, Forgets], ids=lambda cls: cls.__name__)
def test_what_starts_anew_elsewhere_is_refused(wrong):
    import fastseq

    layer = nn.LSTM if issubclass(wrong, MaskedLoop) else fastseq.LSTM
    result = check_provider(lambda w: (wrong(layer(w.I, w.H), w), "time"), SMALL)
    assert not result.ok and "is off by" in result.reason


@pytest.mark.parametrize("cell", CELLS)
def test_the_truth_is_that_of_every_episode_run_alone(cell):
    """torch.nn on each segment of each row, from the states given or from zeros."""
    w = replace(SMALL, function=cell.lower(), mode="inference")
    problem = w.problem()
    found = w.torch_results(problem, torch.float64, "cpu", in_parts=True)
    layer = FUNCTIONS[w.function].module(w).double()
    Call(layer, problem, "time", dtype=torch.float64)  # gives it the parameters
    assert w.starts[1:].any(0).all() and not w.starts.all()
    for row in range(w.B):
        state = tuple(s[:, row : row + 1] for s in w.states)
        cuts = [0, *(t for t in range(1, w.T) if w.starts[t, row]), w.T]
        if w.starts[0, row]:
            state = tuple(torch.zeros_like(s) for s in state)
        for begin, end in zip(cuts, cuts[1:], strict=False):
            with torch.no_grad():
                output, after = layer(problem.x[begin:end, row : row + 1], state if cell == "LSTM" else state[0])
            assert torch.allclose(found["output"][begin:end, row], output[:, 0], atol=1e-12)
            state = tuple(torch.zeros_like(s) for s in state)
        last = after[0] if cell == "LSTM" else after
        assert torch.allclose(found["h_n"][:, row], last[:, 0], atol=1e-12)


def test_episodes():
    w = RolloutWorkload("gru", 2000, 50, 8, 8, episode=20)
    assert w.starts.double().mean().item() == pytest.approx(1 / 20, rel=0.1)
    assert not replace(w, episode=0).starts.any() and len(w.states) == 1 and len(replace(w, function="lstm").states) == 2
    assert w.small().starts.any() and not replace(w, episode=0).small().starts.any()


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_plan(device, quick):
    cases = resets.plan(Options(device, "float32", (1,), quick))
    assert {p.provider for c in cases for p in c.participants} == set(RESET_PROVIDERS)
    for case in cases:
        assert [p.provider for p in case.participants] == [f(case.group.upper()) for f in (loop_name, own_name, plain_name)]
        assert dict(case.baseline) == {own_name(case.group.upper()): loop_name(case.group.upper())}
        loop, own, plain = (p.workload for p in case.participants)
        assert loop == own and plain == replace(own, episode=0) and (own.T, own.device) == (128, device)
    if quick:
        assert sum(c.effort.seconds for c in cases) < 10
    elif device == "cpu":
        sizes = {(p.workload.B, p.workload.H) for c in cases for p in c.participants}
        assert {8, 256} <= {B for B, _ in sizes} and {64, 256} <= {H for _, H in sizes}


def results_of(synthetic, faster, slower):
    """One call is `faster` times as fast as the loop, and takes `slower` times as long as without resets."""
    rows = []
    for case in resets.plan(Options("cpu", "float32", (2,), quick=False)):
        seconds = (1e-2 * faster, 1e-2, 1e-2 / slower)
        for p, value in zip(case.participants, seconds, strict=True):
            base = dict(case.baseline).get(p.provider)
            rows.append(synthetic.timed(Row.of(resets.NAME, case.group, p.provider, p.workload), value, over=base, ratio=faster))
    return Results({"device": "cpu", "device name": "a device"}, {}, rows, [], 1.0)


@pytest.mark.parametrize(
    "faster, slower, reached", [(6.0, 1.05, [True, True]), (4.0, 1.05, [False, True]), (6.0, 1.2, [True, False])]
)
def test_the_gates(synthetic, faster, slower, reached):
    results = results_of(synthetic, faster, slower)
    found = resets.derive(results)["gates"]
    assert [g["reached"] for g in found] == reached
    assert found[0]["found"] == pytest.approx(faster) and found[1]["found"] == pytest.approx(1 / slower)
    assert found[0]["points"] == 9 and found[1]["points"] == 48 and found[0]["untimed"] == 0


def test_it_shows_gates_and_curves_over_environments(synthetic):
    results = results_of(synthetic, 6.0, 1.05)
    (section,) = resets.present(results)
    assert section.tables[0].title == "Gates" and any("B=256" in t.columns for t in section.tables)
    assert "B, environments" in style.svg(resets.picture(results))
    assert {fit["panel"] for fit in resets.derive(results)["fits"]} >= {"LSTM, forward + backward, H=64"}


def test_a_gate_that_lacks_a_time_is_not_reached(synthetic):
    results = results_of(synthetic, 6.0, 1.05)
    row = next(r for r in results.rows if r.provider == own_name("LSTM") and r.mode == "training" and r.B == 8)
    row.status, row.time, row.ratio = "wrong", None, None
    assert [(g["reached"], g["untimed"]) for g in resets.derive(results)["gates"]] == [(False, 1), (False, 1)]


def test_a_run_from_end_to_end(tmp_path, capsys):
    argv = ["--suite", "resets", "--quick", "--threads", "1", "--device", "cpu", "--only", "B=8 group=lstm mode=training"]
    argv += ["--out", str(tmp_path)]
    assert cli.main(argv) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {r["provider"] for r in rows} == {f("LSTM") for f in (loop_name, own_name, plain_name)} and len(rows) == 3
    for row in rows:
        assert row["status"] == "ok" and row["check"]["ok"] and row["time"]["median"] > 0 and row["roofline"]["seconds"] > 0
    printed = capsys.readouterr().out
    assert "Gates" in printed and "States that start anew" in printed
