"""Relative positions of well-known models, as ``attention`` takes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from .._arguments import check_keywords, checked_int, checked_number, checked_tensor, without_unknown
from ..backends import library
from ..ops._attention_eager import attended
from ..ops._dispatch import PLAIN, plain_call
from ._attention import attention
from ._attention_call import MOST_HEADS, AttentionOptions, check_tensors, checked_layout, shows_options

__all__ = ["t5_relative_bias", "transformer_xl_attention"]


@without_unknown
def t5_relative_bias(
    table: Tensor,
    query_length: int,
    key_length: int,
    *,
    bidirectional: bool = True,
    num_buckets: int = 32,
    max_distance: int = 128,
    **unknown: Any,
) -> tuple[Tensor, int]:
    """T5's learned bias as ``attention`` takes it: ``relative_bias`` ``[Hq, L]`` and ``relative_bias_zero``.

    Source: Raffel et al., 2020. Half of the buckets of a direction are for one distance (key - query) each, the others for
    distances that grow logarithmically up to ``max_distance``, the last one also for all beyond. Bidirectional, the second half
    of the buckets is for keys after the query; otherwise these share bucket 0.

    Args:
        table: ``[num_buckets, Hq]``, floating point; gets a gradient, the same bits at every run.
        query_length, key_length: Tq and Tk; L = Tq + Tk - 1 distances occur. No [Tq, Tk] tensor is built.
        bidirectional: whether keys after the query have buckets of their own.
        num_buckets: of both directions together.
        max_distance: from which on all distances share a bucket.

    Raises:
        RuntimeError: if ``table`` is not ``[num_buckets, Hq]`` of a floating dtype.
        TypeError: if ``table`` is no tensor or a length no int.
        ValueError: if a length is negative, a direction has fewer than 2 buckets, or ``max_distance`` is not beyond the
            exact ones.
    """
    if unknown:
        check_keywords(t5_relative_bias, unknown)
    checked_tensor("table", table)
    if type(num_buckets) is not int or type(max_distance) is not int:
        checked_int("num_buckets", num_buckets)
        checked_number("max_distance", max_distance)
    for name, length in (("query_length", query_length), ("key_length", key_length)):
        if (type(length) is not int or length < 0) and checked_int(name, length) < 0:
            raise ValueError(f"{name} must not be negative, got {length}")
    if table.dim() != 2 or table.shape[0] != num_buckets or not table.is_floating_point():
        raise RuntimeError(
            f"table must be floating point [num_buckets, Hq], num_buckets = {num_buckets}, got {table.dtype} {list(table.shape)}"
        )
    buckets = num_buckets // 2 if bidirectional else num_buckets
    exact = buckets // 2
    if exact < 1 or max_distance <= exact:
        raise ValueError(
            f"a direction needs at least 2 buckets, and max_distance more than half of them; got num_buckets={num_buckets}, "
            f"bidirectional={bidirectional}, max_distance={max_distance}"
        )
    kept = plain_call() and table.device.type != "meta"
    bucket = (_kept_buckets if kept else _buckets)(
        query_length, key_length, bidirectional, num_buckets, max_distance, table.device
    )
    return torch.embedding(table, bucket).t().contiguous(), max(query_length - 1, 0)


def _buckets(
    query_length: int, key_length: int, bidirectional: bool, num_buckets: int, max_distance: float, device: torch.device
) -> Tensor:
    """int64 [L], of distances in order."""
    buckets = num_buckets // 2 if bidirectional else num_buckets
    exact = buckets // 2
    distance = torch.arange(max(query_length + key_length - 1, 0), device=device) - max(query_length - 1, 0)
    size = distance.abs() if bidirectional else (-distance).clamp(min=0)
    # in fp32 and in this order of operations, as checkpoints were trained: some distances lie on the edge of a bucket
    logarithm = torch.log(size.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (logarithm * (buckets - exact)).long()).clamp(max=buckets - 1)
    bucket = torch.where(size < exact, size, far)
    return bucket + (distance > 0) * buckets if bidirectional else bucket


@lru_cache(maxsize=8)
def _kept_buckets(*sizes: Any) -> Tensor:
    """For the next layer, or the next token."""
    with torch.inference_mode(False):
        return _buckets(*sizes)


@overload
def transformer_xl_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    r: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = False,
    return_weights: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...
@overload
def transformer_xl_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    r: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    return_lse: bool = False,
    return_weights: bool | Literal["average"] = False,
    **options: Unpack[AttentionOptions],
) -> Any: ...


@shows_options(
    "causal",
    "alignment",
    "relative_query",
    "relative_key",
    "relative_key_zero",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "max_seqlen_q",
    "max_seqlen_k",
)
def transformer_xl_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    r: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    return_lse: bool = False,
    return_weights: bool | Literal["average"] = False,
    **options: Unpack[AttentionOptions],
) -> Any:
    """Causal attention of Transformer-XL (Dai et al., 2019): the scores are ((q + u) k^T + (q + v) R^T) / sqrt(E).

    Args:
        query: ``[B, H, Tq, E]``, or ``[B, Tq, H, E]`` with ``layout="bshd"``.
        key, value: likewise with Tk = memory + Tq steps: the caller puts the memory before the segment.
        r: the paper's R after its projection, ``[H or 1, Tk, E]``: from the farthest distance, Tk - 1, to 0.
        u, v: the paper's biases, ``[H, E]``.
        options: the others are those of :func:`attention`, such as ``dropout_p`` or ``attn_mask``.
        return_lse, return_weights: as there.

    Returns, raises: as :func:`attention`.
    """
    if not (return_lse or return_weights) and plain_call(unseen=True):
        out = _one_step(query, key, value, r, u, v, options)
        if out is not None:
            return out
    check_keywords(transformer_xl_attention, options)
    check_tensors({"query": query, "key": key, "value": value, "r": r, "u": u, "v": v})
    layout = checked_layout(options.get("layout"), False)
    if query.dim() != 4:
        raise RuntimeError(f"query must be {'[B, H, T, E]' if layout == 'bhsd' else '[B, T, H, E]'}, got {list(query.shape)}")
    if r.dim() != 3:
        raise RuntimeError(f"r must be [H or 1, Tk, E], got {list(r.shape)}")
    for name, vector in (("u", u), ("v", v)):
        heads = query.shape[1 if layout == "bhsd" else 2]
        if vector.shape != (heads, query.shape[-1]):
            raise RuntimeError(f"{name} must be [H, E] = [{heads}, {query.shape[-1]}], got {list(vector.shape)}")
    if layout == "bhsd":
        u, v = u[:, None], v[:, None]
    options |= {
        "causal": True,
        "alignment": "bottom_right",
        "relative_query": query + v,
        "relative_key": r,
        "relative_key_zero": r.shape[-2] - 1,
    }
    return attention(query + u, key, value, return_lse=return_lse, return_weights=return_weights, **options)


_OF_A_STEP = frozenset(("layout", "window_size", "scale"))
_OF_STEPS = (torch.float32, torch.float64)


def _one_step(
    query: Tensor, key: Tensor, value: Tensor, r: Tensor, u: Tensor, v: Tensor, options: Mapping[str, Any]
) -> Tensor | None:
    """One query on a CPU, without gradients, which stands at the last key: row j of R is for key j, so that the term over
    distances is a bias. None: it goes the long way, which also says what is wrong with it.
    """
    for name, given in options.items():
        if name not in _OF_A_STEP and not (name == "dropout_p" and type(given) is float and given == 0):
            return None
    if type(query) not in PLAIN:
        return None
    dtype, gradients = query.dtype, torch.is_grad_enabled()
    for tensor in (query, key, value, r, u, v):
        if type(tensor) not in PLAIN or tensor.dtype != dtype or not tensor.is_cpu or (gradients and tensor.requires_grad):
            return None
    layout, window, scale = options.get("layout"), options.get("window_size"), options.get("scale")
    swapped = layout == "bshd"
    if dtype not in _OF_STEPS or query.dim() != 4 or key.dim() != 4 or library.reason():
        return None
    steps, heads = (1, 2) if swapped else (2, 1)
    sizes, of_keys = query.shape, key.shape
    keys, own, features = of_keys[steps], sizes[heads], sizes[3]
    if sizes[steps] != 1 or of_keys != value.shape or of_keys[heads] != own or of_keys[0] != sizes[0] or of_keys[3] != features:
        return None
    if (not swapped and (layout not in (None, "bhsd") or own > MOST_HEADS)) or not features or not keys:
        return None
    if r.dim() != 3 or r.shape[0] not in (1, own) or r.shape[1:] != (keys, features) or not u.shape == v.shape == (own, features):
        return None
    if scale is None:
        scale = features**-0.5
    elif type(scale) is not float or not math.isfinite(scale):
        return None
    if window is not None:
        if type(window) not in (tuple, list) or len(window) != 2 or not _is_side(window[0]) or not _is_side(window[1]):
            return None
        left = -1 if window[0] is None else window[0]
        if 0 <= left < keys - 1:
            first, keys = keys - 1 - left, left + 1
            key, value, r = key.narrow(steps, first, keys), value.narrow(steps, first, keys), r.narrow(1, first, keys)
    asks = query.squeeze(steps)  # [B, H, E]
    if r.shape[0] != own:
        r = r.expand(own, -1, -1)
    bias = torch.bmm(((asks + v) * scale).transpose(0, 1), r.mT)  # [H, B, Tk]
    query = (asks + u).unsqueeze(steps)
    return attended(query, key, value, bias.transpose(0, 1).unsqueeze(2), 0.0, False, scale, True, swapped, False)


def _is_side(given: Any) -> bool:
    return given is None or (type(given) is int and given >= -1)
