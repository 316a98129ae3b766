"""Attention of a few new queries against a cache of keys and values: the specification, in terms of ``reference.attention``.

Letters as there; S is the capacity of a cache, and query i of sequence b stands at place lengths[b] - Tq + i among its keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.types import DecodeSpec, Spec
from . import attention


def capacity(cache: Tensor, block_table: Tensor | None) -> int:
    """Keys that a sequence may have, S."""
    return cache.shape[2] if block_table is None else block_table.shape[1] * cache.shape[2]


def gathered(cache: Tensor, block_table: Tensor) -> Tensor:
    """[B, Hkv, S, E] from pages [pages, Hkv, page_size, E]; entries outside the pages stand for any page."""
    pages = cache[block_table.long().clamp(0, cache.shape[0] - 1)]  # [B, max_pages, Hkv, page_size, E]
    return pages.transpose(1, 2).flatten(2, 3)


def forward(q: Tensor, k_cache: Tensor, v_cache: Tensor, call: DecodeSpec) -> tuple[Tensor, Tensor]:
    """out as q with Ev features, in q's dtype; lse ``[B, Hq, Tq]`` in the dtype of accumulation. Differentiable."""
    if call.block_table is not None:
        k_cache, v_cache = gathered(k_cache, call.block_table), gathered(v_cache, call.block_table)
    lengths = call.lengths.clamp(0, k_cache.shape[2])
    # A cache may hold anything where no query looks, and zero times anything is not always zero.
    j = torch.arange(k_cache.shape[2], device=q.device)
    hidden = j >= lengths[:, None]
    if call.left >= 0:
        hidden = hidden | (j < lengths[:, None] - q.shape[2] - call.left)
    v_cache = v_cache.masked_fill(hidden[:, None, :, None], 0)
    spec = Spec(
        slopes=call.slopes,
        sinks=call.sinks,
        k_lengths=lengths,
        scale=call.scale,
        softcap=call.softcap,
        left=call.left,
        right=call.right,
        bottom_right=True,
    )
    return attention.forward(q, k_cache, v_cache, spec)
