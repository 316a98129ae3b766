"""Documents end to end in one row (``cu_seqlens``): as each document alone, whatever their order, some of them empty."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fastseq
from fastseq import functional as F
from fastseq.cells import CELLS
from support.cases import RecurrentCase
from support.recurrent import RecurrentBattery

LENGTHS = (3, 0, 7, 1, 7, 0, 2)


def problem(cell: str) -> tuple[dict[str, Any], torch.Tensor]:
    case = RecurrentCase(cell, sum(LENGTHS), len(LENGTHS), 4, 6, 2, bidirectional=True, resets="state")
    inputs, names = RecurrentBattery().make(case, torch.float64), CELLS[cell].states
    params = [value for name, value in inputs.items() if name.startswith(("weight", "bias"))]
    given = {
        "input": inputs["x"][:, 0].detach().requires_grad_(),
        "hx": [inputs[f"{name}0"] for name in names],
        "reset_to": [inputs[f"reset_{name}"] for name in names],
        "resets": inputs["resets"][:, 0],
    }
    options = {"cell": cell, "params": params, "num_layers": 2, "bidirectional": True}
    return given | options, torch.tensor([0, *LENGTHS]).cumsum(0)


@pytest.mark.parametrize("state", (True, False))
@pytest.mark.parametrize("cell", CELLS)
def test_each_document_alone(cell, state):
    given, cu_seqlens = problem(cell)
    if not state:
        given["hx"] = None
    y, finals, cells = F.recurrent(**given, cu_seqlens=cu_seqlens.int(), return_cells=CELLS[cell].has_c)
    leaves = [given["input"], *given["params"], *given["reset_to"], *(given["hx"] or ())]
    outputs, ends, of_cells = [], [], []
    for s, (begin, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        hx = None if given["hx"] is None else [of[:, s : s + 1] for of in given["hx"]]
        if begin == end:
            names = zip(CELLS[cell].states, finals, strict=True)
            nothing = [torch.full_like(final[:, :1], -torch.inf if name == "m" else 0.0) for name, final in names]
            ends.append(nothing if hx is None else hx)
            continue
        alone = given | {"input": given["input"][begin:end, None], "hx": hx, "resets": given["resets"][begin:end, None]}
        own, states, c = F.recurrent(**alone, return_cells=CELLS[cell].has_c)
        outputs.append(own[:, 0])
        ends.append(states)
        of_cells.append(None if c is None else c[:, :, 0])
    expected = [torch.cat(outputs), *(torch.cat(states, 1) for states in zip(*ends, strict=True))]
    torch.testing.assert_close([y, *finals], expected)
    if cells is not None:
        torch.testing.assert_close(cells, torch.cat(of_cells, 1))
    generator = torch.Generator().manual_seed(0)
    some = expected[:1] if cell == "slstm" else expected  # whose states may be infinite
    weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in some]
    found, wanted = (
        torch.autograd.grad(outs[: len(weights)], leaves, weights, allow_unused=True, materialize_grads=True)
        for outs in ([y, *finals], expected)
    )
    torch.testing.assert_close(found, wanted)


def test_modules():
    """The functions and the modules that have torch's names, with and without batch_first, which says nothing of one row."""
    torch.manual_seed(0)
    cu_seqlens = torch.tensor([0, 2, 2, 9])
    x, resets = torch.randn(9, 4), torch.rand(9) < 0.3
    for kind, function in ((fastseq.LSTM, F.lstm), (fastseq.GRU, F.gru), (fastseq.RNN, F.rnn)):
        module = kind(4, 5, batch_first=kind is fastseq.GRU)
        y, states = module(x, resets=resets, cu_seqlens=cu_seqlens)
        outputs = [y, *(states if isinstance(states, tuple) else (states,))]
        expected = function(x, None, list(module.parameters()), resets=resets, cu_seqlens=cu_seqlens)
        assert all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True))
        zeros = torch.zeros(1, 3, 5)
        hx = (zeros, zeros) if kind is fastseq.LSTM else zeros
        torch.testing.assert_close(module(x, hx, resets=resets, cu_seqlens=cu_seqlens)[0], y)


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin")  # of allocations that these tests poison
def test_compile_breaks_its_graph_there():
    module = fastseq.GRU(4, 5)
    x, cu_seqlens = torch.randn(9, 4), torch.tensor([0, 2, 9])
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager")
    torch.testing.assert_close(compiled(x, cu_seqlens=cu_seqlens)[0], module(x, cu_seqlens=cu_seqlens)[0])


def test_bad_calls():
    params, x, cu = list(nn.GRU(4, 5).parameters()), torch.randn(9, 4), torch.tensor([0, 2, 9])
    for given, error, message in (
        ({"cu_seqlens": torch.tensor([0, 3, 2, 9])}, RuntimeError, r"cu_seqlens must rise from 0 to the number of rows, 9"),
        ({"cu_seqlens": torch.tensor([0, 8])}, RuntimeError, "must rise from 0"),
        ({"cu_seqlens": torch.tensor([1, 9])}, RuntimeError, "must rise from 0"),
        ({"cu_seqlens": torch.tensor([])}, RuntimeError, r"int32 or int64 \[S \+ 1\], got torch.float32 \[0\]"),
        ({"cu_seqlens": cu.float()}, RuntimeError, "int32 or int64"),
        ({"cu_seqlens": [0, 2, 9]}, TypeError, "cu_seqlens must be a Tensor, not list"),
        ({"cu_seqlens": cu, "lengths": cu}, ValueError, "leave out lengths"),
        ({"cu_seqlens": cu, "batch_sizes": cu}, ValueError, "leave out batch_sizes"),
        ({"cu_seqlens": cu, "batch_first": True}, ValueError, "leave out batch_first"),
        ({"cu_seqlens": cu, "resets": torch.zeros(8, dtype=torch.bool)}, RuntimeError, r"resets must be \[9\], got \[8\]"),
        ({"cu_seqlens": cu, "input": x[None]}, RuntimeError, r"input must be \[N, I\] with cu_seqlens, got \[1, 9, 4\]"),
        ({"cu_seqlens": cu, "hx": torch.zeros(1, 3, 5)}, RuntimeError, r"hx must be \[L\*D, 2, ..\]"),
        ({"cu_seqlens": cu, "hx": torch.zeros(2, 2, 5)}, RuntimeError, r"Expected h0 of size \[1, B, 5\], got \[2, 2, 5\]"),
        ({"cu_seqlens": torch.zeros(3, dtype=torch.int64), "input": x[:0]}, RuntimeError, "larger than 0"),
    ):
        with pytest.raises(error, match=message):
            F.gru(**{"input": x, "hx": None, "params": params} | given)
