"""GRU cell with layer-normalized gates (after Ba et al. 2016, "Layer Normalization"), its reset gate after the matrix product.

r, z = sigmoid(x + w N(R h)), q = w_n N(R h)_n + b_n, n = tanh(x_n + r q), h = n + z (h - n): N normalizes R h over all gates
together. The input gates x come normalized, scaled and shifted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .normalization import normalize, normalize_backward


def step(x: Tensor, r: Tensor, vectors: Tensor, h: Tensor, c: None) -> tuple[Tensor, None, Tensor]:
    x_r, x_z, x_n = x.chunk(3, -1)
    w, b_n = _split(vectors)
    r_r, r_z, q = (w * normalize(r)[0]).chunk(3, -1)
    reset, z, q = (x_r + r_r).sigmoid(), (x_z + r_z).sigmoid(), q + b_n
    n = (x_n + reset * q).tanh()
    return n + z * (h - n), None, torch.cat((reset, z, n, r.expand_as(x)), -1)


def step_backward(
    dh: Tensor, dc: None, saved: Tensor, vectors: Tensor, h_prev: Tensor, c_prev: None, h: Tensor, c: None
) -> tuple[Tensor, Tensor, Tensor, None]:
    reset, z, n, *_ = saved.chunk(6, -1)
    w, b_n = _split(vectors)
    normal, scale = normalize(_product(saved))
    q = (w * normal).chunk(3, -1)[2] + b_n
    dn = dh * (1 - z) * (1 - n * n)
    dz = dh * (h_prev - n) * z * (1 - z)
    dreset = dn * q * reset * (1 - reset)
    dr = normalize_backward(torch.cat((dreset, dz, dn * reset), -1) * w, normal, scale)
    return torch.cat((dreset, dz, dn), -1), dr, dh * z, None


def vector_gradients(dx: Tensor, dr: Tensor, dh: Tensor, saved: Tensor, vectors: Tensor, c_prev: None, c: None) -> Tensor:
    reset = saved.chunk(6, -1)[0]
    dreset, dz, dn = dx.chunk(3, -1)
    dq = dn * reset
    return torch.cat((torch.cat((dreset, dz, dq), -1) * normalize(_product(saved))[0], dq), -1)


def _split(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of the gates [3H], recurrent bias of n [H]."""
    hidden = vectors.shape[-1] // 4
    return vectors[..., : 3 * hidden], vectors[..., 3 * hidden :]


def _product(saved: Tensor) -> Tensor:
    """R h, as it was kept."""
    return saved[..., saved.shape[-1] // 2 :]
