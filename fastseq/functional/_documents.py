"""Documents end to end in one row, as the rows of a packed batch: a walk over all of them in turn would have a batch of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .._arguments import checked_tensor
from ..cells import Cell
from ._recurrent_layers import Options, run_layers, unseen
from ._scan import checked_resets


def documents(
    cell: Cell,
    input: Tensor,
    states: Sequence[Tensor | None],
    params: Sequence[Tensor | None],
    options: Options,
    cu_seqlens: Tensor,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """``run_layers`` of input [N, I], where document s has the rows cu_seqlens[s] .. cu_seqlens[s + 1]; states [L*D, S, n]."""
    excluded = {
        "lengths": options.lengths is not None,
        "batch_sizes": options.batch_sizes is not None,
        "batch_first": options.batch_first,
    }
    for name, is_given in excluded.items():
        if is_given:
            raise ValueError(f"cu_seqlens says itself where documents end and how they lie: leave out {name}")
    if checked_tensor("input", input).dim() != 2:
        raise RuntimeError(f"input must be [N, I] with cu_seqlens, got {list(input.shape)}")
    lengths = _lengths(cu_seqlens, input.shape[0])
    count, resets, reset_to = len(lengths), options.resets, options.reset_to
    for kind, of in (("hx", states), ("reset_to", reset_to or ())):
        for state in of:
            if state is not None and (state.dim() != 3 or state.shape[1] not in ((count,) if kind == "hx" else (count, 1))):
                or_one = " or 1" if kind == "reset_to" else ""
                raise RuntimeError(
                    f"{kind} must be [L*D, {count}{or_one}, ..], a state for each document, got {list(state.shape)}"
                )

    # the rows of step t are those of the documents that have it, the longest first
    ordered, order = lengths.sort(descending=True, stable=True)
    steps, filled = int(ordered[0]) if count else 0, int((lengths > 0).sum())
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    sizes = count - lengths.bincount(minlength=steps + 1).cumsum(0)[:steps]
    step = torch.arange(steps).repeat_interleave(sizes)
    slot = torch.arange(len(step)) - (sizes.cumsum(0) - sizes)[step]
    places = ((lengths.cumsum(0) - lengths)[order][slot] + step).to(input.device)
    slots = order.to(input.device)

    def of_filled(of: Sequence[Tensor | None]) -> list[Tensor | None]:
        """In packed order, of the documents that are not empty; a state for all as it is."""
        return [s if s is None or s.shape[1] != count else s.index_select(1, slots[:filled]) for s in of]

    if resets is not None:
        resets = checked_resets(resets, input.unsqueeze(1), True, False).squeeze(1).index_select(0, places)
    packed = replace(options, batch_sizes=sizes, resets=resets, reset_to=None if reset_to is None else of_filled(reset_to))
    output, finals, cells = run_layers(cell, input.index_select(0, places), of_filled(states), params, packed)
    back = places.argsort()
    results = []
    for name, given, final in zip(cell.states, states, finals, strict=True):
        if filled < count:  # the empty documents keep what they were given
            if given is None:
                rest = final.new_full((final.shape[0], count - filled, final.shape[2]), unseen(name))
            else:
                rest = given.index_select(1, slots[filled:]).to(final.dtype)
            final = torch.cat((final, rest), 1)
        results.append(final.index_select(1, slots.argsort()))
    return output.index_select(0, back), tuple(results), None if cells is None else cells.index_select(1, back)


def _lengths(cu_seqlens: Tensor, total: int) -> Tensor:
    """int64 [S], on the CPU."""
    checked_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or not len(cu_seqlens):
        raise RuntimeError(f"cu_seqlens must be int32 or int64 [S + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    ends = cu_seqlens.tolist()
    lengths = torch.tensor(ends, dtype=torch.int64).diff()
    if ends[0] != 0 or ends[-1] != total or (lengths < 0).any():
        raise RuntimeError(f"cu_seqlens must rise from 0 to the number of rows, {total}, got {ends}")
    return lengths
