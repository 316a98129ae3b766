"""The suite sequential-vs-parallel: who takes part, and what rows of the CUDA kernels and of minGRU change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastseq.benchmarks.claims import table as claims
from fastseq.benchmarks.measure.case import Options
from fastseq.benchmarks.measure.check import check_provider
from fastseq.benchmarks.providers.registry import EVERY_PROVIDER
from fastseq.benchmarks.report.plots import style
from fastseq.benchmarks.suites import sequential_vs_parallel as suite

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
    assert f"{MIN_GRU}, parallel in time  T" in style.svg(suite.picture(results))
    memory = next(v for v in claims.verdicts(results) if v.claim == "memory-more")
    assert not any(a.name == MIN_GRU for f in memory.findings for p in f.panels for a in p.lines)


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_min_gru_passes_the_gate(mode):
    """As the plan has it, smaller; its roofline is that of a scan."""
    case = next(c for c in suite.plan(Options("cpu", "float32", (1,), True)) if c.participants[0].workload.mode == mode)
    (w,) = (replace(p.workload, T=40, I=24, H=24) for p in case.participants if p.provider == MIN_GRU)
    result = check_provider(lambda shape: (EVERY_PROVIDER[MIN_GRU].build(shape), "time"), w)
    assert result.ok and 0 < result.error <= result.bound < 1e-5, result.reason
    assert w.growth == 1 and w.cost()[0] == 1


def _verdict(results):
    return next(v for v in claims.verdicts(results) if v.claim == "train-faster")
