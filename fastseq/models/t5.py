"""T5: an encoder-decoder whose only positions are a learned bias by distance.

Letters: B batch, S source and T target tokens, W width, H heads, N room in the cache, V words.

What differs from the paper (Raffel et al., 2020): E = W / H, so that the projections are square; nothing is dropped unless a rate
is named. As there: scores are not scaled, norms are of the root mean square, no layer has a bias, the head is the table of words.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastseq.functional import require_whole_sequence, sequence_places, t5_relative_bias

from ._configuration import check_sizes
from .blocks import Attention, Block
from .positions import Embedding
from .transformer import Decoder, Encoder, State

__all__ = ["T5"]


class T5(nn.Module):
    """From the tokens of a source to logits of a target's.

    Args:
        words: V, size of the vocabulary.
        width: W.
        heads: H, a divisor of W.
        inner: width of the feed-forward.
        layers: number of blocks, of the encoder and of the decoder.
        buckets, farthest: of distances, num_buckets and max_distance of :func:`fastseq.functional.t5_relative_bias`.
        eps: of the norms.
        dropout: of what each sub-layer adds and of the embeddings, in training alone.
        attention_dropout: of attention's weights, in training alone.
        inner_dropout: inside the feed-forward, in training alone.
    """

    def __init__(
        self, words: int, width: int, heads: int, inner: int, layers: int, *, buckets: int = 32, farthest: int = 128,
        eps: float = 1e-6, dropout: float = 0.0, attention_dropout: float = 0.0, inner_dropout: float = 0.0
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(layers=layers, buckets=buckets, farthest=farthest)

        def blocks(cross: bool) -> list[Block]:
            options: Any = {"kind": "rms", "bias": False, "scale": 1.0, "eps": eps, "dropout": dropout}
            rates: Any = {"attention_dropout": attention_dropout, "inner_dropout": inner_dropout}
            return [Block(width, heads, inner, cross=cross, **options, **rates) for _ in range(layers)]

        self.encoder = Encoder(blocks(False), nn.RMSNorm(width, eps))
        self.decoder = Decoder(blocks(True), nn.RMSNorm(width, eps))
        self.embedding, self.dropout = Embedding(words, width, "none", dropout=dropout), nn.Dropout(dropout)
        self.encoder_bias, self.decoder_bias = nn.Embedding(buckets, heads), nn.Embedding(buckets, heads)  # by distance
        self.buckets: Any = {"num_buckets": buckets, "max_distance": farthest}
        for parameter in self.parameters():  # each as its inputs are many; the embedding is of order 1
            if parameter.dim() > 1 and parameter is not self.embedding.tokens.weight:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        for bias in (self.encoder_bias, self.decoder_bias):
            nn.init.normal_(bias.weight, std=width**-0.5)
        for module in self.modules():
            if isinstance(module, Attention):  # queries are smaller, as no score is scaled
                nn.init.normal_(module.projection.weight[:width], std=(width * (width // heads)) ** -0.5)

    def encode(self, source: Tensor, lengths: Tensor | None = None) -> Tensor:
        """source int [B, S] with lengths [B]: [B, S, W]."""
        steps = sequence_places(source.shape[1])[1]
        x, relative = self.embedding(source), t5_relative_bias(self.encoder_bias.weight, steps, steps, **self.buckets)
        for block in self.encoder.blocks:
            x = block(x, lambda y, ask=block.attention: ask(y, lengths=lengths, relative=relative))
        return self.dropout(self.encoder.final(x))

    def forward(self, source: Tensor, target: Tensor, lengths: Tensor | None = None) -> Tensor:
        """source int [B, S] with lengths [B], target int [B, T], each the token before the one to be said: logits [B, T, V]."""
        memory, x = self.encode(source, lengths), self.embedding(target)
        relative = self._before(sequence_places(target.shape[1])[1])
        for block in self.decoder.blocks:
            x = block(
                x,
                lambda y, ask=block.attention: ask(y, causal=True, relative=relative),
                lambda y, ask=block.cross: ask(y, ask.project(memory, 1, 3), lengths),
            )
        return self._logits(x)

    def start(self, source: Tensor, room: int, lengths: Tensor | None = None) -> State:
        """The state before the first of up to N target tokens."""
        return self.decoder.start(len(source), room, self.encode(source, lengths), lengths)

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """token int [B]: logits [B, V] of the one after it, and the state then, whose keys and values are written in place."""
        require_whole_sequence("a step from a state")
        x = self.embedding(token[:, None])
        self.decoder.check(state, x)
        relative = self._before(state.keys[0].shape[1])

        for block, keys, values, source in zip(self.decoder.blocks, state.keys, state.values, state.source, strict=True):
            x = block(
                x,
                lambda y, ask=block.attention, cache=(keys, values): ask.read(y, *cache, state.past, relative),
                lambda y, ask=block.cross, source=source: ask(y, source, state.lengths),
            )
        return self._logits(x)[:, 0], state._replace(past=state.past + 1)

    def _before(self, steps: int) -> tuple[Tensor, int]:
        """The decoder's bias by distances -(steps - 1) .. 0."""
        return t5_relative_bias(self.decoder_bias.weight, steps, 1, bidirectional=False, **self.buckets)

    def _logits(self, x: Tensor) -> Tensor:
        return self.dropout(self.decoder.final(x)) * x.shape[-1] ** -0.5 @ self.embedding.tokens.weight.T
