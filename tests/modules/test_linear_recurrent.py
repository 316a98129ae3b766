"""Layers of linear recurrence: against their equations step by step, against other packages' results, steps, segments,
directions, errors."""

from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch
from oracles import frozen, hgrn, min_gru, min_lstm, rg_lru
from torch._dynamo.testing import CompileCounterWithBackend

import fastseq
from fastseq import functional
from fastseq.backends import library
from fastseq.functional import _linear_recurrent
from fastseq.modules import linear_recurrent

X, H = 3, 6  # widths of input and output

# class, options, and the size of the states
KINDS = {
    "MinGRU": (fastseq.MinGRU, {}, H),
    "MinLSTM": (fastseq.MinLSTM, {}, H),
    "HGRN": (fastseq.HGRN, {}, H),
    "HGRN plain": (fastseq.HGRN, {"lower_bound": False, "output_gate": False, "bias": False}, H),
    "RGLRU": (fastseq.RGLRU, {}, H),
    "RGLRU heads": (fastseq.RGLRU, {"heads": 3}, H),
    "QRNN f": (fastseq.QRNN, {"pooling": "f"}, H),
    "QRNN fo window": (fastseq.QRNN, {"window": 2}, H),
    "QRNN ifo window": (fastseq.QRNN, {"pooling": "ifo", "window": 2}, H),
    "LRU": (fastseq.LRU, {"state_size": 4, "bias": True}, 4),
}
FEW = ["MinGRU", "MinLSTM", "HGRN", "RGLRU heads", "QRNN ifo window", "LRU"]  # one of each class
ON_EVERY = pytest.mark.parametrize("name", KINDS)
ON_FEW = pytest.mark.parametrize("name", FEW)


def made(name, *args, dtype=torch.float64, **options):
    """A layer of a kind, whose parameters that begin as constants are some numbers."""
    kind, own, _ = KINDS[name]
    torch.manual_seed(0)
    module = kind(X, H, *args, dtype=dtype, **own, **options)
    for parameter in module.parameters():
        if parameter.numel() > 1 and parameter.var() == 0:
            torch.nn.init.normal_(parameter, 0.5)
    return module


def states(module, name, batch=4, dtype=torch.float64):
    """Some states before; of a window of two steps with the inputs before."""
    lanes = module.num_layers * (2 if module.bidirectional else 1)
    size = KINDS[name][2]
    of_states = torch.complex128 if name == "LRU" else dtype
    hx = torch.randn(lanes, batch, size, dtype=of_states, requires_grad=True)
    if "window" not in name:
        return hx
    directions = 2 if module.bidirectional else 1
    width = X + (module.num_layers - 1) * directions * H
    return hx, torch.randn(directions, batch, width, dtype=dtype, requires_grad=True)


def flat(results):
    """Of output and states, whatever these are, tensors in a row; complex numbers as pairs."""
    found = [tensor for part in results for tensor in (part if isinstance(part, tuple) else (part,))]
    return [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in found]


def at_step(name, p, x, before, h):
    """Output and state of a row's step by the equations; h: the state before, None where a sequence begins."""
    sigmoid = torch.sigmoid
    state = torch.zeros(KINDS[name][2], dtype=torch.complex128 if name == "LRU" else x.dtype) if h is None else h
    if name == "LRU":
        eigenvalues = torch.exp(torch.complex(-torch.exp(p["nu_log"]), torch.exp(p["theta_log"])))
        B, C = (
            torch.complex(p["weight_b"][::2], p["weight_b"][1::2]),
            torch.complex(p["weight_c"][:, ::2], p["weight_c"][:, 1::2]),
        )
        state = eigenvalues * state + torch.exp(p["gamma_log"]) * (B @ x.to(B.dtype))
        return (C @ state).real + p["weight_d"] @ x + p["bias_out"], state
    if name.startswith("RGLRU"):
        if "weight_ih" in p:
            x = p["weight_ih"] @ x + p["bias_ih"]
        blocks = x.split(H // len(p["weight_r"]))
        r, i = (
            sigmoid(torch.cat([w @ part for w, part in zip(p[f"weight_{gate}"], blocks, strict=True)]) + p[f"bias_{gate}"])
            for gate in "ri"
        )
        a = torch.exp(-8 * r * torch.log(1 + torch.exp(p["decay"])))
        state = a * state + (1 if h is None else torch.sqrt(1 - a * a)) * i * x
        return state, state
    if name.startswith("QRNN"):
        logits = sum(p["weight_ih"][:, k] @ step for k, step in enumerate((x, before)[: p["weight_ih"].shape[1]])) + p["bias_ih"]
        gates = dict(
            zip({"QRNN f": "fz", "QRNN fo window": "fzo", "QRNN ifo window": "fizo"}[name], logits.split(H), strict=True)
        )
        f = sigmoid(gates["f"])
        state = f * state + (sigmoid(gates["i"]) if "i" in gates else 1 - f) * torch.tanh(gates["z"])
        return (sigmoid(gates["o"]) * state if "o" in gates else state), state
    logits = p["weight_ih"] @ x + (p["bias_ih"] if "bias_ih" in p else 0)
    if name.startswith("HGRN"):
        f, i, *gate = logits.split(H)
        f = p["bound"] + (1 - p["bound"]) * sigmoid(f)
        state = f * state + (1 - f) * i * sigmoid(i)
        if not gate:
            return state, state
        return state / torch.sqrt((state**2).mean() + 1e-5) * p["weight_norm"] * gate[0] * sigmoid(gate[0]), state
    *gates, v = logits.split(H)
    candidate = torch.where(v >= 0, v + 0.5, sigmoid(v))
    if name == "MinGRU":
        z = sigmoid(gates[0])
        state = (1 - z) * state + z * candidate
    else:
        f, i = (sigmoid(gate) for gate in gates)
        state = (f * state + i * candidate) / (f + i)
    return state, state


def by_steps(name, p, x, h, before, reset, end, reverse):
    """A lane over one row x [T, I]: outputs [T, H], the last state and the last input."""
    nothing, outputs = torch.zeros_like(before), torch.zeros(len(x), H, dtype=x.dtype)
    for t in reversed(range(end)) if reverse else range(end):
        link = t + 1 if reverse else t
        if reset is not None and link < end and reset[link]:
            h, before = None, nothing
        outputs[t], h = at_step(name, p, x[t], before, h)
        before = x[t]
    return outputs, torch.zeros(KINDS[name][2], dtype=torch.complex128 if name == "LRU" else x.dtype) if h is None else h, before


def expected(module, name, x, hx=None, lengths=None, resets=None):
    """The stack by the equations, time-major."""
    finals, directions, window = [], 2 if module.bidirectional else 1, "window" in name
    hx, inputs = hx if window and hx is not None else (hx, None)
    kept = [[] for _ in range(directions)]
    at = 0  # where the inputs of a layer begin
    for layer in range(module.num_layers):
        outputs = []
        for direction in range(directions):
            ending = f"_l{layer}" + ("_reverse" if direction else "")
            p = {n.removesuffix(ending): v for n, v in module.named_parameters() if n.endswith(ending)}
            p["bound"] = torch.zeros(H, dtype=x.dtype)
            if hasattr(module, "lower_bounds"):
                shares = torch.softmax(module.lower_bounds_reverse if direction else module.lower_bounds, 0)
                p["bound"] = (torch.cumsum(shares, 0) - shares[0])[layer]
            rows = [
                by_steps(
                    name,
                    p,
                    x[:, row],
                    None if hx is None else hx[layer * directions + direction, row],
                    torch.zeros_like(x[0, row]) if inputs is None else inputs[direction, row, at : at + x.shape[-1]],
                    None if resets is None else resets[:, row],
                    len(x) if lengths is None else int(lengths[row]),
                    direction == 1,
                )
                for row in range(x.shape[1])
            ]
            outputs.append(torch.stack([row[0] for row in rows], 1))
            finals.append(torch.stack([row[1] for row in rows]))
            kept[direction].append(torch.stack([row[2] for row in rows]))
        at += x.shape[-1]
        x = torch.cat(outputs, -1)
    h_n = torch.stack(finals)
    return x, (h_n, torch.stack([torch.cat(layers, -1) for layers in kept])) if window else h_n


def compare(found, wanted, leaves):
    """Results, and the gradients of a loss of all of them."""
    found, wanted = flat(found), flat(wanted)
    torch.testing.assert_close(found, wanted)
    losses = [sum((part * (k + 1)).square().sum() + part.sum() for k, part in enumerate(parts)) for parts in (found, wanted)]
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        torch.testing.assert_close(one, other)


@ON_EVERY
@pytest.mark.parametrize("with_", ["nothing", "lengths", "resets", "both"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_against_the_equations(name, with_, backend):
    """Two layers, both ways."""
    module = made(name, 2, bidirectional=True)
    x, hx = torch.randn(6, 4, X, dtype=torch.float64, requires_grad=True), states(module, name)
    more = {
        "lengths": torch.tensor([6, 3, 0, 1]) if with_ in ("lengths", "both") else None,
        "resets": torch.rand(6, 4) < 0.3 if with_ in ("resets", "both") else None,
    }
    with fastseq.use_backend(backend):
        leaves = [x, *(hx if isinstance(hx, tuple) else (hx,)), *module.parameters()]
        compare(module(x, hx, **more), expected(module, name, x, hx, **more), leaves)


@ON_EVERY
def test_a_sequence_that_begins(name):
    """One layer, one way, no state before."""
    module, x = made(name), torch.randn(5, 2, X, dtype=torch.float64, requires_grad=True)
    compare(module(x), expected(module, name, x), [x, *module.parameters()])


@ON_EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_steps_are_the_sequence(name, dtype):
    """At every prefix: one step after the other, with a sequence's last."""
    module, state = made(name, 2, dtype=dtype).eval(), None
    x = torch.randn(7, 2, X).to(dtype)
    tolerance = {} if dtype != torch.bfloat16 else {"rtol": 2e-2, "atol": 2e-2}
    for t in range(7):
        y, state = module.step(x[t], state)
        output, h_n = module(x[: t + 1])
        assert output.dtype == y.dtype == dtype and flat((h_n,))[0].dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(flat((y, state)), flat((output[-1], h_n)), **tolerance)
    (alone, *own), (y, *states) = flat(module.step(x[0, 1])), flat(module.step(x[0]))
    torch.testing.assert_close([alone, *own], [y[1], *(part[:, 1] for part in states)], **tolerance)


@ON_FEW
@pytest.mark.parametrize("more", [{}, {"bidirectional": True, "num_layers": 2}])
def test_without_gradients_it_is_as_with_them(name, more):
    """From states, with rows that end early and segments that begin anew; a step as well."""
    module = made(name, batch_first=True, **more)
    x, hx = torch.randn(4, 5, X, dtype=torch.float64), states(module, name)
    for lengths, resets in ((None, None), (torch.tensor([5, 0, 3, 1]), torch.rand(4, 5) < 0.3)):
        for part in (x, x[:, :1]) if lengths is None else (x,):
            expected = flat(module(part, hx, lengths=lengths, resets=resets))
            with torch.no_grad():
                found = flat(module(part, hx, lengths=lengths, resets=resets))
            assert any(tensor.requires_grad for tensor in expected) and not any(tensor.requires_grad for tensor in found)
            torch.testing.assert_close(found, [tensor.detach() for tensor in expected])


@pytest.mark.skipif(library.reason() is not None, reason="needs the library")
@pytest.mark.parametrize("name", ["MinGRU", "MinLSTM"])
def test_a_plain_call_without_gradients_is_short_and_has_the_same_bits(name, monkeypatch):
    """What the short way does not know it leaves to the long one."""
    short, taken = _linear_recurrent.projected_scans, []

    def watched(*given):
        found = short(*given)
        taken.append(found is not None)
        return found

    def by(way):
        for module in (_linear_recurrent, linear_recurrent):
            monkeypatch.setattr(module, "projected_scans", way)

    for layers, batch_first, bias, dtype in itertools.product(
        (1, 2), (False, True), (False, True), (torch.float32, torch.float64)
    ):
        module = made(name, layers, bias, batch_first, dtype=dtype)
        x, hx = torch.randn(3, 5, X, dtype=dtype), states(module, name, 3 if batch_first else 5, dtype).detach()
        for given in ((x, None), (x, hx), (x[:, :1], hx) if batch_first else (x[:1], hx)):
            of_both = []
            for way in (watched, lambda *_: None):
                by(way)
                with torch.no_grad():
                    y, last = module(*given)
                of_both.append((y, last))
            for a, b in zip(*of_both, strict=True):
                assert torch.equal(a, b)
                # steps between elements that there are: of a single step the short way gives those of what is contiguous
                assert [n for n, size in zip(a.stride(), a.shape, strict=True) if size > 1] == [
                    n for n, size in zip(b.stride(), b.shape, strict=True) if size > 1
                ]
            assert not batch_first or given[0].shape[1] > 1 or of_both[0][0].stride() == (H, H, 1)
    assert len(taken) == 48 and all(taken)

    by(watched)
    with torch.no_grad():
        cell = made(name, 1)._CELL
        functional.linear_recurrent(cell, torch.randn(3, 2, X), None, [{"weight_ih": torch.randn(6 * H, X)}])
    assert taken.pop() and len(taken) == 48
    module, x = made(name, 2), torch.randn(4, 2, X, dtype=torch.float64)
    hx = states(module, name, 2).detach()
    with torch.no_grad():
        taken.clear()
        module(x.float().double(), hx[..., :H].transpose(1, 2).contiguous().transpose(1, 2))  # states that are not contiguous
        module(x[:0], hx)
        made(name, 2, dropout=0.5)(x)  # in training
        for wrong in (x[..., :2], x.float(), x[0, 0]):
            with pytest.raises(RuntimeError):
                module(wrong, hx)
    module(x, hx)  # with gradients
    assert len(taken) == 12 and not any(taken)  # each asks twice: what is beside a module's layers is the function's to ask


@ON_EVERY
def test_segments_go_on_from_the_state_before(name):
    module = made(name, 2)
    x = torch.randn(9, 2, X, dtype=torch.float64)
    whole, last = module(x)
    first, state = module(x[:4])
    second, final = module(x[4:], state)
    torch.testing.assert_close(torch.cat((first, second)), whole)
    torch.testing.assert_close(flat((final,)), flat((last,)))
    early, _ = module(x[:4], lengths=torch.tensor([4, 3]))
    _, at_three = module(x[:3])
    _, found = module(x[:4], lengths=torch.tensor([4, 3]))
    torch.testing.assert_close([part[:, 1] for part in flat((found,))], [part[:, 1] for part in flat((at_three,))])
    assert early[3, 1].count_nonzero() == 0


@ON_EVERY
def test_a_row_with_resets_is_its_segments_one_by_one(name):
    """Both ways: no state, no input and no root of the step before."""
    module = made(name, 1, bidirectional=True)
    x, resets = torch.randn(9, 1, X, dtype=torch.float64), torch.zeros(9, 1, dtype=torch.bool)
    resets[[2, 3, 7]] = True
    output, _ = module(x, resets=resets)
    cuts = [0, 2, 3, 7, 9]
    torch.testing.assert_close(output, torch.cat([module(x[a:b])[0] for a, b in zip(cuts, cuts[1:], strict=False)]))


@ON_EVERY
def test_layouts_and_unbatched_input(name):
    module, x = made(name, 2, bidirectional=True), torch.randn(6, 3, X, dtype=torch.float64)
    output, h_n = module(x)
    other = made(name, 2, bidirectional=True, batch_first=True)
    other.load_state_dict(module.state_dict())
    by_batch, others = other(x.transpose(0, 1), resets=torch.zeros(3, 6, dtype=torch.bool))
    torch.testing.assert_close(by_batch.transpose(0, 1), output)
    torch.testing.assert_close(flat((others,)), flat((h_n,)))
    alone, state = module(x[:, 1])
    assert alone.shape == (6, 2 * H)
    torch.testing.assert_close(alone, output[:, 1])
    torch.testing.assert_close(flat((state,)), [part[:, 1] for part in flat((h_n,))])
    own = tuple(part[:, 1] for part in h_n) if isinstance(h_n, tuple) else h_n[:, 1]
    torch.testing.assert_close(flat((module(x[:, 1], own)[1],)), [part[:, 1] for part in flat((module(x, h_n)[1],))])


@ON_FEW
def test_what_is_padded_may_be_nan(name):
    """It is in no output and no gradient."""
    module, lengths = made(name, 2, bidirectional=True), torch.tensor([5, 2])
    x = torch.randn(5, 2, X, dtype=torch.float64)
    clean = module(x, lengths=lengths)
    x[2:, 1] = torch.nan
    output, h_n = module(x.requires_grad_(), lengths=lengths)
    torch.testing.assert_close(flat((output, h_n)), flat(clean))
    grads = torch.autograd.grad(sum(part.sum() for part in flat((output, h_n))), [x, *module.parameters()])
    assert all(grad.isfinite().all() for grad in grads)


@ON_FEW
def test_dropout_lies_between_layers_and_in_training_alone(name):
    module, x = made(name, 2, dropout=1.0), torch.randn(6, 3, X, dtype=torch.float64)
    constant = module(x)[0]
    torch.testing.assert_close(constant, constant[:, :1].expand_as(constant))  # the second layer read zeros
    module.eval()
    assert module(x)[0].var(1).min() > 0


@ON_FEW
def test_compiled_without_a_break(name):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module, x = made(name, 1, bidirectional=True), torch.randn(6, 2, X, dtype=torch.float64)
    resets = torch.rand(6, 2) < 0.3
    compiled = torch.compile(lambda x: module(x, resets=resets), fullgraph=True, backend=counter)
    torch.testing.assert_close(flat(compiled(x)), flat(module(x, resets=resets)))
    grads = [
        torch.autograd.grad(run(x)[0].square().sum(), list(module.parameters()))
        for run in (compiled, lambda x: module(x, resets=resets))
    ]
    torch.testing.assert_close(*grads)
    assert counter.frame_count == 1


@ON_FEW
def test_export(name):
    module, x = made(name, 2), torch.randn(6, 2, X, dtype=torch.float64)
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(flat(program.module()(x)), flat(module(x)))


@ON_FEW
def test_gradients_by_differences(name):
    """Of the input, the states and every parameter; and once more."""
    module = made(name, 1)
    hx = states(module, name, 2)
    x, resets = torch.randn(4, 2, X, dtype=torch.float64, requires_grad=True), torch.rand(4, 2) < 0.3
    names = [name for name, _ in module.named_parameters()]

    def run(x, *rest):
        own, of_states = rest[: len(names)], rest[len(names) :]
        given = tuple(of_states) if isinstance(hx, tuple) else of_states[0]
        return tuple(flat(torch.func.functional_call(module, dict(zip(names, own, strict=True)), (x, given), {"resets": resets})))

    leaves = (x, *module.parameters(), *(hx if isinstance(hx, tuple) else (hx,)))
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@ON_FEW
def test_autocast_lowers_the_products_alone(name):
    module, x = made(name, dtype=torch.float32), torch.randn(6, 2, X)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, h_n = module(x)
    assert output.dtype == torch.bfloat16 and flat((h_n,))[0].dtype == torch.float32
    torch.testing.assert_close(output.float(), module(x)[0], rtol=5e-2, atol=5e-2)


@ON_FEW
def test_the_module_is_one_scan_a_lane(name):
    module = made(name, bidirectional=True)
    explanation = fastseq.explain(module, torch.randn(6, 2, X, dtype=torch.float64))
    assert explanation.backends == ["cpu", "cpu"]
    cell = {"HGRN": "hgrn", "RGLRU heads": "rg_lru", "QRNN ifo window": "qrnn_ifo", "LRU": "complex"}.get(name)
    assert (cell or f"min_{name[3:].lower()}") in str(explanation)


def test_the_cell_is_a_step_of_the_layer():
    module, state = fastseq.MinGRU(X, H), None
    cell = fastseq.MinGRUCell(X, H)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in module.state_dict().items()})
    x = torch.randn(4, 2, X)
    for t in range(4):
        state = cell(x[t], state)
        torch.testing.assert_close(state, module(x[: t + 1])[1][0])
    torch.testing.assert_close(cell(x[0, 0]), cell(x[0])[0])


def test_parameters_have_the_names_of_torchs():
    names = [name for name, _ in fastseq.MinGRU(X, H, 2, bidirectional=True).named_parameters()]
    gru = [name for name, _ in torch.nn.GRU(X, H, 2, bidirectional=True).named_parameters() if "_hh_" not in name]
    assert names == gru
    assert repr(fastseq.MinGRU(X, H, bias=False)) == "fastseq.MinGRU(3, 6, bias=False)"
    assert repr(fastseq.MinGRUCell(X, H)) == "fastseq.MinGRUCell(3, 6)"
    assert repr(fastseq.RGLRU(X, H, heads=2)) == "fastseq.RGLRU(3, 6, heads=2)"
    assert repr(fastseq.QRNN(X, H, window=2, pooling="ifo")) == "fastseq.QRNN(3, 6, window=2, pooling=ifo)"
    assert [name for name, _ in fastseq.RGLRU(H, H, 2).named_parameters() if name.startswith("weight_ih")] == []


# how parameters begin


def test_decay_of_the_rg_lru_begins_in_its_interval():
    power = torch.exp(-8 * torch.log1p(torch.exp(fastseq.RGLRU(X, 4000, dtype=torch.float64).decay_l0)))
    assert 0.9 < power.min() < 0.901 and 0.998 < power.max() < 0.999
    assert abs(power.mean() - 0.9495) < 3e-3  # uniform


def test_the_lru_begins_in_its_ring():
    module = fastseq.LRU(X, 4000, r_min=0.4, r_max=0.9, max_phase=0.5, dtype=torch.float64)
    radius, angle = torch.exp(-torch.exp(module.nu_log_l0)), torch.exp(module.theta_log_l0)
    assert 0.4 < radius.min() < 0.41 and 0.899 < radius.max() < 0.9 and angle.max() < 0.5
    assert abs(radius.square().mean() - (0.4**2 + 0.9**2) / 2) < 1e-2  # uniform in area
    torch.testing.assert_close(torch.exp(module.gamma_log_l0), torch.sqrt(1 - radius**2))


def test_lower_bounds_of_the_hgrn_rise():
    module = fastseq.HGRN(X, H, 4)
    bounds = [module._parameters_of(layer)["lower_bound"] for layer in range(4)]
    torch.testing.assert_close(torch.stack(bounds), torch.arange(4)[:, None] / 4 + torch.zeros(H))


# parity with other packages; tests/oracles/<name>.py wrote their results


def compared(oracle, package, run, weights):
    """Outputs, and gradients of the input and of the named weights, with those of another package."""
    results = frozen.read(oracle.__file__)
    if importlib.util.find_spec(package):
        torch.testing.assert_close(frozen.as_tensors(frozen.as_lists(oracle.found())), results)
    x = results["input"].requires_grad_()
    for name, wanted in results["cases"].items():
        output, of_weights = run(results, name, x)
        grads = torch.autograd.grad(frozen.weighted(output), [x, *of_weights])
        torch.testing.assert_close(output, wanted["output"], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(grads[0], wanted["gradient of input"], rtol=1e-10, atol=1e-12)
        for grad, weight in zip(grads[1:], weights, strict=True):
            torch.testing.assert_close(grad, wanted[f"gradient of {weight}"].view_as(grad), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("oracle", "kind", "order"), [(min_gru, fastseq.MinGRU, (1, 0)), (min_lstm, fastseq.MinLSTM, (1, 2, 0))], ids=["GRU", "LSTM"]
)
def test_parity_with_min_gru_pytorch(oracle, kind, order):
    """minGRU-pytorch 0.2.1, which computes in logarithms; rows of its weight are in another order."""

    def run(results, name, x):
        module = kind(oracle.WIDTH, oracle.WIDTH, bias=False, batch_first=True, dtype=torch.float64)
        given = results["weight"].requires_grad_()
        parts = given.chunk(len(order))
        weight = torch.cat([parts[part] for part in order])
        hx = results["before"].transpose(0, 1).contiguous() if name == "from state" else None
        return torch.func.functional_call(module, {"weight_ih_l0": weight}, (x, hx))[0], [given]

    compared(oracle, "minGRU_pytorch", run, ["weight"])


def test_parity_with_recurrent_gemma():
    """transformers' RecurrentGemmaRglru: block-diagonal gates, and the first step of a segment."""
    names = {"weight_r": "recurrent_gate_weight", "bias_r": "recurrent_gate_bias", "weight_i": "input_gate_weight"}
    names |= {"bias_i": "input_gate_bias", "decay": "recurrent_param"}

    def run(results, name, x):
        given = {own: results[theirs].detach().requires_grad_() for own, theirs in names.items()}
        params = {f"{own}_l0": value.mT if own.startswith("weight") else value.flatten() for own, value in given.items()}
        module = fastseq.RGLRU(rg_lru.WIDTH, rg_lru.WIDTH, heads=rg_lru.HEADS, batch_first=True, dtype=torch.float64)
        resets = results["resets"].bool() if name == "resets" else None
        return torch.func.functional_call(module, params, (x,), {"resets": resets})[0], list(given.values())

    compared(rg_lru, "transformers", run, list(names.values()))


def test_parity_with_flash_linear_attention():
    """FLA's naive HGRN between its layer's projections, lower bound and gated norm."""

    def run(results, name, x):
        given = [results[weight].detach().requires_grad_() for weight in ("f", "i", "g", "norm", "lower_bounds")]
        params = {f"weight_ih_l{layer}": torch.cat(given[:3]) for layer in range(2)}
        params |= {f"weight_norm_l{layer}": given[3] for layer in range(2)} | {"lower_bounds": given[4]}
        module = fastseq.HGRN(hgrn.WIDTH, hgrn.WIDTH, 2, bias=False, batch_first=True, dtype=torch.float64)
        return torch.func.functional_call(module, params, (x,))[0], given

    compared(hgrn, "fla", run, ["f", "i", "g", "norm", "lower_bounds"])


def test_the_lru_is_a_convolution():
    """Its other form: y is x with the kernel Re(C lambda^k gamma B), every power by itself."""
    module, x = made("LRU"), torch.randn(7, 2, X, dtype=torch.float64)
    p = {name.removesuffix("_l0"): value for name, value in module.named_parameters()}
    modulus, angle, gamma = torch.exp(-torch.exp(p["nu_log"])), torch.exp(p["theta_log"]), torch.exp(p["gamma_log"])
    re_b, im_b = p["weight_b"].view(-1, 2, X).unbind(1)
    re_c, im_c = p["weight_c"].view(H, -1, 2).unbind(2)
    found = x @ p["weight_d"].T + p["bias_out"]
    for k in range(7):
        cos, sin = modulus**k * gamma * torch.cos(k * angle), modulus**k * gamma * torch.sin(k * angle)
        re, im = cos[:, None] * re_b - sin[:, None] * im_b, cos[:, None] * im_b + sin[:, None] * re_b
        found[k:] = found[k:] + x[: 7 - k] @ (re_c @ re - im_c @ im).T
    torch.testing.assert_close(module(x)[0], found)


@pytest.mark.parametrize("pooling", ["f", "fo", "ifo"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_zoneout_of_the_qrnn(pooling, backend):
    """By the paper: f is one where it is drawn, else itself; at inference its mean. Both ways, with gradients."""
    p, T, B = 0.3, 6, 4
    torch.manual_seed(0)
    module = fastseq.QRNN(X, H, window=2, pooling=pooling, bidirectional=True, zoneout=p, dtype=torch.float64)
    x = torch.randn(T, B, X, dtype=torch.float64, requires_grad=True)
    for training in (True, False):
        torch.manual_seed(3)
        with fastseq.use_backend(backend):
            found = module.train(training)(x)[0]
        torch.manual_seed(3)
        outputs = []
        for ending, walk in (("", range(T)), ("_reverse", range(T)[::-1])):
            hold = torch.empty(T, B, H, dtype=torch.bool).bernoulli_(p)
            weight, bias = (getattr(module, f"{name}_l0{ending}") for name in ("weight_ih", "bias_ih"))
            before, c, of_steps = torch.zeros(B, X, dtype=x.dtype), torch.zeros(B, H, dtype=x.dtype), {}
            for t in walk:
                logits = x[t] @ weight[:, 0].T + before @ weight[:, 1].T + bias
                gates = dict(zip({"f": "fz", "fo": "fzo", "ifo": "fizo"}[pooling], logits.split(H, -1), strict=True))
                f = torch.sigmoid(gates["f"])
                f = torch.where(hold[t], 1.0, f) if training else p + (1 - p) * f
                c = f * c + (torch.sigmoid(gates["i"]) if "i" in gates else 1 - f) * torch.tanh(gates["z"])
                of_steps[t], before = torch.sigmoid(gates["o"]) * c if "o" in gates else c, x[t]
            outputs.append(torch.stack([of_steps[t] for t in range(T)]))
        compare((found,), (torch.cat(outputs, -1),), [x, *module.parameters()])


def test_zoneout_of_all_and_none():
    x, hx = torch.randn(5, 2, X), torch.randn(1, 2, H)
    kept, plain, none = (fastseq.QRNN(X, H, pooling="f", **more) for more in ({"zoneout": 1.0}, {}, {"zoneout": 0.0}))
    for training in (True, False):
        assert torch.equal(kept.train(training)(x, hx)[0], hx.expand(5, -1, -1))
    none.load_state_dict(plain.state_dict())
    assert torch.equal(none(x, hx)[0], plain(x, hx)[0])
    assert "zoneout=1.0" in repr(kept) and "zoneout" not in repr(none)
    half = fastseq.QRNN(X, H, zoneout=0.5)
    assert not torch.equal(half(x)[0], half(x)[0]) and torch.equal(half.eval()(x)[0], half(x)[0])
    y, state = half.step(x[1], half.step(x[0])[1])
    torch.testing.assert_close(y, half(x[:2])[0][1])
    torch._dynamo.reset()
    compiled = torch.compile(half, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], half(x)[0])
    torch.testing.assert_close(torch.compile(kept.train(), fullgraph=True, backend="aot_eager")(x, hx)[0], kept(x, hx)[0])
    low = fastseq.QRNN(X, H, zoneout=0.1).bfloat16()
    assert low(x.bfloat16())[0].dtype == low.eval()(x.bfloat16())[0].dtype == torch.bfloat16


# errors

module = fastseq.MinGRU(X, H)
untrained = fastseq.MinGRU(X, H).requires_grad_(False)
packed = torch.nn.utils.rnn.pack_sequence([torch.randn(3, X)])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fastseq.MinGRU(0, 1), ValueError, "input_size must be greater than zero, got 0"),
        (lambda: fastseq.MinLSTM(1, 2.0), TypeError, "hidden_size must be an int"),
        (lambda: fastseq.HGRN(1, 2, dropout=2), ValueError, r"dropout should be a number in range \[0, 1\], got 2"),
        (lambda: fastseq.MinGRU(1, 2, proj_size=2), TypeError, "unexpected keyword argument 'proj_size'"),
        (lambda: fastseq.RGLRU(X, H, heads=4), ValueError, "heads must divide hidden_size, got 4 and 6"),
        (lambda: fastseq.RGLRU(X, H, heads=0), ValueError, "heads must be greater than zero, got 0"),
        (lambda: fastseq.QRNN(X, H, window=3), ValueError, "window must be 1 or 2, got 3"),
        (lambda: fastseq.QRNN(X, H, pooling="of"), ValueError, "pooling must be 'f', 'fo' or 'ifo', got 'of'"),
        (lambda: fastseq.QRNN(X, H, zoneout=1.5), ValueError, r"zoneout must be a number in \[0, 1\], got 1.5"),
        (lambda: fastseq.QRNN(X, H, zoneout="0.1"), TypeError, "zoneout must be a number, got '0.1'"),
        (lambda: fastseq.QRNN(X, H, zoneout=(0.1, 0.2)), TypeError, "zoneout must be a number"),
        (lambda: fastseq.MinGRU(X, H, zoneout=0.1), TypeError, "unexpected keyword argument 'zoneout'"),
        (
            lambda: functional.linear_recurrent("min_gru", torch.randn(2, 2, X), None, [], zoneout=0.1),
            ValueError,
            "zoneout is of QRNNs, got 0.1 with min_gru",
        ),
        (lambda: fastseq.LRU(X, H, r_min=0.9, r_max=0.5), ValueError, "0 <= r_min < r_max <= 1 must hold, got 0.9 and 0.5"),
        (lambda: fastseq.LRU(X, H, max_phase=0), ValueError, "max_phase must be greater than zero, got 0"),
        (lambda: fastseq.LRU(X, H, state_size=0), ValueError, "state_size must be greater than zero, got 0"),
        (lambda: module(packed), TypeError, "input must be a Tensor, not PackedSequence"),
        (lambda: module(torch.randn(2, 2, 2, X)), RuntimeError, "Expected input to be 2D or 3D, got 4D"),
        (lambda: module(torch.randn(2, 2, X + 1)), RuntimeError, "input_size. Expected 3, got 4"),
        (
            lambda: module(torch.randn(2, 2, X), torch.zeros(1, 3, H)),
            RuntimeError,
            r"Expected hidden size \(1, 2, 6\), got \[1, 3, 6\]",
        ),
        (lambda: module(torch.randn(2, 2, X), torch.zeros(1, 2, H).half()), RuntimeError, "hx must be torch.float32"),
        (
            lambda: untrained(torch.randn(2, 2, X), torch.zeros(1, 2, H, device="meta")),
            RuntimeError,
            "on cpu, as the input, got .*on meta",
        ),
        (lambda: fastseq.LRU(X, H)(torch.randn(2, 2, X), torch.zeros(1, 2, H)), RuntimeError, "hx must be torch.complex64"),
        (lambda: module(torch.randn(2, 2, X), resets=torch.zeros(2, 2)), RuntimeError, "resets must be bool"),
        (
            lambda: module(torch.randn(2, 2, X), resets=torch.zeros(3, 2).bool()),
            RuntimeError,
            r"resets must be \[T, B\] = \[2, 2\]",
        ),
        (lambda: module(torch.randn(2, X), lengths=torch.tensor([1])), RuntimeError, "the input is unbatched"),
        (lambda: module(torch.randn(2, 2, X), lengths=torch.tensor([1, 3])), RuntimeError, r"lengths must lie in 0..2"),
        (
            lambda: fastseq.QRNN(X, H, window=2)(torch.randn(2, 2, X), torch.zeros(1, 2, H)),
            TypeError,
            r"must be a pair \(states, inputs before\), got Tensor",
        ),
        (
            lambda: fastseq.QRNN(X, H, window=2)(torch.randn(2, 2, X), (torch.zeros(1, 2, H), torch.zeros(1, 2, H))),
            RuntimeError,
            r"Expected inputs before of size \(1, 2, 3\), got \[1, 2, 6\]",
        ),
        *(
            (
                lambda kind=kind, dtype=dtype: kind(X, H)(torch.ones(2, 2, X, dtype=dtype)),
                RuntimeError,
                rf"input dtype \({dtype}\) does not match weight dtype \(torch.float32\)",
            )
            for kind in (fastseq.MinGRU, fastseq.RGLRU, fastseq.LRU)
            for dtype in (torch.float64, torch.int64)
        ),
        (lambda: functional.linear_recurrent("min_gru", torch.randn(2, 2, X), None, []), RuntimeError, "of 1 lanes, got 0"),
        (lambda: functional.linear_recurrent("gru", torch.randn(2, 2, X), None, []), ValueError, "cell must be one of min_gru, "),
        (lambda: fastseq.MinGRU(X, H, bidirectional=True).step(torch.randn(2, X)), RuntimeError, "takes no single steps"),
        (lambda: module.step(torch.randn(2, 2, X)), RuntimeError, "Expected a step's input to be 1D or 2D, got 3D"),
        (lambda: fastseq.MinGRUCell(X, H)(torch.randn(2, X + 1)), RuntimeError, "Expected 3, got 4"),
        (lambda: fastseq.MinGRUCell(X, H)(torch.randn(2, 2, X)), RuntimeError, "Expected input to be 1D or 2D, got 3D"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
