"""The suite recurrent-grid, ONNX Runtime as a provider, and layers that are called again and again."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastseq.benchmarks import cli
from fastseq.benchmarks.measure.case import Case, Options
from fastseq.benchmarks.measure.check import check_provider, problem_of
from fastseq.benchmarks.measure.results import Results, Row
from fastseq.benchmarks.measure.runner import Runner
from fastseq.benchmarks.providers import onnx_runtime
from fastseq.benchmarks.providers.pack import PACK_PROVIDERS
from fastseq.benchmarks.providers.registry import EVERY_PROVIDER
from fastseq.benchmarks.suites import cells, recurrent
from fastseq.benchmarks.suites import recurrent_grid as grid
from fastseq.benchmarks.workloads.base import Workload
from fastseq.benchmarks.workloads.carried import CALLS, BesideWorkload, CarriedWorkload
from fastseq.benchmarks.workloads.cells import CellWorkload

LAYERS = ("LSTM", "GRU", "RNN")


def checked(name, w, build=None):
    provider = EVERY_PROVIDER[name]
    return check_provider(lambda shape: ((build or provider.build)(shape), provider.layout), w)


class TestOnnxRuntime:
    @pytest.fixture(autouse=True)
    def packages(self):
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnx")

    @pytest.mark.parametrize("threads", [1, 2])
    @pytest.mark.parametrize("cell", LAYERS)
    def test_layers_pass_the_gate(self, cell, threads):
        for w in (
            Workload(cell.lower(), 9, 3, 24, 24, threads=threads),
            CarriedWorkload(cell.lower(), 1, 2, 24, 24, threads=threads),
            CarriedWorkload(cell.lower(), 5, 2, 24, 24, threads=threads),
        ):
            result = checked(f"ONNX Runtime {cell}", w)
            assert result.ok, result.reason
            assert 0 < result.error <= result.bound < 1e-5 and 0 < result.rms < 1e-6

    @pytest.mark.parametrize("steps", [1, 5])
    @pytest.mark.parametrize("cell", LAYERS)
    def test_cells_pass_the_gate(self, cell, steps):
        result = checked(f"ONNX Runtime {cell}Cell", CellWorkload(f"{cell.lower()}cell", steps, 3, 24, 24))
        assert result.ok, result.reason

    @pytest.mark.parametrize(
        ("cell", "gates"), [("LSTM", (0, 1, 2, 3)), ("LSTM", (0, 3, 2, 1)), ("GRU", (0, 1, 2)), ("GRU", (2, 0, 1))]
    )
    def test_gates_in_another_order_are_refused(self, cell, gates, monkeypatch):
        monkeypatch.setitem(onnx_runtime.GATES, cell.lower(), gates)
        result = checked(f"ONNX Runtime {cell}", Workload(cell.lower(), 9, 3, 24, 24))
        assert not result.ok and "output is off by" in result.reason

    def test_a_result_is_not_written_over_by_the_next_call(self):
        w = CellWorkload("lstmcell", 1, 2, 8, 8)
        call = w.call(EVERY_PROVIDER["ONNX Runtime LSTMCell"].build(w), problem_of(w))
        with torch.inference_mode():
            first = call.module(call.x, call.state)
            kept = [t.clone() for t in first]
            second = call.module(first[0], first)
        assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True)) and not torch.equal(first[0], second[0])
        assert len(call.module.places) == 2

    def test_threads_are_those_of_the_workload(self):
        for threads in (1, 2):
            w = Workload("gru", 3, 1, 8, 8, threads=threads)
            call = w.call(EVERY_PROVIDER["ONNX Runtime GRU"].build(w), problem_of(w), "time")
            with torch.inference_mode():
                call.run()
            assert call.module.session.get_session_options().intra_op_num_threads == threads

    @pytest.mark.parametrize(
        ("more", "reason"),
        [
            ({"mode": "training"}, "has inference only"),
            ({"dtype": "bfloat16"}, "have no bfloat16"),
            ({"packed": True}, "has no packed sequences"),
            ({"device": "cuda"}, "is compared on a CPU"),
        ],
    )
    def test_what_it_lacks(self, more, reason):
        assert reason in onnx_runtime.missing(replace(Workload("lstm", 3, 1, 8, 8), **more))


@pytest.mark.parametrize(
    ("absent", "words"),
    [(("onnxruntime", "onnx"), "onnxruntime and onnx are"), (("onnx",), "onnx is"), (("onnxruntime",), "onnxruntime is")],
)
def test_without_onnx_runtime_rows_say_so(monkeypatch, absent, words):
    monkeypatch.setattr(onnx_runtime.importlib.util, "find_spec", lambda name: None if name in absent else object())
    case = next(c for c in grid.plan(Options("cpu", "float32", (1,), quick=True)) if len(c.participants) == 3)
    onnx = case.participants[-1]
    (row,) = Runner("cpu").run(Case(case.suite, case.group, (onnx,), case.effort))
    assert row.status == "unavailable"
    assert row.reason == f"{words} not installed: pip install {' '.join(absent)}"


@pytest.mark.parametrize("name", PACK_PROVIDERS)
def test_packed_layers_and_cells_pass_the_gate(name):
    """With weights in bfloat16 too: the parameters are numbers that it has."""
    kind = PACK_PROVIDERS[name].function
    w = CellWorkload(kind, 3, 2, 24, 24) if kind.endswith("cell") else CarriedWorkload(kind, 2, 2, 24, 24)
    result = checked(name, w)
    assert result.ok, result.reason
    assert result.bound < 1e-5
    assert "is for inference" in PACK_PROVIDERS[name].unavailable(replace(w, mode="training"))


class Forgets(nn.GRU):
    def forward(self, x, state=None):
        return super().forward(x)


class TestCarried:
    @pytest.mark.parametrize("mode", ["inference", "training"])
    @pytest.mark.parametrize("package", ["torch.nn", "fastseq"])
    @pytest.mark.parametrize("cell", LAYERS)
    def test_parts_are_the_sequence(self, cell, package, mode):
        """The truth is one call over all steps."""
        for dtype in ("float32", "bfloat16"):
            w = CarriedWorkload(cell.lower(), 3, 2, 24, 24, mode, dtype=dtype)
            result = checked(f"{package}.{cell}", w)
            assert result.ok, result.reason
        assert w.tokens == CALLS * 3 * 2

    def test_states_that_are_not_carried_are_refused(self):
        result = checked("torch.nn.GRU", CarriedWorkload("gru", 3, 2, 24, 24), lambda w: Forgets(w.I, w.H))
        assert not result.ok and "output is off by" in result.reason


def test_programs_beside_end_with_the_workload():
    w = BesideWorkload("lstm", 3, 1, 8, 8, programs=2)
    import psutil

    before = {p.pid for p in psutil.Process().children()}
    with w.settings():
        own = [p for p in psutil.Process().children() if p.pid not in before]
        assert len(own) == 2 and all(p.status() != psutil.STATUS_ZOMBIE for p in own)
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in own)
    assert not {p.pid for p in psutil.Process().children()} - before


def test_the_plan_covers_the_grid():
    cases = grid.plan(Options("cpu", "float32", (1, 2), quick=False))
    found = [(c.group, c.participants[0].workload) for c in cases]
    assert len(found) == len({(group, w, w.function) for group, w in found})
    for group in ("padded", "packed"):
        own = [w for name, w in found if name == group]
        assert len(own) == 3 * 2 * 3 * 4 * 2 * 2  # cells, dtypes, B, H, modes, threads
        assert {w.H for w in own} == {64, 128, 256, 512} and {w.B for w in own} == {1, 8, 32} and {w.T for w in own} == {128}
    for group in ("steps", "cells"):
        own = [w for name, w in found if name == group]
        assert len(own) == 3 * 2 * 3 * 2 * 2 * 2  # cells, dtypes, T, B, H, modes
        assert {w.T for w in own} == {1, 4, 16} and {w.B for w in own} == {1, 8} and {w.threads for w in own} == {1}
    assert [w.programs for name, w in found if name == "beside"] == [0, 1]
    for case in cases:
        w, names = case.participants[0].workload, [p.provider for p in case.participants]
        onnx = w.mode == "inference" and w.dtype == "float32" and case.group not in ("packed", "beside")
        packed = (w.mode == "inference" and case.group in grid.CARRIED) + (onnx and case.group == "steps" and w.H == 512)
        assert sum("ONNX" in name for name in names) == onnx and sum("(pack" in name for name in names) == packed
        assert len(names) == 2 + onnx + packed and case.baseline == tuple((name, names[0]) for name in names[1:])
        assert {EVERY_PROVIDER[name].function for name in names} == {w.function}
    quick = grid.plan(Options("cpu", "float32", (), quick=True))
    assert len(quick) < 220 and sum(c.effort.seconds for c in quick) < 12
    assert not [c for c in grid.plan(Options("cpu", "bfloat16", (1,), quick=False)) if "ONNX" in str(c)]
    on_a_gpu = grid.plan(Options("cuda", "float32", (1, 2), quick=False))
    assert "ONNX" not in str(on_a_gpu) and "beside" not in {c.group for c in on_a_gpu}


@pytest.mark.parametrize("suite", [recurrent, cells])
def test_onnx_runtime_takes_part_where_it_can(suite):
    for case in suite.plan(Options("cpu", "float32", (1,), quick=True)):
        w = case.participants[0].workload
        assert ("ONNX" in str(case)) is (w.mode == "inference" and not w.packed and case.group != "activations")


def synthetic_rows(synthetic, ratio, onnx=2.0, rms=1e-7, pack=2.0):
    """`ratio(group, workload)`: torch's time over fastseq's, which is 200 µs; `onnx`: ONNX Runtime's over fastseq's; `pack`:
    fastseq's over that after fastseq.pack, with bf16 weights twice as much."""
    rows = []
    for case in grid.plan(Options("cpu", "float32", (1, 2), quick=False)):
        base, own, *others = case.participants
        w, value = own.workload, ratio(case.group, own.workload)
        taken = 2e-4
        times = [(base, taken * value, 1e-7), (own, taken, rms)]
        times += [(p, taken * onnx if "ONNX" in p.provider else taken / pack / (1 + ("bf" in p.provider)), 1e-7) for p in others]
        for p, seconds, error in times:
            row = Row.of(grid.NAME, case.group, p.provider, w)
            rows.append(synthetic.timed(row, seconds, over=None if p is base else base.provider, ratio=taken * value / seconds))
            row.check = row.check | {"rms": error}
    return Results({"device": "cpu"}, {}, rows)


def gates(results):
    return {g["gate"]: g for g in grid.derive(results)["gates"]}


def test_every_gate_reads_its_rows(synthetic):
    found = gates(synthetic_rows(synthetic, lambda group, w: 4.0, pack=4.0))
    points = {
        "fp32 LSTM, inference, B=32 H=64": 1,
        "fp32 LSTM, inference, B=8": 4,
        "bf16 LSTM, inference, B=1": 4,
        "fp32 LSTM, training": 12,
        "GRU and RNN, both dtypes and modes": 2 * 2 * 2 * 12,
        "every point, padded and packed, all threads": 576,
        "T = 1, 4, 16 with a state carried, layers and cells": 2 * 3 * 2 * 3 * 2 * 2 * 2,
        "the same after fastseq.pack, inference": 2 * 3 * 2 * 3 * 2 * 2,
        "the same with bf16 weights, H = 512": 3 * 3 * 2,
        "a packed step, B=1 H=64, fp32": 3,
        "every point that ONNX Runtime has": 3 * 12 * 2 + 2 * 3 * 3 * 4,
    }
    for name, count in points.items():
        assert found[name]["points"] == count, name
    assert found["a packed step, B=1 H=64, fp32"]["found"] == pytest.approx(20 / (200 / 4 / 4))
    assert all(g["reached"] and g["goal reached"] and g["reliable"] and not g["untimed"] for g in found.values())


@pytest.mark.parametrize(
    ("worst", "gate", "value"),
    [
        (("padded", "lstm", "float32", "inference", 32, 256, 1), "fp32 LSTM, inference, B=32 H=256", 1.29),
        (("padded", "lstm", "bfloat16", "inference", 8, 128, 1), "bf16 LSTM, inference, B=8", 1.79),
        (("packed", "rnn", "bfloat16", "training", 8, 128, 2), "every point, padded and packed, all threads", 0.96),
        (("cells", "grucell", "float32", "inference", 1, 64, 1), "T = 1, 4, 16 with a state carried, layers and cells", 0.99),
    ],
)
def test_a_point_below_a_gate_fails_it_alone(synthetic, worst, gate, value):
    def ratio(group, w):
        return value if (group, w.function, w.dtype, w.mode, w.B, w.H, w.threads) == worst else 4.0

    results = synthetic_rows(synthetic, ratio, pack=4.0)
    found = gates(results)
    assert [name for name, g in found.items() if not g["reached"]] == [gate]
    assert found[gate]["worst"]["value"] == pytest.approx(value) and f"B={worst[4]} H={worst[5]}" in found[gate]["worst"]["point"]
    (section,) = grid.present(results)
    table = next(t for t in section.tables if t.title == "Gates")
    assert sum(row[7].text == "not reached" for row in table.rows) == 1


def test_a_mean_is_of_all_its_points(synthetic):
    found = gates(synthetic_rows(synthetic, lambda group, w: 1.0 if w.function == "gru" else 4.4))
    mean = found["GRU and RNN, both dtypes and modes"]
    assert mean["found"] == pytest.approx(4.4**0.5) and mean["reached"] and not mean["goal reached"]
    assert mean["worst"]["value"] == pytest.approx(1.0)


def test_onnx_runtime_the_error_and_pack_have_gates(synthetic):
    found = gates(synthetic_rows(synthetic, lambda group, w: 4.0, onnx=0.9, rms=2e-7, pack=0.3))
    failed = {name: g["found"] for name, g in found.items() if not g["reached"]}
    assert failed == {
        "the same after fastseq.pack, inference": pytest.approx(1.2),
        "a packed step, B=1 H=64, fp32": pytest.approx(20 * 4 * 0.3 / 200),
        "every point that ONNX Runtime has": pytest.approx(0.9),
        "error against fp64, root mean square: torch's over ours": pytest.approx(0.5),
    }


def test_a_point_without_a_time_reaches_no_gate(synthetic):
    results = synthetic_rows(synthetic, lambda group, w: 5.0)
    row = next(r for r in results.rows if r.provider == "fastseq.LSTM")
    row.status, row.reason, row.time, row.ratio = "wrong", "output is off by 0.1", None, None
    found = gates(results)["every point, padded and packed, all threads"]
    assert found["untimed"] == 1 and not found["reached"]
    assert len(grid.derive(results)["untimed"]) == 1


def test_a_run_from_end_to_end_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "KEEP_SECONDS", 0)
    only = "cell=gru,grucell B=1 H=64 T=1 precision=float32"
    argv = ["--suite", "recurrent-grid", "--quick", "--threads", "1", "--device", "cpu", "--only", only, "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    names = ("torch.nn.GRU{}", "fastseq.GRU{}", "ONNX Runtime GRU{}", "fastseq.GRU{} (pack)")
    assert [row["provider"] for row in rows] == [name.format(kind) for kind in ("", "Cell") for name in names]
    assert {row["status"] for row in rows} <= {"ok", "unavailable"}
    assert all(row["check"]["rms"] < 1e-6 for row in rows if row["check"])
    assert "The grid of recurrent layers" in (tmp_path / "report.html").read_text()
    monkeypatch.setattr(Runner, "run", lambda *args: pytest.fail("was measured already"))
    assert cli.main([*argv, "--resume"]) == 0
