"""Which form of a GPU's kernels a recurrent call takes, where that was measured."""

from __future__ import annotations

import torch

from ..choice.sources import form_of
from ..ops.types import Call
from .precision import fp32_precision


def measured_form(backend: str, call: Call, backward: bool) -> str:
    """Of a backend on a GPU; "": the one that it chooses itself."""
    device = call.rows.device
    if device.type != "cuda":
        return ""
    layout = "packed" if call.batch_sizes is not None else "padded" if call.lengths is None else "lengths"
    precision = fp32_precision() if call.dtype == torch.float32 else ""
    sizes = call.lanes, call.batch, call.steps, call.hidden
    return form_of(backend, device, call.cell, call.dtype, precision, layout, *sizes, backward or call.save_c)  # type: ignore[attr-defined]
