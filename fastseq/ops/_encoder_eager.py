"""Layers of an encoder with gradients or dropout, of plain eager calls on the CPU: one call of the library at either pass.

Their dropouts draw one seed a call from torch's generator; what is dropped is told by its place, so that no mask is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import attention as reference
from ._dispatch import is_batched, lean
from .attention import _plain_dtypes
from .types import Spec

_native: Any = None  # the library's ops
_native_backward: Any = None


class Layer(NamedTuple):
    """What a layer is, beside its parameters, and what of a call has no gradient."""

    heads: int
    gelu: bool
    norm_first: bool
    eps: float
    mask: Tensor | None
    padding: Tensor | None
    batch_first: bool
    causal: bool
    dropouts: Sequence[float]  # of the attention's weights, dropout1, dropout, dropout2, each below 1; empty: none
    seed: Tensor | None  # int64 [2], of dropouts


def encoder_layer(
    src: Tensor, parameters: Sequence[Tensor], layer: Layer, gradients: bool, meaning: Callable[[], Spec]
) -> Tensor | None:
    """The output of ``nn.TransformerEncoderLayer`` with biases; None: the call is for another way.

    Args:
        src: in memory as it is told.
        parameters: of in_proj, out_proj, norm1, norm2, linear1 and linear2, of each weight and bias.
        layer: its dropouts are to be drawn.
        gradients: whether some are wanted.
        meaning: the masks as a ``Spec``, for derivatives of a kind that the library has not.
    """
    global _native, _native_backward
    if _native is None:
        ops = torch.ops.fastseq_native
        _native, _native_backward = (
            op.default._op for op in (ops.transformer_encoder_layer, ops.transformer_encoder_layer_backward)
        )
    before = None
    if gradients or layer.dropouts:
        src = src.contiguous()
    if layer.dropouts:  # whoever runs what is declined draws its own, which has to be that of a call that was not asked for here
        before, seed = torch.get_rng_state(), torch.randint(2**63 - 1, (2,), dtype=torch.int64)
        layer = layer._replace(seed=seed)
    out: Tensor | None
    if gradients:
        out = _layer(src, layer, meaning, *parameters)
    else:
        results = _native(src, parameters, *layer, False)
        out = results[0] if results else None
    if out is None and before is not None:
        torch.set_rng_state(before)
    return out


class _Layer(torch.autograd.Function):
    """None: the library declines it."""

    @staticmethod
    def forward(ctx, src, layer, meaning, *parameters):
        results = _native(src, parameters, *layer, True)
        if not results:
            return None
        out, *saved = results
        ctx.save_for_backward(src, layer.mask, layer.padding, layer.seed, *parameters, *saved)
        ctx.layer, ctx.meaning = layer._replace(mask=None, padding=None, seed=None), meaning
        return out

    @staticmethod
    def backward(ctx, dout):
        src, mask, padding, seed, *rest = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:1] + ctx.needs_input_grad[3:]
        parameters, saved = rest[: len(wanted) - 1], rest[len(wanted) - 1 :]
        layer = ctx.layer._replace(mask=mask, padding=padding, seed=seed)
        if torch.is_grad_enabled() or is_batched(dout):
            grads = _composed_gradients([src, *parameters], layer, ctx.meaning, dout, wanted)
        else:
            grads = _native_backward(dout, saved, src, parameters, *layer, wanted)
        dsrc, *of_parameters = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
        return dsrc, None, None, *of_parameters


_layer = lean(_Layer)


def _composed_gradients(
    tensors: list[Tensor], layer: Layer, meaning: Callable[[], Spec], dout: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """With a graph of their own (create_graph=True), or many at once (is_grads_batched=True)."""
    further = torch.is_grad_enabled()
    with _plain_dtypes(tensors[0]), torch.enable_grad():
        views = [t.view_as(t) if want else t.detach() for t, want in zip(tensors, wanted, strict=True)]
        used = [t for t, want in zip(views, wanted, strict=True) if want]
        found = iter(torch.autograd.grad(composed(*views, layer=layer, meaning=meaning), used, dout, create_graph=further))
    return [next(found) if want else None for want in wanted]


def composed(src: Tensor, *parameters: Tensor, layer: Layer, meaning: Callable[[], Spec]) -> Tensor:
    """The same by functions of PyTorch and the reference's attention."""
    in_weight, in_bias, out_weight, out_bias, *of_norms, weight1, bias1, weight2, bias2 = parameters
    E = src.shape[-1]

    def attention(x: Tensor) -> Tensor:
        batch = x if x.dim() == 3 else x.unsqueeze(0 if layer.batch_first else 1)
        parts = F.linear(batch, in_weight, in_bias).unflatten(-1, (3, layer.heads, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4) if layer.batch_first else parts.permute(2, 1, 3, 0, 4)
        spec = meaning()
        if layer.seed is not None and layer.dropouts[0]:
            spec = spec._replace(dropout=layer.dropouts[0], seed=layer.seed[:1])
        out, _ = reference.forward(q, k, v, spec)
        out = (out.transpose(1, 2) if layer.batch_first else out.permute(2, 0, 1, 3)).flatten(-2)
        return F.linear(out.reshape(x.shape), out_weight, out_bias)

    def feed_forward(x: Tensor) -> Tensor:
        before = F.linear(x, weight1, bias1)
        return F.linear(_dropped(F.gelu(before) if layer.gelu else F.relu(before), 2, layer), weight2, bias2)

    def norm(which: int, x: Tensor) -> Tensor:
        return F.layer_norm(x, (E,), of_norms[2 * which], of_norms[2 * which + 1], layer.eps)

    if layer.norm_first:
        x = src + _dropped(attention(norm(0, src)), 1, layer)
        return x + _dropped(feed_forward(norm(1, x)), 3, layer)
    x = norm(0, src + _dropped(attention(src), 1, layer))
    return norm(1, x + _dropped(feed_forward(x), 3, layer))


def _dropped(x: Tensor, which: int, layer: Layer) -> Tensor:
    """What is left of x by the dropout that stands there in ``layer.dropouts``: ``Dropout`` of csrc/cpu/layer_norm.h."""
    if layer.seed is None or not layer.dropouts[which]:
        return x
    probability, features = layer.dropouts[which], x.shape[-1]
    row, e = torch.arange(x.numel() // features)[:, None], torch.arange(features)
    numbers = torch.stack(reference.philox(layer.seed[1], e // 64 * 16 + e % 16, row, torch.tensor(which)), -1)
    number = numbers.gather(-1, (e // 16 % 4).expand(numbers.shape[:-1])[..., None]).view(x.shape)
    return torch.where(number >= reference.dropout_threshold(probability), x * (1 / (1 - probability)), 0)
