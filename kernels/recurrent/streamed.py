"""Whole sequences in one launch where no program can hold the recurrent weights: it reads them from the L2 cache in every step.

A program walks over all steps of a lane and a block of the batch, in each over blocks of BH units. What all units of the next
step need of this one lies in global memory, in two buffers that take turns, since a tile in registers cannot be indexed. One
barrier ends a step: what a program's threads wrote before it they all see. Nothing passes between programs. Weights and buffers
are padded with zeros to HP units, a multiple of 16, so that they are read in whole vectors.
"""

import triton
import triton.language as tl

from fastseq.kernels.recurrent.step import (
    add,
    choose,
    cut_before,
    cut_off,
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
    weight,  # [D, G, HP, HP]
    vectors,  # [D, V*H] or None
    h,  # [D, 2, B, HP]: the first of two is the state before the first step; both are written
    c,  # [D, B, K*H], wide: state, updated
    y,  # [rows, D, H]
    h_n,  # [D, B, H]
    c_all,  # [rows, D, K*H] wide, or None
    gates,  # [rows, D, S*H] or None
    layout, zoneout, resets, H, HP,
    STEP: tl.constexpr, G: tl.constexpr, S: tl.constexpr, K: tl.constexpr, V: tl.constexpr, OUTPUT_SAVED: tl.constexpr,
    KEEP_H: tl.constexpr, KEEP_C: tl.constexpr,
    BB: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of the batch, D)."""
    d = tl.program_id(1)
    b = tl.program_id(0) * BB + tl.arange(0, BB)
    mine = (b < layout.B)[:, None]
    place = (d * layout.B + b).to(tl.int64)[:, None]
    lengths = lengths_of(layout, b)
    back = goes_back(layout, d)
    narrow = y.dtype.element_ty

    steps = tl.max(lengths, 0)
    if resets.rows is not None:
        cut = cut_before(layout, resets, first_step(steps, back), back, lengths, b)
        first = (2 * d * layout.B + b).to(tl.int64)[:, None] * HP
        for u0 in range(0, H, BH):
            u = u0 + tl.arange(0, BH)
            anew = cut & (u < H)[None, :]
            again_h, again_c = load_again(resets, place, u, anew, H, K, BB, BH, narrow, ACC)
            tl.store(h + first + u[None, :], again_h, mask=anew)
            store_tiles(c, place * (K * H) + u[None, :], again_c, anew, H, K)
        tl.debug_barrier()
    for n in range(steps):
        t = tl.where(back, steps - 1 - n, n)
        row = lane_rows(layout, t, b, d)
        old = ((2 * d + n % 2) * layout.B + b).to(tl.int64)[:, None] * HP
        new = ((2 * d + 1 - n % 2) * layout.B + b).to(tl.int64)[:, None] * HP
        cut = cut_before(layout, resets, step_after(t, back), back, lengths, b)
        for u0 in range(0, H, BH):
            u = u0 + tl.arange(0, BH)
            real = (u < H)[None, :]
            own, active = mine & (u < HP)[None, :], (t < lengths)[:, None] & real
            x = load_tiles(x_gates, row * (G * H) + u[None, :], active, H, G, ACC)
            h_old = tl.load(h + old + u[None, :], mask=own, other=0.0)
            c_old = load_tiles(c, place * (K * H) + u[None, :], active, H, K, ACC)
            v = load_vectors(vectors, d, u, H, V, BH, ACC)
            r = zero_tiles(G, BB, BH, ACC)
            for k0 in range(0, HP, BK):
                k = k0 + tl.arange(0, BK)
                h_k = tl.load(h + old + k[None, :], mask=mine & (k < HP)[None, :], other=0.0)
                more = ()
                for g in tl.static_range(G):
                    entry = ((d * G + g) * HP + u[None, :]).to(tl.int64) * HP + k[:, None]
                    r_k = tl.load(weight + entry, mask=(k < HP)[:, None] & (u < HP)[None, :], other=0.0)
                    more = more + (tl.dot(h_k, r_k, r[g], input_precision=PRECISION, out_dtype=ACC),)
                r = more
            at = row * H + u[None, :]
            h_new, c_new, saved = run_step(
                x, r, v, h_old.to(ACC), c_old, zoneout, at, active, real, H, STEP, K, OUTPUT_SAVED, KEEP_H, KEEP_C, narrow, ACC
            )
            h_next, c_next = tl.where(active, h_new, h_old), c_new
            if resets.rows is not None:
                again_h, again_c = load_again(resets, place, u, cut & real, H, K, BB, BH, narrow, ACC)
                h_next, c_next = tl.where(cut, again_h, h_next), choose(cut, again_c, c_next, K)
            tl.store(h + new + u[None, :], h_next, mask=own)
            tl.store(y + at, h_new, mask=active)
            store_tiles(c, place * (K * H) + u[None, :], c_next, active, H, K)
            if c_all is not None:
                store_tiles(c_all, row * (K * H) + u[None, :], c_new, active, H, K)
            if gates is not None:
                store_tiles(gates, row * (S * H) + u[None, :], saved, active, H, S)
        tl.debug_barrier()
    last = ((2 * d + steps % 2) * layout.B + b).to(tl.int64)[:, None] * HP
    for u0 in range(0, H, BH):
        u = u0 + tl.arange(0, BH)[None, :]
        own = mine & (u < H)
        tl.store(h_n + place * H + u, tl.load(h + last + u, mask=own, other=0.0), mask=own)


@triton.jit
def backward(
    dy,  # [rows, D, H] or None
    dh,  # [D, B, H], wide: what reached h but through R, updated
    dc,  # [D, B, K*H], wide, updated
    dc_all,  # [rows, D, K*H] or None, wide
    dr_gates,  # [D, 2, B, G*HP]: gradient of R h, 0 where the sequence has no such step; the first of two is 0, both are written
    weight,  # [D, G, HP, HP]
    vectors,  # [D, V*H] or None
    h0,  # [D, B, H] or None
    c0,  # [D, B, K*H] or None, wide
    y,  # [rows, D, H]
    c_all,  # [rows, D, K*H], wide
    gates,  # [rows, D, S*H]
    dgates,  # [rows, D, G*H]
    drecurrent,  # [rows, D, OWN*H] or None
    dh0,  # [D, B, H]
    layout, zoneout, resets, H, HP,
    STEP_BACKWARD: tl.constexpr, CANDIDATE: tl.constexpr, READS: tl.constexpr,
    G: tl.constexpr, S: tl.constexpr, K: tl.constexpr, V: tl.constexpr, OWN: tl.constexpr, OUTPUT_SAVED: tl.constexpr,
    KEEP_H: tl.constexpr, KEEP_C: tl.constexpr,
    BB: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of the batch, D). Against the direction of the forward pass."""
    d = tl.program_id(1)
    b = tl.program_id(0) * BB + tl.arange(0, BB)
    mine = (b < layout.B)[:, None]
    place = (d * layout.B + b).to(tl.int64)[:, None]
    lengths = lengths_of(layout, b)
    back = goes_back(layout, d)
    narrow = y.dtype.element_ty
    own_weight = weight + d.to(tl.int64) * (G * HP) * HP

    steps = tl.max(lengths, 0)
    for n in range(steps):
        t = tl.where(back, n, steps - 1 - n)
        row = lane_rows(layout, t, b, d)
        had, row_before = step_before(layout, t, back, lengths, b, d)
        cut = cut_before(layout, resets, t, back, lengths, b)
        cut_after = cut_before(layout, resets, step_after(t, back), back, lengths, b)
        old = ((2 * d + n % 2) * layout.B + b).to(tl.int64)[:, None] * (G * HP)
        new = ((2 * d + 1 - n % 2) * layout.B + b).to(tl.int64)[:, None] * (G * HP)
        for u0 in range(0, H, BH):
            u = u0 + tl.arange(0, BH)
            real = (u < H)[None, :]
            own, active = mine & real, (t < lengths)[:, None] & real
            at, at_state, at_states = row * H + u[None, :], place * H + u[None, :], place * (K * H) + u[None, :]
            dh_t = through(dr_gates + old, mine, own_weight, u, HP, G * HP, BB, BH, BK, ACC, PRECISION)
            dh_t += tl.load(dh + at_state, mask=own, other=0.0)
            if resets.rows is not None:
                dh_t = cut_off((dh_t,), resets.dh, at_state, own, cut_after, H, 1, BB, BH, ACC)[0]
            waiting = dh_t
            if dy is not None:
                dh_t += tl.load(dy + at, mask=active, other=0.0).to(ACC)
            dh_kept, dh_t = zone_out_backward(zoneout.mask_h, at, active, KEEP_H, dh_t)
            dc_t = load_tiles(dc, at_states, active, H, K, ACC)
            if dc_all is not None:
                dc_t = add(dc_t, load_tiles(dc_all, row * (K * H) + u[None, :], active, H, K, ACC), K)
            dc_kept, dc_t = zone_out_states_backward(zoneout.mask_c, at, active, KEEP_C, dc_t, K)
            v = load_vectors(vectors, d, u, H, V, BH, ACC)
            first_h, first_c = load_initial(h0, c0, place, u, active, H, READS, K, BB, BH, ACC)
            saved, h_prev, h, c_prev, c = load_step_backward(
                y, c_all, gates, first_h, first_c, zoneout, resets, place, row, row_before, u, active, had & real, cut & real, H,
                CANDIDATE, READS, S, K, OUTPUT_SAVED, KEEP_C, ACC,
            )  # fmt: skip
            dx, dr, direct, dc_new = STEP_BACKWARD(dh_t, dc_t, saved, v, h_prev, c_prev, h, c, real, H)
            store_step_backward(dgates, drecurrent, dx, dr, row, u, active, H, G, OWN)
            dr = choose(active, dr, zero_tiles(G, BB, BH, ACC), G)
            store_tiles(dr_gates, new + u[None, :], dr, mine & (u < HP)[None, :], HP, G)
            tl.store(dh + at_state, tl.where(active, direct + dh_kept, waiting), mask=own)
            dc_new = add(dc_new, dc_kept, K)
            if resets.rows is not None:
                dc_new = cut_off(dc_new, resets.dc, at_states, own, cut, H, K, BB, BH, ACC)
            store_tiles(dc, at_states, dc_new, active, H, K)
        tl.debug_barrier()
    last = ((2 * d + steps % 2) * layout.B + b).to(tl.int64)[:, None] * (G * HP)
    cut = cut_before(layout, resets, first_step(steps, back), back, lengths, b)
    for u0 in range(0, H, BH):
        u = u0 + tl.arange(0, BH)
        own, at_state = mine & (u < H)[None, :], place * H + u[None, :]
        dh_t = through(dr_gates + last, mine, own_weight, u, HP, G * HP, BB, BH, BK, ACC, PRECISION)
        dh_t += tl.load(dh + at_state, mask=own, other=0.0)
        if resets.rows is not None:
            dh_t = cut_off((dh_t,), resets.dh, at_state, own, cut, H, 1, BB, BH, ACC)[0]
        tl.store(dh0 + at_state, dh_t.to(narrow), mask=own)


@triton.jit
def through(
    dr_gates,  # pointers [BB, 1] to rows of N values
    mine,  # [BB, 1]
    weight,  # [N, HP]
    u, HP, N,
    BB: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BB, BH]: gradient of the units u through R."""
    total = tl.zeros((BB, BH), ACC)
    for k0 in range(0, N, BK):
        k = k0 + tl.arange(0, BK)
        dr = tl.load(dr_gates + k[None, :], mask=mine & (k < N)[None, :], other=0.0)
        r = tl.load(weight + k[:, None].to(tl.int64) * HP + u[None, :], mask=(k < N)[:, None] & (u < HP)[None, :], other=0.0)
        total = tl.dot(dr, r, total, input_precision=PRECISION, out_dtype=ACC)
    return total
