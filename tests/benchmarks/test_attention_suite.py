from __future__ import annotations

import pytest

from fastseq.benchmarks.measure.case import Options
from fastseq.benchmarks.providers.attention import ATTENTION_PROVIDERS, EAGER, FLEX_ON_CPU, OWN, REFORMER, SDPA
from fastseq.benchmarks.providers.onnx_attention import ONNX
from fastseq.benchmarks.report.model import Cell
from fastseq.benchmarks.suites import attention


def table(results, title):
    (section,) = attention.present(results)
    return next(t for t in section.tables if t.title.startswith(title))


def text(cell):
    return cell.text if isinstance(cell, Cell) else cell


def test_flops_are_the_formula_over_the_time(synthetic):
    results = synthetic.alone(lambda kind, provider, T: 0.5)
    row = next(r for r in results.rows if (r.group, r.mode, r.T) == ("dense", "backward", 1024))
    assert attention.flops(row) == 2.5 * 4 * 4 * 256 * 1024 * 1024 / 2 / 0.5
    found = table(results, "GFLOP/s, causal, head dim 64, backward")
    assert text(found.rows[0][1]) == "10.7"


def test_losses_are_against_the_fastest_other(synthetic):
    slower = {SDPA: 3.0, OWN: 2.0, "torch SDPA (flash)": 1.0}
    results = synthetic.alone(lambda kind, provider, T: slower.get(provider, 4.0))
    losses = attention.derive(results)["losses"]
    assert len(losses) == 6 and all(loss["to"] == "torch SDPA (flash)" and loss["ratio"] == 0.5 for loss in losses)
    assert len(table(results, "Points that fastseq loses: 6").rows) == 6


def test_a_wrong_point_is_a_loss_and_has_no_speed_up(synthetic):
    results = synthetic.alone(lambda kind, provider, T: 1.0 if provider == OWN else 2.0)
    row = next(r for r in results.rows if (r.group, r.provider) == ("learned bias", OWN))
    row.status, row.reason, row.time, row.ratio, row.memory = "wrong", "grad bias is off by 1", None, None, None
    derived = attention.derive(results)
    assert not derived["losses"] and len(derived["untimed"]) == 1
    line = next(line for line in table(results, "Where torch is slow").rows if line[0] == "learned bias")
    assert "wrong result" in [text(cell) for cell in line] and not any("×" in text(cell) for cell in line)
    assert table(results, "Points that fastseq loses: 1").rows[0][2] == "grad bias is off by 1"


@pytest.mark.parametrize(("seconds", "reached"), [(0.99, True), (1.01, False)])
def test_targets_only_on_their_device(synthetic, seconds, reached):
    def time(kind, provider, T):
        return seconds if provider == OWN else 4.0 if kind == "T5 table" else 1.0

    assert attention.derive(synthetic.alone(time))["targets"] == []
    derived = attention.derive(synthetic.alone(time, device_name="NVIDIA H200"))
    found = {t["target"]: t for t in derived["targets"]}
    assert found["T5 table, forward + backward, over torch SDPA"]["reached"] is reached
    missing = found["Transformer-XL, forward + backward, over eager attention"]
    assert missing["found"] is None and not missing["reached"]  # what was not measured is not reached


def test_a_target_counts_its_worst_point(synthetic):
    cudnn = "torch SDPA (cudnn)"
    results = synthetic.alone(lambda kind, provider, T: 1.0 if provider == cudnn else 1.4, device_name="H200")
    found = {t["target"]: t for t in attention.derive(results)["targets"]}
    assert found[f"dense, hd 64 and 128, T ≥ 4096, forward, over {cudnn}"]["found"] == pytest.approx(1 / 1.4)


def test_decoding_is_compared_with_the_copy_beyond_the_caches(synthetic):
    results = synthetic.alone(lambda kind, provider, T: 1e-3)
    bytes_moved = 4 * 4 * 64 * (2 * 4 + 2 * 8192)
    (line,) = table(results, "Decoding").rows
    assert text(line[7]) == f"{bytes_moved / 1e-3 / 1e9:.1f} GB/s"
    assert line[8] == f"{bytes_moved / 1e-3 / 2e10:.0%}"  # 20 GB/s is the largest copy, 100 GB/s the one in a cache


def test_growth_of_memory(synthetic):
    results = synthetic.alone(lambda kind, provider, T: 1.0, lambda kind, provider, T: T**2 if provider == EAGER else 7 * T)
    growth = {(g["case"], g["provider"]): g["exponent"] for g in attention.derive(results)["growth"] if g["quantity"] == "memory"}
    assert growth["full causal", EAGER] == pytest.approx(2) and growth["window", OWN] == pytest.approx(1)
    assert growth["hashed", REFORMER] == pytest.approx(1) and ("hashed", OWN) not in growth
    shown = table(results, "Peak memory against T")
    assert {line[1] for line in shown.rows if line[0] in ("hashed", "shared query-key")} == {REFORMER} and shown.note


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_plan(device, quick):
    cases = attention.plan(Options(device, "float32", (1,), quick))
    onnx = {ONNX} if device == "cpu" else set()
    assert {p.provider for c in cases for p in c.participants} == set(ATTENTION_PROVIDERS) - {FLEX_ON_CPU} | onnx
    hashed = {(p.workload.T, p.workload.block) for c in cases for p in c.participants if p.provider == REFORMER}
    lengths = {p.workload.T for c in cases for p in c.participants if c.group == "memory" and p.provider == OWN}
    assert hashed == {(T, block) for T in lengths for block in (64, T)}
    groups = {c.group for c in cases}
    assert set(attention.GROUPS) | set(attention.TARGETS) | {"fp32", "deterministic"} <= groups
    dense = [c.participants[0].workload for c in cases if c.group == "dense"]
    assert {w.mode for w in dense} == {"inference", "training", "backward"} and {w.causal for w in dense} == {True, False}
    if device == "cuda":
        assert (
            {w.dtype for w in dense} == {"bfloat16"} and {w.T * w.B for w in dense} == {16384} and {w.H for w in dense} == {2048}
        )
        assert {w.E for w in dense} == ({128} if quick else {64, 128, 256})
    for case in cases:
        assert len({p.workload for p in case.participants}) == 1
        assert {name for pair in case.baseline for name in pair} <= {p.provider for p in case.participants}
