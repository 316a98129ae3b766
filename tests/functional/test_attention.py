"""The functional form of attention against dense formulas, written here: features, layouts, errors, helpers."""

from __future__ import annotations

import dataclasses
import inspect
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastseq
from fastseq import functional as F
from fastseq.functional._attention_call import AttentionOptions, Options
from support.modules import FP64

B, HQ, HKV, TQ, TK, E, EV = 2, 4, 2, 18, 21, 8, 6
LENGTH = TQ + TK - 1
GRADIENTS: dict[str, Any] = dict(rtol=1e-12, atol=1e-13)  # sums of some hundred terms, in another order


def normal(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_(grad)


def inputs(tq: int = TQ, tk: int = TK) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(q=normal(B, HQ, tq, E), k=normal(B, HKV, tk, E), v=normal(B, HKV, tk, EV))


def distances(tq: int = TQ, tk: int = TK, shift: int = 0) -> Tensor:
    """[tq, tk]: how far behind the query's place a key stands."""
    return torch.arange(tk)[None] - (torch.arange(tq)[:, None] + shift)


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    before: Tensor | float = 0.0,
    after: Tensor | float = 0.0,
    allowed: Tensor | None = None,
    scale: float = E**-0.5,
    cap: Callable[[Tensor], Tensor] = lambda s: s,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and weights; `before` is added before the scale, `after` at the end."""
    group = q.shape[1] // k.shape[1]
    scores = cap((q @ k.repeat_interleave(group, 1).mT + before) * scale) + after
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)), -1)
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    safe = scores.masked_fill(dead, 0)
    weights = torch.softmax(safe, -1).masked_fill(dead, 0)
    lse = torch.logsumexp(safe, -1).masked_fill(dead.squeeze(-1), -torch.inf)
    if sinks is not None:
        weights = weights[..., :-1]
    return weights @ v.repeat_interleave(group, 1), lse, weights


def from_table(table: Tensor, zero: int, at: Tensor) -> Tensor:
    """[H, Tq, Tk] of [H, L]."""
    index = at + zero
    inside = (index >= 0) & (index < table.shape[-1])
    return torch.where(inside, table[:, index.clamp(0, table.shape[-1] - 1)], 0)


def everything() -> tuple[dict[str, Any], dict[str, Any]]:
    """Features that combine, and the same for `dense`."""
    options = dict(
        attn_mask=torch.rand(B, 1, TQ, TK) > 0.2,
        attn_bias=normal(HQ, 1, TK),
        causal=True,
        alignment="bottom_right",
        window_size=(9, 4),
        scale=0.4,
        softcap=2.0,
        relative_bias=normal(HQ, 11),
        sinks=normal(HQ),
    )
    at = distances(shift=TK - TQ)
    relative = from_table(options["relative_bias"], 5, at)
    allowed = options["attn_mask"] & (at <= 0) & (at >= -9)
    return options, dict(
        after=options["attn_bias"] + relative,
        allowed=allowed,
        scale=0.4,
        cap=lambda s: 2 * torch.tanh(s / 2),
        sinks=options["sinks"],
    )


def relative_keys() -> tuple[dict[str, Any], dict[str, Any]]:
    rq, rk = normal(B, HQ, TQ, E), normal(HQ, 15, E)
    index = distances() + 8
    inside = (index >= 0) & (index < 15)
    product = torch.einsum("bhie,hije->bhij", rq, rk[:, index.clamp(0, 14)])
    return dict(relative_query=rq, relative_key=rk, relative_key_zero=8, alignment="top_left"), dict(
        before=torch.where(inside, product, 0)
    )


def shared_relative_keys() -> tuple[dict[str, Any], dict[str, Any]]:
    rq, rk = normal(B, HQ, TQ, E), normal(1, LENGTH, E)
    product = torch.einsum("bhie,ije->bhij", rq, rk[0, distances() + TQ - 1])
    return dict(relative_query=rq, relative_key=rk, relative_key_zero=TQ - 1, alignment="top_left"), dict(before=product)


def bias_of(*shape: int) -> Callable[[], tuple[dict[str, Any], dict[str, Any]]]:
    def options() -> tuple[dict[str, Any], dict[str, Any]]:
        bias = normal(*shape)
        return dict(attn_bias=bias), dict(after=bias)

    return options


def mask_of(*shape: int) -> Callable[[], tuple[dict[str, Any], dict[str, Any]]]:
    def options() -> tuple[dict[str, Any], dict[str, Any]]:
        mask = torch.rand(shape) > 0.4
        return dict(attn_mask=mask), dict(allowed=mask)

    return options


def windowed(left: int, right: int, shift: int = 0, **options: Any) -> Callable[[], tuple[dict[str, Any], dict[str, Any]]]:
    at = distances(shift=shift)
    allowed = (at >= -left if left >= 0 else at == at) & (at <= right if right >= 0 else at == at)
    return lambda: (options, dict(allowed=allowed))


def lengths() -> tuple[dict[str, Any], dict[str, Any]]:
    seqlens_q, seqlens_k = torch.tensor([18, 7]), torch.tensor([0, 13], dtype=torch.int32)
    allowed = (torch.arange(TQ)[:, None] < seqlens_q[:, None, None]) & (torch.arange(TK) < seqlens_k[:, None, None])
    return dict(seqlens_q=seqlens_q, seqlens_k=seqlens_k), dict(allowed=allowed[:, None])


def aligned_lengths() -> tuple[dict[str, Any], dict[str, Any]]:
    seqlens_q, seqlens_k = torch.tensor([5, 18]), torch.tensor([13, 3])
    i, j = torch.arange(TQ)[:, None], torch.arange(TK)
    tq, tk = seqlens_q[:, None, None], seqlens_k[:, None, None]
    allowed = (i < tq) & (j < tk) & (j <= i + tk - tq)
    return dict(seqlens_q=seqlens_q, seqlens_k=seqlens_k, causal=True, alignment="bottom_right"), dict(allowed=allowed[:, None])


def blocks() -> tuple[dict[str, Any], dict[str, Any]]:
    layout = torch.tensor([[[True, False], [True, True]], [[False, True], [False, False]]]).repeat_interleave(2, 0)
    return (
        dict(block_layout=layout, block_size=16),
        dict(allowed=layout.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :TQ, :TK]),
    )


def alibi(*shape: int) -> Callable[[], tuple[dict[str, Any], dict[str, Any]]]:
    def options() -> tuple[dict[str, Any], dict[str, Any]]:
        slopes = normal(*shape).detach().abs()  # as exact as the scores: rounded to fp32, they would be off by 1e-8
        at = distances(shift=TK - TQ).abs()
        return dict(alibi_slopes=slopes, alignment="bottom_right"), dict(after=-slopes.reshape(-1, HQ, 1, 1) * at)

    return options


def relative_bias(heads: int, entries: int, zero: int | None, at: int) -> Callable[[], tuple[dict[str, Any], dict[str, Any]]]:
    def options() -> tuple[dict[str, Any], dict[str, Any]]:
        table = normal(heads, entries)
        return dict(relative_bias=table, relative_bias_zero=zero, alignment="top_left"), dict(
            after=from_table(table, at, distances())
        )

    return options


def sinks() -> tuple[dict[str, Any], dict[str, Any]]:
    values = normal(HQ)
    allowed = distances(shift=-3) <= 0  # the first three see no key
    return dict(sinks=values, causal=True, offset=-3), dict(sinks=values, allowed=allowed)


FEATURES: dict[str, Callable[[], tuple[dict[str, Any], dict[str, Any]]]] = {
    "plain": lambda: ({}, {}),
    "scale": lambda: (dict(scale=-0.7), dict(scale=-0.7)),
    "softcap": lambda: (dict(softcap=1.5), dict(cap=lambda s: 1.5 * torch.tanh(s / 1.5))),
    "mask [Tq, Tk]": mask_of(TQ, TK),
    "mask [Hq, 1, Tk]": mask_of(HQ, 1, TK),
    "mask [B, 1, Tq, 1]": mask_of(B, 1, TQ, 1),
    "bias [Tq, Tk]": bias_of(TQ, TK),
    "bias [1, Tq, 1]": bias_of(1, TQ, 1),
    "bias [B, Hq, Tq, Tk]": bias_of(B, HQ, TQ, TK),
    "bias [B, 1, 1, Tk]": bias_of(B, 1, 1, TK),
    "causal": windowed(-1, 0, causal=True, alignment="top_left"),
    "causal bottom right": windowed(-1, 0, TK - TQ, causal=True, alignment="bottom_right"),
    "causal with offset": windowed(-1, 0, -4, causal=True, offset=-4),
    "window": windowed(3, 2, window_size=(3, 2), alignment="top_left"),
    "window to the left": windowed(3, -1, window_size=(3, None), alignment="top_left"),
    "window to the right": windowed(-1, 2, window_size=(-1, 2), alignment="top_left"),
    "window of one": windowed(0, 0, window_size=(0, 0), alignment="top_left"),
    "window causal": windowed(3, 0, window_size=(3, 5), causal=True, alignment="top_left"),
    "window aligned with offset": windowed(4, 1, TK - TQ + 2, window_size=(4, 1), alignment="bottom_right", offset=2),
    "alibi [Hq]": alibi(HQ),
    "alibi [B, Hq]": alibi(B, HQ),
    "relative bias": relative_bias(HQ, 9, None, 4),
    "relative bias of all heads": relative_bias(1, 8, 2, 2),
    "relative keys": relative_keys,
    "relative keys of all heads": shared_relative_keys,
    "sinks": sinks,
    "lengths": lengths,
    "lengths aligned": aligned_lengths,
    "blocks": blocks,
    "everything": everything,
}


def gradients(outputs: tuple[Tensor, ...], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    cotangents = []
    for out in outputs:
        cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        cotangents.append(cotangent.masked_fill(~out.isfinite(), 0))
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents, retain_graph=True)
    return dict(zip(leaves, grads, strict=True))


def swapped(layout: str, tensor: Tensor) -> Tensor:
    return tensor if layout == "bhsd" else tensor.transpose(1, 2)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("name", FEATURES)
def test_features(name, layout):
    """Output, lse, weights and every gradient."""
    tensors = inputs()
    options, same = FEATURES[name]()
    leaves = tensors | {n: t for n, t in options.items() if isinstance(t, Tensor) and t.requires_grad}
    expected = dense(**tensors, **same)
    given = {n: swapped(layout, t) for n, t in tensors.items()}
    asked = options | {n: swapped(layout, t) for n, t in options.items() if n == "relative_query"}
    out, lse, weights = F.attention(**given, **asked, layout=layout, return_lse=True, return_weights=True)
    actual = (swapped(layout, out), lse, weights)
    torch.testing.assert_close(actual, expected, **FP64)
    torch.testing.assert_close(gradients(actual, leaves), gradients(expected, leaves), **GRADIENTS)


if "cpu" in fastseq.backends.BACKENDS["triton"].devices:  # in its interpreter

    @pytest.mark.parametrize("name", ["everything", "relative keys of all heads"])
    def test_features_on_triton(name):
        with fastseq.use_backend("triton"):
            test_features(name, "bshd")


@pytest.mark.parametrize("name", ["plain", "bias [1, Tq, 1]", "sinks", "relative bias", "everything"])
def test_averaged_weights(name):
    tensors = inputs()
    options, same = FEATURES[name]()
    leaves = {n: t for n, t in (tensors | options).items() if isinstance(t, Tensor) and t.requires_grad and n != "v"}
    _, weights = F.attention(**tensors, **options, return_weights="average")
    expected = dense(**tensors, **same)[2].mean(1)
    torch.testing.assert_close(weights, expected, **FP64)
    torch.testing.assert_close(gradients((weights,), leaves), gradients((expected,), leaves), **GRADIENTS)


PACKED = ["plain", "softcap", "causal", "causal bottom right", "window aligned with offset", "alibi [B, Hq]", "relative bias",
          "relative keys", "sinks", "blocks"]  # fmt: skip
Q_LENGTHS, K_LENGTHS = [18, 0, 7], [5, 4, 21]


@pytest.mark.parametrize("form", ["cu_seqlens", "jagged bhsd", "jagged bshd"])
@pytest.mark.parametrize("name", PACKED)
def test_packed(name, form):
    """Each sequence as if it were alone."""
    options, _ = FEATURES[name]()
    if "alibi_slopes" in options:
        options["alibi_slopes"] = normal(3, HQ).detach()
    if "block_layout" in options:
        options["block_layout"] = options["block_layout"][:1]
    q, k, v = normal(sum(Q_LENGTHS), HQ, E), normal(sum(K_LENGTHS), HKV, E), normal(sum(K_LENGTHS), HKV, EV)
    leaves = dict(q=q, k=k, v=v) | {n: t for n, t in options.items() if isinstance(t, Tensor) and t.requires_grad}
    by_row = {}
    if "relative_query" in options:
        by_row["relative_query"] = leaves["relative_query"] = options["relative_query"] = normal(sum(Q_LENGTHS), HQ, E)
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0) for lengths in (Q_LENGTHS, K_LENGTHS))

    outs, lses = [], []
    for b in range(3):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        own = options | {n: t[None, rows] for n, t in by_row.items()}
        if "alibi_slopes" in own:
            own["alibi_slopes"] = own["alibi_slopes"][b]
        if "block_layout" in own:
            own["block_layout"] = own["block_layout"][..., : -(-Q_LENGTHS[b] // 16), : -(-K_LENGTHS[b] // 16)]
        out, lse = F.attention(q[None, rows], k[None, keys], v[None, keys], **own, layout="bshd", return_lse=True)
        outs.append(out[0])
        lses.append(lse[0])
    expected = torch.cat(outs), torch.cat(lses, 1)

    if form == "cu_seqlens":
        out, lse = F.attention(q, k, v, **options, cu_seqlens_q=cu_q.int(), cu_seqlens_k=cu_k, return_lse=True)
        actual = out, lse
    else:
        layout = form.removeprefix("jagged ")

        def jagged(tensor: Tensor, offsets: Tensor) -> Tensor:
            nested = torch.nested.nested_tensor_from_jagged(tensor, offsets)
            return nested.transpose(1, 2) if layout == "bhsd" else nested

        options |= {n: jagged(t, cu_q) for n, t in by_row.items()}
        nested = jagged(q, cu_q), jagged(k, cu_k), jagged(v, cu_k)
        out, lse = F.attention(*nested, **options, layout=layout, return_lse=True)
        assert (
            out.is_nested
            and out.shape[:-1] == nested[0].shape[:-1]
            and lse.shape == (3, HQ, nested[0].shape[1 + (layout == "bhsd")])
        )
        actual = (out.transpose(1, 2) if layout == "bhsd" else out).values(), lse.values()
    torch.testing.assert_close(actual, expected, **FP64)
    torch.testing.assert_close(gradients(actual, leaves), gradients(expected, leaves), **GRADIENTS)


def test_nested_with_gaps():
    torch.manual_seed(0)
    padded = torch.randn(2, 6, HQ, E)
    begin, length = torch.tensor([1, 0]), torch.tensor([3, 5])
    nested = torch.nested.narrow(padded, 1, begin, length, layout=torch.jagged)
    for layout in ("bshd", "bhsd"):
        given = nested if layout == "bshd" else nested.transpose(1, 2)
        parts = F.attention(given, given, given, layout=layout).unbind()
        for part, rows in zip(parts, (padded[:1, 1:4], padded[1:, :5]), strict=True):
            alone = F.attention(rows, rows, rows, layout="bshd")[0]
            torch.testing.assert_close(part, alone if layout == "bshd" else alone.transpose(0, 1))


def test_what_is_returned():
    tensors = inputs()
    out = F.attention(**tensors)
    assert isinstance(out, Tensor) and out.shape == (B, HQ, TQ, EV)
    assert [t.shape for t in F.attention(**tensors, return_lse=True)] == [(B, HQ, TQ, EV), (B, HQ, TQ)]
    assert [t.shape for t in F.attention(**tensors, return_weights=True)] == [(B, HQ, TQ, EV), (B, HQ, TQ, TK)]
    results = F.attention(**tensors, return_lse=True, return_weights="average")
    assert [t.shape for t in results] == [(B, HQ, TQ, EV), (B, HQ, TQ), (B, TQ, TK)]
    low = {n: t.bfloat16() for n, t in tensors.items()}
    assert [t.dtype for t in F.attention(**low, return_lse=True, return_weights=True)] == [
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
    ]


@pytest.mark.parametrize("what", ["q", "k", "both", "batch"])
def test_empty(what):
    tensors = inputs(0 if what in ("q", "both") else TQ, 0 if what in ("k", "both") else TK)
    if what == "batch":
        tensors = {n: t[:0].detach().requires_grad_() for n, t in tensors.items()}
    out, lse, weights = F.attention(**tensors, return_lse=True, return_weights=True)
    assert out.shape == (*tensors["q"].shape[:3], EV) and lse.shape == out.shape[:3]
    assert weights.shape == (*out.shape[:3], tensors["k"].shape[2])
    assert not out.any() and (lse == -torch.inf).all()
    for grad in gradients((out, lse, weights), tensors).values():
        assert not grad.any()


def test_dropout():
    """The weights are those that the output was made of; what is kept is scaled."""
    tensors = inputs()
    whole = F.attention(**tensors, return_weights=True)[1]
    torch.manual_seed(3)
    out, weights = F.attention(**tensors, dropout_p=0.3, return_weights=True)
    torch.manual_seed(3)
    again = F.attention(**tensors, dropout_p=0.3)
    torch.testing.assert_close(out, again)
    assert not torch.allclose(out, F.attention(**tensors, dropout_p=0.3))
    kept = weights != 0
    torch.testing.assert_close(weights, torch.where(kept, whole / 0.7, 0))
    torch.testing.assert_close(out, weights @ tensors["v"].repeat_interleave(HQ // HKV, 1))
    share = kept.double().mean().item()
    assert abs(share - 0.7) < 5 * (0.3 * 0.7 / kept.numel()) ** 0.5
    assert not F.attention(**tensors, dropout_p=1.0).any()


def test_autocast():
    tensors = {n: t.detach().float().requires_grad_() for n, t in inputs().items()}
    extra: dict[str, Any] = dict(attn_bias=torch.randn(TQ, TK), relative_bias=torch.randn(HQ, 5), sinks=torch.randn(HQ))
    placed: dict[str, Any] = dict(alignment="top_left", return_lse=True)
    low, low_extra = ({n: t.detach().bfloat16() for n, t in group.items()} for group in (tensors, extra))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = F.attention(**tensors, **extra, **placed)
        gradient = torch.autograd.grad(out.float().sum(), tensors["q"])[0]
    expected = F.attention(**low, **low_extra, **placed)
    assert out.dtype == torch.bfloat16 and lse.dtype == gradient.dtype == torch.float32
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


@pytest.mark.parametrize("name", ["plain", "everything", "relative keys"])
def test_second_derivatives(name):
    tensors = inputs()
    options, _ = FEATURES[name]()
    leaves = tensors | {n: t for n, t in options.items() if isinstance(t, Tensor) and t.requires_grad}
    names = list(leaves)

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        results = F.attention(**{**tensors, **options, **dict(zip(names, given, strict=True))}, return_lse=True)
        return results[0], results[1].masked_fill(results[1] == -torch.inf, 0)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("name", ["everything", "lengths", "relative keys", "blocks", "alibi [Hq]"])
def test_compile(name):
    tensors = inputs()
    options, _ = FEATURES[name]()
    leaves = tensors | {n: t for n, t in options.items() if isinstance(t, Tensor) and t.requires_grad}

    def function(tensors: dict[str, Tensor], options: dict[str, Any]) -> Any:
        return F.attention(**tensors, **options, return_lse=True, return_weights=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(tensors, options), function(tensors, options)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(actual, leaves), gradients(expected, leaves), **GRADIENTS)


def test_compile_for_any_size():
    torch._dynamo.reset()
    counter, graphs = CompileCounterWithBackend("aot_eager"), 0

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, table: Tensor, slopes: Tensor, lengths: Tensor) -> Any:
        return F.attention(
            q, k, v, attn_bias=bias, relative_bias=table, relative_bias_zero=3, alibi_slopes=slopes, seqlens_k=lengths,
            causal=True, window_size=(6, 0), alignment="top_left", return_weights=True,
        )  # fmt: skip

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for batch, heads, length, keys in ((2, 5, 4, 11), (7, 9, 13, 12), (3, 4, 15, 21)):
        q, k, v = (torch.randn(batch, h, n, e) for h, n, e in ((2 * heads, length, E), (heads, keys, E), (heads, keys, EV)))
        parts = torch.randn(2 * heads, length, keys), torch.randn(2 * heads, keys), torch.rand(2 * heads), torch.arange(batch)
        torch.testing.assert_close(compiled(q, k, v, *parts), function(q, k, v, *parts))
        graphs = graphs or counter.frame_count
    assert counter.frame_count == graphs


def test_compile_packed():
    torch.manual_seed(0)
    q, cu = torch.randn(9, HQ, E), torch.tensor([0, 4, 9], dtype=torch.int32)
    compiled = torch.compile(F.attention, fullgraph=True, backend="aot_eager")
    options: dict[str, Any] = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True)
    torch.testing.assert_close(compiled(q, q, q, **options, max_seqlen_q=5, max_seqlen_k=5), F.attention(q, q, q, **options))


SHARED: dict[str, Callable[[Tensor, Tensor, Tensor], dict[str, Any]]] = {
    "keys are values": lambda x, y, ints: dict(q=x, k=y, v=y, return_weights=True),
    "queries are keys": lambda x, y, ints: dict(q=x, k=x, v=y, seqlens_q=ints, seqlens_k=ints),
    "packed": lambda x, y, ints: dict(
        q=y[0], k=y[0], v=x[0], cu_seqlens_q=ints, cu_seqlens_k=ints, max_seqlen_q=HQ, max_seqlen_k=HQ),
    "relative queries": lambda x, y, ints: dict(
        q=x, k=y, v=x, relative_query=x, relative_key=y[0], relative_key_zero=2),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_compile_with_one_tensor_for_several(name):
    """An autograd function that Dynamo traces takes no tensor twice."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    leaves = dict(x=normal(2, HQ, HQ, E), y=normal(2, HQ, HQ, E))

    def function(x: Tensor, y: Tensor) -> Any:
        return F.attention(**SHARED[name](x, y, torch.tensor([0, HQ], dtype=torch.int32)), return_lse=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    actual, expected = (run(**leaves) for run in (compiled, function))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(actual, leaves), gradients(expected, leaves), **GRADIENTS)


def test_vmap():
    torch.manual_seed(0)
    q, k, bias = torch.randn(3, B, HQ, TQ, E), torch.randn(3, B, HKV, TK, E), torch.randn(3, HQ, 1, TK)
    lengths = torch.tensor([[20, 3], [21, 0], [1, 7]])
    function = torch.vmap(
        lambda q, k, bias, n: F.attention(q, k, k, attn_bias=bias, seqlens_k=n, causal=True, alignment="top_left")
    )
    rows = zip(q, k, bias, lengths, strict=True)
    expected = [
        F.attention(one, keys, keys, attn_bias=own, seqlens_k=n, causal=True, alignment="top_left") for one, keys, own, n in rows
    ]
    torch.testing.assert_close(function(q, k, bias, lengths), torch.stack(expected))


def tensor(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **options)


CU = torch.tensor([0, 4, 9], dtype=torch.int32)
ERRORS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "^q must be a Tensor, not list", dict(q=[1])),
    (TypeError, "mask must be a Tensor", dict(attn_mask=[[True]])),
    (TypeError, "offset must be an int, got 1.0", dict(offset=1.0)),
    (TypeError, "window_size must hold ints", dict(window_size=(1.5, 0))),
    (ValueError, "layout must be one of bhsd, bshd, thd", dict(layout="sbhd")),
    (ValueError, r"layout='thd' is \[N, H, E\]", dict(layout="thd")),
    (TypeError, "causal must be a bool, got 'left'$", dict(causal="left")),
    (TypeError, "'bottom_right'; where the queries stand is the alignment", dict(causal="bottom_right")),
    (ValueError, "alignment must be one of top_left, bottom_right, got 'left'", dict(alignment="left")),
    (ValueError, r"window_size must be \(left, right\), got \(1, 2, 3\)", dict(window_size=(1, 2, 3))),
    (TypeError, r"window_size must be \(left, right\), .*, got 4: \(4, 0\) or \(4, 4\)", dict(window_size=4)),
    (TypeError, "window_size must be .*, not str", dict(window_size="44")),
    (ValueError, "at least 0, or None or -1", dict(window_size=(-2, 0))),
    (ValueError, r"dropout_p must lie in \[0, 1\], got 1.5", dict(dropout_p=1.5)),
    (TypeError, "dropout_p must be a number, got '0.1'", dict(dropout_p="0.1")),
    (TypeError, "scale must be a number, not Tensor", dict(scale=tensor())),
    (TypeError, "softcap must be a number, not NoneType", dict(softcap=None)),
    (TypeError, "relative_bias_zero must be an int, got '4'", dict(relative_bias=tensor(4, 9), relative_bias_zero="4")),
    (TypeError, "max_seqlen_q must be an int, got 5.0", dict(max_seqlen_q=5.0)),
    (TypeError, "block_size must be an int, got '16'", dict(block_size="16")),
    (ValueError, "softcap must be finite and not negative", dict(softcap=-1.0)),
    (ValueError, "scale must be finite", dict(scale=float("nan"))),
    (ValueError, "return_weights", dict(return_weights="sum")),
    (RuntimeError, r"q must be \[B, H, T, E\], got \[4, 5, 8\]", dict(q=tensor(4, 5, 8))),
    (RuntimeError, "features, got 8 and 7", dict(k=tensor(2, 2, 6, 7))),
    (RuntimeError, "multiple of those of k and v, got 4 and 3", dict(k=tensor(2, 3, 6, 8), v=tensor(2, 3, 6, 8))),
    (RuntimeError, "agree in heads and length", dict(v=tensor(2, 2, 5, 8))),
    (RuntimeError, "one batch size, got 2 and 1", dict(k=tensor(1, 2, 6, 8), v=tensor(1, 2, 6, 8))),
    (RuntimeError, "one dtype, got torch.float32, torch.float64", dict(k=tensor(2, 2, 6, 8, dtype=torch.float64))),
    (RuntimeError, "one device, got cpu, meta", dict(k=tensor(2, 2, 6, 8, device="meta"))),
    (RuntimeError, "mask must be on the query's device", dict(attn_mask=tensor(5, 6, dtype=torch.bool, device="meta"))),
    (RuntimeError, "attn_mask must be bool .*the attn_bias", dict(attn_mask=tensor(5, 6))),
    (RuntimeError, r"\[2, 4, 5, 6\] or 1, got \[6\]", dict(attn_mask=tensor(6, dtype=torch.bool))),
    (RuntimeError, r"got \[2, 5, 6\]; one for each sequence is \[B, 1, Tq, Tk\]",
     dict(attn_mask=tensor(2, 5, 6, dtype=torch.bool))),
    (RuntimeError, r"bias must be .* got \[6, 5\]", dict(attn_bias=tensor(6, 5))),
    (RuntimeError, r"bias must be .* got \[2, 2, 5, 6\]", dict(attn_bias=tensor(2, 2, 5, 6))),
    (RuntimeError, "bias must have the query's dtype", dict(attn_bias=tensor(5, 6, dtype=torch.float64))),
    (RuntimeError, r"alibi_slopes must be \[Hq\] or", dict(alibi_slopes=tensor(2))),
    (RuntimeError, "alibi_slopes get no gradient", dict(alibi_slopes=tensor(4, requires_grad=True))),
    (RuntimeError, "alibi_slopes must be floating", dict(alibi_slopes=tensor(4, dtype=torch.int64))),
    (RuntimeError, r"relative_bias must be \[Hq or 1, L\]", dict(relative_bias=tensor(2, 9))),
    (ValueError, "relative_bias_zero, .* even length, here 8", dict(relative_bias=tensor(4, 8))),
    (ValueError, "goes with relative_bias", dict(relative_bias_zero=3)),
    (ValueError, "go together", dict(relative_query=tensor(2, 4, 5, 8))),
    (ValueError, "go together", dict(relative_query=tensor(2, 4, 5, 8), relative_key=tensor(4, 6, 8))),
    (RuntimeError, "relative_query must have the shape", dict(
        relative_query=tensor(2, 2, 5, 8), relative_key=tensor(4, 6, 8), relative_key_zero=0)),
    (RuntimeError, r"relative_key must be \[Hq or 1, M, E\]", dict(
        relative_query=tensor(2, 4, 5, 8), relative_key=tensor(2, 6, 8), relative_key_zero=0)),
    (RuntimeError, r"sinks must be \[Hq\] = \[4\], got \[2\]", dict(sinks=tensor(2))),
    (RuntimeError, "seqlens_q must be int32 or int64", dict(seqlens_q=tensor(2))),
    (RuntimeError, r"seqlens_k must be \[B\] = \[2\], got \[3\]", dict(seqlens_k=tensor(3, dtype=torch.int64))),
    (RuntimeError, r"seqlens_k must lie in 0..6, got \[7, 1\]", dict(seqlens_k=torch.tensor([7, 1]))),
    (ValueError, "got no cu_seqlens_k", dict(q=tensor(9, 4, 8), k=tensor(9, 2, 8), v=tensor(9, 2, 8), cu_seqlens_q=CU)),
    (RuntimeError, r"q must be \[N, H, E\]", dict(cu_seqlens_q=CU, cu_seqlens_k=CU)),
    (ValueError, "go with cu_seqlens", dict(max_seqlen_q=5)),
    (ValueError, "go together", dict(block_size=16)),
    (ValueError, "power of two and at least 16, got 24", dict(block_layout=tensor(1, 1, dtype=torch.bool), block_size=24)),
    (RuntimeError, r"block_layout must be bool \[.., 1, 1\]", dict(block_layout=tensor(2, 1, dtype=torch.bool), block_size=16)),
    (NotImplementedError, "complex64", dict(q=tensor(2, 4, 5, 8, dtype=torch.cfloat), k=tensor(2, 2, 6, 8, dtype=torch.cfloat),
                                            v=tensor(2, 2, 6, 8, dtype=torch.cfloat))),
]  # fmt: skip


@pytest.mark.parametrize("kind, message, wrong", ERRORS, ids=[f"{kind.__name__}-{'-'.join(wrong)}" for kind, _, wrong in ERRORS])
def test_errors(kind, message, wrong):
    with pytest.raises(kind, match=message):
        F.attention(**dict(q=tensor(2, 4, 5, 8), k=tensor(2, 2, 6, 8), v=tensor(2, 2, 6, 8)) | wrong)


@pytest.mark.parametrize(
    "kind, message, wrong",
    [
        (RuntimeError, r"rise from 0 to the number of rows, 9, got \[0, 4, 8\]", dict(cu_seqlens_q=torch.tensor([0, 4, 8]))),
        (RuntimeError, "rise from 0", dict(cu_seqlens_q=torch.tensor([0, 10, 9]))),
        (RuntimeError, "rise from 0", dict(cu_seqlens_k=torch.tensor([1, 4, 9]))),
        (RuntimeError, "of one length, got 2 and 3", dict(cu_seqlens_q=torch.tensor([0, 9]))),
        (RuntimeError, "must be int32 or int64", dict(cu_seqlens_q=CU.float())),
        (RuntimeError, "max_seqlen_k is 4, but the longest", dict(max_seqlen_k=4)),
        (ValueError, "attn_mask goes with padded", dict(attn_mask=tensor(9, 9, dtype=torch.bool))),
        (ValueError, "seqlens_q goes with padded", dict(seqlens_q=torch.tensor([4, 5]))),
        (ValueError, "return_weights goes with padded", dict(return_weights=True)),
        (ValueError, "layout='bshd' is for padded sequences", dict(layout="bshd")),
    ],
)
def test_packed_errors(kind, message, wrong):
    with pytest.raises(kind, match=message):
        F.attention(**dict(q=tensor(9, 4, 8), k=tensor(9, 2, 8), v=tensor(9, 2, 8), cu_seqlens_q=CU, cu_seqlens_k=CU) | wrong)


def test_any_strides():
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(B, HQ, E, TQ).mT,
        torch.randn(TK, E, B, HKV).permute(2, 3, 0, 1),
        torch.randn(B, 1, TK, 1).expand(B, HKV, TK, EV),
    )
    contiguous = (t.contiguous() for t in (q, k, v))
    bias = torch.randn(TK, TQ).t()
    torch.testing.assert_close(F.attention(q, k, v, attn_bias=bias), F.attention(*contiguous, attn_bias=bias.contiguous()))


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("options", [dict(), dict(causal=True), dict(window_size=(4, 3), softcap=2.0)], ids=str)
def test_merged_parts_are_the_whole(options, layout):
    """Attention over two halves of the keys, each at its offset, and the backward of each half with out and lse of the whole."""
    tensors = {n: t.detach().requires_grad_() for n, t in ((n, swapped(layout, t)) for n, t in inputs(16, 16).items())}
    q, k, v = tensors.values()
    whole = F.attention(q, k, v, layout=layout, **options, return_lse=True)
    time = 2 if layout == "bhsd" else 1
    halves = list(zip(k.split(8, time), v.split(8, time), (0, -8), strict=True))
    parts = [F.attention(q, *kv, offset=offset, layout=layout, **options, return_lse=True) for *kv, offset in halves]
    merged = F.merge_attention(*parts[0], *parts[1], layout=layout)
    torch.testing.assert_close(merged, whole, **FP64)
    expected = gradients(whole, tensors)
    torch.testing.assert_close(gradients(merged, tensors), expected, **GRADIENTS)

    dout = torch.randn(whole[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    by_autograd = torch.autograd.grad(whole[0], (q, k, v), dout, retain_graph=True)
    grads = [
        F.attention_grad(
            dout, q, *(t.detach() for t in kv), *(t.detach() for t in whole), offset=offset, layout=layout, **options
        )
        for *kv, offset in halves
    ]
    together = (
        grads[0][0] + grads[1][0],
        torch.cat((grads[0][1], grads[1][1]), time),
        torch.cat((grads[0][2], grads[1][2]), time),
    )
    torch.testing.assert_close(together, by_autograd, **GRADIENTS)


def test_merged_packed_parts():
    torch.manual_seed(0)
    q, k, v = normal(9, HQ, E), normal(9, HKV, E), normal(9, HKV, EV)
    cu, first, second = CU, torch.tensor([0, 1, 3]), torch.tensor([0, 3, 6])
    own = [0, 4, 5], [1, 2, 3, 6, 7, 8]
    whole = F.attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, return_lse=True)
    parts = [F.attention(q, k[rows], v[rows], cu_seqlens_q=cu, cu_seqlens_k=at, return_lse=True)
             for rows, at in zip(own, (first, second), strict=True)]  # fmt: skip
    torch.testing.assert_close(F.merge_attention(*parts[0], *parts[1]), whole, **FP64)


def test_merge_of_nothing_seen():
    """-inf on one side leaves the other; on both sides zeros, and gradients are finite."""
    out, lse = torch.randn(2, 1, 1, 3, 4).double(), torch.tensor([[0.5, -torch.inf, -torch.inf], [-torch.inf, 1.5, -torch.inf]])
    out[0, ..., 1:, :], out[1, ..., 0, :], out[1, ..., 2, :] = 0, 0, 0
    leaves = [out[0], lse[0].view(1, 1, 3).double(), out[1], lse[1].view(1, 1, 3).double()]
    leaves = [t.clone().requires_grad_() for t in leaves]
    merged, total = F.merge_attention(*leaves)
    torch.testing.assert_close(merged, out[0] + out[1])
    torch.testing.assert_close(total.flatten().tolist(), [0.5, 1.5, -torch.inf])
    cotangents = torch.ones_like(merged), torch.ones_like(total).masked_fill(total == -torch.inf, 0)
    for grad in torch.autograd.grad((merged, total), leaves, cotangents):
        assert grad.isfinite().all()
    with pytest.raises(RuntimeError, match="one shape"):
        F.merge_attention(leaves[0], leaves[1], leaves[2][..., :2], leaves[3])


def test_attention_grad_errors():
    q = torch.zeros(1, 2, 3, 4)
    out, lse = F.attention(q, q, q, return_lse=True)
    with pytest.raises(ValueError, match="dropout"):
        F.attention_grad(out, q, q, q, out, lse, dropout_p=0.5)
    with pytest.raises(RuntimeError, match=r"lse must be \[1, 2, 3\]"):
        F.attention_grad(out, q, q, q, out, lse[..., None])
    with pytest.raises(TypeError, match="unexpected keyword"):
        F.attention_grad(out, q, q, q, out, lse, clausal=True)


def bucket(distance: int, bidirectional: bool, buckets: int, farthest: int) -> int:
    """T5's bucket of one distance, by counting edges: edge n of the logarithmic half is exact (farthest / exact)^(n / rest)."""
    before = 0
    if bidirectional:
        buckets //= 2
        before = buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return before + distance
    rest = buckets - exact
    edges = [exact * (farthest / exact) ** (n / rest) for n in range(1, rest)]
    return before + exact + sum(distance >= edge - 1e-9 for edge in edges)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(
    "sizes", [(TQ, TK, 32, 128), (TQ, TK, 8, 10), (30, 1, 7, 20), (1, 30, 4, 9), (200, 200, 32, 128)], ids=str
)
def test_t5_relative_bias(sizes, bidirectional):
    tq, tk, buckets, farthest = sizes
    torch.manual_seed(0)
    table = normal(buckets, HQ)
    bias, zero = F.t5_relative_bias(
        table, tq, tk, bidirectional=bidirectional, num_buckets=buckets, max_distance=farthest
    )  # fmt: skip
    assert bias.shape == (HQ, tq + tk - 1)
    index = torch.tensor([[bucket(j - i, bidirectional, buckets, farthest) for j in range(tk)] for i in range(tq)])
    expected = table[index].permute(2, 0, 1)
    torch.testing.assert_close(from_table(bias, zero, distances(tq, tk)), expected, rtol=0, atol=0)
    if tq > TQ:
        return
    tensors = inputs(tq, tk)
    leaves = tensors | dict(table=table)
    actual = F.attention(**tensors, relative_bias=bias, relative_bias_zero=zero, alignment="top_left")
    true = dense(**tensors, after=expected)[0]
    torch.testing.assert_close(gradients((actual,), leaves), gradients((true,), leaves), **GRADIENTS)


def test_t5_relative_bias_errors():
    table = torch.zeros(32, HQ)
    with pytest.raises(RuntimeError, match=r"num_buckets = 16, got torch.float32 \[32, 4\]"):
        F.t5_relative_bias(table, 3, 3, bidirectional=True, num_buckets=16, max_distance=128)
    with pytest.raises(ValueError, match="max_distance"):
        F.t5_relative_bias(table, 3, 3, bidirectional=True, num_buckets=32, max_distance=8)


def shifted(scores: Tensor) -> Tensor:
    """Row i of [.., Tq, Tk], moved Tq - 1 - i to the left: the paper's appendix B."""
    tq = scores.shape[-2]
    rows = [torch.nn.functional.pad(scores[..., i, tq - 1 - i :], (0, tq - 1 - i)) for i in range(tq)]
    return torch.stack(rows, -2)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_transformer_xl(layout):
    torch.manual_seed(0)
    q, k, v = normal(B, HQ, TQ, E), normal(B, HQ, TK, E), normal(B, HQ, TK, E)
    leaves = dict(q=q, k=k, v=v, r=normal(HQ, TK, E), u=normal(HQ, E), v_bias=normal(HQ, E))
    r, u, v_bias = (leaves[name] for name in ("r", "u", "v_bias"))
    scores = ((q + u[:, None]) @ k.mT + shifted((q + v_bias[:, None]) @ r.mT)) / E**0.5
    hidden = distances(shift=TK - TQ) > 0
    expected = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ v
    given = (swapped(layout, t) for t in (q, k, v))
    actual = swapped(layout, F.transformer_xl_attention(*given, r, u, v_bias, layout=layout))
    torch.testing.assert_close(actual, expected, **FP64)
    torch.testing.assert_close(gradients((actual,), leaves), gradients((expected,), leaves), **GRADIENTS)
    with pytest.raises(RuntimeError, match=r"u must be \[H, E\]"):
        F.transformer_xl_attention(q, k, v, r, u[0], v_bias)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_a_step_of_transformer_xl(monkeypatch, layout):
    """One query without gradients is what the last of many is; what does not fit raises as it does for many."""
    torch.manual_seed(0)
    q, k, v = (swapped(layout, torch.randn(B, HQ, TK, E)) for _ in range(3))
    last = q[:, -1:] if layout == "bshd" else q[:, :, -1:]
    u, other, memory = torch.randn(HQ, E), torch.randn(HQ, E), F.transformer_xl_attention
    for heads in (1, HQ):
        r = torch.randn(heads, TK, E)
        for more in ({}, {"window_size": (4, None)}, {"window_size": (0, -1), "scale": 0.3}, {"window_size": (TK, 0)}):
            many = memory(q, k, v, r, u, other, layout=layout, **more)
            with monkeypatch.context() as patch, torch.no_grad():
                patch.setattr("fastseq.functional._attention.prepared", None)
                found = memory(last, k, v, r, u, other, layout=layout, dropout_p=0.0, **more)
            torch.testing.assert_close(found, many[:, -1:] if layout == "bshd" else many[:, :, -1:])
            masked = memory(last, k, v, r, u, other, layout=layout, attn_mask=torch.ones(1, TK, dtype=torch.bool), **more)
            torch.testing.assert_close(masked, found)
    r = torch.randn(HQ, TK, E)
    for wrong, kind in (
        ({"window_size": ()}, ValueError),
        ({"window_size": (-2, None)}, ValueError),
        ({"softcap": "a"}, TypeError),
    ):
        with pytest.raises(kind):
            memory(last, k, v, r, u, other, layout=layout, **wrong)
    with pytest.raises(RuntimeError):
        memory(last, k, v, r[:, :, 1:], u, other, layout=layout)
    with pytest.raises(RuntimeError):
        memory(last, k, v.double(), r, u, other, layout=layout)


def test_explained():
    explanation = fastseq.explain(
        F.attention, torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), causal=True
    )
    assert explanation.backends == ["cpu"] and "attention forward" in str(explanation)


@pytest.mark.parametrize("options, name", [
    (dict(causal=True), "causal"),
    (dict(window_size=(3, None)), "window_size"),
    (dict(window_size=(-1, 2)), "window_size"),
    (dict(causal=True, window_size=(2, 0)), "causal and window_size"),
    (dict(alibi_slopes=torch.ones(4)), "alibi_slopes"),
    (dict(relative_bias=torch.zeros(4, 5)), "relative_bias"),
])  # fmt: skip
def test_ambiguous_places_are_refused(options, name):
    """torch counts from the first query, flash-attn from the last: the same words, other numbers."""
    q, same, more = tensor(2, 4, 5, 8), tensor(2, 2, 5, 8), tensor(2, 2, 6, 8)
    with pytest.raises(ValueError, match=f"{name} with 5 queries and 6 keys: ambiguous; pass alignment='bottom_right'"):
        F.attention(q, more, more, **options)
    F.attention(q, same, same, **options)
    for said in (dict(alignment="top_left"), dict(alignment="bottom_right"), dict(offset=0)):
        F.attention(q, more, more, **options, **said)


def test_ambiguous_places_of_packed_sequences():
    q, k, other = tensor(9, 4, 8), tensor(9, 2, 8), torch.tensor([0, 3, 9])
    F.attention(q, k, k, cu_seqlens_q=CU, cu_seqlens_k=CU.clone(), causal=True)
    with pytest.raises(ValueError, match="causal with cu_seqlens_q and cu_seqlens_k that are not seen to be equal: ambiguous"):
        F.attention(q, k, k, cu_seqlens_q=CU, cu_seqlens_k=other, causal=True)
    F.attention(q, k, k, cu_seqlens_q=CU, cu_seqlens_k=other, causal=True, alignment="top_left")


@pytest.mark.parametrize("dynamic", [False, True])
def test_ambiguous_places_are_refused_in_compiled_code(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k: F.attention(q, k, k, causal=True), backend="aot_eager", dynamic=dynamic)
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    torch.testing.assert_close(compiled(q, k), F.attention(q, k, k, causal=True))
    with pytest.raises(ValueError, match="causal with 5 queries and 6 keys: ambiguous"):
        compiled(q, torch.randn(2, 2, 6, 8))


def test_exported_with_lengths_of_their_own():
    """An alignment that is said leaves both lengths open."""

    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return F.attention(q, k, k, causal=True, alignment="bottom_right")

    tq, tk = torch.export.Dim("tq", min=2, max=64), torch.export.Dim("tk", min=2, max=64)
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
    exported = torch.export.export(Module(), (q, k), dynamic_shapes=({2: tq}, {2: tk})).module()
    for length in (7, 11):
        k = torch.randn(2, 2, length, 8)
        torch.testing.assert_close(exported(q, k), Module()(q, k))


def test_time_before_heads_is_noticed():
    """Where no model has so many heads; elsewhere shapes alone do not tell."""
    wrong = tensor(1, 200, 4, 8)
    with pytest.warns(UserWarning, match=r"200 heads of 4 steps here; pass layout='bshd'") as warned:
        F.attention(wrong, wrong, wrong)
    assert warned[0].filename == __file__
    with pytest.raises(RuntimeError, match=r"got 9 and 5; \[B, T, H, E\] is layout='bshd'"):
        F.attention(tensor(1, 9, 4, 8), tensor(1, 5, 4, 8), tensor(1, 5, 4, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.attention(wrong, wrong, wrong, layout="bhsd")
        F.attention(wrong, wrong, wrong, layout="bshd")
        F.attention(tensor(1, 128, 1, 8), tensor(1, 1, 4, 8), tensor(1, 1, 4, 8))


def test_options_are_one_list():
    """What the annotations promise, what is checked, and what help() shows."""
    options = {field.name: field.type for field in dataclasses.fields(Options)}
    annotated = {name: hint.__forward_arg__ for name, hint in AttentionOptions.__annotations__.items()}
    assert options == annotated
    signature = inspect.signature(F.attention)
    assert list(signature.parameters) == ["q", "k", "v", *options, "return_lse", "return_weights"]
    assert signature.parameters["softcap"].default == 0.0
    assert not any(p.kind is p.VAR_KEYWORD for f in F.__all__ for p in inspect.signature(getattr(F, f)).parameters.values())


@pytest.mark.parametrize("name, own", [
    ("softmax_scale", "scale"), ("sm_scale", "scale"), ("is_causal", "causal"), ("window", "window_size"),
    ("sliding_window", "window_size"), ("dropout", "dropout_p"), ("mask", "attn_mask"), ("bias", "attn_bias"),
    ("q_lengths", "seqlens_q"), ("cu_seq_k", "cu_seqlens_k"), ("align", "alignment"), ("s_aux", "sinks"),
    ("need_weights", "return_weights"), ("return_attn_probs", "return_lse"),
])  # fmt: skip
def test_names_of_other_packages(name, own):
    message = f"attention() got an unexpected keyword argument '{name}'; it is called {own} here"
    for function in (F.attention, torch.compile(F.attention, backend="eager")):
        with pytest.raises(TypeError, match=re.escape(message)):
            function(*3 * (tensor(1, 2, 3, 8),), **{name: None})


def test_names_of_nobody():
    q = tensor(1, 2, 3, 8)
    with pytest.raises(TypeError, match="'softcapp'; did you mean 'softcap'"):
        F.attention(q, q, q, softcapp=1.0)
    with pytest.raises(TypeError, match="'color'; accepted: q, k, v, layout, attn_mask"):
        F.attention(q, q, q, color=1.0)
    with pytest.raises(TypeError, match="'enable_gqa'; leave it out, k and v may always have fewer heads"):
        F.attention(q, q, q, enable_gqa=True)
    with pytest.raises(TypeError, match="transformer_xl_attention.. got an unexpected keyword argument 'causal'"):
        F.transformer_xl_attention(q, q, q, q[0], q[0, :, 0], q[0, :, 0], causal=True)
    with pytest.raises(TypeError, match="'splits'; it is called num_splits here"):
        F.attention_with_kv_cache(q, q, q, cache_seqlens=torch.tensor([3]), splits=2)
    with pytest.raises(TypeError, match="'lengths'; it is called cache_seqlens here"):
        F.attention_with_kv_cache(q, q, q, lengths=torch.tensor([3]))
    with pytest.raises(TypeError, match="'causal'; did you mean 'is_causal'"):
        F.scaled_dot_product_attention(q, q, q, causal=True)


def test_options_at_their_defaults_go_the_short_way(monkeypatch):
    """As a model passes them on. What is unknown is not taken for one of them."""
    q, k, v = (torch.randn(2, 3, 2, E) for _ in range(3))
    nothing = {field.name: None for field in dataclasses.fields(Options) if field.default is None and field.name != "layout"}
    expected = [F.attention(q, k, v, layout="bshd", causal=causal) for causal in (False, True)]
    last = F.attention(q[:, :1], k, v, layout="bshd")
    monkeypatch.setattr("fastseq.functional._attention.prepared", None)
    with fastseq.use_backend("cpu"):
        for causal, alignment in ((False, None), (True, None), (True, "bottom_right"), (False, "top_left")):
            found = F.attention(q, k, v, **nothing | {"layout": "bshd", "causal": causal, "alignment": alignment})
            torch.testing.assert_close(found, expected[causal])
        one = F.attention(q[:, :1], k, v, layout="bshd", causal=True, alignment="bottom_right")
        torch.testing.assert_close(one, last)
    monkeypatch.undo()
    first = F.attention(q[:, :1], k, v, layout="bshd", causal=True, alignment="top_left")
    torch.testing.assert_close(first, v[:, :1])
    with pytest.raises(TypeError, match="of_nothing"):
        F.attention(q, k, v, of_nothing=None)
    with pytest.raises(ValueError, match="alignment must be one of"):
        F.attention(q, k, v, layout="bshd", alignment="middle")
