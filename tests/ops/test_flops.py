"""What torch's FLOP counter says of the ops: torch's own numbers where it has them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import fastseq
from fastseq import functional as F
from fastseq.ops.attention_decode import attention_decode
from fastseq.ops.types import DecodeSpec
from support.recurrent import MODULES_OF_VARIANTS


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True, "bias": False}], ids=str)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_recurrent_as_torch(name, options):
    x = torch.randn(20, 4, 64)
    of_torch, of_ours = [], []
    for package, found in ((nn, of_torch), (fastseq, of_ours)):
        module = getattr(package, name)(64, 128, **options)
        with torch.backends.mkldnn.flags(enabled=False):  # torch's LSTM counts nothing where oneDNN runs it
            found.append(counted(lambda module=module: module(x)))
            found.append(counted(lambda module=module: module(x)[0].sum().backward()))
            with torch.no_grad():
                found.append(counted(lambda module=module: module(x)))
    assert of_ours == of_torch


@pytest.mark.parametrize("name", MODULES_OF_VARIANTS)
def test_every_cell_counts(name):
    module, (t, b, i, h) = getattr(fastseq, name)(8, 16), (5, 3, 8, 16)
    gates = module.weight_hh_l0.shape[0]
    assert counted(lambda: module(torch.randn(t, b, i))) == 2 * t * b * gates * (i + h)


def test_projection():
    modules = [package.LSTM(8, 16, proj_size=4) for package in (nn, fastseq)]
    theirs, ours = (counted(lambda m=m: m(torch.randn(5, 3, 8))) for m in modules)
    assert ours == theirs


def test_attention():
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 16)
    forward = sdpa_flop_count((2, 4, 7, 8), (2, 4, 9, 8), (2, 4, 9, 16))
    backward = sdpa_backward_flop_count((2, 4, 7, 16), (2, 4, 7, 8), (2, 4, 9, 8), (2, 4, 9, 16))
    assert counted(lambda: F.attention(q, k, v)) == forward

    def trained():
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        F.attention(*inputs).sum().backward()

    assert counted(trained) == forward + backward
    weights = 2 * 2 * 4 * 7 * 9 * 8
    assert counted(lambda: F.attention(q, k, v, return_weights=True)) in (forward, forward + weights)
    assert counted(lambda: attention_decode(q, k, v, DecodeSpec(torch.tensor([9, 4], dtype=torch.int32)))) == forward


def test_packed_attention_counts_each_sequence():
    cu = torch.tensor([0, 3, 10], dtype=torch.int32)
    q = torch.randn(10, 2, 8)
    assert counted(lambda: F.attention(q, q, q, cu_seqlens_q=cu, cu_seqlens_k=cu)) == 2 * 2 * (9 + 49) * (8 + 8)


def test_a_counter_that_was_imported_later():
    """`import fastseq` does not import the counter, nor Triton with it."""
    code = """
import sys, torch, fastseq
assert "torch.utils.flop_counter" not in sys.modules and "triton" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    fastseq.GRU(64, 128)(torch.randn(20, 4, 64))
assert counter.get_total_flops() == 11796480, counter.get_total_flops()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
