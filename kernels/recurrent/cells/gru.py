"""GRU, reset after the product: r, z = sigmoid(x + r), q = r_n + b_n, n = tanh(x_n + r q), h = n + z (h - n)."""

import triton
import triton.language as tl

from fastseq.kernels.recurrent.activations import tanh


@triton.jit
def step(x, r, v, h, c, real, H):
    reset, z = tl.sigmoid(x[0] + r[0]), tl.sigmoid(x[1] + r[1])
    q = r[2] + v[0]
    n = tanh(x[2] + reset * q)
    return n + z * (h - n), c, (reset, z, n, q)


@triton.jit
def step_backward(dh, dc, saved, v, h_prev, c_prev, h, c, real, H):
    reset, z, n, q = saved
    dn = dh * (1 - z) * (1 - n * n)
    dz = dh * (h_prev - n) * z * (1 - z)
    dreset = dn * q * reset * (1 - reset)
    return (dreset, dz, dn), (dreset, dz, dn * reset), dh * z, dc
