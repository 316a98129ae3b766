"""The Transformer: encoder, decoder with a cache of keys and values, and both on tokens.

Letters: B batch, S source and T target tokens, W width, H heads, E features of a head, N room in the cache, V words.

What differs from the paper (Vaswani et al., 2017): norms stand before the sublayers and once more at the end, unless
``norm="post"``; sinusoids may stand in halves, positions may be learned; nothing is dropped unless a rate is named, and the rates
of the attention's weights and of the inner layer are not the paper's. There is one vocabulary for source and target. A decoder
without a source is GPT's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._configuration import check_sizes, check_state
from .blocks import Block
from .positions import Embedding

__all__ = ["Decoder", "Encoder", "EncoderDecoder", "State"]


class State(NamedTuple):
    """What a decoder keeps: of every layer the keys and values of the tokens so far, written in place."""

    keys: tuple[Tensor, ...]  # [B, N, H, E] each
    values: tuple[Tensor, ...]  # likewise
    past: Tensor  # int64 [B]: tokens so far
    source: tuple[tuple[Tensor, ...], ...]  # of every layer the keys and values of the source, [B, S, H, E]; () without one
    lengths: Tensor | None  # [B], of the source


class Encoder(nn.Module):
    """Blocks that see the whole sequence; `final` is a norm at the end, which blocks with theirs before need.

    Args:
        blocks: one after the other, each of which attends in both directions.
        final: a norm at the end; None: none.
    """

    def __init__(self, blocks: Sequence[Block], final: nn.Module | None = None) -> None:
        super().__init__()
        self.blocks: Any = nn.ModuleList(blocks)
        self.final = nn.Identity() if final is None else final

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x [B, S, W], lengths [B]: [B, S, W]; what comes of padding is to be ignored."""
        for block in self.blocks:
            x = block(x, lambda y, attend=block.attention: attend(y, lengths=lengths))
        return self.final(x)


class Decoder(nn.Module):
    """Blocks that see what came before, and a source if they have `cross`; `final` as an encoder takes it.

    Args:
        blocks: one after the other.
        final: a norm at the end; None: none.
    """

    def __init__(self, blocks: Sequence[Block], final: nn.Module | None = None) -> None:
        super().__init__()
        self.blocks: Any = nn.ModuleList(blocks)
        self.final = nn.Identity() if final is None else final
        self.crosses = blocks[0].cross is not None

    def forward(self, x: Tensor, memory: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """x [B, T, W], memory [B, S, W] that an encoder made of a source, its lengths [B]: [B, T, W]."""
        self._check_source(memory)
        for block in self.blocks:
            answer = None if memory is None else lambda y, ask=block.cross: ask(y, ask.project(memory, 1, 3), lengths)
            x = block(x, lambda y, attend=block.attention: attend(y, causal=True), answer)
        return self.final(x)

    def start(self, batch: int, room: int, memory: Tensor | None = None, lengths: Tensor | None = None) -> State:
        """The state of B sequences before their first token, with room for N tokens each, and of their source."""
        check_sizes(batch=batch, room=room)
        self._check_source(memory)
        like, heads = self.blocks[0].attention.projection.weight, self.blocks[0].attention.heads
        shape = (batch, room, heads, like.shape[1] // heads)
        keys, values = (tuple(like.new_zeros(shape) for _ in self.blocks) for _ in range(2))
        source = () if memory is None else tuple(block.cross.project(memory, 1, 3) for block in self.blocks)
        return State(keys, values, torch.zeros(batch, dtype=torch.int64, device=like.device), source, lengths)

    def read(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """The next T steps at once, x [B, T, W], of sequences that need not be of one length: [B, T, W]. Without gradients."""
        self.check(state, x)
        for number, block in enumerate(self.blocks):
            cache = (state.keys[number], state.values[number], state.past)
            answer = None
            if state.source:
                answer = lambda y, ask=block.cross, source=state.source[number]: ask(y, source, state.lengths)  # noqa: E731
            x = block(x, lambda y, attend=block.attention, cache=cache: attend.read(y, *cache), answer)
        return self.final(x), state._replace(past=state.past + x.shape[1])

    def _check_source(self, memory: Tensor | None) -> None:
        if (memory is not None) != self.crosses:
            raise RuntimeError(f"memory must be {'a tensor [B, S, W]' if self.crosses else 'None'} for these blocks")

    def check(self, state: State, x: Tensor) -> None:
        """Raise unless the state is of these blocks, for as many rows as x [B, T, W] has."""
        batch, heads, room = len(x), self.blocks[0].attention.heads, state.keys[0].shape[1]
        shape, layers = (batch, room, heads, x.shape[-1] // heads), len(self.blocks)
        check_state(state.keys, [shape] * layers, x, "state.keys")
        check_state(state.values, [shape] * layers, x, "state.values")
        of_source = (batch, None, heads, x.shape[-1] // heads)
        check_state(state.source, [[of_source] * 2] * layers if self.crosses else [], x, "state.source")
        if state.past.shape != (batch,):
            raise RuntimeError(f"state.past must be [{batch}] for this batch, got {list(state.past.shape)}")


class EncoderDecoder(nn.Module):
    """From the tokens of a source to logits of a target's.

    Args:
        words: V, size of the vocabulary.
        width: W.
        heads: H, a divisor of W.
        inner: width of the feed-forward.
        layers: number of blocks, of the encoder and of the decoder.
        positions: "interleaved" or "halves", sinusoids; or "learned".
        longest: learned positions, in source and target.
        tied: one table of vectors for source, target and output, as in the paper; else three.
        norm: "pre" or "post".
        activation: "relu", "gelu" or "gelu_tanh", of the feed-forward.
        eps: of the layer norms.
        dropout: of what each sub-layer adds and of the embeddings, in training alone.
        attention_dropout: of attention's weights, in training alone.
        inner_dropout: inside the feed-forward, in training alone.
    """

    def __init__(
        self, words: int, width: int, heads: int, inner: int, layers: int, *, positions: str = "interleaved", longest: int = 512,
        tied: bool = True, norm: str = "pre", activation: str = "relu", eps: float = 1e-5,
        dropout: float = 0.0, attention_dropout: float = 0.0, inner_dropout: float = 0.0
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(layers=layers)

        def blocks(cross: bool) -> list[Block]:
            rates: Any = {"dropout": dropout, "attention_dropout": attention_dropout, "inner_dropout": inner_dropout}
            options: Any = {"norm": norm, "activation": activation, "eps": eps}
            return [Block(width, heads, inner, cross=cross, **options, **rates) for _ in range(layers)]

        finals = [None if norm == "post" else nn.LayerNorm(width, eps) for _ in range(2)]
        self.encoder, self.decoder = Encoder(blocks(False), finals[0]), Decoder(blocks(True), finals[1])
        self.source, self.target = (Embedding(words, width, positions, longest, width**0.5, dropout) for _ in range(2))
        self.output = nn.Linear(width, words, bias=False)
        if tied:
            nn.init.normal_(self.output.weight, std=width**-0.5)  # times the root of the width it is of order 1
            self.source.tokens.weight = self.target.tokens.weight = self.output.weight

    def forward(self, source: Tensor, target: Tensor, lengths: Tensor | None = None) -> Tensor:
        """source int [B, S] with lengths [B], target int [B, T], each the token before the one to be said: logits [B, T, V]."""
        return self.output(self.decoder(self.target(target), self.encoder(self.source(source), lengths), lengths))

    def start(self, source: Tensor, room: int, lengths: Tensor | None = None) -> State:
        """The state before the first of up to N target tokens."""
        self.target.check_room(room)
        return self.decoder.start(len(source), room, self.encoder(self.source(source), lengths), lengths)

    def read(self, target: Tensor, state: State) -> tuple[Tensor, State]:
        """The next target tokens int [B, T]: logits [B, T, V], as `forward` gives them, and the state then. Without gradients."""
        x, state = self.decoder.read(self.target(target, state.past), state)
        return self.output(x), state

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """token int [B]: logits [B, V] of the one after it, and the state then."""
        logits, state = self.read(token[:, None], state)
        return logits[:, 0], state
