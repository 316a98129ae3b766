"""`python -m fastseq.benchmarks.gpu.sanitizer_smoke`: each family of GPU kernels once on a small case, for compute-sanitizer.

Sizes are no multiples of a tile: an access beyond the end of a tensor is where a mask is wrong.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from itertools import zip_longest
from unittest.mock import patch

import torch
from torch import Tensor

import fastseq
from fastseq.backends import BACKENDS, forced, use_backend
from fastseq.backends.cuda.recurrent import precision_of
from fastseq.functional import attention, attention_with_kv_cache
from fastseq.kernels.recurrent.configs import FORMS

from .cuda_plans import forms, ranked

FORCED_FORM = "FASTSEQ_TRITON_RECURRENT"
Run = Callable[[str], Iterable[Tensor]]  # from a device to what it computes


def attention_with_gradients(device: str) -> Iterable[Tensor]:
    """Forward, both backward kernels and the bias's own."""
    q, k, v = (torch.randn(2, 2, 35, 24, device=device, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 35, 35, device=device, requires_grad=True)
    out = attention(q, k, v, attn_bias=bias, causal=True)
    return out, *torch.autograd.grad(out.square().sum(), (q, k, v, bias))


def attention_with_weights(device: str) -> Iterable[Tensor]:
    q, k, v = (torch.randn(2, 2, 35, 24, device=device) for _ in range(3))
    return attention(q, k, v, return_weights=True)


def decode(device: str) -> Iterable[Tensor]:
    """Two queries a sequence against a cache, the keys cut into two parts."""
    q = torch.randn(2, 4, 2, 24, device=device)
    k, v = (torch.randn(2, 2, 150, 24, device=device) for _ in range(2))
    lengths = torch.tensor([150, 37], device=device)
    return attention_with_kv_cache(q, k, v, cache_seqlens=lengths, num_splits=2, return_lse=True)


def recurrent(cell: str, dtype: torch.dtype, form: str = "") -> Run:
    """Forward and backward of a layer, in one form of the Triton kernels; the form of a single step gets one step."""

    def run(device: str) -> Iterable[Tensor]:
        with patch.dict(os.environ, {FORCED_FORM: form}):
            layer = getattr(fastseq, cell)(20, 20).to(device, dtype)
            x = torch.randn(1 if form == "single" else 5, 3, 20, device=device, dtype=dtype, requires_grad=True)
            out, _ = layer(x)
            return out, *torch.autograd.grad(out.square().sum(), (x, *layer.parameters()))

    return run


def persistent(cell: str, dtype: torch.dtype) -> Run:
    """Forward and backward of a layer in CUDA C++, on the best plan of every form that the device allows."""

    def run(device: str) -> Iterable[Tensor]:
        machine = BACKENDS[forced() or "cuda"].MACHINE
        name, precision = "rnn_tanh" if cell == "RNN" else cell.lower(), precision_of(dtype, machine)
        sizes = (3, 1, 20, machine.device(torch.device(device)))
        ranks = [forms(name, precision, backward, *sizes).values() for backward in (False, True)]
        for pair in zip_longest(*ranks, fillvalue=0):
            with ranked(*pair):
                yield from recurrent(cell, dtype)(device)

    return run


# By backend. The Triton kernels of all cells and dtypes have the same loads and stores; those in CUDA C++ do not.
FAMILIES: dict[str, dict[str, Run]] = {
    "triton": {
        "attention, forward and backward with a bias": attention_with_gradients,
        "attention, weights": attention_with_weights,
        "attention against a cache": decode,
        **{f"LSTM, form {form!r}": recurrent("LSTM", torch.float32, form) for form in FORMS},
    },
    "cuda": {
        f"{cell}, {str(dtype).removeprefix('torch.')}": persistent(cell, dtype)
        for cell in ("LSTM", "GRU", "RNN")
        for dtype in (torch.float32, torch.bfloat16)
    },
}


def main(device: str = "cuda") -> int:
    """0: all ran and gave finite numbers; 1: one did not. An exception of one is not caught: the rest could not be trusted."""
    torch.manual_seed(0)
    wrong = False
    for backend, families in FAMILIES.items():
        obstacle = BACKENDS[backend].available()
        if obstacle:
            print(f"{backend}: left out, {obstacle}")
            continue
        for name, run in families.items():
            with use_backend(backend):
                finite = all(bool(t.isfinite().all()) for t in run(device))
            print(f"{backend}, {name}: {'ran' if finite else 'not finite'}", flush=True)
            wrong = wrong or not finite
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
