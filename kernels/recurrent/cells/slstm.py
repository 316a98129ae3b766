"""sLSTM: z = tanh(x + r), o = sigmoid(x + r), a = log sigmoid(f) + m, m' = max(a, i), i' = exp(i - m'), f' = exp(a - m'),
c' = f' c + i' z, n' = f' n + i', h = o c' / n'.
"""

import triton
import triton.language as tl

from fastseq.kernels.recurrent.activations import tanh


@triton.jit
def step(x, r, v, h, c, real, H):
    i, f = x[0] + r[0], x[1] + r[1]
    z, o, s = tanh(x[2] + r[2]), tl.sigmoid(x[3] + r[3]), tl.sigmoid(f)
    # log sigmoid without overflow
    decayed = tl.minimum(f, 0.0) - tl.log(1 + tl.exp(-tl.abs(f))) + c[2]
    m = tl.maximum(decayed, i)
    i, f = tl.exp(i - m), tl.exp(decayed - m)
    c_new, n = f * c[0] + i * z, f * c[1] + i
    return o * c_new / n, (c_new, n, m), (i, f, z, o, s)


@triton.jit
def step_backward(dh, dc, saved, v, h_prev, c_prev, h, c, real, H):
    i, f, z, o, s = saved
    ratio = c[0] / c[1]
    dratio = dh * o / c[1]
    dc_new, dn = dc[0] + dratio, dc[1] - dratio * ratio
    # times i and f: gradients of their exponents
    di, df = (dc_new * z + dn) * i, (dc_new * c_prev[0] + dn * c_prev[1]) * f
    dm = dc[2] - di - df
    decayed = f >= i
    di += tl.where(decayed, 0.0, dm)
    df += tl.where(decayed, dm, 0.0)
    dx = (di, df * (1 - s), dc_new * i * (1 - z * z), dh * ratio * o * (1 - o))
    return dx, dx, tl.zeros_like(dh), (dc_new * f, dn * f, df)
