"""Transformer-XL: a language model whose layers also see what they saw in the segments before, by distance.

Letters: B batch, T tokens of a segment, M of the memory, K = M + T keys, W width, H heads, E = W / H, V words.

What differs from the paper (Dai et al., 2019): norms stand before the sublayers and once more at the end, unless ``norm="post"``,
which is the paper's. `same_length` lets every token see the last `memory` ones, itself among them, as the authors do in
evaluation only: then the cut into segments changes nothing, and a step is what the whole sequence gives. False: all of memory and
segment. u and v are shared by the layers. The memory begins empty, as theirs; that of transformers begins with zeros, which get
weight. The output is one softmax.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseq.functional import require_whole_sequence, transformer_xl_attention

from ._configuration import check_choice, check_heads, check_rates, check_sizes, check_state
from .positions import sinusoids

__all__ = ["TransformerXL"]

State = tuple[Tensor, ...]  # of every layer what came into it, [B, M, W], without gradients


class Layer(nn.Module):
    """Attention by distance to memory and segment, two linear layers."""

    def __init__(self, width: int, heads: int, inner: int, post: bool, eps: float, rates: tuple[float, float, float]) -> None:
        super().__init__()
        self.heads, self.post, self.attention_dropout, self.dropout = heads, post, rates[1], nn.Dropout(rates[0])
        self.projection, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.relative = nn.Linear(width, width, bias=False)
        self.inner = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Dropout(rates[2]), nn.Linear(inner, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps) for _ in range(2))

    def forward(self, x: Tensor, memory: Tensor, r: Tensor, u: Tensor, v: Tensor, window: int | None) -> Tensor:
        """x [B, T, W], memory [B, M, W], r [K, W] from the farthest distance to 0, u and v [H, E]: [B, T, W]."""
        if self.post:
            x = self.norms[0](x + self._attend(x, torch.cat([memory, x], 1), r, u, v, window))
            return self.norms[1](x + self.dropout(self.inner(x)))
        seen = self.norms[0](torch.cat([memory, x], 1))
        x = x + self._attend(seen[:, memory.shape[1] :], seen, r, u, v, window)
        return x + self.dropout(self.inner(self.norms[1](x)))

    def _attend(self, x: Tensor, seen: Tensor, r: Tensor, u: Tensor, v: Tensor, window: int | None) -> Tensor:
        of_query, of_others = self.projection.weight.split([x.shape[-1], 2 * x.shape[-1]])
        query = F.linear(x, of_query).unflatten(-1, (self.heads, -1))  # [B, T, H, E]
        key, value = F.linear(seen, of_others).unflatten(-1, (2, self.heads, -1)).unbind(2)  # [B, K, H, E]
        r = self.relative(r).unflatten(-1, (self.heads, -1)).transpose(0, 1)  # [H, K, E]
        rate = self.attention_dropout if self.training else 0.0
        out = transformer_xl_attention(query, key, value, r, u, v, layout="bshd", window_size=(window, None), dropout_p=rate)
        return self.dropout(self.out(out.flatten(2)))


class TransformerXL(nn.Module):
    """Logits of the next token, segment after segment.

    Args:
        words: V, size of the vocabulary.
        width: W.
        heads: H, a divisor of W.
        inner: width of the feed-forward.
        layers: number of blocks.
        memory: how many tokens are kept of the segments before.
        same_length: every token sees the last `memory` ones, itself among them; False: all that is there.
        clamp: distances beyond count as this one. None: as they are.
        tied: one table for the input and the output.
        norm: "pre" or "post".
        eps: of the layer norms.
        dropout: of what each sub-layer adds and of the embeddings, in training alone.
        attention_dropout: of attention's weights, in training alone.
        inner_dropout: inside the feed-forward, in training alone.
    """

    def __init__(
        self, words: int, width: int, heads: int, inner: int, layers: int, memory: int, *, same_length: bool = True,
        clamp: int | None = None, tied: bool = True, norm: str = "pre", eps: float = 1e-5,
        dropout: float = 0.0, attention_dropout: float = 0.0, inner_dropout: float = 0.0
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(words=words, inner=inner, layers=layers, memory=memory, clamp=1 if clamp is None else clamp)
        check_heads(width, heads)
        check_choice("norm", norm, ("pre", "post"))
        check_rates(dropout=dropout, attention_dropout=attention_dropout, inner_dropout=inner_dropout)
        self.memory, self.window, self.clamp = memory, memory - 1 if same_length else None, clamp
        self.embedding, self.output = nn.Embedding(words, width), nn.Linear(width, words, bias=False)
        rates = (dropout, attention_dropout, inner_dropout)
        self.layers = nn.ModuleList(Layer(width, heads, inner, norm == "post", eps, rates) for _ in range(layers))
        self.u, self.v = (nn.Parameter(torch.zeros(heads, width // heads)) for _ in range(2))
        self.final, self.dropout = nn.Identity() if norm == "post" else nn.LayerNorm(width, eps), nn.Dropout(dropout)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)  # times the root of the width it is of order 1
        if tied:
            self.output.weight = self.embedding.weight

    def start(self, batch: int) -> State:
        """Memories of B sequences before their first token: empty."""
        check_sizes(batch=batch)
        return tuple(self.embedding.weight.new_zeros(batch, 0, self.embedding.embedding_dim) for _ in self.layers)

    def forward(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """tokens int [B, T] behind those of the state: logits [B, T, V], and the memories then, which pass no gradient."""
        require_whole_sequence("a segment behind its memory")
        self._check(state, len(tokens))
        width, total = self.embedding.embedding_dim, state[0].shape[1] + tokens.shape[1]
        x = self.dropout(self.embedding(tokens) * width**0.5)
        farthest = total if self.clamp is None else self.clamp
        distances = torch.arange(total - 1, -1, -1, device=tokens.device).clamp(max=farthest)
        r, after = self.dropout(sinusoids(distances, width, "halves", x.dtype)), []
        for layer, memory in zip(self.layers, state, strict=True):
            after.append(torch.cat([memory, x.detach()], 1)[:, -self.memory :])
            x = layer(x, memory, r, self.u, self.v, self.window)
        return self.output(self.dropout(self.final(x))), tuple(after)

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """token int [B]: logits [B, V] of the one after it, and the memories then."""
        logits, state = self(token[:, None], state)
        return logits[:, 0], state

    def _check(self, state: State, batch: int) -> None:
        kept = state[0].shape[1] if isinstance(state, tuple) and state and state[0].dim() == 3 else 0
        check_state(state, [(batch, kept, self.embedding.embedding_dim)] * len(self.layers), self.embedding.weight)
        if kept > self.memory:
            raise RuntimeError(f"state must be of at most {self.memory} tokens (memory), got {kept}")
