"""Stacks of layers that torch's own kernel runs: short calls, dtypes that no kernel of ours has, graphs of torch's ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends
from ..backends.torch import recurrent as torchs
from ..ops._dispatch import recorded, transforming
from ._native_layers import query_of
from ._recording import recorder


def torch_layers(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor] | None,
    params: Sequence[Tensor | None],
    *,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """Output and final states, if torch's kernel is the one to run this call, else None: it is for our op.

    Arguments are those of ``recurrent``, checked, of a call without what torch lacks. ``recompute`` is for our op in training:
    torch's kernels keep what their backward needs; without gradients there is nothing to keep.
    """
    record = recorder()
    if record is None and recorded():
        return None
    weights = [tensor for tensor in params if tensor is not None]
    if cell not in torchs.GATES or len(weights) < len(params):
        return None
    given = [input, *(states or ()), *weights]
    if record is None:
        if transforming() or backends.forced() not in (None, backends.torch.name):
            return None
        query = query_of(cell, input, weights[1], bidirectional, batch_first, None, batch_sizes)
        training_step = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
        why = None
        if backends.forced() is None:
            # cuDNN has a backward only of what ran in training mode
            if training_step and (recompute or (input.device.type == "cuda" and not training)):
                return None
            why = backends.torch_takes(query, training_step)
        if not backends.torch_runs(lambda: query, why):
            return None
    return torchs.layers(
        cell,
        input,
        states,
        weights,
        has_biases=has_biases,
        num_layers=num_layers,
        dropout=dropout,
        training=training,
        bidirectional=bidirectional,
        batch_first=batch_first,
        batch_sizes=batch_sizes,
    )
