"""Attention of one dense mask on the CPU, called eagerly: the kernel without the op around it.

The op costs some 80 us of Python, and as much again in training; its kernel, for a short sequence, ten. What cannot be called so
(tiles, features, transforms, compiled code) goes through ``attention.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.cpu import attention as kernel
from ..reference import attention as reference
from ..reference.attention import Spec
from .attention import _plain_dtypes

_ELSEWHERE = [Spec._fields.index(name) for name in ("relative_bias", "relative_q", "slopes", "sinks", "q_lengths", "k_lengths")]
_ELSEWHERE += [Spec._fields.index(name) for name in ("cu_q", "blocks")]


def serves(q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> bool:
    """Whether the CPU's kernel takes the whole call as one tile; no gradient but those of q, k and v is wanted."""
    if q.dtype not in kernel.DTYPES or q.shape[-1] == 0:
        return False
    masked = (spec.mask is not None) + (spec.bias is not None)
    if masked > 1 or spec.left >= 0 or spec.softcap or spec.dropout or 0 in q.shape or 0 in k.shape or v.shape[-1] == 0:
        return False
    for place in _ELSEWHERE:
        if spec[place] is not None:
            return False
    if spec.right < 0:
        return True
    tq, tk = q.shape[-2], k.shape[-2]
    top_left = spec.offset + spec.right == 0 and (tq == tk or not spec.bottom_right)
    return top_left and tq <= tk and spec.scale > 0 and not masked


def attention(q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> Tensor:
    """[B, Hq, Tq, Ev], differentiable in q, k and v."""
    mask = spec.bias
    if spec.mask is not None:
        mask = torch.zeros(spec.mask.shape, dtype=kernel.state_dtype(q.dtype)).masked_fill_(~spec.mask, -torch.inf)
    elif mask is not None:
        mask = mask.to(kernel.state_dtype(q.dtype))
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(q, k, v, mask, spec.right >= 0, spec.scale)
    with _plain_dtypes(q):
        return kernel.whole(q, k, v, spec.right >= 0, mask, spec.scale)[0]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, causal, scale):
        with _plain_dtypes(q):
            out, lse = kernel.whole(q, k, v, causal, mask, scale)
        ctx.save_for_backward(q, k, v, mask, out, lse)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, mask, out, lse = ctx.saved_tensors
        with _plain_dtypes(q):
            if torch.is_grad_enabled():
                grads = _differentiable(ctx, (q, k, v), mask, dout)
            else:
                grads = [g.to(q.dtype) for g in kernel.whole_backward(dout, q, k, v, out, lse, ctx.causal, mask, ctx.scale)]
        return *grads, None, None, None


def _differentiable(ctx, inputs, mask, dout):
    """The gradients with a graph of their own (create_graph=True): through the reference."""
    wanted = ctx.needs_input_grad[:3]
    views = [t.view_as(t) if want else t for t, want in zip(inputs, wanted, strict=True)]
    spec = Spec(bias=mask, scale=ctx.scale, right=0 if ctx.causal else -1)
    out, _ = reference.forward(views[0], views[1], views[2], spec)
    grads = iter(torch.autograd.grad(out, [t for t, want in zip(views, wanted, strict=True) if want], dout, create_graph=True))
    return [next(grads) if want else None for want in wanted]
