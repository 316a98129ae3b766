"""Single steps with gradients: loops over cells, whose weights' gradients are formed together, against torch's."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastseq
from fastseq.backends import library
from fastseq.choice import sources
from fastseq.choice.decision import CHAIN, Candidate
from fastseq.ops import _recurrent_step
from fastseq.testing import assert_close_to_truth
from support.modules import both, random

CELLS = [("RNNCell", dict()), ("RNNCell", dict(nonlinearity="relu")), ("LSTMCell", dict()), ("GRUCell", dict())]
STEPS = 5


@pytest.fixture(autouse=True)
def ours_take_steps(monkeypatch):
    """Whatever was measured; and every step is to be one of these."""
    taken = []
    for name in ("_step", "_layer_step"):
        run = getattr(_recurrent_step, name)
        monkeypatch.setattr(_recurrent_step, name, lambda *given, run=run: taken.append(given[0]) or run(*given))
    with sources.instead(lambda call: Candidate("cpu")):
        yield taken


@pytest.mark.parametrize("anew", [True, False], ids=["the first call", "known"])
@pytest.mark.parametrize("first", ["torch", "cpu"])
@pytest.mark.parametrize(("name", "options"), CELLS)
def test_the_first_step_of_a_graph_is_a_question_of_its_own(name, options, first, anew, ours_take_steps):
    """A state that no other step led to begins a chain, or is all of it; what was measured of either decides."""
    theirs, ours = both(name, 4, 5, **options)
    asked = set()

    def rule(call):
        assert call.op == "recurrent_cell" and call.mode == "training" and call.sizes[::2] == (3, 5)
        asked.add(call.sizes[1])
        return Candidate(first if call.sizes[1] == 1 else "torch" if first == "cpu" else "cpu")

    xs = random(STEPS, 3, 4)
    with sources.instead(rule):
        for _ in range(1 if anew else 2):
            for begin in (start(theirs, 3), start(theirs, 3, True)):
                ours_take_steps.clear()
                expected, actual = gradients(theirs, xs, like(begin)), gradients(ours, xs, like(begin))
                for e, a in zip(expected, actual, strict=True):
                    torch.testing.assert_close(a, e)
                assert len(ours_take_steps) == (1 if first == "cpu" else STEPS - 1)
                ours_take_steps.clear()
                run(ours, xs[:1], None).backward()
                assert len(ours_take_steps) == (first == "cpu")
    assert asked == {1, CHAIN}


def start(cell, batch, grad=False):
    dtype = cell.weight_hh.dtype
    states = [random(batch, cell.hidden_size, dtype=dtype).requires_grad_(grad) for _ in range(2)]
    return tuple(states) if isinstance(cell, nn.LSTMCell | fastseq.LSTMCell) else states[0]


def like(state):
    return tuple(s.detach().clone().requires_grad_(s.requires_grad) for s in state) if isinstance(state, tuple) else (
        state.detach().clone().requires_grad_(state.requires_grad)
    )  # fmt: skip


def run(cell, xs, state):
    """Of all steps a number that depends on every state."""
    total = 0
    for x in xs:
        state = cell(x, state)
        h = state[0] if isinstance(state, tuple) else state
        total = total + (h.double() * torch.linspace(-1, 1, h.numel(), dtype=torch.float64).view(h.shape)).sum()
    if isinstance(state, tuple):
        total = total + state[1].double().square().sum()
    return total


def gradients(cell, xs, state, **options):
    leaves = [*cell.parameters(), xs, *(state if isinstance(state, tuple) else (state,))]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return torch.autograd.grad(run(cell, xs, state), wanted, **options)


def assert_as_torchs(name, options, dtype, sizes=(4, 5, 3), steps=STEPS, prepare=lambda cell: None):
    """No farther from float64's than torch's own, but for a factor and the least that a rounding is."""
    inputs, hidden, batch = sizes
    theirs, ours = both(name, inputs, hidden, dtype=dtype, **options)
    prepare(theirs), prepare(ours)
    exact = copy.deepcopy(theirs).double()
    xs, state = random(steps, batch, inputs, dtype=dtype).requires_grad_(), start(theirs, batch, True)
    wide = [s.detach().double().requires_grad_() for s in (state if isinstance(state, tuple) else (state,))]
    truth = gradients(exact, xs.detach().double().requires_grad_(), tuple(wide) if isinstance(state, tuple) else wide[0])
    expected, actual = gradients(theirs, xs, state), gradients(ours, xs, state)
    rounding = torch.finfo(dtype).eps
    for e, a, t in zip(expected, actual, truth, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape
        scale = t.abs().max().item()
        allowed = 2 * (e.double() - t).abs().max().item() + 4 * rounding * scale
        assert (a.double() - t).abs().max().item() <= allowed
    return actual


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("name", "options"), CELLS)
def test_a_loop(name, options, bias, dtype, ours_take_steps):
    assert_as_torchs(name, dict(options, bias=bias), dtype)
    assert len(ours_take_steps) == STEPS


@pytest.mark.parametrize("sizes", [(1, 1, 1), (17, 33, 2), (64, 48, 20), (300, 257, 1)], ids=str)
@pytest.mark.parametrize(("name", "options"), CELLS)
def test_sizes(name, options, sizes):
    assert_as_torchs(name, options, torch.float32, sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "options"), CELLS)
def test_more_rows_than_are_kept(name, options, dtype, monkeypatch):
    """They are multiplied now and then, and the products added up in float32."""
    monkeypatch.setattr(_recurrent_step, "_ROWS", 7)
    assert_as_torchs(name, options, dtype, steps=12)


@pytest.mark.parametrize("frozen", [["weight_ih"], ["weight_hh"], ["bias_ih", "weight_hh"], ["bias_hh"]], ids=str)
@pytest.mark.parametrize(("name", "options"), CELLS)
def test_some_parameters_are_frozen(name, options, frozen):
    def prepare(cell):
        for of in frozen:
            getattr(cell, of).requires_grad_(False)

    assert len(assert_as_torchs(name, options, torch.float32, prepare=prepare)) == 4 - len(frozen) + 2 + (name == "LSTMCell")


def test_all_parameters_are_frozen():
    actual = assert_as_torchs("GRUCell", {}, torch.float32, prepare=lambda cell: cell.requires_grad_(False))
    assert len(actual) == 2


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(("name", "options"), CELLS)
def test_the_only_step(name, options, large, monkeypatch, ours_take_steps):
    """Of a state that no other led to: its weights' gradient is formed at once, even while the steps before it are at hand."""
    kept, add = [], _recurrent_step._Rows.add
    monkeypatch.setattr(_recurrent_step, "_SMALL", 0 if large else 1 << 20)
    monkeypatch.setattr(_recurrent_step._Rows, "add", lambda rows, *given: kept.append(given) or add(rows, *given))
    theirs, ours = both(name, **options)
    xs, state = random(1, 3, 4), start(theirs, 3)
    before = run(ours, random(3, 3, 4), state)
    ours_take_steps.clear()
    for e, a in zip(gradients(theirs, xs, state), gradients(ours, xs, state), strict=True):
        torch.testing.assert_close(a, e)
    assert len(ours_take_steps) == 1 and not kept
    before.backward()
    assert len(kept) == (3 if large else 2)


@pytest.mark.parametrize(("name", "options"), CELLS)
def test_states_that_are_odd(name, options, ours_take_steps):
    """Expanded, transposed, and none at all."""
    theirs, ours = both(name, 4, 5, **options)
    pair = name == "LSTMCell"
    for h in (torch.zeros(1, 5).expand(3, 5), random(5, 3).t()):
        xs, state = random(STEPS, 4, 3).transpose(1, 2), (h, h) if pair else h
        for e, a in zip(gradients(theirs, xs, state), gradients(ours, xs, state), strict=True):
            torch.testing.assert_close(a, e)
    xs = random(STEPS, 3, 4)
    expected, actual = (torch.autograd.grad(run(cell, xs, None), list(cell.parameters())) for cell in (theirs, ours))
    for e, a in zip(expected, actual, strict=True):
        torch.testing.assert_close(a, e)


def test_an_lstms_parts_without_the_others():
    """A gradient of h or of c alone, and of neither."""
    theirs, ours = both("LSTMCell")
    x, state = random(3, 4), start(theirs, 3)
    for part in range(2):
        expected, actual = (torch.autograd.grad(c(x, c(x, state))[part].sum(), list(c.parameters())) for c in (theirs, ours))
        for e, a in zip(expected, actual, strict=True):
            torch.testing.assert_close(a, e)
    h, _ = ours(x, ours(x, state))
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(h.sum() * 0 + random(1).requires_grad_().sum(), list(ours(x, state)), allow_unused=False)


@pytest.mark.parametrize(("name", "options"), CELLS)
def test_backward_twice_and_in_parts(name, options):
    theirs, ours = both(name, **options)
    xs, state = random(STEPS, 3, 4), start(theirs, 3)
    for cell in (theirs, ours):
        loss = run(cell, xs, state)
        loss.backward(retain_graph=True)
        loss.backward()
        early = run(cell, xs[:2], state)
        (early + run(cell, xs, state)).backward()
    for e, a in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a.grad, e.grad)


@pytest.mark.parametrize(("name", "options"), CELLS)
def test_gradients_of_the_input_alone_keep_nothing(name, options):
    """What forms the weights' gradients does not run then, so that nothing may be kept for it."""
    theirs, ours = both(name, **options)
    xs, state = random(STEPS, 3, 4).requires_grad_(), start(theirs, 3)
    expected, loss = torch.autograd.grad(run(theirs, xs, state), xs)[0], run(ours, xs, state)
    graph = _recurrent_step._graphs[id(ours.weight_hh)]
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(loss, xs, retain_graph=True)[0], expected)
    assert not graph.shares.passes
    loss.backward()
    assert not graph.shares.passes


@pytest.mark.parametrize(("name", "options"), CELLS)
def test_gradients_of_gradients_and_many_at_once(name, options):
    theirs, ours = both(name, dtype=torch.float64, **options)
    xs, state = random(STEPS, 3, 4, dtype=torch.float64).requires_grad_(), start(theirs, 3, True)

    def second(cell):
        first = gradients(cell, xs, state, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), [*cell.parameters(), xs])

    for e, a in zip(second(theirs), second(ours), strict=True):
        torch.testing.assert_close(a, e)

    def many(cell):
        of = state
        for x in xs:
            of = cell(x, of)
        given = torch.eye(3, dtype=torch.float64)[:, :, None].expand(3, 3, 5)
        return torch.autograd.grad(of[0] if isinstance(of, tuple) else of, [*cell.parameters(), xs], given, is_grads_batched=True)

    for e, a in zip(many(theirs), many(ours), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("further", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "options"), CELLS)
def test_odd_gradients_of_short_numbers(name, options, dtype, further):
    """Many at once, or with a graph of their own: those that come one by one, without."""
    _, ours = both(name, dtype=dtype, **options)
    xs, state = random(STEPS, 3, 4, dtype=dtype).requires_grad_(), start(ours, 3, True)
    leaves = [*ours.parameters(), xs, *(state if isinstance(state, tuple) else (state,))]
    total = run(ours, xs, state)
    plain = torch.autograd.grad(total, leaves, retain_graph=True)
    if further:
        found = torch.autograd.grad(total, leaves, create_graph=True)
    else:
        factors = torch.tensor([1.0, -2.0], dtype=torch.float64)
        one, two = zip(*torch.autograd.grad(total, leaves, factors, is_grads_batched=True), strict=True)
        found = one
        for a, e in zip(two, plain, strict=True):
            assert (a + 2 * e).abs().max() <= 32 * torch.finfo(dtype).eps * e.abs().max()
    for a, e in zip(found, plain, strict=True):
        assert a.dtype == dtype
        assert (a - e).abs().max() <= 16 * torch.finfo(dtype).eps * e.abs().max()


def test_a_backward_pass_that_fails_leaves_nothing_behind():
    theirs, ours = both("GRUCell")
    xs, state = random(STEPS, 3, 4), start(theirs, 3)
    middle = ours(xs[0], state)
    handle = middle.register_hook(lambda grad: 1 / 0)
    loss = run(ours, xs[1:], middle)
    with pytest.raises(ZeroDivisionError):
        loss.backward(retain_graph=True)
    handle.remove()
    loss.backward()
    run(theirs, xs[1:], theirs(xs[0], state)).backward()
    for e, a in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a.grad, e.grad)


def test_graphs_are_freed():
    """With the module, and without ever a backward pass."""
    cell = fastseq.LSTMCell(4, 5)
    weight, loss = weakref.ref(cell.weight_hh), run(cell, random(STEPS, 3, 4), start(cell, 3))
    assert len(_recurrent_step._graphs) == 1
    del cell
    gc.collect()
    assert weight() is not None  # by the graph
    del loss
    gc.collect()
    assert weight() is None and not _recurrent_step._graphs


def test_a_changed_parameter_is_told():
    _, ours = both("LSTMCell")
    loss = run(ours, random(STEPS, 3, 4), start(ours, 3))
    with torch.no_grad():
        ours.weight_hh.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
def test_what_is_written_into_a_state(name):
    """Into h it may be where torch's own step keeps no h, which the next step does keep."""
    theirs, ours = both(name)
    x, state = random(3, 4), start(theirs, 3)
    for cell in (theirs, ours):
        out = cell(x, state)
        h = out[0] if isinstance(out, tuple) else out
        h.add_(1)
        h.sum().backward()
        out = cell(x, state)
        h = out[0] if isinstance(out, tuple) else out
        loss = run(cell, x[None], out)
        h.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    for e, a in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a.grad, e.grad)


def test_requires_grad_that_changes_between_steps():
    theirs, ours = both("LSTMCell")
    xs, state = random(STEPS, 3, 4), start(theirs, 3)
    for cell in (theirs, ours):
        of = cell(xs[0], cell(xs[1], state))
        cell.weight_ih.requires_grad_(False)
        loss = run(cell, xs[2:], of)
        cell.weight_ih.requires_grad_()
        (loss + run(cell, xs[:1], of)).backward()
    for e, a in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a.grad, e.grad)


@pytest.mark.parametrize(("name", "options"), CELLS)
def test_weights_that_cells_share(name, options):
    theirs, ours = both(name, **options)
    xs, state = random(STEPS, 3, 4), start(theirs, 3)
    for cell in (theirs, ours):
        other = copy.deepcopy(cell)
        other.weight_hh = cell.weight_hh
        (run(cell, xs, state) + run(other, xs, state)).backward()
    for e, a in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a.grad, e.grad)


@pytest.mark.parametrize("own", ["weight_ih", "bias_ih", "bias_hh"])
@pytest.mark.parametrize(("name", "options"), CELLS)
def test_cells_that_share_all_but_one(name, options, own):
    theirs, ours = both(name, **options)
    xs, state, found = random(STEPS, 3, 4), start(theirs, 3), []
    for cell in (theirs, ours):
        other, of = copy.deepcopy(cell), state
        for shared in {"weight_ih", "weight_hh", "bias_ih", "bias_hh"} - {own}:
            setattr(other, shared, getattr(cell, shared))
        for i, x in enumerate(xs):
            of = (cell, other)[i % 2](x, of)
        loss = sum(s.square().sum() for s in (of if isinstance(of, tuple) else (of,)))
        found.append(torch.autograd.grad(loss, [*cell.parameters(), getattr(other, own)]))
    for e, a in zip(*found, strict=True):
        torch.testing.assert_close(a, e)


def test_sums_of_bfloat16_are_those_of_float(monkeypatch):
    """torch adds the shares of the steps in bfloat16, where 256 + 1 is 256."""
    monkeypatch.setattr(_recurrent_step, "_ROWS", 7)
    cell = fastseq.RNNCell(3, 4, nonlinearity="relu").bfloat16()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.fill_(0 if parameter.dim() == 2 else 0.5)
    x, h = torch.ones(1, 3).bfloat16(), torch.ones(1, 4).bfloat16()
    total = 0
    for _ in range(300):
        h = cell(x, h)
        total = total + h.float().sum()
    for grad in torch.autograd.grad(total, list(cell.parameters())):
        assert grad.eq(300).all()


def test_hooks_see_a_gradient_once():
    _, ours = both("GRUCell")
    seen = []
    ours.weight_hh.register_hook(lambda grad: seen.append("before"))
    ours.weight_hh.register_post_accumulate_grad_hook(lambda parameter: seen.append("after"))
    run(ours, random(STEPS, 3, 4), start(ours, 3)).backward()
    assert seen == ["before", "after"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant):
    theirs, ours = both("LSTMCell")
    xs, state = random(STEPS, 3, 4).requires_grad_(), start(theirs, 3)
    for cell in (theirs, ours):
        half = checkpoint(run, cell, xs[:3], state, use_reentrant=reentrant)
        (half + run(cell, xs[3:], state)).backward()
    for e, a in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a.grad, e.grad)


def test_threads_that_share_a_cell():
    """Each thread its own backward pass, through the same graph of steps as far as they met."""
    theirs, ours = both("GRUCell")
    xs, state = random(STEPS, 3, 4), start(theirs, 3)
    expected = gradients(theirs, xs, state)
    together, found = threading.Barrier(4), []

    def work():
        loss = run(ours, xs, state)
        together.wait()
        for _ in range(5):
            found.append(torch.autograd.grad(loss, list(ours.parameters()), retain_graph=True))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    for grads in found:
        for e, a in zip(expected, grads, strict=True):
            torch.testing.assert_close(a, e)


def test_saved_tensors_that_are_kept_elsewhere():
    theirs, ours = both("LSTMCell")
    xs, state = random(STEPS, 3, 4), start(theirs, 3)
    expected = gradients(theirs, xs, state)
    with torch.autograd.graph.save_on_cpu():
        actual = gradients(ours, xs, state)
    for e, a in zip(expected, actual, strict=True):
        torch.testing.assert_close(a, e)


LAYERS = [("RNN", dict()), ("LSTM", dict()), ("GRU", dict()), ("GRU", dict(bias=False)), ("LSTM", dict(batch_first=True))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize(("name", "options"), LAYERS)
def test_layers_that_are_called_step_by_step(name, options, num_layers, dtype, ours_take_steps):
    """What they return is the caller's own: written into, it changes no gradient."""
    theirs, ours = both(name, 4, 5, dtype=dtype, num_layers=num_layers, **options)
    exact = copy.deepcopy(theirs).double()
    xs = random(STEPS, 3, 4, dtype=dtype)
    first = [random(num_layers, 3, 5, dtype=dtype) for _ in range(1 + (name == "LSTM"))]

    def grads(layer, wide, written):
        kind = torch.float64 if wide else dtype
        x, initial = xs.to(kind).requires_grad_(), [state.to(kind).requires_grad_() for state in first]
        state, total = tuple(initial) if len(initial) > 1 else initial[0], 0
        for row in x:
            y, state = layer(row.unsqueeze(1 if layer.batch_first else 0), state)
            total = total + (y.double() * torch.linspace(-1, 1, 15, dtype=torch.float64).view(y.shape)).sum()
            if written:
                with torch.no_grad():
                    y.zero_()
        total = total + sum(of.double().square().sum() for of in (state if isinstance(state, tuple) else (state,)))
        return torch.autograd.grad(total, [*layer.parameters(), x, *initial])

    truth, expected, actual = grads(exact, True, False), grads(theirs, False, False), grads(ours, False, False)
    assert len(ours_take_steps) == STEPS * num_layers
    for e, a, t in zip(expected, actual, truth, strict=True):
        allowed = 2 * (e.double() - t).abs().max().item() + 4 * torch.finfo(dtype).eps * t.abs().max().item()
        assert (a.double() - t).abs().max().item() <= allowed
    for a, b in zip(actual, grads(ours, False, True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize(("name", "options"), LAYERS)
def test_results_of_layers_that_are_changed(name, options, which, ours_take_steps):
    theirs, ours = both(name, 4, 5, dtype=torch.float64, **options)
    first = [random(1, 3, 5, dtype=torch.float64) for _ in range(1 + (name == "LSTM"))]
    x, found = random(3, 4, dtype=torch.float64).unsqueeze(1 if theirs.batch_first else 0), []
    for layer in (theirs, ours):
        y, state = layer(x, tuple(first) if len(first) > 1 else first[0])
        made = [y, *(state if isinstance(state, tuple) else (state,))]
        made[which % len(made)].mul_(2)
        found.append(torch.autograd.grad(sum(of.square().sum() for of in made), list(layer.parameters())))
    assert len(ours_take_steps) == 1
    for e, a in zip(*found, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize(("name", "options"), LAYERS)
def test_gradients_of_gradients_of_layers(name, options, num_layers, ours_take_steps):
    theirs, ours = both(name, 4, 5, dtype=torch.float64, num_layers=num_layers, **options)
    x = random(1, 3, 4, dtype=torch.float64).transpose(0, 1 if theirs.batch_first else 0).requires_grad_()
    states = [random(num_layers, 3, 5, dtype=torch.float64).requires_grad_() for _ in range(1 + (name == "LSTM"))]

    def second(layer):
        y, finals = layer(x, tuple(states) if len(states) > 1 else states[0])
        outputs = [y, *(finals if isinstance(finals, tuple) else (finals,))]
        leaves = [x, *states, *layer.parameters()]
        first = torch.autograd.grad(sum(out.square().sum() for out in outputs), leaves, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)

    expected = second(theirs)
    actual = second(ours)
    assert len(ours_take_steps) == num_layers
    for e, a in zip(expected, actual, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 8, 17, 300])
@pytest.mark.parametrize(("gates", "inputs", "hidden"), [(20, 3, 5), (192, 70, 64), (99, 33, 33), (2048, 300, 512)])
def test_gradients_of_the_weights_of_all_steps(gates, inputs, hidden, rows, dtype):
    """By whichever kernels take so many rows of such weights; those that are wanted, in their order."""
    assert library.reason() is None
    dgates, drecurrent, x, h = (torch.randn(rows, n).to(dtype) for n in (gates, gates, inputs, hidden))
    truth = [part for a, b in ((dgates, x), (drecurrent, h)) for part in (a.double().t() @ b.double(), a.double().sum(0))]
    torchs = [part for a, b in ((dgates, x), (drecurrent, h)) for part in (a.t() @ b, a.sum(0))]
    for wanted in ((True, True, True, True), (False, True, False, True), (True, False, True, False)):
        found = torch.ops.fastseq_native.recurrent_steps_gradients.default(dgates, drecurrent, x, h, wanted)
        places = [place for place, want in zip((0, 2, 1, 3), wanted, strict=True) if want]
        assert len(found) == len(places)
        for grad, place in zip(found, places, strict=True):
            assert_close_to_truth(grad, torchs[place], truth[place])


def test_gradients_of_the_weights_of_steps_that_do_not_fit():
    assert library.reason() is None
    op = torch.ops.fastseq_native.recurrent_steps_gradients.default
    for shapes in (((3, 8), (3, 8), (2, 4), (3, 4)), ((3, 8), (3, 4), (3, 4), (3, 4)), ((1, 3, 8), (3, 8), (3, 4), (3, 4))):
        with pytest.raises(RuntimeError, match="recurrent: "):
            op(*(torch.randn(shape) for shape in shapes), [True] * 4)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("name", "options"), [(name.removesuffix("Cell"), options) for name, options in CELLS])
class TestLayersThatAreTorchs:
    """in training go to torch's kernel at once: with its bits, and only where nothing is to be asked."""

    def test_bits(self, name, options, bias, batch_first, steps, ours_take_steps):
        modules = both(name, 4, 5, bias=bias, batch_first=batch_first, **options)
        x, h = random(3, steps, 4) if batch_first else random(steps, 3, 4), random(1, 3, 5)
        with sources.instead(lambda call: Candidate("torch")):
            for hx in (None, (h, -h) if name == "LSTM" else h):
                for training in (True, False):
                    expected, actual = ([], [])
                    for module, results in zip(modules, (expected, actual), strict=True):
                        y, end = module.train(training)(x, hx)
                        grads = torch.autograd.grad(y.sum(), list(module.parameters()))
                        results += [y, *(end if name == "LSTM" else (end,)), *grads]
                    for a, e in zip(actual, expected, strict=True):
                        assert torch.equal(a, e) and a.dtype == e.dtype and a.stride() == e.stride()
        assert not ours_take_steps

    def test_what_is_wrong_is_said(self, name, options, bias, batch_first, steps):
        """Also once calls of such sizes were taken."""
        theirs, ours = both(name, 4, 5, bias=bias, batch_first=batch_first, **options)
        _, wider = both(name, 6, 5, bias=bias, batch_first=batch_first, **options)
        x, h = random(3, steps, 4) if batch_first else random(steps, 3, 4), random(1, 3, 5)
        states = [(h, h), (h,), h, (h, h, h), (h[:, :2], h), h[:, :2], h.double(), (h, h.double()), (h, None)]
        for backend in ("torch", "cpu"):
            with sources.instead(lambda call, backend=backend: Candidate(backend)):
                ours(x, (h, h) if name == "LSTM" else h)
                for hx in states:
                    message = raised(lambda hx=hx: theirs(x, hx))
                    assert (message is None) == (raised(lambda hx=hx: ours(x, hx)) is None), hx
                with pytest.raises(RuntimeError, match="input.size"):
                    wider(x)
                with pytest.raises(ValueError, match="input dtype"):
                    ours(x.double())


def raised(run):
    try:
        run()
    except Exception as error:
        return str(error)
    return None
