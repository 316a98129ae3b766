"""Attention backward: gradients of the biases, summed over what they are broadcast along, without atomics and T x T memory."""

import triton
import triton.language as tl

from fastseq.kernels.attention.backward import load_lse, through_cap, tile
from fastseq.kernels.attention.bias import to_band
from fastseq.kernels.attention.mask import any_block, sequence
from fastseq.kernels.attention.memory import load_rows, load_scalars


@triton.jit
def _tile_at(
    q, k, incoming, parts, dropout, b, h, GROUP, i, j, i0, j0, q0, k0, shift, Tq, Tk, Hq,
    E: tl.constexpr, EV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BEV: tl.constexpr,
    PRECISION: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """ds, dz (see ``backward``) and the rows of relative_q, of a tile of which nothing is loaded yet."""
    cols, cols_v = tl.arange(0, BE), tl.arange(0, BEV)
    query = load_rows(q, b, h, q0, i, Tq, cols, E, BE)
    key = load_rows(k, b, h // GROUP, k0, j, Tk, cols, E, BE)
    rq, do, value = query, query, key
    if parts.relative_q is not None:
        rq = load_rows(parts.relative_q, b, h, q0, i, Tq, cols, E, BE)
    if incoming.dw is None:
        do = load_rows(incoming.dout, b, h, q0, i, Tq, cols_v, EV, BEV)
        value = load_rows(incoming.v, b, h // GROUP, k0, j, Tk, cols_v, EV, BEV)
    lse = load_lse(incoming, b, h, q0, i, Tq)
    delta = load_scalars(incoming.delta, b, h, q0, i, Tq)
    dropped, ds, t = tile(
        query, rq, key, do, value, lse, delta, incoming, parts, dropout, b, h, i, j, i0, j0, shift, Tq, Tk, Hq,
        E, BM, BN, BE, PRECISION, True, False, QUADS,
    )  # fmt: skip
    return ds, through_cap(ds, t, parts), rq


@triton.jit
def bwd_dbias(
    q, k,
    dbias,  # Pairs, in shares: [shares, B or 1, Hq or 1, Tq or 1, Tk or 1], contiguous
    incoming, parts, dropout, seq, Tq, Tk, Hq, GROUP,
    batches, heads, rows, columns,  # how many of each a share's entry has: its own or 1
    sum_heads, sum_rows, sum_columns,  # and how many each entry sums, in tiles for rows and columns
    steps, per_share,  # tiles that each entry sums, in all and in a share
    E: tl.constexpr, EV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BEV: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, OWN_ROWS: tl.constexpr, OWN_COLUMNS: tl.constexpr,
):  # fmt: skip
    """dbias: one program per tile of it and share of the tiles that are summed into it. Grid: (column tiles * row tiles * heads *
    batches * shares,)."""
    at = tl.program_id(0)
    column_tiles, row_tiles = tl.cdiv(columns, BN), tl.cdiv(rows, BM)
    own_j = at % column_tiles * BN
    at = at // column_tiles
    own_i = at % row_tiles * BM
    at = at // row_tiles
    own_h = at % heads
    at = at // heads
    own_b = at % batches
    share = (at // batches).to(tl.int64)
    acc = tl.zeros((BM, BN), ACC)
    for step in range(share * per_share, tl.minimum(share * per_share + per_share, steps)):
        j0 = own_j + (step % sum_columns).to(tl.int32) * BN
        i0 = own_i + (step // sum_columns % sum_rows).to(tl.int32) * BM
        h = (own_h + step // (sum_columns * sum_rows) % sum_heads).to(tl.int64)
        b = (own_b + step // (sum_columns * sum_rows * sum_heads)).to(tl.int64)
        q0, k0, Tq_own, Tk_own, shift = sequence(seq, b, Tq, Tk)
        meets = (i0 < Tq_own) & (j0 < Tk_own)
        if parts.left is not None:
            meets &= j0 + BN > i0 + shift - parts.left
        if parts.right is not None:
            meets &= j0 < i0 + BM + shift + parts.right
        if parts.blocks is not None:
            meets &= any_block(parts, b, h, i0, j0, Tq_own, Tk_own, BM, BN)
        if meets:
            ds, dz, rq = _tile_at(
                q, k, incoming, parts, dropout, b, h, GROUP, i0 + tl.arange(0, BM), j0 + tl.arange(0, BN), i0, j0, q0, k0, shift,
                Tq_own, Tk_own, Hq, E, EV, BM, BN, BE, BEV, PRECISION, True,
            )  # fmt: skip
            acc += ds
    place = dbias + (((share * batches + own_b) * heads + own_h) * rows + own_i) * columns + own_j
    i, j = tl.arange(0, BM), tl.arange(0, BN)
    if OWN_ROWS and OWN_COLUMNS:
        at_tile = place + i.to(tl.int64)[:, None] * columns + j[None, :]
        tl.store(at_tile, acc.to(dbias.dtype.element_ty), mask=(own_i + i < rows)[:, None] & (own_j + j < columns)[None, :])
    elif OWN_ROWS:
        tl.store(place + i, tl.sum(acc, 1).to(dbias.dtype.element_ty), mask=own_i + i < rows)
    elif OWN_COLUMNS:
        tl.store(place + j, tl.sum(acc, 0).to(dbias.dtype.element_ty), mask=own_j + j < columns)
    else:
        tl.store(place, tl.sum(tl.sum(acc, 1), 0).to(dbias.dtype.element_ty))


@triton.jit
def bwd_drelbias(
    q, k,
    dbias,  # of relative_bias, or None: [shares, Hq, diagonals, 2 BM], contiguous
    drows,  # of relative_k, or None: [shares, Hq, diagonals, 2 BM, E], contiguous
    incoming, parts, dropout, seq, B, Tq, Tk, Hq, GROUP, shares, diagonals, first,
    E: tl.constexpr, EV: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, BEV: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """drelative_bias and drelative_k. In the tiles of rows from i0 and keys from i0 + shift + n BM, for one n, the same place has
    the same distance, in every sequence. One program per n, head and share of these tiles sums them, and at the end along the
    diagonals of a tile, into the distances n BM - (BM - 1) .. n BM + BM. n counts from `first`. Grid:
    (diagonals * Hq * shares,)."""
    at = tl.program_id(0)
    n = at % diagonals
    h = (at // diagonals % Hq).to(tl.int64)
    share = (at // diagonals // Hq).to(tl.int64)
    W: tl.constexpr = 2 * BM
    row_tiles = tl.cdiv(Tq, BM)
    tiles = B * row_tiles
    per_share = tl.cdiv(tiles, shares)
    start = tl.minimum(share * per_share, tiles)
    stop = tl.minimum(start + per_share, tiles)
    acc, acc_rows = 0.0, 0.0
    if dbias is not None:
        acc = tl.zeros((BM, BM), ACC)
    if drows is not None:
        acc_rows = tl.zeros((W, BE), ACC)
    for b in range(start // row_tiles, tl.cdiv(stop, row_tiles)):
        q0, k0, Tq_own, Tk_own, shift = sequence(seq, b, Tq, Tk)
        across = shift + (first + n) * BM
        begin = tl.maximum(start - b * row_tiles, tl.cdiv(tl.maximum(1 - BM - across, 0), BM)).to(tl.int32)
        end = tl.minimum(stop - b * row_tiles, tl.cdiv(tl.minimum(tl.maximum(Tk_own - across, 0), Tq_own), BM)).to(tl.int32)
        for i0 in range(begin * BM, end * BM, BM):
            j0 = i0 + across
            j = j0 + tl.arange(0, BM)
            j = tl.where(j < 0, Tk_own, j)  # as hidden as the keys beyond the end
            ds, dz, rq = _tile_at(
                q, k, incoming, parts, dropout, b, h, GROUP, i0 + tl.arange(0, BM), j, i0, j0, q0, k0, shift,
                Tq_own, Tk_own, Hq, E, EV, BM, BM, BE, BEV, PRECISION, QUADS,
            )  # fmt: skip
            if dbias is not None:
                acc += ds
            if drows is not None:
                banded = tl.trans(to_band(dz, BM, BM, W)).to(rq.dtype)
                acc_rows += tl.dot(banded, rq, input_precision=PRECISION, out_dtype=ACC)
    place = ((share * Hq + h) * diagonals + n) * W
    r, cols = tl.arange(0, W), tl.arange(0, BE)
    if dbias is not None:
        tl.store(dbias + place + r, tl.sum(to_band(acc, BM, BM, W), 0))
    if drows is not None:
        tl.store(drows + (place + r)[:, None] * E + cols[None, :], acc_rows * parts.scale, mask=(cols < E)[None, :])
