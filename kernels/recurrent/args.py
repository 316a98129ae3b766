"""The arguments of the recurrent kernels, grouped. Letters as in ``fastseq.reference.recurrent``: T time, B batch, D lanes."""

from __future__ import annotations

from typing import Any, NamedTuple


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
    """Where a state keeps its old value in a step; None: nowhere, or in the proportion that the kernel is compiled with."""

    mask_h: Any  # uint8, rows of P
    mask_c: Any  # uint8, rows of H
    end: Any = None


class Resets(NamedTuple):
    """Where sequences begin anew, from which states, and what these get of the gradients; None: nowhere, from zeros, nothing."""

    rows: Any  # uint8, a number for each row: the state before it in time is another sequence's
    h: Any  # [D, B, P]
    c: Any  # [D, B, K*H], wide
    dh: Any = None  # [D, B, P], wide: added to
    dc: Any = None  # [D, B, K*H], wide: added to
    end: Any = None


class Cell(NamedTuple):
    """The mathematics of a cell, as jitted functions, and what its backward step reads beside saved activations and c."""

    step: Any
    step_backward: Any
    candidate: Any = None  # c as a step proposed it, which zoneout needs
    reads: str = ""  # "h": the output, "h_prev": the output before
