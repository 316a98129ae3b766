"""The suite statements: its plan, its stacks, and what its experiments find where the answer is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fastseq.models
from fastseq.benchmarks.measure.case import Options
from fastseq.benchmarks.measure.runner import Runner
from fastseq.benchmarks.providers.registry import EVERY_PROVIDER
from fastseq.benchmarks.providers.stacks import DECODER, ENCODER, HYBRID, LSTMS, STACK_PROVIDERS
from fastseq.benchmarks.suites import statements
from fastseq.benchmarks.workloads.statements import ALONE, CACHED, PLAIN, POSITIONED, Context, Statement, through_segments

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
    assert {case.group for case in cases} == {*statements.ORDER.values(), *statements.CONTEXT.values(), "stacks, recall"}
    for case in cases:
        for p in case.participants:
            assert EVERY_PROVIDER[p.provider].function == p.workload.function
    within = [case for case in cases if case.group in statements.CONTEXT.values()]
    distances = {case.participants[0].workload.T for case in within}
    assert min(distances) < statements.SEGMENT < max(distances)


def test_stacks_have_as_many_parameters():
    w = Statement("lstms", 8, 2, 64, 64)
    built = [p.build(replace(w, function=p.function)) for p in STACK_PROVIDERS.values()]
    assert {sum(p.numel() for p in stack.parameters() if p.ndim == 2) for stack in built} == {16 * 64 * 64}


def order(name, variant):
    provider = STACK_PROVIDERS[name]
    w = Statement(provider.function, 12, 3, 16, 16, dtype="float64", task="order", variant=variant, seeds=2)
    return w.measure(provider)


def test_who_knows_the_order():
    """An encoder does not without positions. A decoder of two blocks does: its mask tells it."""
    assert order(ENCODER, PLAIN).high < 1e-14
    assert order(ENCODER, POSITIONED).low > 1e-4
    assert min(order(name, PLAIN).low for name in (DECODER, LSTMS, HYBRID)) > 1e-4


@pytest.mark.parametrize(("cached", "reach"), [(False, 3), (True, 11)])
def test_cached_segments_reach_as_far_as_their_layers_carry(cached, reach):
    """Two layers, segments of four: the last logits see the tokens of their segment, and four more for each layer."""
    torch.manual_seed(0)
    model = fastseq.models.TransformerXL(16, 8, 2, 16, 2, 4, same_length=False).double()
    x = torch.randint(8, (1, 16))
    seen = []
    with torch.no_grad():
        for distance in range(16):
            other = x.clone()
            other[:, 15 - distance] += 8
            of_both = [through_segments(model, tokens, 4, cached=cached)[:, -1] for tokens in (x, other)]
            if (of_both[0] - of_both[1]).abs().max() > 1e-9:
                seen.append(distance)
    assert seen == list(range(reach + 1))
    assert through_segments(model, x[:, :14], 4, cached=cached).shape == (1, 14, 16)


def test_a_token_within_the_cache_is_learned():
    provider = EVERY_PROVIDER[statements.XL]
    given = {"span": 4, "seeds": 1, "budget": 60}
    cached, alone = (
        Context("Transformer-XL", 6, 32, 32, 32, variant=variant, **given).measure(provider) for variant in (CACHED, ALONE)
    )
    assert cached.median < 0.5 and alone.median > 1.5


def test_rows_of_a_run():
    for group in ("stacks, recall", statements.CONTEXT[CACHED]):
        case = next(case for case in statements.plan(QUICK) if case.group == group)
        small = tuple(replace(p, workload=replace(p.workload, T=5, B=2, I=16, H=16, budget=2)) for p in case.participants)
        rows = Runner("cpu", quick=True).run(replace(case, participants=small))
        assert all(row.status == "ok" and row.metric and row.check["ok"] for row in rows) and len(rows) == len(case.participants)
