"""One step in one launch, its two matrix products included: for batches so small that reading the weights is all the work.

A program reads the weights of BH units, of all gates in one tile: row g BH + u, g below GP, a power of two.
"""

import triton
import triton.language as tl

from fastseq.kernels.recurrent.step import (
    load_tiles,
    load_vectors,
    run_step,
    store_tiles,
    zero_tiles,
)


@triton.jit
def forward(
    x,  # [B, I], or without w_ih the input gates [B, D, G*H]
    w_ih,  # [D, G*H, I] or None
    b_ih,  # [D, G*H] or None
    weight,  # [D, G*H, H]
    vectors,  # [D, V*H] or None
    h0,  # [D, B, H] or None
    c0,  # [D, B, K*H] or None, wide
    y,  # [B, D, H]
    h_n,  # [D, B, H]
    c_n,  # [D, B, K*H], wide
    c_all,  # [B, D, K*H] wide, or None
    gates,  # [B, D, S*H] or None
    resets,  # uint8 [B] or None: rows whose state is zero, in lanes forward
    reverse,  # as in a `Layout`, or None without resets
    zoneout, B, D, I, H,  # noqa: E741
    STEP: tl.constexpr, G: tl.constexpr, S: tl.constexpr, K: tl.constexpr, V: tl.constexpr, OUTPUT_SAVED: tl.constexpr,
    KEEP_H: tl.constexpr, KEEP_C: tl.constexpr,
    BB: tl.constexpr, GP: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of the batch, blocks of the hidden units, D)."""
    start, d = tl.program_id(0) * BB, tl.program_id(2)
    n = tl.arange(0, GP * BH)
    gate, unit = n // BH, tl.program_id(1) * BH + n % BH
    exists = (gate < G) & (unit < H)
    entry = ((d * G + gate) * H + unit).to(tl.int64)
    b, u = start + tl.arange(0, BB), tl.program_id(1) * BH + tl.arange(0, BH)
    real = (u < H)[None, :]
    active = (b < B)[:, None] & real
    begun = has_state(b, B, d, resets, reverse)[:, None] & real
    row, place = (b * D + d).to(tl.int64)[:, None], (d * B + b).to(tl.int64)[:, None]

    if w_ih is None:
        x_rows = tl.load(x + row * (G * H) + (gate * H + unit)[None, :], mask=(b < B)[:, None] & exists[None, :], other=0.0)
        x_rows = x_rows.to(ACC)
    else:
        x_rows = product(x, start, B, d, None, reverse, w_ih, entry, exists, I, BB, GP * BH, BK, DOT, ACC, PRECISION)
        if b_ih is not None:
            x_rows += tl.load(b_ih + entry, mask=exists, other=0.0).to(ACC)[None, :]
    h_old, c_old, r_rows = tl.zeros((BB, BH), ACC), zero_tiles(K, BB, BH, ACC), tl.zeros((BB, GP * BH), ACC)
    if h0 is not None:
        first = h0 + (d * B).to(tl.int64) * H
        r_rows = product(first, start, B, d, resets, reverse, weight, entry, exists, H, BB, GP * BH, BK, DOT, ACC, PRECISION)
        h_old = tl.load(h0 + place * H + u[None, :], mask=begun, other=0.0).to(ACC)
    if c0 is not None:
        c_old = load_tiles(c0, place * (K * H) + u[None, :], begun, H, K, ACC)
    v = load_vectors(vectors, d, u, H, V, BH, ACC)

    x_gates, r_gates = by_gate(x_rows, G, BB, GP, BH), by_gate(r_rows, G, BB, GP, BH)
    at = row * H + u[None, :]
    h_new, c_new, saved = run_step(
        x_gates, r_gates, v, h_old, c_old, zoneout, at, active, real, H,
        STEP, K, OUTPUT_SAVED, KEEP_H, KEEP_C, y.dtype.element_ty, ACC,
    )  # fmt: skip
    tl.store(y + at, h_new, mask=active)
    tl.store(h_n + place * H + u[None, :], h_new, mask=active)
    if K > 0:
        store_tiles(c_n, place * (K * H) + u[None, :], c_new, active, H, K)
    if c_all is not None:
        store_tiles(c_all, row * (K * H) + u[None, :], c_new, active, H, K)
    if gates is not None:
        store_tiles(gates, row * (S * H) + u[None, :], saved, active, H, S)


@triton.jit
def has_state(b, B, d, resets, reverse):
    """Of rows of the batch, or of one: whether there is one, and lane d does not begin anew with its only step."""
    there = b < B
    if resets is not None:
        there = there & ((((reverse >> d) & 1) != 0) | (tl.load(resets + b, mask=there, other=0) == 0))
    return there


@triton.jit
def product(
    left,  # [B, N]
    start,
    B,
    d,
    resets,  # uint8 [B] or None: rows of zeros, in lanes forward
    reverse,
    weight,  # [.., N]
    entry,  # [ROWS] rows of it
    exists,  # [ROWS]
    N,
    BB: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BB, ROWS]: rows of the batch from ``start`` on times rows of the weights."""
    b = start + tl.arange(0, BB)
    rows = has_state(b, B, d, resets, reverse)
    result = tl.zeros((BB, ROWS), ACC)
    if DOT:
        for k0 in range(0, N, BK):
            k = k0 + tl.arange(0, BK)
            a = tl.load(left + b.to(tl.int64)[:, None] * N + k[None, :], mask=rows[:, None] & (k < N)[None, :], other=0.0)
            w = tl.load(weight + entry[None, :] * N + k[:, None], mask=exists[None, :] & (k < N)[:, None], other=0.0)
            result = tl.dot(a, w, result, input_precision=PRECISION, out_dtype=ACC)
    else:
        # of every row of the batch the products [ROWS, BK], which are summed once, at the end
        sums = zero_tiles(BB, ROWS, BK, ACC)
        for k0 in range(0, N, BK):
            k = k0 + tl.arange(0, BK)
            w = tl.load(weight + entry[:, None] * N + k[None, :], mask=exists[:, None] & (k < N)[None, :], other=0.0).to(ACC)
            more = ()
            for i in tl.static_range(BB):
                # a copy for every row of weights: what lies there already need not be handed from thread to thread
                at = tl.broadcast_to(((start + i).to(tl.int64) * N + k)[None, :], (ROWS, BK))
                row = has_state(start + i, B, d, resets, reverse)
                a = tl.load(left + at, mask=(k < N)[None, :] & row, other=0.0).to(ACC)
                more = more + (sums[i] + w * a,)
            sums = more
        for i in tl.static_range(BB):
            result = tl.where((b == start + i)[:, None], tl.sum(sums[i], 1)[None, :], result)
    return result


@triton.jit
def by_gate(rows, G: tl.constexpr, BB: tl.constexpr, GP: tl.constexpr, BH: tl.constexpr):
    """[BB, GP*BH] as G tiles [BB, BH]."""
    cube, gate = tl.reshape(rows, (BB, GP, BH)), tl.arange(0, GP)[None, :, None]
    tiles = ()
    for g in tl.static_range(G):
        tiles = tiles + (tl.sum(tl.where(gate == g, cube, 0.0), 1),)
    return tiles
