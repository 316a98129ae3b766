"""LSTM cell with layer-normalized gates and cell output (Ba et al. 2016, "Layer Normalization", equations 20 to 22).

i, f, o = sigmoid(x + w N(R h)), g = tanh(x + w N(R h)), c = f c + i g, h = o tanh(w_c N(c) + b_c): N normalizes R h over all
gates together, c over the units. The input gates x come normalized, scaled and shifted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .normalization import normalize, normalize_backward


def candidate(saved: Tensor, c_prev: Tensor) -> Tensor:
    i, f, g = saved.chunk(8, -1)[:3]
    return f * c_prev + i * g


def output(saved: Tensor, vectors: Tensor, c: Tensor) -> Tensor:
    _, w_c, b_c = _split(vectors)
    return saved.chunk(8, -1)[3] * (w_c * normalize(c)[0] + b_c).tanh()


def step(x: Tensor, r: Tensor, vectors: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    w, w_c, b_c = _split(vectors)
    i, f, g, o = (x + w * normalize(r)[0]).chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * c + i * g
    return o * (w_c * normalize(c)[0] + b_c).tanh(), c, torch.cat((i, f, g, o, r.expand_as(x)), -1)


def step_backward(
    dh: Tensor, dc: Tensor, saved: Tensor, vectors: Tensor, h_prev: Tensor, c_prev: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, None, Tensor]:
    i, f, g, o, *_ = saved.chunk(8, -1)
    w, w_c, b_c = _split(vectors)
    normal_c, scale_c = normalize(c)
    s = (w_c * normal_c + b_c).tanh()
    dc = dc + normalize_backward(dh * o * (1 - s * s) * w_c, normal_c, scale_c)
    di = dc * g * i * (1 - i)
    df = dc * c_prev * f * (1 - f)
    dg = dc * i * (1 - g * g)
    do = dh * s * o * (1 - o)
    dx = torch.cat((di, df, dg, do), -1)
    return dx, normalize_backward(dx * w, *normalize(_product(saved))), None, dc * f


def vector_gradients(dx: Tensor, dr: Tensor, dh: Tensor, saved: Tensor, vectors: Tensor, c_prev: Tensor, c: Tensor) -> Tensor:
    o = saved.chunk(8, -1)[3]
    _, w_c, b_c = _split(vectors)
    normal_c, _ = normalize(c)
    s = (w_c * normal_c + b_c).tanh()
    ds = dh * o * (1 - s * s)
    return torch.cat((dx * normalize(_product(saved))[0], ds * normal_c, ds), -1)


def _split(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales of the gates [4H], scale and shift of c [H]."""
    hidden = vectors.shape[-1] // 6
    return vectors[..., : 4 * hidden], vectors[..., 4 * hidden : 5 * hidden], vectors[..., 5 * hidden :]


def _product(saved: Tensor) -> Tensor:
    """R h, as it was kept."""
    return saved[..., saved.shape[-1] // 2 :]
