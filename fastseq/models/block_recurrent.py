"""Block-Recurrent Transformer (Hutchins et al. 2022, arXiv 2203.07852).

Letters: B batch, T tokens, W width, H heads, E = W / H features of a head, S state vectors, N tokens of a block, M of its memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseq.functional import attention, require_whole_sequence

from ._configuration import check_choice, check_heads, check_input, check_rates, check_sizes, check_state

__all__ = ["BlockRecurrent"]

State = tuple[tuple[Tensor, ...], ...]
Turns = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]  # of queries and of keys: cosines and sines, each with its decay


class Scores(nn.Module):
    """Attention by the cosine of queries and keys, each feature with a learned scale; one key-value head serves all queries."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.query_scale = nn.Parameter(torch.full((features,), features**0.5))
        self.key_scale = nn.Parameter(torch.ones(features))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, dropout: float, turns: Turns | None = None) -> Tensor:
        """``[B, H, N, E]`` from q likewise and k, v ``[B, M, E]``. ``turns``: by position and causal, the last query at the last
        key; otherwise every query sees every key, whatever their order."""
        q, k = (F.normalize(q, dim=-1) * self.query_scale, F.normalize(k, dim=-1) * self.key_scale)
        if turns is None:
            return attention(q, k[:, None], v[:, None], scale=1.0, dropout_p=dropout)
        q, k = (turned(x, *by_place) for x, by_place in zip((q, k), turns, strict=True))
        return attention(q, k[:, None], v[:, None], scale=1.0, causal=True, alignment="bottom_right", dropout_p=dropout)


def turns_of(queries: int, keys: int, features: int, like: Tensor) -> Turns:
    """What queries ``[N, E]`` and keys ``[M, E]`` are multiplied by: angles that grow with their places, which end alike (RoPE),
    queries shrunk and keys stretched (xPos). The same for all layers and heads."""
    wide: Any = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
    places, even = torch.arange(1 - keys, 1, **wide), torch.arange(0, features, 2, **wide)
    angles = torch.outer(places, 10000 ** (-even / features)).repeat(1, 2)
    decay = (((even + 0.4 * features) / (1.4 * features)) ** (places[:, None] / 512)).repeat(1, 2)
    cosines, sines = angles.cos(), angles.sin()
    return ((cosines * decay)[-queries:], (sines * decay)[-queries:]), (cosines / decay, sines / decay)


def turned(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cosines.to(x.dtype) + torch.cat((-second, first), -1) * sines.to(x.dtype)


class Block(nn.Module):
    """A layer: tokens see their block and its memory, of a recurrent layer (states > 0) the state vectors too, then a GEGLU."""

    def __init__(self, width: int, heads: int, states: int, gate: str, feedforward: int) -> None:
        super().__init__()
        self.heads, self.states, self.gate, E = heads, states, gate, width // heads
        self.norm, self.feedforward_norm = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.query, self.key_value = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * E, bias=False)
        self.out, self.scores = nn.Linear(width * (2 if states else 1), width, bias=False), Scores(E)
        self.up, self.down = nn.Linear(width, 2 * feedforward, bias=False), nn.Linear(feedforward, width, bias=False)
        if not states:
            return
        self.initial, self.identity = nn.Parameter(0.1 * torch.randn(states, width)), nn.Parameter(torch.randn(states, width))
        self.state_norm, self.state_key_value = nn.LayerNorm(width, bias=False), nn.Linear(width, 2 * E, bias=False)
        self.query_states = nn.Linear(width, width, bias=False)  # of tokens, for state vectors
        self.state_query_tokens, self.state_query_states = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.state_out, self.candidate = nn.Linear(2 * width, width, bias=False), nn.Linear(width, width)
        self.token_scores, self.state_scores, self.own_scores = Scores(E), Scores(E), Scores(E)
        if gate == "lstm":
            self.gates = nn.Linear(width, 2 * width)  # input, forget
        else:
            self.kept = nn.Parameter(torch.zeros(width))

    def forward(
        self, x: Tensor, cache: tuple[Tensor, ...], length: int, turns: Turns, rates: tuple[float, float]
    ) -> tuple[Tensor, ...]:
        """x ``[B, N, W]``, at most the rest of its block, and the cache after it; see `BlockRecurrent.forward`."""
        normed, (rate, of_weights) = self.norm(x), rates
        k, v = (torch.cat(pair, 1) for pair in zip(cache, self.key_value(normed).chunk(2, -1), strict=False))
        y = joined(self.scores(self._split(self.query(normed)), k, v, of_weights, turns))
        whole = k.shape[1] % length == 0
        cached: tuple[Tensor, ...] = (k[:, -length:], v[:, -length:]) if whole else (k, v)
        if self.states:
            named = self.state_norm(cache[2]) + self.identity
            own = self.state_key_value(named).chunk(2, -1)
            y = torch.cat((y, joined(self.token_scores(self._split(self.query_states(normed)), *own, of_weights))), -1)
            cached = *cached, self._next(cache[2], named, own, cached, of_weights) if whole else cache[2]
        x = x + F.dropout(self.out(y), rate)
        value, gate = self.up(self.feedforward_norm(x)).chunk(2, -1)
        return x + F.dropout(self.down(value * F.gelu(gate)), rate), *cached

    def _next(self, before: Tensor, named: Tensor, own: tuple[Tensor, ...], block: tuple[Tensor, ...], rate: float) -> Tensor:
        """The state vectors ``[B, S, W]`` after a whole block, from those before it."""
        of_states = self.own_scores(self._split(self.state_query_states(named)), *own, rate)
        of_tokens = self.state_scores(self._split(self.state_query_tokens(named)), *block, rate)
        u = self.state_out(joined(torch.cat((of_states, of_tokens), -1)))
        if self.gate == "fixed":
            kept = self.kept.sigmoid()
            return kept * before + (1 - kept) * self.candidate(u)
        enter, kept = self.gates(u).chunk(2, -1)  # biased to remember
        return (kept + 1).sigmoid() * before + (enter - 1).sigmoid() * self.candidate(u).tanh()

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class BlockRecurrent(nn.Module):
    """A causal Transformer over blocks of ``block`` tokens, some of whose layers pass ``states`` vectors from block to block.

    Tokens see those before them in their block, the whole block before and, in a recurrent layer, the state vectors that the
    blocks so far left. At the end of a block the state vectors attend to its tokens and to themselves, and a gate takes that in.

    What differs from the paper: positions are rotary with xPos's decay, not T5's bias; the block before is seen whole, not
    through a window of as many tokens; all heads share one key-value head; the feed-forward is a GEGLU, linear maps and norms
    have no bias; state vectors have no feed-forward (its "single" gate). The package block-recurrent-transformer-pytorch made
    these choices; its cosine scores are divided by sqrt(E), here they begin multiplied by it, and the LSTM gate is the paper's.

    Args:
        width: W.
        heads: H, a divisor of W with an even quotient.
        depth: layers.
        block: tokens of a block.
        states: S.
        recurrent: the layers that pass state vectors, counted from 0; None: the third from the top, or the first of fewer.
        gate: ``"fixed"``: s' = g s + (1 - g) z with g constant in time; ``"lstm"``: s' = f s + i tanh(z).
        feedforward: width inside the GEGLU; None: 8 W / 3.
        dropout: of what each sub-layer adds.
        attention_dropout: of attention's weights. Both in training alone.

    Raises:
        ValueError: if an argument has a value that is not accepted. TypeError: if a size is no int.
    """

    def __init__(
        self, width: int, heads: int, depth: int, *, block: int, states: int, recurrent: tuple[int, ...] | None = None,
        gate: str = "fixed", feedforward: int | None = None, dropout: float = 0.0, attention_dropout: float = 0.0
    ) -> None:  # fmt: skip
        super().__init__()
        check_heads(width, heads)
        feedforward = int(width * 8 / 3) if feedforward is None else feedforward
        check_sizes(depth=depth, block=block, states=states, feedforward=feedforward)
        check_choice("gate", gate, ("fixed", "lstm"))
        check_rates(dropout=dropout, attention_dropout=attention_dropout)
        recurrent = (max(depth - 3, 0),) if recurrent is None else tuple(recurrent)
        if width // heads % 2:
            raise ValueError(f"width / heads must be even, for rotary positions, got {width} / {heads}")
        if not set(recurrent) <= set(range(depth)):
            raise ValueError(f"recurrent must name layers in 0..{depth - 1}, got {recurrent}")
        self.width, self.features, self.block = width, width // heads, block
        self.dropout, self.attention_dropout = dropout, attention_dropout
        self.counts = [states if layer in recurrent else 0 for layer in range(depth)]
        self.layers = nn.ModuleList([Block(width, heads, count, gate, feedforward) for count in self.counts])
        self.norm = nn.LayerNorm(width, bias=False)

    def initial_state(self, x: Tensor) -> State:
        """What ``forward`` starts from without a state: no memory, the learned state vectors."""
        none, layers = x.new_zeros(x.shape[0], 0, self.features), cast(Iterable[Block], self.layers)
        return tuple((none, none, *(s.initial.expand(len(x), -1, -1) for s in [layer] if s.states)) for layer in layers)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """``(y, state)``: y ``[B, T, W]`` from x likewise, any T, and what a next call goes on from.

        The state is a tuple over layers of keys and values ``[B, M, E]`` of the block before and of the block begun, and in a
        recurrent layer the state vectors ``[B, S, W]``. Gradients flow through it: detach it to cut them. Rows of fewer tokens
        are padded at the end, which their outputs do not see; the state is then that of the padded rows.

        Raises:
            RuntimeError: if the input or the state is not of this model's sizes and one batch.
        """
        require_whole_sequence("a loop over blocks")
        check_input(x, None, None, self.width)
        state = self.initial_state(x) if state is None else state
        keys = (x.shape[0], None, self.features)
        check_state(state, [[keys, keys, *[(x.shape[0], n, self.width)] * (n > 0)] for n in self.counts], x)
        begun = {layer[0].shape[1] for layer in state}
        if len(begun) > 1 or max(begun) >= 2 * self.block:
            raise RuntimeError(f"state must hold fewer than 2 x {self.block} keys, as many in every layer, got {sorted(begun)}")
        rates = (self.dropout, self.attention_dropout) if self.training else (0.0, 0.0)
        outputs, start = [x[:, :0]], 0
        while start < x.shape[1]:
            memory = state[0][0].shape[1]
            end = start + self.block - memory % self.block
            y, after = x[:, start:end], []
            turns = turns_of(y.shape[1], memory + y.shape[1], self.features, x)
            for layer, cache in zip(self.layers, state, strict=True):
                y, *cached = layer(y, cache, self.block, turns, rates)
                after.append(tuple(cached))
            outputs.append(y)
            state, start = tuple(after), end
        return self.norm(torch.cat(outputs, 1)), state

    def step(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """One token: y ``[B, W]`` from x likewise, and the state after it; as ``forward`` over the tokens so far."""
        check_input(x, None, self.width)
        y, state = self.forward(x[:, None], state)
        return y[:, 0], state
