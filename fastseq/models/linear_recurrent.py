"""Stacks of recurrent layers whose gates read the input alone, so that a sequence is a scan ("Were RNNs all we needed?").

Letters: B batch, T tokens, W width, N blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastseq import MinGRU
from fastseq.functional import require_whole_sequence

from ._configuration import check_input, check_lengths, check_rates, check_sizes, cleared

__all__ = ["LinearRecurrent"]


class Block(nn.Module):
    """x + out(layer(norm x)), then x + feed-forward(norm x)."""

    def __init__(self, width: int, layer: Callable[..., nn.Module], units: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.recurrent, self.dropout = layer(width, units, batch_first=True), dropout
        self.recurrent_norm, self.feedforward_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.out = nn.Linear(units, width, bias=False)
        self.up, self.down = nn.Linear(width, feedforward), nn.Linear(feedforward, width)

    def forward(self, x: Tensor, state: Any, lengths: Tensor | None, resets: Tensor | None) -> tuple[Tensor, Any]:
        y, state = self.recurrent(self.recurrent_norm(x), state, lengths=lengths, resets=resets)
        x = x + F.dropout(self.out(y), self.dropout, self.training)
        y = self.down(F.gelu(self.up(self.feedforward_norm(x))))
        return x + F.dropout(y, self.dropout, self.training), state


class LinearRecurrent(nn.Module):
    """A causal stack of blocks of a linear recurrent layer and a feed-forward, each residual and behind a norm.

    What differs from the papers: the block is that of the package minGRU-pytorch without its convolution, for every kind of
    layer; papers put other things around theirs: a convolution before it, a gate beside it, no feed-forward. As no gate reads
    the state, and coefficients are positive, such a stack cannot count: the parity of bits, which one GRU layer learns exactly,
    stays at chance.

    Args:
        width: W.
        depth: N.
        layer: called as ``layer(W, units, batch_first=True)``: `fastseq.MinGRU` or another layer of linear recurrence, or
            ``functools.partial`` of one with its options.
        units: of each layer; None: W.
        feedforward: its inner width; None: 4 W.
        dropout: of what each sub-layer adds, in training alone.

    Raises:
        ValueError: if an argument has a value that is not accepted. TypeError: if a size is no int, or ``layer`` is not callable.
    """

    def __init__(
        self, width: int, depth: int, *, layer: Callable[..., nn.Module] = MinGRU, units: int | None = None,
        feedforward: int | None = None, dropout: float = 0.0
    ) -> None:  # fmt: skip
        super().__init__()
        units, inner = width if units is None else units, 4 * width if feedforward is None else feedforward
        check_sizes(width=width, depth=depth, units=units, feedforward=inner)
        check_rates(dropout=dropout)
        if not callable(layer):
            raise TypeError(f"layer must be a layer's class, such as fastseq.MinGRU, or a function that makes one, got {layer!r}")
        self.width = width
        self.blocks = nn.ModuleList([Block(width, layer, units, inner, dropout) for _ in range(depth)])
        self.norm = nn.RMSNorm(width)

    def forward(
        self, x: Tensor, state: tuple[Any, ...] | None = None, *, lengths: Tensor | None = None, resets: Tensor | None = None
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """``(y, state)``: y ``[B, T, W]`` from x likewise, and what a next call goes on from.

        Args:
            state: a tuple over blocks of what the layer gives back, of a `fastseq.MinGRU` h ``[1, B, units]``.
            lengths: int64 ``[B]``: y is zero beyond them, and the state is that at each row's end.
            resets: bool ``[B, T]``: where a new segment begins, for which what came before counts nothing.

        Raises:
            RuntimeError: if the input, the state, lengths or resets are not of this model's sizes and one batch.
        """
        check_input(x, None, None, self.width)
        check_lengths(lengths, x)
        if state is not None and (not isinstance(state, tuple) or len(state) != len(self.blocks)):
            given = f"a tuple of {len(state)}" if isinstance(state, tuple) else type(state).__name__
            raise RuntimeError(f"state must be a tuple of {len(self.blocks)}, as this model gives it back, got {given}")
        after = []
        for block, before in zip(self.blocks, state or (None,) * len(self.blocks), strict=True):
            x, of_block = block(x, before, lengths, resets)
            after.append(of_block)
        return cleared(self.norm(x), lengths), tuple(after)

    def step(self, x: Tensor, state: tuple[Any, ...] | None = None) -> tuple[Tensor, tuple[Any, ...]]:
        """One token: y ``[B, W]`` from x likewise, and the state after it; as ``forward`` over the tokens so far."""
        require_whole_sequence("a step from a state")
        check_input(x, None, self.width)
        y, state = self.forward(x[:, None], state)
        return y[:, 0], state
