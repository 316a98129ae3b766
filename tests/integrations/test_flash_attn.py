"""flash-attn's names: against dense attention written out here, with gradients; caches that grow, in rows and pages; rotary."""

from __future__ import annotations

import inspect

import pytest
import torch

from fastseq.integrations import flash_attn
from fastseq.integrations.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

H, HK, E = 4, 2, 8
OPTIONS = [
    {},
    {"causal": True},
    {"window_size": (2, 1)},
    {"window_size": (3, -1), "causal": True},
    {"softcap": 1.5, "softmax_scale": 0.7},
    {"alibi_slopes": torch.linspace(0.1, 0.7, H), "causal": True},
]


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(q, k, v, causal=False, window_size=(-1, -1), softcap=0.0, softmax_scale=None, alibi_slopes=None):
    """out and lse of one sequence: [Tq, H, E] on [Tk, HK, E]."""
    tq, tk = q.shape[0], k.shape[0]
    left, right = window_size[0], 0 if causal else window_size[1]
    k, v = k.repeat_interleave(H // k.shape[1], 1), v.repeat_interleave(H // v.shape[1], 1)
    s = torch.einsum("ihe,jhe->hij", q, k) * (E**-0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    distance = torch.arange(tk) - torch.arange(tq)[:, None] - (tk - tq)
    if alibi_slopes is not None:
        s = s - alibi_slopes[:, None, None].to(s.dtype) * distance.abs()
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left >= 0:
        hidden |= distance < -left
    if right >= 0:
        hidden |= distance > right
    s = s.masked_fill(hidden, -torch.inf)
    w = torch.softmax(s, -1).masked_fill(hidden.all(-1)[:, None], 0) if tk else s
    return torch.einsum("hij,jhe->ihe", w, v), torch.logsumexp(s, -1)


def batched(q, k, v, alibi_slopes=None, **options):
    slopes = [None] * len(q) if alibi_slopes is None else alibi_slopes.expand(len(q), H)
    results = [dense(*one, alibi_slopes=slope, **options) for *one, slope in zip(q, k, v, slopes, strict=True)]
    return torch.stack([out for out, _ in results]), torch.stack([lse for _, lse in results])


def assert_gradients(result, expected, inputs):
    torch.testing.assert_close(result, expected)
    grad = random(*result.shape, seed=9)
    torch.testing.assert_close(torch.autograd.grad(result, inputs, grad), torch.autograd.grad(expected, inputs, grad))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", [(5, 5), (3, 7), (7, 3), (1, 6)])
def test_padded(lengths, options):
    tq, tk = lengths
    q, k, v = random(2, tq, H, E), random(2, tk, HK, E, seed=1), random(2, tk, HK, E, seed=2)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    out, lse, weights = flash_attn_func(q, k, v, **options, deterministic=True, return_attn_probs=True)
    expected, expected_lse = batched(q, k, v, **options)
    assert_gradients(out, expected, inputs)
    torch.testing.assert_close(lse, expected_lse)
    assert weights is None
    assert torch.equal(flash_attn_func(q, k, v, **options), out)
    kv = torch.stack((k, v), 2)
    assert torch.equal(flash_attn_kvpacked_func(q, kv, **options), out)


def test_slopes_of_each_sequence():
    q, k, slopes = random(2, 4, H, E), random(2, 6, H, E, seed=1), random(2, H, seed=2).abs().float()
    expected, _ = batched(q, k, k, alibi_slopes=slopes, causal=True)
    torch.testing.assert_close(flash_attn_func(q, k, k, causal=True, alibi_slopes=slopes), expected)


def test_qkv_in_one():
    qkv = random(2, 6, 3, H, E).requires_grad_()
    expected, _ = batched(*qkv.unbind(2), causal=True)
    assert_gradients(flash_attn_qkvpacked_func(qkv, causal=True), expected, [qkv])
    with pytest.raises(RuntimeError, match=r"qkv must be \[B, T, 3, H, E\], got \[2, 6, 2, 4, 8\]"):
        flash_attn_qkvpacked_func(qkv[:, :, :2])
    with pytest.raises(RuntimeError, match=r"kv must be \[N, 2, H, E\]"):
        flash_attn_varlen_kvpacked_func(qkv, qkv, None, None, 1, 1)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_packed_sequences(options):
    lengths_q, lengths_k = (3, 0, 5, 2), (4, 3, 2, 0)
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k))
    q, k, v = random(10, H, E), random(9, HK, E, seed=1), random(9, HK, E, seed=2)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    call = (cu_q, cu_k, 5, 4)
    out, lse, _ = flash_attn_varlen_func(q, k, v, *call, **options, return_attn_probs=True)
    each = [
        dense(q[cu_q[b] : cu_q[b + 1]], k[cu_k[b] : cu_k[b + 1]], v[cu_k[b] : cu_k[b + 1]], **options)
        for b in range(len(lengths_q))
    ]
    assert_gradients(out, torch.cat([one for one, _ in each]), inputs)
    torch.testing.assert_close(lse, torch.cat([one for _, one in each], 1))
    assert torch.equal(flash_attn_varlen_kvpacked_func(q, torch.stack((k, v), 1), *call, **options), out)


def test_packed_qkv_in_one():
    qkv, cu = random(9, 3, H, E), torch.tensor([0, 2, 9], dtype=torch.int32)
    expected = torch.cat([dense(*qkv[rows].unbind(1), causal=True)[0] for rows in (slice(0, 2), slice(2, 9))])
    torch.testing.assert_close(flash_attn_varlen_qkvpacked_func(qkv, cu, 7, causal=True), expected)


def test_packed_queries_on_pages():
    lengths_q, lengths_k, page = (3, 1, 2), (7, 1, 8), 4
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k))
    q, k, v = random(6, H, E), random(6, page, HK, E, seed=1), random(6, page, HK, E, seed=2)
    table = torch.tensor([[4, 0, -1], [2, -1, -1], [5, 1, -1]], dtype=torch.int32)
    out = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 3, 8, causal=True, block_table=table)
    for b, length in enumerate(lengths_k):
        pages = table[b, : -(-length // page)].long()
        rows = slice(cu_q[b], cu_q[b + 1])
        expected, _ = dense(q[rows], k[pages].flatten(0, 1)[:length], v[pages].flatten(0, 1)[:length], causal=True)
        torch.testing.assert_close(out[rows], expected)
    with pytest.raises(RuntimeError, match="block_table has room for 3 pages of 4 keys"):
        flash_attn_varlen_func(q, k, v, cu_q, cu_k, 3, 13, block_table=table)


def test_dropout():
    q, k = random(1, 64, H, E), random(1, 64, H, E, seed=1)
    torch.manual_seed(0)
    one = flash_attn_func(q, k, torch.ones_like(k), dropout_p=0.25)
    torch.manual_seed(0)
    assert torch.equal(flash_attn_func(q, k, torch.ones_like(k), dropout_p=0.25), one)
    assert not torch.equal(flash_attn_func(q, k, torch.ones_like(k), dropout_p=0.25), one)
    assert abs(one.mean().item() - 1) < 0.03 and one.std() > 0.02  # sums of the weights that are left, over 0.75


# Caches: three sequences, what is in the cache before and what comes

BEFORE, CAPACITY = (3, 0, 6), 12


def cache_of(keys):
    """A cache whose first BEFORE[b] keys of row b are `keys`; NaN beyond."""
    cache = torch.full((len(BEFORE), CAPACITY, HK, E), torch.nan, dtype=torch.float64)
    for b, length in enumerate(BEFORE):
        cache[b, :length] = keys[b, :length]
    return cache


def turned(x, places, cos, sin, interleaved):
    """x [T, H, E] rotated by complex multiplication."""
    half = cos.shape[1]
    pairs = x[..., : 2 * half]
    pairs = pairs.unflatten(-1, (half, 2)) if interleaved else pairs.unflatten(-1, (2, half)).transpose(-1, -2)
    turn = torch.complex(cos[places], sin[places])[:, None]
    result = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    result = result.flatten(-2) if interleaved else result.transpose(-1, -2).flatten(-2)
    return torch.cat((result, x[..., 2 * half :]), -1)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("kind", ["rows", "batch_idx", "leftpad", "pages"])
@pytest.mark.parametrize("rotary", [None, "interleaved", "halves"])
def test_appending(kind, new, options, rotary):
    batch = len(BEFORE)
    q, k, v = random(batch, new, H, E), random(batch, new, HK, E, seed=1), random(batch, new, HK, E, seed=2)
    old_k, old_v = random(batch, CAPACITY, HK, E, seed=3), random(batch, CAPACITY, HK, E, seed=4)
    k_cache, v_cache = cache_of(old_k), cache_of(old_v)
    begin = torch.tensor(BEFORE, dtype=torch.int32)
    leftpad = torch.tensor([2, 0, 5], dtype=torch.int32) if kind == "leftpad" else torch.zeros(batch, dtype=torch.int32)
    call = dict(options, cache_seqlens=begin)
    turn_k = turn_q = lambda x, b: x
    if rotary:
        angle = torch.outer(torch.arange(CAPACITY), torch.tensor([1.0, 0.3, 0.1], dtype=torch.float64))
        cos, sin = angle.cos(), angle.sin()
        call |= dict(rotary_cos=cos, rotary_sin=sin, rotary_interleaved=rotary == "interleaved")
        fixed = not options.get("causal") and "window_size" not in options

        def turn_k(x, b):
            return turned(x, torch.arange(new) + BEFORE[b], cos, sin, rotary == "interleaved")

        def turn_q(x, b):
            places = torch.full((new,), BEFORE[b]) if fixed else torch.arange(new) + BEFORE[b]
            return turned(x, places, cos, sin, rotary == "interleaved")

    given_k, given_v = k_cache, v_cache
    if kind == "batch_idx":
        place = torch.tensor([3, 0, 4])
        given_k, given_v = (
            torch.full((5, *t.shape[1:]), torch.nan, dtype=t.dtype).index_copy_(0, place, t) for t in (k_cache, v_cache)
        )
        call["cache_batch_idx"] = place.int()
    elif kind == "leftpad":
        call["cache_leftpad"] = leftpad
    elif kind == "pages":
        table = torch.randperm(batch * 3, generator=torch.Generator().manual_seed(0)).view(batch, 3)
        given_k, given_v = (torch.empty(batch * 3, 4, HK, E, dtype=t.dtype).index_copy_(
            0, table.flatten(), t.unflatten(1, (3, 4)).flatten(0, 1)) for t in (k_cache, v_cache))  # fmt: skip
        call["block_table"] = table.int()
    out, lse = flash_attn_with_kvcache(q, given_k, given_v, k, v, **call, return_softmax_lse=True)
    for b, length in enumerate(BEFORE):
        all_k = torch.cat((old_k[b, leftpad[b] : length], turn_k(k[b], b)))
        all_v = torch.cat((old_v[b, leftpad[b] : length], v[b]))
        expected, expected_lse = dense(turn_q(q[b], b), all_k, all_v, **options)
        torch.testing.assert_close(out[b], expected)
        torch.testing.assert_close(lse[b], expected_lse)
        if kind == "rows":
            torch.testing.assert_close(given_k[b, length : length + new], turn_k(k[b], b))
            assert given_k[b, length + new :].isnan().all() and torch.equal(given_v[b, length : length + new], v[b])


def test_without_new_keys():
    q, k, v = random(2, 2, H, E), random(2, 6, HK, E, seed=1), random(2, 6, HK, E, seed=2)
    expected, _ = batched(q, k, v, causal=True)
    torch.testing.assert_close(flash_attn_with_kvcache(q, k, v, causal=True), expected)
    expected, _ = batched(q, k[:, :4], v[:, :4], causal=True)
    for lengths in (4, torch.tensor([4, 4], dtype=torch.int32)):
        torch.testing.assert_close(flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True, num_splits=2), expected)


def test_a_padded_sequence_does_not_run_into_the_next_row():
    k_cache = torch.zeros(2, 6, HK, E)
    new, leftpad = torch.ones(2, 2, HK, E), torch.tensor([3, 0], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="the cache has 12 pages"):
        flash_attn_with_kvcache(
            torch.ones(2, 2, H, E), k_cache, k_cache.clone(), new, new, cache_seqlens=torch.tensor([5, 1]), cache_leftpad=leftpad
        )
    assert not k_cache.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(k=None), "k and v go together"),
        (dict(rotary_cos=torch.zeros(9, 2)), "rotary_cos and rotary_sin go together"),
        (dict(k=None, v=None, rotary_cos=torch.zeros(9, 2), rotary_sin=torch.zeros(9, 2)), "go with new keys"),
        (dict(cache_seqlens=None), "cache_seqlens is needed with k and v"),
        (dict(block_table=torch.zeros(1, 1).int(), cache_batch_idx=torch.zeros(1).int()), "block_table goes without"),
    ],
)
def test_contradictions(changes, message):
    cache, new = torch.zeros(1, 6, HK, E), torch.zeros(1, 1, HK, E)
    call = dict(k=new, v=new, cache_seqlens=1) | changes
    with pytest.raises(ValueError, match=message):
        flash_attn_with_kvcache(torch.zeros(1, 1, H, E), cache, cache.clone(), **call)


def test_rotary_tables_of_a_wrong_shape():
    cache, new = torch.zeros(1, 6, HK, E), torch.zeros(1, 1, HK, E)
    for cos, sin in (
        (torch.zeros(6, 5), torch.zeros(6, 5)),
        (torch.zeros(6, 2), torch.zeros(6, 3)),
        (torch.zeros(2), torch.zeros(2)),
    ):
        with pytest.raises(RuntimeError, match="rotary_cos and rotary_sin must be"):
            flash_attn_with_kvcache(
                torch.zeros(1, 1, H, E), cache, cache.clone(), new, new, cache_seqlens=1, rotary_cos=cos, rotary_sin=sin
            )


def test_arguments_stand_in_the_published_order():
    shared = [
        "dropout_p",
        "softmax_scale",
        "causal",
        "window_size",
        "softcap",
        "alibi_slopes",
        "deterministic",
        "return_attn_probs",
    ]
    cu = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    published = {
        "flash_attn_func": ["q", "k", "v", *shared],
        "flash_attn_kvpacked_func": ["q", "kv", *shared],
        "flash_attn_qkvpacked_func": ["qkv", *shared],
        "flash_attn_varlen_func": ["q", "k", "v", *cu, *shared, "block_table"],
        "flash_attn_varlen_kvpacked_func": ["q", "kv", *cu, *shared],
        "flash_attn_varlen_qkvpacked_func": ["qkv", "cu_seqlens", "max_seqlen", *shared],
        "flash_attn_with_kvcache": [
            "q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx", "cache_leftpad",
            "block_table", "softmax_scale", "causal", "window_size", "softcap", "rotary_interleaved", "alibi_slopes",
            "num_splits", "return_softmax_lse",
        ],
    }  # fmt: skip
    assert sorted(published) == flash_attn.__all__
    for name, arguments in published.items():
        assert list(inspect.signature(getattr(flash_attn, name)).parameters) == arguments


def test_wrong_calls():
    """Types and names, before anything runs."""
    q, cache = torch.zeros(2, 1, 4, 8), torch.zeros(2, 16, 4, 8)
    with pytest.raises(TypeError, match=r"flash_attn_func.* keyword argument 'scale'; it is called softmax_scale here"):
        flash_attn.flash_attn_func(q, q, q, scale=1.0)
    with pytest.raises(TypeError, match=r"window_size must be \(left, right\).* got 4"):
        flash_attn.flash_attn_func(q, q, q, window_size=4)
    with pytest.raises(TypeError, match="qkv must be a Tensor, not list"):
        flash_attn.flash_attn_qkvpacked_func([1])
    with pytest.raises(TypeError, match="cu_seqlens_q must be a Tensor, not NoneType"):
        flash_attn.flash_attn_varlen_func(q[0], q[0], q[0], None, None, 1, 1)
    with pytest.raises(TypeError, match="cache_seqlens must be an int or a Tensor"):
        flash_attn.flash_attn_with_kvcache(q, cache, cache, cache_seqlens="3")
    with pytest.raises(TypeError, match="cache_batch_idx must be a Tensor, not list"):
        flash_attn.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=3, cache_batch_idx=[0, 1])
