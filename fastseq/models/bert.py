"""BERT: the Transformer's encoder, trained to say the words that were hidden from it.

Letters: B batch, T tokens, W width, V words.

What differs from the paper (Devlin et al., 2019): nothing is dropped unless a rate is named; rows end by lengths, not by a token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseq.functional import require_whole_sequence

from ._configuration import check_rates, check_sizes
from .blocks import Block
from .positions import Embedding
from .transformer import Encoder

__all__ = ["BERT"]


class BERT(nn.Module):
    """Vectors of tokens that see each other: learned places, segments, norms after, GELU.

    Args:
        words: V, size of the vocabulary.
        width: W.
        heads: H, a divisor of W.
        layers: number of blocks.
        longest: places.
        segments: kinds of segment; the paper has two, DistilBERT one.
        inner: of the linear layers; None: 4 W.
        eps: of the layer norms.
        dropout: of what each sub-layer adds and of the embeddings, in training alone.
        attention_dropout: of attention's weights, in training alone.
    """

    def __init__(
        self, words: int, width: int, heads: int, layers: int, longest: int = 512, *, segments: int = 2, inner: int | None = None,
        eps: float = 1e-12, dropout: float = 0.0, attention_dropout: float = 0.0
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(layers=layers, segments=segments)
        check_rates(dropout=dropout)
        self.embedding, self.segments = Embedding(words, width, "learned", longest), nn.Embedding(segments, width)
        self.norm, self.dropout = nn.LayerNorm(width, eps), nn.Dropout(dropout)
        inner = 4 * width if inner is None else inner
        options: Any = {
            "norm": "post",
            "activation": "gelu",
            "eps": eps,
            "dropout": dropout,
            "attention_dropout": attention_dropout,
        }
        self.encoder = Encoder([Block(width, heads, inner, **options) for _ in range(layers)])
        self.pooler, self.transform = nn.Linear(width, width), nn.Linear(width, width)
        self.transform_norm, self.output = nn.LayerNorm(width, eps), nn.Linear(width, words)
        self.output.weight = self.embedding.tokens.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """tokens int [B, T], lengths [B], segments int [B, T] (None: all 0): [B, T, W]; beyond a row's length to be ignored."""
        kinds = torch.zeros_like(tokens) if segments is None else segments
        return self.encoder(self.dropout(self.norm(self.embedding(tokens) + self.segments(kinds))), lengths)

    def words(self, x: Tensor) -> Tensor:
        """What the words were, of vectors [.., W]: logits [.., V]."""
        return self.output(self.transform_norm(F.gelu(self.transform(x))))

    def pooled(self, x: Tensor) -> Tensor:
        """One vector for a row, of [B, T, W] and its first token: [B, W]."""
        require_whole_sequence("the first token")
        return torch.tanh(self.pooler(x[:, 0]))
