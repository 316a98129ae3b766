"""Layer normalization without its scale and shift, and its backward (Ba et al. 2016, "Layer Normalization")."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-5  # as torch.nn.LayerNorm


def normalize(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` with mean 0 and variance 1 over its last dimension, and what it was multiplied by ``[..., 1]``."""
    centered = x - x.mean(-1, keepdim=True)
    scale = torch.rsqrt((centered * centered).mean(-1, keepdim=True) + EPS)
    return centered * scale, scale


def normalize_backward(grad: Tensor, normal: Tensor, scale: Tensor) -> Tensor:
    """Gradient of ``x`` from that of its normalized values."""
    along = (grad * normal).mean(-1, keepdim=True)
    return scale * (grad - grad.mean(-1, keepdim=True) - normal * along)
