"""Hashed attention: its textbook form by hand, the library's hash, and programs that do something else."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fastseq.benchmarks.measure.check import check_provider, problem_of
from fastseq.benchmarks.providers.attention import ATTENTION_PROVIDERS, REFORMER
from fastseq.benchmarks.workloads import hashed
from fastseq.benchmarks.workloads.attention import CASES, AttentionWorkload, plain

W = AttentionWorkload("hashed", 64, 2, 32, 32, "training", heads=2, causal=True, block=8)
SHORT = replace(W, block=4)  # with more buckets than one hash tells apart
needs_library = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")


def test_buckets_are_two_for_each_chunk():
    assert [hashed.factors(w) for w in (W, SHORT, replace(W, T=2048, block=64), replace(W, T=16384, block=64))] == [
        [16],
        [4, 8],
        [64],
        [16, 32],
    ]


@pytest.mark.parametrize("w", [W, SHORT], ids=["one hash", "two hashes"])
def test_a_bucket_is_the_largest_coordinate_after_a_rotation(w):
    q = torch.randn(w.B, w.T, w.heads, w.E)
    before = torch.get_rng_state()
    found = hashed.buckets(w, q.double())
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(hashed.SEED)
    parts = hashed.factors(w)
    rotations = torch.randn(w.heads, w.E, sum(parts) // 2).double()
    for b, h, t in ((0, 0, 0), (1, 1, 63), (1, 0, 17), (0, 1, 30)):
        turned, expected, before_it = (q[b, t, h].double() @ rotations[h]).tolist(), 0, 1
        for n in parts:
            own, turned = turned[: n // 2], turned[n // 2 :]
            signed = own + [-x for x in own]
            expected += before_it * signed.index(max(signed))
            before_it *= n
        assert found[b, h, t] == expected
    assert found.min() >= 0 and found.max() < 16 * (1 + (w is SHORT)) and len(found.unique()) > 8


@pytest.mark.parametrize("causal", [True, False])
def test_who_sees_whom_by_hand(causal):
    """Eight positions in four chunks of two."""
    w = replace(W, T=8, B=1, heads=1, block=2, causal=causal)
    of = [2, 0, 1, 0, 2, 1, 0, 5]
    order = sorted(range(8), key=lambda t: (of[t], t))
    assert order == [1, 3, 6, 2, 5, 0, 4, 7]
    chunks = [order[2 * n : 2 * n + 2] for n in range(4)]
    seen = hashed.visible(w, torch.tensor(of).view(1, 1, 8))[0, 0]
    for n, chunk in enumerate(chunks):
        for i in chunk:
            expected = {j for j in chunk + chunks[n - 1] if j <= i or not causal}
            assert set(seen[i].nonzero().flatten().tolist()) == expected


def test_one_chunk_is_attention_to_every_other_position():
    w = replace(W, T=20, block=20)
    problem = w.problem()
    found = w.call(CASES["hashed"].eager, problem, dtype=torch.float64).outputs()["output"]
    q, v = (problem.tensors[name].transpose(1, 2) for name in "qv")
    keys = q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    others = torch.ones(20, 20, dtype=torch.bool).tril(-1)
    others[0, 0] = True
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, keys, v, others))


@needs_library
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("w", [W, SHORT, replace(W, block=64)], ids=["one hash", "two hashes", "one chunk"])
def test_the_library_passes_the_gate(w, dtype):
    provider, w = ATTENTION_PROVIDERS[REFORMER], replace(w, dtype=dtype)
    assert provider.unavailable(w) is None
    result = check_provider(lambda shape: (provider.build(shape), ""), w)
    assert result.ok, result.reason
    assert result.error <= result.bound
    call = w.call(provider.build(w), problem_of(w))
    (said,) = provider.chose(call)
    assert said == (
        "one chunk, no hashing" if w.block == 64 else f"one round, {32 if w.block == 4 else 16} buckets, chunks of {w.block}"
    )


def _other(**change):
    """The textbook form of another workload, on the same tensors."""

    def program(w, q, v, buckets):
        return hashed._eager(replace(w, **change), q, v, buckets)

    return program


def _other_hash(w, q, v, buckets):
    return hashed._eager(w, q, v, buckets.roll(1, -1))


def _sees_itself(w, q, v, buckets):
    q, v = q.transpose(1, 2), v.transpose(1, 2)
    keys = q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return F.scaled_dot_product_attention(q, keys, v, hashed.visible(w, buckets))


def _no_gradient_of_keys(w, q, v, buckets):
    whole = hashed._eager(w, q, v, buckets)
    return whole + (whole.detach() - whole) * 1e-3


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (_other(causal=False), "output is off by"),
        (_other(block=4), "output is off by"),
        (_other_hash, "output is off by"),
        (_sees_itself, "output is off by"),
        (_no_gradient_of_keys, "grad q is off by"),
    ],
)
def test_what_is_not_hashed_attention_is_refused(program, reason):
    assert check_provider(lambda shape: (CASES["hashed"].eager, ""), W).ok
    result = check_provider(lambda shape: (plain(program), ""), W)
    assert not result.ok and reason in result.reason


def test_the_small_shape_keeps_what_it_is():
    assert (W.small().T, W.small().block) == (64, 8)
    long = replace(W, T=2048, block=64)
    assert (long.small().T, long.small().block) == (64, 16)
    assert replace(long, block=2048).small().block == replace(long, block=2048).small().T


def test_without_the_library_the_reason_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'transformers>=5.23'" in ATTENTION_PROVIDERS[REFORMER].unavailable(W)
