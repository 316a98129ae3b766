"""Greedy and beam decoding with any model that has ``step(token [B], state) -> (logits [B, V], state)``.

Every tensor in a state has its batch first, so that the rows of a state can be picked, repeated and put in another order.

What differs from papers: hypotheses that have ended keep their place in the beam and their score; the search goes on for `steps`
tokens, without waiting for the device. `length_penalty` is alpha of Wu et al., 2016, ((5 + length) / 6)^alpha, used at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._configuration import check_sizes

__all__ = ["beam", "greedy", "rows"]

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]


def rows(state: Any, index: Tensor) -> Any:
    """The rows `index` [N] of a state: of every tensor in its tuples; what is no tensor stays as it is.

    Args:
        state: tuples of tensors [B, ..], in tuples.
        index: int64 [N], rows of B; one may come several times.
    """
    if isinstance(state, Tensor):
        return state.index_select(0, index)
    if not isinstance(state, tuple):
        return state
    picked = [rows(each, index) for each in state]
    return type(state)(*picked) if hasattr(state, "_fields") else tuple(picked)


@torch.no_grad()
def greedy(step: Step, state: Any, begin: Tensor, steps: int, *, end: int | None = None) -> Tensor:
    """The likeliest token at every step.

    Args:
        step: of a model: ``(token [B], state) -> (logits [B, V], state)``.
        state: where the first step begins.
        begin: int64 [B], the token that opens a sequence.
        steps: how many tokens are said.
        end: the token that closes one; a row that has said it says nothing else from there on.

    Returns:
        int64 [B, steps].
    """
    check_sizes(steps=steps)
    token, done, said = begin, torch.zeros_like(begin, dtype=torch.bool), []
    for _ in range(steps):
        logits, state = step(token, state)
        token = logits.argmax(-1)
        if end is not None:
            token = token.masked_fill(done, end)
            done = token == end
        said.append(token)
    return torch.stack(said, 1)


@torch.no_grad()
def beam(
    step: Step, state: Any, begin: Tensor, steps: int, *, width: int, end: int | None = None, length_penalty: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The likeliest sequences that a search over `width` hypotheses for each row finds, the best first.

    Args:
        step, state, begin, steps, end: as :func:`greedy` takes them; the step sees B * width rows.
        width: W, hypotheses kept for each row.
        length_penalty: 0: sums of log probabilities are compared as they are; larger favors longer sequences.

    Returns:
        tokens int64 [B, W, steps], and their scores [B, W].
    """
    check_sizes(steps=steps, width=width)
    batch = begin.shape[0]
    first = torch.arange(batch, device=begin.device)[:, None] * width  # [B, 1]: where the rows of a hypothesis begin
    token = begin.repeat_interleave(width)
    state = rows(state, torch.arange(batch, device=begin.device).repeat_interleave(width))
    said = begin.new_empty(batch, width, 0)
    done = torch.zeros(batch, width, dtype=torch.bool, device=begin.device)
    scores: Tensor | None = None
    for _ in range(steps):
        logits, state = step(token, state)
        chances = logits.log_softmax(-1, torch.promote_types(logits.dtype, torch.float32)).view(batch, width, -1)
        if end is not None:  # an ended hypothesis has one continuation, which costs nothing
            chances = chances.masked_fill(done[..., None], -torch.inf)
            chances[..., end] = chances[..., end].masked_fill(done, 0)
        if scores is None:  # all hypotheses of a row are still one
            scores = chances.new_full((batch, width), -torch.inf)
            scores[:, 0] = 0
        words = chances.shape[-1]
        scores, place = (scores[..., None] + chances).flatten(1).topk(width)
        source, token = place // words, place % words  # [B, W]: the hypothesis that goes on, and its next token
        said = torch.cat([said.gather(1, source[..., None].expand(-1, -1, said.shape[2])), token[..., None]], 2)
        done = token == end if end is not None else done
        state, token = rows(state, (first + source).flatten()), token.flatten()
    assert scores is not None
    if length_penalty and end is not None:
        length = ((said != end).sum(-1) + 1).clamp(max=steps)
        scores, order = (scores / ((5 + length) / 6) ** length_penalty).sort(-1, descending=True)
        said = said.gather(1, order[..., None].expand_as(said))
    return said, scores
