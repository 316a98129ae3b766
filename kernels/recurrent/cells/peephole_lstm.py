"""LSTM with peepholes: i, f = sigmoid(x + r + p c), g = tanh(x + r), c = f c + i g, o = sigmoid(x + r + p_o c), h = o tanh(c)."""

import triton
import triton.language as tl

from fastseq.kernels.recurrent.activations import tanh


@triton.jit
def step(x, r, v, h, c, real, H):
    i, f = tl.sigmoid(x[0] + r[0] + v[0] * c[0]), tl.sigmoid(x[1] + r[1] + v[1] * c[0])
    g = tanh(x[2] + r[2])
    c_new = f * c[0] + i * g
    o = tl.sigmoid(x[3] + r[3] + v[2] * c_new)
    return o * tanh(c_new), (c_new,), (i, f, g, o)


@triton.jit
def step_backward(dh, dc, saved, v, h_prev, c_prev, h, c, real, H):
    i, f, g, o = saved
    t = tanh(c[0])
    do = dh * t * o * (1 - o)
    dc_new = dc[0] + dh * o * (1 - t * t) + do * v[2]
    di, df = dc_new * g * i * (1 - i), dc_new * c_prev[0] * f * (1 - f)
    dx = (di, df, dc_new * i * (1 - g * g), do)
    return dx, dx, tl.zeros_like(dh), (dc_new * f + di * v[0] + df * v[1],)
