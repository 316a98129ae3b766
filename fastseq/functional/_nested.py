"""Nested tensors: sequences of their own lengths, unpadded, as the packed rows that the op takes."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

_TIME = {"bhsd": 2, "bshd": 1}  # the dimension that differs between sequences


class Jagged(NamedTuple):
    """A jagged nested tensor, without gaps between the sequences."""

    values: Tensor  # [N, H, E]
    offsets: Tensor  # int64 [B + 1]
    longest: int
    shortest: int

    def nested(self, values: Tensor, layout: str) -> Tensor:
        """[B, H, j, ..] of [H, N, ..], or [B, j, H, ..] of [N, H, ..], with the lengths of this one."""
        return torch.nested.nested_tensor_from_jagged(
            values, self.offsets, jagged_dim=_TIME[layout], min_seqlen=self.shortest, max_seqlen=self.longest
        )


def jagged(tensor: Tensor, layout: str) -> Jagged:
    """The parts of a nested tensor [B, H, j, E] or [B, j, H, E].

    Raises:
        ValueError: if it is not nested, or not jagged.
        RuntimeError: if another dimension is the ragged one.
    """
    if not tensor.is_nested or tensor.layout != torch.jagged:
        kind = f"nested with layout {tensor.layout}" if tensor.is_nested else "not nested"
        raise ValueError(f"query, key and value must all be nested with layout torch.jagged if one of them is; one is {kind}")
    whole: Any = tensor
    if tensor.dim() != 4 or whole._ragged_idx != _TIME[layout]:
        expected = "[B, H, j, E]" if layout == "bhsd" else "[B, j, H, E]"
        raise RuntimeError(f"nested tensors must be {expected} with the ragged dimension j, got {list(tensor.shape)}")
    if layout == "bhsd":
        whole = whole.transpose(1, 2)
    if whole.lengths() is not None:
        whole = whole.contiguous()
    return Jagged(whole.values(), whole.offsets(), whole._get_max_seqlen(), whole._get_min_seqlen())


def sequences(q: Tensor, k: Tensor, v: Tensor, layout: str) -> tuple[Jagged, Jagged, Jagged]:
    """The parts of all three; lengths of k and v are compared, unless they are the same tensor, which on a GPU waits for it."""
    of_q, of_k, of_v = (jagged(t, layout) for t in (q, k, v))
    if of_q.offsets.shape != of_k.offsets.shape:
        raise RuntimeError(f"query and key must have one batch size, got {len(of_q.offsets) - 1} and {len(of_k.offsets) - 1}")
    if of_k.offsets is not of_v.offsets and not torch.equal(of_k.offsets, of_v.offsets):
        raise RuntimeError("key and value must have the same sequence lengths")
    return of_q, of_k, of_v


class Stacked(NamedTuple):
    """A nested tensor of strided components [H, T, E], one after the other."""

    values: Tensor  # [N, H, E]
    offsets: Tensor  # int32 [B + 1]
    lengths: list[int]


def stacked(tensor: Tensor) -> Stacked:
    """Raises RuntimeError if the components are not 3-D with one number of heads."""
    parts = tensor.unbind()
    if any(part.dim() != 3 for part in parts) or len({part.shape[::2] for part in parts}) != 1:
        raise RuntimeError(f"nested tensors must hold [H, T, E] with one H and E, got {[list(part.shape) for part in parts]}")
    lengths = [part.shape[1] for part in parts]
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=tensor.device)
    return Stacked(torch.cat(parts, 1).transpose(0, 1), offsets, lengths)
