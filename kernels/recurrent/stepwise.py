"""One step of a cell, everything but its matrix products, in one launch: for hidden sizes whose weights fit no program.

Grid of every kernel: (blocks of the batch, blocks of the hidden units, D). ``n`` counts the steps of the walk. A cell that
normalizes needs BH >= H. haste (https://github.com/lmnt-com/haste) does the same: for each step a product and a pointwise kernel.
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
    load_initial,
    load_state,
    load_step_backward,
    load_tiles,
    load_vectors,
    run_step,
    step_after,
    step_before,
    store_step_backward,
    store_tiles,
    zero_tiles,
    zone_out,
    zone_out_backward,
    zone_out_states_backward,
)


@triton.jit
def begin(
    state,  # [D, B, P], of which the first step begins: updated
    again,  # [D, B, P] or None: zeros
    layout, resets, P,
    BB: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """The reset state, where a lane's first step begins anew."""
    b, u, d = tl.program_id(0) * BB + tl.arange(0, BB), tl.program_id(1) * BP + tl.arange(0, BP), tl.program_id(2)
    back = goes_back(layout, d)
    anew = cut_before(layout, resets, first_step(layout.T, back), back, lengths_of(layout, b), b) & (u < P)[None, :]
    at = (d * layout.B + b).to(tl.int64)[:, None] * P + u[None, :]
    tl.store(state + at, load_state(again, at, anew, P, 1, BB, BP, state.dtype.element_ty)[0], mask=anew)


@triton.jit(do_not_specialize=["n"])  # one kernel for every step
def forward(
    x_gates,  # [rows, D, G*H]
    r_gates,  # [D, B, G*H], wide: R h
    vectors,  # [D, V*H] or None
    h,  # [D, B, H]: state, updated; the cell's output before a projection, if there is one
    c,  # [D, B, K*H]: likewise, wide
    y,  # [rows, D, H], or None with a projection
    c_all,  # [rows, D, K*H] wide, or None
    gates,  # [rows, D, S*H] or None
    layout, zoneout, resets, n, H,
    STEP: tl.constexpr, G: tl.constexpr, S: tl.constexpr, K: tl.constexpr, V: tl.constexpr, OUTPUT_SAVED: tl.constexpr,
    KEEP_H: tl.constexpr, KEEP_C: tl.constexpr, PROJECTED: tl.constexpr,
    BB: tl.constexpr, BH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b, u, d = tl.program_id(0) * BB + tl.arange(0, BB), tl.program_id(1) * BH + tl.arange(0, BH), tl.program_id(2)
    back = goes_back(layout, d)
    t = tl.where(back, layout.T - 1 - n, n)
    real, lengths = (u < H)[None, :], lengths_of(layout, b)
    active = (t < lengths)[:, None] & real
    place = (d * layout.B + b).to(tl.int64)[:, None]
    row = lane_rows(layout, t, b, d)
    at, at_state, at_states = row * H + u[None, :], place * H + u[None, :], place * (K * H) + u[None, :]
    x = load_tiles(x_gates, row * (G * H) + u[None, :], active, H, G, ACC)
    r = load_tiles(r_gates, place * (G * H) + u[None, :], active, H, G, ACC)
    v = load_vectors(vectors, d, u, H, V, BH, ACC)
    h_old, c_old = tl.zeros((BB, BH), ACC), load_tiles(c, at_states, active, H, K, ACC)
    if not PROJECTED:
        h_old = tl.load(h + at_state, mask=active, other=0.0).to(ACC)
    h_new, c_new, saved = run_step(
        x, r, v, h_old, c_old, zoneout, at, active, real, H,
        STEP, K, OUTPUT_SAVED, KEEP_H, KEEP_C, h.dtype.element_ty, ACC, PROJECTED,
    )  # fmt: skip
    h_next, c_next = h_new, c_new
    if resets.rows is not None:
        cut = cut_before(layout, resets, step_after(t, back), back, lengths, b)
        if not PROJECTED:
            h_next = tl.where(cut, load_state(resets.h, at_state, cut & real, H, 1, BB, BH, h.dtype.element_ty)[0], h_next)
        c_next = choose(cut, load_state(resets.c, at_states, cut & real, H, K, BB, BH, ACC), c_next, K)
    tl.store(h + at_state, h_next, mask=active)
    if y is not None:
        tl.store(y + at, h_new, mask=active)
    store_tiles(c, at_states, c_next, active, H, K)
    if c_all is not None:
        store_tiles(c_all, row * (K * H) + u[None, :], c_new, active, H, K)
    if gates is not None:
        store_tiles(gates, row * (S * H) + u[None, :], saved, active, H, S)


@triton.jit(do_not_specialize=["n"])  # one kernel for every step
def emit(
    projected,  # [D, B, P], wide
    h,  # [D, B, P]: state, updated
    y,  # [rows, D, P]
    layout, zoneout, resets, n, P,
    KEEP_H: tl.constexpr, BB: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """The projected output of a step."""
    b, u, d = tl.program_id(0) * BB + tl.arange(0, BB), tl.program_id(1) * BP + tl.arange(0, BP), tl.program_id(2)
    back = goes_back(layout, d)
    t, lengths = tl.where(back, layout.T - 1 - n, n), lengths_of(layout, b)
    active = (t < lengths)[:, None] & (u < P)[None, :]
    state = (d * layout.B + b).to(tl.int64)[:, None] * P + u[None, :]
    at = lane_rows(layout, t, b, d) * P + u[None, :]
    wide = projected.dtype.element_ty
    value = tl.load(projected + state, mask=active, other=0.0).to(y.dtype.element_ty).to(wide)
    old = tl.load(h + state, mask=active, other=0.0).to(wide)
    value = zone_out(zoneout.mask_h, at, active, KEEP_H, old, value).to(y.dtype.element_ty)
    following = value
    if resets.rows is not None:
        cut = cut_before(layout, resets, step_after(t, back), back, lengths, b)
        following = tl.where(cut, load_state(resets.h, state, cut & active, P, 1, BB, BP, y.dtype.element_ty)[0], value)
    tl.store(h + state, following, mask=active)
    tl.store(y + at, value, mask=active)


@triton.jit(do_not_specialize=["n"])  # one kernel for every step
def gather(
    dy,  # [rows, D, P] or None
    through,  # [D, B, P], wide: what reached the output through R of the following step
    dh,  # [D, B, P], wide: what reached it from outside, updated
    total,  # [D, B, P]: out, the whole gradient of the step's output
    doutput,  # [rows, D, P]: out, the same
    layout, zoneout, resets, n, P,
    KEEP_H: tl.constexpr, BB: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """The gradient of a projected output, before the product with the projection."""
    b, u, d = tl.program_id(0) * BB + tl.arange(0, BB), tl.program_id(1) * BP + tl.arange(0, BP), tl.program_id(2)
    back = goes_back(layout, d)
    t = tl.where(back, n, layout.T - 1 - n)
    own, lengths = (b < layout.B)[:, None] & (u < P)[None, :], lengths_of(layout, b)
    active = (t < lengths)[:, None] & own
    state = (d * layout.B + b).to(tl.int64)[:, None] * P + u[None, :]
    row = lane_rows(layout, t, b, d) * P + u[None, :]
    waiting = tl.load(dh + state, mask=own, other=0.0) + tl.load(through + state, mask=own, other=0.0)
    if resets.rows is not None:
        cut = cut_before(layout, resets, step_after(t, back), back, lengths, b)
        waiting = cut_off((waiting,), resets.dh, state, own, cut, P, 1, BB, BP, waiting.dtype)[0]
    value = waiting
    if dy is not None:
        value += tl.load(dy + row, mask=active, other=0.0).to(value.dtype)
    kept, value = zone_out_backward(zoneout.mask_h, row, active, KEEP_H, value)
    tl.store(dh + state, tl.where(active, kept, waiting), mask=own)
    tl.store(total + state, tl.where(active, value, 0.0).to(total.dtype.element_ty), mask=own)
    tl.store(doutput + row, value.to(doutput.dtype.element_ty), mask=active)


@triton.jit(do_not_specialize=["n"])  # one kernel for every step
def backward(
    dy,  # [rows, D, H] or None
    through,  # [D, B, H], wide: what reached h through R of the following step; with a projection, its whole gradient
    dh,  # [D, B, H], wide: what reached h otherwise, updated; None with a projection
    dc,  # [D, B, K*H], wide, updated
    dc_all,  # [rows, D, K*H] or None, wide
    vectors,  # [D, V*H] or None
    h0,  # [D, B, H] or None
    c0,  # [D, B, K*H] or None, wide
    y,  # [rows, D, H]
    c_all,  # [rows, D, K*H], wide
    gates,  # [rows, D, S*H]
    dgates,  # [rows, D, G*H]: out
    drecurrent,  # [rows, D, OWN*H] or None: out
    doutput,  # [rows, D, H] or None: out
    dr_gates,  # [D, B, G*H]: out, gradient of R h, 0 where the sequence has no such step
    layout, zoneout, resets, n, H,
    STEP_BACKWARD: tl.constexpr, CANDIDATE: tl.constexpr, READS: tl.constexpr,
    G: tl.constexpr, S: tl.constexpr, K: tl.constexpr, V: tl.constexpr, OWN: tl.constexpr, OUTPUT_SAVED: tl.constexpr,
    KEEP_H: tl.constexpr, KEEP_C: tl.constexpr,
    BB: tl.constexpr, BH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b, u, d = tl.program_id(0) * BB + tl.arange(0, BB), tl.program_id(1) * BH + tl.arange(0, BH), tl.program_id(2)
    back = goes_back(layout, d)
    t = tl.where(back, n, layout.T - 1 - n)
    lengths = lengths_of(layout, b)
    real = (u < H)[None, :]
    own = (b < layout.B)[:, None] & real
    active = (t < lengths)[:, None] & real
    place = (d * layout.B + b).to(tl.int64)[:, None]
    at_state, at_states = place * H + u[None, :], place * (K * H) + u[None, :]
    row = lane_rows(layout, t, b, d)
    at = row * H + u[None, :]
    had, row_before = step_before(layout, t, back, lengths, b, d)
    cut = cut_before(layout, resets, t, back, lengths, b)

    dh_t = tl.load(through + at_state, mask=own, other=0.0)
    if dh is not None:
        dh_t += tl.load(dh + at_state, mask=own, other=0.0)
        if resets.rows is not None:
            cut_after = cut_before(layout, resets, step_after(t, back), back, lengths, b)
            dh_t = cut_off((dh_t,), resets.dh, at_state, own, cut_after, H, 1, BB, BH, ACC)[0]
    waiting = dh_t
    if dy is not None:
        dh_t += tl.load(dy + at, mask=active, other=0.0).to(ACC)
    dh_kept = tl.zeros((BB, BH), ACC)
    if dh is not None:
        dh_kept, dh_t = zone_out_backward(zoneout.mask_h, at, active, KEEP_H, dh_t)
    dc_old = load_tiles(dc, at_states, active, H, K, ACC)
    dc_t = dc_old
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
    if doutput is not None:
        tl.store(doutput + at, dh_t.to(doutput.dtype.element_ty), mask=active)
    store_tiles(dr_gates, place * (G * H) + u[None, :], choose(active, dr, zero_tiles(G, BB, BH, ACC), G), own, H, G)
    if dh is not None:
        tl.store(dh + at_state, tl.where(active, direct + dh_kept, waiting), mask=own)
    dc_new = add(dc_new, dc_kept, K)
    if resets.rows is not None:
        dc_new = cut_off(dc_new, resets.dc, at_states, own, cut, H, K, BB, BH, ACC)
    store_tiles(dc, at_states, dc_new, active, H, K)


@triton.jit
def finish(
    dh,  # [D, B, P], wide
    through,  # [D, B, P], wide: as after the last launch of `backward`
    dh0,  # [D, B, P]: out
    layout, resets, P,
    BB: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """The gradient of the first state."""
    b, u, d = tl.program_id(0) * BB + tl.arange(0, BB), tl.program_id(1) * BP + tl.arange(0, BP), tl.program_id(2)
    back = goes_back(layout, d)
    cut = cut_before(layout, resets, first_step(layout.T, back), back, lengths_of(layout, b), b)
    own = (b < layout.B)[:, None] & (u < P)[None, :]
    at = (d * layout.B + b).to(tl.int64)[:, None] * P + u[None, :]
    value = tl.load(dh + at, mask=own, other=0.0) + tl.load(through + at, mask=own, other=0.0)
    value = cut_off((value,), resets.dh, at, own, cut, P, 1, BB, BP, value.dtype)[0]
    tl.store(dh0 + at, value.to(dh0.dtype.element_ty), mask=own)
