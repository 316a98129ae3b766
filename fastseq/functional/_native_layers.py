"""Stacks of layers without gradients, each in one call of the CPU library: the way of plain eager calls.

What a caller records, transforms, lowers or looks at keeps the registered ops, which run the same kernels on the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, _C, nn
from torch.autograd import forward_ad

from .. import backends
from ..backends import library
from ..backends.cpu import recurrent as native
from ..backends.torch import recurrent as torchs

_PLAIN = frozenset((Tensor, nn.Parameter))  # a subclass has a say in what is called on it


def plain_call() -> bool:
    """Whether nobody compiles, traces, transforms, lowers or watches what runs now, nor forces another backend."""
    return not (
        torch.compiler.is_compiling()
        or _C._is_tracing()
        or _C._len_torch_dispatch_stack()
        or _C._len_torch_function_stack()
        or _C._are_functorch_transforms_active()
        or _C._is_any_autocast_enabled()
        or forward_ad._current_level >= 0
        or backends.forced() not in (None, "cpu")
        or backends.watched()
    )


def native_layers(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor] | None,
    params: Sequence[Tensor | None],
    *,
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    zoneout: tuple[float, float] = (0.0, 0.0),
) -> tuple[Tensor, ...] | None:
    """Output and final states, h_n and of a pair c_n, of a plain call (:func:`plain_call`) without gradients.

    Arguments are those of ``recurrent``; or ``input`` is ``[B, I]`` without ``batch_sizes`` and the states are ``[B, n]``: one step,
    of which the states alone are given back. None: the call is for another way, which also says what is wrong with it.
    """
    states = states or ()
    optional = [tensor for tensor in (lengths, batch_sizes) if tensor is not None]
    gradients = torch.is_grad_enabled()
    for tensor in (input, *params, *states, *optional):
        if type(tensor) not in _PLAIN or (gradients and tensor.requires_grad):
            return None
    if len(params) < 2 or input.dim() < 2 or not input.is_cpu or library.reason():
        return None
    if batch_sizes is not None:
        layout, steps, batch = "packed", len(batch_sizes), int(batch_sizes[0]) if len(batch_sizes) else 0
    elif input.dim() == 2:
        layout, steps, batch = "padded", 0, input.shape[0]
    else:
        layout = "padded" if lengths is None else "lengths"
        batch, steps = input.shape[:2] if batch_first else (input.shape[1], input.shape[0])
    if not _ours(cell, input.dtype, layout, steps, batch, 2 if bidirectional else 1, params[1]):
        return None
    h0, c0 = states if len(states) == 2 else (states[0] if states else None, None)
    arguments = (lengths, batch_sizes, cell, num_layers, has_biases, bidirectional, batch_first, *zoneout)
    return tuple(torch.ops.fastseq_native.recurrent_layers.default(input, h0, c0, params, *arguments)) or None


def _ours(cell: str, dtype: torch.dtype, layout: str, steps: int, batch: int, lanes: int, weight: Any) -> bool:
    """Whether the native kernels are the ones for such a call without gradients; steps 0: a cell's."""
    if cell not in native.CELLS or dtype not in native.DTYPES or weight.dim() != 2:
        return False
    if cell not in torchs.GATES or layout == "lengths" or not steps or backends.forced():
        return True
    hidden = weight.shape[0] // torchs.GATES[cell]
    query = backends.RecurrentQuery(
        "recurrent", weight.device, dtype, cell, steps, lanes, hidden, weight.shape[1] != hidden, layout, False, batch
    )
    return torchs.why_layers(query, False) is None
