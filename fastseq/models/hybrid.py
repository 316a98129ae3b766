"""LSTM and attention in one block, and R-Transformer (Wang et al. 2019, arXiv 1907.05572), whose recurrence is local.

Letters: B batch, T tokens, W width, H heads, E = W / H features of a head, N layers, K steps that a local GRU sees.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseq import GRU, LSTM
from fastseq.functional import attention, require_whole_sequence, sequence_places

from ._configuration import check_choice, check_heads, check_input, check_lengths, check_rates, check_sizes, check_state, cleared

__all__ = ["Hybrid"]

State = tuple[tuple[Tensor, ...], ...]


class Block(nn.Module):
    """x + recurrence(norm x), then x + attention(norm x), then x + feed-forward(norm x); or each normed after its sum."""

    def __init__(
        self, width: int, heads: int, local: int, causal: bool, feedforward: int, pre: bool, rates: dict[str, float]
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.local, self.causal, self.pre, self.rates = heads, local, causal, pre, rates
        self.recurrent_norm, self.attention_norm, self.feedforward_norm = (nn.LayerNorm(width) for _ in range(3))
        if local:
            self.recurrent: Any = GRU(width, width, batch_first=True)
        else:
            self.recurrent = LSTM(width, width if causal else width // 2, batch_first=True, bidirectional=not causal)
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, feedforward), nn.Linear(feedforward, width)

    def forward(self, x: Tensor, state: tuple[Tensor, ...], lengths: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x ``[B, T, W]`` and the state after it; see `Hybrid.forward`."""
        *recurrence, keys, values = state
        rate, of_weights = ((self.rates[name] if self.training else 0.0) for name in ("dropout", "attention_dropout"))
        y, recurrence = (self._local if self.local else self._whole)(self._in(self.recurrent_norm, x), recurrence, lengths)
        x = self._sum(self.recurrent_norm, x, F.dropout(y, rate))
        q, k, v = self.query_key_value(self._in(self.attention_norm, x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        keys, values = torch.cat((keys, k), 1), torch.cat((values, v), 1)
        y = attention(
            q, keys, values, layout="bshd", causal=self.causal, alignment="bottom_right", dropout_p=of_weights,
            seqlens_q=None if self.causal else lengths, seqlens_k=None if self.causal else lengths,
        )  # fmt: skip
        x = self._sum(self.attention_norm, x, F.dropout(self.out(y.flatten(2)), rate))
        y = self.down(F.gelu(self.up(self._in(self.feedforward_norm, x))))
        return self._sum(self.feedforward_norm, x, F.dropout(y, rate)), (*recurrence, keys, values)

    def _in(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x) if self.pre else x

    def _sum(self, norm: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return x + y if self.pre else norm(x + y)

    def _whole(self, x: Tensor, state: list[Tensor], lengths: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """An LSTM over all steps; its state is (h, c), ``[B, 1, W]`` each."""
        before = tuple(s.transpose(0, 1).contiguous() for s in state) if self.causal and lengths is None else None
        y, after = self.recurrent(x, before, lengths=lengths)
        return y, [s.transpose(0, 1) for s in after]

    def _local(self, x: Tensor, state: list[Tensor], lengths: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """The last state of a GRU over every K steps; before the first stand zeros. Its state is the K - 1 inputs before."""
        x = torch.cat((state[0], x), 1)
        windows = x.unfold(1, self.local, 1).transpose(-1, -2)  # [B, T, K, W]
        _, h = self.recurrent(windows.flatten(0, 1))
        return h[0].view(*windows.shape[:2], -1), [x[:, x.shape[1] - self.local + 1 :]]


class Hybrid(nn.Module):
    """A stack of blocks that read a sequence by recurrence, then look back over it by attention.

    There are no positions: the recurrence gives the order. What differs from the papers: none defines this block, it is what
    those have in common which put an LSTM before attention. With ``local`` the recurrence is R-Transformer's, a GRU over the
    last K steps alone, all windows at once; its feed-forward has ReLU where this one has GELU.

    Args:
        width: W.
        heads: H, a divisor of W.
        depth: N.
        local: K, in place of the LSTM a GRU over every K steps; None: the LSTM.
        causal: False: the LSTM goes both ways, W / 2 units each, and attention sees all; there is no state then.
        feedforward: its inner width; None: 4 W.
        norm: ``"pre"`` (with one more norm at the end) or ``"post"``.
        dropout: of what each sub-layer adds.
        attention_dropout: of attention's weights. Both in training alone.

    Raises:
        ValueError: if an argument has a value that is not accepted. TypeError: if a size is no int.
    """

    def __init__(
        self, width: int, heads: int, depth: int, *, local: int | None = None, causal: bool = True,
        feedforward: int | None = None, norm: str = "pre", dropout: float = 0.0, attention_dropout: float = 0.0
    ) -> None:  # fmt: skip
        super().__init__()
        check_heads(width, heads)
        inner = 4 * width if feedforward is None else feedforward
        check_sizes(depth=depth, feedforward=inner, local=1 if local is None else local)
        check_choice("norm", norm, ("pre", "post"))
        check_rates(dropout=dropout, attention_dropout=attention_dropout)
        if not causal and (local is not None or width % 2):
            raise ValueError(f"causal=False goes with an even width and without local, got width={width} and local={local}")
        self.width, self.heads, self.local, self.causal = width, heads, local or 0, causal
        self.carried = [self.local - 1] if local else [1, 1] if causal else []  # steps that a recurrence's state stands for
        rates = {"dropout": dropout, "attention_dropout": attention_dropout}
        self.blocks = nn.ModuleList([Block(width, heads, self.local, causal, inner, norm == "pre", rates) for _ in range(depth)])
        self.norm = nn.LayerNorm(width) if norm == "pre" else nn.Identity()

    def initial_state(self, x: Tensor) -> State:
        """What ``forward`` starts from without a state."""
        lanes = [x.new_zeros(len(x), steps, self.width) for steps in self.carried]
        keys = x.new_zeros(len(x), 0, self.heads, self.width // self.heads)
        return tuple((*lanes, keys, keys) for _ in self.blocks)

    def forward(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> tuple[Tensor, State | None]:
        """``(y, state)``: y ``[B, T, W]`` from x likewise, and what a next call goes on from.

        Args:
            state: a tuple over blocks of h and c ``[B, 1, W]`` (with ``local`` the last inputs ``[B, K - 1, W]`` in place of
                both), keys and values ``[B, S, H, E]`` of all tokens so far. Gradients flow through it.
            lengths: int64 ``[B]``: tokens beyond are seen by none, and y is zero there. Rows then end at different places: no
                state may be given, and None is given back, as without ``causal``.

        Raises:
            RuntimeError: if the input or the state is not of this model's sizes and one batch, or lengths do not fit.
            ValueError: if a state is given with lengths or without ``causal``.
        """
        check_input(x, None, None, self.width)
        check_lengths(lengths, x)
        if self.local or state is not None:
            require_whole_sequence("a local GRU" if self.local else "what goes on from a state")
        if state is not None and (lengths is not None or not self.causal):
            other = "lengths" if self.causal else "causal=False"
            raise ValueError(f"a state goes on from causal rows of one length, got it with {other}")
        before = self.initial_state(x) if state is None else state
        keys = (len(x), None, self.heads, self.width // self.heads)
        check_state(before, [[*((len(x), steps, self.width) for steps in self.carried), keys, keys]] * len(self.blocks), x)
        if len({t.shape[1] for of_block in before for t in of_block[-2:]}) > 1:
            raise RuntimeError("state must hold as many keys as values, and in every block, got different numbers")
        if sequence_places(x.shape[1])[1] == 0:
            return self.norm(x), before if self.causal and lengths is None else None
        after = []
        for block, of_block in zip(self.blocks, before, strict=True):
            x, of_block = block(x, of_block, lengths)
            after.append(of_block)
        return cleared(self.norm(x), lengths), tuple(after) if self.causal and lengths is None else None

    def step(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """One token: y ``[B, W]`` from x likewise, and the state after it; as ``forward`` over the tokens so far."""
        require_whole_sequence("a step from a state")
        check_input(x, None, self.width)
        if not self.causal:
            raise ValueError("a model with causal=False has no step")
        y, state = self.forward(x[:, None], state)
        return y[:, 0], cast(State, state)
