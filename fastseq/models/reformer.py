"""Reformer (Kitaev et al. 2020, arXiv 2001.04451): attention among tokens that hash alike, layers that need no memory to go back.

Letters: B batch, T tokens, W width, H heads, E = W / H features of a head, R rounds of hashing, C chunks of M tokens each.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseq.functional import attention, merge_attention, require_whole_sequence

from ._configuration import check_heads, check_input, check_lengths, check_rates, check_sizes
from .reversible import ReversibleBlock, reversible

__all__ = ["HashedAttention", "Reformer"]


class HashedAttention(nn.Module):
    """Attention whose queries are its keys too, each to those that fall into its bucket by a random rotation, or near it.

    In each round tokens are sorted by (bucket, place) and cut into chunks; a token sees the others of its chunk and of the one
    before (the first chunk: the last one of the round before), and itself only where it sees nothing else in any round.

    What differs from the paper: a chunk is not cut where a bucket ends, what two rounds see alike counts twice, and keys are
    divided by their root mean square; so have it transformers and the authors' program. The number of buckets is not made of
    factors.

    Args:
        width: W.
        heads: H, a divisor of W.
        chunk: M.
        buckets: an even number; about 2 T / M.
        rounds: R.
        causal: a token sees none that come later. Which of the earlier ones share its chunk depends on all tokens of the row even
            so; hence no step would equal a call over the whole row, and there is none.
        attention_dropout: of the weights, in training alone.

    Raises:
        ValueError: if an argument has a value that is not accepted. TypeError: if a size is no int.
    """

    def __init__(
        self, width: int, heads: int, *, chunk: int, buckets: int, rounds: int = 1, causal: bool = True,
        attention_dropout: float = 0.0
    ) -> None:  # fmt: skip
        super().__init__()
        check_heads(width, heads)
        check_sizes(chunk=chunk, buckets=buckets, rounds=rounds)
        check_rates(attention_dropout=attention_dropout)
        if buckets % 2:
            raise ValueError(f"buckets must be even, half of them negatives of the others, got {buckets}")
        self.width, self.heads, self.chunk, self.buckets, self.rounds = width, heads, chunk, buckets, rounds
        self.causal, self.attention_dropout = causal, attention_dropout
        self.query_key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(3))

    def rotations(self) -> Tensor:
        """New ones of torch's generator, ``[H, E, R, buckets / 2]``: what decides the hash of a call."""
        like = self.query_key.weight
        shape = self.heads, self.width // self.heads, self.rounds, self.buckets // 2
        return torch.randn(shape, dtype=like.dtype, device=like.device)

    def forward(self, x: Tensor, rotations: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """``[B, T, W]`` from x likewise; no tensor of T x T elements is made.

        Args:
            rotations: None: new ones, so that two calls differ, in evaluation too.
            lengths: int64 ``[B]``: tokens beyond are seen by none, and what they give means nothing.

        Raises:
            RuntimeError: if sizes or dtypes do not fit.
        """
        require_whole_sequence("sorting by hash")
        check_input(x, None, None, self.width)
        check_lengths(lengths, x)
        rotations = self.rotations() if rotations is None else rotations
        expected = (self.heads, self.width // self.heads, self.rounds, self.buckets // 2)
        if rotations.shape != expected:
            raise RuntimeError(f"rotations must be [H, E, R, buckets / 2] = {list(expected)}, got {list(rotations.shape)}")
        (B, T), M, E = x.shape[:2], self.chunk, expected[1]
        x = F.pad(x, (0, 0, 0, -T % M if T else M))
        ends = torch.full((B,), T, device=x.device) if lengths is None else lengths
        q, v = (part(x).unflatten(-1, (self.heads, E)).transpose(1, 2) for part in (self.query_key, self.value))
        order = self._order(q.detach(), rotations.to(q.dtype), ends)
        places = order.unflatten(-1, (-1, M)).flatten(2, 3)  # [B, H, R * C, M]
        before = previous(ends, self.rounds, x.shape[1] // M, M)[:, None, :, None].expand_as(places)
        seen = torch.cat((places.gather(2, before), places), -1)

        def at(t: Tensor, where: Tensor) -> Tensor:
            """t ``[B, H, T, E]`` at places ``[B, H, R * C, n]``: ``[B * H * R * C, 1, n, E]``."""
            return t.gather(2, where.flatten(2)[..., None].expand(-1, -1, -1, E)).view(-1, 1, where.shape[-1], E)

        others = seen[..., None, :] < places[..., None]
        if not self.causal:
            others = (seen[..., None, :] != places[..., None]) & (seen[..., None, :] < ends[:, None, None, None, None])
        k = q * (q.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        rate = self.attention_dropout if self.training else 0.0
        mask = others.view(-1, 1, M, 2 * M)
        y, lse = attention(at(q, places), at(k, seen), at(v, seen), attn_mask=mask, dropout_p=rate, return_lse=True)
        back = order.argsort(-1)
        lses = lse.view(order.shape).gather(-1, back).unbind(2)
        ys = y.view(*order.shape, E).gather(3, back[..., None].expand(-1, -1, -1, -1, E)).unbind(2)
        y, lse = ys[0], lses[0]
        for of_round, lse_of_round in zip(ys[1:], lses[1:], strict=True):
            y, lse = merge_attention(y, lse, of_round, lse_of_round)
        y = torch.where((lse == -torch.inf)[..., None], v, y)
        return self.out(y[:, :, :T].transpose(1, 2).flatten(2))

    def _order(self, q: Tensor, rotations: Tensor, ends: Tensor) -> Tensor:
        """Places ``[B, H, R, T]`` by bucket, in a bucket by place; those beyond a row's end last."""
        rotated = torch.einsum("bhte,hern->bhrtn", q, rotations)
        found = torch.cat((rotated, -rotated), -1).argmax(-1)
        beyond = torch.arange(q.shape[2], device=q.device) >= ends[:, None, None, None]
        return found.masked_fill(beyond, self.buckets).argsort(dim=-1, stable=True)


def previous(ends: Tensor, rounds: int, chunks: int, length: int) -> Tensor:
    """``[B, R * C]``: the chunk before each; before the first of a round the last with tokens of the round before."""
    own = torch.arange(rounds * chunks, device=ends.device).view(rounds, chunks)
    last = ((ends + length - 1) // length - 1).clamp(min=0)
    first = own[:, 0].roll(1) + last[:, None]
    return torch.cat((first[..., None], own[:, :-1].expand(len(ends), -1, -1)), -1).flatten(1)


class Attend(nn.Module):
    def __init__(self, attention: HashedAttention) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(attention.width), attention

    def forward(self, x: Tensor, rotations: Tensor, lengths: Tensor | None) -> Tensor:
        return self.attention(self.norm(x), rotations, lengths)


class Reformer(nn.Module):
    """A stack of reversible blocks of hashed attention and a feed-forward, on vectors that have their positions in them.

    What differs from the paper: the feed-forward is not cut into parts of the sequence; both halves begin as the input, and their
    mean is normalized at the end; there is no dropout, which the way back could not repeat.

    Args:
        width, heads, chunk, buckets, rounds, causal: as of `HashedAttention`.
        depth: blocks.
        feedforward: its inner width; None: 4 W.

    Raises:
        ValueError: if an argument has a value that is not accepted. TypeError: if a size is no int.
    """

    def __init__(
        self, width: int, heads: int, depth: int, *, chunk: int, buckets: int, rounds: int = 1, causal: bool = True,
        feedforward: int | None = None
    ) -> None:  # fmt: skip
        super().__init__()
        inner = 4 * width if feedforward is None else feedforward
        check_sizes(depth=depth, feedforward=inner)
        blocks = []
        for _ in range(depth):
            hashed = HashedAttention(width, heads, chunk=chunk, buckets=buckets, rounds=rounds, causal=causal)
            feed = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
            blocks.append(ReversibleBlock(Attend(hashed), feed))
        self.width, self.blocks, self.norm = width, nn.ModuleList(blocks), nn.LayerNorm(width)

    def rotations(self) -> list[Tensor]:
        """New ones for each block, as `HashedAttention.rotations`."""
        return [block.f.attention.rotations() for block in cast(Iterable[Any], self.blocks)]

    def forward(self, x: Tensor, rotations: list[Tensor] | None = None, lengths: Tensor | None = None) -> Tensor:
        """``[B, T, W]`` from x likewise; rotations (one of each block), lengths and errors as of `HashedAttention`."""
        check_input(x, None, None, self.width)
        check_lengths(lengths, x)
        rotations = self.rotations() if rotations is None else rotations
        if len(rotations) != len(self.blocks):
            raise RuntimeError(f"rotations must be {len(self.blocks)}, one for each block, got {len(rotations)}")
        first, second = reversible(self.blocks, x, x, [(of_block, lengths) for of_block in rotations])
        return self.norm((first + second) / 2)
