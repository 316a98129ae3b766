"""Masking: which keys a query sees, by sequences, windows, masks and block-sparse layouts."""

import triton
import triton.language as tl

from fastseq.kernels.attention.memory import pair_places

SMALLEST_BLOCK: tl.constexpr = tl.constexpr(16)  # of a block-sparse layout


@triton.jit
def sequence(seq, b, Tq, Tk):
    """Of sequence b: first row of q and of k in memory, number of queries and keys, place of query 0 among the keys."""
    q0, k0 = 0, 0
    if seq.cu_q is not None:
        q0, k0 = tl.load(seq.cu_q + b), tl.load(seq.cu_k + b)
        Tq, Tk = tl.load(seq.cu_q + b + 1) - q0, tl.load(seq.cu_k + b + 1) - k0
    if seq.q_lengths is not None:
        Tq = tl.load(seq.q_lengths + b)
    if seq.k_lengths is not None:
        Tk = tl.load(seq.k_lengths + b)
    shift = seq.offset
    if seq.bottom_right is not None:
        shift += Tk - Tq
    return q0, k0, Tq, Tk, shift


@triton.jit
def keys_of(parts, i0, i1, shift, Tk, BN: tl.constexpr):
    """Keys that queries i0 .. i1 - 1 may see, [begin, end) with begin a multiple of BN, and the part [inner, outer) of it, of
    whole tiles, in which every one of them sees every key as far as windows and lengths go. Nothing for no queries."""
    begin, end = 0, Tk
    inner, outer = 0, Tk // BN * BN
    if parts.left is not None:
        begin = tl.maximum(i0 + shift - parts.left, 0) // BN * BN
        inner = tl.cdiv(tl.maximum(i1 - 1 + shift - parts.left, 0), BN) * BN
    if parts.right is not None:
        end = tl.maximum(tl.minimum(Tk, i1 + shift + parts.right), 0)
        outer = tl.minimum(outer, tl.maximum(i0 + shift + parts.right + 1, 0) // BN * BN)
    end = tl.where(i0 < i1, tl.maximum(end, begin), begin)
    inner = tl.minimum(tl.maximum(inner, begin), end)
    outer = tl.maximum(tl.minimum(outer, end), inner)
    return begin, inner, outer, end


@triton.jit
def queries_of(parts, j0, j1, shift, Tq, BM: tl.constexpr):
    """Queries that may see keys j0 .. j1 - 1, [begin, end) with begin a multiple of BM, and the part [inner, outer) of it, of
    whole tiles, in which every one of them sees every such key as far as windows and lengths go. Nothing for no keys."""
    begin, end = 0, Tq
    inner, outer = 0, Tq // BM * BM
    if parts.right is not None:
        begin = tl.maximum(j0 - shift - parts.right, 0) // BM * BM
        inner = tl.cdiv(tl.maximum(j1 - 1 - shift - parts.right, 0), BM) * BM
    if parts.left is not None:
        end = tl.maximum(tl.minimum(Tq, j1 - shift + parts.left), 0)
        outer = tl.minimum(outer, tl.maximum(j0 - shift + parts.left + 1, 0) // BM * BM)
    end = tl.where(j0 < j1, tl.maximum(end, begin), begin)
    inner = tl.minimum(tl.maximum(inner, begin), end)
    outer = tl.maximum(tl.minimum(outer, end), inner)
    return begin, inner, outer, end


@triton.jit
def seen(parts, b, h, i, j, shift, Tq, Tk, EDGE: tl.constexpr, BOUNDS: tl.constexpr = True):
    """[BM, BN]: whether query i [BM] sees key j [BN]. Not EDGE: length and window hide nothing in this tile (queries beyond Tq
    see whatever there is), so that without other masks this costs nothing. Not BOUNDS: lengths hide nothing at an edge either."""
    inside = (i < Tq)[:, None] & (j < Tk)[None, :]
    visible = tl.full((i.shape[0], j.shape[0]), 1, tl.int1)
    if EDGE:
        if BOUNDS:
            visible = inside
        if parts.left is not None:
            visible &= j[None, :] >= i[:, None] + (shift - parts.left)
        if parts.right is not None:
            visible &= j[None, :] <= i[:, None] + (shift + parts.right)
    if parts.mask is not None:
        visible &= tl.load(pair_places(parts.mask, b, h, i, j), mask=inside, other=0) != 0
    if parts.blocks is not None:
        at = pair_places(parts.blocks, b, h, i // parts.block_size, j // parts.block_size)
        visible &= tl.load(at, mask=inside, other=0) != 0
    return visible


@triton.jit
def any_block(parts, b, h, i0, j0, Tq, Tk, BM: tl.constexpr, BN: tl.constexpr):
    """Whether a layout shows any of the blocks that a tile touches, of BM queries from i0 < Tq and BN keys from j0 < Tk. Blocks
    are no smaller than SMALLEST_BLOCK, so one row and key in as many, and the last ones, meet them all."""
    i = tl.minimum(i0 + tl.arange(0, 2 * BM // SMALLEST_BLOCK) * SMALLEST_BLOCK, tl.minimum(i0 + BM, Tq) - 1)
    j = tl.minimum(j0 + tl.arange(0, 2 * BN // SMALLEST_BLOCK) * SMALLEST_BLOCK, tl.minimum(j0 + BN, Tk) - 1)
    flags = tl.load(pair_places(parts.blocks, b, h, i // parts.block_size, j // parts.block_size))
    return tl.max(tl.max(flags.to(tl.int32), 1), 0) != 0
