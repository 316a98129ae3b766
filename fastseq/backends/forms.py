"""Which form of a GPU's kernels a recurrent call takes, where that was measured."""

from __future__ import annotations

import torch

from ..choice.sources import form_of
from ..ops.types import Call
from .precision import fp32_precision
from .query import RecurrentQuery


def measured_form(backend: str, call: Call, backward: bool) -> str:
    """Of a backend on a GPU; "": the one that it chooses itself."""
    layout = "packed" if call.batch_sizes is not None else "padded" if call.lengths is None else "lengths"
    sizes = call.lanes, call.batch, call.steps, call.hidden
    return _form(backend, call.rows.device, call.cell, call.dtype, layout, sizes, backward or call.save_c)  # type: ignore[attr-defined]


def form_of_query(backend: str, query: RecurrentQuery, backward: bool) -> str:
    """The same of a query, or of the backward pass that follows it."""
    sizes = query.lanes, query.batch, query.steps, query.hidden
    return _form(backend, query.device, query.cell, query.dtype, query.layout, sizes, backward or query.saving)


def _form(
    backend: str, device: torch.device, cell: str, dtype: torch.dtype, layout: str, sizes: tuple[int, ...], gradients: bool
) -> str:
    if device.type != "cuda":
        return ""
    precision = fp32_precision() if dtype == torch.float32 else ""
    lanes, batch, steps, hidden = sizes
    return form_of(backend, device, cell, dtype, precision, layout, lanes, batch, steps, hidden, gradients)
