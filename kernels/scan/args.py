"""The arguments of the scan kernels, grouped. Strides are in elements; letters as in ``fastseq.reference.scan``.

A tuple ends with a None: the compiled kernel loses fields equal to 1 at the end of a group. Such a tuple is there
in any case, with None for a pointer that is not, as Triton 3.6 cannot ask whether it is None itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Rows(NamedTuple):
    """[T, B, C] with the numbers of a channel behind it, contiguous; 0 where a dimension is broadcast."""

    pointer: Any
    step: Any
    row: Any
    channel: Any  # 1, or 0: one coefficient for all channels
    end: Any = None


class Layout(NamedTuple):
    """Where the rows lie, and where they begin anew."""

    T: Any
    rows: Any
    C: Any
    lengths: Any  # int32 [B], or None
    starts: Any  # int32 [S + 1] of packed sequences, or None
    resets: Any  # uint8 [T, B] at strides, or None
    reset_step: Any
    reset_row: Any
    end: Any = None


class Totals(NamedTuple):
    """What the chunks of every row make of the state that they are given: [rows, chunks, ..], a C of each number."""

    product: Any  # wide [rows, chunks, M, C]
    state: Any  # wide [rows, chunks, N, C]
    cut: Any  # int32 [rows, chunks]: nothing of it
    end: Any = None
