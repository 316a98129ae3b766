"""Attention of a few queries against a cache, contiguous or paged.

One program per sequence, key head, row block and part of the keys; the rows of a block are the query heads of that key head times
the queries, so the cache is read once. Parts of the keys are merged by their lse (split-KV: "Flash-Decoding for long-context
inference", https://pytorch.org/blog/flash-decoding/); pages are those of "PagedAttention" (arXiv 2309.06180).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastseq.kernels.attention.bias import scores
from fastseq.kernels.attention.mask import keys_of, seen
from fastseq.kernels.attention.memory import load_rows, owner, store_rows, store_scalars
from fastseq.kernels.attention.softmax import LOG2E, exp, finish, start, update


class Pages(NamedTuple):
    """Block table int32 [B, max_pages], the last dimension contiguous."""

    table: Any
    batch: Any


@triton.jit
def _load_cached(x, pages, b, h, j, wanted, PAGE: tl.constexpr, E: tl.constexpr, BE: tl.constexpr):
    """[BN, BE]: entries j [BN] of sequence b in a cache, zero where not `wanted` [BN]."""
    if pages is None:
        entry = b * x.batch + j.to(tl.int64) * x.time
    else:
        page = tl.load(pages.table + b * pages.batch + j // PAGE, mask=wanted, other=0)
        entry = page.to(tl.int64) * x.batch + (j % PAGE).to(tl.int64) * x.time
    cols = tl.arange(0, BE)
    valid = wanted[:, None]
    if E != BE:
        valid &= (cols < E)[None, :]
    return tl.load(x.pointer + h * x.head + entry[:, None] + cols[None, :], mask=valid, other=0.0)


@triton.jit
def decode(
    q,  # Rows [B, Hq, Tq, E]
    k,  # Rows [B, Hkv, S, E], or [pages, Hkv, PAGE, E]
    v,  # Rows, EV
    out,  # Rows [PARTS * B, Hq, Tq, EV]
    lse,  # Scalars [PARTS * B, Hq, Tq]
    pages,  # Pages or None
    lengths,  # int32 [B]
    parts, B, Tq, S, Hkv, PARTS,
    GROUP: tl.constexpr, PAGE: tl.constexpr, E: tl.constexpr, EV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BEV: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (PARTS * row blocks * Hkv * B,)."""
    block, hk, b = owner(PARTS * tl.cdiv(GROUP * Tq, BM), Hkv)
    part, r0 = block % PARTS, block // PARTS * BM
    rows = r0 + tl.arange(0, BM)
    i, h = rows // GROUP, hk * GROUP + rows % GROUP
    Tk = tl.minimum(tl.maximum(tl.load(lengths + b), 0), S)
    shift = Tk - Tq
    query = load_rows(q, b, h[:, None], 0, i, Tq, tl.arange(0, BE), E, BE)

    i0 = r0 // GROUP
    begin, inner, outer, end = keys_of(parts, i0, tl.minimum((r0 + BM - 1) // GROUP + 1, Tq), shift, Tk, BN)
    lowest = begin
    if parts.left is not None:
        lowest = tl.maximum(i0 + shift - parts.left, 0)
    share = tl.cdiv(tl.cdiv(end - begin, BN), PARTS) * BN
    begin += part * share
    end = tl.minimum(end, begin + share)

    acc = tl.zeros((BM, BEV), ACC)
    m_i, l_i = start(parts, h, BM, ACC)
    m_i = tl.where(part == 0, m_i, float("-inf"))  # the sink is in one part only
    for j0 in range(begin, end, BN):
        j = j0 + tl.arange(0, BN)
        wanted = (j >= lowest) & (j < end)
        key = _load_cached(k, pages, b, hk, j, wanted, PAGE, E, BE)
        product = tl.dot(query, tl.trans(key), input_precision=PRECISION, out_dtype=ACC)
        s, capped = scores(product, parts, b, h[:, None], i, j, shift, Tq, Tk)
        s = tl.where(seen(parts, b, h, i, j, shift, Tq, Tk, True), s, float("-inf"))
        w, m_i, l_i, factor = update(s, m_i, l_i, parts)
        value = _load_cached(v, pages, b, hk, j, wanted, PAGE, EV, BEV)
        acc = tl.dot(w.to(value.dtype), value, acc * factor[:, None], input_precision=PRECISION, out_dtype=ACC)
    factor, row_lse = finish(m_i, l_i, parts)
    at = b + part.to(tl.int64) * B
    store_scalars(lse, row_lse, at, h, 0, i, Tq)
    store_rows(out, acc * factor[:, None], at, h[:, None], 0, i, Tq, EV, BEV)


@triton.jit
def combine(
    part_out,  # [PARTS, B, Hq, Tq, EV]
    part_lse,  # [PARTS, B, Hq, Tq]
    out,  # Rows [B, Hq, Tq, EV]
    lse,  # [B, Hq, Tq]
    Tq, Hq, EV: tl.constexpr, PARTS: tl.constexpr, BP: tl.constexpr, CHUNK: tl.constexpr, BEV: tl.constexpr,
):  # fmt: skip
    """Grid: (Tq * Hq * B,). The mean of the parts, each weighted by exp lse, in their order."""
    t, h, b = owner(Tq, Hq)
    row, rows = tl.program_id(0), tl.num_programs(0).to(tl.int64)
    every = tl.arange(0, BP)
    lses = tl.load(part_lse + every * rows + row, mask=every < PARTS, other=float("-inf"))
    m_i = tl.max(lses, 0)
    m_i = tl.where(m_i == float("-inf"), 0.0, m_i)
    l_i = tl.sum(exp(lses - m_i), 0)
    cols = tl.arange(0, BEV)
    acc = tl.zeros((BEV,), part_out.dtype.element_ty)
    for p0 in range(0, PARTS, CHUNK):
        p = p0 + tl.arange(0, CHUNK)
        one = tl.load(part_lse + p * rows + row, mask=p < PARTS, other=float("-inf"))
        valid = (one > float("-inf"))[:, None] & (cols < EV)[None, :]
        values = tl.load(part_out + (p * rows + row)[:, None] * EV + cols[None, :], mask=valid, other=0.0)
        acc += tl.sum(exp(one - m_i)[:, None] * values, 0)
    empty = l_i == 0.0
    l_i = tl.where(empty, 1.0, l_i)
    tl.store(lse + row, tl.where(empty, float("-inf"), m_i + tl.log2(l_i) / LOG2E))
    at = out.pointer + b * out.batch + h * out.head + t * out.time + cols
    tl.store(at, (acc / l_i).to(out.pointer.dtype.element_ty), mask=cols < EV)
