"""The temporal convolutional network: causal dilated convolutions, the other answer that is parallel in time.

It has no kernel of fastseq in it, and stands here to be compared with.

Letters: B batch, T steps, I features in, C channels, k taps of a kernel, d = 2^level its dilation.

What differs from the paper (Bai et al., 2018): weights begin as torch's convolutions begin, since the N(0, 0.01) of the paper
never took effect under weight norm; weight norm can be left out. The output is not negative: a head comes after it. The receptive
field is 1 + 2 (k - 1) (2^levels - 1) steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm as normalized

from fastseq.functional import require_whole_sequence

from ._configuration import check_input, check_rates, check_sizes, check_state

__all__ = ["TCN"]

State = tuple[Tensor, ...]  # of every convolution the inputs that it still sees, [B, channels, (k - 1) d]


class Block(nn.Module):
    """Two causal convolutions with ReLU and dropout, and a way around them."""

    def __init__(self, inputs: int, channels: int, kernel: int, dilation: int, dropout: float, weight_norm: bool) -> None:
        super().__init__()
        wrap = normalized if weight_norm else lambda conv: conv
        convolutions = [nn.Conv1d(width, channels, kernel, dilation=dilation) for width in (inputs, channels)]
        self.convolutions, self.dropout = nn.ModuleList(map(wrap, convolutions)), nn.Dropout(dropout)
        self.around = nn.Identity() if inputs == channels else nn.Conv1d(inputs, channels, 1)

    def forward(self, x: Tensor, before: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """x [B, channels in, T], of each convolution the inputs before it: [B, C, T], and the last inputs of each."""
        y, after = x, []
        for convolution, past in zip(self.convolutions, before, strict=True):
            y = torch.cat([past, y], -1)
            after.append(y[..., y.shape[-1] - past.shape[-1] :])
            y = self.dropout(F.relu(convolution(y)))
        return F.relu(y + self.around(x)), after


class TCN(nn.Module):
    """Blocks of dilations 1, 2, 4, ..: outputs at t of the inputs up to t.

    Args:
        inputs: I.
        channels: C of every level.
        kernel: k, at least 2, or there is nothing to see of the past.
        dropout: after each convolution, in training alone.
        weight_norm: whether the convolutions' weights are split into direction and length.
    """

    def __init__(
        self, inputs: int, channels: Sequence[int], kernel: int, *, dropout: float = 0.0, weight_norm: bool = True
    ) -> None:
        super().__init__()
        check_sizes(inputs=inputs, kernel=kernel, levels=len(channels))
        for channel in channels:
            check_sizes(channels=channel)
        check_rates(dropout=dropout)
        if kernel < 2:
            raise ValueError(f"kernel must be at least 2, got {kernel}")
        self.inputs, self.widths = inputs, tuple(zip((inputs, *channels[:-1]), channels, strict=True))
        self.pasts = tuple((width, (kernel - 1) * 2**level) for level, pair in enumerate(self.widths) for width in pair)
        self.blocks = nn.ModuleList(
            Block(*pair, kernel, 2**level, dropout, weight_norm) for level, pair in enumerate(self.widths)
        )
        self.receptive_field = 1 + sum(past for _, past in self.pasts)

    def start(self, batch: int) -> State:
        """The state of B sequences before their first step: zeros."""
        check_sizes(batch=batch)
        like = next(self.parameters())
        return tuple(like.new_zeros(batch, *past) for past in self.pasts)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """x [B, T, I]; a state of :meth:`start` or of an earlier call (None: the first steps): [B, T, C], and the state after."""
        require_whole_sequence("a convolution")
        check_input(x, None, None, self.inputs)
        state = self.start(len(x)) if state is None else state
        check_state(state, [(len(x), *past) for past in self.pasts], x)
        y, after = x.transpose(1, 2), []
        for number, block in enumerate(self.blocks):
            y, pasts = block(y, state[2 * number : 2 * number + 2])
            after += pasts
        return y.transpose(1, 2), tuple(after)

    def step(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """x [B, I]: [B, C], and the state after it."""
        check_input(x, None, self.inputs)
        y, state = self(x[:, None], state)
        return y[:, 0], state
