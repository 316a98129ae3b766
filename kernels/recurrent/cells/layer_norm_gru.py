"""GRU with layer norm N: r, z = sigmoid(x + w N(r)), q = w_n N(r)_n + b_n, n = tanh(x_n + r q), h = n + z (h - n)."""

import triton
import triton.language as tl

from fastseq.kernels.recurrent.activations import tanh
from fastseq.kernels.recurrent.cells.normalization import normalize, normalize_backward


@triton.jit
def step(x, r, v, h, c, real, H):
    normal, _ = normalize(r, real, H, 3)
    reset, z = tl.sigmoid(x[0] + v[0] * normal[0]), tl.sigmoid(x[1] + v[1] * normal[1])
    n = tanh(x[2] + reset * (v[2] * normal[2] + v[3]))
    return n + z * (h - n), c, (reset, z, n, r[0], r[1], r[2])


@triton.jit
def step_backward(dh, dc, saved, v, h_prev, c_prev, h, c, real, H):
    reset, z, n, r_r, r_z, r_n = saved
    normal, scale = normalize((r_r, r_z, r_n), real, H, 3)
    q = v[2] * normal[2] + v[3]
    dn = dh * (1 - z) * (1 - n * n)
    dz = dh * (h_prev - n) * z * (1 - z)
    dreset = dn * q * reset * (1 - reset)
    scaled = (dreset * v[0], dz * v[1], dn * reset * v[2])
    return (dreset, dz, dn), normalize_backward(scaled, normal, scale, real, H, 3), dh * z, dc
