"""NTM and DNC: against their equations cell by cell, another package, steps, errors, and copying beyond the trained length."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracles import dnc as oracle
from oracles import frozen

import fastseq
from fastseq.models import DNC, NTM
from support import models as support

KINDS = pytest.mark.parametrize("kind", [NTM, DNC])
X, H, Y, N, E, R = 3, 5, 2, 4, 3, 2


def made(kind, dtype=torch.float64):
    torch.manual_seed(0)
    return kind(X, H, Y, cells=N, cell_size=E, heads=R).to(dtype)


def test_dnc_parity_with_another_package():
    """Five steps from a state: outputs, the state after them, and every gradient."""
    results = frozen.read(oracle.__file__)
    model = DNC(oracle.X, oracle.H, oracle.X, cells=oracle.CELLS, cell_size=oracle.CELL, heads=oracle.HEADS).double()
    names = {name: name.replace("interface", "rnn_layer_memory_shared.interface_weights") for name, _ in model.named_parameters()}
    names |= {name: f"lstm_layer_0.{name.partition('.')[2]}_l0" for name in names if name.startswith("controller")}
    model.load_state_dict({name: results["weights"][other] for name, other in names.items()})

    def ours(theirs):
        order = ("h", "c", "memory", "usage_vector", "precedence", "link_matrix", "write_weights", "read_weights", "read")
        h, c, memory, usage, precedence, links, writing, reading, read = (theirs[name] for name in order)
        return h, c, memory, usage, precedence[:, 0], links[:, 0], writing[:, 0], reading, read.unflatten(1, (oracle.HEADS, -1))

    x = results["input"].requires_grad_()
    y, state = model(x, ours(results["before"]))
    torch.testing.assert_close(y, results["output"], rtol=0, atol=1e-14)
    torch.testing.assert_close(state, ours(results["after"]), rtol=0, atol=1e-14)
    h, c, memory, usage, precedence, links, writing, reading, read = state
    frozen.weighted(y, memory, usage, precedence[:, None], links, writing[:, None], reading, h, c, read.flatten(1)).backward()
    found = {names[name]: parameter.grad for name, parameter in model.named_parameters()} | {"input": x.grad}
    torch.testing.assert_close(found, results["gradients"], rtol=1e-11, atol=1e-12)


def cosine(a, b):
    dot, of_a, of_b = (sum(x * y for x, y in zip(p, q, strict=True)) for p, q in ((a, b), (a, a), (b, b)))
    return dot / (of_a.sqrt() * of_b.sqrt() + 1e-6)


def by_equations(model, x, steps):
    """An NTM on one row x [T, X], equations 2 to 9 of the paper element by element."""

    def one(value):
        return torch.tensor(float(value), dtype=x.dtype)

    memory = [[one(1e-6) for _ in range(E)] for _ in range(N)]
    weights = [[one(i == 0) for i in range(N)] for _ in range(1 + R)]
    read, h, c, outputs = [one(0)] * (R * E), torch.zeros(H, dtype=x.dtype), torch.zeros(H, dtype=x.dtype), []
    w_ih, w_hh, b_ih, b_hh = model.controller.parameters()
    for t in range(steps):
        i, f, g, o = (w_ih @ torch.stack([*x[t], *read]) + b_ih + w_hh @ h + b_hh).split(H)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        said = list(model.interface.weight @ h + model.interface.bias)
        read = []
        for head in range(1 + R):
            of_head = said[head * (E + 6) : (head + 1) * (E + 6)]
            key, beta, gate = [torch.tanh(k) for k in of_head[:E]], F.softplus(of_head[E]), torch.sigmoid(of_head[E + 1])
            shift, gamma = torch.stack(of_head[E + 2 : E + 5]).softmax(0), 1 + F.softplus(of_head[E + 5])
            found = torch.stack([beta * cosine(key, row) for row in memory]).softmax(0)
            kept = [gate * found[n] + (1 - gate) * weights[head][n] for n in range(N)]
            moved = [sum(kept[j] * shift[s + 1] for j in range(N) for s in (-1, 0, 1) if (j + s) % N == n) for n in range(N)]
            sharp = [(w + 1e-12) ** gamma for w in moved]
            weights[head] = [w / sum(sharp) for w in sharp]
            if head == 0:
                erase, add = said[-2 * E : -E], said[-E:]
                memory = [[memory[n][e] * (1 - weights[0][n] * torch.sigmoid(erase[e])) + weights[0][n] * torch.tanh(add[e])
                           for e in range(E)] for n in range(N)]  # fmt: skip
            else:
                read += [sum(weights[head][n] * memory[n][e] for n in range(N)) for e in range(E)]
        outputs.append(model.output.weight @ torch.cat((h, torch.stack(read))) + model.output.bias)
    return torch.stack(outputs), torch.stack([torch.stack(row) for row in memory]), torch.stack([torch.stack(w) for w in weights])


def test_ntm_against_its_equations():
    model = made(NTM)
    with torch.no_grad():
        model.interface.weight.mul_(4)
    x = torch.randn(2, 4, X, dtype=torch.float64)
    y, (_, _, memory, weights, _) = model(x)
    rows = [by_equations(model, row, 4) for row in x]
    expected = [torch.stack(parts) for parts in zip(*rows, strict=True)]
    torch.testing.assert_close([y, memory, weights], expected, rtol=1e-12, atol=1e-14)
    parameters = list(model.parameters())
    grads = [torch.autograd.grad(frozen.weighted(*of), parameters) for of in ((y, memory, weights), expected)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-11)


@KINDS
def test_every_call_goes_on_where_the_last_one_ended(kind):
    support.assert_steps_are_forward(made(kind), torch.randn(2, 5, X, dtype=torch.float64))


@KINDS
def test_causal_and_rows_alone(kind):
    x = torch.randn(3, 6, X, dtype=torch.float64)
    support.assert_causal(made(kind), x)
    support.assert_rows_stand_alone(made(kind), x)


@KINDS
def test_weights_are_shares_of_the_memory(kind):
    """Of an NTM they are one in sum, of a DNC at most; its links lead from no cell to itself."""
    torch.manual_seed(0)
    model = made(kind, torch.float32)
    with torch.no_grad():
        model.interface.weight.mul_(10)
    state = model(3 * torch.randn(8, 40, X))[1]
    if kind is NTM:
        torch.testing.assert_close(state[3].sum(-1), torch.ones(8, 1 + R))
        return
    *_, usage, precedence, links, writing, reading, _ = state
    for shares in (precedence, writing, reading, links.mT, links):
        assert shares.min() >= 0 and shares.sum(-1).max() <= 1 + 1e-5
    assert usage.min() >= 0 and usage.max() <= 1 and not links.diagonal(dim1=1, dim2=2).any()


def test_free_cells_are_taken_in_order():
    from fastseq.models.memory import allocation

    torch.testing.assert_close(allocation(torch.zeros(1, 3))[0], torch.tensor([1.0, 0.0, 0.0]), rtol=0, atol=2e-6)
    torch.testing.assert_close(
        allocation(torch.tensor([[1.0, 0.5, 0.25]]))[0], torch.tensor([0.0, 0.125, 0.75]), rtol=0, atol=2e-6
    )


@KINDS
def test_gradients_of_empty_memory_are_finite(kind):
    model, x = made(kind), torch.randn(2, 8, X, dtype=torch.float64, requires_grad=True)
    model(x)[0].square().sum().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())


@support.ON_COMPILERS
@KINDS
def test_compiled_without_a_break(kind, compiler):
    model = made(kind)
    support.assert_compiles(lambda x: model(x)[0], model, compiler, torch.randn(2, 3, X, dtype=torch.float64))


ntm, dnc = made(NTM, torch.float32), made(DNC, torch.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: NTM(0, 5, 2), ValueError, "input_size must be"),
        (lambda: DNC(3, 5, 2, cells=2.5), TypeError, "cells must be an int, got 2.5"),
        (lambda: NTM(3, 5, 2, heads=0), ValueError, "heads must be"),
        (lambda: DNC(3, 5, 2, read_heads=1), TypeError, "unexpected keyword argument 'read_heads'"),
        (lambda: ntm(torch.randn(2, 3)), RuntimeError, r"the input must be \[any, any, 3\], got \[2, 3\]"),
        (lambda: ntm.step(torch.randn(2, 4)), RuntimeError, r"the input must be \[any, 3\], got \[2, 4\]"),
        (
            lambda: ntm(torch.randn(3, 2, X), ntm(torch.randn(2, 2, X))[1]),
            RuntimeError,
            r"state\[0\] must be \[3, 5\] for this model",
        ),
        (lambda: ntm(torch.randn(2, 2, X), dnc(torch.randn(2, 2, X))[1]), RuntimeError, "state must be a tuple of 5"),
        (lambda: dnc(torch.randn(2, 2, X), list(dnc(torch.randn(2, 2, X))[1])), RuntimeError, "got list"),
        (lambda: dnc(torch.randn(2, 2, X), made(DNC)(torch.randn(2, 2, X).double())[1]), RuntimeError, "must suit an input"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.slow
@pytest.mark.timeout(900)
@KINDS
def test_copies_longer_rows_than_an_lstm(kind):
    """Rows of 1 to 5 steps of 4 bits, then said again: learned without an error, and at 10 steps better than an LSTM by half."""

    def task(length, rows=16):
        bits = torch.randint(2, (rows, length, 4)).float()
        x = torch.zeros(rows, 2 * length + 1, 5)
        x[:, :length, :4], x[:, length, 4] = bits, 1
        return x, bits

    def wrong(run, length):
        x, bits = task(length, 64)
        with torch.no_grad():
            return ((run(x)[:, -length:] > 0) != (bits > 0.5)).float().sum((1, 2)).mean().item()

    def learned(build, steps):
        torch.manual_seed(0)
        model = build()
        run = model if isinstance(model, torch.nn.Sequential) else lambda x: model(x)[0]

        def loss():
            x, bits = task(int(torch.randint(1, 6, ())))
            return F.binary_cross_entropy_with_logits(run(x)[:, -bits.shape[1] :], bits)

        support.trained(model, loss, steps, 5e-3, clip=10.0)
        return wrong(run, 5), wrong(run, 10)

    class First(torch.nn.Module):
        def forward(self, results):
            return results[0]

    def lstm():
        return torch.nn.Sequential(fastseq.LSTM(5, 128, batch_first=True), First(), torch.nn.Linear(128, 4))

    options = {"cells": 22, "cell_size": 8} if kind is NTM else {"cells": 12, "cell_size": 8}
    of_kind = learned(lambda: kind(5, 48, 4, **options), 1800 if kind is NTM else 1200)
    found = *of_kind, learned(lstm, 1800)[1]
    assert found[0] < 1 and found[1] < found[2] / 2, found
