"""What the recurrent kernels share: arguments in groups, rows of a step, gates as tuples.

Letters as in ``fastseq.reference.recurrent``: T time, B batch, D lanes, H hidden, G gates, S saved activations. A tuple of gates
holds one [BB, BH] tile per gate.
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


class Cell(NamedTuple):
    """The mathematics of a cell, as jitted functions."""

    step: Any
    step_backward: Any


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
def load_gates(pointer, at, mask, H, G: tl.constexpr, ACC: tl.constexpr):
    """G tiles, H elements apart."""
    tiles = ()
    for g in tl.static_range(G):
        tiles = tiles + (tl.load(pointer + at + g * H, mask=mask, other=0.0).to(ACC),)
    return tiles


@triton.jit
def store_gates(pointer, at, tiles, mask, H, G: tl.constexpr):
    for g in tl.static_range(G):
        tl.store(pointer + at + g * H, tiles[g].to(pointer.dtype.element_ty), mask=mask)
