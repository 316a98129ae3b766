"""Caches of keys and values of every kind, and what PyTorch makes of them: shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastseq.ops.attention_decode import attention_decode
from fastseq.ops.types import DecodeSpec


@dataclass(frozen=True)
class DecodeCase:
    """A call of ``fastseq::attention_decode``; letters as in ``reference/attention_decode.py``."""

    heads: int = 4
    heads_k: int = 2
    queries: int = 1
    lengths: tuple[int, ...] = (19, 0, 35)
    capacity: int = 35
    features: int = 16
    features_v: int = 16
    page: int = 0  # keys of a page; 0: contiguous
    left: int = -1
    right: int = 0
    slopes: int = 0  # 1: [1, Hq], 2: [B, Hq]
    sinks: bool = False
    softcap: float = 0.0
    num_splits: int = 0

    def __str__(self) -> str:
        marks = [
            f"H{self.heads}:{self.heads_k}-T{self.queries}-S{self.capacity}-E{self.features}:{self.features_v}",
            f"page{self.page}" if self.page else "",
            f"window{self.left}:{self.right}" if (self.left, self.right) != (-1, 0) else "",
            f"slopes{self.slopes}" if self.slopes else "",
            "sinks" if self.sinks else "",
            "softcap" if self.softcap else "",
            f"splits{self.num_splits}" if self.num_splits else "",
        ]
        return "-".join(filter(None, marks))


SMALL_DECODE_CASES = [
    DecodeCase(lengths=(9, 0), capacity=11, features=8, features_v=8),
    DecodeCase(
        lengths=(9, 3),
        capacity=12,
        queries=3,
        page=4,
        left=2,
        slopes=2,
        sinks=True,
        softcap=3.0,
        num_splits=2,
        features=8,
        features_v=5,
    ),
]

DECODE_CASES = [
    *SMALL_DECODE_CASES,
    DecodeCase(),
    DecodeCase(num_splits=3),
    DecodeCase(heads=3, heads_k=3, features=5, features_v=5, left=10),
    DecodeCase(heads=6, heads_k=1, queries=3, features=24, features_v=40, page=16, lengths=(40, 47), capacity=48, num_splits=2),
    DecodeCase(page=5, left=7, right=2, queries=4, slopes=1, sinks=True, num_splits=4),
    DecodeCase(queries=9, lengths=(5, 20), capacity=20, slopes=2, sinks=True),
    DecodeCase(queries=9, lengths=(5, 20), capacity=20, left=3),
    DecodeCase(queries=20, lengths=(30, 12), capacity=30, left=7, right=-1, heads=2, heads_k=1, page=10),
    DecodeCase(heads=2, heads_k=1, lengths=(131,), capacity=150, softcap=2.0, page=1, num_splits=18),
    DecodeCase(lengths=(), capacity=8),
    DecodeCase(queries=0),
]

# Several tiles, row blocks and parts of the sizes that a GPU has; without `num_splits`, so many parts as keep it busy.
LONG_DECODE_CASES = [
    DecodeCase(heads=8, lengths=(700, 0, 1021), capacity=1024, features=64, features_v=64),
    DecodeCase(heads=4, heads_k=1, lengths=(4000,), capacity=4096, features=128, features_v=128, left=3500),
    DecodeCase(heads=8, lengths=(1280, 300), capacity=1280, features=128, features_v=96, page=16, sinks=True, num_splits=20),
    DecodeCase(
        heads=8, queries=20, lengths=(290, 130), capacity=320, features=64, features_v=64, page=64, left=200, num_splits=3
    ),
    DecodeCase(
        heads=2, queries=2, lengths=(90, 300), capacity=320, features=256, features_v=256, softcap=3.0, slopes=2, num_splits=17
    ),
]


def make_decode(case: DecodeCase, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Arguments of the op by name; what no query sees is NaN, in the cache, and out of range, in the block table."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    batch, wide = len(case.lengths), torch.promote_types(dtype, torch.float32)
    q = random(batch, case.queries, case.heads, case.features).transpose(1, 2)
    contiguous = (batch, case.capacity, case.heads_k)
    k, v = random(*contiguous, case.features).transpose(1, 2), random(*contiguous, case.features_v).transpose(1, 2)
    for b, length in enumerate(case.lengths):
        first = max(0, length - case.queries - case.left) if case.left >= 0 else 0
        for cache in (k, v):
            cache[b, :, length:] = torch.nan
            cache[b, :, :first] = torch.nan
    table = None
    if case.page:
        per_row = case.capacity // case.page
        k, v = (in_pages(cache, case.page) for cache in (k, v))
        order = torch.randperm(k.shape[0], generator=generator).to(device)
        k, v = k[order], v[order]
        table = torch.argsort(order).view(batch, per_row).to(torch.int32)
        for b, length in enumerate(case.lengths):
            first = max(0, length - case.queries - case.left) if case.left >= 0 else 0
            table[b, -(-length // case.page) :] = -1
            table[b, : first // case.page] = 1 << 30
    sinks = random(case.heads) if case.sinks else None
    if sinks is not None:
        sinks[0] = -torch.inf
    return {
        "q": q,
        "k_cache": k,
        "v_cache": v,
        "lengths": torch.tensor(case.lengths, dtype=torch.int32, device=device),
        "block_table": table,
        "slopes": random(1 if case.slopes == 1 else batch, case.heads).to(wide).abs() if case.slopes else None,
        "sinks": sinks,
        "scale": 0.3,
        "softcap": case.softcap,
        "left": case.left,
        "right": case.right,
        "num_splits": case.num_splits,
    }


def decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, **fields: Any) -> tuple[Tensor, Tensor]:
    """The op, of what ``make_decode`` gives."""
    return attention_decode(q, k_cache, v_cache, DecodeSpec(**fields))


def in_pages(cache: Tensor, page: int) -> Tensor:
    """[pages, Hkv, page, E] from [B, Hkv, S, E]; time before heads in memory."""
    return cache.transpose(1, 2).unflatten(1, (-1, page)).flatten(0, 1).transpose(1, 2)


def decode_by_torch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    block_table: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    """out and lse by plain PyTorch, sequence by sequence, query by query, over the keys that a query sees and no others."""
    batch, heads, queries, _ = q.shape
    group = heads // k_cache.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(batch, heads, queries, v_cache.shape[-1])
    lse = q.new_full((batch, heads, queries), -torch.inf, dtype=wide)
    for b, length in enumerate(lengths.tolist()):
        for i in range(queries):
            place = length - queries + i
            first = max(0, place - left) if left >= 0 else 0
            last = min(length, place + right + 1) if right >= 0 else length
            seen = range(first, max(first, last))
            if block_table is None:
                k, v = k_cache[b, :, seen.start : seen.stop], v_cache[b, :, seen.start : seen.stop]
            else:
                size = k_cache.shape[2]
                at = [(int(block_table[b, j // size]), j % size) for j in seen]
                k, v = (torch.stack([x[page, :, j] for page, j in at], 1) if at else x[0, :, :0] for x in (k_cache, v_cache))
            s = (k.repeat_interleave(group, 0) @ q[b, :, i, :, None]).squeeze(-1) * scale  # [Hq, keys]
            if softcap:
                s = softcap * torch.tanh(s / softcap)
            if slopes is not None:
                distance = torch.tensor([abs(place - j) for j in seen], device=q.device, dtype=wide)
                s = s - (slopes[b % len(slopes)].to(wide)[:, None] * distance).to(s.dtype)
            if sinks is not None:
                s = torch.cat((s, sinks[:, None].to(s.dtype)), 1)
            if s.shape[1] == 0:
                continue
            dead = (s == -torch.inf).all(-1, keepdim=True)
            w = torch.softmax(s, -1).masked_fill(dead, 0)[:, : len(seen)]
            out[b, :, i] = (w[:, None] @ v.repeat_interleave(group, 0)).squeeze(1)
            lse[b, :, i] = torch.logsumexp(s.to(wide), -1)
    return out, lse
