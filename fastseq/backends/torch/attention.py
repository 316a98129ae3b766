"""Attention as torch's own modules have it: products, softmax and dropout, each over all scores at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...reference import attention as reference
from ...reference.attention import Group, Spec
from ..query import AttentionQuery

_FUSED = frozenset(("mask", "bias", "dropout", "bottom_right"))
_MOST_FEATURES = 256  # of a head, in flash attention
_LANES = 16  # of a vector of 64 bytes in fp32


def lacks(q: Tensor, k: Tensor, spec: Spec) -> str:
    """What of a call torch's attention does not have, in words; empty: nothing."""
    given = {
        "relative keys": spec.relative_q is not None,
        "sinks": spec.sinks is not None,
        "packed sequences": spec.cu_q is not None,
        "lengths": spec.q_lengths is not None or spec.k_lengths is not None,
        "softcap": spec.softcap != 0,
        "complex numbers": q.is_complex(),
        f"{q.dtype} beside a bias of another dtype": spec.bias is not None and spec.bias.dtype != q.dtype,
        "queries or keys of size 0": 0 in q.shape or 0 in k.shape,
    }
    return ", ".join(name for name, has in given.items() if has)


def serves(query: AttentionQuery) -> bool:
    """Whether torch has such attention. A window and what follows from distances become masks and biases."""
    dense = frozenset(("mask", "bias", "dropout", "bottom_right", "slopes", "relative_bias", "blocks", "weights"))
    return query.op == "attention" and query.call == "forward" and query.layout == "padded" and dense.issuperset(query.uses)


def fuses(query: AttentionQuery) -> bool:
    """Whether ``F.scaled_dot_product_attention`` has one kernel for such a call, as far as its sizes tell."""
    q = query
    if q.op != "attention" or not q.call.startswith(("forward", "backward")) or q.layout != "padded" or q.offset:
        return False
    square, masked = q.lengths[0] == q.lengths[1], "mask" in q.uses or "bias" in q.uses
    causal = q.window == (-1, 0)
    if not _FUSED.issuperset(q.uses) or not (causal or q.window == (-1, -1)) or ("bottom_right" in q.uses and not square):
        return False
    if (causal and masked) or {"mask", "bias"} <= set(q.uses) or 0 in (*q.lengths, *q.features):
        return False
    grouped = q.heads[0] != q.heads[1]
    if q.device.type != "cuda":
        return "dropout" not in q.uses
    if q.dtype == torch.float64:
        return False
    half = q.dtype in (torch.float16, torch.bfloat16)
    flash = half and not masked and q.features[0] == q.features[1] <= _MOST_FEATURES
    return flash or not grouped  # the memory-efficient kernel takes all else, but not fewer heads of keys


def fused_is_right(keys: int, causal: bool, scale: float | None) -> bool:
    """Whether torch's fused kernel on a CPU gives what the formula does. Of fewer keys than a vector has lanes it loses NaN, and
    causal it gives NaN for scales that are not positive."""
    return keys >= _LANES and not (causal and scale is not None and scale <= 0)


def attention(q: Tensor, k: Tensor, v: Tensor, spec: Spec, recorded: bool = False, chosen: bool = False) -> Tensor:
    """[B, Hq, Tq, Ev]: ``F.scaled_dot_product_attention``, which draws its dropout as the unconverted model does.

    Without dropout its products and softmax, unless it is ``recorded``, or ``chosen`` for its speed where `fused_is_right`.
    """
    causal, mask = _mask(q, k, spec)
    grouped = bool(q.shape[1] != k.shape[1])  # while torch.jit traces, sizes are tensors
    fused = chosen and (not q.is_cpu or fused_is_right(k.shape[2], causal, spec.scale))
    if spec.dropout or recorded or fused:
        return F.scaled_dot_product_attention(q, k, v, mask, spec.dropout, causal, scale=spec.scale, enable_gqa=grouped)
    if mask is not None and mask.dtype == torch.bool:  # what follows adds the mask that it is given
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -torch.inf)
    return torch._scaled_dot_product_attention_math(q, k, v, mask, 0.0, causal, scale=spec.scale, enable_gqa=grouped)[0]


def attention_with_weights(q: Tensor, k: Tensor, v: Tensor, spec: Spec, average: bool) -> tuple[Tensor, Tensor]:
    """The same, and the weights after dropout [B, Hq, Tq, Tk], or averaged [B, Tq, Tk]: what ``nn.MultiheadAttention`` does."""
    if q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    causal, mask = _mask(q, k, spec)
    scores = torch.matmul(q * spec.scale, k.mT)
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)  # each row sees a key
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        weights = torch.ops.aten._safe_softmax.default(scores, -1)  # zeros for a row without keys
    else:
        weights = torch.softmax(scores, -1)
    if spec.dropout:
        weights = torch.dropout(weights, spec.dropout, True)
    return torch.matmul(weights, v), weights.mean(1) if average else weights


def _mask(q: Tensor, k: Tensor, spec: Spec) -> tuple[bool, Tensor | None]:
    """Whether queries see the keys up to their own place and nothing else is masked; else the mask: bool, or what is added."""
    tq, tk = q.shape[-2], k.shape[-2]
    shift = spec.offset + (tk - tq if spec.bottom_right else 0)
    pairs = [spec.bias, spec.slopes, spec.relative_bias, spec.blocks]
    unlimited = spec.left < 0 or tq - 1 + shift <= spec.left
    if all(part is None for part in pairs) and unlimited:
        if spec.right < 0 or shift + spec.right >= tk - 1:
            return False, spec.mask
        if spec.mask is None and shift + spec.right == 0:
            return True, None
    tile = Group(slice(0, q.shape[0]), tq, tk, shift).tile(slice(0, tq), slice(0, tk))
    own, _ = reference.of_tile(spec, tile)
    return False, reference.added(own, tile, q.device, q.dtype)
