"""``torch.nn.functional.scaled_dot_product_attention``, with its signature and its semantics."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._arguments import checked_number, own_keywords
from ..ops import _attention_eager as eager
from ..ops._dispatch import plain_call, shared_sequence
from ..ops.attention import Spec
from . import _nested
from ._attention import attention
from ._attention_call import added, check_dtypes, check_tensors, default_scale, rows
from ._autocast import autocast_dtype, lowered
from ._torch_attention import attention_output

__all__ = ["scaled_dot_product_attention"]


@own_keywords
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale query key^T + attn_mask) value, as ``torch.nn.functional.scaled_dot_product_attention``.

    Args:
        query: ``[.., H, L, E]``, at least 2-D; fp16, bf16, fp32 or fp64. Leading dimensions broadcast.
        key, value: ``[.., H, S, E]`` and ``[.., H, S, Ev]``, in the query's dtype.
        attn_mask: broadcastable to ``[.., H, L, S]``: bool, True where a query attends; or of the query's dtype (or fp32 beside a
            16-bit query), added to the scaled scores; it may want a gradient. Or ``causal_upper_left(L, S)`` or
            ``causal_lower_right(L, S)`` of ``torch.nn.attention.bias``.
        dropout_p: probability with which weights are zeroed, whether training or not.
        is_causal: query i sees the keys up to i, top left if L != S. Not together with ``attn_mask``.
        scale: of the products; None: 1 / sqrt(E).
        enable_gqa: query heads are a multiple of those of key and value, which each serve a run of neighboring query heads.

    Queries that see no key give zeros, with zero gradients. NaN or infinity in a key or value that is hidden may still reach the
    result. All three may be nested tensors: jagged ``[B, H, j, E]``, then with ``is_causal`` and fewer key heads as well, or of
    strided components ``[H, L, E]``; without ``attn_mask``.

    Returns:
        ``[.., H, L, Ev]``.

    Raises:
        RuntimeError: if ranks, sizes, dtypes or devices do not fit, with both ``attn_mask`` and ``is_causal`` (also where some of
            torch's kernels take both), or if ``dropout_p`` is not in [0, 1].
        IndexError: a mask of fewer than 2 dimensions beside a 4-D query; ``enable_gqa`` without heads.
        TypeError: if an argument has a type or a name that is not accepted.
        ValueError: for a causal bias together with ``is_causal``, and for nested tensors mixed with others or with a mask.
        NotImplementedError: for floating dtypes other than those above.
    """
    if plain_call(unseen=True):
        out = eager.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if out is not None:
            return out
    named = {"query": query, "key": key, "value": value}
    check_tensors(named)
    shared = shared_sequence()
    if shared is not None:
        return shared.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if not 0 <= checked_number("dropout_p", dropout_p) <= 1:
        raise RuntimeError(f"dropout probability has to be between 0 and 1, but got {dropout_p}")
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be a bool, not {type(is_causal).__name__}")
    if query.is_nested or key.is_nested or value.is_nested:
        if attn_mask is not None:
            raise ValueError("attn_mask is not accepted with nested tensors")
        options: dict[str, Any] = dict(dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
        return _nested_attention(query, key, value, options)
    bottom_right = False
    causal_bias = _causal_bias(attn_mask)
    if causal_bias is not None:
        if is_causal:
            raise ValueError("a causal bias already says what is_causal says: give one of them")
        given, needed = (causal_bias.seq_len_q, causal_bias.seq_len_kv), (query.shape[-2], key.shape[-2])
        if given != needed:
            raise RuntimeError(f"the causal bias must be for (L, S) = {needed}, got one for {given}")
        is_causal, bottom_right, attn_mask = True, causal_bias.variant.name == "LOWER_RIGHT", None
    if is_causal and attn_mask is not None:
        raise RuntimeError("attn_mask and is_causal exclude each other: put the causal part into attn_mask")
    if attn_mask is not None:
        check_tensors(named, attn_mask=attn_mask)
    lower = autocast_dtype(query.device.type)
    query, key, value, attn_mask = lowered(query, lower), lowered(key, lower), lowered(value, lower), lowered(attn_mask, lower)
    check_dtypes({"query": query, "key": key, "value": value})
    q, k, v, leading, of_scores = _four_dimensions(query, key, value, enable_gqa)
    mask = bias = None
    if attn_mask is not None:
        over_scores = _mask(attn_mask, query, key.shape[-2], leading, of_scores)
        mask, bias = (over_scores, None) if attn_mask.dtype == torch.bool else (None, over_scores)
    spec = Spec(
        mask=mask,
        bias=bias,
        scale=default_scale(q.shape[-1]) if scale is None else float(checked_number("scale", scale)),
        dropout=float(dropout_p),
        right=0 if is_causal else -1,
        bottom_right=bottom_right,
    )
    out = attention_output(q, k, v, spec)
    return out.reshape(*leading, *out.shape[-2:])


def _causal_bias(mask: Any) -> Any:
    """The mask, if it is one of torch's causal biases. Their module imports Dynamo: whoever has one has imported it already."""
    module = None if mask is None or type(mask) is Tensor else sys.modules.get("torch.nn.attention.bias")
    return mask if module is not None and isinstance(mask, module.CausalBias) else None


def _four_dimensions(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...], tuple[int, ...]]:
    """[B, H, T, E] of all three (k and v may have fewer heads), the leading dimensions of the result, and those of the scores."""

    def given() -> str:
        return f"got query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"

    if min(query.dim(), key.dim(), value.dim()) < 2:
        raise RuntimeError(f"query, key and value must all be at least 2-dimensional, {given()}")
    if query.shape[-1] != key.shape[-1]:
        raise RuntimeError(f"query and key must have the same features, {given()}")
    if key.shape[-2] != value.shape[-2]:
        raise RuntimeError(f"key and value must have the same length, {given()}")
    if not enable_gqa and query.dim() == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]:
        same = tuple(query.shape[:2])
        return rows(query), rows(key), rows(value), same, same
    if enable_gqa:
        if min(query.dim(), key.dim(), value.dim()) < 3:
            raise IndexError(f"enable_gqa needs a dimension of heads, {given()}")
        heads = query.shape[-3]
        if any(t.shape[-3] == 0 or heads % t.shape[-3] for t in (key, value)):
            raise RuntimeError(f"with enable_gqa the heads of key and value must divide those of query, {given()}")
        of_scores: tuple[int, ...] = (*_broadcast(given, query.shape[:-3], key.shape[:-3]), heads)
        leading = (*_broadcast(given, of_scores[:-1], value.shape[:-3]), heads)
    else:
        of_scores = _broadcast(given, query.shape[:-2], key.shape[:-2])
        leading = _broadcast(given, of_scores, value.shape[:-2])
    batch, heads = leading[:-1], (leading[-1] if leading else 1)
    k_heads, v_heads = (t.shape[-3] if t.dim() > 2 else 1 for t in (key, value))
    if k_heads != v_heads:
        key, value = (
            t if own in (1, heads) else t.repeat_interleave(heads // own, -3) for t, own in ((key, k_heads), (value, v_heads))
        )
        k_heads = heads

    def whole(tensor: Tensor, own: int) -> Tensor:
        tensor = tensor.expand(*batch, own, *tensor.shape[-2:])
        return rows(tensor if len(batch) == 1 else tensor.reshape(math.prod(batch), *tensor.shape[-3:]))

    return whole(query, heads), whole(key, k_heads), whole(value, k_heads), leading, of_scores


def _broadcast(given: Callable[[], str], *shapes: Any) -> tuple[int, ...]:
    if all(shape == shapes[0] for shape in shapes[1:]):
        return tuple(shapes[0])
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError as error:
        raise RuntimeError(f"the dimensions before the last two must broadcast (or enable_gqa be given), {given()}") from error


def _mask(mask: Tensor, query: Tensor, keys: int, leading: tuple[int, ...], of_scores: tuple[int, ...]) -> Tensor:
    """[B or 1, H or 1, L or 1, S or 1]."""
    if mask.dtype != torch.bool:
        mask = added("attn_mask, if not bool,", mask, query.dtype)
    if mask.dim() < 2 and query.dim() == 4:
        raise IndexError(f"attn_mask must have at least 2 dimensions, got {list(mask.shape)}")
    scores = (*of_scores, query.shape[-2], keys)
    own = zip(reversed(mask.shape), reversed(scores), strict=False)
    if mask.dim() > len(scores) or not all(given in (size, 1) for given, size in own):
        hint = ""
        if mask.dim() == 3 and len(scores) == 4 and mask.shape[0] == scores[0]:
            hint = "; one mask for each sequence is [N, 1, L, S]"
        raise RuntimeError(f"attn_mask must be broadcastable to the scores {list(scores)}, got {list(mask.shape)}{hint}")
    mask = mask[(None,) * (max(len(leading) + 2, 4) - mask.dim())]
    before = mask.shape[:-3]
    if len(before) == 1:
        return mask
    if all(size == 1 for size in before):
        return mask.reshape(1, *mask.shape[-3:])
    return mask.expand(*leading[:-1], *mask.shape[-3:]).reshape(-1, *mask.shape[-3:])


def _nested_attention(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    tensors = (query, key, value)
    if not all(t.is_nested for t in tensors) or len({t.layout for t in tensors}) > 1:
        kinds = ", ".join(f"nested {t.layout}" if t.is_nested else "not nested" for t in tensors)
        raise ValueError(f"query, key and value must all be nested tensors of one layout if one of them is, got {kinds}")
    if query.layout == torch.jagged and all(t.dim() == 4 and t._ragged_idx == 1 for t in tensors):  # type: ignore[attr-defined]
        of_q, *others = (_nested.jagged(t, "bshd") for t in tensors)  # the heads are ragged: each row attends by itself
        if not all(t.offsets is of_q.offsets or torch.equal(t.offsets, of_q.offsets) for t in others):
            raise RuntimeError("query, key and value must agree in the ragged dimension if it is not the second last")
        out = scaled_dot_product_attention(of_q.values, others[0].values, others[1].values, **options)
        return of_q.nested(out, "bshd")
    causal, dropout, scale = options["is_causal"], options["dropout_p"], options["scale"]
    if query.layout == torch.jagged:
        heads = [_nested.jagged(t, "bhsd").values.shape[1] for t in tensors]
        _check_heads(heads, options["enable_gqa"])
        return attention(query, key, value, causal=causal, alignment="top_left", dropout_p=dropout, scale=scale)
    q, k, v = (_nested.stacked(t) for t in tensors)
    _check_heads([t.values.shape[1] for t in (q, k, v)], options["enable_gqa"])
    if k.lengths != v.lengths or len(q.lengths) != len(k.lengths):
        raise RuntimeError(f"sequences of query, key and value do not fit, got lengths {q.lengths}, {k.lengths} and {v.lengths}")
    out = attention(
        q.values,
        k.values,
        v.values,
        causal=causal,
        alignment="top_left",
        dropout_p=dropout,
        scale=scale,
        cu_seqlens_q=q.offsets,
        cu_seqlens_k=k.offsets,
        max_seqlen_q=max(q.lengths),
        max_seqlen_k=max(k.lengths),
    )
    return torch.nested.as_nested_tensor([part.transpose(0, 1) for part in out.split(q.lengths)])


def _check_heads(heads: list[int], enable_gqa: bool) -> None:
    q, k, v = heads
    if k != v or k == 0 or q % k or (not enable_gqa and k not in (1, q)):
        raise RuntimeError(
            f"heads of nested key and value must be those of query or 1, or divide them with enable_gqa, got {q}, {k} and {v}"
        )
