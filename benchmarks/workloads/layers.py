"""The layers that stand beside the recurrent ones, written as a PyTorch user writes them.

"Equal" in these benchmarks means: the same number of rows B, the same T, the same width, the same input,
causal (a position sees its own past, as in a recurrence), projections included on both sides. Parameters at
width W, biases aside: LSTM 8 W², GRU 6 W², minGRU 2 W², attention 4 W² (query, key, value, output), block 8 W²
(attention and a feed-forward part of inner width 2 W), so that the block is the attention model with the
parameters of an LSTM.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Causal multi-head self-attention: [B, T, W] -> [B, T, W].

    `fused`: a function with the signature of scaled_dot_product_attention, or True for that one; else scores and softmax are
    materialized as [B, heads, T, T].
    """

    def __init__(self, width: int, heads: int, *, fused: bool | Callable[..., Tensor]) -> None:
        super().__init__()
        self.heads = heads
        self.fused = F.scaled_dot_product_attention if fused is True else fused
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return self.join(self.fused(q, k, v, is_causal=True) if self.fused else materialized(q, k, v))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key, value: [B, heads, T, W / heads] each."""
        B, T, W = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def join(self, y: Tensor) -> Tensor:
        """[B, heads, T, W / heads] -> [B, T, W]."""
        return self.out(y.transpose(1, 2).flatten(2))


def materialized(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> Tensor:
    """Attention with every score in memory; the last query stands at the last key."""
    T, S = q.shape[2], k.shape[2]
    scores = (q / math.sqrt(q.shape[3])) @ k.transpose(-1, -2)
    if causal:
        scores.masked_fill_(torch.ones(T, S, dtype=torch.bool, device=q.device).triu(1 + S - T), -math.inf)
    return scores.softmax(-1) @ v


class TransformerBlock(nn.Module):
    """Pre-norm block with as many parameters as an LSTM layer of the same width: [B, T, W] -> [B, T, W]."""

    def __init__(self, width: int, heads: int, *, fused: bool | Callable[..., Tensor]) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, fused=fused)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.feed_forward(x + self.attention(self.attention_norm(x)))

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.feed_forward_norm(x))))


class CellLoop(nn.Module):
    """An nn cell called once per step from Python: [T, B, I] -> [T, B, H]."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def canonical_name(self, name: str) -> str:
        """Name of the same parameter in the nn layer: cell.weight_ih -> weight_ih_l0."""
        return name.removeprefix("cell.") + "_l0"

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for step in x.unbind(0):
            state = self.cell(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs)
