"""LSTM: i, f, o = sigmoid(x + r), g = tanh(x + r), c = f c + i g, h = o tanh(c)."""

import triton
import triton.language as tl

from fastseq.kernels.recurrent.activations import tanh


@triton.jit
def step(x, r, bias, h, c):
    i, f = tl.sigmoid(x[0] + r[0]), tl.sigmoid(x[1] + r[1])
    g, o = tanh(x[2] + r[2]), tl.sigmoid(x[3] + r[3])
    c = f * c + i * g
    return o * tanh(c), c, (i, f, g, o)


@triton.jit
def step_backward(dh, dc, saved, h_prev, c_prev, h, c):
    i, f, g, o = saved
    t = tanh(c)
    dc += dh * o * (1 - t * t)
    dx = (dc * g * i * (1 - i), dc * c_prev * f * (1 - f), dc * i * (1 - g * g), dh * t * o * (1 - o))
    return dx, dx, dh * 0, dc * f
