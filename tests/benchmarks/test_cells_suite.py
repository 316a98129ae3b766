from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastseq.benchmarks import cli
from fastseq.benchmarks.measure.case import Options
from fastseq.benchmarks.measure.check import check_provider, problem_of
from fastseq.benchmarks.providers.cells import CELL_PROVIDERS, _step
from fastseq.benchmarks.providers.recurrent import forced
from fastseq.benchmarks.report.model import Cell
from fastseq.benchmarks.suites import cells
from fastseq.benchmarks.workloads.cells import CELLS, CellWorkload
from support import cuda_host

STEP = CellWorkload("lstmcell", 1, 3, 24, 24, "training")


def text(cell):
    return cell.text if isinstance(cell, Cell) else cell


def table(results, title):
    (section,) = cells.present(results)
    return next((t for t in section.tables if t.title.startswith(title)), None)


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("name", CELL_PROVIDERS)
def test_every_provider_passes_the_gate(name, steps, mode):
    provider = CELL_PROVIDERS[name]
    w = CellWorkload(provider.function, steps, 3, 24, 24, mode)
    if name.endswith("(cuda)"):
        if not torch.cuda.is_available():
            assert provider.unavailable(w) == "runs on cuda tensors, not on cpu"
        if cuda_host.available() is not None:
            pytest.skip(cuda_host.available())
        provider = forced(name.partition(".")[2].partition(" ")[0], "cuda-host", "plan", "", "", _step)
        assert provider.unavailable(w) is None
        said = provider.chose(w.call(provider.build(w), problem_of(w)))
        assert [backend for backend in said if backend.startswith("backend")] == ["backend: cuda-host"]
    result = check_provider(lambda shape: (provider.build(shape), ""), w)
    assert result.ok, result.reason
    assert 0 < result.error <= result.bound < 1e-4


class Forgets(nn.LSTMCell):
    """A cell that loses a little of c, which only the second step shows in h."""

    def forward(self, x, hx=None):
        h, c = super().forward(x, hx)
        return h, c * 0.9999


class Detached(nn.LSTMCell):
    def forward(self, x, hx=None):
        return super().forward(x, (hx[0], hx[1] * 0.999 + hx[1].detach() * 0.001))


@pytest.mark.parametrize(
    ("cls", "steps", "mode", "reason"),
    [
        (Forgets, 1, "inference", "c is off by"),
        (Forgets, 5, "inference", "is off by"),
        (Detached, 1, "training", "grad c is off by"),
    ],
)
def test_a_wrong_cell_is_refused(cls, steps, mode, reason):
    result = check_provider(lambda w: (cls(w.I, w.H), ""), replace(STEP, T=steps, mode=mode))
    assert not result.ok and reason in result.reason


def test_a_rollout_feeds_the_output_back():
    w = replace(STEP, T=3, mode="inference")
    call = w.call(nn.LSTMCell(24, 24), problem_of(w))
    h, c = call.leaves["h"], call.leaves["c"]
    x = call.x
    with torch.inference_mode():
        for _ in range(3):
            h, c = call.module(x, (h, c))
            x = h
    assert torch.equal(call.outputs()["h"], h) and torch.equal(call.outputs()["c"], c)


def test_backward_is_for_input_states_and_parameters():
    w = replace(STEP, function="grucell")
    call = w.call(nn.GRUCell(24, 24), problem_of(w))
    assert list(call.gradients()) == ["input", "h", "weight_ih", "weight_hh", "bias_ih", "bias_hh"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_plan(device):
    cases = cells.plan(Options(device, "float32", (1,), quick=False))
    found = [c.participants[0].workload for c in cases]
    assert len(cases) == len(set(found)) == 3 * 3 * 4 * 4  # kinds, cells, B, H
    assert {(w.T, w.mode) for w in found} == {(1, "inference"), (1, "training"), (64, "inference")}
    assert {w.B for w in found} == {1, 4, 16, 64} and {w.H for w in found} == {128, 256, 512, 1024}
    assert {w.dtype for w in found} == {"float32" if device == "cpu" else "bfloat16"} and {w.device for w in found} == {device}
    for case in cases:
        base, own, kernels, *onnx = (p.provider for p in case.participants)
        assert case.baseline == tuple((name, base) for name in (own, kernels, *onnx))
        assert (base, kernels) == (f"torch.nn.{own.removeprefix('fastseq.')}", f"{own} (cuda)")
        assert {CELL_PROVIDERS[name].function for name in (own, kernels)} == {case.participants[0].workload.function}
    quick = cells.plan(Options(device, "float32", (1,), quick=True))
    assert len(quick) == 36 and sum(c.effort.seconds for c in quick) < 10
    full = cells.plan(Options("cuda", "float32", (1,), quick=False, full=True))
    assert {c.participants[0].workload.dtype for c in full} == {"bfloat16", "float32"}


@pytest.mark.parametrize(("ratio", "reached"), [(2.01, True), (1.99, False)])
def test_the_target_is_a_gpus(synthetic, ratio, reached):
    def of(group, w):
        worst = (group, w.function, w.mode, w.B, w.H) == ("step", "lstmcell", "inference", 16, 512)
        return ratio if worst else 0.5 if w.B == 64 or w.function != "lstmcell" else 3.0

    results = synthetic.single(of, "cuda")
    assert cells.derive(results)["target"] == {"least": 2.0, "found": ratio, "points": 3, "reached": reached, "reliable": True}
    assert text(table(results, "Target").rows[0][-1]) == ("reached" if reached else "not reached")
    assert cells.derive(synthetic.single(of))["target"] is None and table(synthetic.single(of), "Target") is None


def test_a_wrong_point_reaches_no_target_and_is_listed(synthetic):
    results = synthetic.single(lambda group, w: 3.0, "cuda")
    row = next(r for r in results.rows if (r.provider, r.mode, r.T, r.B, r.H) == ("fastseq.LSTMCell", "inference", 1, 4, 512))
    row.status, row.reason, row.time, row.ratio = "wrong", "c is off by 1", None, None
    derived = cells.derive(results)
    assert not derived["target"]["reached"] and derived["losses"] == []
    (lost,) = table(results, "Points that fastseq loses: 1").rows
    assert lost == ["LSTMCell one step, forward B=4 H=512 bfloat16", "c is off by 1"]


def test_means_and_losses(synthetic):
    derived = cells.derive(synthetic.single(lambda group, w: 4.0 if w.H > 256 else 0.25 if group == "rollout" else 1.0))
    means = {(m["cell"], m["group"], m["mode"]): m["mean"] for m in derived["means"]}
    assert len(means) == 9 and means["GRUCell", "rollout", "inference"] == pytest.approx(1.0)
    assert means["RNNCell", "step", "training"] == pytest.approx(2.0)
    assert len(derived["losses"]) == len(CELLS) * 4 * 2 and all("64 steps" in point for point in derived["losses"])


def test_a_gpus_points_have_times_in_a_graph_and_of_the_host(synthetic):
    results = synthetic.single(lambda group, w: 2.0, "cuda")
    for row in results.rows:
        row.graph, row.host = {"median": 3e-6}, {"median": 7e-6}
    shown = table(results, "Every point")
    line = dict(zip(shown.columns, (text(c) for c in shown.rows[0]), strict=True))
    assert line["fastseq in a graph"] == "3.00 µs" and line["host time of torch.nn"] == "7.00 µs"
    assert "fastseq in a graph" not in table(synthetic.single(lambda group, w: 2.0), "Every point").columns


def test_a_run_from_end_to_end(tmp_path):
    only = "cell=grucell B=1 H=128"
    argv = ["--suite", "cells", "--quick", "--threads", "1", "--device", "cpu", "--only", only, "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert [(r["group"], r["mode"], r["provider"]) for r in found["rows"]] == [
        (group, mode, provider)
        for group, mode in cells.KINDS
        for provider in ("torch.nn.GRUCell", "fastseq.GRUCell", "fastseq.GRUCell (cuda)", "ONNX Runtime GRUCell")
        if mode == "inference" or not provider.startswith("ONNX")
    ]
    on_cuda = [row for row in found["rows"] if row["provider"].endswith("(cuda)")]
    assert {(r["status"], r["reason"]) for r in on_cuda} == {("unavailable", "runs on cuda tensors, not on cpu")}
    for row in (row for row in found["rows"] if row["provider"] in ("torch.nn.GRUCell", "fastseq.GRUCell")):
        assert row["status"] == "ok" and row["check"]["ok"] and row["time"]["median"] > 0 and row["roofline"]["seconds"] > 0
    assert "Single cells against torch.nn" in (tmp_path / "report.html").read_text()
