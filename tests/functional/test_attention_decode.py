"""The face of attention against a cache: appending, layouts, what is refused."""

from __future__ import annotations

import pytest
import torch

import fastseq
from fastseq.functional import _attention_decode, attention, attention_with_kv_cache

B, HQ, HKV, E, PAGE, PAGES = 2, 4, 2, 8, 4, 5
CAPACITY = PAGE * PAGES


def caches(paged, layout="bhsd", dtype=torch.float32):
    """k_cache, v_cache full of NaN, and the block table."""
    shape = (B * PAGES + 1, PAGE, HKV, E) if paged else (B, CAPACITY, HKV, E)
    pair = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)]
    if layout == "bhsd":
        pair = [cache.transpose(1, 2) for cache in pair]
    table = torch.randperm(B * PAGES + 1)[: B * PAGES].view(B, PAGES).int() if paged else None
    return *pair, table


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("window", [None, (3, -1)])
def test_a_growing_cache_is_one_attention(layout, paged, window):
    """A prompt at once, then one and three tokens at a time: the rows of causal attention over everything."""
    torch.manual_seed(0)
    q, k, v = torch.randn(B, HQ, 12, E), torch.randn(B, HKV, 12, E), torch.randn(B, HKV, 12, E)
    expected, expected_lse = attention(q, k, v, causal=True, window_size=window, return_lse=True)
    k_cache, v_cache, table = caches(paged, layout)
    given = (lambda t: t) if layout == "bhsd" else (lambda t: t.transpose(1, 2))
    before = 0
    for count in (5, 1, 1, 3, 2):
        part = slice(before, before + count)
        out, lse = attention_with_kv_cache(
            given(q[:, :, part]), k_cache, v_cache, cache_seqlens=torch.full((B,), before), k_new=given(k[:, :, part]),
            v_new=given(v[:, :, part]), block_table=table, layout=layout, window_size=window, return_lse=True,
        )  # fmt: skip
        torch.testing.assert_close(given(out), expected[:, :, part])
        torch.testing.assert_close(lse, expected_lse[:, :, part])
        before += count
    again = attention_with_kv_cache(
        given(q[:, :, -2:]),
        k_cache,
        v_cache,
        cache_seqlens=torch.full((B,), before),
        block_table=table,
        layout=layout,
        window_size=window,
    )
    assert torch.equal(again, out)


@pytest.mark.parametrize("paged", [False, True])
def test_only_the_new_places_are_written(paged):
    k_cache, v_cache, table = caches(paged)
    lengths, new = torch.tensor([3, 7], dtype=torch.int32), torch.randn(B, HKV, 2, E)
    k_cache.zero_(), v_cache.zero_()
    attention_with_kv_cache(
        torch.randn(B, HQ, 1, E), k_cache, v_cache, cache_seqlens=lengths, k_new=new, v_new=-new, block_table=table
    )
    rows = k_cache if table is None else torch.stack([torch.cat(list(k_cache[pages]), 1) for pages in table.long()])
    expected = torch.zeros(B, HKV, CAPACITY, E)
    for b, length in enumerate(lengths.tolist()):
        expected[b, :, length : length + 2] = new[b]
    assert torch.equal(rows, expected) and torch.equal(v_cache, -k_cache)
    assert lengths.tolist() == [3, 7]


OPTIONS = [
    dict(),
    dict(scale=0.7, softcap=1.5),
    dict(window_size=(4, 0), num_splits=2),
    dict(causal=False, window_size=(3, 1)),
    dict(alibi_slopes=torch.rand(HQ), sinks=torch.randn(HQ)),
    dict(alibi_slopes=torch.rand(B, HQ)),
]


def made(paged, layout, dtype, integers, options, seed=0):
    """The arguments of a step that appends two keys to caches whose other places hold NaN."""
    torch.manual_seed(seed)
    k_cache, v_cache, table = caches(paged, layout, dtype)
    given = (lambda t: t) if layout == "bhsd" else (lambda t: t.transpose(1, 2))
    tensors = dict(q=torch.randn(B, HQ, 2, E), k_new=torch.randn(B, HKV, 2, E), v_new=torch.randn(B, HKV, 2, E))
    tensors = {name: given(tensor.to(dtype)) for name, tensor in tensors.items()}
    lengths = torch.tensor([9, 14], dtype=integers)
    k, v = (given(torch.randn(B, HKV, 14, E).to(dtype)) for _ in range(2))
    attention_with_kv_cache(
        tensors["q"], k_cache, v_cache, cache_seqlens=torch.zeros(B).int(), k_new=k, v_new=v, block_table=table, layout=layout
    )
    if paged:
        table = table.to(integers)
        table[0, 3:] = -7  # not used
    options = {name: o.double() if name == "alibi_slopes" and dtype == torch.float64 else o for name, o in options.items()}
    options = {name: o.to(dtype) if name == "sinks" else o for name, o in options.items()}
    return dict(
        **tensors, **options, k_cache=k_cache, v_cache=v_cache, cache_seqlens=lengths, block_table=table, layout=layout,
        return_lse=True,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
@pytest.mark.parametrize(("layout", "integers"), [("bhsd", torch.int32), ("bshd", torch.int64)])
@pytest.mark.parametrize("paged", [False, True])
def test_a_plain_call_is_one_native_call_with_the_same_results(paged, layout, integers, options, dtype, monkeypatch):
    one, other = (made(paged, layout, dtype, integers, options) for _ in range(2))
    seen, natively = [], _attention_decode._natively
    with monkeypatch.context() as patch:
        patch.setattr(_attention_decode, "_natively", lambda *args: seen.append(natively(*args)) or seen[-1])
        results = attention_with_kv_cache(**one)
    with monkeypatch.context() as patch:
        patch.setattr(_attention_decode, "plain_call", lambda unseen: False)
        expected = attention_with_kv_cache(**other)
    assert len(seen) == 1 and len(seen[0]) == 2
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(results, expected, strict=True))
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, equal_nan=True)


def test_who_looks_on_is_not_passed_by():
    """What wants a gradient, is watched, of another device or a subclass goes the other way; writing is noted."""
    call = made(False, "bhsd", torch.float32, torch.int32, {})
    version = call["k_cache"]._version, call["v_cache"]._version
    attention_with_kv_cache(**call)
    assert (call["k_cache"]._version, call["v_cache"]._version) > version
    assert fastseq.explain(attention_with_kv_cache, **call).backends == ["cpu"]
    with pytest.raises(RuntimeError, match="has no backward"):
        attention_with_kv_cache(**call | {"q": call["q"].requires_grad_()})
    with torch.no_grad():
        attention_with_kv_cache(**call)
    with fastseq.use_backend("reference"):
        assert fastseq.explain(attention_with_kv_cache, **call | {"q": call["q"].detach()}).backends == ["reference"]


def test_nothing_is_written_by_a_call_that_is_refused():
    for paged in (False, True):
        call = made(paged, "bhsd", torch.float32, torch.int64, {})
        before = call["k_cache"].clone(), call["v_cache"].clone()
        wrong = [dict(cache_seqlens=torch.tensor([1, CAPACITY - 1])), dict(cache_seqlens=torch.tensor([1, 1 << 32]))]
        if paged:
            wrong.append(dict(block_table=call["block_table"].index_fill(1, torch.tensor([2]), 1 << 33)))
        for changes in wrong:
            with pytest.raises(RuntimeError, match=r"cache_seqlens must lie in|block_table\[0, 2\] is"):
                attention_with_kv_cache(**call | changes)
        for cache, then in zip((call["k_cache"], call["v_cache"]), before, strict=True):
            torch.testing.assert_close(cache, then, rtol=0, atol=0, equal_nan=True)


def test_options_reach_the_op():
    torch.manual_seed(0)
    q, k, v = torch.randn(B, HQ, 3, E), torch.randn(B, HKV, 9, E), torch.randn(B, HKV, 9, E)
    slopes, sinks, lengths = torch.rand(B, HQ), torch.randn(HQ), torch.tensor([9, 5])
    for options in (dict(scale=0.7), dict(softcap=1.5), dict(window_size=(2, 0)), dict(sinks=sinks), dict(alibi_slopes=slopes)):
        expected = attention(q, k, v, causal=True, alignment="bottom_right", seqlens_k=lengths, **options)
        torch.testing.assert_close(attention_with_kv_cache(q, k, v, cache_seqlens=lengths, **options), expected)
    expected = attention(q, k, v, alignment="bottom_right", window_size=(2, 1), seqlens_k=lengths)
    torch.testing.assert_close(
        attention_with_kv_cache(q, k, v, cache_seqlens=lengths, window_size=(2, 1), causal=False), expected
    )


def test_under_autocast_everything_takes_the_dtype_of_the_cache():
    k_cache, v_cache, _ = caches(False, dtype=torch.bfloat16)
    q, new = torch.randn(B, HQ, 1, E), torch.randn(B, HKV, 1, E)
    call = dict(cache_seqlens=torch.zeros(B, dtype=torch.int32), k_new=new, v_new=new)
    with pytest.raises(RuntimeError, match="must have one dtype"):
        attention_with_kv_cache(q, k_cache, v_cache, **call)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention_with_kv_cache(q, k_cache, v_cache, **call)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, new.bfloat16().repeat_interleave(HQ // HKV, 1))


def test_compiles_in_one_graph():
    def step(q, k_cache, v_cache, lengths, new, table):
        return attention_with_kv_cache(q, k_cache, v_cache, cache_seqlens=lengths, k_new=new, v_new=new, block_table=table)

    q, new, lengths = torch.randn(B, HQ, 1, E), torch.randn(B, HKV, 1, E), torch.tensor([3, 7])
    k_cache, v_cache, table = (t.nan_to_num() for t in caches(True))
    k_other, v_other = k_cache.clone(), v_cache.clone()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k_other, v_other, lengths, new, table), step(q, k_cache, v_cache, lengths, new, table))
    assert torch.equal(k_other, k_cache) and torch.equal(v_other, v_cache)


Q, KV = (B, HQ, 1, E), (B, HKV, CAPACITY, E)
NEW = (B, HKV, 1, E)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(layout="bhet"), ValueError, "layout must be one of bhsd, bshd, got 'bhet'"),
        (dict(causal="bottom_right"), TypeError, "causal must be a bool"),
        (dict(window_size=(1, 2, 3)), ValueError, "window_size must be"),
        (dict(softcap=-1.0), ValueError, "softcap must be finite and not negative"),
        (dict(scale=float("nan")), ValueError, "scale must be finite"),
        (dict(num_splits=-1), ValueError, "num_splits must not be negative"),
        (dict(num_splits="2"), TypeError, "num_splits must be an int"),
        (dict(k_new=torch.zeros(NEW)), ValueError, "k_new and v_new go together"),
        (dict(cache_seqlens=[1, 2]), TypeError, "cache_seqlens must be a Tensor"),
        (dict(cache_seqlens=torch.ones(B)), RuntimeError, "cache_seqlens must be int32 or int64"),
        (dict(cache_seqlens=torch.ones(B + 1, dtype=torch.int32)), RuntimeError, r"cache_seqlens must be \[B\] = \[2\]"),
        (dict(cache_seqlens=torch.tensor([1, CAPACITY + 1])), RuntimeError, r"cache_seqlens must lie in 0\.\.20, got \[1, 21\]"),
        (
            dict(cache_seqlens=torch.tensor([1, CAPACITY]), k_new=torch.zeros(NEW), v_new=torch.zeros(NEW)),
            RuntimeError,
            r"cache_seqlens must lie in 0\.\.19, got \[1, 20\]",
        ),
        (dict(q=torch.zeros(B, 3, 1, E)), RuntimeError, "heads must be a multiple of those of the cache, got 3 and 2"),
        (dict(q=torch.zeros(B + 1, HQ, 1, E)), RuntimeError, "must have one batch size, got 3 and 2"),
        (dict(q=torch.zeros(B, HQ, 1, E + 1)), RuntimeError, "must have the same features, got 9 and 8"),
        (dict(q=torch.zeros(B, HQ, E)), RuntimeError, r"q must be \[B, H, T, E\]"),
        (dict(q=torch.zeros(Q).half()), RuntimeError, "must have one dtype"),
        (dict(k_cache=torch.zeros(B, HKV, CAPACITY + 1, E)), RuntimeError, "must agree in all but features"),
        (dict(k_cache=torch.zeros(B, HKV, E, CAPACITY).mT), RuntimeError, "last dimension of k_cache must be contiguous"),
        (dict(k_new=torch.zeros(B, 1, 1, E), v_new=torch.zeros(NEW)), RuntimeError, "k_new must be"),
        (dict(k_new=torch.zeros(NEW), v_new=torch.zeros(B, HKV, 2, E)), RuntimeError, "must be of one length, got 1 and 2"),
        (dict(k_new=torch.zeros(NEW).half(), v_new=torch.zeros(NEW)), RuntimeError, "k_new must have the cache's dtype"),
        (dict(block_table=torch.zeros(B, 2)), RuntimeError, "block_table must be int32 or int64"),
        (dict(block_table=torch.zeros(B + 1, 2, dtype=torch.int32)), RuntimeError, "block_table must be int32 or int64"),
        (dict(block_table=torch.tensor([[0], [2]])), RuntimeError, r"block_table\[1, 0\] is 2, but the cache has 2 pages"),
        (dict(alibi_slopes=torch.zeros(HQ + 1)), RuntimeError, "alibi_slopes must be"),
        (dict(sinks=torch.zeros(HKV)), RuntimeError, r"sinks must be \[Hq\] = \[4\]"),
        (dict(q=torch.zeros(Q, requires_grad=True)), RuntimeError, "has no backward"),
        (
            dict(k_new=torch.zeros(NEW, requires_grad=True), v_new=torch.zeros(NEW)),
            RuntimeError,
            "has no backward",
        ),
    ],
)
def test_what_is_refused(changes, error, message):
    cache = torch.zeros(KV)
    call = dict(q=torch.zeros(Q), k_cache=cache, v_cache=cache.clone(), cache_seqlens=torch.tensor([1, 2])) | changes
    with pytest.raises(error, match=message):
        attention_with_kv_cache(call.pop("q"), call.pop("k_cache"), call.pop("v_cache"), **call)
    assert not cache.any()


def test_entries_of_pages_out_of_use_may_be_anything():
    k_cache, v_cache, table = caches(True)
    k_cache, v_cache = torch.randn_like(k_cache), torch.randn_like(v_cache)
    lengths = torch.tensor([11, 17], dtype=torch.int32)
    expected = attention_with_kv_cache(
        torch.ones(Q), k_cache, v_cache, cache_seqlens=lengths, block_table=table, window_size=(4, 0)
    )
    table[0, :1], table[0, 3:], table[1, :3] = -1, 1 << 30, -7
    assert torch.equal(
        attention_with_kv_cache(torch.ones(Q), k_cache, v_cache, cache_seqlens=lengths, block_table=table, window_size=(4, 0)),
        expected,
    )
    with pytest.raises(RuntimeError, match=r"block_table\[0, 0\] is -1"):
        attention_with_kv_cache(torch.ones(Q), k_cache, v_cache, cache_seqlens=lengths, block_table=table, window_size=(8, 0))
