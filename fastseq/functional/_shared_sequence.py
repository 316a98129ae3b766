"""What a module asks that is not made of attention and recurrence alone, as a rank may hold but a part of its sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import checked_int, own_keywords
from ..ops._dispatch import shared_sequence

__all__ = ["require_whole_sequence", "sequence_places"]


@own_keywords
def sequence_places(steps: int, *, device: torch.device | str | None = None) -> tuple[Tensor, int]:
    """Where the steps of a call stand in their sequence, int64 ``[steps]``, and T, the length of the whole.

    That is 0 .. steps - 1 and ``steps``, unless inside ``fastseq.distributed.context_parallel``: there a rank holds a part, all
    ranks ask together, and each is told the places of its own steps. For embeddings and rotations of places, and for masks by
    ``lengths``.

    Args:
        steps: of this call.
        device: of the places; None: torch's default.

    Raises:
        TypeError: if ``steps`` is no int.
        ValueError: if it is negative.
        RuntimeError: inside the block, on every rank, if the ranks' steps are not those of its sharding.
    """
    if checked_int("steps", steps) < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    shared = shared_sequence()
    if shared is not None:
        return shared.places(steps, device)
    return torch.arange(steps, device=device), steps


def require_whole_sequence(what: str) -> None:
    """Raise inside ``fastseq.distributed.context_parallel``, where a rank holds a part of a sequence: for what mixes steps in a
    way of its own, by a convolution or a loop, and would silently be wrong there. Outside it does nothing.

    Args:
        what: needs whole sequences, for the message.

    Raises:
        RuntimeError: inside such a block.
    """
    if shared_sequence() is not None:
        raise RuntimeError(f"{what} needs whole sequences, so it does not run inside fastseq.distributed.context_parallel")
