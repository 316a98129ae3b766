"""LSTM with layer norm N: i, f, o = sigmoid(x + w N(r)), g = tanh(x + w N(r)), c = f c + i g, h = o tanh(w_c N(c) + b_c)."""

import triton
import triton.language as tl

from fastseq.kernels.recurrent.activations import tanh
from fastseq.kernels.recurrent.cells.normalization import normalize, normalize_backward


@triton.jit
def step(x, r, v, h, c, real, H):
    normal, _ = normalize(r, real, H, 4)
    i, f = tl.sigmoid(x[0] + v[0] * normal[0]), tl.sigmoid(x[1] + v[1] * normal[1])
    g, o = tanh(x[2] + v[2] * normal[2]), tl.sigmoid(x[3] + v[3] * normal[3])
    c_new = f * c[0] + i * g
    normal_c, _ = normalize((c_new,), real, H, 1)
    return o * tanh(v[4] * normal_c[0] + v[5]), (c_new,), (i, f, g, o, r[0], r[1], r[2], r[3])


@triton.jit
def step_backward(dh, dc, saved, v, h_prev, c_prev, h, c, real, H):
    i, f, g, o, r_i, r_f, r_g, r_o = saved
    normal_c, scale_c = normalize(c, real, H, 1)
    s = tanh(v[4] * normal_c[0] + v[5])
    through = normalize_backward((dh * o * (1 - s * s) * v[4],), normal_c, scale_c, real, H, 1)
    dc_new = dc[0] + through[0]
    dx = (dc_new * g * i * (1 - i), dc_new * c_prev[0] * f * (1 - f), dc_new * i * (1 - g * g), dh * s * o * (1 - o))
    normal, scale = normalize((r_i, r_f, r_g, r_o), real, H, 4)
    scaled = (dx[0] * v[0], dx[1] * v[1], dx[2] * v[2], dx[3] * v[3])
    return dx, normalize_backward(scaled, normal, scale, real, H, 4), tl.zeros_like(dh), (dc_new * f,)
