"""Operands as compiled kernels read them."""

from __future__ import annotations

import torch
from torch import Tensor


def dense(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """Contiguous, in a dtype if one is named."""
    return None if tensor is None else tensor.contiguous() if dtype is None else tensor.to(dtype).contiguous()


def all_dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]
