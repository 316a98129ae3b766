"""LSTM with coupled gates: i, o = sigmoid(x + r), g = tanh(x + r), c = (1 - i) c + i g, h = o tanh(c)."""

import triton
import triton.language as tl

from fastseq.kernels.recurrent.activations import tanh


@triton.jit
def step(x, r, v, h, c, real, H):
    i, g, o = tl.sigmoid(x[0] + r[0]), tanh(x[1] + r[1]), tl.sigmoid(x[2] + r[2])
    c_new = c[0] + i * (g - c[0])
    return o * tanh(c_new), (c_new,), (i, g, o)


@triton.jit
def step_backward(dh, dc, saved, v, h_prev, c_prev, h, c, real, H):
    i, g, o = saved
    t = tanh(c[0])
    dc_new = dc[0] + dh * o * (1 - t * t)
    dx = (dc_new * (g - c_prev[0]) * i * (1 - i), dc_new * i * (1 - g * g), dh * t * o * (1 - o))
    return dx, dx, tl.zeros_like(dh), (dc_new * (1 - i),)


@triton.jit
def candidate(saved, c_prev):
    return c_prev + saved[0] * (saved[1] - c_prev)
