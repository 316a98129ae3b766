"""The arguments of the attention kernels, grouped; letters and meaning as in ``fastseq.reference.attention.Spec``.

A part that a call does not use is None, which the compiler sees: its code is not there. Strides are in elements.

A tuple of tuples ends with a None: Triton 3.6 forgets the constants (strides of 1) of an inner tuple that no constant follows.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Rows(NamedTuple):
    """[B, H, T, n], or packed [H, N, n] (batch = 0); the last dimension is contiguous."""

    pointer: Any
    batch: Any
    head: Any
    time: Any


class Scalars(NamedTuple):
    """[B, H, T], or packed [H, N] (batch = 0)."""

    pointer: Any
    batch: Any
    head: Any


class Pairs(NamedTuple):
    """[B, Hq, Tq, Tk]; stride 0 where broadcast."""

    pointer: Any
    batch: Any
    head: Any
    query: Any
    key: Any


class Distances(NamedTuple):
    """[Hq, L]: row of a head, entry ``zero`` for distance 0."""

    pointer: Any
    head: Any
    length: Any
    zero: Any


class DistanceRows(NamedTuple):
    """[Hq, M, E]."""

    pointer: Any
    head: Any
    row: Any
    length: Any
    zero: Any


class Sequences(NamedTuple):
    """Where sequences begin (packed) or end (padded): int32 pointers or None."""

    cu_q: Any = None  # [B + 1]
    cu_k: Any = None
    q_lengths: Any = None  # [B]
    k_lengths: Any = None
    offset: Any = 0
    bottom_right: Any = None  # 1 or None


class Parts(NamedTuple):
    """What shapes the scores."""

    scale: Any
    softcap: Any = None
    left: Any = None  # None: unlimited
    right: Any = None
    mask: Any = None  # Pairs of uint8, 1: attend
    bias: Any = None  # Pairs
    relative_bias: Any = None  # Distances
    relative_q: Any = None  # Rows
    relative_k: Any = None  # DistanceRows
    slopes: Any = None  # Scalars, [B or 1, Hq]: head stride in `head`
    sinks: Any = None  # pointer, [Hq]
    blocks: Any = None  # Pairs of uint8, of blocks of `block_size`
    block_size: Any = None
    part: Any = None  # 1: of a larger attention; where in it stands behind the seed of the dropout
    base2: Any = None  # scale * log2 e, where the scores are the products times a positive scale and nothing else
    end: None = None


class Dropout(NamedTuple):
    seed: Any  # pointer, int64 [1], or [5] (`Parts.part`): `Spec` says what follows
    threshold: Any  # a random 32-bit number below it drops a weight
    scale: Any  # of the weights kept


class Incoming(NamedTuple):
    """The gradient on its way to the scores: through the output (dout and v), or of the weights themselves (dw)."""

    lse: Any  # Scalars [B, Hq, Tq]
    delta: Any  # Scalars [B, Hq, Tq], contiguous
    dout: Any = None  # Rows [B, Hq, Tq, EV]
    v: Any = None  # Rows [B, Hkv, Tk, EV]
    dw: Any = None  # Pairs
    scale: Any = None  # of dw
    end: None = None
