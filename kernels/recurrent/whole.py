"""Whole sequences in one launch: a program walks over all steps of a lane and a block of the batch, its weights resident.

h = step(x, R h) for every step, R held in shared memory (or registers) by the program, h and the other states in registers.
Nothing passes between programs. After "Persistent RNNs: stashing recurrent weights on-chip" (Diamos et al., ICML 2016); FlashRNN
(arXiv 2412.07752) is related work. docs/design/recurrence-on-a-gpu.md has an overview.
"""

import triton
import triton.language as tl

from fastseq.kernels.recurrent.step import (
    add,
    choose,
    cut_before,
    first_step,
    goes_back,
    lane_rows,
    lengths_of,
    load_again,
    load_initial,
    load_step_backward,
    load_tiles,
    load_vectors,
    run_step,
    step_after,
    step_before,
    store_step_backward,
    store_tiles,
    zero_tiles,
    zone_out_backward,
    zone_out_states_backward,
)


@triton.jit
def forward(
    x_gates,  # [rows, D, G*H]
    weight,  # [D, G*H, H]
    vectors,  # [D, V*H] or None
    h0,  # [D, B, H] or None
    c0,  # [D, B, K*H] or None, wide
    y,  # [rows, D, H]
    h_n,  # [D, B, H]
    c_n,  # [D, B, K*H], wide
    c_all,  # [rows, D, K*H] wide, or None
    gates,  # [rows, D, S*H] or None
    layout, zoneout, resets, H,
    STEP: tl.constexpr, G: tl.constexpr, S: tl.constexpr, K: tl.constexpr, V: tl.constexpr, OUTPUT_SAVED: tl.constexpr,
    KEEP_H: tl.constexpr, KEEP_C: tl.constexpr,
    BB: tl.constexpr, BH: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of the batch, D)."""
    d = tl.program_id(1)
    b, u = tl.program_id(0) * BB + tl.arange(0, BB), tl.arange(0, BH)
    real = (u < H)[None, :]
    own = (b < layout.B)[:, None] & real
    place = (d * layout.B + b).to(tl.int64)[:, None]
    lengths = lengths_of(layout, b)
    back = goes_back(layout, d)
    narrow = y.dtype.element_ty

    resident = ()  # of every gate R_g^T [BH (k), BH (u)]
    square = (u < H)[:, None] & real
    for g in tl.static_range(G):
        entry = ((d * G + g) * H + u[None, :]).to(tl.int64) * H + u[:, None]
        resident = resident + (tl.load(weight + entry, mask=square, other=0.0),)
    v = load_vectors(vectors, d, u, H, V, BH, ACC)
    h, c = tl.zeros((BB, BH), narrow), zero_tiles(K, BB, BH, ACC)
    if h0 is not None:
        h = tl.load(h0 + place * H + u[None, :], mask=own, other=0.0)
    if c0 is not None:
        c = load_tiles(c0, place * (K * H) + u[None, :], own, H, K, ACC)

    steps = tl.max(lengths, 0)
    if resets.rows is not None:
        cut = cut_before(layout, resets, first_step(steps, back), back, lengths, b)
        again_h, again_c = load_again(resets, place, u, cut & real, H, K, BB, BH, narrow, ACC)
        h, c = tl.where(cut, again_h, h), choose(cut, again_c, c, K)
    for n in range(steps):
        t = tl.where(back, steps - 1 - n, n)
        active = (t < lengths)[:, None] & real
        row = lane_rows(layout, t, b, d)
        at = row * H + u[None, :]
        cut = cut_before(layout, resets, step_after(t, back), back, lengths, b)
        x = load_tiles(x_gates, row * (G * H) + u[None, :], active, H, G, ACC)
        r = ()
        for g in tl.static_range(G):
            r = r + (tl.dot(h, resident[g], input_precision=PRECISION, out_dtype=ACC),)
        h_new, c_new, saved = run_step(
            x, r, v, h.to(ACC), c, zoneout, at, active, real, H, STEP, K, OUTPUT_SAVED, KEEP_H, KEEP_C, narrow, ACC
        )
        h = tl.where(active, h_new, h)
        c = choose(active, c_new, c, K)
        tl.store(y + at, h, mask=active)
        if c_all is not None:
            store_tiles(c_all, row * (K * H) + u[None, :], c, active, H, K)
        if gates is not None:
            store_tiles(gates, row * (S * H) + u[None, :], saved, active, H, S)
        if resets.rows is not None:
            again_h, again_c = load_again(resets, place, u, cut & real, H, K, BB, BH, narrow, ACC)
            h, c = tl.where(cut, again_h, h), choose(cut, again_c, c, K)
    tl.store(h_n + place * H + u[None, :], h, mask=own)
    if K > 0:
        store_tiles(c_n, place * (K * H) + u[None, :], c, own, H, K)


@triton.jit
def backward(
    dy,  # [rows, D, H] or None
    dh_n,  # [D, B, H] or None
    dc_n,  # [D, B, K*H] or None, wide
    dc_all,  # [rows, D, K*H] or None, wide
    weight,  # [D, G*H, H]
    vectors,  # [D, V*H] or None
    h0,  # [D, B, H] or None
    c0,  # [D, B, K*H] or None, wide
    y,  # [rows, D, H]
    c_all,  # [rows, D, K*H], wide
    gates,  # [rows, D, S*H]
    dgates,  # [rows, D, G*H]
    drecurrent,  # [rows, D, OWN*H] or None
    doutput,  # [rows, D, H] or None
    dh0,  # [D, B, H]
    dc0,  # [D, B, K*H], wide
    layout, zoneout, resets, H,
    STEP_BACKWARD: tl.constexpr, CANDIDATE: tl.constexpr, READS: tl.constexpr,
    G: tl.constexpr, S: tl.constexpr, K: tl.constexpr, V: tl.constexpr, OWN: tl.constexpr, OUTPUT_SAVED: tl.constexpr,
    KEEP_H: tl.constexpr, KEEP_C: tl.constexpr,
    BB: tl.constexpr, BH: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of the batch, D). Against the direction of the forward pass."""
    d = tl.program_id(1)
    b, u = tl.program_id(0) * BB + tl.arange(0, BB), tl.arange(0, BH)
    real = (u < H)[None, :]
    own = (b < layout.B)[:, None] & real
    place = (d * layout.B + b).to(tl.int64)[:, None]
    at_state, at_states = place * H + u[None, :], place * (K * H) + u[None, :]
    lengths = lengths_of(layout, b)
    back = goes_back(layout, d)
    narrow = y.dtype.element_ty

    resident = ()  # of every gate R_g [BH (u), BH (k)]
    square = (u < H)[:, None] & real
    for g in tl.static_range(G):
        entry = ((d * G + g) * H + u[:, None]).to(tl.int64) * H + u[None, :]
        resident = resident + (tl.load(weight + entry, mask=square, other=0.0),)
    v = load_vectors(vectors, d, u, H, V, BH, ACC)
    first_h, first_c = load_initial(h0, c0, place, u, own, H, READS, K, BB, BH, ACC)
    dh_again, dc_again = tl.zeros((BB, BH), ACC), zero_tiles(K, BB, BH, ACC)
    dh, dc = tl.zeros((BB, BH), ACC), zero_tiles(K, BB, BH, ACC)
    if dh_n is not None:
        dh = tl.load(dh_n + at_state, mask=own, other=0.0).to(ACC)
    if dc_n is not None:
        dc = load_tiles(dc_n, at_states, own, H, K, ACC)

    steps = tl.max(lengths, 0)
    for n in range(steps):
        t = tl.where(back, n, steps - 1 - n)
        active = (t < lengths)[:, None] & real
        row = lane_rows(layout, t, b, d)
        at = row * H + u[None, :]
        had, row_before = step_before(layout, t, back, lengths, b, d)
        cut = cut_before(layout, resets, t, back, lengths, b)
        dh_t, dc_t = dh, dc
        if dy is not None:
            dh_t += tl.load(dy + at, mask=active, other=0.0).to(ACC)
        if dc_all is not None:
            dc_t = add(dc_t, load_tiles(dc_all, row * (K * H) + u[None, :], active, H, K, ACC), K)
        dh_kept, dh_t = zone_out_backward(zoneout.mask_h, at, active, KEEP_H, dh_t)
        dc_kept, dc_t = zone_out_states_backward(zoneout.mask_c, at, active, KEEP_C, dc_t, K)
        saved, h_prev, h, c_prev, c = load_step_backward(
            y, c_all, gates, first_h, first_c, zoneout, resets, place, row, row_before, u, active, had & real, cut & real, H,
            CANDIDATE, READS, S, K, OUTPUT_SAVED, KEEP_C, ACC,
        )  # fmt: skip
        dx, dr, direct, dc_new = STEP_BACKWARD(dh_t, dc_t, saved, v, h_prev, c_prev, h, c, real, H)
        store_step_backward(dgates, drecurrent, dx, dr, row, u, active, H, G, OWN)
        if doutput is not None:
            tl.store(doutput + at, dh_t.to(narrow), mask=active)
        dh_new = direct + dh_kept
        for g in tl.static_range(G):
            operand = tl.where(active, dr[g], 0.0).to(narrow)
            dh_new += tl.dot(operand, resident[g], input_precision=PRECISION, out_dtype=ACC)
        dh = tl.where(active, dh_new, dh)
        dc = choose(active, add(dc_new, dc_kept, K), dc, K)
        if resets.rows is not None:
            zeros = zero_tiles(K, BB, BH, ACC)
            if resets.dh is not None:
                dh_again += tl.where(cut, dh, 0.0)
            if resets.dc is not None:
                dc_again = add(dc_again, choose(cut, dc, zeros, K), K)
            dh = tl.where(cut, 0.0, dh)
            dc = choose(cut, zeros, dc, K)
    tl.store(dh0 + at_state, dh.to(narrow), mask=own)
    if K > 0:
        store_tiles(dc0, at_states, dc, own, H, K)
    if resets.dh is not None:
        tl.store(resets.dh + at_state, dh_again, mask=own)
    if resets.dc is not None:
        store_tiles(resets.dc, at_states, dc_again, own, H, K)
