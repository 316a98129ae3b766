"""MinGRU: against its equations step by step, against another package's results, its cell, segments, directions, errors."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from oracles import min_gru as oracle
from torch._dynamo.testing import CompileCounterWithBackend

import fastseq
from fastseq import functional

X, H = 3, 5  # widths of input and state


def by_steps(x, params, hx=None, reset=None, end=None, reverse=False):
    """A lane over one row x [T, I], by the equations: outputs [T, H] and the last state."""
    weight, bias = params
    h, outputs = torch.zeros(H, dtype=x.dtype) if hx is None else hx, torch.zeros(len(x), H, dtype=x.dtype)
    end = len(x) if end is None else end
    for t in reversed(range(end)) if reverse else range(end):
        link = t + 1 if reverse else t
        if reset is not None and link < end and reset[link]:
            h = torch.zeros(H, dtype=x.dtype)
        logits = weight @ x[t] + bias
        z, v = torch.sigmoid(logits[:H]), logits[H:]
        h = (1 - z) * h + z * torch.where(v >= 0, v + 0.5, torch.sigmoid(v))
        outputs[t] = h
    return outputs, h


def expected(module, x, hx=None, lengths=None, resets=None):
    """The stack by the equations, time-major."""
    finals, lanes = [], 2 if module.bidirectional else 1
    for layer in range(module.num_layers):
        outputs = []
        for direction in range(lanes):
            suffix = f"l{layer}" + ("_reverse" if direction else "")
            params = getattr(module, f"weight_ih_{suffix}"), getattr(module, f"bias_ih_{suffix}")
            rows = [
                by_steps(
                    x[:, row],
                    params,
                    None if hx is None else hx[layer * lanes + direction, row],
                    None if resets is None else resets[:, row],
                    None if lengths is None else int(lengths[row]),
                    direction == 1,
                )
                for row in range(x.shape[1])
            ]
            outputs.append(torch.stack([out for out, _ in rows], 1))
            finals.append(torch.stack([last for _, last in rows]))
        x = torch.cat(outputs, -1)
    return x, torch.stack(finals)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("with_", ["nothing", "lengths", "resets", "both"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_against_the_equations(bidirectional, layers, with_, backend):
    torch.manual_seed(0)
    module = fastseq.MinGRU(X, H, layers, bidirectional=bidirectional, dtype=torch.float64)
    x = torch.randn(7, 4, X, dtype=torch.float64, requires_grad=True)
    hx = torch.randn(layers * (2 if bidirectional else 1), 4, H, dtype=torch.float64, requires_grad=True)
    more = {
        "lengths": torch.tensor([7, 3, 0, 1]) if with_ in ("lengths", "both") else None,
        "resets": torch.rand(7, 4) < 0.3 if with_ in ("resets", "both") else None,
    }
    with fastseq.use_backend(backend):
        found = module(x, hx, **more)
        wanted = expected(module, x, hx, **more)
        torch.testing.assert_close(found, wanted)
        leaves = [x, hx, *module.parameters()]
        losses = [(y.square().sum() + 2 * h.sum()) for y, h in (found, wanted)]
        for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["plain", "from state"])
def test_parity_with_another_package(name):
    """minGRU-pytorch 0.2.1, which computes in logarithms; tests/oracles/min_gru.py wrote its results."""
    results = oracle.read()
    if importlib.util.find_spec("minGRU_pytorch"):
        torch.testing.assert_close(oracle.as_tensors(oracle.as_lists(oracle.found())), results)
    module = fastseq.MinGRU(oracle.WIDTH, oracle.WIDTH, bias=False, batch_first=True, dtype=torch.float64)
    candidate, gate = results["weight"].chunk(2)
    module.load_state_dict({"weight_ih_l0": torch.cat((gate, candidate))})
    x = results["input"].requires_grad_()
    hx = results["before"].transpose(0, 1).contiguous() if name == "from state" else None
    output, _ = module(x, hx)
    weights = torch.arange(output.numel(), dtype=torch.float64).view_as(output).cos()
    of_input, of_weight = torch.autograd.grad((output * weights).sum(), (x, module.weight_ih_l0))
    of_gate, of_candidate = of_weight.chunk(2)
    torch.testing.assert_close(output, results[name]["output"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(of_input, results[name]["gradient of input"], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(torch.cat((of_candidate, of_gate)), results[name]["gradient of weight"], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_steps_are_the_sequence(dtype):
    """At every prefix: the cell's states, one after the other, with a sequence's last."""
    torch.manual_seed(0)
    module, cell = fastseq.MinGRU(X, H, dtype=dtype), fastseq.MinGRUCell(X, H, dtype=dtype)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in module.state_dict().items()})
    x, state = torch.randn(9, 2, X).to(dtype), None
    tolerance = {} if dtype != torch.bfloat16 else {"rtol": 2e-2, "atol": 2e-2}
    for t in range(9):
        state = cell(x[t], state)
        output, h_n = module(x[: t + 1])
        assert state.dtype == h_n.dtype == torch.promote_types(dtype, torch.float32) and output.dtype == dtype
        torch.testing.assert_close(state, h_n[0], **tolerance)
        torch.testing.assert_close(state.to(dtype), output[-1], **tolerance)
    torch.testing.assert_close(cell(x[0, 0]), cell(x[0])[0])


def test_segments_go_on_from_the_state_before():
    torch.manual_seed(0)
    module, x = fastseq.MinGRU(X, H, 2), torch.randn(9, 2, X)
    whole, last = module(x)
    first, state = module(x[:4])
    second, final = module(x[4:], state)
    torch.testing.assert_close(torch.cat((first, second)), whole)
    torch.testing.assert_close(final, last)


def test_layouts_and_unbatched_input():
    torch.manual_seed(0)
    module, x = fastseq.MinGRU(X, H, 2, bidirectional=True), torch.randn(6, 3, X)
    output, h_n = module(x)
    other = fastseq.MinGRU(X, H, 2, bidirectional=True, batch_first=True)
    other.load_state_dict(module.state_dict())
    by_batch, states = other(x.transpose(0, 1), resets=torch.zeros(3, 6, dtype=torch.bool))
    torch.testing.assert_close(by_batch.transpose(0, 1), output)
    torch.testing.assert_close(states, h_n)
    alone, state = module(x[:, 1])
    assert alone.shape == (6, 2 * H) and state.shape == (4, H)
    torch.testing.assert_close(alone, output[:, 1])
    torch.testing.assert_close(module(x[:, 1], h_n[:, 1])[1], module(x, h_n)[1][:, 1])


def test_dropout_lies_between_layers_and_in_training_alone():
    torch.manual_seed(0)
    module, x = fastseq.MinGRU(X, H, 2, dropout=1.0), torch.randn(6, 3, X)
    constant = module(x)[0]
    torch.testing.assert_close(constant, constant[:, :1].expand_as(constant))  # the second layer read zeros
    module.eval()
    assert module(x)[0].var(1).min() > 0


def test_compiled_without_a_break():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module, x = fastseq.MinGRU(X, H, 2, bidirectional=True), torch.randn(6, 2, X)
    resets = torch.rand(6, 2) < 0.3
    compiled = torch.compile(lambda x: module(x, resets=resets), fullgraph=True, backend=counter)
    torch.testing.assert_close(compiled(x), module(x, resets=resets))
    grads = [
        torch.autograd.grad(run(x)[0].square().sum(), list(module.parameters()))
        for run in (compiled, lambda x: module(x, resets=resets))
    ]
    torch.testing.assert_close(*grads)
    assert counter.frame_count == 1


def test_double_backward():
    module = fastseq.MinGRU(2, 3, dtype=torch.float64)
    x, hx = (
        torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True),
        torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True),
    )
    resets = torch.rand(4, 2) < 0.3
    assert torch.autograd.gradgradcheck(lambda x, hx: module(x, hx, resets=resets), (x, hx), fast_mode=True)


def test_autocast_lowers_the_products_alone():
    module, x = fastseq.MinGRU(X, H), torch.randn(6, 2, X)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, h_n = module(x, torch.zeros(1, 2, H))
    assert output.dtype == torch.bfloat16 and h_n.dtype == torch.float32
    torch.testing.assert_close(output.float(), module(x)[0], rtol=2e-2, atol=2e-2)


def test_the_module_is_one_scan_a_lane():
    explanation = fastseq.explain(fastseq.MinGRU(X, H, bidirectional=True), torch.randn(6, 2, X))
    assert explanation.backends == ["cpu", "cpu"] and "min_gru" in str(explanation)


def test_parameters_have_the_names_of_torchs():
    names = [name for name, _ in fastseq.MinGRU(X, H, 2, bidirectional=True).named_parameters()]
    gru = [name for name, _ in torch.nn.GRU(X, H, 2, bidirectional=True).named_parameters() if "_hh_" not in name]
    assert names == gru
    assert repr(fastseq.MinGRU(X, H, bias=False)) == "fastseq.MinGRU(3, 5, bias=False)"
    assert repr(fastseq.MinGRUCell(X, H)) == "fastseq.MinGRUCell(3, 5)"


module = fastseq.MinGRU(X, H)
packed = torch.nn.utils.rnn.pack_sequence([torch.randn(3, X)])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fastseq.MinGRU(0, 1), ValueError, "input_size must be greater than zero, got 0"),
        (lambda: fastseq.MinGRU(1, 2.0), TypeError, "hidden_size must be an int"),
        (lambda: fastseq.MinGRU(1, 2, dropout=2), ValueError, r"dropout should be a number in range \[0, 1\], got 2"),
        (lambda: fastseq.MinGRU(1, 2, proj_size=2), TypeError, "unexpected keyword argument 'proj_size'"),
        (lambda: module(packed), TypeError, "input must be a Tensor, not PackedSequence"),
        (lambda: module(torch.randn(2, 2, 2, X)), RuntimeError, "Expected input to be 2D or 3D, got 4D"),
        (lambda: module(torch.randn(2, 2, X + 1)), RuntimeError, "input_size. Expected 3, got 4"),
        (
            lambda: module(torch.randn(2, 2, X), torch.zeros(1, 3, H)),
            RuntimeError,
            r"Expected hidden size \(1, 2, 5\), got \[1, 3, 5\]",
        ),
        (lambda: module(torch.randn(2, 2, X), torch.zeros(1, 2, H).half()), RuntimeError, "hx must be torch.float32"),
        (lambda: module(torch.randn(2, 2, X), resets=torch.zeros(2, 2)), RuntimeError, "resets must be bool"),
        (
            lambda: module(torch.randn(2, 2, X), resets=torch.zeros(3, 2).bool()),
            RuntimeError,
            r"resets must be \[T, B\] = \[2, 2\]",
        ),
        (lambda: module(torch.randn(2, X), lengths=torch.tensor([1])), RuntimeError, "the input is unbatched"),
        (lambda: module(torch.randn(2, 2, X), lengths=torch.tensor([1, 3])), RuntimeError, r"lengths must lie in 0..2"),
        (lambda: functional.min_gru(torch.randn(2, 2, X), None, []), RuntimeError, "min_gru expects 2 parameters"),
        (lambda: fastseq.MinGRUCell(X, H)(torch.randn(2, X + 1)), RuntimeError, "got 4, expected 3"),
        (lambda: fastseq.MinGRUCell(X, H)(torch.randn(2, 2, X)), RuntimeError, "Expected input to be 1D or 2D, got 3D"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
