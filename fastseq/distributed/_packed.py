"""Packed sequences whose steps lie on several ranks, each of which has the rows of its steps: padded while a recurrence runs.

Sequences are in packed order, the longest first, so the rows of a step are those of the first sequences, on every rank. A later
rank does not see in its rows how many sequences there are, nor an earlier one how long they are: they tell one another.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._arguments import checked_tensor
from ..functional._recurrent_layers import Options, check_layout
from ..functional._scan import checked_resets
from ..ops.recurrent import check_values
from ._exchange import account
from ._ranks import Own, Ranks, gathered

__all__: list[str] = []  # what the modules of this package share


class Packing(NamedTuple):
    """Where a rank's rows lie among its steps and all sequences."""

    steps: int
    sequences: int
    lengths: Tensor  # [sequences], of the whole
    step: Tensor  # of each row
    sequence: Tensor

    def padded(self, rows: Tensor) -> Tensor:
        """[steps, sequences, ..], from rows [N, ..]."""
        return rows.new_zeros(self.steps, self.sequences, *rows.shape[1:]).index_put((self.step, self.sequence), rows)

    def packed(self, padded: Tensor) -> Tensor:
        """[N, ..], from [steps, sequences, ..]."""
        return padded[self.step, self.sequence]


def packing(rows: Tensor, options: Options, ranks: Ranks) -> Packing:
    """Of this rank's rows; all ranks call it together.

    Raises on every rank:
        RuntimeError: if a rank's ``batch_sizes`` or ``resets`` are not of its rows, or the sizes rise from rank to rank.
    """
    own = Own()
    sizes: list[int] = own.run(_checked, rows, options) or []
    ends = sizes[0] if sizes else 0, sizes[-1] if sizes else 0
    told = own.settle(ranks, {"call": "recurrent, of packed sequences"}, ends)
    filled = [of for of in told if of[0]]
    if any(before[1] < behind[0] for before, behind in zip(filled, filled[1:], strict=False)):
        raise RuntimeError(
            "batch sizes of packed sequences must not rise from rank to rank (shard_sequence cuts them), but those of the ranks' "
            f"first and last steps are {told}"
        )
    sequences = max(first for first, _ in told)
    if not sequences:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    rising = torch.tensor(sizes[::-1], dtype=torch.int64)
    here = len(sizes) - torch.searchsorted(rising, torch.arange(sequences), right=True)  # steps of each sequence
    account(here, ranks.size - 1)
    lengths = gathered(ranks, here).sum(0)
    of_steps = torch.tensor(sizes, dtype=torch.int64)
    step = torch.arange(len(sizes)).repeat_interleave(of_steps)
    sequence = torch.arange(len(rows)) - (of_steps.cumsum(0) - of_steps)[step]
    return Packing(len(sizes), sequences, *[tensor.to(rows.device) for tensor in (lengths, step, sequence)])


def _checked(rows: Tensor, options: Options) -> list[int]:
    """The batch sizes."""
    if checked_tensor("input", rows).dim() != 2:
        raise RuntimeError(f"input must have 2 dimensions, got {rows.dim()}")
    check_layout(rows, options.lengths, options.batch_sizes)
    assert options.batch_sizes is not None
    sizes = options.batch_sizes.tolist()
    if sizes or len(rows):
        check_values(rows, None, options.batch_sizes)
    if options.resets is not None:
        checked_resets(options.resets, rows.unsqueeze(1), True, False)
    return sizes
