"""Hashed attention (Reformer: Kitaev, Kaiser, Levskaya, 2020, arXiv 2001.04451) with one round of hashing: its textbook form.

Queries are keys, and each falls into a bucket by a random rotation. In the order of buckets, positions are cut into chunks of
`block`; a position sees those of its chunk and of the one before it, the first chunk those of the last, and itself only where it
sees nothing else. With a block as long as the sequence it sees every other position.

Letters as in attention.py. The textbook form computes all scores, of buckets that it finds itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

from .attention import CASES, Attention, AttentionWorkload, Bound, Operand, Tensors, leaves_of, plain

HASHED = "hashed"
CHUNK = 64  # transformers' default
SEED = 0  # of the rotations
ALONE = -1e3  # score of a position with itself: far below any other, in every precision
MODULE = "transformers.models.reformer.modeling_reformer"


def factors(w: AttentionWorkload) -> list[int]:
    """Buckets by transformers' rule: two for each chunk, a power of two; many of them as the product of two hashes."""
    bits = (2 * w.T // w.block).bit_length() - 1
    if 1 << bits <= 2 * max(math.isqrt(w.T // w.block), w.block):
        return [1 << bits]
    return [1 << bits // 2, 1 << bits - bits // 2]


def buckets(w: AttentionWorkload, q: Tensor) -> Tensor:
    """[B, H, T] of int64 from q [B, T, H, E]: the largest coordinate after a rotation, its negative counting as another one.

    In the workload's precision, in which q is exact: where two coordinates are nearly equal, rounding decides.
    """
    if w.block >= w.T:
        return torch.zeros(w.B, w.heads, w.T, dtype=torch.int64)
    q, parts = q.to(w.device, w.torch_dtype).transpose(1, 2), factors(w)
    with torch.random.fork_rng(devices=[w.device] if w.device.startswith("cuda") else []):
        torch.manual_seed(SEED)
        rotations = torch.randn(w.heads, w.E, 1, sum(parts) // 2, device=w.device, dtype=w.torch_dtype)
    rotated = torch.einsum("bhte,hern->bhrtn", q, rotations)[:, :, 0]
    found, before = torch.zeros(rotated.shape[:-1], dtype=torch.int64, device=w.device), 1
    for part, n in zip(rotated.split([n // 2 for n in parts], -1), parts, strict=True):
        found += before * torch.cat((part, -part), -1).argmax(-1)
        before *= n
    return found.cpu()


def visible(w: AttentionWorkload, buckets: Tensor) -> Tensor:
    """[B, H, T, T] of bool, True: attend, from buckets [B, H, T]."""
    chunk = buckets.argsort(stable=True, dim=-1).argsort(-1) // w.block
    here, there = chunk[..., None], chunk[..., None, :]
    seen = (there == here) | ((there + 1) % max(1, w.T // w.block) == here)
    return seen.tril() if w.causal else seen


def _eager(w: AttentionWorkload, q: Tensor, v: Tensor, buckets: Tensor) -> Tensor:
    q, v = q.transpose(1, 2), v.transpose(1, 2)
    keys = q * (q.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w.E**-0.5
    scores = (q @ keys.mT).masked_fill(~visible(w, buckets), -math.inf)
    scores = scores.masked_fill(torch.eye(w.T, dtype=torch.bool, device=q.device), ALONE)
    return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v


def _operands(w: AttentionWorkload) -> dict[str, Operand]:
    own = Operand((w.B, w.T, w.heads, w.E), 0, 2)
    hashes = Operand((w.B, w.heads, w.T), 0, 1, gradient=False, of=lambda w, tensors: buckets(w, tensors["q"]))
    return {"q": own, "v": own, "buckets": hashes}


CASES[HASHED] = Attention(HASHED, "hashed attention", _operands, plain(_eager), hashed=True)


class Given(nn.Module):
    """In place of a projection: what it would have made, [B, T, H, E] as [B, T, W]."""

    def __init__(self, made: Tensor) -> None:
        super().__init__()
        self.made = made

    def forward(self, x: Tensor) -> Tensor:
        return self.made.flatten(2)


def reformer(w: AttentionWorkload, tensors: Tensors) -> Bound:
    """transformers' LSHSelfAttention with its defaults, without its projections; a call seeds torch's generator and hashes."""
    logging.getLogger(MODULE).setLevel(logging.ERROR)  # else it tells the number of buckets that it takes
    config = importlib.import_module("transformers").ReformerConfig(
        hidden_size=w.H,
        num_attention_heads=w.heads,
        attention_head_size=w.E,
        is_decoder=w.causal,
        lsh_attn_chunk_length=w.block,
        max_position_embeddings=w.T,
        hash_seed=SEED,
    )
    q, v = tensors["q"], tensors["v"]
    module: Any = importlib.import_module(MODULE).LSHSelfAttention(config).to(q.device, q.dtype).train(w.mode != "inference")
    module.query_key, module.value = Given(q), Given(v)

    def run() -> Tensor:
        found = module(q.flatten(2)).hidden_states
        return found.view(w.B, w.T, w.heads, w.E).transpose(1, 2)

    how = "one chunk, no hashing" if w.block >= w.T else f"one round, {math.prod(factors(w))} buckets, chunks of {w.block}"
    return Bound(run, leaves_of(w, tensors), lambda: [how])


def reformer_missing(w: AttentionWorkload) -> str | None:
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed: pip install 'transformers>=5.23'"
    return f"T must be a multiple of its chunks of {w.block}, got {w.T}" if w.T % w.block else None
