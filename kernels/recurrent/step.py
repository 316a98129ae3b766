"""What a step of the recurrent kernels consists of, whatever the launch around it: rows, gates and states as tuples of tiles, the
cell with its zoneout, what goes back through it.

Letters as in ``fastseq.reference.recurrent``: T time, B batch, D lanes, H hidden, G gates, S saved activations, K states beside
h, V vectors. A tuple holds one [BB, BH] tile for each gate (activation, state), a vector's tile is [1, BH].
"""

import triton
import triton.language as tl


@triton.jit
def lengths_of(layout, b):
    """[BB]: steps of each sequence, 0 beyond the batch."""
    if layout.lengths is not None:
        return tl.load(layout.lengths + b, mask=b < layout.B, other=0).to(tl.int32)
    return tl.where(b < layout.B, layout.T, 0)


@triton.jit
def rows_of(layout, t, b):
    """[BB] int64: rows of step t."""
    if layout.starts is not None:
        return tl.load(layout.starts + t) + b
    return t.to(tl.int64) * layout.B + b


@triton.jit
def goes_back(layout, d):
    """Whether lane d walks from the last step to the first."""
    return ((layout.reverse >> d) & 1) != 0


@triton.jit
def lane_rows(layout, t, b, d):
    """[BB, 1] int64: rows of step t and lane d in a tensor [rows, D, ..]."""
    return (rows_of(layout, t, b) * layout.D + d)[:, None]


@triton.jit
def step_before(layout, t, back, lengths, b, d):
    """[BB, 1] each: whether a sequence that has step t has one before it in the lane's order, and that one's `lane_rows`."""
    before = tl.where(back, t + 1, t - 1)
    was = ((before >= 0) & (before < lengths) & (t < lengths))[:, None]
    return was, lane_rows(layout, tl.minimum(tl.maximum(before, 0), layout.T - 1), b, d)


@triton.jit
def step_after(t, back):
    """The step after t in the lane's order."""
    return tl.where(back, t - 1, t + 1)


@triton.jit
def first_step(steps, back):
    """In the lane's order."""
    return tl.where(back, steps - 1, 0)


@triton.jit
def cut_before(layout, resets, t, back, lengths, b):
    """[BB, 1]: whether a sequence that has step t begins anew with it, in the lane's order."""
    cut = lengths < 0
    if resets.rows is not None:
        later = tl.where(back, t + 1, t)  # a reset stands at the later step of a pair, whoever comes first
        row = rows_of(layout, tl.minimum(later, layout.T - 1), b)
        cut = tl.load(resets.rows + row, mask=(t >= 0) & (later < lengths), other=0) != 0
    return cut[:, None]


@triton.jit
def load_tiles(pointer, at, mask, H, N: tl.constexpr, ACC: tl.constexpr):
    """N tiles, H elements apart."""
    tiles = ()
    for g in tl.static_range(N):
        tiles = tiles + (tl.load(pointer + at + g * H, mask=mask, other=0.0).to(ACC),)
    return tiles


@triton.jit
def store_tiles(pointer, at, tiles, mask, H, N: tl.constexpr, FIRST: tl.constexpr = 0):
    """N tiles from the one numbered FIRST on, H elements apart."""
    for g in tl.static_range(N):
        tl.store(pointer + at + g * H, tiles[FIRST + g].to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def zero_tiles(N: tl.constexpr, BB: tl.constexpr, BH: tl.constexpr, ACC: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(N):
        tiles = tiles + (tl.zeros((BB, BH), ACC),)
    return tiles


@triton.jit
def cut_off(grads, sums, at, mask, cut, H, N: tl.constexpr, BB: tl.constexpr, BH: tl.constexpr, ACC: tl.constexpr):
    """What of the gradients of a state, N tiles H elements apart, goes on to the step before; the rest is added to ``sums``."""
    if sums is not None:
        for g in tl.static_range(N):
            so_far = tl.load(sums + at + g * H, mask=cut & mask, other=0.0)
            tl.store(sums + at + g * H, so_far + grads[g], mask=cut & mask)
    return choose(cut, zero_tiles(N, BB, BH, ACC), grads, N)


@triton.jit
def load_state(state, at, mask, H, N: tl.constexpr, BB: tl.constexpr, BH: tl.constexpr, ACC: tl.constexpr):
    """N tiles, H elements apart; zeros for None."""
    tiles = zero_tiles(N, BB, BH, ACC)
    if state is not None:
        tiles = load_tiles(state, at, mask, H, N, ACC)
    return tiles


@triton.jit
def load_vectors(vectors, d, u, H, V: tl.constexpr, BH: tl.constexpr, ACC: tl.constexpr):
    """V tiles [1, BH] of a lane; zeros without vectors."""
    tiles = zero_tiles(V, 1, BH, ACC)
    if vectors is not None:
        tiles = load_tiles(vectors + d * V * H, u[None, :], (u < H)[None, :], H, V, ACC)
    return tiles


@triton.jit
def choose(mask, new, old, N: tl.constexpr):
    """Tile by tile: new where the mask holds, else old."""
    tiles = ()
    for k in tl.static_range(N):
        tiles = tiles + (tl.where(mask, new[k], old[k]),)
    return tiles


@triton.jit
def zone_out(hold, at, mask, KEEP: tl.constexpr, old, new):
    """What zoneout makes of a state, as ``fastseq.reference.recurrent.held``."""
    if hold is not None:
        new = tl.where(tl.load(hold + at, mask=mask, other=0) != 0, old, new)
    elif KEEP > 0:
        new = KEEP * old + (1 - KEEP) * new
    return new


@triton.jit
def zone_out_backward(hold, at, mask, KEEP: tl.constexpr, grad):
    """The gradient of a state after zoneout as gradients of the old value and of the new."""
    old, new = tl.zeros_like(grad), grad
    if hold is not None:
        keep = tl.load(hold + at, mask=mask, other=0) != 0
        old, new = tl.where(keep, grad, 0.0), tl.where(keep, 0.0, grad)
    elif KEEP > 0:
        old, new = KEEP * grad, (1 - KEEP) * grad
    return old, new


@triton.jit
def zone_out_states(hold, at, mask, KEEP: tl.constexpr, old, new, K: tl.constexpr):
    """Zoneout of the states beside h, if there is one."""
    if K == 1:
        new = (zone_out(hold, at, mask, KEEP, old[0], new[0]),)
    return new


@triton.jit
def zone_out_states_backward(hold, at, mask, KEEP: tl.constexpr, grads, K: tl.constexpr):
    """Gradients of the old states and of the new ones."""
    old, new = zero_like(grads, K), grads
    if K == 1:
        kept, rest = zone_out_backward(hold, at, mask, KEEP, grads[0])
        old, new = (kept,), (rest,)
    return old, new


@triton.jit
def zero_like(tiles, N: tl.constexpr):
    zeros = ()
    for k in tl.static_range(N):
        zeros = zeros + (tl.zeros_like(tiles[k]),)
    return zeros


@triton.jit
def add(a, b, N: tl.constexpr):
    """Tile by tile."""
    tiles = ()
    for k in tl.static_range(N):
        tiles = tiles + (a[k] + b[k],)
    return tiles


@triton.jit
def run_step(
    x, r, v, h_old, c_old, zoneout, at, active, real, H,
    STEP: tl.constexpr, K: tl.constexpr, OUTPUT_SAVED: tl.constexpr, KEEP_H: tl.constexpr, KEEP_C: tl.constexpr,
    NARROW: tl.constexpr, ACC: tl.constexpr, PROJECTED: tl.constexpr = False,
):  # fmt: skip
    """New h (in NARROW), states and saved activations. PROJECTED: zoneout of h follows after the projection."""
    h_new, c_new, saved = STEP(x, r, v, h_old, c_old, real, H)
    h_new = h_new.to(NARROW)
    if OUTPUT_SAVED:
        saved = (h_new,)
    if not PROJECTED:
        h_new = zone_out(zoneout.mask_h, at, active, KEEP_H, h_old, h_new.to(ACC)).to(NARROW)
    return h_new, zone_out_states(zoneout.mask_c, at, active, KEEP_C, c_old, c_new, K), saved


@triton.jit
def load_initial(
    h0,  # [D, B, H] or None
    c0,  # [D, B, K*H] or None, wide
    place, u, mask, H, READS: tl.constexpr, K: tl.constexpr, BB: tl.constexpr, BH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The states that a sequence starts from, as far as the cell reads them; zeros for None."""
    h = tl.zeros((BB, BH), ACC)
    if READS == "h_prev":
        h = load_state(h0, place * H + u[None, :], mask, H, 1, BB, BH, ACC)[0]
    return h, load_state(c0, place * (K * H) + u[None, :], mask, H, K, BB, BH, ACC)


@triton.jit
def load_again(
    resets, place, u, cut, H, K: tl.constexpr, BB: tl.constexpr, BH: tl.constexpr, NARROW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The states that a sequence starts from anew, h in NARROW; nothing is read where none does."""
    h = load_state(resets.h, place * H + u[None, :], cut, H, 1, BB, BH, NARROW)[0]
    return h, load_state(resets.c, place * (K * H) + u[None, :], cut, H, K, BB, BH, ACC)


@triton.jit
def load_step_backward(
    y,  # [rows, D, H]
    c_all,  # [rows, D, K*H], wide
    gates,  # [rows, D, S*H]
    first_h, first_c,  # what `load_initial` gives
    zoneout, resets, place, row, row_before, u, active, was, cut, H,
    CANDIDATE: tl.constexpr, READS: tl.constexpr, S: tl.constexpr, K: tl.constexpr, OUTPUT_SAVED: tl.constexpr,
    KEEP_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What a step saved, h and c before it and after it; anything in place of an h that the cell does not read."""
    saved = load_tiles(gates, row * (S * H) + u[None, :], active, H, S, ACC)
    h_prev, h, c_prev, c = first_h, first_h, first_c, first_c
    if K > 0:
        c = load_tiles(c_all, row * (K * H) + u[None, :], active, H, K, ACC)
        c_prev = choose(was, load_tiles(c_all, row_before * (K * H) + u[None, :], was, H, K, ACC), first_c, K)
        if resets.rows is not None:
            again = load_state(resets.c, place * (K * H) + u[None, :], cut, H, K, first_h.shape[0], first_h.shape[1], ACC)
            c_prev = choose(cut, again, c_prev, K)
        if zoneout.mask_c is not None or KEEP_C > 0:
            c = (CANDIDATE(saved, c_prev[0]),)
    if READS == "h_prev":
        h_prev = tl.where(was, tl.load(y + row_before * H + u[None, :], mask=was, other=0.0).to(ACC), first_h)
        if resets.rows is not None:
            again = load_state(resets.h, place * H + u[None, :], cut, H, 1, first_h.shape[0], first_h.shape[1], ACC)
            h_prev = tl.where(cut, again[0], h_prev)
    if OUTPUT_SAVED:
        h = saved[0]
    elif READS == "h":
        h = tl.load(y + row * H + u[None, :], mask=active, other=0.0).to(ACC)
    return saved, h_prev, h, c_prev, c


@triton.jit
def store_step_backward(
    dgates,  # [rows, D, G*H]
    drecurrent,  # [rows, D, OWN*H] or None
    dx, dr, row, u, active, H, G: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """The gradients of a step's gates."""
    store_tiles(dgates, row * (G * H) + u[None, :], dx, active, H, G)
    if drecurrent is not None:
        store_tiles(drecurrent, row * (OWN * H) + u[None, :], dr, active, H, OWN, G - OWN)
