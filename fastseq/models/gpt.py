"""GPT-2: the Transformer's decoder without a source.

Letters: B batch, T tokens, W width, N room in the cache, V words.

What differs from the paper (Radford et al., 2019): nothing is dropped unless a rate is named; there is no tokenizer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._configuration import check_sizes
from .blocks import Block
from .positions import Embedding
from .transformer import Decoder, State

__all__ = ["GPT"]


class GPT(nn.Module):
    """Logits of the next token: learned places, norms before, GELU by tanh, one table for input and output.

    Args:
        words: V, size of the vocabulary.
        width: W.
        heads: H, a divisor of W.
        layers: number of blocks.
        longest: places.
        inner: of the linear layers; None: 4 W.
        eps: of the layer norms.
        dropout: of what each sub-layer adds and of the embeddings, in training alone.
        attention_dropout: of attention's weights, in training alone.
    """

    def __init__(
        self, words: int, width: int, heads: int, layers: int, longest: int = 1024, *,
        inner: int | None = None, eps: float = 1e-5, dropout: float = 0.0, attention_dropout: float = 0.0
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(layers=layers)
        self.embedding = Embedding(words, width, "learned", longest, dropout=dropout)
        options: Any = {"activation": "gelu_tanh", "eps": eps, "dropout": dropout, "attention_dropout": attention_dropout}
        blocks = [Block(width, heads, 4 * width if inner is None else inner, **options) for _ in range(layers)]
        self.decoder, self.output = Decoder(blocks, nn.LayerNorm(width, eps)), nn.Linear(width, words, bias=False)
        self.output.weight = self.embedding.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:  # those that end on the way around the blocks are smaller the more blocks there are
                ends = name.endswith(("attention.out.weight", "inner.3.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if ends else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int [B, T]: logits [B, T, V]."""
        return self.output(self.decoder(self.embedding(tokens)))

    def start(self, batch: int, room: int) -> State:
        """The state of B sequences before their first token, with room for N tokens each."""
        self.embedding.check_room(room)
        return self.decoder.start(batch, room)

    def read(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """The next tokens int [B, T]: logits [B, T, V], as `forward` has them, and the state then. No gradients."""
        x, state = self.decoder.read(self.embedding(tokens, state.past), state)
        return self.output(x), state

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """token int [B]: logits [B, V] of the one after it, and the state then."""
        logits, state = self.read(token[:, None], state)
        return logits[:, 0], state
