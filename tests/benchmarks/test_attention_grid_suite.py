"""The suite attention-grid: what it plans, and that every gate reads its rows and no others."""

from __future__ import annotations

import json

import pytest

from fastseq.benchmarks import cli
from fastseq.benchmarks.measure.case import Options
from fastseq.benchmarks.measure.check import check_provider
from fastseq.benchmarks.measure.results import Results, Row
from fastseq.benchmarks.providers.attention import EAGER, FLEX_ON_CPU, MATH, OWN, OWN_MODULE, SDPA, TORCH_MODULE
from fastseq.benchmarks.providers.models import AFTER, BEFORE, MODEL_PROVIDERS
from fastseq.benchmarks.providers.onnx_attention import ONNX
from fastseq.benchmarks.providers.registry import EVERY_PROVIDER
from fastseq.benchmarks.roofline.peaks import Peaks
from fastseq.benchmarks.suites import attention_grid as grid

FULL = Options("cpu", "float32", (1, 2), quick=False)
EXACT = "error against fp64, root mean square: torch's least over ours"


def cases(group, options=FULL):
    return [case for case in grid.plan(options) if case.group == group]


def workloads(group, options=FULL):
    return [case.participants[0].workload for case in cases(group, options)]


def test_the_plan_covers_the_grid():
    found = workloads("dense")
    assert len(found) == 2 * 2 * 7 * 2 * 2 + 2 * 7 * 2  # E, dtypes, T, causal, modes; with two threads forward of E = 64
    assert {w.T for w in found} == {16, 32, 64, 128, 256, 512, 2048} and {w.heads for w in found} == {8}
    assert {(w.T, w.window, w.function) for w in workloads("window")} == {(T, 128, "band") for T in (1024, 4096)}
    assert {(w.function, w.mode) for w in workloads("scores")} == {
        *((name, "inference") for name in ("bias", "alibi", "softcap", "t5")),
        *((name, "training") for name in ("bias", "t5")),
    }
    modules = {(w.function, w.T, w.B) for w in workloads("modules")}
    assert modules == {(function, T, B) for function in ("self", "weights") for T in (32, 128, 512) for B in (1, 8)}
    assert {(w.T, w.B, w.mode, w.dropout) for w in workloads("encoder")} == {
        (T, B, mode, 0.1 if mode == "training" else 0.0) for T in (32, 128) for B in (1, 8) for mode in ("inference", "training")
    }
    decode = workloads("decode")
    assert {(w.S, w.B) for w in decode} == {(S, B) for S in (1024, 4096, 32768) for B in (1, 8)} and {w.G for w in decode} == {1}
    every = grid.plan(FULL)
    every_w = [(case.group, case.participants[0].workload) for case in every]
    points = [(group, w.function, w.mode, w.dtype, w.T, w.B, w.H, w.threads, str(w.detail())) for group, w in every_w]
    assert len(set(points)) == len(points) and {case.group for case in every} == set(grid.GROUPS)
    quick = grid.plan(Options("cpu", "float32", (), quick=True))
    assert (
        len(quick) < 80 and sum(case.effort.seconds for case in quick) < 10 and {case.group for case in quick} == set(grid.GROUPS)
    )


@pytest.mark.parametrize("group", grid.GROUPS)
def test_who_takes_part(group):
    for case in cases(group):
        w, names = case.participants[0].workload, [p.provider for p in case.participants]
        own = {"modules": OWN_MODULE, "encoder": AFTER}.get(group, OWN)
        torchs = {"modules": [TORCH_MODULE], "encoder": [BEFORE], "window": [SDPA], "decode": [SDPA]}.get(group, [SDPA, MATH])
        torchs = [EAGER] if w.function == "softcap" else torchs
        assert names[: len(torchs) + 1] == [*torchs, own] and case.baseline == ((own, torchs[0]),)
        others = names[len(torchs) + 1 :]
        assert (ONNX in others) is (w.function in grid.ON_ONNX and w.dtype == "float32" and w.mode == "inference")
        flex = group == "window" or (group == "scores" and w.function != "bias")
        assert (FLEX_ON_CPU in others) is (flex and w.mode == "inference") and set(others) <= {ONNX, FLEX_ON_CPU}
        assert set(names) <= set(EVERY_PROVIDER)
        assert not any(EVERY_PROVIDER[name].unavailable(w) for name in (*torchs, own))


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_encoders_pass_the_gate(mode):
    w = next(w for w in workloads("encoder") if (w.mode, w.B, w.T, w.dtype) == (mode, 1, 32, "float32"))
    for provider in (BEFORE, AFTER):
        result = check_provider(lambda shape, name=provider: (MODEL_PROVIDERS[name].build(shape), ""), w)
        assert result.ok, result.reason


def rows_of(synthetic, ratio, flex=8.0, onnx=2.0, rms=1e-7, bandwidth=1e10):
    """`ratio(group, workload)`: torch's least time over fastseq's, which is 200 µs; of decoding the share of `bandwidth`."""
    rows = []
    for case in grid.plan(FULL):
        w = case.participants[0].workload
        own = next(p.provider for p in case.participants if p.provider in grid.OURS)
        value = ratio(case.group, w)
        taken = w.bytes / bandwidth / value if case.group == "decode" else 2e-4
        slower = {MATH: 1.5 * value, FLEX_ON_CPU: flex, ONNX: onnx, own: 1.0}
        for p in case.participants:
            row = Row.of(grid.NAME, case.group, p.provider, w)
            base = case.baseline[0][1] if p.provider == own else None
            rows.append(synthetic.timed(row, taken * slower.get(p.provider, value), over=base, ratio=value))
            row.check = row.check | {"rms": rms if p.provider == own else 2e-7}
    peaks = [Peaks("cpu", n, "float32", read={16: bandwidth, 1 << 20: bandwidth}) for n in (1, 2)]
    return Results({"device": "cpu"}, {}, rows, peaks)


def gates(results):
    return {g["gate"] + " over " + g["over"]: g for g in grid.derive(results)["gates"]}


def test_every_gate_reads_its_rows(synthetic):
    results = rows_of(synthetic, lambda group, w: 1.0 if group == "decode" else 20.0)
    found = gates(results)
    assert len(found) == len(grid.GATES)
    points = {
        "fp32 forward, T 128 to 512, E 64, full": 3,
        "fp32 forward, T 128 to 512, E 64, causal": 3,
        "fp32 forward, T 2048 or E 128, full": 2 + 3,
        "bf16 forward, T from 128 on, causal": 2 * 4,
        "fp32 forward + backward": 2 * 7 * 2,
        "bf16 forward + backward": 2 * 7 * 2,
        "forward, T = 16, 32, 64": 2 * 2 * 3 * 2,
        "window ±128, T = 1024": 2,
        "window ±128, T = 4096": 2,
        "dense bias, forward": 2 * 2,
        "ALiBi, forward": 2 * 2,
        "softcap, forward": 2 * 2,
        "T5 table, forward": 2 * 2,
        "dense bias with gradient, forward + backward": 2 * 2,
        "T5 table with gradient, forward + backward": 2 * 2,
        "nn.MultiheadAttention, eval, without weights": 3 * 2 * 2,
        "nn.MultiheadAttention, eval, with weights": 3 * 2 * 2,
        "nn.TransformerEncoder, eval": 2 * 2 * 2,
        "nn.TransformerEncoder, training": 2 * 2 * 2,
    }
    for name, count in points.items():
        assert found[f"{name} over torch"]["points"] == count, name
    assert found["window ±128 over FlexAttention"]["points"] == 4 and found["window ±128 over FlexAttention"]["found"] == 8.0
    assert found["decoding, share of the read bandwidth over read bandwidth"]["points"] == 12
    assert found["speed-up with more threads, over that with one over one thread"]["points"] == 2 * 4 * 2
    assert found[f"{EXACT} over error"]["points"] == sum(r.provider in grid.OURS for r in results.rows)
    assert all(g["reached"] and g["goal reached"] and g["reliable"] and not g["untimed"] for g in found.values())


@pytest.mark.parametrize(
    ("worst", "gate", "value"),
    [
        (("dense", "dense", "float32", "inference", 256, 512, False), "fp32 forward, T 128 to 512, E 64, full over torch", 1.29),
        (("dense", "dense", "float32", "inference", 512, 512, True), "fp32 forward, T 128 to 512, E 64, causal over torch", 1.89),
        (("dense", "dense", "float32", "inference", 128, 1024, True), "fp32 forward, T 2048 or E 128, causal over torch", 1.24),
        (("dense", "dense", "bfloat16", "inference", 2048, 1024, False), "bf16 forward, T from 128 on, full over torch", 1.84),
        (("dense", "dense", "bfloat16", "inference", 64, 512, True), "forward, T = 16, 32, 64 over torch", 1.19),
        (("window", "band", "bfloat16", "inference", 4096, 512, False), "window ±128, T = 4096 over torch", 7.9),
        (("scores", "alibi", "float32", "inference", 512, 512, False), "ALiBi, forward over torch", 5.9),
        (("scores", "t5", "float32", "training", 128, 512, False), "T5 table with gradient, forward + backward over torch", 3.9),
        (
            ("modules", "weights", "float32", "inference", 32, 256, False),
            "nn.MultiheadAttention, eval, with weights over torch",
            1.09,
        ),
        (
            ("encoder", "nn.TransformerEncoder", "float32", "training", 32, 256, None),
            "nn.TransformerEncoder, training over torch",
            1.09,
        ),
    ],
)
def test_a_point_below_a_gate_fails_it_alone(synthetic, worst, gate, value):
    def ratio(group, w):
        point = (group, w.function, w.dtype, w.mode, w.T, w.H, getattr(w, "causal", None))
        return 1.0 if group == "decode" else value if point == worst and w.threads == 1 else 20.0

    results = rows_of(synthetic, ratio)
    found = gates(results)
    assert [name for name, g in found.items() if not g["reached"]] == [gate]
    assert found[gate]["worst"]["value"] == pytest.approx(value) and f"T={worst[4]} " in found[gate]["worst"]["point"]
    (section,) = grid.present(results)
    table = next(t for t in section.tables if t.title == "Gates")
    assert sum(row[7].text == "not reached" for row in table.rows) == 1


def test_torchs_best_counts(synthetic):
    """Of its own choice and its math path, the faster one; of the errors, the smaller one."""
    results = rows_of(synthetic, lambda group, w: 1.0 if group == "decode" else 20.0)
    row = next(r for r in results.rows if (r.provider, r.T, r.mode) == (MATH, 32, "inference"))
    row.time["median"] = 2e-4 * 1.1
    row.check["rms"] = 0.9e-7
    found = gates(results)
    failed = {name: g["found"] for name, g in found.items() if not g["reached"]}
    assert failed == {"forward, T = 16, 32, 64 over torch": pytest.approx(1.1), f"{EXACT} over error": pytest.approx(0.9)}


def test_bandwidth_threads_and_others_have_gates(synthetic):
    def ratio(group, w):
        return 0.79 if group == "decode" else 20.0 if w.threads == 1 else 17.9

    found = gates(rows_of(synthetic, ratio, flex=1.1, onnx=0.9))
    assert {name: g["found"] for name, g in found.items() if not g["reached"]} == {
        "window ±128 over FlexAttention": pytest.approx(1.1),
        "decoding, share of the read bandwidth over read bandwidth": pytest.approx(0.79),
        "every point that ONNX Runtime has over ONNX Runtime": pytest.approx(0.9),
        "speed-up with more threads, over that with one over one thread": pytest.approx(0.895),
    }


def test_a_point_without_a_time_reaches_no_gate(synthetic):
    results = rows_of(synthetic, lambda group, w: 1.0 if group == "decode" else 20.0)
    row = next(r for r in results.rows if (r.provider, r.function) == (OWN, "softcap"))
    row.status, row.reason, row.time, row.ratio = "wrong", "output is off by 0.1", None, None
    found = gates(results)
    assert found["softcap, forward over torch"]["untimed"] == 1 and not found["softcap, forward over torch"]["reached"]
    assert grid.derive(results)["untimed"] == [f"{grid.name_of(row)}: output is off by 0.1"]


def test_a_run_from_end_to_end(tmp_path):
    only = "group=dense T=32 precision=float32 mode=inference"
    argv = ["--suite", "attention-grid", "--quick", "--threads", "1", "--device", "cpu", "--only", only, "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["provider"] for row in rows] == [SDPA, MATH, OWN, ONNX] * 2
    assert {row["status"] for row in rows} <= {"ok", "unavailable"}
    assert all(row["check"]["rms"] < 1e-6 for row in rows if row["check"])
    assert "The grid of attention on a CPU" in (tmp_path / "report.html").read_text()
