"""One step of a cell, everything but its matrix products, in one launch: for hidden sizes whose weights fit no program.

Grid of every kernel: (blocks of the batch, blocks of the hidden units, D). ``n`` counts the steps of the walk.
"""

import triton
import triton.language as tl

from fastseq.kernels.recurrent.parts import lengths_of, load_gates, rows_of, store_gates


@triton.jit
def forward(
    x_gates,  # [rows, D, G*H]
    r_gates,  # [D, B, G*H], wide: R h
    bias,  # [D, H] or None
    h,  # [D, B, H]: state, updated; the cell's output before a projection, if there is one
    c,  # [D, B, H]: likewise, wide
    y,  # [rows, D, H], or None with a projection
    c_all,  # [rows, D, H] wide, or None
    gates,  # [rows, D, S*H] or None
    layout, n, H,
    STEP: tl.constexpr, G: tl.constexpr, S: tl.constexpr, HAS_C: tl.constexpr, PROJECTED: tl.constexpr,
    BB: tl.constexpr, BH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b, u, d = tl.program_id(0) * BB + tl.arange(0, BB), tl.program_id(1) * BH + tl.arange(0, BH), tl.program_id(2)
    t = tl.where(((layout.reverse >> d) & 1) != 0, layout.T - 1 - n, n)
    active = (t < lengths_of(layout, b))[:, None] & (u < H)[None, :]
    place = (d * layout.B + b).to(tl.int64)[:, None]
    row = rows_of(layout, t, b) * layout.D + d
    x = load_gates(x_gates, row[:, None] * (G * H) + u[None, :], active, H, G, ACC)
    r = load_gates(r_gates, place * (G * H) + u[None, :], active, H, G, ACC)
    inside = tl.zeros((BB, BH), ACC)
    if bias is not None:
        inside += tl.load(bias + d * H + u, mask=u < H, other=0.0).to(ACC)[None, :]
    state = place * H + u[None, :]
    h_old, c_old = inside, inside
    if not PROJECTED:
        h_old = tl.load(h + state, mask=active, other=0.0).to(ACC)
    if HAS_C:
        c_old = tl.load(c + state, mask=active, other=0.0)
    h_new, c_new, saved = STEP(x, r, inside, h_old, c_old)
    tl.store(h + state, h_new.to(h.dtype.element_ty), mask=active)
    at = row[:, None] * H + u[None, :]
    if y is not None:
        tl.store(y + at, h_new.to(y.dtype.element_ty), mask=active)
    if HAS_C:
        tl.store(c + state, c_new, mask=active)
    if c_all is not None:
        tl.store(c_all + at, c_new, mask=active)
    if gates is not None:
        store_gates(gates, row[:, None] * (S * H) + u[None, :], saved, active, H, S)


@triton.jit
def emit(
    projected,  # [D, B, P], wide
    h,  # [D, B, P]: state, updated
    y,  # [rows, D, P]
    layout, n, P,
    BB: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """The projected output of a step."""
    b, u, d = tl.program_id(0) * BB + tl.arange(0, BB), tl.program_id(1) * BP + tl.arange(0, BP), tl.program_id(2)
    t = tl.where(((layout.reverse >> d) & 1) != 0, layout.T - 1 - n, n)
    active = (t < lengths_of(layout, b))[:, None] & (u < P)[None, :]
    state = (d * layout.B + b).to(tl.int64)[:, None] * P + u[None, :]
    value = tl.load(projected + state, mask=active, other=0.0).to(y.dtype.element_ty)
    tl.store(h + state, value, mask=active)
    tl.store(y + (rows_of(layout, t, b) * layout.D + d)[:, None] * P + u[None, :], value, mask=active)


@triton.jit
def gather(
    dy,  # [rows, D, P] or None
    through,  # [D, B, P], wide: what reached the output through R of the following step
    dh,  # [D, B, P], wide: what reached it from outside, updated
    total,  # [D, B, P]: out, the whole gradient of the step's output
    dprojected,  # [rows, D, P]: out
    layout, n, P,
    BB: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """The gradient of a projected output, before the product with the projection."""
    b, u, d = tl.program_id(0) * BB + tl.arange(0, BB), tl.program_id(1) * BP + tl.arange(0, BP), tl.program_id(2)
    t = tl.where(((layout.reverse >> d) & 1) != 0, n, layout.T - 1 - n)
    own = (b < layout.B)[:, None] & (u < P)[None, :]
    active = (t < lengths_of(layout, b))[:, None] & own
    state = (d * layout.B + b).to(tl.int64)[:, None] * P + u[None, :]
    row = (rows_of(layout, t, b) * layout.D + d)[:, None] * P + u[None, :]
    value = tl.load(dh + state, mask=own, other=0.0) + tl.load(through + state, mask=own, other=0.0)
    tl.store(dh + state, tl.where(active, 0.0, value), mask=own)
    if dy is not None:
        value += tl.load(dy + row, mask=active, other=0.0).to(value.dtype)
    tl.store(total + state, tl.where(active, value, 0.0), mask=own)
    tl.store(dprojected + row, value.to(dprojected.dtype.element_ty), mask=active)


@triton.jit
def backward(
    dy,  # [rows, D, H] or None
    through,  # [D, B, H], wide: what reached h through R of the following step; with a projection, its whole gradient
    dh,  # [D, B, H], wide: what reached h otherwise, updated; None with a projection
    dc,  # [D, B, H], wide, updated
    dc_all,  # [rows, D, H] or None, wide
    h0,  # [D, B, H] or None
    c0,  # [D, B, H] or None, wide
    y,  # [rows, D, H]
    c_all,  # [rows, D, H], wide
    gates,  # [rows, D, S*H]
    dgates,  # [rows, D, G*H]: out
    drecurrent,  # [rows, D, H] or None: out
    dr_gates,  # [D, B, G*H]: out, gradient of R h, 0 where the sequence has no such step
    layout, n, H,
    STEP_BACKWARD: tl.constexpr, G: tl.constexpr, S: tl.constexpr, HAS_C: tl.constexpr,
    BB: tl.constexpr, BH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b, u, d = tl.program_id(0) * BB + tl.arange(0, BB), tl.program_id(1) * BH + tl.arange(0, BH), tl.program_id(2)
    backwards = ((layout.reverse >> d) & 1) != 0
    t = tl.where(backwards, n, layout.T - 1 - n)
    lengths = lengths_of(layout, b)
    own = (b < layout.B)[:, None] & (u < H)[None, :]
    active = (t < lengths)[:, None] & (u < H)[None, :]
    place = (d * layout.B + b).to(tl.int64)[:, None]
    state = place * H + u[None, :]
    row = rows_of(layout, t, b) * layout.D + d
    at = row[:, None] * H + u[None, :]
    before = tl.where(backwards, t + 1, t - 1)
    was = ((before >= 0) & (before < lengths))[:, None] & active
    at_before = (rows_of(layout, tl.minimum(tl.maximum(before, 0), layout.T - 1), b) * layout.D + d)[:, None] * H + u[None, :]

    dh_t = tl.load(through + state, mask=own, other=0.0)
    if dh is not None:
        dh_t += tl.load(dh + state, mask=own, other=0.0)
    waiting = dh_t
    if dy is not None:
        dh_t += tl.load(dy + at, mask=active, other=0.0).to(ACC)
    saved = load_gates(gates, row[:, None] * (S * H) + u[None, :], active, H, S, ACC)
    dc_t, h_prev, c_prev, h, c = dh_t, dh_t, dh_t, dh_t, dh_t
    if HAS_C:
        dc_t = tl.load(dc + state, mask=active, other=0.0)
        if dc_all is not None:
            dc_t += tl.load(dc_all + at, mask=active, other=0.0)
        c = tl.load(c_all + at, mask=active, other=0.0)
        c_prev = tl.load(c_all + at_before, mask=was, other=0.0)
        if c0 is not None:
            c_prev = tl.where(was, c_prev, tl.load(c0 + state, mask=active, other=0.0))
    elif S > 0:
        h_prev = tl.load(y + at_before, mask=was, other=0.0).to(ACC)
        if h0 is not None:
            h_prev = tl.where(was, h_prev, tl.load(h0 + state, mask=active, other=0.0).to(ACC))
    else:
        h = tl.load(y + at, mask=active, other=0.0).to(ACC)
    dx, dr, direct, dc_new = STEP_BACKWARD(dh_t, dc_t, saved, h_prev, c_prev, h, c)
    store_gates(dgates, row[:, None] * (G * H) + u[None, :], dx, active, H, G)
    if drecurrent is not None:
        tl.store(drecurrent + at, dr[G - 1].to(drecurrent.dtype.element_ty), mask=active)
    for g in tl.static_range(G):
        value = tl.where(active, dr[g], 0.0)
        tl.store(dr_gates + place * (G * H) + g * H + u[None, :], value.to(dr_gates.dtype.element_ty), mask=own)
    if dh is not None:
        tl.store(dh + state, tl.where(active, direct, waiting), mask=own)
    if HAS_C:
        tl.store(dc + state, dc_new, mask=active)
