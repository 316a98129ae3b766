"""sLSTM cell: exponential input gate, normalizer, stabilizer (Beck et al. 2024, "xLSTM", equations 8 to 17; sigmoid forget gate).

z, o = tanh(x + R h), sigmoid(x + R h), m' = max(log sigmoid(f) + m, i), i' = exp(i - m'), f' = exp(log sigmoid(f) + m - m'),
c' = f' c + i' z, n' = f' n + i', h' = o c' / n', where i and f stand for x + R h of their gates. The states c, n, m lie side by
side.
"""

from __future__ import annotations

import torch
from torch import Tensor


def step(x: Tensor, r: Tensor, vectors: None, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    i, f, z, o = (x + r).chunk(4, -1)
    c, n, m = c.chunk(3, -1)
    z, o, s = z.tanh(), o.sigmoid(), f.sigmoid()
    decayed = torch.nn.functional.logsigmoid(f) + m
    m = torch.maximum(decayed, i)
    i, f = (i - m).exp(), (decayed - m).exp()
    c, n = f * c + i * z, f * n + i
    return o * c / n, torch.cat((c, n, m), -1), torch.cat((i, f, z, o, s), -1)


def step_backward(
    dh: Tensor, dc: Tensor, saved: Tensor, vectors: None, h_prev: Tensor, c_prev: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, None, None, Tensor]:
    i, f, z, o, s = saved.chunk(5, -1)
    c, n, _ = c.chunk(3, -1)
    c_prev, n_prev, _ = c_prev.chunk(3, -1)
    dc, dn, dm = dc.chunk(3, -1)
    ratio = c / n
    do = dh * ratio * o * (1 - o)
    dratio = dh * o / n
    dc, dn = dc + dratio, dn - dratio * ratio
    dz = dc * i * (1 - z * z)
    # times i and f: gradients of their exponents
    di, df = (dc * z + dn) * i, (dc * c_prev + dn * n_prev) * f
    # m' is one of the two exponents' first terms and is subtracted from both
    dm = dm - di - df
    decayed = f >= i
    di, df = di + torch.where(decayed, 0, dm), df + torch.where(decayed, dm, 0)
    return torch.cat((di, df * (1 - s), dz, do), -1), None, None, torch.cat((dc * f, dn * f, df), -1)
