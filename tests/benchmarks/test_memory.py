from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType

from fastseq.benchmarks.measure import memory
from fastseq.benchmarks.measure.memory import Event, cudnn_algorithms, kept, observe

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
    """Materialized attention keeps T x T scores for the backward pass, a linear layer does not."""
    from fastseq.benchmarks.workloads.layers import Attention

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


@pytest.mark.parametrize(
    ("kernels", "algorithms"),
    [
        (["void RNN_persist_fp_LSTM<__half>", "persistRNN_init"], ["persistent"]),
        (["void RNN_blockPersist_fp_GRU<float, 128>", "persistRNN_addBias<float>"], ["persist small-H"]),
        (["void elemWiseRNNcell<__half, (cudnnRNNMode_t)2>", "cutlass_80_tensorop_s1688gemm"], ["standard"]),
        (["RNN_blockPersist_fp_LSTM_HMMA", "LSTM_elementWise_bp1<float>"], ["persist small-H", "standard"]),
        (["persistRNN_addBias<float>"], ["none of the known kernels"]),
    ],
)
def test_cudnns_algorithm_shows_in_the_names_of_its_kernels(kernels, algorithms):
    assert cudnn_algorithms(["aten::_cudnn_rnn", *kernels]) == algorithms
    assert cudnn_algorithms(kernels) == []  # of other programs


def test_what_a_gpu_ran(monkeypatch):
    events = [
        Event("aten::_cudnn_rnn"),
        Event("void elemWiseRNNcell<float>", 0, True),
        Event("void elemWiseRNNcell<float>", 0, True),
        Event("void at::native::vectorized_elementwise_kernel<4>", 0, True),
    ]
    monkeypatch.setattr(memory, "_profile", lambda run, device: events)
    monkeypatch.setattr(memory, "_cuda_peak", lambda run, device: 1000)
    seen = observe(lambda: None, "cuda")
    assert seen == memory.Observation(1000, ["cuDNN: standard", "aten::_cudnn_rnn", "void elemWiseRNNcell<float>"], launches=3)


@pytest.mark.parametrize(
    ("name", "device", "kernel"),
    [
        ("gemm", DeviceType.CUDA, True),
        ("gemm", DeviceType.CPU, False),
        ("Memcpy HtoD (Pageable -> Device)", DeviceType.CUDA, False),
        ("Memset (Device)", DeviceType.CUDA, False),
    ],
)
def test_copies_are_no_kernels(name, device, kernel):
    assert memory._is_kernel(SimpleNamespace(name=lambda: name, device_type=lambda: device)) is kernel


def test_the_implementation_shows(capfd):
    q = torch.randn(1, 2, 64, 16)
    seen = observe(lambda: nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True))
    assert any("flash" in name or "math" in name for name in seen.chose)
    assert capfd.readouterr().err == ""
