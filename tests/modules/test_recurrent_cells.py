"""RNNCell, LSTMCell and GRUCell give what torch.nn's give."""

from __future__ import annotations

import copy
import pickle
from itertools import product

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import fastseq
from fastseq.choice import sources
from fastseq.choice.decision import Candidate
from fastseq.modules import keep_type, recurrent_cells
from support.modules import H, I, assert_same, both, leaves, random

CELLS = ["RNNCell", "LSTMCell", "GRUCell"]
CASES = [
    ("RNNCell", dict()),
    ("RNNCell", dict(nonlinearity="relu")),
    ("RNNCell", dict(bias=False)),
    ("LSTMCell", dict()),
    ("LSTMCell", dict(bias=False)),
    ("GRUCell", dict()),
    ("GRUCell", dict(bias=False)),
]


def initial(name, *size, dtype=torch.float32):
    if name == "LSTMCell":
        return random(*size, dtype=dtype), random(*size, dtype=dtype)
    return random(*size, dtype=dtype)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_same_seed_same_weights(name, options):
    torch.manual_seed(3)
    theirs = getattr(nn, name)(4, 5, **options)
    torch.manual_seed(3)
    ours = getattr(fastseq, name)(4, 5, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    theirs.load_state_dict(ours.state_dict())
    assert repr(ours) == f"fastseq.{theirs!r}"
    assert {k for k in vars(theirs) if not k.startswith("_")} == {k for k in vars(ours) if not k.startswith("_")}
    if options.get("bias") is False:
        assert ours.bias_ih is None and ours.bias_hh is None


@pytest.mark.parametrize("name", CELLS)
def test_positional_arguments(name):
    arguments = [4, 5, False, *(["relu"] if name == "RNNCell" else []), "meta", torch.float64]
    theirs, ours = getattr(nn, name)(*arguments), getattr(fastseq, name)(*arguments)
    assert repr(ours) == f"fastseq.{theirs!r}"
    assert (ours.weight_ih.device.type, ours.weight_ih.dtype) == ("meta", torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 3, None])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_one_step(name, options, batch, dtype):
    theirs, ours = both(name, dtype=dtype, **options)
    rows = () if batch is None else (batch,)
    input = random(*rows, 4, dtype=dtype)
    assert_same(theirs, ours, input)
    assert_same(theirs, ours, input, initial(name, *rows, 5, dtype=dtype))


@pytest.mark.parametrize("sizes", [(1, 1), (17, 33), (0, 5), (5, 0)], ids=str)
@pytest.mark.parametrize("name", CELLS)
def test_sizes(name, sizes):
    theirs, ours = both(name, *sizes)
    for batch, backend in product((0, 2), ("torch", "cpu", "reference")):
        input, hx = torch.randn(batch, sizes[0]), initial(name, batch, sizes[1])
        with fastseq.use_backend(backend):
            found = leaves(ours(input, hx))
        for expected, actual in zip(leaves(theirs(input, hx)), found, strict=True):
            assert actual.shape == expected.shape
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", CELLS)
def test_steps_of_a_loop_are_the_layer(name):
    """A loop over cells is the sequence module with the same weights."""
    kind = name.removesuffix("Cell")
    layer = getattr(fastseq, kind)(4, 5, dtype=torch.float64)
    cell = getattr(fastseq, name)(4, 5, dtype=torch.float64)
    cell.load_state_dict({key.removesuffix("_l0"): value for key, value in layer.state_dict().items()})
    input, hx = torch.randn(6, 3, 4, dtype=torch.float64), None
    steps = []
    for x in input:
        hx = cell(x, hx)
        steps.append(hx[0] if kind == "LSTM" else hx)
    torch.testing.assert_close(torch.stack(steps), layer(input)[0], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("namespace", [fastseq, keep_type], ids=["fastseq", "keep_type"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_class_swap_copy_and_pickle(name, options, namespace):
    theirs, ours = both(name, **options)
    input = random(3, 4)
    expected = leaves(ours(input))
    theirs.__class__ = getattr(namespace, name)
    for module in (theirs, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        for e, a in zip(expected, leaves(module(input)), strict=True):
            assert torch.equal(a, e)


@pytest.mark.parametrize("name", CELLS)
def test_keep_type_is_both(name):
    kept = getattr(keep_type, name)(4, 5)
    assert isinstance(kept, getattr(nn, name)) and isinstance(kept, getattr(fastseq, name))
    assert type(kept).forward is getattr(fastseq, name).forward
    assert repr(kept) == f"fastseq.{getattr(nn, name)(4, 5)!r}"


@pytest.mark.parametrize("name", CELLS)
def test_what_torchs_kernel_trains_is_asked_once_and_checked_always(name, monkeypatch):
    """The second call of a size looks up what the first one found out; what does not fit still has its error."""
    kind = {"RNNCell": "rnn_tanh", "LSTMCell": "lstm", "GRUCell": "gru"}[name]
    theirs, ours = both(name, 4, 5)
    x, hx, known = random(3, 4), initial(name, 3, 5), []
    asked = recurrent_cells._trainer
    monkeypatch.setattr(recurrent_cells, "_trainer", lambda *given: known.append(asked(*given)) or known[-1])
    monkeypatch.setitem(
        recurrent_cells.STEPS, kind, lambda *given, own=recurrent_cells.STEPS[kind]: known.append(kind) or own(*given)
    )
    pair = isinstance(hx, tuple)
    with sources.instead(lambda call: Candidate("torch")):
        for _ in range(2):
            torch.testing.assert_close(ours(x, hx), theirs(x, hx), rtol=0, atol=0)  # the same kernel
        assert known == ["torch", kind, kind]
        for wrong in (random(2, 5), random(3, 6), random(5)):
            with pytest.raises(RuntimeError):
                ours(x, (hx[0], wrong) if pair else wrong)
        with pytest.raises((RuntimeError, ValueError)):
            ours(x, (hx[0], hx[1].double()) if pair else hx.double())
        with pytest.raises(RuntimeError, match="input_size"):
            ours(random(3, 6), hx)
        known.clear()
        with fastseq.use_backend("reference"):
            ours(x, hx)
        assert not known
    with sources.instead(lambda call: Candidate("cpu")):  # a decision that changed is asked for anew
        known.clear()
        ours(x, hx)
        assert known == ["cpu"]


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_autocast(name, training, lower):
    """The types that torch gives, whatever is given, and its numbers: of an LSTM's c in fp32, which many steps go through."""
    theirs, ours = both(name)
    x, h = random(3, I), random(3, H)
    pair = name == "LSTMCell"
    given = [None, *[(h.to(dtype),) * 2 if pair else h.to(dtype) for dtype in (torch.float32, lower)]]
    if pair:
        given += [(h.to(lower), h), [h, h]]
    for input, hx in product((x, x.to(lower), x[0]), given):
        if input.dim() == 1:
            hx = None if hx is None else h[0] if not pair else (h[0], h[0])
        results = []
        for cell in (theirs, ours):
            cell.zero_grad()
            with torch.autocast("cpu", lower), torch.set_grad_enabled(training):
                states = cell(input, hx)
                states = cell(input, states)
            if training:
                sum(state.float().square().sum() for state in leaves(states)).backward()
            results.append([*leaves(states), *([weight.grad for weight in cell.parameters()] if training else [])])
        for expected, actual in zip(*results, strict=True):
            assert actual.dtype == expected.dtype
            assert torch.equal(actual, expected)


class Twice(nn.Module):
    calls = 0

    def forward(self, parameter):
        Twice.calls += 1
        return 2 * parameter


@pytest.mark.parametrize("wrap", ["parametrization", "weight_norm"])
@pytest.mark.parametrize("name", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_parameters_that_are_computed(kind, name, wrap):
    """They are no parameters of the cell any more, yet of every step, with gradients and without."""
    theirs, ours = getattr(nn, kind)(5, 7), getattr(fastseq, kind)(5, 7)
    ours.load_state_dict(theirs.state_dict())
    for cell in (theirs, ours):
        if wrap == "weight_norm":
            nn.utils.weight_norm(cell, name, dim=None)
        else:
            nn.utils.parametrize.register_parametrization(cell, name, Twice())
    x, h = torch.randn(3, 5), torch.randn(3, 7)
    for hx in (None, (h, h) if kind == "LSTMCell" else h):
        for mode in (torch.enable_grad, torch.no_grad):
            with mode():
                expected, Twice.calls = theirs(x, hx), 0
                torch.testing.assert_close(ours(x, hx), expected)
                assert Twice.calls == (wrap == "parametrization")  # what draws or iterates does it once a step
    leaves = [tree_leaves(cell(x, hx))[0].sum() for cell in (theirs, ours)]
    grads = [torch.autograd.grad(leaf, list(cell.parameters())) for leaf, cell in zip(leaves, (theirs, ours), strict=True)]
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_sparse_rows(name, gradients, batch):
    """No kernel here reads them: torch's steps multiply them as what they are."""
    theirs, ours = both(name, I, H)
    x = random(batch, I).relu().to_sparse()
    for hx in (None, initial(name, batch, H)):
        with torch.set_grad_enabled(gradients):
            expected, found = tree_leaves(theirs(x, hx)), tree_leaves(ours(x, hx))
        if gradients:
            for module, results in ((theirs, expected), (ours, found)):
                module.zero_grad()
                sum(result.square().sum() for result in results).backward()
                results += [parameter.grad for parameter in module.parameters()]
        torch.testing.assert_close(found, expected, atol=0, rtol=0)
