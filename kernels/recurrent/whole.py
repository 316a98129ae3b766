"""Whole sequences in one launch: a program walks over all steps of a lane and a block of the batch, its weights resident.

h = step(x, R h) for every step, R held in shared memory (or registers) by the program, h and c in registers. Nothing passes
between programs.
"""

import triton
import triton.language as tl

from fastseq.kernels.recurrent.parts import lengths_of, load_gates, rows_of, store_gates


@triton.jit
def forward(
    x_gates,  # [rows, D, G*H]
    weight,  # [D, G*H, H]
    bias,  # [D, H] or None
    h0,  # [D, B, H] or None
    c0,  # [D, B, H] or None, wide
    y,  # [rows, D, H]
    h_n,  # [D, B, H]
    c_n,  # [D, B, H], wide
    c_all,  # [rows, D, H] wide, or None
    gates,  # [rows, D, S*H] or None
    layout, H,
    STEP: tl.constexpr, G: tl.constexpr, S: tl.constexpr, HAS_C: tl.constexpr,
    BB: tl.constexpr, BH: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of the batch, D)."""
    d = tl.program_id(1)
    b, u = tl.program_id(0) * BB + tl.arange(0, BB), tl.arange(0, BH)
    own = (b < layout.B)[:, None] & (u < H)[None, :]
    state = (d * layout.B + b).to(tl.int64)[:, None] * H + u[None, :]
    lengths = lengths_of(layout, b)
    backwards = ((layout.reverse >> d) & 1) != 0
    narrow = y.dtype.element_ty

    resident = ()  # of every gate R_g^T [BH (k), BH (u)]
    square = (u < H)[:, None] & (u < H)[None, :]
    for g in tl.static_range(G):
        entry = ((d * G + g) * H + u[None, :]).to(tl.int64) * H + u[:, None]
        resident = resident + (tl.load(weight + entry, mask=square, other=0.0),)
    inside = tl.zeros((BB, BH), ACC)
    if bias is not None:
        inside += tl.load(bias + d * H + u, mask=u < H, other=0.0).to(ACC)[None, :]
    h, c = tl.zeros((BB, BH), narrow), tl.zeros((BB, BH), ACC)
    if h0 is not None:
        h = tl.load(h0 + state, mask=own, other=0.0)
    if c0 is not None:
        c = tl.load(c0 + state, mask=own, other=0.0)

    steps = tl.max(lengths, 0)
    for n in range(steps):
        t = tl.where(backwards, steps - 1 - n, n)
        active = (t < lengths)[:, None] & (u < H)[None, :]
        row = rows_of(layout, t, b) * layout.D + d
        x = load_gates(x_gates, row[:, None] * (G * H) + u[None, :], active, H, G, ACC)
        r = ()
        for g in tl.static_range(G):
            r = r + (tl.dot(h, resident[g], input_precision=PRECISION, out_dtype=ACC),)
        h_new, c_new, saved = STEP(x, r, inside, h.to(ACC), c)
        h = tl.where(active, h_new.to(narrow), h)
        c = tl.where(active, c_new, c)
        at = row[:, None] * H + u[None, :]
        tl.store(y + at, h, mask=active)
        if c_all is not None:
            tl.store(c_all + at, c, mask=active)
        if gates is not None:
            store_gates(gates, row[:, None] * (S * H) + u[None, :], saved, active, H, S)
    tl.store(h_n + state, h, mask=own)
    if HAS_C:
        tl.store(c_n + state, c, mask=own)


@triton.jit
def backward(
    dy,  # [rows, D, H] or None
    dh_n,  # [D, B, H] or None
    dc_n,  # [D, B, H] or None, wide
    dc_all,  # [rows, D, H] or None, wide
    weight,  # [D, G*H, H]
    h0,  # [D, B, H] or None
    c0,  # [D, B, H] or None, wide
    y,  # [rows, D, H]
    c_all,  # [rows, D, H], wide
    gates,  # [rows, D, S*H]
    dgates,  # [rows, D, G*H]
    drecurrent,  # [rows, D, H] or None
    dh0,  # [D, B, H]
    dc0,  # [D, B, H], wide
    layout, H,
    STEP_BACKWARD: tl.constexpr, G: tl.constexpr, S: tl.constexpr, HAS_C: tl.constexpr,
    BB: tl.constexpr, BH: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of the batch, D). Against the direction of the forward pass."""
    d = tl.program_id(1)
    b, u = tl.program_id(0) * BB + tl.arange(0, BB), tl.arange(0, BH)
    own = (b < layout.B)[:, None] & (u < H)[None, :]
    state = (d * layout.B + b).to(tl.int64)[:, None] * H + u[None, :]
    lengths = lengths_of(layout, b)
    backwards = ((layout.reverse >> d) & 1) != 0
    narrow = y.dtype.element_ty

    resident = ()  # of every gate R_g [BH (u), BH (k)]
    square = (u < H)[:, None] & (u < H)[None, :]
    for g in tl.static_range(G):
        entry = ((d * G + g) * H + u[:, None]).to(tl.int64) * H + u[None, :]
        resident = resident + (tl.load(weight + entry, mask=square, other=0.0),)
    first_h, first_c = tl.zeros((BB, BH), ACC), tl.zeros((BB, BH), ACC)
    if h0 is not None:
        first_h = tl.load(h0 + state, mask=own, other=0.0).to(ACC)
    if c0 is not None:
        first_c = tl.load(c0 + state, mask=own, other=0.0).to(ACC)
    dh, dc = tl.zeros((BB, BH), ACC), tl.zeros((BB, BH), ACC)
    if dh_n is not None:
        dh = tl.load(dh_n + state, mask=own, other=0.0).to(ACC)
    if dc_n is not None:
        dc = tl.load(dc_n + state, mask=own, other=0.0).to(ACC)

    steps = tl.max(lengths, 0)
    for n in range(steps):
        t = tl.where(backwards, n, steps - 1 - n)
        active = (t < lengths)[:, None] & (u < H)[None, :]
        row = rows_of(layout, t, b) * layout.D + d
        at = row[:, None] * H + u[None, :]
        before = tl.where(backwards, t + 1, t - 1)
        was = ((before >= 0) & (before < lengths))[:, None] & active
        at_before = (rows_of(layout, tl.minimum(tl.maximum(before, 0), layout.T - 1), b) * layout.D + d)[:, None] * H + u[None, :]
        dh_t, dc_t = dh, dc
        if dy is not None:
            dh_t += tl.load(dy + at, mask=active, other=0.0).to(ACC)
        saved = load_gates(gates, row[:, None] * (S * H) + u[None, :], active, H, S, ACC)
        h_prev, c_prev, h, c = dh, dc, dh, dc
        if HAS_C:
            if dc_all is not None:
                dc_t += tl.load(dc_all + at, mask=active, other=0.0)
            c = tl.load(c_all + at, mask=active, other=0.0)
            c_prev = tl.where(was, tl.load(c_all + at_before, mask=was, other=0.0), first_c)
        elif S > 0:
            h_prev = tl.where(was, tl.load(y + at_before, mask=was, other=0.0).to(ACC), first_h)
        else:
            h = tl.load(y + at, mask=active, other=0.0).to(ACC)
        dx, dr, direct, dc_new = STEP_BACKWARD(dh_t, dc_t, saved, h_prev, c_prev, h, c)
        store_gates(dgates, row[:, None] * (G * H) + u[None, :], dx, active, H, G)
        if drecurrent is not None:
            tl.store(drecurrent + at, dr[G - 1].to(narrow), mask=active)
        dh_new = direct
        for g in tl.static_range(G):
            operand = tl.where(active, dr[g], 0.0).to(narrow)
            dh_new += tl.dot(operand, resident[g], input_precision=PRECISION, out_dtype=ACC)
        dh = tl.where(active, dh_new, dh)
        if HAS_C:
            dc = tl.where(active, dc_new, dc)
    tl.store(dh0 + state, dh.to(narrow), mask=own)
    if HAS_C:
        tl.store(dc0 + state, dc, mask=own)
