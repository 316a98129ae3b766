"""What the recurrent kernels share: arguments in groups, rows of a step, gates and states as tuples of tiles, zoneout.

Letters as in ``fastseq.reference.recurrent``: T time, B batch, D lanes, H hidden, G gates, S saved activations, K states beside
h, V vectors. A tuple holds one [BB, BH] tile for each gate (activation, state), a vector's tile is [1, BH].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Layout(NamedTuple):
    """Where the rows of a step lie: padded row t B + b, packed row starts[t] + b."""

    starts: Any  # int64 [T], or None: padded
    lengths: Any  # int64 [B], or None: all T
    T: Any
    B: Any
    D: Any
    reverse: Any  # bit d: lane d walks from the last step to the first
    end: Any = None  # the compiled kernel loses fields equal to 1 at the end of a group


class Zoneout(NamedTuple):
    """Where a state keeps its value in a step; None: nowhere, or in the proportion that the kernel is compiled with."""

    hold_h: Any  # uint8, rows of P
    hold_c: Any  # uint8, rows of H
    end: Any = None


class Cell(NamedTuple):
    """The mathematics of a cell, as jitted functions, and what its backward step reads beside saved activations and c."""

    step: Any
    step_backward: Any
    candidate: Any = None  # c as a step proposed it, which zoneout needs
    reads: str = ""  # "h": the output, "h_prev": the output before


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
def held(hold, at, mask, KEEP: tl.constexpr, old, new):
    """What zoneout makes of a state, as ``fastseq.reference.recurrent.held``."""
    if hold is not None:
        new = tl.where(tl.load(hold + at, mask=mask, other=0) != 0, old, new)
    elif KEEP > 0:
        new = KEEP * old + (1 - KEEP) * new
    return new


@triton.jit
def split(hold, at, mask, KEEP: tl.constexpr, grad):
    """The gradient of a state after zoneout as gradients of the old value and of the new."""
    old, new = grad * 0, grad
    if hold is not None:
        keep = tl.load(hold + at, mask=mask, other=0) != 0
        old, new = tl.where(keep, grad, 0.0), tl.where(keep, 0.0, grad)
    elif KEEP > 0:
        old, new = KEEP * grad, (1 - KEEP) * grad
    return old, new


@triton.jit
def held_states(hold, at, mask, KEEP: tl.constexpr, old, new, K: tl.constexpr):
    """Zoneout of the states beside h, if there is one."""
    if K == 1:
        new = (held(hold, at, mask, KEEP, old[0], new[0]),)
    return new


@triton.jit
def split_states(hold, at, mask, KEEP: tl.constexpr, grads, K: tl.constexpr):
    """Gradients of the old states and of the new ones."""
    old, new = zero_like(grads, K), grads
    if K == 1:
        kept, rest = split(hold, at, mask, KEEP, grads[0])
        old, new = (kept,), (rest,)
    return old, new


@triton.jit
def zero_like(tiles, N: tl.constexpr):
    zeros = ()
    for k in tl.static_range(N):
        zeros = zeros + (tiles[k] * 0,)
    return zeros


@triton.jit
def add(a, b, N: tl.constexpr):
    """Tile by tile."""
    tiles = ()
    for k in tl.static_range(N):
        tiles = tiles + (a[k] + b[k],)
    return tiles
