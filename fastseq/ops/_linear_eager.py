"""Projections with gradients, of plain eager calls on the CPU: by the library's products where these are the faster ones."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import is_batched, lean

_DTYPES = (torch.float32, torch.bfloat16)
# What the library declines, known before it is asked: inputs of fewer elements, and of float32 fewer multiply-adds.
_LEAST, _LEAST_WORK = 96 * 64, 1 << 24

_native: Any = None  # the library's ops
_native_backward: Any = None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``torch.nn.functional.linear`` of a plain call (``plain_call``) of plain tensors on the CPU, the library being loaded."""
    dtype, size = x.dtype, x.numel()
    if dtype in _DTYPES and size >= _LEAST and (dtype is torch.bfloat16 or size * weight.shape[0] >= _LEAST_WORK):
        out = _linear(x, weight, bias)
        if out is not None:
            return out
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    """None: the library declines it."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        global _native
        if _native is None:
            _native = torch.ops.fastseq_native.linear.default._op
        results = _native(x, weight, bias)
        if not results:
            return None
        ctx.save_for_backward(x, weight)
        return results[0]

    @staticmethod
    def backward(ctx, dout):
        global _native_backward
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(dout):  # with a graph of its own (create_graph=True), or many at once
            rows = dout.reshape(-1, dout.shape[-1])  # of which batches have a rule
            dx, dweight, dbias = dout @ weight, rows.t() @ x.flatten(0, -2), rows.sum(0)
        else:
            if _native_backward is None:
                _native_backward = torch.ops.fastseq_native.linear_backward.default._op
            dx, dweight, dbias = _native_backward(dout, x, weight, ctx.needs_input_grad)
        return tuple([grad if wanted else None for grad, wanted in zip((dx, dweight, dbias), ctx.needs_input_grad, strict=True)])


_linear = lean(_Linear)
