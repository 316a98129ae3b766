"""The specification: every cell against its equations, backward formulas against autograd, layouts against one another."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fastseq.cells import CELLS, Cell
from fastseq.ops.types import Backward, Forward
from fastseq.reference import recurrent as reference
from fastseq.reference.cells import steps
from support import recurrent_equations
from support.cases import RECURRENT_CASES
from support.recurrent import RecurrentBattery, is_torchs

ROUNDING = dict(rtol=1e-12, atol=1e-13)  # of sums in fp64
LAYOUTS = pytest.mark.parametrize("layout", ("padded", "lengths", "packed"))
ZONEOUT = ("none", "mask", "proportion")


def problem(cell: str, layout: str, projection: int = 0, zoneout: str = "none", resets: bool = False) -> Forward:
    """Input gates, weights and states in fp64, with gradients."""
    torch.manual_seed(0)
    row, lanes, hidden, batch, length = CELLS[cell], 2, 5, 4, 6
    lengths = torch.tensor([6, 4, 4, 1])
    sizes = (lengths[None] > torch.arange(length)[:, None]).sum(1)
    rows = (int(sizes.sum()),) if layout == "packed" else (length, batch)
    width = projection or hidden

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    c0, reset_c = (random(lanes, batch, row.wide_states * hidden) if row.has_c else None for _ in range(2))
    if cell == "slstm":
        c0, reset_c = (c.detach().abs().requires_grad_() for c in (c0, reset_c))  # the normalizer is positive
    zone_c = row.wide_states == 1
    return Forward(
        x=random(*rows, lanes * len(row.gates) * hidden),
        w_ih=None,
        b_ih=None,
        weight=random(lanes, len(row.gates) * hidden, width),
        vectors=random(lanes, len(row.vectors) * hidden) if row.vectors else None,
        projection=random(lanes, projection, hidden) if projection else None,
        h0=random(lanes, batch, width),
        c0=c0,
        lengths=lengths if layout == "lengths" else None,
        batch_sizes=sizes if layout == "packed" else None,
        hold_h=torch.rand(*rows, lanes, width) < 0.4 if zoneout == "mask" else None,
        hold_c=torch.rand(*rows, lanes, hidden) < 0.4 if zoneout == "mask" and zone_c else None,
        cell=cell,
        reverse=[0, 1],
        zoneout_h=0.3 if zoneout == "proportion" else 0.0,
        zoneout_c=0.4 if zoneout == "proportion" and zone_c else 0.0,
        save_c=True,
        save_gates=True,
        resets=torch.rand(rows) < 0.4 if resets else None,
        reset_h=random(lanes, batch, width) if resets else None,
        reset_c=reset_c if resets else None,
    )


def backward_of(call: Forward, results: tuple, grads: tuple) -> Backward:
    y, _, _, c, gates = (result.detach() for result in results)
    return Backward(
        *grads, call.weight, call.vectors, call.projection, call.h0, call.c0, call.lengths, call.batch_sizes, call.hold_h,
        call.hold_c, y, c, gates, call.cell, call.reverse, call.zoneout_h, call.zoneout_c, call.resets, call.reset_h,
        call.reset_c,
    )  # fmt: skip


@pytest.mark.parametrize("cell", ("lstm", "gru", "rnn_tanh", "rnn_relu"))
def test_one_step_is_torchs_cell(cell):
    torch.manual_seed(0)
    row = CELLS[cell]
    options = {"nonlinearity": cell.removeprefix("rnn_")} if row.family == "rnn" else {}
    module = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}[row.family](3, 4, dtype=torch.float64, **options)
    x, h, c = (torch.randn(2, n, dtype=torch.float64) for n in (3, 4, 4))
    x_gates = x @ module.weight_ih.T + module.bias_ih
    r = h @ module.weight_hh.T
    vectors = None
    if row.recurrent_bias:
        x_gates[:, :-4] += module.bias_hh[:-4]
        vectors = module.bias_hh[-4:]
    else:
        x_gates = x_gates + module.bias_hh
    h_new, c_new, saved = steps(cell).step(x_gates, r, vectors, h, c if row.has_c else None)
    expected = module(x, (h, c) if row.has_c else h)
    expected_h, expected_c = expected if row.has_c else (expected, None)
    torch.testing.assert_close(h_new, expected_h)
    if row.has_c:
        torch.testing.assert_close(c_new, expected_c)
    assert (0 if saved is None else saved.shape[-1] // 4) == len(row.saved)


def named(row: Cell, v: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The op's vectors by the names of a module's parameters, for 4 units: those that act inside a step, and the last recurrent
    bias where it is among them."""
    zero = torch.zeros((), dtype=torch.float64)
    w = {"weight_ln_ih": zero, "bias_hh": zero}
    if v is None:
        return w
    inside = [(name, 4 * size) for name, size in row.parameters if name not in w]
    *parts, bias = v.split([*(size for _, size in inside), 4 if row.recurrent_bias else 0])
    if row.recurrent_bias:
        assert row.recurrent_bias == row.gates[-1]
        w["bias_hh"] = torch.cat((zero.expand(4 * (len(row.gates) - 1)), bias))
    return w | {name: part for (name, _), part in zip(inside, parts, strict=True)}


@pytest.mark.parametrize("cell", [name for name in CELLS if name not in ("lstm", "gru", "rnn_tanh", "rnn_relu")])
def test_one_step_is_the_papers(cell):
    torch.manual_seed(0)
    row = CELLS[cell]
    sizes = (len(row.gates) * 4, len(row.gates) * 4, 4, row.wide_states * 4)
    x, r, h, c = (torch.randn(3, n, dtype=torch.float64) for n in sizes)
    c = c.abs() if cell == "slstm" else c
    v = torch.randn(len(row.vectors) * 4, dtype=torch.float64) if row.vectors else None
    h_new, c_new, saved = steps(cell).step(x, r, v, h, c if row.has_c else None)
    # the input gates are whole already: a bias of W x = 0
    weights = named(row, v) | {"bias_ih": x}
    expected_h, states = recurrent_equations.step(
        cell, weights, torch.zeros_like(x), r, h, [*c.split(4, -1)] if row.has_c else []
    )
    torch.testing.assert_close(h_new, expected_h, **ROUNDING)
    if row.has_c:
        torch.testing.assert_close(c_new, torch.cat(states, -1), **ROUNDING)
    assert saved.shape[-1] // 4 == len(row.saved)


@pytest.mark.parametrize("case", [case for case in RECURRENT_CASES if is_torchs(case)], ids=str)
def test_the_equations_are_torchs(case):
    """What stands for the truth of cells that torch.nn does not have agrees with it about those that it has."""
    battery = RecurrentBattery()
    inputs = battery.make(case, torch.float64)
    expected, outputs = battery.run_torch(inputs), recurrent_equations.layers(inputs, 0)
    torch.testing.assert_close(outputs, expected, **ROUNDING)
    torch.testing.assert_close(battery.gradients(outputs, inputs), battery.gradients(expected, inputs), **ROUNDING)


def test_slstm_does_not_overflow():
    """Input gates for which exp has no number; the first step forgets all, whatever its input gate."""
    x = torch.tensor([[1e4, 1e4, 1.0, 0.0], [-1e4, -1e4, 1.0, 0.0], [-1e4, 50.0, 1.0, 0.0]])
    states = torch.tensor([[0.0, 0.0, -torch.inf]]).expand(3, 3)
    for _ in range(3):
        h, states, _ = steps("slstm").step(x, torch.zeros_like(x), None, torch.zeros(3, 1), states)
        torch.testing.assert_close(h, torch.full((3, 1), 0.5) * torch.tanh(torch.ones(3, 1)))


@pytest.mark.parametrize("resets", (False, True))
@pytest.mark.parametrize("zoneout", ZONEOUT)
@pytest.mark.parametrize("cell,projection", [*((cell, 0) for cell in CELLS), ("lstm", 3), ("layer_norm_lstm", 3)])
@LAYOUTS
def test_backward_is_the_gradient_of_forward(cell, projection, layout, zoneout, resets):
    call = problem(cell, layout, projection, zoneout, resets)
    results = reference.forward(call)
    row = call.row
    y, h_n, c_n, c, _ = results
    outputs = [y, h_n, *((c_n, c) if row.has_c else ())]
    grads = [torch.randn_like(out) for out in outputs]
    back = backward_of(call, results, tuple([*grads, None, None][:4]))
    dgates, drecurrent, doutput, dh0, dc0, dreset_h, dreset_c = reference.backward(back)
    wanted = {name: getattr(call, name) for name in ("x", "h0", "c0", "vectors", "weight", "reset_h", "reset_c")}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    expected = dict(zip(wanted, torch.autograd.grad(outputs, list(wanted.values()), grads), strict=True))
    torch.testing.assert_close(dgates.flatten(-2), expected["x"])
    torch.testing.assert_close(dh0, expected["h0"])
    if row.has_c:
        torch.testing.assert_close(dc0, expected["c0"])
    for name, grad in (("reset_h", dreset_h), ("reset_c", dreset_c)):
        assert name in expected or not grad.numel()
        if name in expected:
            torch.testing.assert_close(grad, expected[name])
    assert bool(drecurrent.numel()) == bool(row.own_recurrent)
    assert bool(doutput.numel()) == bool(projection or row.normalized)


@LAYOUTS
@pytest.mark.parametrize("cell", CELLS)
def test_rows_beyond_a_length_are_zero(cell, layout):
    call = problem(cell, "lengths" if layout == "padded" else layout, zoneout="mask")
    results = reference.forward(call)
    back = backward_of(call, results, (torch.randn_like(results[0]), None, None, None))
    if call.lengths is not None:
        beyond = torch.arange(call.steps)[:, None] >= call.lengths
        for rows in (results[0], results[3], results[4], *reference.backward(back)[:3]):
            assert not rows.numel() or not rows[beyond].any()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_sixteen_bits_are_computed_in_fp32(dtype):
    """c and the sums stay in fp32; only what is stored is rounded."""
    exact = problem("lstm", "padded")
    low = {name: getattr(exact, name).detach().to(dtype) for name in ("x", "weight", "h0")}
    y, _, c_n, c, gates = reference.forward(replace(exact, **low, c0=exact.c0.detach().float()))
    truth = reference.forward(replace(exact, **{name: value.double() for name, value in low.items()}))
    assert (y.dtype, gates.dtype, c.dtype, c_n.dtype) == (dtype, dtype, torch.float32, torch.float32)
    torch.testing.assert_close(y.double(), truth[0], rtol=0, atol=4 * torch.finfo(dtype).eps)
    # rounding h disturbs c, but c itself is not rounded to the low dtype
    assert not torch.equal(c, c.to(dtype).float())


@pytest.mark.parametrize("cell", CELLS)
def test_jacobian(cell):
    """Of a unit's state by its state before, a number or h and c, against autograd; there is one only where the table says so."""
    row, math, points = CELLS[cell], steps(cell), 50
    assert hasattr(math, "jacobian") == bool(row.jacobian)
    if not row.jacobian:
        return
    torch.manual_seed(0)
    sizes = (len(row.gates), len(row.gates), max(1, len(row.vectors)), row.jacobian)
    x, weight, vectors, state = (2 * torch.randn(points, n, dtype=torch.float64) for n in sizes)

    def step(state, x, weight, vectors):
        h, c = (state[:1], state[1:]) if row.has_c else (state, None)
        h, c, saved = math.step(x, weight * h, vectors if row.vectors else None, h, c)
        new = h if c is None else torch.cat((h, c))
        return new, new if saved is None else saved

    expected, saved = torch.func.vmap(torch.func.jacrev(step, has_aux=True))(state, x, weight, vectors)
    after, _ = torch.func.vmap(step)(state, x, weight, vectors)
    parts = [(s[:, :1], s[:, 1:] if row.has_c else None) for s in (state, after)]
    found = math.jacobian(weight, saved, vectors if row.vectors else None, *parts[0], *parts[1])
    assert found.shape == (points, 1, 2, 2)[: 4 if row.has_c else 2]
    torch.testing.assert_close(found.view_as(expected), expected, **ROUNDING)
