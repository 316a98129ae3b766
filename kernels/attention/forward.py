"""Attention forward: one program per sequence, query head and block of queries walks over the keys it sees.

"FlashAttention" (arXiv 2205.14135) and "FlashAttention-2" (arXiv 2307.08691): the scores of a tile never leave the chip, the loop
is over keys, and only tiles at the edge of a window or a length are masked. What FlashAttention-3 (arXiv 2407.08608) adds on
Hopper (warp specialization, overlap of softmax and products) is left to the compiler. docs/design/attention.md has an overview.
"""

import triton
import triton.language as tl

from fastseq.kernels.attention.bias import band, from_band, scores
from fastseq.kernels.attention.mask import any_block, keys_of, seen, sequence
from fastseq.kernels.attention.memory import load_rows, owner, store_rows, store_scalars
from fastseq.kernels.attention.softmax import dropped, finish, start, update


@triton.jit
def _tile(
    acc, m_i, l_i, query, rq, k, v, parts, dropout, b, h, hk, i, i0, j0, k0, shift, Tq, Tk, Hq,
    E: tl.constexpr, EV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BEV: tl.constexpr,
    PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One tile of keys: acc [BM, BEV], m_i and l_i [BM] (see `softmax`)."""
    cols = tl.arange(0, BE)
    j = j0 + tl.arange(0, BN)
    key = load_rows(k, b, hk, k0, j, Tk, cols, E, BE, not EDGE)  # [BN, BE]
    product = tl.dot(query, tl.trans(key), input_precision=PRECISION, out_dtype=acc.dtype)
    if parts.relative_q is not None:
        W: tl.constexpr = 2 * (BM if BM > BN else BN)
        r = band(parts.relative_k, h, i0, j0, shift, cols, E, BE, BM, W)
        product += from_band(tl.dot(rq, tl.trans(r), input_precision=PRECISION, out_dtype=acc.dtype), BM, BN, W)
    s, _ = scores(product, parts, b, h, i, j, shift, Tq, Tk)
    s = tl.where(seen(parts, b, h, i, j, shift, Tq, Tk, EDGE), s, float("-inf"))
    w, m_i, l_i, factor = update(s, m_i, l_i, parts)
    w = dropped(w, dropout, parts, b, h, Hq, i, j0, BM, BN)
    value = load_rows(v, b, hk, k0, j, Tk, tl.arange(0, BEV), EV, BEV, not EDGE)
    acc = tl.dot(w.to(value.dtype), value, acc * factor[:, None], input_precision=PRECISION, out_dtype=acc.dtype)
    return acc, m_i, l_i


@triton.jit
def _walk(
    acc, m_i, l_i, query, rq, k, v, parts, dropout, b, h, hk, i, i0, k0, shift, Tq, Tk, begin, end, Hq,
    E: tl.constexpr, EV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BEV: tl.constexpr,
    PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """The keys [begin, end)."""
    for j0 in range(begin, end, BN):
        if parts.blocks is None:
            acc, m_i, l_i = _tile(
                acc, m_i, l_i, query, rq, k, v, parts, dropout, b, h, hk, i, i0, j0, k0, shift, Tq, Tk, Hq,
                E, EV, BM, BN, BE, BEV, PRECISION, EDGE,
            )  # fmt: skip
        elif any_block(parts, b, h, i0, j0, Tq, Tk, BM, BN):
            acc, m_i, l_i = _tile(
                acc, m_i, l_i, query, rq, k, v, parts, dropout, b, h, hk, i, i0, j0, k0, shift, Tq, Tk, Hq,
                E, EV, BM, BN, BE, BEV, PRECISION, EDGE,
            )  # fmt: skip
    return acc, m_i, l_i


@triton.jit
def forward(
    q,  # Rows [B, Hq, Tq, E]
    k,  # Rows [B, Hkv, Tk, E]
    v,  # Rows [B, Hkv, Tk, EV]
    out,  # Rows [B, Hq, Tq, EV]
    lse,  # Scalars [B, Hq, Tq]
    parts, dropout, seq, Tq, Tk, Hq, GROUP, blocks,
    E: tl.constexpr, EV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BEV: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks * Hq * B,), blocks of the longest sequence."""
    block, h, b = owner(blocks, Hq)
    hk = h // GROUP
    Tq_all = Tq
    q0, k0, Tq, Tk, shift = sequence(seq, b, Tq, Tk)
    if seq.cu_q is not None:
        Tq_all = Tq
    i0 = (blocks - 1 - block) * BM  # causal: the longest rows first
    if i0 >= Tq_all:
        return
    i = i0 + tl.arange(0, BM)
    cols = tl.arange(0, BE)
    query = load_rows(q, b, h, q0, i, Tq, cols, E, BE)
    rq = query
    if parts.relative_q is not None:
        rq = load_rows(parts.relative_q, b, h, q0, i, Tq, cols, E, BE)
    acc = tl.zeros((BM, BEV), ACC)
    m_i, l_i = start(parts, h, BM, ACC)
    alone, alone_lse = finish(m_i, l_i, parts)
    begin, inner, outer, end = keys_of(parts, i0, tl.minimum(i0 + BM, Tq), shift, Tk, BN)
    if parts.left is not None:
        acc, m_i, l_i = _walk(
            acc, m_i, l_i, query, rq, k, v, parts, dropout, b, h, hk, i, i0, k0, shift, Tq, Tk, begin, inner, Hq,
            E, EV, BM, BN, BE, BEV, PRECISION, True,
        )  # fmt: skip
    acc, m_i, l_i = _walk(
        acc, m_i, l_i, query, rq, k, v, parts, dropout, b, h, hk, i, i0, k0, shift, Tq, Tk, inner, outer, Hq,
        E, EV, BM, BN, BE, BEV, PRECISION, False,
    )  # fmt: skip
    acc, m_i, l_i = _walk(
        acc, m_i, l_i, query, rq, k, v, parts, dropout, b, h, hk, i, i0, k0, shift, Tq, Tk, outer, end, Hq,
        E, EV, BM, BN, BE, BEV, PRECISION, True,
    )  # fmt: skip
    factor, row_lse = finish(m_i, l_i, parts)
    valid = i < Tq  # the others saw keys as if they were queries
    store_scalars(lse, tl.where(valid, row_lse, alone_lse), b, h, q0, i, Tq_all)
    store_rows(out, tl.where(valid[:, None], acc * factor[:, None], 0.0), b, h, q0, i, Tq_all, EV, BEV)
