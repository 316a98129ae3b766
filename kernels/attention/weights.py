"""The attention weights, from q, k and the lse of a forward: one program per tile of them."""

import triton
import triton.language as tl

from fastseq.kernels.attention.bias import band, from_band, scores
from fastseq.kernels.attention.mask import any_block, keys_of, seen, sequence
from fastseq.kernels.attention.memory import load_rows, load_scalars, owner, pair_places
from fastseq.kernels.attention.softmax import dropped, weights


@triton.jit
def _of_head(
    q, k, lse, parts, dropout, b, h, GROUP, i, j, i0, j0, shift, Tq, Tk, Hq,
    E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BM, BN]: the weights of one head after dropout."""
    cols = tl.arange(0, BE)
    query = load_rows(q, b, h, 0, i, Tq, cols, E, BE)
    key = load_rows(k, b, h // GROUP, 0, j, Tk, cols, E, BE)
    product = tl.dot(query, tl.trans(key), input_precision=PRECISION, out_dtype=ACC)
    if parts.relative_q is not None:
        W: tl.constexpr = 2 * (BM if BM > BN else BN)
        rq = load_rows(parts.relative_q, b, h, 0, i, Tq, cols, E, BE)
        r = band(parts.relative_k, h, i0, j0, shift, cols, E, BE, BM, W)
        product += from_band(tl.dot(rq, tl.trans(r), input_precision=PRECISION, out_dtype=ACC), BM, BN, W)
    s, _ = scores(product, parts, b, h, i, j, shift, Tq, Tk)
    s = tl.where(seen(parts, b, h, i, j, shift, Tq, Tk, True), s, float("-inf"))
    w = weights(s, load_scalars(lse, b, h, 0, i, Tq), parts)
    return dropped(w, dropout, parts, b, h, Hq, i, j0, BM, BN)


@triton.jit
def attention_weights(
    q,  # Rows [B, Hq, Tq, E]
    k,  # Rows [B, Hkv, Tk, E]
    lse,  # Scalars [B, Hq, Tq]
    out,  # Pairs [B, Hq or 1, Tq, Tk]
    parts, dropout, seq, Tq, Tk, Hq, GROUP, row_blocks, blocks,
    own,  # heads of `out`, each of which is the mean of `heads`
    heads,
    E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks * own * B,), row_blocks blocks of queries times those of keys. Every entry of `out` is written."""
    block, first, b = owner(blocks, own)
    i0, j0 = block % row_blocks * BM, block // row_blocks * BN
    i, j = i0 + tl.arange(0, BM), j0 + tl.arange(0, BN)
    _, _, Tq_own, Tk_own, shift = sequence(seq, b, Tq, Tk)
    begin, _, _, end = keys_of(parts, i0, tl.minimum(i0 + BM, Tq_own), shift, Tk_own, BN)
    acc = tl.zeros((BM, BN), ACC)
    if (begin < j0 + BN) & (j0 < end):
        for h in range(first * heads, first * heads + heads):
            if parts.blocks is None:
                acc += _of_head(
                    q, k, lse, parts, dropout, b, h, GROUP, i, j, i0, j0, shift, Tq_own, Tk_own, Hq, E, BM, BN, BE, ACC, PRECISION
                )
            elif any_block(parts, b, h, i0, j0, Tq_own, Tk_own, BM, BN):
                acc += _of_head(
                    q, k, lse, parts, dropout, b, h, GROUP, i, j, i0, j0, shift, Tq_own, Tk_own, Hq, E, BM, BN, BE, ACC, PRECISION
                )
    inside = (i < Tq)[:, None] & (j < Tk)[None, :]
    tl.store(pair_places(out, b, first, i, j), (acc / heads).to(out.pointer.dtype.element_ty), mask=inside)
