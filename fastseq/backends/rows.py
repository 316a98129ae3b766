"""What recurrent backends on a GPU ask of a call: how its rows lie on the device, and room for results."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.recurrent import Call


def walked(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """The first row of every step of packed rows, [T]; the steps of every sequence, [B]. None where T x B rows need none."""
    if call.batch_sizes is None:
        return None, None if call.lengths is None else call.lengths.to(torch.int64).contiguous()
    sizes = call.batch_sizes
    starts = sizes.cumsum(0) - sizes
    # sequence b has a step t if batch_sizes[t] > b, and the sizes do not increase
    ends = (sizes[None, :] > torch.arange(call.batch)[:, None]).sum(1)
    # these live in pageable memory, which is read before the call returns: nothing to wait for
    return starts.to(call.rows.device, non_blocking=True), ends.to(call.rows.device, non_blocking=True)


def room(call: Call, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """One row per step and sequence; zero where rows end early, since no kernel visits what lies beyond."""
    rows = call.rows
    return (rows.new_empty if call.lengths is None else rows.new_zeros)(*shape, dtype=dtype or rows.dtype)


def state(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype).contiguous()


def fp32_precision() -> str:
    """Of products of fp32 numbers in a recurrence, as torch's own flag for cuDNN says: "tf32" or "ieee"."""
    return "tf32" if getattr(torch.backends.cudnn.rnn, "fp32_precision", "tf32") == "tf32" else "ieee"
