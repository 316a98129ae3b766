"""Nested tensors [N, L_i, E], strided or jagged, as rows back to back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Packed(NamedTuple):
    """The sequences of a nested tensor. Views, as is what ``nest`` returns; differentiable."""

    rows: Tensor  # [sum of L_i, E]
    cu: Tensor  # int32 [N + 1]: where each sequence begins, and the end
    longest: int

    @classmethod
    def of(cls, tensor: Tensor) -> Packed:
        """
        Raises:
            AssertionError: for a jagged tensor with gaps or another ragged dimension, or sequences of different E.
        """
        nested: Any = tensor
        if tensor.layout == torch.jagged:
            if nested.lengths() is not None or nested._ragged_idx != 1:
                raise AssertionError("jagged tensors must be [N, L_i, E], ragged in dimension 1 and without gaps")
            return cls(nested.values(), nested.offsets().to(torch.int32), nested._get_max_seqlen())
        nested = nested.contiguous()
        lengths, features = nested._nested_tensor_size().unbind(1)  # on the CPU
        if len(features) and (features != features[0]).any():
            raise AssertionError(f"sequences must have the same features, got {features.tolist()}")
        cu = F.pad(lengths.cumsum(0), (1, 0)).to(tensor.device, torch.int32)
        return cls(nested.values().unflatten(0, (-1, int(features[0]))), cu, int(lengths.max()))

    def nest(self, rows: Tensor, like: Tensor) -> Tensor:
        """``rows``, of as many features as ``like`` has, as a nested tensor of its layout and lengths."""
        nested: Any = like
        if like.layout == torch.jagged:
            return torch.nested.nested_tensor_from_jagged(rows, nested.offsets(), max_seqlen=self.longest)
        nested = nested.contiguous()
        parts = nested._nested_tensor_size(), nested._nested_tensor_strides(), nested._nested_tensor_storage_offsets()
        return torch._nested_view_from_buffer(rows.flatten(), *parts)

    def pad(self, rows: Tensor) -> Tensor:
        """[sum of L_i, ..] as [N, longest, ..] with zeros."""
        within = torch.arange(self.longest, device=rows.device) < self.cu.diff()[:, None]
        return rows.new_zeros(*within.shape, *rows.shape[1:]).index_put(within.nonzero(as_tuple=True), rows)
