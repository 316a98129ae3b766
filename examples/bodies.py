"""Causal networks on vectors, [B, T, W] to [B, T, W], by name: what a program puts between its first and its last layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastseq.models import TCN, BlockRecurrent, Hybrid, LinearRecurrent, Reformer
from fastseq.models.blocks import Block
from fastseq.models.positions import sinusoids
from fastseq.models.transformer import Decoder


class Sizes(NamedTuple):
    """Width W, heads, layers, and the length of the sequences."""

    width: int
    heads: int
    layers: int
    length: int


class WithPlaces(nn.Module):
    """Sinusoids, then a network without a state, which has no other order."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, **more: Any) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        return self.network(x + sinusoids(places, x.shape[-1], dtype=x.dtype), **more)


def recurrent(kind: type[nn.RNNBase]) -> Callable[[Sizes], nn.Module]:
    return lambda s: kind(s.width, s.width, s.layers, batch_first=True)


def blocks(s: Sizes) -> list[Block]:
    return [Block(s.width, s.heads, 2 * s.width) for _ in range(s.layers)]


BODIES: dict[str, Callable[[Sizes], nn.Module]] = {
    "lstm": recurrent(nn.LSTM),
    "gru": recurrent(nn.GRU),
    "rnn": recurrent(nn.RNN),
    "linear_recurrent": lambda s: LinearRecurrent(s.width, s.layers, feedforward=2 * s.width),
    "tcn": lambda s: TCN(s.width, [s.width] * 4, 4),
    "hybrid": lambda s: Hybrid(s.width, s.heads, s.layers, feedforward=2 * s.width),
    "block_recurrent": lambda s: BlockRecurrent(s.width, s.heads, s.layers, block=s.length // 2, states=8),
    "transformer": lambda s: WithPlaces(Decoder(blocks(s), nn.LayerNorm(s.width))),
    "reformer": lambda s: WithPlaces(
        Reformer(s.width, s.heads, s.layers, chunk=8, buckets=2 * (s.length // 8), rounds=2, feedforward=2 * s.width)
    ),
}
JUMPING = ("reformer",)  # a rounding may decide in which bucket a token falls


def output_of(body: nn.Module, x: Tensor) -> Tensor:
    """[B, T, W], without the state that some give back as well."""
    y = body(x)
    return y[0] if isinstance(y, tuple) else y
