"""The suite sequential-vs-parallel: who takes part, and what rows of the CUDA kernels and of minGRU change."""

from __future__ import annotations

import pytest
import torch

from fastseq.benchmarks.claims import table as claims
from fastseq.benchmarks.measure.case import Options
from fastseq.benchmarks.measure.check import check_provider
from fastseq.benchmarks.providers.registry import EVERY_PROVIDER
from fastseq.benchmarks.report.plots import style
from fastseq.benchmarks.roofline.model import roofline_of
from fastseq.benchmarks.roofline.peaks import Peaks
from fastseq.benchmarks.suites import sequential_vs_parallel as suite
from fastseq.benchmarks.workloads.base import Workload
from fastseq.benchmarks.workloads.layers import MinGRULoop

MIN_GRU = "fastseq.MinGRU"
KERNELS = {"fastseq.LSTM (cuda)": "torch.nn.LSTM", "fastseq.GRU (cuda)": "torch.nn.GRU"}


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_plan(device, quick):
    cases = suite.plan(Options(device, "float32", (1,), quick))
    assert len(cases) == 2 * (5 if quick else 7)
    for case in cases:
        names = [p.provider for p in case.participants]
        assert names == [*suite.EVERY] and {*KERNELS, MIN_GRU} <= set(names)
        assert dict(case.baseline).items() >= KERNELS.items() and set(dict(case.baseline).values()) <= set(names)
        for p in case.participants:
            assert (EVERY_PROVIDER[p.provider].function, p.workload.device) == (p.workload.function, device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", KERNELS)
def test_the_cuda_kernels_say_why_they_do_not_run_on_a_cpu(name):
    case = suite.plan(Options("cpu", "float32", (1,), True))[0]
    (w,) = (p.workload for p in case.participants if p.provider == name)
    assert EVERY_PROVIDER[name].unavailable(w) == "runs on cuda tensors, not on cpu"


def _tables(results):
    (section,) = suite.present(results)
    return {t.title: {line[0]: line for line in t.rows} for t in section.tables}


def test_rows_of_the_cuda_kernels_join_the_tables_and_the_claims(synthetic):
    slow = {"attention block": lambda T: 5e-6 * T, "torch.nn.LSTM": lambda T: 1e-5 * T, "fastseq.LSTM": lambda T: 9e-6 * T}
    fast = slow | {"fastseq.LSTM (cuda)": lambda T: 2e-6 * T}
    without, with_them = (_verdict(synthetic.lengths(seconds)) for seconds in (slow, fast))
    assert without.verdict == "holds for T = 32…512" and "best of torch.nn.LSTM and fastseq.LSTM)" in without.figures
    assert with_them.verdict == "does not hold here, T = 32…512" and "and fastseq.LSTM (cuda))" in with_them.figures
    shown = _tables(synthetic.lengths(fast))
    assert KERNELS.keys() & shown["Crossover length, forward"].keys() == {"fastseq.LSTM (cuda)"}
    assert "fastseq.GRU (cuda)" not in shown["Time, forward + backward"], "it did not run anywhere"
    assert shown["What ran"]["fastseq.GRU (cuda)"][-1] == "not here"


@pytest.mark.parametrize("later", [[*KERNELS], [MIN_GRU], [*KERNELS, MIN_GRU]], ids=["kernels", "minGRU", "both"])
def test_results_from_before_a_provider_have_no_lines_of_it(synthetic, later):
    results = synthetic.lengths({"torch.nn.LSTM": lambda T: 1e-5 * T, "fused attention": lambda T: 1e-7 * T**2})
    results.rows = [row for row in results.rows if row.provider not in later]
    assert not any(set(later) & set(lines) for lines in _tables(results).values())
    svg = style.svg(suite.picture(results))
    assert "torch.nn.LSTM  T" in svg and not any(name in svg for name in later)


def test_min_gru_is_a_third_curve(synthetic):
    """Its line, its crossovers with attention, its picture; and it is never the fastest or smallest recurrent layer."""
    seconds = {"torch.nn.GRU": lambda T: 1e-5 * T, "fused attention": lambda T: 1e-7 * T**2, MIN_GRU: lambda T: 4e-6 * T}
    results = synthetic.lengths(seconds, {MIN_GRU: lambda T: 1e3 * T})
    shown = _tables(results)
    for mode in ("forward", "forward + backward"):
        assert shown[f"Time, {mode}"][MIN_GRU][6].text == "T¹·⁰⁰" and MIN_GRU in shown[f"Peak memory, {mode}"]
        crossover = shown[f"Crossover length, {mode}"][MIN_GRU][2].text
        assert crossover.startswith("recurrence above T ≈ 40 ("), "where 4e-6 T is 1e-7 T²"
    assert f"{MIN_GRU}  T" in style.svg(suite.picture(results))
    memory = next(v for v in claims.verdicts(results) if v.claim == "memory-more")
    assert not any(a.name == MIN_GRU for f in memory.findings for p in f.panels for a in p.lines)


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_min_gru_passes_the_gate_and_another_gate_does_not(mode):
    w = Workload("mingru", 40, 3, 24, 24, mode)
    right = check_provider(lambda shape: (EVERY_PROVIDER[MIN_GRU].build(shape), "time"), w)
    assert right.ok and 0 < right.error <= right.bound < 1e-5, right.reason

    class Swapped(MinGRULoop):
        def forward(self, x):
            gate, candidate = self.weight_ih_l0.chunk(2)
            swapped = {"weight_ih_l0": torch.cat((candidate, gate)), "bias_ih_l0": self.bias_ih_l0}
            return torch.func.functional_call(MinGRULoop(w.I, w.H).to(x), swapped, x)

    wrong = check_provider(lambda shape: (Swapped(shape.I, shape.H), "time"), w)
    assert not wrong.ok and "is off by" in wrong.reason


def test_the_roofline_of_min_gru():
    """Two products of I by H for each position, three times over in training; at a slow memory input and output."""
    fast = Peaks("cpu", 1, "float32", {16: 1e15}, {131072: 1e15}, 1e9)
    slow = Peaks("cpu", 1, "float32", {16: 1e3}, {131072: 1e3}, 1e15)
    for mode, passes in (("inference", 1), ("training", 3)):
        w = Workload("mingru", 100, 2, 32, 64, mode)
        assert roofline_of(w, fast).seconds == pytest.approx(passes * 2 * 200 * 2 * 64 * 32 / 1e9)
        assert roofline_of(w, slow).seconds == pytest.approx(passes * 200 * (32 + 64) * 4 / 1e3)
        assert w.growth == 1


def _verdict(results):
    return next(v for v in claims.verdicts(results) if v.claim == "train-faster")
