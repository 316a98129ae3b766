"""Elman cell: h = f(x + r), f tanh or relu."""

import triton
import triton.language as tl

from fastseq.kernels.recurrent.activations import tanh


@triton.jit
def step_tanh(x, r, v, h, c, real, H):
    return tanh(x[0] + r[0]), c, ()


@triton.jit
def step_backward_tanh(dh, dc, saved, v, h_prev, c_prev, h, c, real, H):
    dx = (dh * (1 - h * h),)
    return dx, dx, tl.zeros_like(dh), dc


@triton.jit
def step_relu(x, r, v, h, c, real, H):
    return tl.maximum(x[0] + r[0], 0.0, propagate_nan=tl.PropagateNan.ALL), c, ()


@triton.jit
def step_backward_relu(dh, dc, saved, v, h_prev, c_prev, h, c, real, H):
    dx = (tl.where(h <= 0, 0.0, dh),)
    return dx, dx, tl.zeros_like(dh), dc
