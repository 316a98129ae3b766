"""Relative positions of well-known models, as ``attention`` takes them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from .._arguments import checked_int, checked_number, checked_tensor, own_keywords
from ..ops._dispatch import plain_call, wants_gradient
from ._attention import attention
from ._attention_call import AttentionOptions, check_tensors, checked_layout, takes_options

__all__ = ["t5_relative_bias", "transformer_xl_attention"]


@own_keywords
def t5_relative_bias(
    table: Tensor,
    query_length: int,
    key_length: int,
    *,
    bidirectional: bool = True,
    num_buckets: int = 32,
    max_distance: int = 128,
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
    checked_tensor("table", table)
    checked_int("num_buckets", num_buckets)
    checked_number("max_distance", max_distance)
    for name, length in (("query_length", query_length), ("key_length", key_length)):
        if checked_int(name, length) < 0:
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
    return torch.nn.functional.embedding(bucket, table).t().contiguous(), max(query_length - 1, 0)


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


@takes_options(
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
    if not (return_lse or return_weights) and plain_call() and _is_a_step(layout, (query, key, value, r, u, v), options):
        return _step(query, key, value, r, u, v, **options)
    options |= {
        "causal": True,
        "alignment": "bottom_right",
        "relative_query": query + v,
        "relative_key": r,
        "relative_key_zero": r.shape[-2] - 1,
    }
    return attention(query + u, key, value, return_lse=return_lse, return_weights=return_weights, **options)


_OF_A_STEP = frozenset(("layout", "window_size", "scale"))


def _is_side(given: Any) -> bool:
    return given is None or (type(given) is int and given >= -1)


def _is_a_step(layout: str, tensors: Sequence[Tensor], options: Mapping[str, Any]) -> bool:
    """Whether `_step` can give what is asked for: one query on a CPU, without gradients; what does not fit goes the long way."""
    query, key, value, r, *_ = tensors
    steps, heads = (2, 1) if layout == "bhsd" else (1, 2)
    if query.shape[steps] != 1 or query.dtype not in (torch.float32, torch.float64) or not query.is_cpu:
        return False
    if any([name not in _OF_A_STEP and (isinstance(given, Tensor) or given) for name, given in options.items()]):
        return False
    window = options.get("window_size")
    if window is not None and not (isinstance(window, (tuple, list)) and len(window) == 2 and all(map(_is_side, window))):
        return False
    if (
        any([t.dtype != query.dtype or not t.is_cpu for t in tensors])
        or wants_gradient(tensors)
        or key.shape != value.shape
        or key.dim() != 4
    ):
        return False
    fits = query.shape[heads] == key.shape[heads] and query.shape[0] == key.shape[0] and query.shape[3] == key.shape[3]
    return fits and r.shape[0] in (1, query.shape[heads]) and r.shape[1:] == (key.shape[steps], query.shape[3])


def _step(
    query: Tensor, key: Tensor, value: Tensor, r: Tensor, u: Tensor, v: Tensor, *, layout: Any = "bhsd",
    window_size: Sequence[int | None] | None = None, scale: float | None = None, **_: Any
) -> Tensor:  # fmt: skip
    """The last query stands at the last key: row j of R is for key j, so that the term over distances is a bias."""
    steps = 1 if layout == "bshd" else 2
    left = -1 if window_size is None or window_size[0] is None else window_size[0]
    if 0 <= left < key.shape[steps] - 1:
        first, count = key.shape[steps] - 1 - left, left + 1
        key, value, r = key.narrow(steps, first, count), value.narrow(steps, first, count), r.narrow(1, first, count)
    asks = (query + v) * (query.shape[3] ** -0.5 if scale is None else scale)
    bias = (asks.transpose(1, 2) if layout == "bshd" else asks) @ r.mT  # [B, H, 1, Tk]
    return attention(query + u, key, value, layout=layout, scale=scale, attn_bias=bias)
