"""What the models of `fastseq.models` stand on, made of torch alone: the other side of each comparison.

`of_torch` puts torch's modules where a model has fastseq's; within `on_torch()` the functions that these models call are those of
this file. Letters: B batch, H heads, T queries, S keys, E features of a head.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastseq
import fastseq.models


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: str = "bhsd",
    scale: float | None = None,
    causal: bool = False,
    alignment: str | None = None,
    seqlens_q: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    window_size: tuple[int | None, int | None] = (None, None),
    attn_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    relative_bias: Tensor | None = None,
    relative_bias_zero: int | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Any:
    """scaled_dot_product_attention with a mask for all that hides, and a bias for all that is added; for the lse by its parts.

    What a row of `seqlens_q` has beyond its length means nothing, and is as the rest.
    """
    if layout == "bshd":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    T, S = q.shape[2], k.shape[2]
    own = torch.arange(T, device=q.device)[:, None] + (S - T if alignment == "bottom_right" else 0)
    ahead = torch.arange(S, device=q.device) - own  # [T, S]: how far a key stands behind the query's place
    bias, hidden = attn_bias, []
    if relative_bias is not None:
        at = (ahead + (relative_bias_zero or 0)).clamp(0, relative_bias.shape[1] - 1)
        bias = relative_bias[:, at] if bias is None else bias + relative_bias[:, at]
    plain = causal and T == S and bias is None and attn_mask is None and seqlens_k is None
    if causal and not (plain and window_size == (None, None) and not return_lse):
        hidden.append(ahead > 0)
    hidden += [ahead < -before for before in window_size[:1] if before is not None]
    hidden += [ahead > after for after in window_size[1:] if after is not None]
    if seqlens_k is not None:
        hidden.append((torch.arange(S, device=q.device) >= seqlens_k[:, None])[:, None, None])
    if attn_mask is not None:
        hidden.append(~attn_mask)
    if not return_lse:
        mask = bias
        for each in hidden:
            mask = (q.new_zeros(()) if mask is None else mask).masked_fill(each, torch.finfo(q.dtype).min)
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=causal and not hidden, scale=scale)
        return y.transpose(1, 2) if layout == "bshd" else y
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if bias is None else scores + bias
    for each in hidden:
        scores = scores.masked_fill(each, -torch.inf)
    nothing = scores.isneginf().all(-1, keepdim=True)
    scores = scores.masked_fill(nothing, 0)
    weights, lse = scores.softmax(-1).masked_fill(nothing, 0), scores.logsumexp(-1, keepdim=True)
    y = F.dropout(weights, dropout_p) @ v
    return (y.transpose(1, 2) if layout == "bshd" else y), lse.masked_fill(nothing, -torch.inf)[..., 0]


def merge_attention(y: Tensor, lse: Tensor, other: Tensor, of_other: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the keys of both, from [.., T, E] and lse [.., T] of each."""
    both = torch.logaddexp(lse, of_other)
    whole = both.masked_fill(both.isneginf(), 0)
    return y * (lse - whole).exp()[..., None] + other * (of_other - whole).exp()[..., None], both


def transformer_xl_attention(
    query: Tensor, key: Tensor, value: Tensor, r: Tensor, u: Tensor, v: Tensor, *,
    layout: str, window_size: tuple[int | None, int | None], dropout_p: float
) -> Tensor:  # fmt: skip
    """Of query [B, T, H, E] and key [B, S, H, E] with r [H, S, E] from the farthest distance to 0, shifted as the authors do."""
    q, T, S = query.transpose(1, 2), query.shape[1], key.shape[1]
    by_distance = (q + v[:, None]) @ r.mT * q.shape[-1] ** -0.5  # [B, H, T, S]
    shifted = F.pad(by_distance, (1, 0)).unflatten(2, (T,)).reshape(*q.shape[:2], S + 1, T)[:, :, 1:].reshape(by_distance.shape)
    more: Any = {"causal": True, "alignment": "bottom_right", "window_size": window_size, "dropout_p": dropout_p}
    return attention(query + u, key, value, layout=layout, attn_bias=shifted, **more)


class WithLengths(nn.Module):
    """torch.nn's LSTM, GRU or RNN, batch first; rows of different lengths are packed."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor, hx: Any = None, lengths: Tensor | None = None) -> tuple[Tensor, Any]:
        hx = tuple(t.contiguous() for t in hx) if isinstance(hx, tuple) else hx if hx is None else hx.contiguous()
        if lengths is None:
            return self.rnn(x, hx)
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        y, last = self.rnn(packed, hx)
        return pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])[0], last


class MinGRU(nn.Module):
    """One layer of fastseq's, whose parameters it keeps, step by step; batch first."""

    def __init__(self, layer: fastseq.MinGRU) -> None:
        super().__init__()
        self.weight_ih_l0, self.bias_ih_l0 = layer.weight_ih_l0, layer.bias_ih_l0

    def forward(self, x: Tensor, hx: Tensor | None = None, lengths: None = None, resets: None = None) -> tuple[Tensor, Tensor]:
        gate, candidate = F.linear(x, self.weight_ih_l0, self.bias_ih_l0).chunk(2, -1)
        z, g = gate.sigmoid(), torch.where(candidate >= 0, candidate + 0.5, candidate.sigmoid())
        h, outputs = x.new_zeros(len(x), z.shape[-1]) if hx is None else hx[0], []
        for t in range(x.shape[1]):
            h = torch.lerp(h, g[:, t], z[:, t])
            outputs.append(h)
        return torch.stack(outputs, 1), h[None]


def of_torch(model: nn.Module) -> nn.Module:
    """The model itself, with torch's modules in the place of fastseq's and the parameters that it had."""
    recurrent = [module for module in model.modules() if isinstance(module, (fastseq.LSTM, fastseq.GRU, fastseq.RNN))]
    fastseq.revert(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in recurrent or isinstance(child, fastseq.MinGRU):
                setattr(parent, name, WithLengths(child) if child in recurrent else MinGRU(child))
    return model


@contextmanager
def on_torch() -> Iterator[None]:
    """Within it the models of `fastseq.models` call torch where they call fastseq."""
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            for function in (attention, merge_attention, transformer_xl_attention):
                if name.startswith("fastseq.models.") and hasattr(module, function.__name__):
                    stack.enter_context(mock.patch.object(module, function.__name__, function))
        yield
