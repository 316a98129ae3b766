"""Attention backward: every pass owns its results, so that no two programs add to one place and reruns give the same bits.

As in "FlashAttention-2" (arXiv 2307.08691), the weights are formed again from the lse, and delta is known beforehand; unlike
there, dq has a pass of its own in place of atomic additions. docs/design/attention.md has an overview.

With ds_ij = w_ij (dropped(dw_ij) - delta_i), dw_ij = dout_i . v_j and delta_i = dout_i . out_i - dlse_i:

    dv_j = sum_i dropped(w_ij) dout_i,   dq_i = scale sum_j dz_ij k_j,   dk_j = scale sum_i dz_ij q_i

with dz = ds, or under a softcap ds (1 - tanh^2(s / softcap)).

For the gradient of the weights themselves, dw is given and delta_i = sum_j w_ij dropped(dw_ij).
"""

import triton
import triton.language as tl

from fastseq.kernels.attention.bias import band, from_band, scores, to_band
from fastseq.kernels.attention.mask import any_block, keys_of, queries_of, seen, sequence
from fastseq.kernels.attention.memory import load_rows, load_scalars, owner, pair_places, store_rows, store_scalars
from fastseq.kernels.attention.softmax import kept, weights


@triton.jit
def load_lse(incoming, b, h, first, i, Tq):
    """[len(i)]; +inf, under which every weight is 0, for rows beyond Tq."""
    return tl.where(i < Tq, load_scalars(incoming.lse, b, h, first, i, Tq), float("inf"))


@triton.jit
def tile(
    query, rq, key, do, value, lse, delta, incoming, parts, dropout, b, h, i, j, i0, j0, shift, Tq, Tk, Hq,
    E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr,
    KEYS_FIRST: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """Of rows i and keys j, [BM, BN]: the weights after dropout, ds, and tanh(s / softcap) (anything, without a softcap).

    KEYS_FIRST: the products are formed as [BN, BM], so that w and ds leave them the way that sums over queries take them;
    what belongs to keys beyond Tk is anything. QUADS: j0 is a multiple of 4."""
    if KEYS_FIRST:
        product = tl.trans(tl.dot(key, tl.trans(query), input_precision=PRECISION, out_dtype=lse.dtype))
    else:
        product = tl.dot(query, tl.trans(key), input_precision=PRECISION, out_dtype=lse.dtype)
    if parts.relative_q is not None:
        W: tl.constexpr = 2 * (BM if BM > BN else BN)
        r = band(parts.relative_k, h, i0, j0, shift, tl.arange(0, BE), E, BE, BM, W)
        product += from_band(tl.dot(rq, tl.trans(r), input_precision=PRECISION, out_dtype=lse.dtype), BM, BN, W)
    s, t = scores(product, parts, b, h, i, j, shift, Tq, Tk)
    w = weights(tl.where(seen(parts, b, h, i, j, shift, Tq, Tk, EDGE, not KEYS_FIRST), s, float("-inf")), lse, parts)
    if incoming.dw is not None:
        inside = (i < Tq)[:, None] & (j < Tk)[None, :]
        dw = tl.load(pair_places(incoming.dw, b, h, i, j), mask=inside, other=0.0).to(lse.dtype) * incoming.scale
    elif KEYS_FIRST:
        dw = tl.trans(tl.dot(value, tl.trans(do), input_precision=PRECISION, out_dtype=lse.dtype))
    else:
        dw = tl.dot(do, tl.trans(value), input_precision=PRECISION, out_dtype=lse.dtype)
    dropped = w
    if dropout is not None:
        keep = kept(dropout, parts, b, h, Hq, i, j0, BM, BN, QUADS)
        dropped = tl.where(keep, w * dropout.scale, 0.0)
        dw = tl.where(keep, dw * dropout.scale, 0.0)
    return dropped, w * (dw - delta[:, None]), t


@triton.jit
def through_cap(ds, t, parts):
    """dz."""
    if parts.softcap is not None:
        ds = ds * (1 - t * t)
    return ds


@triton.jit
def delta_of_out(
    out,  # Rows [B, Hq, Tq, EV]
    dlse,  # Scalars [B, Hq, Tq] or None
    incoming, seq, Tq, Tk, Hq, blocks, EV: tl.constexpr, BM: tl.constexpr, BEV: tl.constexpr,
):  # fmt: skip
    """delta = dout . out - dlse. Grid: (blocks * Hq * B,)."""
    block, h, b = owner(blocks, Hq)
    q0, k0, Tq_own, Tk, shift = sequence(seq, b, Tq, Tk)
    i = block * BM + tl.arange(0, BM)
    cols = tl.arange(0, BEV)
    acc = incoming.delta.pointer.dtype.element_ty
    do = load_rows(incoming.dout, b, h, q0, i, Tq_own, cols, EV, BEV).to(acc)
    delta = tl.sum(do * load_rows(out, b, h, q0, i, Tq_own, cols, EV, BEV).to(acc), 1)
    if dlse is not None:
        delta -= load_scalars(dlse, b, h, q0, i, Tq_own)
    _store_delta(delta, incoming, seq, b, h, q0, i, Tq, Tq_own)


@triton.jit
def _store_delta(delta, incoming, seq, b, h, q0, i, Tq, Tq_own):
    if seq.cu_q is not None:
        Tq = Tq_own
    store_scalars(incoming.delta, delta, b, h, q0, i, Tq)


@triton.jit
def delta_of_weights(
    q, k, incoming, parts, dropout, seq, Tq, Tk, Hq, GROUP, blocks,
    E: tl.constexpr, EV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BEV: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """delta_i = sum_j w_ij dropped(dw_ij). Grid: (blocks * Hq * B,)."""
    block, h, b = owner(blocks, Hq)
    q0, k0, Tq_own, Tk, shift = sequence(seq, b, Tq, Tk)
    i0 = block * BM
    i = i0 + tl.arange(0, BM)
    cols = tl.arange(0, BE)
    query = load_rows(q, b, h, q0, i, Tq_own, cols, E, BE)
    rq = query
    if parts.relative_q is not None:
        rq = load_rows(parts.relative_q, b, h, q0, i, Tq_own, cols, E, BE)
    lse = load_lse(incoming, b, h, q0, i, Tq_own)
    zero = tl.zeros((BM,), ACC)
    delta = zero
    begin, inner, outer, end = keys_of(parts, i0, tl.minimum(i0 + BM, Tq_own), shift, Tk, BN)
    for j0 in range(begin, end, BN):
        j = j0 + tl.arange(0, BN)
        key = load_rows(k, b, h // GROUP, k0, j, Tk, cols, E, BE)
        dropped, ds, t = tile(
            query, rq, key, query, key, lse, zero, incoming, parts, dropout, b, h, i, j, i0, j0, shift, Tq_own, Tk, Hq,
            E, BM, BN, BE, PRECISION, True, False, True,
        )  # fmt: skip
        delta += tl.sum(ds, 1)
    _store_delta(delta, incoming, seq, b, h, q0, i, Tq, Tq_own)


@triton.jit
def _walk_keys(
    acc, acc_rq, query, rq, do, lse, delta, k, dq, drq, incoming, parts, dropout, b, h, hk, i, i0, k0, shift, Tq, Tk,
    begin, end, Hq,
    E: tl.constexpr, EV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BEV: tl.constexpr,
    PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BE)
    for j0 in range(begin, end, BN):
        live = True
        if parts.blocks is not None:
            live = any_block(parts, b, h, i0, j0, Tq, Tk, BM, BN)
        if live:
            j = j0 + tl.arange(0, BN)
            key = load_rows(k, b, hk, k0, j, Tk, cols, E, BE, not EDGE)
            value = key
            if incoming.dw is None:
                value = load_rows(incoming.v, b, hk, k0, j, Tk, tl.arange(0, BEV), EV, BEV, not EDGE)
            dropped, ds, t = tile(
                query, rq, key, do, value, lse, delta, incoming, parts, dropout, b, h, i, j, i0, j0, shift, Tq, Tk, Hq,
                E, BM, BN, BE, PRECISION, EDGE, False, True,
            )  # fmt: skip
            dz = through_cap(ds, t, parts)
            if dq is not None:
                acc += tl.dot(dz.to(key.dtype), key, input_precision=PRECISION, out_dtype=acc.dtype)
            if drq is not None:
                W: tl.constexpr = 2 * (BM if BM > BN else BN)
                r = band(parts.relative_k, h, i0, j0, shift, cols, E, BE, BM, W)
                acc_rq += tl.dot(to_band(dz, BM, BN, W).to(r.dtype), r, input_precision=PRECISION, out_dtype=acc_rq.dtype)
    return acc, acc_rq


@triton.jit
def bwd_dq(
    q, k,
    dq,  # Rows as q, or None
    drq,  # Rows as relative_q, or None
    incoming, parts, dropout, seq, Tq, Tk, Hq, GROUP, blocks,
    E: tl.constexpr, EV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BEV: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and drelative_q: one program per sequence, query head and block of queries walks over the keys. Grid:
    (blocks * Hq * B,)."""
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
    query = load_rows(q, b, h, q0, i, Tq, tl.arange(0, BE), E, BE)
    rq, do = query, query
    if parts.relative_q is not None:
        rq = load_rows(parts.relative_q, b, h, q0, i, Tq, tl.arange(0, BE), E, BE)
    if incoming.dw is None:
        do = load_rows(incoming.dout, b, h, q0, i, Tq, tl.arange(0, BEV), EV, BEV)
    lse = load_lse(incoming, b, h, q0, i, Tq)
    delta = load_scalars(incoming.delta, b, h, q0, i, Tq)
    acc, acc_rq = 0.0, 0.0
    if dq is not None:
        acc = tl.zeros((BM, BE), ACC)
    if drq is not None:
        acc_rq = tl.zeros((BM, BE), ACC)
    begin, inner, outer, end = keys_of(parts, i0, tl.minimum(i0 + BM, Tq), shift, Tk, BN)
    if parts.left is not None:
        acc, acc_rq = _walk_keys(
            acc, acc_rq, query, rq, do, lse, delta, k, dq, drq, incoming, parts, dropout, b, h, hk, i, i0, k0, shift, Tq, Tk,
            begin, inner, Hq,
            E, EV, BM, BN, BE, BEV, PRECISION, True,
        )  # fmt: skip
    acc, acc_rq = _walk_keys(
        acc, acc_rq, query, rq, do, lse, delta, k, dq, drq, incoming, parts, dropout, b, h, hk, i, i0, k0, shift, Tq, Tk,
        inner, outer, Hq,
        E, EV, BM, BN, BE, BEV, PRECISION, False,
    )  # fmt: skip
    acc, acc_rq = _walk_keys(
        acc, acc_rq, query, rq, do, lse, delta, k, dq, drq, incoming, parts, dropout, b, h, hk, i, i0, k0, shift, Tq, Tk,
        outer, end, Hq,
        E, EV, BM, BN, BE, BEV, PRECISION, True,
    )  # fmt: skip
    if dq is not None:
        store_rows(dq, acc * parts.scale, b, h, q0, i, Tq_all, E, BE)
    if drq is not None:
        store_rows(drq, acc_rq * parts.scale, b, h, q0, i, Tq_all, E, BE)


@triton.jit
def _walk_queries(
    acc_k, acc_v, q, key, value, dk, dv, incoming, parts, dropout, b, h, j, j0, q0, shift, Tq, Tk, begin, end, Hq,
    E: tl.constexpr, EV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BEV: tl.constexpr,
    PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    cols, cols_v = tl.arange(0, BE), tl.arange(0, BEV)
    for i0 in tl.range(begin, end, BM, disable_licm=EDGE):
        live = True
        if parts.blocks is not None:
            live = any_block(parts, b, h, i0, j0, Tq, Tk, BM, BN)
        if live:
            i = i0 + tl.arange(0, BM)
            query = load_rows(q, b, h, q0, i, Tq, cols, E, BE)
            rq, do = query, query
            if parts.relative_q is not None:
                rq = load_rows(parts.relative_q, b, h, q0, i, Tq, cols, E, BE)
            if incoming.dw is None:
                do = load_rows(incoming.dout, b, h, q0, i, Tq, cols_v, EV, BEV)
            lse = load_lse(incoming, b, h, q0, i, Tq)
            delta = load_scalars(incoming.delta, b, h, q0, i, Tq)
            dropped, ds, t = tile(
                query, rq, key, do, value, lse, delta, incoming, parts, dropout, b, h, i, j, i0, j0, shift, Tq, Tk, Hq,
                E, BM, BN, BE, PRECISION, EDGE, True, True,
            )  # fmt: skip
            if dv is not None:
                acc_v += tl.dot(tl.trans(dropped).to(do.dtype), do, input_precision=PRECISION, out_dtype=acc_v.dtype)
            if dk is not None:
                dz = tl.trans(through_cap(ds, t, parts)).to(query.dtype)
                acc_k += tl.dot(dz, query, input_precision=PRECISION, out_dtype=acc_k.dtype)
    return acc_k, acc_v


@triton.jit
def bwd_dkdv(
    q, k,
    dk,  # Rows as k, or None
    dv,  # Rows as v, or None
    incoming, parts, dropout, seq, Tq, Tk, Hq, GROUP, blocks,
    E: tl.constexpr, EV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BEV: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv: one program per sequence, key head and block of keys walks over the queries of the head's group. Grid:
    (blocks * Hkv * B,)."""
    block, hk, b = owner(blocks, Hq // GROUP)
    Tk_all = Tk
    q0, k0, Tq, Tk, shift = sequence(seq, b, Tq, Tk)
    if seq.cu_q is not None:
        Tk_all = Tk
    j0 = block * BN
    if j0 >= Tk_all:
        return
    j = j0 + tl.arange(0, BN)
    key = load_rows(k, b, hk, k0, j, Tk, tl.arange(0, BE), E, BE)
    value = key
    if incoming.dw is None:
        value = load_rows(incoming.v, b, hk, k0, j, Tk, tl.arange(0, BEV), EV, BEV)
    acc_k, acc_v = 0.0, 0.0
    if dk is not None:
        acc_k = tl.zeros((BN, BE), ACC)
    if dv is not None:
        acc_v = tl.zeros((BN, BEV), ACC)
    begin, inner, outer, end = queries_of(parts, j0, tl.minimum(j0 + BN, Tk), shift, Tq, BM)
    if parts.left is None:
        outer = end  # rows beyond Tq have no weights
    for member in tl.range(0, GROUP, disable_licm=True):
        h = hk * GROUP + member
        if parts.right is not None:
            acc_k, acc_v = _walk_queries(
                acc_k, acc_v, q, key, value, dk, dv, incoming, parts, dropout, b, h, j, j0, q0, shift, Tq, Tk, begin, inner, Hq,
                E, EV, BM, BN, BE, BEV, PRECISION, True,
            )  # fmt: skip
        acc_k, acc_v = _walk_queries(
            acc_k, acc_v, q, key, value, dk, dv, incoming, parts, dropout, b, h, j, j0, q0, shift, Tq, Tk, inner, outer, Hq,
            E, EV, BM, BN, BE, BEV, PRECISION, False,
        )  # fmt: skip
        if parts.left is not None:
            acc_k, acc_v = _walk_queries(
                acc_k, acc_v, q, key, value, dk, dv, incoming, parts, dropout, b, h, j, j0, q0, shift, Tq, Tk, outer, end, Hq,
                E, EV, BM, BN, BE, BEV, PRECISION, True,
            )  # fmt: skip
    inside = (j < Tk)[:, None]
    if dk is not None:
        store_rows(dk, tl.where(inside, acc_k * parts.scale, 0.0), b, hk, k0, j, Tk_all, E, BE)
    if dv is not None:
        store_rows(dv, tl.where(inside, acc_v, 0.0), b, hk, k0, j, Tk_all, EV, BEV)
