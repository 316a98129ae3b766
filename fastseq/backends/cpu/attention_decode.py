"""Attention against a cache by torch's fused CPU attention: one call per sequence, over the keys that it can see."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.types import DecodeSpec, Spec, empty_rows, state_dtype
from ...reference.attention_decode import gathered
from ..query import AttentionQuery
from .attention import attention_forward


def why_not(query: AttentionQuery) -> list[str]:
    against = []
    if query.features[0] != query.features[1]:
        against.append(f"torch's fused CPU attention needs one head dim for keys and values, got {query.features}")
    if "softcap" in query.uses:
        against.append("torch's fused CPU attention has no softcap")
    return against


def attention_decode_forward(q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: DecodeSpec) -> tuple[Tensor, Tensor]:
    lengths, block_table, slopes, sinks, scale, _, left, right, _ = spec
    batch, heads, queries, features = q.shape
    heads_k, page = k_cache.shape[1], k_cache.shape[2]
    keys = page if block_table is None else page * block_table.shape[1]
    out, lse = empty_rows(q, features), q.new_empty(batch, heads, queries, dtype=state_dtype(q.dtype))
    if lse.numel() == 0:
        return out, lse
    for b, length in enumerate(lengths.clamp(0, keys).tolist()):
        begin = max(0, length - queries - left) if left >= 0 else 0
        if block_table is None:
            k, v = k_cache[b : b + 1, :, begin:length], v_cache[b : b + 1, :, begin:length]
        else:
            first = begin // page
            used = block_table[b : b + 1, first : -(-length // page)]
            rows = slice(begin - first * page, length - first * page)
            k, v = gathered(k_cache, used)[:, :, rows], gathered(v_cache, used)[:, :, rows]
        if k.numel() == 0:  # the fused attention divides by the number of keys
            out[b], lse[b] = 0, -torch.inf
            continue
        # the heads of a key head are rows of one head
        rows_q = q[b].reshape(1, heads_k, -1, features)  # [1, Hkv, g Tq, E]
        added = _added(q, begin, length, None if slopes is None else slopes[b % len(slopes)], left, right)
        if added is not None:
            added = added.expand(heads, queries, -1).reshape(1, heads_k, rows_q.shape[2], -1)
        result, row_lse = attention_forward(rows_q, k, v, Spec(bias=added, scale=scale))
        out[b] = result.reshape(heads, queries, features)
        lse[b] = row_lse.reshape(heads, queries)
    if sinks is not None:
        with_sink = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        share = torch.exp(lse - with_sink).masked_fill(lse == -torch.inf, 0)
        out, lse = out.mul_(share[..., None]), with_sink
    return out, lse


def _added(q: Tensor, begin: int, length: int, slopes: Tensor | None, left: int, right: int) -> Tensor | None:
    """What is added to the scores, [Hq or 1, Tq, keys]; None: nothing."""
    queries = q.shape[2]
    everything = queries == 1 or (left < 0 and right < 0)  # a single query sees all that are left
    if everything and slopes is None:
        return None
    dtype = q.dtype if q.dtype == torch.float64 else torch.float32
    distance = torch.arange(begin, length) - torch.arange(length - queries, length)[:, None]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left >= 0:
        hidden |= distance < -left
    if right >= 0:
        hidden |= distance > right
    added = torch.zeros(distance.shape, dtype=dtype) if slopes is None else slopes.to(dtype)[:, None, None] * -distance.abs()
    return added.masked_fill(hidden, -torch.inf)
