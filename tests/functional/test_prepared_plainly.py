"""The short way of checking a plain call of attention: what it takes becomes what the long way makes of it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq import functional as F
from fastseq.backends import library
from fastseq.choice import sources
from fastseq.choice.decision import Candidate
from fastseq.functional import _attention as calls
from fastseq.functional._attention_call import Options, prepared, prepared_plainly

B, HQ, HKV, TQ, TK, E, EV = 2, 4, 2, 5, 7, 8, 6


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype)


# Of every option what may be given, right or wrong or rare, in a call of B, HQ, HKV, TQ, TK, E as above.
GIVEN: dict[str, list[Any]] = {
    "layout": [None, "bhsd", "bshd", "thd", "sbhd"],
    "attn_mask": [
        torch.rand(TQ, TK) < 0.5,
        torch.rand(B, 1, 1, TK) < 0.5,
        torch.rand(HQ, TQ, TK) < 0.5,
        torch.rand(B, HQ, 3, TK) < 0.5,
        torch.rand(TK) < 0.5,
        normal(TQ, TK),
        True,
    ],
    "attn_bias": [normal(B, HQ, TQ, TK), normal(1, HQ, TQ, TK), normal(TQ, TK), normal(TK), normal(B, 3, TQ, TK),
                  normal(TQ, TK).double()],
    "causal": [True, False, 1, "bottom_right"],
    "window_size": [None, (3, None), [2, 2], (-1, 4), (3,), 3, (3, -2), (1.0, 2)],
    "alignment": [None, "top_left", "bottom_right", "right"],
    "offset": [None, 0, 2],
    "scale": [None, 1.0, 2, float("nan"), "1"],
    "softcap": [0.0, 3.0, 2, -1.0, float("inf"), float("nan"), True, "3"],
    "alibi_slopes": [normal(HQ), normal(B, HQ), normal(1, HQ).double(), normal(HQ, 2)[:, 0], normal(HQ).half(), None, 1.0,
                     normal(3, HQ), normal(HKV), normal(B, HQ, 1), torch.ones(HQ).int(), normal(HQ).requires_grad_()],
    "relative_bias": [normal(HQ, 9), normal(1, 9), normal(HQ, 8), normal(HQ, 9).double(), normal(HQ), normal(9, HQ).T],
    "relative_bias_zero": [None, 3, 3.0],
    "relative_query": [normal(B, HQ, TQ, E), normal(B, HQ, TQ, E + 1)],
    "relative_key": [normal(HQ, 9, E), normal(1, 9, E), normal(HQ, 9, E + 1)],
    "relative_key_zero": [4, None, "4"],
    "sinks": [None, normal(HQ), normal(HQ, 2)[:, 0], normal(HKV), normal(1, HQ), normal(HQ).double(), 1.0],
    "dropout_p": [0.0, 0, 0.25, 1.5, "0"],
    "seqlens_q": [torch.tensor([5, 2]), torch.tensor([5, 6]), torch.tensor([0, 1], dtype=torch.int32), torch.tensor([1])],
    "seqlens_k": [torch.tensor([7, 0]), torch.tensor([-1, 2]), torch.tensor([7.0, 1.0]), [7, 1]],
    "block_size": [None, 16],
}  # fmt: skip
COMMON: dict[str, dict[str, Any]] = {
    "nothing": {},
    "T5": {"relative_bias": GIVEN["relative_bias"][0], "scale": 1.0, "seqlens_k": GIVEN["seqlens_k"][0], "alignment": "top_left"},
    "a step of T5": {"relative_bias": GIVEN["relative_bias"][2], "relative_bias_zero": 7, "alignment": "bottom_right"},
    "scores of another layer": {"attn_bias": GIVEN["attn_bias"][0], "seqlens_k": GIVEN["seqlens_k"][0]},
    "memory before a block": {"causal": True, "alignment": "bottom_right", "scale": 1.0, "dropout_p": 0.5},
    "a window": {"window_size": (2, 2), "alignment": "top_left", "seqlens_q": GIVEN["seqlens_q"][0],
                 "attn_mask": GIVEN["attn_mask"][1]},
    "Transformer-XL": {"relative_query": GIVEN["relative_query"][0], "relative_key": GIVEN["relative_key"][1],
                       "relative_key_zero": 6, "causal": True, "alignment": "bottom_right", "window_size": (3, None)},
    "ALiBi": {"alibi_slopes": GIVEN["alibi_slopes"][0], "causal": True, "alignment": "bottom_right"},
    "capped scores": {"softcap": 3.0, "seqlens_k": GIVEN["seqlens_k"][0]},
    "sinks in a window": {"sinks": GIVEN["sinks"][1], "window_size": (2, 0), "alignment": "bottom_right"},
}  # fmt: skip


def inputs(layout: Any, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    made = normal(B, HQ, TQ, E, dtype=dtype), normal(B, HKV, TK, E, dtype=dtype), normal(B, HKV, TK, EV, dtype=dtype)
    return [t.transpose(1, 2).contiguous() for t in made] if layout == "bshd" else list(made)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    return type(a) is type(b) and a == b


def as_the_long_way(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> bool:
    """Whether the short way takes the call."""
    found = prepared_plainly(q, k, v, options)
    if found is None:
        return False
    wanted = prepared(q, k, v, Options(**options))  # raises nothing
    for name, a, b in zip(("q", "k", "v"), found[:3], wanted[:3], strict=True):
        assert same(a, b), name
    for name, a, b in zip(wanted.spec._fields, found.spec, wanted.spec, strict=True):
        assert same(a, b), (name, a, b, options)
    return True


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("name", COMMON)
def test_what_models_ask_for_goes_the_short_way(name, layout):
    options = COMMON[name] | {"layout": layout}
    if layout == "bshd" and "relative_query" in options:
        options["relative_query"] = options["relative_query"].transpose(1, 2)
    assert as_the_long_way(*inputs(layout), options)


def test_whatever_is_given_it_is_as_the_long_way_or_left_to_it():
    """Random choices of options, most of them wrong somewhere; each value of each option alone as well."""
    generator, taken = random.Random(0), 0
    alone = [{name: value} for name, values in GIVEN.items() for value in values]
    many = [
        {name: generator.choice(GIVEN[name]) for name in generator.sample(list(GIVEN), generator.randint(2, 6))}
        for _ in range(1500)
    ]
    for options in alone + many:
        q, k, v = inputs(options.get("layout"))
        taken += as_the_long_way(q, k, v, options)
    assert taken > 80


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q.double(), k, v),
        lambda q, k, v: (q.int(), k.int(), v.int()),
        lambda q, k, v: (q[0], k[0], v[0]),
        lambda q, k, v: (q, k[:1], v[:1]),
        lambda q, k, v: (q, k[..., :4], v),
        lambda q, k, v: (q, k, v[:, :, :5]),
        lambda q, k, v: (q[:, :3], k, v),
        lambda q, k, v: (q[:, :, :0], k, v),
        lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]),
        lambda q, k, v: (q.numpy(), k, v),
        lambda q, k, v: (q, None, v),
        lambda q, k, v: (q.to("meta"), k.to("meta"), v.to("meta")),
        lambda q, k, v: (q.repeat(1, 50, 1, 1), k, v),  # 200 heads, without a layout
    ],
)
def test_tensors_that_do_not_fit_are_left_to_the_long_way(change):
    assert prepared_plainly(*change(*inputs(None)), {}) is None


@pytest.mark.skipif(library.reason() is not None, reason="needs the library")
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_ways_give_the_same_bits_and_gradients(dtype, return_lse, monkeypatch):
    for name, options in COMMON.items():
        options = {n: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in options.items()}
        tensors = {"q": None, "k": None, "v": None} | {
            n: t for n, t in options.items() if isinstance(t, Tensor) and t.is_floating_point() and n != "alibi_slopes"
        }
        torch.manual_seed(1)
        tensors |= dict(zip(("q", "k", "v"), inputs(None, dtype), strict=True))
        of_both = []
        for short in (True, False):
            with monkeypatch.context() as patch:
                asked = []
                shortly = prepared_plainly if short else (lambda *_: None)
                patch.setattr(calls, "prepared_plainly", lambda *given, way=shortly, asked=asked: asked.append(1) or way(*given))
                patch.setattr(calls, "_in_one_call", lambda *_: None)
                leaves = {n: t.detach().clone().requires_grad_() for n, t in tensors.items()}
                torch.manual_seed(2)  # of the dropout
                out = F.attention(**options | leaves, return_lse=return_lse)
                loss = sum(t.masked_fill(t == -torch.inf, 0).square().sum() for t in (out if return_lse else (out,)))
                grads = torch.autograd.grad(loss, list(leaves.values()))
                assert asked == [1]
                of_both.append([*(out if return_lse else (out,)), *grads])
        for a, b in zip(*of_both, strict=True):
            assert torch.equal(a, b), name


@pytest.mark.skipif(library.reason() is not None, reason="needs the library")
@pytest.mark.parametrize("choice", ["torch", "cpu"])
@pytest.mark.parametrize("causal", [False, True])
def test_time_before_heads_is_the_same_call_with_its_derivatives(choice, causal):
    """Whoever runs it: results, gradients and, of ours, gradients of gradients are those of the transposed call."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 18, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def of(out: Tensor) -> list[Tensor]:
        twice = choice == "cpu"  # torch's fused kernel has no second derivative
        grads = torch.autograd.grad(out.sin().sum(), (q, k, v), create_graph=twice)
        return [out, *grads, *(torch.autograd.grad(sum(g.square().sum() for g in grads), (q, k, v)) if twice else ())]

    with sources.instead(lambda call: Candidate(choice)):
        found = of(F.attention(q, k, v, layout="bshd", causal=causal))
        with torch.no_grad():
            torch.testing.assert_close(F.attention(q, k, v, layout="bshd", causal=causal), found[0])
        expected = of(F.attention(*(t.transpose(1, 2) for t in (q, k, v)), layout="bhsd", causal=causal).transpose(1, 2))
    torch.testing.assert_close(found, expected)
    textbook = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=causal)
    torch.testing.assert_close(found[0], textbook.transpose(1, 2))
