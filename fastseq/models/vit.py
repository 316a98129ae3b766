"""The Vision Transformer: an encoder on patches of an image.

Letters: B batch, I channels, P patches, W width.

What differs from the paper (Dosovitskiy et al., 2021): images are square and of one size; nothing is dropped unless
a rate is named.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastseq.functional import require_whole_sequence

from ._configuration import check_input, check_sizes
from .blocks import Block
from .transformer import Encoder

__all__ = ["ViT"]


class ViT(nn.Module):
    """Classes of images: patches by one linear map, a token of the class before them, learned places, norms before, GELU.

    Args:
        size, patch: of an image and of a patch, in pixels; patch divides size.
        channels: of an image.
        classes: of the head on the class token.
        width: W.
        heads: H, a divisor of W.
        layers: number of blocks.
        inner: of the linear layers; None: 4 W.
        eps: of the layer norms.
        dropout: of what each sub-layer adds and of the embeddings, in training alone.
        attention_dropout: of attention's weights, in training alone.
    """

    def __init__(
        self, size: int, patch: int, channels: int, classes: int, width: int, heads: int, layers: int, *,
        inner: int | None = None, eps: float = 1e-6, dropout: float = 0.0, attention_dropout: float = 0.0
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(size=size, patch=patch, channels=channels, classes=classes, width=width, layers=layers)
        if size % patch:
            raise ValueError(f"patch must divide size ({size}), got {patch}")
        self.sizes, self.dropout = (channels, size, size), nn.Dropout(dropout)
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width) * 0.02)
        inner = 4 * width if inner is None else inner
        options: Any = {"activation": "gelu", "eps": eps, "dropout": dropout, "attention_dropout": attention_dropout}
        self.encoder = Encoder([Block(width, heads, inner, **options) for _ in range(layers)], nn.LayerNorm(width, eps))
        self.head = nn.Linear(width, classes)

    def features(self, images: Tensor) -> Tensor:
        """images [B, I, size, size]: [B, 1 + P, W], the class token first."""
        require_whole_sequence("an image with its class token")
        check_input(images, None, *self.sizes)
        x = self.patches(images).flatten(2).transpose(1, 2)  # [B, P, W]
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.encoder(self.dropout(x + self.places))

    def forward(self, images: Tensor) -> Tensor:
        """images [B, I, size, size]: logits [B, classes]."""
        return self.head(self.features(images)[:, 0])
