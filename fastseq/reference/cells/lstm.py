"""LSTM cell (Hochreiter and Schmidhuber 1997, with forget gate; ``torch.nn.LSTM``).

i, f, o = sigmoid(x + R h), g = tanh(x + R h), c = f c + i g, h = o tanh(c)
"""

from __future__ import annotations

import torch
from torch import Tensor


def step(x: Tensor, r: Tensor, vectors: None, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    i, f, g, o = (x + r).chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * c + i * g
    return o * c.tanh(), c, torch.cat((i, f, g, o), -1)


def step_backward(
    dh: Tensor, dc: Tensor, saved: Tensor, vectors: None, h_prev: Tensor, c_prev: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, None, None, Tensor]:
    i, f, g, o = saved.chunk(4, -1)
    tanh_c = c.tanh()
    dc = dc + dh * o * (1 - tanh_c * tanh_c)
    di = dc * g * i * (1 - i)
    df = dc * c_prev * f * (1 - f)
    dg = dc * i * (1 - g * g)
    do = dh * tanh_c * o * (1 - o)
    return torch.cat((di, df, dg, do), -1), None, None, dc * f


def candidate(saved: Tensor, c_prev: Tensor) -> Tensor:
    i, f, g, _ = saved.chunk(4, -1)
    return f * c_prev + i * g


def output(saved: Tensor, vectors: None, c: Tensor) -> Tensor:
    return saved.chunk(4, -1)[3] * c.tanh()


def jacobian(weight: Tensor, saved: Tensor, vectors: None, h_prev: Tensor, c_prev: Tensor, h: Tensor, c: Tensor) -> Tensor:
    i, f, g, o = saved.chunk(4, -1)
    w_i, w_f, w_g, w_o = weight.chunk(4, -1)
    c_by_h = g * i * (1 - i) * w_i + c_prev * f * (1 - f) * w_f + i * (1 - g * g) * w_g
    return block(c_by_h, f, o * (1 - o) * w_o, torch.zeros_like(o), o, c)


def block(c_by_h: Tensor, c_by_c: Tensor, o_by_h: Tensor, o_by_c: Tensor, o: Tensor, c: Tensor) -> Tensor:
    """The derivatives of h = o tanh(c) and of c by h_prev and c_prev, from those of o and of c: [.., H, 2, 2]."""
    tanh_c = c.tanh()
    by_c = o * (1 - tanh_c * tanh_c)
    h_by_h, h_by_c = tanh_c * o_by_h + by_c * c_by_h, tanh_c * o_by_c + by_c * c_by_c
    return torch.stack((h_by_h, h_by_c, c_by_h, c_by_c), -1).unflatten(-1, (2, 2))
