from __future__ import annotations

import gc

import torch
from torch import nn

from fastseq.benchmarks.memory import kept, observe

FLOAT = 4


def test_peak_of_known_allocations():
    def run():
        a = torch.empty(1000)
        b = torch.empty(2000)
        del a
        c = torch.empty(500)  # 2500 floats live, after a peak of 3000
        return b, c

    assert observe(run).peak_bytes == 3000 * FLOAT


def test_what_was_there_before_does_not_count():
    big = torch.empty(100_000)
    assert observe(lambda: big[:10].clone()).peak_bytes == 10 * FLOAT


def test_garbage_from_before_is_not_released_meanwhile():
    """A release of something older would be taken for one of the call's own."""
    enabled = []
    cycle = [torch.empty(100_000)]
    cycle.append(cycle)
    del cycle
    observe(lambda: enabled.append(gc.isenabled()))
    assert enabled == [False] and gc.isenabled()


def test_saved_activations_count():
    """Materialised attention keeps T x T scores for the backward pass, a linear layer does not."""
    from fastseq.benchmarks.layers import Attention

    T, W, heads = 256, 32, 2
    layer, x = Attention(W, heads, fused=False), torch.randn(1, T, W, requires_grad=True)
    peak = observe(lambda: torch.autograd.grad(layer(x).sum(), x)).peak_bytes
    assert peak > heads * T * T * FLOAT
    linear = nn.Linear(W, W)
    assert observe(lambda: torch.autograd.grad(linear(x).sum(), x)).peak_bytes < heads * T * T * FLOAT / 4


def test_kept_is_the_result_and_what_the_backward_pass_needs():
    x = torch.randn(100, 10, requires_grad=True)
    assert kept(lambda: x.exp()) == 1000 * FLOAT
    assert kept(lambda: x.exp().sin()) == 2000 * FLOAT
    with torch.no_grad():
        assert kept(lambda: x.exp().sin()) == 1000 * FLOAT


def test_allocations_inside_an_operator_count():
    """The workspace of a fused operator is no output of it."""
    layer, x = nn.LSTM(32, 32), torch.randn(64, 4, 32)
    with torch.inference_mode():
        seen = observe(lambda: layer(x))
    output = 64 * 4 * 32 * FLOAT
    assert seen.peak_bytes > 2 * output


def test_the_implementation_shows(capfd):
    q = torch.randn(1, 2, 64, 16)
    seen = observe(lambda: nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True))
    assert any("flash" in name or "math" in name for name in seen.chose)
    assert capfd.readouterr().err == ""
