"""Rows that start anew: as their segments one by one, with nothing that passes a cut, on every backend that has resets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fastseq
from fastseq import functional as F
from fastseq.cells import CELLS
from support.cases import RECURRENT_CASES, RecurrentCase
from support.recurrent import RecurrentBattery

BATTERY = RecurrentBattery()
LAYOUTS = ("padded", "lengths", "packed")
ABLE = [  # but for the interpreter, in which the battery tries them
    name
    for name in BATTERY.backends()
    if name != "triton" and BATTERY.supports(RecurrentCase("gru", resets="zeros"), torch.float32, name)
]
ON_EACH = pytest.mark.parametrize("backend", ABLE)


def dtype_of(backend: str) -> torch.dtype:
    """The widest that a backend has for resets."""
    return torch.float64 if BATTERY.supports(RecurrentCase("gru", resets="zeros"), torch.float64, backend) else torch.float32


def problem(cell: str, dtype: torch.dtype, *, steps: int = 7, batch: int = 5, hidden: int = 6, layers: int = 2) -> dict[str, Any]:
    """Arguments of ``functional.recurrent``, in both directions, with a state before every row and one at every reset."""
    case = RecurrentCase(cell, steps, batch, 4, hidden, layers, bidirectional=True, resets="states")
    inputs, names = BATTERY.make(case, dtype), CELLS[cell].states
    return {
        "cell": cell,
        "input": inputs["x"],
        "hx": [inputs[f"{name}0"] for name in names],
        "params": [value for name, value in inputs.items() if name.startswith(("weight", "bias"))],
        "num_layers": layers,
        "bidirectional": True,
        "resets": inputs["resets"],
        "reset_to": [inputs[f"reset_{name}"] for name in names],
    }


def gradients(outputs: list[Tensor], given: dict[str, Any]) -> list[Tensor]:
    leaves = [given["input"], *given["hx"], *given["params"], *given["reset_to"]]
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype) for out in outputs]
    return list(torch.autograd.grad(outputs, leaves, weights, materialize_grads=True, allow_unused=True))


def one_by_one(given: dict[str, Any], lengths: list[int]) -> list[Tensor]:
    """Output and final states where every segment of every row is a call of its own."""
    fixed = {name: given[name] for name in ("cell", "params", "num_layers", "bidirectional")}
    x, resets = given["input"], given["resets"]
    backwards = (torch.arange(len(given["hx"][0])) % 2 == 1)[:, None, None]

    def of_lanes(forward: list[Tensor], backward: list[Tensor]) -> list[Tensor]:
        return [torch.where(backwards, b, f) for f, b in zip(forward, backward, strict=True)]

    outputs, finals = [], []
    for row, length in enumerate(lengths):
        own, fresh = ([state[:, row : row + 1] for state in given[name]] for name in ("hx", "reset_to"))
        begins = [t for t in range(length) if t == 0 or resets[t, row]]
        parts, ends = [], own
        for begin, end in zip(begins, [*begins[1:], length], strict=bool(begins)):
            start = of_lanes(fresh if begin or resets[0, row] else own, own if end == length else fresh)
            y, states, _ = F.recurrent(input=x[begin:end, row : row + 1], hx=start, **fixed)
            parts.append(y)
            # lanes that go forward end in the last segment, the others in the first
            ends = of_lanes(list(states), ends if begin else list(states))
        width = given["hx"][0].shape[-1] * 2
        outputs.append(torch.cat([*parts, x.new_zeros(len(x) - length, 1, width)]))
        finals.append(ends)
    return [torch.cat(outputs, 1), *(torch.cat(states, 1) for states in zip(*finals, strict=True))]


def laid_out(given: dict[str, Any], layout: str, lengths: Tensor) -> tuple[dict[str, Any], Any]:
    """The arguments in a layout, and what makes a padded tensor of its rows again."""
    if layout == "padded":
        return given, lambda y: y
    if layout == "lengths":
        return given | {"lengths": lengths}, lambda y: y
    inside = torch.arange(len(given["input"]))[:, None] < lengths
    sizes = {"batch_sizes": inside.sum(1)[: int(lengths.max())]}
    packed = {name: given[name][inside] for name in ("input", "resets")}
    return given | sizes | packed, lambda y: y.new_zeros(*inside.shape, y.shape[-1]).index_put((inside,), y)


@ON_EACH
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", CELLS)
def test_segments_one_by_one(cell, layout, backend):
    """Two layers in both directions, outputs, final states and every gradient; a row of length 0 among them."""
    dtype = dtype_of(backend)
    if not BATTERY.supports(RecurrentCase(cell, resets="zeros"), dtype, backend):
        pytest.skip(f"{backend} has no {cell}")
    given = problem(cell, dtype, hidden=16 if "norm" in cell else 6)
    lengths = torch.full((5,), 7) if layout == "padded" else torch.tensor([7, 6, 6, 3, 1 if layout == "packed" else 0])
    with fastseq.use_backend(backend):
        arguments, padded = laid_out(given, layout, lengths)
        y, finals, _ = F.recurrent(**arguments)
        outputs = [padded(y), *finals]
        grads = gradients(outputs, given)
    with fastseq.use_backend("reference"):
        expected = one_by_one(given, lengths.tolist())
        expected_grads = gradients(expected, given)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(grads, expected_grads)


@ON_EACH
@pytest.mark.parametrize("cell", ("lstm", "gru", "rnn_tanh", "layer_norm_gru"))
def test_where_they_are(cell, backend):
    """Nowhere, everywhere, at the first step, at the last, of the first and of the last row of a packed step."""
    dtype = dtype_of(backend)
    if not BATTERY.supports(RecurrentCase(cell, resets="zeros"), dtype, backend):
        pytest.skip(f"{backend} has no {cell}")
    given = problem(cell, dtype, hidden=16 if "norm" in cell else 6)
    lengths = torch.tensor([7, 6, 6, 3, 3])
    nowhere = torch.zeros(7, 5, dtype=torch.bool)
    some = {"nowhere": nowhere, "everywhere": ~nowhere}
    for name, (t, row) in {"first step": (0, 2), "last step": (6, 0), "first row": (2, 0), "last row": (2, 4)}.items():
        some[name] = nowhere.index_put((torch.tensor(t), torch.tensor(row)), torch.tensor(True))
    for name, resets in some.items():
        own = given | {"resets": resets}
        with fastseq.use_backend(backend):
            arguments, padded = laid_out(own, "packed", lengths)
            y, finals, _ = F.recurrent(**arguments)
            if name == "nowhere":
                plain, ends, _ = F.recurrent(**{key: value for key, value in arguments.items() if "reset" not in key})
                assert all(torch.equal(*pair) for pair in zip((y, *finals), (plain, *ends), strict=True))
            outputs = [padded(y), *finals]
            grads = gradients(outputs, own)
        with fastseq.use_backend("reference"):
            expected = one_by_one(own, lengths.tolist())
            torch.testing.assert_close(outputs, expected, msg=lambda text, name=name: f"{name}: {text}")
            torch.testing.assert_close(grads, gradients(expected, own), msg=lambda text, name=name: f"{name}: {text}")


@ON_EACH
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", ("lstm", "gru", "rnn_tanh", "peephole_lstm", "slstm"))
def test_no_number_passes_a_cut(cell, layout, backend):
    """NaN in a segment stays there, forward, and on the way back as well, for both lanes look across either of its ends."""
    dtype = dtype_of(backend)
    if not BATTERY.supports(RecurrentCase(cell, resets="zeros"), dtype, backend):
        pytest.skip(f"{backend} has no {cell}")
    given = problem(cell, dtype, hidden=33)
    given["resets"][:] = False
    given["resets"][2, :2] = given["resets"][5, :2] = True
    lengths = torch.full((5,), 7) if layout == "padded" else torch.tensor([7, 7, 6, 3, 1])
    for to in (given["reset_to"], None):
        results = []
        for value in (1.0, torch.nan):
            x = given["input"].detach().clone()
            x[2:5, 0] = value  # the second of three segments
            own = given | {"input": x.requires_grad_(), "reset_to": to}
            with fastseq.use_backend(backend):
                arguments, padded = laid_out(own, layout, lengths)
                y, finals, _ = F.recurrent(**arguments)
                y = padded(y)
                (dx,) = torch.autograd.grad([y, *finals], x, [torch.ones_like(out) for out in (y, *finals)])
            results.append((y, dx, *finals))
        (clean_y, clean_dx, *clean), (y, dx, *finals) = results
        others = torch.ones(7, 5, dtype=torch.bool)
        others[2:5, 0] = False
        assert y[~others].isnan().all()
        assert torch.equal(y[others], clean_y[others]) and torch.equal(dx[others], clean_dx[others])
        assert all(torch.equal(*pair) for pair in zip(finals, clean, strict=True))


@ON_EACH
@pytest.mark.parametrize("batch", (2, 40))
def test_what_overflowed_before_a_cut_is_in_no_product(backend, batch):
    """The gradient of w_hh has the state that a segment starts from, not the infinite one that the segment before it left."""
    torch.manual_seed(0)
    params = [torch.eye(33) * 2, torch.randn(33, 33) / 9, torch.zeros(33), torch.zeros(33)]
    params = [p.requires_grad_() for p in params]
    x = torch.rand(6, batch, 33)
    x[2, 1] = 3e38
    resets = torch.zeros(6, batch, dtype=torch.bool)
    resets[3, 1] = True
    state = torch.rand(1, 1, 33, requires_grad=True)
    for reset_to in (None, state):
        for recompute in (False, True):
            with fastseq.use_backend(backend):
                y, _ = F.rnn(x, None, params, nonlinearity="relu", resets=resets, reset_to=reset_to, recompute=recompute)
                assert y[2, 1].isinf().any()
                weights = torch.rand_like(y)
                weights[2, 1] = 0
                grads = torch.autograd.grad(y, [*params, *([] if reset_to is None else [state])], weights)
            assert all(grad.isfinite().all() for grad in grads)


@ON_EACH
def test_nothing_comes_back_to_what_was_replaced(backend):
    """hx of rows that are reset at their first step has a gradient of zero in lanes forward, with any final state."""
    given = problem("lstm", dtype_of(backend), layers=1)
    given["resets"][:] = False
    given["resets"][0] = True
    for steps in (7, 1):
        own = given | {"input": given["input"][:steps], "resets": given["resets"][:steps]}
        with fastseq.use_backend(backend):
            y, finals, _ = F.recurrent(**own)
            dh, dc = torch.autograd.grad([y, *finals], given["hx"], [torch.ones_like(out) for out in (y, *finals)])
        assert not dh[0].any() and not dc[0].any() and dh[1].all() and dc[1].all()


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_every_level(level, dtype):
    """The native kernels of every level: odd sizes, and those that tiles multiply, in parts too."""
    large = RecurrentCase("lstm", steps=17, batch=18, hidden=64, input=20, resets="states", bidirectional=True)
    cases = [
        *[case for case in RECURRENT_CASES if case.resets and case.batch > 7][::2],
        large,
        replace(large, cell="gru", layout="lengths"),
        replace(large, cell="peephole_lstm", layout="packed"),
        replace(large, cell="layer_norm_lstm", resets="zeros"),
        RecurrentCase("lstm", steps=2, batch=3, hidden=53, input=37, resets="states", bidirectional=True),  # weights in place
    ]
    for case in cases:
        BATTERY.test_forward_and_gradients(case, dtype, "cpu")


@pytest.mark.parametrize("threads", (2, 3))
@pytest.mark.parametrize("hidden,batch", ((320, 1), (64, 40)))
def test_threads_share_a_step(threads, hidden, batch):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        case = RecurrentCase("lstm", steps=6, batch=batch, input=40, hidden=hidden, layout="lengths", resets="states")
        for own in (case, replace(case, cell="gru", layout="packed"), replace(case, projection=40)):
            BATTERY.test_forward_and_gradients(own, torch.float32, "cpu")
    finally:
        torch.set_num_threads(before)


def test_transforms():
    """vmap, a gradient of a gradient by torch.func, and autocast."""
    torch.manual_seed(0)
    params = [p.detach() for p in nn.GRU(3, 4, dtype=torch.float64).parameters()]
    x, resets = torch.randn(6, 5, 2, 3, dtype=torch.float64), torch.rand(6, 5, 2) < 0.4

    def run(x: Tensor, resets: Tensor) -> Tensor:
        return F.gru(x, None, params, resets=resets)[0]

    expected = torch.stack([run(*each) for each in zip(x, resets, strict=True)])
    torch.testing.assert_close(torch.vmap(run)(x, resets), expected)
    torch.testing.assert_close(torch.vmap(run, (0, None))(x, resets[0]), torch.stack([run(each, resets[0]) for each in x]))

    def loss(x: Tensor) -> Tensor:
        return run(x, resets[0]).pow(2).sum()

    leaf = x[0].requires_grad_()
    (expected_grad,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x[0].detach()), expected_grad)
    lstm, given = [p.detach().float() for p in nn.LSTM(3, 4).parameters()], x[0].detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        lowered = F.lstm(given, None, lstm, resets=resets[0])[0]
    torch.testing.assert_close(lowered, F.lstm(given.bfloat16(), None, [p.bfloat16() for p in lstm], resets=resets[0])[0])


class TestOneNativeCall:
    """Plain calls with resets go the short way as those without do."""

    NAMES = ("recurrent_layers", "recurrent_layer", "recurrent_layer_backward", "recurrent_forward", "recurrent_backward")

    def calls_of(self, run: Any) -> list[str]:
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            run()
        names = [event.name.removeprefix("fastseq_native::") for event in recorded.events() if "fastseq_native" in event.name]
        return [name for name in names if name in self.NAMES]

    @pytest.mark.parametrize("kind", (fastseq.LSTM, fastseq.GRU, fastseq.RNN, fastseq.CoupledLSTM))
    @pytest.mark.parametrize("batch", (3, 40))
    def test_who_runs(self, kind, batch):
        torch.manual_seed(0)
        module = kind(6, 40, 2, batch_first=True, bidirectional=True, dtype=torch.float64)
        x, resets = torch.randn(batch, 9, 6, dtype=torch.float64, requires_grad=True), torch.rand(batch, 9) < 0.2
        lengths = torch.randint(0, 10, (batch,))
        for more in ({}, {"lengths": lengths}):

            def run(more: Any = more) -> list[Tensor]:
                y, state = module(x, resets=resets, **more)
                grads = torch.autograd.grad(y.pow(2).sum(), [x, *module.parameters()])
                return [y, *(state if isinstance(state, tuple) else (state,)), *grads]

            assert sorted(self.calls_of(run)) == ["recurrent_layer"] * 2 + ["recurrent_layer_backward"] * 2
            found = run()
            with fastseq.use_backend("reference"):
                torch.testing.assert_close(found, run())
            with torch.no_grad():
                assert self.calls_of(lambda more=more: module(x, resets=resets, **more)) == ["recurrent_layers"]
                torch.testing.assert_close(module(x, resets=resets, **more)[0], found[0])
