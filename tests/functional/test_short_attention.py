"""Attention in one native call: what goes that way gives what the long way gives, with its derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq import functional as F
from fastseq.backends import library
from fastseq.choice import sources
from fastseq.choice.decision import Candidate, Point
from fastseq.functional import _attention as calls

pytestmark = pytest.mark.skipif(library.reason() is not None, reason="needs the library")
B, HQ, HKV, E = 2, 4, 2, 8


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture
def both(monkeypatch):
    """What a function gives when `attention` goes the short way, which is made sure of, and when it goes the long way."""

    def run(call: Any) -> tuple[Any, Any]:
        taken: list[bool] = []
        attended = calls.eager.attended
        with monkeypatch.context() as patch:
            patch.setattr(calls.eager, "attended", lambda *given: taken.append(True) or attended(*given))
            short = call()
        assert taken
        with monkeypatch.context() as patch:
            patch.setattr(calls, "plain_call", lambda unseen: False)
            return short, call()

    return run


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize(("queries", "keys"), [(3, 7), (7, 3), (5, 5), (1, 6)])
@pytest.mark.parametrize("wanted", ["qkv", "v", "qk"])
def test_causal_at_the_end_of_the_keys(both, layout, queries, keys, wanted):
    torch.manual_seed(0)
    shapes = (B, HQ, queries, E), (B, HKV, keys, E), (B, HKV, keys, E)
    given = [normal(*shape) if layout == "bhsd" else normal(*shape).transpose(1, 2).contiguous() for shape in shapes]
    leaves = [t.requires_grad_() for t, name in zip(given, "qkv", strict=True) if name in wanted]

    def call() -> list[Tensor]:
        out = F.attention(*given, layout=layout, causal=True, alignment="bottom_right", scale=0.7)
        grads = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        return [out, *grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)]

    torch.testing.assert_close(*both(call))


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("shape", [(5, 6), (HQ, 1, 6), (B, 1, 5, 1), (1, HQ, 5, 6), (B, HQ, 5, 6)], ids=str)
@pytest.mark.parametrize("alone", [False, True])
def test_gradient_of_a_bias(both, layout, shape, alone):
    """Alone: the only one that is wanted, as where the scores are made by another layer."""
    torch.manual_seed(1)
    shapes = (B, HQ, 5, E), (B, HKV, 6, E), (B, HKV, 6, E)
    given = [normal(*of) if layout == "bhsd" else normal(*of).transpose(1, 2).contiguous() for of in shapes]
    bias = normal(*shape).requires_grad_()
    leaves = [bias] if alone else [*(t.requires_grad_() for t in given), bias]

    def call() -> list[Tensor]:
        out = F.attention(*given, layout=layout, attn_bias=bias)
        grads = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        return [out, *grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)]

    torch.testing.assert_close(*both(call))


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("length", [1, 4, 9])
@pytest.mark.parametrize("by_distance", [False, True])
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_a_query_against_rows_of_one_length(both, layout, length, by_distance, alignment):
    """What lies beyond the length, NaN, has no part in it; nor has a row of another length, which goes the long way."""
    torch.manual_seed(2)
    q, k, v = normal(B, HQ, 1, E), normal(B, HKV, 9, E), normal(B, HKV, 9, E)
    k[:, :, length:], v[:, :, length:] = torch.nan, torch.nan
    given = [t if layout == "bhsd" else t.transpose(1, 2).contiguous() for t in (q, k, v)]
    options: dict[str, Any] = {"layout": layout, "seqlens_k": torch.full((B,), length), "alignment": alignment}
    if by_distance:
        options |= {"relative_bias": normal(HQ, 17), "relative_bias_zero": 8}
    with torch.no_grad():
        short, long = both(lambda: F.attention(*given, **options))
        assert not long.isnan().any()
        torch.testing.assert_close(short, long)
        options["seqlens_k"] = torch.tensor([length, max(length - 1, 1)])
        unlike = F.attention(*given, **options)
    torch.testing.assert_close(unlike[0], long[0])


@pytest.mark.parametrize("gradients", [False, True])
def test_the_place_of_queries_is_no_guess_where_rows_are_shorter_than_the_keys(gradients):
    """Be it that the rows are as long as the queries."""
    q, k = normal(B, HQ, 4, E).requires_grad_(), normal(B, HQ, 6, E)
    with torch.set_grad_enabled(gradients), pytest.raises(ValueError, match="alignment"):
        F.attention(q, k, k, causal=True, seqlens_k=torch.full((B,), 4))


def test_what_a_bias_by_distance_lacks_is_left_to_the_long_way():
    torch.manual_seed(3)
    q, k, v, table = normal(B, HQ, 1, E), normal(B, HQ, 9, E), normal(B, HQ, 9, E), normal(HQ, 5)
    with torch.no_grad():  # five entries of nine distances: the others are zeros
        out = F.attention(q, k, v, relative_bias=table, relative_bias_zero=4, alignment="bottom_right")
        bias = torch.nn.functional.pad(table, (4, 0))[:, None]
        torch.testing.assert_close(out, F.attention(q, k, v, attn_bias=bias))
        with pytest.raises(ValueError, match="alignment"):
            F.attention(q, k, v, relative_bias=table, relative_bias_zero=4)
        with pytest.raises(RuntimeError, match="seqlens_k"):
            F.attention(q, k, v, seqlens_k=torch.full((B,), 10))
        with pytest.raises(ValueError, match="relative_bias_zero"):
            F.attention(q, k, v, relative_bias_zero=4)


def test_options_that_are_none_keep_a_call_short(both):
    """As models hand on what they were not given; a name that there is not, and what is given, are heard all the same."""
    torch.manual_seed(4)
    q, k, v = normal(B, HQ, 5, E), normal(B, HQ, 6, E), normal(B, HQ, 6, E)
    unused: dict[str, Any] = {"seqlens_q": None, "window_size": None, "sinks": None}
    plain, _ = both(lambda: F.attention(q, k, v, scale=0.7, **unused))
    torch.testing.assert_close(plain, F.attention(q, k, v, scale=0.7), rtol=0, atol=0)
    capped = F.attention(q, k, v, scale=0.7, softcap=0.1, **unused)
    assert not torch.allclose(capped, plain)
    with pytest.raises(TypeError, match="heads"):
        F.attention(q, k, v, heads=None)


class TestShortest:
    """Without gradients and masks: one look at what is given, and the library does the rest or declines."""

    @pytest.fixture
    def asked(self, monkeypatch) -> list[bool]:
        """Of each call that went this way, whether the library took it."""
        found: list[bool] = []
        q = normal(1, 1, 1, E)
        with torch.no_grad():
            F.attention(q, q, q)  # what is decided once
        native, how = calls.eager.shortest[False]

        def counted(*given: Any) -> Any:
            out = native(*given)
            found.append(out is not None)
            return out

        monkeypatch.setitem(calls.eager.shortest, False, (counted, how))
        with torch.no_grad():
            yield found

    def long(self, monkeypatch, *given: Any, **options: Any) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(calls, "plain_call", lambda unseen: False)
            return F.attention(*given, **options)

    @pytest.mark.parametrize("layout", [None, "bhsd", "bshd"])
    @pytest.mark.parametrize(("queries", "keys"), [(1, 6), (5, 5), (3, 7), (7, 3)])
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("scale", [None, 0.7, 0.0, -1.0])
    def test_what_it_takes(self, asked, monkeypatch, layout, queries, keys, causal, scale):
        torch.manual_seed(5)
        q, k, v = normal(B, HQ, queries, E), normal(B, HKV, keys, E), normal(B, HKV, keys, E + 3)
        given = [t.transpose(1, 2).contiguous() for t in (q, k, v)] if layout == "bshd" else [q, k, v]
        for alignment in ("bottom_right", "top_left", None):
            if causal and alignment is None and queries != keys:
                continue
            options: dict[str, Any] = {"layout": layout, "causal": causal, "scale": scale, "alignment": alignment}
            out = F.attention(*given, **options)
            assert asked.pop() == (not causal or queries == keys or alignment == "bottom_right") and not asked
            torch.testing.assert_close(out, self.long(monkeypatch, *given, **options))

    def test_what_it_leaves_to_others(self, asked, monkeypatch):
        q, k = normal(B, HQ, 3, E), normal(B, HKV, 4, E)
        errors: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
            ((q, k, k), {"causal": True}, ValueError, "alignment"),
            ((q, k, k), {"alignment": "middle"}, ValueError, "alignment"),
            ((q, k, k), {"layout": "bhds"}, ValueError, "layout"),
            ((q, k, k), {"layout": ["bhsd"]}, ValueError, "layout"),
            ((q, k, k), {"scale": torch.inf}, ValueError, "scale"),
            ((q, k, k), {"scale": torch.nan}, ValueError, "scale"),
            ((q, k, k), {"scale": "1"}, TypeError, "scale"),
            ((k, k, k), {"causal": 1}, TypeError, "causal"),
            ((q, k, k), {"dropout_p": 1.5}, ValueError, "dropout_p"),
            ((q, k, k), {"dropout_p": None}, TypeError, "dropout_p"),
            ((q, k, k), {"heads": None}, TypeError, "heads"),
            ((q, k, k), {"return_weights": 2}, ValueError, "return_weights"),
            ((q[0], k[0], k[0]), {}, RuntimeError, "q must be"),
            ((q, k[:, :, :, :4], k), {}, RuntimeError, "features"),
            ((q, k, k[:, :, :2]), {}, RuntimeError, "length"),
            ((q[:, :3], k, k), {}, RuntimeError, "heads"),
            ((q, k.float(), k), {}, RuntimeError, "dtype"),
            ((q, k, "v"), {}, TypeError, "v"),
        ]
        for given, options, kind, match in errors:
            with pytest.raises(kind, match=match):
                F.attention(*given, **options)
        assert True not in asked
        many = normal(1, 129, 2, E)
        with pytest.warns(UserWarning, match="layout"):
            F.attention(many, many, many)
        assert True not in asked
        torch.testing.assert_close(
            F.attention(many, many, many, layout="bhsd"), self.long(monkeypatch, many, many, many, layout="bhsd")
        )
        assert asked.pop()

    def test_what_has_a_say(self, asked):
        """A subclass, a nested tensor, a mode, a transform, autocast, a wish, a watcher, gradients."""
        q = normal(B, HQ, 3, E)

        class Own(Tensor):
            pass

        assert type(F.attention(q.as_subclass(Own), q, q)) is not None
        nested = torch.nested.nested_tensor([normal(HQ, 3, E), normal(HQ, 2, E)])
        for given in ((nested, q, q), (q, nested, q), (q, q, nested)):
            with pytest.raises(ValueError, match="nested"):
                F.attention(*given)
        torch.func.vmap(lambda x: F.attention(x[None], q[:1], q[:1]))(q)
        with torch.autocast("cpu", torch.bfloat16):
            assert F.attention(q.float(), q.float(), q.float()).dtype == torch.bfloat16
        with fastseq.use_backend("reference"):
            F.attention(q, q, q)
        assert "cpu" in str(fastseq.explain(lambda x: F.attention(x, x, x), q))
        with torch.enable_grad():
            assert F.attention(q.clone().requires_grad_(), q, q).requires_grad
        assert not asked
        F.attention(q, q, q)
        assert asked == [True]

    def test_from_as_many_keys_on_as_were_measured_to_be_torchs(self, monkeypatch):
        """Nearer than what was measured, sizes are looked at."""
        shape = {"q": (1, 8, 1, E), "k": (1, 8, 64, E)}
        points = {
            ("attention", "inference", "plain", "float64", "", "padded", 1): [
                Point((8, 1, 64, E), (Candidate("torch", us=1.0),), "")
            ]
        }
        monkeypatch.setattr(sources.shipped, "points_for", lambda *device: (points, "another"))
        sources.forget()
        try:
            q, k = normal(*shape["q"]), normal(*shape["k"])
            with torch.no_grad():
                for keys, expected in ((64, True), (8, True), (7, False)):
                    F.attention(q, k[:, :, :keys], k[:, :, :keys])
                    native, how = calls.eager.shortest[False]
                    assert how >> 7 == 8
                    declined = native(q, k[:, :, :keys], k[:, :, :keys], 0.0, how) is None
                    assert declined == expected
        finally:
            monkeypatch.undo()
            sources.forget()
