"""The suite statements: its plan, its stacks, and what its experiments find where the answer is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastseq.benchmarks.measure.case import Options
from fastseq.benchmarks.measure.runner import Runner
from fastseq.benchmarks.providers.base import PROVIDERS
from fastseq.benchmarks.providers.registry import EVERY_PROVIDER
from fastseq.benchmarks.providers.stacks import STACK_PROVIDERS
from fastseq.benchmarks.suites import statements
from fastseq.benchmarks.workloads.layers import TransformerBlock
from fastseq.benchmarks.workloads.statements import CACHED, PLAIN, POSITIONED, Segments, Statement

QUICK, FULL = (Options("cpu", "float32", (1,), quick=quick) for quick in (True, False))


@pytest.fixture(autouse=True)
def one_thread():
    """What is small is slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("options", [QUICK, FULL])
def test_plan(options):
    cases = statements.plan(options)
    assert {case.group for case in cases} == {
        *statements.ORDER.values(),
        *statements.CONTEXT.values(),
        "stacks, recall",
        "stacks, cost",
    }
    for case in cases:
        for p in case.participants:
            assert EVERY_PROVIDER[p.provider].function == p.workload.function
    within = [case for case in cases if case.group in statements.CONTEXT.values()]
    distances = {case.participants[0].workload.T for case in within}
    assert min(distances) < statements.SEGMENT < max(distances)


def test_stacks_have_as_many_parameters():
    w = replace(statements.plan(QUICK)[-1].participants[0].workload, H=64, I=64)
    counts = [sum(p.numel() for p in provider.build(w).parameters() if p.ndim == 2) for provider in STACK_PROVIDERS.values()]
    assert len(set(counts)) == 1


def order(name, variant):
    provider = PROVIDERS[name]
    w = Statement(provider.function, 12, 3, 16, 16, dtype="float64", task="order", variant=variant, seeds=2)
    return w.measure(provider)


def test_attention_without_positions_does_not_know_the_order():
    assert order("fused attention", PLAIN).high < 1e-14
    assert order("fused attention", POSITIONED).low > 1e-4
    assert order("torch.nn.LSTM", PLAIN).low > 1e-4


@pytest.mark.parametrize(("cache", "reach"), [(0, 3), (4, 11)])
def test_cached_segments_reach_as_far_as_their_layers_carry(cache, reach):
    """Two layers, segments of four: the last output sees the steps of its segment, and four more for each layer."""
    torch.manual_seed(0)
    model = Segments([TransformerBlock(8, 2, fused=False) for _ in range(2)], 4, cache).double()
    x = torch.randn(1, 16, 8, dtype=torch.float64)
    seen = []
    with torch.no_grad():
        for distance in range(16):
            other = x.clone()
            other[:, 15 - distance] += torch.arange(8.0)
            if (model(other)[:, -1] - model(x)[:, -1]).abs().max() > 1e-9:
                seen.append(distance)
    assert seen == list(range(reach + 1))
    assert model(x).shape == x.shape


def test_cached_states_get_no_gradient():
    model = Segments([TransformerBlock(8, 2, fused=False)], 4, 4)
    x = torch.randn(1, 12, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x)[:, -1].sum(), x)
    assert grad[:, :8].abs().max() == 0 and grad[:, 8:].abs().min() > 0


def test_a_token_within_the_cache_is_learned():
    provider = PROVIDERS["attention block"]
    given = {"task": "context", "segment": 4, "seeds": 1, "budget": 60}
    cached, alone = (Statement("block", 6, 32, 32, 32, variant=variant, **given).measure(provider) for variant in (CACHED, ""))
    assert cached.median < 0.5 and alone.median > 1.5


def test_rows_of_a_run():
    case = next(case for case in statements.plan(QUICK) if case.group == "stacks, cost")
    small = tuple(replace(p, workload=replace(p.workload, T=5, B=2, I=16, H=16)) for p in case.participants)
    rows = Runner("cpu", quick=True).run(replace(case, participants=small, effort=replace(case.effort, seconds=0.01)))
    assert [row.status for row in rows] == ["ok"] * 3 and all(row.time and row.memory and row.check["ok"] for row in rows)
