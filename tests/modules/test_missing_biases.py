"""A bias that is None counts as zeros, in every direction by itself; its gradient is None."""

from __future__ import annotations

import itertools

import pytest
import torch

import fastseq
from fastseq import functional as F
from fastseq.backends.cpu.recurrent import CELLS as NATIVE
from support.cases import VARIANTS
from support.recurrent import EVERY_MODULE as MODULES

I, H = 4, 6  # noqa: E741
BIASES = [f"bias_{kind}_l0{end}" for kind in ("ih", "hh") for end in ("", "_reverse")]
BACKENDS = ("auto", "cpu", "reference")


def native(cell):
    """The backends that run a cell."""
    return BACKENDS if cell in NATIVE else [backend for backend in BACKENDS if backend != "cpu"]


def gradients(module, x):
    module.zero_grad()
    output = module(x)[0]
    output.square().sum().backward()
    return output.detach(), {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize(("name", "backend"), [(n, b) for n in MODULES for b in native(getattr(fastseq, n)(I, H).cell)])
def test_modules(name, backend):
    for missing in itertools.chain.from_iterable(itertools.combinations(BIASES, n) for n in (1, 2, 4)):
        torch.manual_seed(0)
        module = getattr(fastseq, name)(I, H, bidirectional=True, dtype=torch.float64)
        x = torch.randn(5, 3, I, dtype=torch.float64)
        with torch.no_grad():
            for bias in missing:
                getattr(module, bias).zero_()
        with fastseq.use_backend(backend):
            expected, of_zeros = gradients(module, x)
            for bias in missing:
                setattr(module, bias, None)
            actual, grads = gradients(module, x)
        torch.testing.assert_close(actual, expected)
        for key, grad in grads.items():
            torch.testing.assert_close(grad, of_zeros[key])


@pytest.mark.parametrize("name", ["LayerNormLSTM"])
def test_the_bias_of_a_norm(name):
    module, x = getattr(fastseq, name)(I, H, dtype=torch.float64), torch.randn(5, 3, I, dtype=torch.float64)
    expected = module(x)[0]
    module.bias_ln_c_l0 = None
    torch.testing.assert_close(module(x)[0], expected)
    module.bias_hh_l0 = None
    assert module(x)[0].shape == expected.shape


@pytest.mark.parametrize("missing", [("b_ih",), ("b_hh",), ("b_ih", "b_hh")])
@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
@pytest.mark.parametrize("name", ["rnn_cell", "lstm_cell", "gru_cell"])
def test_functional_cells(name, backend, missing):
    torch.manual_seed(0)
    gates = {"rnn_cell": 1, "lstm_cell": 4, "gru_cell": 3}[name]
    x, w_ih, w_hh = torch.randn(3, I), torch.randn(gates * H, I), torch.randn(gates * H, H)
    biases = {key: torch.randn(gates * H) for key in ("b_ih", "b_hh")}
    zeroed = {key: torch.zeros_like(bias) if key in missing else bias for key, bias in biases.items()}
    absent = {key: None if key in missing else bias for key, bias in biases.items()}
    with fastseq.use_backend(backend):
        expected, actual = (getattr(F, name)(x, None, w_ih, w_hh, **of) for of in (zeroed, absent))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("cell", "backend"), [(cell, backend) for cell in VARIANTS for backend in native(cell)])
def test_functional_variants(cell, backend):
    """One step, and a layer of blocks of units."""
    row = fastseq.cells.CELLS[cell]
    gates, heads = len(row.gates), 2
    extra = [torch.randn(size * H) for _, size in row.parameters]
    for missing in (2, 3):
        params = [torch.randn(gates * H, I), torch.randn(gates * H, H), torch.randn(gates * H), torch.randn(gates * H), *extra]
        zeroed = [torch.zeros_like(p) if i == missing else p for i, p in enumerate(params)]
        absent = [None if i == missing else p for i, p in enumerate(params)]
        x = torch.randn(5, 3, I)
        with fastseq.use_backend(backend):
            torch.testing.assert_close(F.recurrent_cell(cell, x[0], None, absent), F.recurrent_cell(cell, x[0], None, zeroed))
            zeroed[1] = absent[1] = params[1][:, : H // heads]
            of = [F.recurrent(cell, x, None, given, num_heads=heads)[0] for given in (absent, zeroed)]
        torch.testing.assert_close(*of)


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"])
def test_a_missing_weight_is_an_error(name):
    module = fastseq.LSTM(I, H, proj_size=2)
    with pytest.raises(TypeError, match=f"{name[:-3]} of layer 0 must be a Tensor, not NoneType"):
        params = [None if key == name else p for key, p in module.named_parameters()]
        F.lstm(torch.randn(2, 3, I), None, params, proj_size=2)
