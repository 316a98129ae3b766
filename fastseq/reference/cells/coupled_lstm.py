"""LSTM cell with coupled input and forget gates (Greff et al. 2017, "LSTM: A Search Space Odyssey", CIFG): three gates.

i, o = sigmoid(x + R h), g = tanh(x + R h), c = (1 - i) c + i g, h = o tanh(c)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .lstm import block


def step(x: Tensor, r: Tensor, vectors: None, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    i, g, o = (x + r).chunk(3, -1)
    i, g, o = i.sigmoid(), g.tanh(), o.sigmoid()
    c = c + i * (g - c)
    return o * c.tanh(), c, torch.cat((i, g, o), -1)


def step_backward(
    dh: Tensor, dc: Tensor, saved: Tensor, vectors: None, h_prev: Tensor, c_prev: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, None, None, Tensor]:
    i, g, o = saved.chunk(3, -1)
    tanh_c = c.tanh()
    dc = dc + dh * o * (1 - tanh_c * tanh_c)
    di = dc * (g - c_prev) * i * (1 - i)
    dg = dc * i * (1 - g * g)
    do = dh * tanh_c * o * (1 - o)
    return torch.cat((di, dg, do), -1), None, None, dc * (1 - i)


def candidate(saved: Tensor, c_prev: Tensor) -> Tensor:
    i, g, _ = saved.chunk(3, -1)
    return c_prev + i * (g - c_prev)


def output(saved: Tensor, vectors: None, c: Tensor) -> Tensor:
    return saved.chunk(3, -1)[2] * c.tanh()


def jacobian(weight: Tensor, saved: Tensor, vectors: None, h_prev: Tensor, c_prev: Tensor, h: Tensor, c: Tensor) -> Tensor:
    i, g, o = saved.chunk(3, -1)
    w_i, w_g, w_o = weight.chunk(3, -1)
    c_by_h = (g - c_prev) * i * (1 - i) * w_i + i * (1 - g * g) * w_g
    return block(c_by_h, 1 - i, o * (1 - o) * w_o, torch.zeros_like(o), o, c)
