"""Where a token stands: sinusoids, or learned vectors.

What differs from the paper (Vaswani et al., 2017): sinusoids may stand in halves, sines then cosines, as tensor2tensor,
Transformer-XL and fairseq have them; that is another order of features, which matters with weights from elsewhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastseq.functional import require_whole_sequence, sequence_places

from ._configuration import check_choice, check_rates, check_sizes

__all__ = ["Embedding", "sinusoids"]


def sinusoids(places: Tensor, width: int, layout: str = "interleaved", dtype: torch.dtype = torch.float32) -> Tensor:
    """``[.., W]`` for places ``[..]``: sines and cosines in turn, or with layout "halves" the sines first.

    Args:
        places: ``[..]``.
        width: W, even.
        layout: "interleaved" or "halves".
        dtype: of the result.
    """
    check_choice("layout", layout, ("interleaved", "halves"))
    if width % 2:
        raise ValueError(f"width must be even for sinusoids, got {width}")
    wide = torch.promote_types(dtype, torch.float32)
    rates = torch.exp(torch.arange(0, width, 2, device=places.device, dtype=wide) * (-math.log(10000) / width))
    angles = places[..., None].to(wide) * rates
    both = (angles.sin(), angles.cos())
    return (torch.stack(both, -1).flatten(-2) if layout == "interleaved" else torch.cat(both, -1)).to(dtype)


class Embedding(nn.Module):
    """Tokens and their places: the token's vector times `scale`, plus sinusoids or learned vectors of `longest` places.

    Args:
        words: V, size of the vocabulary.
        width: W.
        positions: "interleaved" or "halves", sinusoids; "learned"; or "none".
        longest: learned places.
        scale: of the token's vector.
        dropout: of the sum, in training alone.
    """

    def __init__(
        self, words: int, width: int, positions: str = "interleaved", longest: int = 512, scale: float = 1.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_sizes(words=words, width=width, longest=longest)
        check_choice("positions", positions, ("interleaved", "halves", "learned", "none"))
        check_rates(dropout=dropout)
        self.positions, self.scale, self.dropout = positions, scale, nn.Dropout(dropout)
        self.tokens = nn.Embedding(words, width)
        self.places = nn.Embedding(longest, width) if positions == "learned" else None

    def forward(self, tokens: Tensor, before: Tensor | None = None) -> Tensor:
        """tokens int [B, T], before which `before` int [B] (None: 0) others have gone: [B, T, W]."""
        x, (places, total) = self.tokens(tokens) * self.scale, sequence_places(tokens.shape[1], device=tokens.device)
        if before is not None:
            require_whole_sequence("what follows other tokens")
            if before.shape != tokens.shape[:1]:
                raise RuntimeError(f"a state of {len(before)} rows goes with {len(before)} rows of tokens, got {len(tokens)}")
            places = places + before[:, None]
        if self.places is not None:
            self.check_room(total)
            x = x + self.places(places)
        elif self.positions != "none":
            x = x + sinusoids(places, x.shape[-1], self.positions, x.dtype)
        return self.dropout(x)

    def check_room(self, tokens: int) -> None:
        """Raise if there is no place for so many tokens."""
        if self.places is not None and tokens > self.places.num_embeddings:
            raise ValueError(f"there are {self.places.num_embeddings} learned places (longest), got {tokens} tokens")
