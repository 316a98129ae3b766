"""LSTM cell with peephole connections (Gers and Schmidhuber 2000, "Recurrent nets that time and count").

i, f = sigmoid(x + R h + p c), g = tanh(x + R h), c = f c + i g, o = sigmoid(x + R h + p_o c), h = o tanh(c): the output gate sees
the new c, the others the old one, each unit its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .lstm import block, candidate, output

__all__ = ["candidate", "jacobian", "output", "step", "step_backward", "vector_gradients"]


def step(x: Tensor, r: Tensor, vectors: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    i, f, g, o = (x + r).chunk(4, -1)
    p_i, p_f, p_o = vectors.chunk(3, -1)
    i, f, g = (i + p_i * c).sigmoid(), (f + p_f * c).sigmoid(), g.tanh()
    c = f * c + i * g
    o = (o + p_o * c).sigmoid()
    return o * c.tanh(), c, torch.cat((i, f, g, o), -1)


def step_backward(
    dh: Tensor, dc: Tensor, saved: Tensor, vectors: Tensor, h_prev: Tensor, c_prev: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, None, None, Tensor]:
    i, f, g, o = saved.chunk(4, -1)
    p_i, p_f, p_o = vectors.chunk(3, -1)
    tanh_c = c.tanh()
    do = dh * tanh_c * o * (1 - o)
    dc = dc + dh * o * (1 - tanh_c * tanh_c) + do * p_o
    di = dc * g * i * (1 - i)
    df = dc * c_prev * f * (1 - f)
    dg = dc * i * (1 - g * g)
    return torch.cat((di, df, dg, do), -1), None, None, dc * f + di * p_i + df * p_f


def vector_gradients(dx: Tensor, dr: Tensor, dh: None, saved: Tensor, vectors: Tensor, c_prev: Tensor, c: Tensor) -> Tensor:
    di, df, _, do = dx.chunk(4, -1)
    return torch.cat((di * c_prev, df * c_prev, do * c), -1)


def jacobian(weight: Tensor, saved: Tensor, vectors: Tensor, h_prev: Tensor, c_prev: Tensor, h: Tensor, c: Tensor) -> Tensor:
    i, f, g, o = saved.chunk(4, -1)
    (w_i, w_f, w_g, w_o), (p_i, p_f, p_o) = weight.chunk(4, -1), vectors.chunk(3, -1)
    through_i, through_f, through_o = g * i * (1 - i), c_prev * f * (1 - f), o * (1 - o)
    c_by_h = through_i * w_i + through_f * w_f + i * (1 - g * g) * w_g
    c_by_c = f + through_i * p_i + through_f * p_f
    return block(c_by_h, c_by_c, through_o * (w_o + p_o * c_by_h), through_o * p_o * c_by_c, o, c)
