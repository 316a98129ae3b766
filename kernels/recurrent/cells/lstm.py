"""LSTM: i, f, o = sigmoid(x + r), g = tanh(x + r), c = f c + i g, h = o tanh(c)."""

import triton
import triton.language as tl

from fastseq.kernels.recurrent.activations import tanh


@triton.jit
def step(x, r, v, h, c, real, H):
    i, f = tl.sigmoid(x[0] + r[0]), tl.sigmoid(x[1] + r[1])
    g, o = tanh(x[2] + r[2]), tl.sigmoid(x[3] + r[3])
    c_new = f * c[0] + i * g
    return o * tanh(c_new), (c_new,), (i, f, g, o)


@triton.jit
def step_backward(dh, dc, saved, v, h_prev, c_prev, h, c, real, H):
    i, f, g, o = saved
    t = tanh(c[0])
    dc_new = dc[0] + dh * o * (1 - t * t)
    dx = (dc_new * g * i * (1 - i), dc_new * c_prev[0] * f * (1 - f), dc_new * i * (1 - g * g), dh * t * o * (1 - o))
    return dx, dx, tl.zeros_like(dh), (dc_new * f,)


@triton.jit
def candidate(saved, c_prev):
    return saved[1] * c_prev + saved[0] * saved[2]
