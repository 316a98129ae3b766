"""The suite sequential-vs-parallel: who takes part, and what rows of the CUDA kernels change."""

from __future__ import annotations

import pytest
import torch

from fastseq.benchmarks.claims import table as claims
from fastseq.benchmarks.measure.case import Options
from fastseq.benchmarks.providers.registry import EVERY_PROVIDER
from fastseq.benchmarks.suites import sequential_vs_parallel as suite

KERNELS = {"fastseq.LSTM (cuda)": "torch.nn.LSTM", "fastseq.GRU (cuda)": "torch.nn.GRU"}


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_plan(device, quick):
    cases = suite.plan(Options(device, "float32", (1,), quick))
    assert len(cases) == 2 * (5 if quick else 7)
    for case in cases:
        names = [p.provider for p in case.participants]
        assert names == [*suite.RECURRENT, *suite.PARALLEL] and set(KERNELS) <= set(names)
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


def test_results_from_before_the_cuda_kernels_have_no_lines_of_them(synthetic):
    results = synthetic.lengths({"torch.nn.LSTM": lambda T: 1e-5 * T})
    results.rows = [row for row in results.rows if row.provider not in KERNELS]
    assert not any(set(KERNELS) & set(lines) for lines in _tables(results).values())


def _verdict(results):
    return next(v for v in claims.verdicts(results) if v.claim == "train-faster")
