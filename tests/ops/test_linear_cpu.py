"""Projections with gradients by the library's products: values and gradients against fp64, at every instruction set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastseq
from fastseq.backends import library
from fastseq.ops._linear_eager import linear
from fastseq.testing import assert_all_close_to_truth

# rows, features, columns, no multiples of a tile, of which the first are too few for fp32; with a batch before the rows
SIZES = [((97,), 65, 70), ((3, 91), 200, 333), ((2, 2, 70), 333, 200)]


@pytest.fixture(autouse=True)
def native(monkeypatch):
    """Scratch holds NaN until it is written."""
    assert library.reason() is None
    monkeypatch.setenv("FASTSEQ_CPU_POISON", "1")


def given(size: Any, dtype: torch.dtype, bias: bool = True) -> list[Tensor | None]:
    torch.manual_seed(0)
    rows, features, columns = size
    x, weight = torch.randn(*rows, features), torch.randn(columns, features) / features**0.5
    tensors = [x, weight, torch.randn(columns) if bias else None]
    return [None if t is None else t.to(dtype).requires_grad_() for t in tensors]


def results(function: Any, tensors: list[Tensor | None], dout: Tensor) -> dict[str, Tensor]:
    out = function(*tensors)
    wanted = {name: t for name, t in zip(("x", "weight", "bias"), tensors, strict=True) if t is not None and t.requires_grad}
    grads = torch.autograd.grad(out, list(wanted.values()), dout)
    return {"out": out.detach(), **dict(zip(wanted, grads, strict=True))}


def check(tensors: list[Tensor | None], dout: Tensor) -> dict[str, Tensor]:
    wide = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    found = results(linear, tensors, dout)
    assert_all_close_to_truth(found, results(F.linear, tensors, dout), results(F.linear, wide, dout.double()))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_results(size, bias, dtype, level):
    tensors = given(size, dtype, bias)
    dout = torch.randn(*size[0], size[2]).to(dtype)
    found = check(tensors, dout)
    assert found["x"].shape == tensors[0].shape and found["x"].is_contiguous()
    again = results(linear, tensors, dout)
    assert all(torch.equal(value, again[name]) for name, value in found.items())


def test_who_multiplies(level):
    """The levels with products of their own what pays; everything else is torch's product."""
    for size, dtype, own in ((SIZES[0], torch.float32, False), (SIZES[1], torch.float32, True), (SIZES[0], torch.bfloat16, True)):
        node = linear(*given(size, dtype)).grad_fn
        assert (node.name() == "_LinearBackward") == (own and level in ("avx512_bf16", "amx"))
    assert linear(*given(SIZES[1], torch.float64)).grad_fn.name() != "_LinearBackward"


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)], ids=str
)
def test_some_gradients(wanted, level):
    tensors = given(SIZES[1], torch.float32)
    for tensor, want in zip(tensors, wanted, strict=True):
        tensor.requires_grad_(want)
    check(tensors, torch.randn(3, 91, 333))


def test_strides(level):
    """Of an input and of its gradient: dimensions exchanged, and broadcast as by ``sum``."""
    x, weight, bias = given(SIZES[1], torch.float32)
    x = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert not x.is_contiguous()
    check([x, weight, bias], torch.randn(91, 3, 333).transpose(0, 1))
    check([x, weight, bias], torch.ones(()).expand(3, 91, 333))


@pytest.mark.parametrize("number", [1e-36, 3.4e38, torch.inf, torch.nan])
@pytest.mark.parametrize("where", ["x", "weight", "dout"])
def test_numbers_beyond_the_parts(where, number, level):
    x, weight, bias = given(SIZES[1], torch.float32)
    dout = torch.randn(3, 91, 333)
    with torch.no_grad():
        {"x": x, "weight": weight, "dout": dout}[where].view(-1)[5] = number
    found, expected = (results(function, [x, weight, bias], dout) for function in (linear, F.linear))
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4, equal_nan=True)


def test_graph_of_the_gradient(level):
    x, weight, bias = given(SIZES[1], torch.float32)
    found = []
    for function in (linear, F.linear):
        dout = torch.randn(3, 91, 333, generator=torch.Generator().manual_seed(1)).requires_grad_()
        grads = torch.autograd.grad(function(x, weight, bias), (x, weight, bias), dout, create_graph=True)
        loss = sum(grad.pow(2).mean() for grad in grads)
        found.append(torch.autograd.grad(loss, (x, weight, dout)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_gradients_at_once(dtype, level):
    tensors, several = given(SIZES[1], dtype), torch.randn(2, 3, 91, 333).to(dtype)
    out = linear(*tensors)
    found = torch.autograd.grad(out, tensors, several, is_grads_batched=True, retain_graph=True)
    for i, dout in enumerate(several):
        for all_, one in zip(found, torch.autograd.grad(out, tensors, dout, retain_graph=True), strict=True):
            bound = 16 * torch.finfo(dtype).eps
            torch.testing.assert_close(all_[i], one, rtol=bound, atol=bound * one.abs().max().item())


def test_threads(level):
    """No sum depends on their number."""
    tensors, dout, before = given(SIZES[1], torch.float32), torch.randn(3, 91, 333), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results(linear, tensors, dout))
    finally:
        torch.set_num_threads(before)
    if linear(*tensors).grad_fn.name() == "_LinearBackward":
        assert all(torch.equal(value, other[name]) for other in found[1:] for name, value in found[0].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
def test_encoder_layer(batch_first, dtype, level):
    """Training of a whole layer against fp64, whose products are torch's."""
    torch.manual_seed(0)
    theirs = nn.TransformerEncoderLayer(128, 4, 500, dropout=0.0, batch_first=batch_first).to(dtype)
    ours, wide = (fastseq.TransformerEncoderLayer(128, 4, 500, dropout=0.0, batch_first=batch_first) for _ in range(2))
    for layer in (ours, wide):
        layer.load_state_dict(theirs.state_dict())
    ours, wide, x = ours.to(dtype), wide.double(), torch.randn(5, 57, 128).to(dtype)
    found = []
    for layer, given in ((ours, x), (theirs, x), (wide, x.double())):
        given = given.clone().requires_grad_()
        out = layer(given)
        grads = torch.autograd.grad(out.pow(3).mean(), (given, *layer.parameters()))
        found.append({str(i): t.detach() for i, t in enumerate((out, *grads))})
    assert_all_close_to_truth(*found)
    hidden = ours.linear1(x.requires_grad_())
    assert hidden.grad_fn.name() != "_LinearBackward"  # a module by itself is torch's


def test_hooks_and_other_modules_are_called():
    layer = fastseq.TransformerEncoderLayer(128, 4, 500, dropout=0.0)
    x, seen = torch.randn(5, 57, 128), []
    hook = layer.linear1.register_forward_hook(lambda *_: seen.append("linear1"))
    layer(x)
    hook.remove()

    class Linear(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            seen.append("linear2")
            return super().forward(input)

    layer.linear2 = Linear(500, 128)
    layer(x)
    assert seen == ["linear1", "linear2"]
