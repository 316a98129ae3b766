"""``solver=fastseq.Newton(..)`` and the parallel backward pass: results, gradients and errors of the modules and functions."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq
from fastseq import backends
from fastseq import functional as F
from fastseq.cells import CELLS
from fastseq.testing import assert_all_close_to_truth
from support.recurrent import MODULES

IN, H, T, B = 3, 6, 12, 4  # input, hidden, steps, batch
UNITS = [name for name, row in CELLS.items() if row.jacobian]
TIGHT = fastseq.Newton(tolerance=1e-12, max_iterations=60, force=True)


def make(cell: str, solver: fastseq.Newton | None = None, dtype: torch.dtype = torch.float64, **options) -> nn.RNNBase:
    torch.manual_seed(0)
    if cell.startswith("rnn"):
        options["nonlinearity"] = cell.removeprefix("rnn_")
    return getattr(fastseq, MODULES[cell])(IN, H, num_heads=H, solver=solver, dtype=dtype, **options)


def twins(cell: str, solver: fastseq.Newton = TIGHT, scale: float = 1.0, **options) -> tuple[nn.RNNBase, nn.RNNBase]:
    """The same layer, its steps in turn and at once."""
    module = make(cell, **options)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            weight *= scale if name.startswith("weight_hh") else 1
    other = copy.deepcopy(module)
    other.solver = solver
    return module, other


def states_of(module: nn.RNNBase, *shape: int) -> Tensor | tuple[Tensor, ...]:
    lanes = module.num_layers * (2 if module.bidirectional else 1)
    states = tuple(torch.randn(lanes, *shape, H, dtype=torch.float64) for _ in CELLS[module.cell].states)
    return states if len(states) > 1 else states[0]


def tensors_in(result) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result] if result.is_floating_point() else []
    return [] if result is None else [t for part in result for t in tensors_in(part)]


def results(module: nn.Module, x, *args, **options) -> tuple[list[Tensor], list[Tensor]]:
    """Of a call, and the gradients of everything it has."""
    leaves = [t.requires_grad_() for t in tensors_in((x, args)) if t.is_leaf] + list(module.parameters())
    found = tensors_in(module(x, *args, **options))
    torch.manual_seed(2)
    grads = torch.autograd.grad(found, leaves, [torch.randn_like(t) for t in found])
    return found, list(grads)


def assert_same(a, b, **bounds) -> None:
    for found, expected in zip(a, b, strict=True):
        torch.testing.assert_close(found, expected, **(bounds or dict(rtol=1e-8, atol=1e-9)))


OPTIONS = {
    "plain": {},
    "two-layers-both-ways": {"num_layers": 2, "bidirectional": True, "dropout": 0.3},
    "batch-first": {"batch_first": True},
    "no-bias": {"bias": False},
    "recompute": {"recompute": True, "bidirectional": True},
    "weight-dropout": {"weight_dropout": 0.3},
}


class TestResults:
    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    @pytest.mark.parametrize("cell", UNITS)
    def test_is_the_sequential_one(self, cell, options):
        found = []
        for module in twins(cell, scale=2.0, **options):
            torch.manual_seed(1)
            x = torch.randn(T, B, IN, dtype=torch.float64)
            hx = states_of(module, T if module.batch_first else B)
            torch.manual_seed(3)  # of dropout
            found.append(results(module, x, hx))
        assert_same(found[1][0], found[0][0])
        assert_same(found[1][1], found[0][1])

    @pytest.mark.parametrize("chunk", [None, 5])
    @pytest.mark.parametrize("layout", ["lengths", "packed", "unbatched", "equal"])
    @pytest.mark.parametrize("cell", ["gru", "lstm"])
    def test_layouts(self, cell, layout, chunk):
        found = []
        for module in twins(cell, fastseq.Newton(1e-12, 60, chunk, force=True), bidirectional=True):
            torch.manual_seed(1)
            x, lengths = torch.randn(T, B, IN, dtype=torch.float64), torch.tensor([T, 3, 7, 1])
            hx, options = states_of(module, B), {}
            if layout == "lengths":
                options["lengths"] = lengths
            elif layout != "unbatched":
                x.requires_grad_()
                x = pack_padded_sequence(x, lengths if layout == "packed" else torch.full((B,), T), enforce_sorted=False)
            else:
                x, hx = x[:, 0].clone(), states_of(module)
            found.append(results(module, x, hx, **options))
        assert_same(found[1][0], found[0][0])
        assert_same(found[1][1], found[0][1])

    @pytest.mark.parametrize("layout", ["padded", "lengths", "packed"])
    @pytest.mark.parametrize("cell", ["gru", "lstm"])
    def test_resets(self, cell, layout):
        """And the gradients of the states that rows start anew from."""
        found = []
        for module in twins(cell, fastseq.Newton(1e-12, 60, chunk=5, force=True), bidirectional=True, num_layers=2):
            torch.manual_seed(1)
            x, lengths = torch.randn(T, B, IN, dtype=torch.float64), torch.tensor([T, 3, 7, 1])
            hx, reset_to, resets = states_of(module, B), states_of(module, B), torch.rand(T, B) < 0.3
            for state in tensors_in(reset_to):
                state.requires_grad_()
            options = {"lengths": lengths} if layout == "lengths" else {}
            if layout == "packed":
                resets = pack_padded_sequence(resets, lengths, enforce_sorted=False)
                x = pack_padded_sequence(x.requires_grad_(), lengths, enforce_sorted=False)
            values, grads = results(module, x, hx, resets=resets, reset_to=reset_to, **options)
            y = module(x, hx, resets=resets, reset_to=reset_to, **options)[0]
            of_states = torch.autograd.grad(tensors_in(y)[0].square().sum(), tensors_in(reset_to))
            found.append([*values, *grads, *of_states])
        assert_same(found[1], found[0])

    def test_cells_of_every_step(self):
        x = torch.randn(T, B, IN, dtype=torch.float64)
        found = [results(module, x, return_cells=True) for module in twins("lstm", num_layers=2, batch_first=True)]
        assert_same(found[1][0], found[0][0])
        assert_same(found[1][1], found[0][1])

    def test_one_unit_needs_no_heads(self):
        module = fastseq.GRU(IN, 1, dtype=torch.float64)
        x = torch.randn(T, B, IN, dtype=torch.float64)
        expected = results(module, x)
        module.solver = TIGHT
        found = results(module, x)
        assert "by Newton's method" in str(fastseq.explain(module, x))
        assert_same(found[0], expected[0])
        assert_same(found[1], expected[1])

    def test_more_units_than_the_sequential_kernels_take_at_once(self):
        module = fastseq.LSTM(IN, 70, num_heads=70, dtype=torch.float64, bidirectional=True)
        x = torch.randn(5, 2, IN, dtype=torch.float64)
        expected = results(module, x)
        for iterations in (60, 1):  # of which one is too few
            module.solver = fastseq.Newton(1e-12, iterations, force=True)
            found = results(module, x)
            assert_same(found[0], expected[0])
            assert_same(found[1], expected[1])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("cell", ["gru", "lstm", "rnn_tanh"])
    def test_bounds_of_other_dtypes(self, cell, dtype):
        """As near to the truth as the sequential layer is, output and every gradient."""
        exact, _ = twins(cell)
        torch.manual_seed(1)
        x = torch.randn(T, B, IN)
        exact.to(dtype).double()
        truth = results(exact, x.to(dtype).double())
        names = [f"result {i}" for i in range(len(truth[0]))] + [f"gradient {i}" for i in range(len(truth[1]))]
        own, theirs = ({}, {})
        for solver, into in ((None, theirs), (fastseq.Newton(1e-6, force=True), own)):
            module = copy.deepcopy(exact).to(dtype)
            module.solver = solver
            given = x.to(dtype)
            found = module(given.requires_grad_())
            found = tensors_in(found)
            torch.manual_seed(2)
            cotangents = [torch.randn(t.shape, dtype=torch.float64).to(dtype) for t in found]
            grads = torch.autograd.grad(found, [given, *module.parameters()], cotangents)
            into |= dict(zip(names, [*found, *grads], strict=True))
        assert_all_close_to_truth(own, theirs, dict(zip(names, [*truth[0], *truth[1]], strict=True)))

    @pytest.mark.parametrize("backend", ["reference", "triton", "cpu"])
    def test_backends(self, backend):
        """Their scans, and as the iterations are too few their kernels for steps in turn."""
        if backends.BACKENDS[backend].available():
            pytest.skip(f"no {backend} here")
        module, other = twins("gru", fastseq.Newton(1e-12, 1, force=True))
        torch.manual_seed(1)
        x = torch.randn(3, 1, IN, dtype=torch.float64)
        expected = results(module, x)
        with fastseq.use_backend(backend):
            found = results(other, x)
            told = fastseq.explain(other, x)
        assert set(told.backends) == {backend} and "by the sequential kernel then rows 0" in str(told)
        assert_same(found[0], expected[0])
        assert_same(found[1], expected[1])

    def test_autocast(self):
        module, other = twins("gru", fastseq.Newton(1e-6, force=True), dtype=torch.float32)
        x = torch.randn(T, B, IN)
        with torch.autocast("cpu", torch.bfloat16):
            (y, _), (expected, _) = other(x), module(x)
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y.float(), expected.float(), rtol=2e-2, atol=2e-2)

    def test_the_same_in_training_and_evaluation(self):
        module = make("lstm", fastseq.Newton(force=True), dtype=torch.float32)
        x = torch.randn(T, B, IN)
        trained = module.train()(x)[0].detach()
        with torch.no_grad():
            assert torch.equal(module.eval()(x)[0], trained)
            assert torch.equal(module(x)[0], trained)

    def test_state_dict_is_the_same(self):
        module, other = twins("gru")
        other.load_state_dict(module.state_dict())
        assert list(other.state_dict()) == list(module.state_dict())


class TestTools:
    @pytest.mark.parametrize("cell", ["gru", "lstm"])
    def test_double_backward(self, cell):
        found = []
        for module in twins(cell):
            torch.manual_seed(1)
            x = torch.randn(5, 2, IN, dtype=torch.float64, requires_grad=True)
            y = module(x)[0]
            (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            found.append(torch.autograd.grad(grad.square().sum(), [x, *module.parameters()]))
        assert_same(found[1], found[0])

    def test_gradcheck(self):
        module = make("lstm", TIGHT, bidirectional=True)
        x = torch.randn(4, 2, IN, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: module(x)[0], x)

    @pytest.mark.parametrize("gradients", [True, False])
    def test_compile(self, gradients):
        """Without a break of the graph: the iterations are inside an op."""
        module = make("gru", fastseq.Newton(force=True), dtype=torch.float32)
        x = torch.randn(T, B, IN)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        with torch.set_grad_enabled(gradients):
            expected, found = module(x)[0], compiled(x)[0]
            torch.testing.assert_close(found, expected)
            if gradients:
                grads = [torch.autograd.grad(y.square().sum(), list(module.parameters())) for y in (found, expected)]
                assert_same(*grads, rtol=1e-5, atol=1e-6)

    def test_export(self):
        module = make("gru", fastseq.Newton(force=True), dtype=torch.float32)
        x = torch.randn(T, B, IN)
        exported = torch.export.export(module, (x,)).module()
        torch.testing.assert_close(exported(x)[0], module(x)[0])

    def test_vmap_runs_steps_in_turn(self):
        module, other = twins("gru")
        x = torch.randn(2, T, B, IN, dtype=torch.float64)
        found = torch.vmap(lambda x: other(x)[0])(x)
        assert_same(found, torch.stack([module(part)[0] for part in x]))

    def test_opcheck(self):
        torch.manual_seed(0)
        x, weight, c0 = torch.randn(5, 2, 3 * 4), torch.randn(3, 4, 1), torch.randn(3, 2, 1)
        walk = None, None, None, None, "lstm", [0, 1, 0], 0.0, 0.0
        forward = (x, None, None, weight, None, None, c0, c0, *walk, True, True)
        torch.library.opcheck(torch.ops.fastseq.recurrent_newton.default, (*forward, [1e-6, 30.0, 0.0, 0.0]))
        y, h_n, c_n, c, gates = torch.ops.fastseq.recurrent_forward(*forward)
        backward = (y, h_n, c_n, None, weight, None, None, c0, c0, *walk[:4], y, c, gates, *walk[4:])
        torch.library.opcheck(torch.ops.fastseq.recurrent_parallel_backward.default, backward)

    def test_an_output_may_be_overwritten(self):
        found = []
        for module in twins("gru"):
            torch.manual_seed(1)
            x = torch.randn(T, B, IN, dtype=torch.float64, requires_grad=True)
            y = module(x)[0]
            y.mul_(2)
            found.append(torch.autograd.grad(y.square().sum(), [x, *module.parameters()]))
        assert_same(found[1], found[0])

    def test_copies_keep_it(self):
        module = make("gru", fastseq.Newton(chunk=8))
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert other.solver == fastseq.Newton(chunk=8)
        assert "solver=Newton(tolerance=1e-05, max_iterations=16, chunk=8, otherwise='sequential', force=False)" in repr(module)


class TestExplain:
    def test_iterations_and_residual(self):
        module = make("gru", fastseq.Newton(1e-7, force=True), num_layers=2)
        text = str(fastseq.explain(module, torch.randn(T, B, IN, dtype=torch.float64)))
        assert "recurrent gru, float64 on cpu, padded, T=12 B=4 D=6 H=1, by Newton's method: " in text
        assert re.search(r"Newton: iterations \d+, residual \d\.\de-", text), text
        assert "sequential" not in text

    def test_every_layer_is_told(self):
        """Layers that are alike make calls that are alike, but not their iterations."""
        module = make("gru", fastseq.Newton(1e-9, force=True), num_layers=2)
        with torch.no_grad():
            module.weight_hh_l1 *= 20
        told = fastseq.explain(module, torch.randn(60, B, H, dtype=torch.float64)[..., :IN].contiguous())
        notes = [note for notes in told.notes for note in notes if note.startswith("Newton")]
        assert len(notes) == 2 and len(set(notes)) == 2

    def test_rows_that_fell_back(self):
        module = make("lstm", fastseq.Newton(1e-9, 1, chunk=6, force=True))
        told = str(fastseq.explain(module, torch.randn(T, B, IN, dtype=torch.float64)))
        assert "Newton: iterations 1 in each of 2 parts" in told and "by the sequential kernel then rows 0, 1, 2, 3" in told


class TestRefusals:
    @pytest.mark.parametrize(
        "name, options, error, words",
        [
            (
                "GRU",
                {"num_heads": 1},
                ValueError,
                "solver needs num_heads equal to the hidden size (6), got num_heads=1",
            ),
            ("LSTM", {"num_heads": 3}, ValueError, "a Jacobian of 2 x 2 blocks, whose products cost the cube"),
            ("LSTM", {"num_heads": 1, "proj_size": 2}, ValueError, "solver and proj_size exclude each other, got proj_size=2"),
            ("GRU", {"zoneout": 0.1}, ValueError, "solver and zoneout exclude each other"),
            ("LSTM", {"zoneout": (0.0, 0.1)}, ValueError, "solver and zoneout exclude each other"),
            ("LayerNormGRU", {}, ValueError, "layer_norm_gru normalizes over all its units"),
            ("LayerNormLSTM", {}, ValueError, "layer_norm_lstm normalizes over all its units"),
            ("SLSTM", {}, ValueError, "slstm has 4 numbers in the state of a unit, and a scan takes 1 or 2"),
            ("GRU", {"solver": "newton"}, TypeError, "solver must be a fastseq.Newton or None, got 'newton'"),
            ("RNN", {"solver": fastseq.Newton}, TypeError, "solver must be a fastseq.Newton or None, got <class"),
        ],
    )
    def test_layers(self, name, options, error, words):
        given = {"num_heads": H, "solver": fastseq.Newton()} | options
        with pytest.raises(error, match=re.escape(words)):
            getattr(fastseq, name)(IN, H, **given)
        module = getattr(fastseq, name)(IN, H, num_heads=given["num_heads"])
        if "proj_size" not in options:
            with pytest.raises(error, match=re.escape(words)):
                F.recurrent(module.cell, torch.randn(T, B, IN), None, list(module.parameters()), **given)

    @pytest.mark.parametrize(
        "options, error, words",
        [
            ({"tolerance": 0}, ValueError, "tolerance must be positive and finite, got 0"),
            ({"tolerance": -1e-3}, ValueError, "tolerance must be positive and finite, got -0.001"),
            ({"tolerance": float("nan")}, ValueError, "tolerance must be positive and finite, got nan"),
            ({"tolerance": float("inf")}, ValueError, "tolerance must be positive and finite, got inf"),
            ({"tolerance": "1e-5"}, TypeError, "tolerance must be a number, got '1e-5'"),
            ({"max_iterations": 0}, ValueError, "max_iterations must be at least 1, got 0"),
            ({"max_iterations": 2.0}, TypeError, "max_iterations must be an int, got 2.0"),
            ({"max_iterations": None}, TypeError, "max_iterations must be an int, not NoneType"),
            ({"chunk": 0}, ValueError, "chunk must be at least 1, got 0"),
            ({"chunk": True}, TypeError, "chunk must be an int, got True"),
            ({"otherwise": "rise"}, ValueError, "unknown otherwise 'rise'; accepted: sequential, raise (did you mean 'raise'?)"),
            ({"otherwise": None}, ValueError, "unknown otherwise None"),
            ({"force": 1}, TypeError, "force must be a bool, got 1"),
        ],
    )
    def test_solvers(self, options, error, words):
        with pytest.raises(error, match=re.escape(words)):
            fastseq.Newton(**options)

    def test_a_cpu(self):
        module = make("gru", fastseq.Newton())
        x = torch.randn(T, B, IN, dtype=torch.float64)
        with pytest.raises(RuntimeError, match=r"refused on a CPU.*force it: Newton\(\.\., force=True\)"):
            module(x)
        module.solver = None
        assert module(x)[0].shape == (T, B, H)

    def test_what_does_not_converge(self):
        module = make("gru", fastseq.Newton(1e-9, 1, otherwise="raise", force=True))
        with pytest.raises(RuntimeError, match="did not reach its tolerance of 1e-09 in 1 iterations, but a residual of"):
            module(torch.randn(T, B, IN, dtype=torch.float64))

    def test_no_steps(self):
        with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0"):
            make("gru", TIGHT)(torch.randn(0, B, IN, dtype=torch.float64))

    def test_script(self):
        with pytest.raises(NotImplementedError, match="torch.nn has no GRU with solver, num_heads"):
            torch.jit.script(make("gru", TIGHT))
