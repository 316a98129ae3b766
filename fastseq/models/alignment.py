"""What a recurrent decoder asks of a source: the scores of Luong and of Bahdanau, one head.

Letters: B batch, T queries, S source tokens, H features of a query, M features of the memory.

What differs from the papers (Luong et al., 2015; Bahdanau et al., 2015): the additive score, v.tanh(W s + U h), is one function
here, Luong's "concat" with its matrix in two halves. Luong's local window is not here. No score has a bias.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastseq.functional import attention

from ._configuration import check_choice, check_sizes

__all__ = ["Alignment"]

SCORES = ("dot", "general", "additive")


class Alignment(nn.Module):
    """softmax(score(query, memory)) memory, by "dot" (s.h), "general" (s.W h) or "additive" (v.tanh(W s + U h)).

    The additive score needs [B, T, S, H] numbers, and so more memory with T queries at once than with one.

    Args:
        hidden: H, features of a query.
        memory: M, features of what it looks at.
        score: "dot", "general" or "additive".
    """

    def __init__(self, hidden: int, memory: int, score: str = "general") -> None:
        super().__init__()
        check_sizes(hidden=hidden, memory=memory)
        check_choice("score", score, SCORES)
        self.score = score
        if score == "dot" and memory != hidden:
            raise ValueError(f"score 'dot' needs memory features as many as hidden ones, got memory={memory} and hidden={hidden}")
        self.key = nn.Identity() if score == "dot" else nn.Linear(memory, hidden, bias=False)
        if score == "additive":
            self.query, self.energy = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, 1, bias=False)

    def keys(self, memory: Tensor) -> Tensor:
        """memory [B, S, M]: what the scores see of it, [B, S, H]; once for a source."""
        return self.key(memory)

    def forward(self, query: Tensor, keys: Tensor, memory: Tensor, lengths: Tensor | None = None) -> Tensor:
        """query [B, T, H], keys [B, S, H], memory [B, S, M], lengths int [B] of the sources: contexts [B, T, M]."""
        keys, memory = keys[:, None], memory[:, None]  # [B, 1, S, ..]
        if self.score != "additive":
            return attention(query[:, None], keys, memory, scale=1.0, seqlens_k=lengths)[:, 0]
        scores = self.energy(torch.tanh(self.query(query)[:, :, None] + keys)).squeeze(-1)[:, None]  # [B, 1, T, S]
        nothing = scores.new_zeros(*scores.shape[:2], max(scores.shape[2:]), 1)  # no products: the scores are the bias
        q, k = nothing[:, :, : scores.shape[2]], nothing[:, :, : scores.shape[3]]
        return attention(q, k, memory, attn_bias=scores, seqlens_k=lengths)[:, 0]
