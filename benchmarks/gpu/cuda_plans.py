"""The CUDA kernels of the recurrence on another plan than the one that the model finds best: to try each, and to time it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastseq.backends.cuda import recurrent
from fastseq.backends.cuda.plan import Device, plan_of


def forms(cell: str, precision: str, backward: bool, batch: int, lanes: int, hidden: int, device: Device) -> dict[str, int]:
    """Ranks of the best plans of every form that a device allows, by words: "flags, wide, batch tiles". None if nothing fits."""
    sizes = (cell, precision, backward, batch, lanes, hidden, device)
    found: dict[str, int] = {}
    best = plan_of(*sizes)
    for rank in range(0 if best.obstacle else best.of):
        found.setdefault(plan_of(*sizes, rank).numbers.form, rank)
    return found


@contextmanager
def ranked(forward: int = 0, backward: int = 0) -> Iterator[None]:
    """Inside, the kernels run on the plans of these ranks: 0 is the best by the model.

    Raises:
        RuntimeError: from a call that has fewer plans (`Plan.of` says how many).
    """
    before, recurrent.RANKS = recurrent.RANKS, (forward, backward)
    try:
        yield
    finally:
        recurrent.RANKS = before
