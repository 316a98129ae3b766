"""GRU cell with the reset gate after the matrix product (``torch.nn.GRU``; cuDNN's linear_before_reset).

r, z = sigmoid(x + R h), q = R_n h + b_n, n = tanh(x_n + r q), h = n + z (h - n)
"""

from __future__ import annotations

import torch
from torch import Tensor


def step(x: Tensor, r: Tensor, vectors: Tensor | None, h: Tensor, c: None) -> tuple[Tensor, None, Tensor]:
    x_r, x_z, x_n = x.chunk(3, -1)
    r_r, r_z, q = r.chunk(3, -1)
    r, z = (x_r + r_r).sigmoid(), (x_z + r_z).sigmoid()
    q = q if vectors is None else q + vectors
    n = (x_n + r * q).tanh()
    return n + z * (h - n), None, torch.cat((r, z, n, q.expand_as(n)), -1)


def step_backward(
    dh: Tensor, dc: None, saved: Tensor, vectors: Tensor | None, h_prev: Tensor, c_prev: None, h: Tensor, c: None
) -> tuple[Tensor, Tensor, Tensor, None]:
    r, z, n, q = saved.chunk(4, -1)
    dn = dh * (1 - z) * (1 - n * n)
    dz = dh * (h_prev - n) * z * (1 - z)
    dr = dn * q * r * (1 - r)
    return torch.cat((dr, dz, dn), -1), torch.cat((dr, dz, dn * r), -1), dh * z, None


def jacobian(weight: Tensor, saved: Tensor, vectors: Tensor | None, h_prev: Tensor, c_prev: None, h: Tensor, c: None) -> Tensor:
    r, z, n, q = saved.chunk(4, -1)
    w_r, w_z, w_n = weight.chunk(3, -1)
    of_n = (1 - n * n) * (r * w_n + q * r * (1 - r) * w_r)
    return z + (h_prev - n) * z * (1 - z) * w_z + (1 - z) * of_n


def vector_gradients(dx: Tensor, dr: Tensor, dh: None, saved: Tensor, vectors: Tensor | None, c_prev: None, c: None) -> Tensor:
    return dr
