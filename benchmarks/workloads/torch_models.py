"""fastseq.models with torch's parts in place of fastseq's: the same source, loaded once more, with other layers and functions.

What stands here is what a PyTorch user calls for each of them: nn.LSTM, nn.GRU, nn.LSTMCell, scaled_dot_product_attention in the
form that is fastest for a call (its causal flag, a slice of the cache, masks and buckets that are made once, blocks in place of a
band as wide as the sequence), scores in memory where more than the output is asked for. `merge_attention` is plain PyTorch and
stays. `copies` are classes of their own; `on_parts` changes a model that is there.

Letters: B batch, H heads, T queries, S keys, E features of a head.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastseq
import fastseq.models

from .attention_textbook import BUCKETS, MAX_DISTANCE, shifted, t5_buckets

NAME = f"{__name__}.copies"


def _with_lengths(cls: Any) -> Any:
    """nn.LSTM and its kin, with the argument that fastseq's have: rows that end early are packed."""

    class Layer(cls):
        def forward(self, input: Tensor, hx: Any = None, lengths: Tensor | None = None) -> tuple[Tensor, Any]:
            if lengths is None:
                return super().forward(input, hx)
            packed = pack_padded_sequence(input, lengths.cpu(), self.batch_first, enforce_sorted=False)
            y, after = super().forward(packed, hx)
            steps = input.shape[1 if self.batch_first else 0]
            return pad_packed_sequence(y, self.batch_first, total_length=steps)[0], after

    Layer.__name__ = cls.__name__
    return Layer


class MinGRU(nn.Module):
    """minGRU step by step: on a CPU sooner done than its closed form in logarithms, which in fp32 is wrong in the third digit."""

    def __init__(self, input_size: int, hidden_size: int, *, batch_first: bool = True) -> None:
        super().__init__()
        bound = hidden_size**-0.5
        self.weight_ih_l0 = nn.Parameter(torch.empty(2 * hidden_size, input_size).uniform_(-bound, bound))
        self.bias_ih_l0 = nn.Parameter(torch.empty(2 * hidden_size).uniform_(-bound, bound))

    def forward(self, x: Tensor, state: Tensor | None = None, *, lengths: None = None, resets: None = None) -> Any:
        """x [B, T, I], state [1, B, H]: [B, T, H] and the last state."""
        z, v = F.linear(x, self.weight_ih_l0, self.bias_ih_l0).chunk(2, -1)
        z, v, outputs = z.sigmoid(), torch.where(v >= 0, v + 0.5, v.sigmoid()), []
        h = torch.zeros_like(v[:, 0]) if state is None else state[0]
        for part, new in zip(z.unbind(1), v.unbind(1), strict=True):
            h = torch.lerp(h, new, part)
            outputs.append(h)
        return torch.stack(outputs, 1), h[None]


class ByDistance:
    """T5's bias, [H, T, S] once for all layers of a stack."""

    def __init__(self, table: Tensor, bidirectional: bool) -> None:
        self.table, self.bidirectional = table, bidirectional
        self.found: dict[tuple[int, int], Tensor] = {}

    def over(self, T: int, S: int) -> Tensor:
        """[H, T, S], the last query at the last key."""
        if (T, S) not in self.found:
            rows = _buckets(S, self.table.device, self.bidirectional)[S - T :]
            self.found[T, S] = F.embedding(rows, self.table).permute(2, 0, 1)
        return self.found[T, S]


@lru_cache(maxsize=8)
def _buckets(S: int, device: torch.device, bidirectional: bool) -> Tensor:
    with torch.inference_mode(False):
        return t5_buckets(S, S, device, bidirectional=bidirectional)


def t5_relative_bias(
    table: Tensor, query_length: int, key_length: int, *, bidirectional: bool = True, num_buckets: int, max_distance: int
) -> tuple[ByDistance, int]:
    if (num_buckets, max_distance) != (BUCKETS, MAX_DISTANCE):
        raise ValueError(f"buckets are {BUCKETS}, up to {MAX_DISTANCE}, got {num_buckets} and {max_distance}")
    return ByDistance(table, bidirectional), 0


@lru_cache(maxsize=32)
def _seen(T: int, S: int, left: int | None, device: torch.device) -> Tensor:
    """[T, S] of bool: keys up to the query's own place, `left` before it at most, the last query at the last key."""
    with torch.inference_mode(False):  # training will ask for it too
        i, j = torch.arange(S - T, S, device=device)[:, None], torch.arange(S, device=device)
        return j <= i if left is None else (j <= i) & (j >= i - left)


def _same(lengths: Tensor) -> int | None:
    """The length of all rows, if it is one and known without waiting for a device."""
    if lengths.device.type != "cpu":
        return None
    each = set(lengths.tolist())
    return each.pop() if len(each) == 1 else None


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None, rate: float) -> Tensor:
    if k.shape[1] != q.shape[1]:
        k, v = (t.expand(-1, q.shape[1], -1, -1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, rate, causal, scale=scale)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, layout: str = "bhsd", scale: float | None = None, causal: bool = False,
    alignment: str | None = None, seqlens_q: Tensor | None = None, seqlens_k: Tensor | None = None,
    relative_bias: ByDistance | None = None, relative_bias_zero: int | None = None,
    attn_mask: Tensor | None = None, attn_bias: Tensor | None = None, window_size: tuple[int, int] | None = None,
    dropout_p: float = 0.0, return_lse: bool = False
) -> Any:  # fmt: skip
    """What the models ask of fastseq.functional.attention; what a query beyond its row's end gives means nothing."""
    if layout == "bshd":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if window_size is not None:
        return _in_window(q, k, v, window_size[0], attn_mask, seqlens_k, dropout_p, return_lse)
    mask, T = attn_mask, q.shape[2]
    if seqlens_k is not None:
        length = _same(seqlens_k)
        if length is None:
            valid = (torch.arange(k.shape[2], device=k.device) < seqlens_k[:, None])[:, None, None]
            mask = valid if mask is None else mask & valid
        else:
            k, v = k[:, :, :length], v[:, :, :length]
            mask = mask if mask is None or mask.shape[-1] == 1 else mask[..., :length]
            attn_bias = None if attn_bias is None else attn_bias[..., :length]
    S = k.shape[2]
    if causal and T > 1 and (T != S or relative_bias is not None or mask is not None):
        mask = _seen(T, S, None, q.device) if mask is None else mask & _seen(T, S, None, q.device)
        causal = False
    if attn_bias is not None:  # scores that another layer made
        scores = attn_bias if mask is None else attn_bias.masked_fill(~mask, -math.inf)
        y = F.dropout(scores.softmax(-1), dropout_p) @ v
    elif return_lse:
        return _with_lse(q, k, v, scale, mask, dropout_p)
    else:
        if relative_bias is not None:
            bias = _shifted_bias(relative_bias, T, S, seqlens_k if mask is not None and alignment else None)
            mask = bias if mask is None else torch.where(mask, bias, -math.inf)
        y = _sdpa(q, k, v, mask, causal and T > 1, scale, dropout_p)
    return y.transpose(1, 2) if layout == "bshd" else y


def _shifted_bias(relative: ByDistance, T: int, S: int, lengths: Tensor | None) -> Tensor:
    """[1, H, T, S], or where rows end at different lengths and the query stands at each one's end, [B, H, 1, S]."""
    bias = relative.over(T, S)
    if lengths is None:
        return bias[None]
    places = (torch.arange(S, device=bias.device) - lengths[:, None] + S).clamp(max=S - 1)
    return bias[:, 0, places].transpose(0, 1)[:, :, None]


def _with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None, rate: float) -> tuple[Tensor, Tensor]:
    """The output and the logarithm of the sum of the scores' exponentials, -inf where nothing is seen."""
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.mT
    if mask is None:
        return F.dropout(scores.softmax(-1), rate) @ v, scores.logsumexp(-1)
    least = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, least)
    lse = scores.logsumexp(-1)
    return F.dropout(scores.softmax(-1), rate) @ v, lse.masked_fill(lse < least / 2, -math.inf)


def _in_window(
    q: Tensor, k: Tensor, v: Tensor, half: int, mask: Tensor | None, lengths: Tensor | None, rate: float, return_lse: bool
) -> Any:
    """`half` keys on each side, [B, H, T, E]: blocks of as many queries against their own keys and those of both neighbors."""
    (B, H, T, _), device = q.shape, q.device
    count = -(-T // half)
    pad = count * half - T
    q = F.pad(q, (0, 0, 0, pad)).unflatten(2, (count, half))
    k, v = (F.pad(t, (0, 0, half, pad + half)).unfold(2, 3 * half, half).mT for t in (k, v))  # [B, H, count, 3 half, E]
    valid = _blocks(T, half, device)  # [count, half, 3 half]
    if lengths is not None:
        ends = (torch.arange(T, device=device) < lengths[:, None])[:, None, None]
        mask = ends if mask is None else mask & ends
    if mask is not None:
        of_keys = F.pad(mask.expand(-1, 1, 1, T), (half, pad + half)).unfold(-1, 3 * half, half)  # [B, 1, 1, count, 3 half]
        valid = valid & of_keys.transpose(2, 3)
    if return_lse:
        y, lse = _with_lse(q, k, v, None, valid, rate)
        return y.flatten(2, 3)[:, :, :T], lse.flatten(2, 3)[:, :, :T]
    valid = valid.expand(B, H, -1, -1, -1).flatten(1, 2) if valid.dim() == 5 else valid.repeat(H, 1, 1)
    y = F.scaled_dot_product_attention(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), valid, rate)
    return y.unflatten(1, (H, count)).flatten(2, 3)[:, :, :T]


@lru_cache(maxsize=8)
def _blocks(T: int, half: int, device: torch.device) -> Tensor:
    """[count, half, 3 half] of bool: which keys of its blocks a query sees."""
    with torch.inference_mode(False):
        i, j = torch.arange(half, device=device)[:, None], torch.arange(-half, 2 * half, device=device)
        key = torch.arange(-(-T // half), device=device)[:, None] * half + j
        return ((j - i).abs() <= half) & ((key >= 0) & (key < T))[:, None]


def attention_with_kv_cache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, k_new: Tensor, v_new: Tensor, layout: str,
    scale: float | None = None
) -> Tensor:  # fmt: skip
    """New keys and values joined to the cache [B, S, H, E], and attention to all so far, causal."""
    T, past = q.shape[1], _same(cache_seqlens)
    if past is not None:
        k_cache[:, past : past + T], v_cache[:, past : past + T] = k_new, v_new
        keys, values = k_cache[:, : past + T], v_cache[:, : past + T]
        return attention(q, keys, values, layout=layout, scale=scale, causal=True, alignment="bottom_right")
    places = cache_seqlens[:, None].long() + torch.arange(T, device=q.device)  # [B, T]
    at = places[..., None, None].expand_as(k_new)
    k_cache.scatter_(1, at, k_new)
    v_cache.scatter_(1, at, v_new)
    seen = torch.arange(k_cache.shape[1], device=q.device) <= places[..., None]  # [B, T, S]
    q, k, v = (t.transpose(1, 2) for t in (q, k_cache, v_cache))
    return _sdpa(q, k, v, seen[:, None], False, scale, 0.0).transpose(1, 2)


def transformer_xl_attention(
    query: Tensor, key: Tensor, value: Tensor, r: Tensor, u: Tensor, v: Tensor, *, layout: str,
    window_size: tuple[int | None, int | None], dropout_p: float = 0.0
) -> Tensor:  # fmt: skip
    """As the authors have it: the term over distances by a product and a shift, which joins the scores."""
    q, k, value = (t.transpose(1, 2) for t in (query, key, value))
    T, S = q.shape[2], k.shape[2]
    bias = shifted((q + v[:, None]) @ r.mT) * q.shape[-1] ** -0.5
    if T > 1 or (window_size[0] is not None and window_size[0] < S - 1):
        bias = torch.where(_seen(T, S, window_size[0], q.device), bias, -math.inf)
    return _sdpa(q + u[:, None], k, value, bias, False, None, dropout_p).transpose(1, 2)


PARTS: dict[Any, Any] = {
    fastseq.LSTM: _with_lengths(nn.LSTM),
    fastseq.GRU: _with_lengths(nn.GRU),
    fastseq.RNN: _with_lengths(nn.RNN),
    fastseq.LSTMCell: nn.LSTMCell,
    fastseq.MinGRU: MinGRU,
    fastseq.functional.attention: attention,
    fastseq.functional.attention_with_kv_cache: attention_with_kv_cache,
    fastseq.functional.transformer_xl_attention: transformer_xl_attention,
    fastseq.functional.t5_relative_bias: t5_relative_bias,
}


@lru_cache(maxsize=1)
def copies() -> ModuleType:
    """The package fastseq.models on these parts: other classes, of the same names and parameters."""
    original = fastseq.models
    spec = importlib.util.spec_from_file_location(NAME, original.__file__, submodule_search_locations=list(original.__path__))
    assert spec and spec.loader
    package = sys.modules[NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{NAME}."):
            names = vars(module)
            for table in (names, *(value for key, value in names.items() if key.isupper() and isinstance(value, dict))):
                table.update({key: PARTS[value] for key, value in table.items() if callable(value) and value in PARTS})
    return package


def on_parts(model: nn.Module) -> nn.Module:
    """The model itself, with the parameters that it has: its modules of fastseq's are now those of `copies` and PARTS."""
    own, here = f"{fastseq.models.__name__}.", copies().__name__
    for module in model.modules():
        kind = type(module)
        if kind in PARTS:
            module.__class__ = PARTS[kind]
        elif kind.__module__.startswith(own):
            module.__class__ = getattr(sys.modules[f"{here}.{kind.__module__.removeprefix(own)}"], kind.__qualname__)
    return model
