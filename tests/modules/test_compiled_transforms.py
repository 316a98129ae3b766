"""torch.func's transforms and forward-mode AD inside torch.compile: the numbers that they give outside."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

import fastseq
from fastseq import functional as F
from support.recurrent import EVERY_MODULE, MODULES_OF_VARIANTS

T, B, I, H = 2, 2, 4, 6  # noqa: E741

MODULES = {
    "RNN": lambda: fastseq.RNN(I, H),
    "LSTM": lambda: fastseq.LSTM(I, H, num_layers=2, bidirectional=True),
    "LSTM-projected": lambda: fastseq.LSTM(I, H, proj_size=3),
    "GRU": lambda: fastseq.GRU(I, H),
    "GRU-heads": lambda: fastseq.GRU(I, H, num_heads=2),
    "GRU-zoneout": lambda: fastseq.GRU(I, H, zoneout=0.1).eval(),
    **{name: lambda name=name: getattr(fastseq, name)(I, H) for name in MODULES_OF_VARIANTS},
    "in a model": lambda: nn.Sequential(nn.Linear(I, I), fastseq.GRU(I, H)),
}
CELLS = [f"{name}Cell" for name in EVERY_MODULE]
MASK = torch.tensor([[1, 0], [1, 1]]).bool()
ATTENTIONS = {
    "attention": lambda q: F.attention(q, q, q),
    "attention-causal": lambda q: F.attention(q, q, q, causal=True),
    "attention-masked": lambda q: F.attention(q, q, q, attn_mask=MASK),
    "attention-weights": lambda q: F.attention(q, q, q, softcap=2.0, return_weights=True)[1],
    "sdpa": lambda q: F.scaled_dot_product_attention(q, q, q),
    "sdpa-masked": lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=MASK),
}
every_module = pytest.mark.parametrize("name", MODULES)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def made(name):
    torch.manual_seed(0)
    module = MODULES[name]().double()
    return module, {key: value.detach() for key, value in module.named_parameters()}, torch.randn(T, B, I, dtype=torch.float64)


def loss(module):
    return lambda parameters, x: functional_call(module, parameters, (x,))[0].square().sum()


def check(function, *arguments, backend="aot_eager", fullgraph=True):
    actual = torch.compile(function, backend=backend, fullgraph=fullgraph)(*arguments)
    expected = function(*arguments)
    torch.testing.assert_close(actual, expected)
    for leaf in torch.utils._pytree.tree_leaves(expected):
        assert leaf.any(), "nothing would be compared"


@every_module
def test_grad(name):
    module, parameters, x = made(name)
    check(lambda p, x: grad(loss(module), (0, 1))(p, x), parameters, x)


@every_module
def test_jvp(name):
    module, parameters, x = made(name)
    tangents = {key: torch.ones_like(value) for key, value in parameters.items()}
    check(lambda p, x: jvp(loss(module), (p, x), (tangents, torch.ones_like(x)))[1], parameters, x)


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_more_transforms(name):
    module, parameters, x = made(name)

    def output(x):
        return module(x)[0]

    check(lambda x: vjp(output, x)[1](torch.ones_like(output(x)))[0], x)
    torch._dynamo.reset()
    check(lambda x: jacrev(output)(x), x[:1, :1])
    torch._dynamo.reset()
    check(lambda x: jacfwd(output)(x), x[:1, :1])
    torch._dynamo.reset()
    check(lambda x: vmap(output)(x), torch.stack((x, 2 * x)))
    torch._dynamo.reset()
    check(lambda p, x: vmap(grad(loss(module)), (None, 0))(p, x), parameters, torch.stack((x, 2 * x)))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "PeepholeLSTM"])
def test_forward_mode(name):
    module, _, x = made(name)

    def tangent(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(module(forward_ad.make_dual(x, torch.ones_like(x)))[0]).tangent

    check(tangent, x, fullgraph=False)


@pytest.mark.parametrize("name", CELLS)
def test_cells(name):
    cell = getattr(fastseq, name)(I, H, dtype=torch.float64)
    parameters = {key: value.detach() for key, value in cell.named_parameters()}
    x = torch.randn(B, I, dtype=torch.float64)
    with torch.no_grad():
        states = cell(x.flip(0))

    def first(parameters, x):
        result = functional_call(cell, parameters, (x, states))
        return (result if isinstance(result, torch.Tensor) else result[0]).square().sum()

    check(lambda p, x: grad(first)(p, x), parameters, x)


@pytest.mark.parametrize("name", CELLS)
def test_vmap_over_cells(name):
    """Outside of torch.compile too, with every state and over weights."""
    cell, x = getattr(fastseq, name)(I, H, dtype=torch.float64), torch.randn(3, B, I, dtype=torch.float64)
    states = cell(x[0])

    def step(x, states):
        result = cell(x, states)
        return result if isinstance(result, torch.Tensor) else torch.stack(result)

    torch.testing.assert_close(vmap(step, (0, None))(x, states), torch.stack([step(each, states) for each in x]))
    weights = torch.stack([cell.weight_hh, 2 * cell.weight_hh]).detach()

    def other(weight):
        result = functional_call(cell, {"weight_hh": weight}, (x[0], states))
        return result if isinstance(result, torch.Tensor) else result[0]

    torch.testing.assert_close(vmap(other)(weights), torch.stack([other(each) for each in weights]))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name):
    q = torch.randn(2, 2, T, 8, dtype=torch.float64)

    def loss(q):
        return ATTENTIONS[name](q).square().sum()

    check(lambda q: grad(loss)(q), q)
    torch._dynamo.reset()
    check(lambda q: jvp(loss, (q,), (torch.ones_like(q),))[1], q)
    torch._dynamo.reset()
    check(lambda q: vmap(grad(loss))(q), q[None])


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention(need_weights):
    module = fastseq.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    x = torch.randn(2, 5, 8, dtype=torch.float64)

    def loss(x):
        return module(x, x, x, need_weights=need_weights)[need_weights].square().sum()

    check(lambda x: jvp(loss, (x,), (torch.ones_like(x),))[1], x)
    torch._dynamo.reset()
    check(lambda x: vmap(grad(loss))(x), x[None])


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch, of itself
def test_inductor():
    module, parameters, x = made("in a model")
    check(lambda p, x: grad(loss(module))(p, x), parameters, x, backend="inductor")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_forced_backends(backend):
    module, parameters, x = made("GRU")
    with fastseq.use_backend(backend):
        check(lambda p, x: grad(loss(module))(p, x), parameters, x)
