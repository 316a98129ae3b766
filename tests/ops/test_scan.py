"""The scan on every backend: results, gradients, resets, what is cut off, long sequences, transforms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fastseq
from fastseq import backends
from fastseq.functional import scan
from fastseq.ops.scan import scan as scan_op
from fastseq.ops.types import SCAN_CELLS, ScanSpec
from fastseq.testing import assert_close_to_truth
from support.battery import OpBattery
from support.scan import LAYER_CELLS, SCAN_CASES, SMALL_SCAN_CASES, ScanCase, make_scan, run_scan, scan_by_torch

ABLE = ["cpu", "reference", *(["triton"] if "cpu" in backends.BACKENDS["triton"].devices else [])]
ON_EACH = pytest.mark.parametrize("backend", ABLE)


class TestScan(OpBattery):
    OP = "scan"
    CASES = SCAN_CASES
    SMALL_CASES = SMALL_SCAN_CASES
    COMPILED_CASES = (
        ScanCase(11, 7, 5, resets=True),
        ScanCase(11, 7, 5, a="c", initial=False, reverse=True, batch_first=True),
        ScanCase(11, 7, 5, layout="packed", cell="log"),
        ScanCase(11, 4, 5, layout="lengths"),
    )
    DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

    def make(self, case, dtype, device="cpu", seed=0):
        return make_scan(case, dtype, device, seed)

    def resized(self, case):
        return replace(case, steps=13, batch=3 if case.layout == "lengths" else 8, channels=6)

    def run(self, inputs):
        return run_scan(inputs)

    def run_torch(self, inputs):
        return scan_by_torch(inputs)

    def gradients(self, outputs, inputs, seed=1):
        grads = super().gradients([out for out in outputs if out.requires_grad], inputs, seed)
        return {name: torch.zeros_like(value) if name not in grads else grads[name] for name, value in wanted(inputs).items()}

    def supports(self, case, dtype, backend):
        return (case.kind != "complex" or dtype in (torch.float64, torch.float32)) and super().supports(case, dtype, backend)

    def against(self, inputs, backend, backward):
        b, a = inputs["b"], inputs["a"]
        dtype = torch.view_as_complex(b.detach()).dtype if inputs["kind"] == "complex" else b.dtype
        query = backends.ScanQuery(
            op="scan",
            call="backward" if backward else "forward",
            device=b.device,
            dtype=dtype,
            kind=inputs["kind"],
            steps=9,
            batch=3,
            channels=a.shape[-1],
            layout="padded",
            uses=(),
        )
        return backends.obstacles(backend, query)

    def op_samples(self, case, dtype):
        if case.batch_first or case.layout == "packed":
            case = replace(case, batch_first=False, layout="padded")
        given = make_scan(case, dtype)
        b, a, initial = (given[name] for name in ("b", "a", "initial"))
        if case.kind == "complex":
            b, a, initial = (torch.view_as_complex(t.detach()) for t in (b, a, initial))
        lengths = None if given["lengths"] is None else given["lengths"].int()
        spec = ScanSpec(given["resets"], lengths, None, case.cell, case.reverse)
        forward, backward = torch.ops.fastseq.scan.default, torch.ops.fastseq.scan_backward.default
        tensors = (b, a, given["gate"], given["vector"], initial)
        b, a, gate, vector, initial = (t if t is None else t.detach().nan_to_num() for t in tensors)  # opcheck's comparisons
        h, final = forward(b, a, gate, vector, initial, *spec)
        saved = (b if SCAN_CELLS[case.cell].reads_b else None, a, gate, vector, h, initial)
        return [
            (forward, (b.clone().requires_grad_(), a, gate, vector, initial, *spec)),
            (backward, (torch.ones_like(h), final, *saved, *spec, [True] * 4)),
            (backward, (None, final, *saved, *spec, [True, False, False, False])),
        ]


def wanted(inputs):
    return {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.requires_grad}


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@ON_EACH
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_a_reset_cuts_off_does_not_leak(backend, reverse, poison):
    """Neither into states, nor, backwards, into gradients; not even where the poison stands beside the reset."""
    steps, cut = 40, 16
    b, a = values(steps, 2, 5), values(steps, 2, 5, seed=1).sigmoid()
    resets = torch.zeros(steps, 2, dtype=torch.bool)
    resets[cut] = True
    kept, lost = (slice(0, cut), slice(cut, steps)) if reverse else (slice(cut, steps), slice(0, cut))
    clean, _ = scan(b, a, resets=resets, reverse=reverse)
    b[lost] = poison
    a[cut - 1 if reverse else cut] = poison  # nothing is multiplied by it
    b.requires_grad_(), a.requires_grad_()
    with backends.use_backend(backend):
        h, final = scan(b, a, initial=torch.full((2, 5), poison), resets=resets, reverse=reverse)
        torch.testing.assert_close(h[kept], clean[kept])
        torch.testing.assert_close(final, clean[0 if reverse else -1])
        grads = torch.autograd.grad(h[kept].sum() + final.sum(), (b, a))
    assert all(grad[kept].isfinite().all() for grad in grads)
    assert grads[0][lost].count_nonzero() == 0
    assert grads[0][kept].count_nonzero() == grads[0][kept].numel()


@ON_EACH
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("at", [(0,), (39,), (1, 2, 3), (16, 17, 32), (15, 31)], ids=str)
def test_a_row_with_resets_is_its_segments_one_by_one(backend, reverse, at):
    """In every row at other steps, for each row by itself."""
    steps, batch = 40, 3
    b, a, initial = values(steps, batch, 6), values(steps, batch, 6, seed=1), values(batch, 6, seed=2)
    resets = torch.zeros(steps, batch, dtype=torch.bool)
    for row in range(batch):
        resets[[max(0, t - row) for t in at], row] = True
    with backends.use_backend(backend):
        h, final = scan(b, a, initial=initial, resets=resets, reverse=reverse)
        for row in range(batch):
            cuts = sorted({0, steps, *(max(0, t - row) for t in at)})
            for begin, end in zip(cuts, cuts[1:], strict=False):
                edge = end == steps if reverse else begin == 0 and not resets[0, row]
                own = initial[row] if edge else None
                part, last = scan(b[begin:end, row], a[begin:end, row], initial=own, reverse=reverse)
                torch.testing.assert_close(h[begin:end, row], part)
                if begin == 0 if reverse else end == steps:
                    torch.testing.assert_close(final[row], last)


@ON_EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_sequence_in_two_calls_is_the_sequence(backend, dtype):
    b, a = values(30, 2, 7).to(dtype), values(30, 2, 7, seed=1)
    with backends.use_backend(backend):
        whole, last = scan(b, a)
        first, state = scan(b[:13], a[:13])
        second, final = scan(b[13:], a[13:], initial=state)
    assert state.dtype == torch.float32
    torch.testing.assert_close(torch.cat((first, second)), whole)
    torch.testing.assert_close(final, last)


@ON_EACH
def test_logarithms_of_zero(backend):
    """-inf is a coefficient of 0, and its gradient is 0."""
    b, log_a = values(6, 2, 5).requires_grad_(), -values(6, 2, 5, seed=1).abs()
    log_a[3, 1] = -torch.inf
    log_a.requires_grad_()
    with backends.use_backend(backend):
        h, _ = scan(b, log_a=log_a)
        torch.testing.assert_close(h, scan(b, log_a.exp())[0])
        grads = torch.autograd.grad(h.square().sum(), (b, log_a))
    assert all(grad.isfinite().all() for grad in grads) and grads[1][3, 1].count_nonzero() == 0


@ON_EACH
@pytest.mark.parametrize("cell", LAYER_CELLS)
def test_gates_at_their_ends(backend, cell):
    """Logits of gates up to 300 either way, each with each: numbers, and those of the equations."""
    ends = torch.tensor([-300.0, -90.0, -20.0, -1.0, 0.0, 1.0, 20.0, 90.0, 300.0])
    a, gate = (grid.flatten().expand(4, 1, 81).clone() for grid in torch.meshgrid(ends, ends, indexing="ij"))
    found = {}
    for dtype in (torch.float32, torch.float64):
        inputs = {
            "b": values(4, 1, 81),
            "a": a,
            "gate": gate,
            "vector": values(81, seed=1).sigmoid(),
            "initial": values(1, 81, seed=2),
        }
        used = ("b", "a", *(name for name in ("gate", "vector") if getattr(SCAN_CELLS[cell], name)), "initial")
        inputs = {name: inputs[name].to(dtype).requires_grad_() if name in used else None for name in inputs}
        rest = {"resets": None, "lengths": None, "cu_seqlens": None, "kind": "real", "cell": cell, "reverse": False}
        with backends.use_backend(backend):
            own, by_torch = run_scan(inputs | rest), scan_by_torch(inputs | rest | {"batch_first": False})
            tensors = [inputs[name] for name in used]
            grads = torch.autograd.grad([out.square().sum() for out in own], tensors)
        of_torch = torch.autograd.grad([out.square().sum() for out in by_torch], tensors)
        found[dtype] = [*own, *grads], [*by_torch, *of_torch]
    for one, exact in zip(found[torch.float32][0], found[torch.float64][1], strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=1e-5, atol=1e-6)


@ON_EACH
@pytest.mark.parametrize("cell", ["qrnn", "qrnn_ifo"])
def test_an_infinite_forget_gate_keeps_the_state(backend, cell):
    """As zoneout asks for it: f is one, its gradient none."""
    a, b, gate, initial = values(4, 1, 9).float(), values(4, 1, 9, seed=1).float(), None, values(1, 9, seed=2).float()
    a[1:3, :, ::2] = torch.inf
    if cell == "qrnn_ifo":
        gate = values(4, 1, 9, seed=3).float()
        gate[1:3, :, ::2] = -torch.inf
    inputs = [t if t is None else t.requires_grad_() for t in (b, a, gate, None, initial)]
    with backends.use_backend(backend):
        h, _ = scan_op(*inputs, ScanSpec(None, None, None, cell, False))
        grads = torch.autograd.grad(h.square().sum(), [t for t in inputs if t is not None])
    torch.testing.assert_close(h[2, :, ::2], h[0, :, ::2], rtol=0, atol=1e-30)
    assert all(grad.isfinite().all() for grad in grads)
    for grad in grads[:-1]:
        torch.testing.assert_close(grad[1:3, :, ::2], torch.zeros(2, 1, 5), rtol=0, atol=1e-30)
        assert (grad[:, :, 1::2] != 0).all()


@ON_EACH
def test_roots_do_not_cancel(backend):
    """sqrt(1 - a^2) and its slope where a is 1 but for 1e-9 .. 1e-3, to the last digits."""
    rate = torch.logspace(-9, -3, 7).requires_grad_()
    a, gate, b = torch.zeros(1, 1, 7, requires_grad=True), torch.zeros(1, 1, 7), torch.ones(1, 1, 7)
    with backends.use_backend(backend):
        h, _ = scan_op(b, a, gate, rate, torch.zeros(1, 7), ScanSpec(None, None, None, "rg_lru", False))
        of_a, of_rate = torch.autograd.grad(h.sum(), (a, rate))
    log = -rate.detach().double() / 2
    root = torch.sqrt(-torch.expm1(2 * log))
    slope = -torch.exp(2 * log) / root / 2  # of h by log a
    torch.testing.assert_close(h[0, 0].double(), root / 2, rtol=1e-6, atol=0)
    torch.testing.assert_close(of_rate.double(), -slope / 2, rtol=1e-6, atol=0)
    torch.testing.assert_close(of_a[0, 0].double(), slope * log / 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("backend", "steps"),
    [
        pytest.param(backend, steps, marks=[pytest.mark.slow] if backend == "triton" and steps > 65 else [])
        for backend in ABLE
        for steps in (2, 65, 129, 513)
    ],
)
def test_growing_states(backend, steps):
    """Coefficients of 1, 0 and beyond 1 are as good as others."""
    b, a = values(steps, 1, 4).double(), torch.tensor([1.0, 0.0, 1.01, -1.01]).double()
    with backends.use_backend("reference"):
        expected, _ = scan(b, a)
    with backends.use_backend(backend):
        h, _ = scan(b, a.expand(steps, 1, 4))
    torch.testing.assert_close(h, expected)
    torch.testing.assert_close(h[:, 0, 0], b[:, 0, 0].cumsum(0))


@pytest.mark.parametrize("steps", [4097, 65_537])
def test_long_sequences(steps):
    """fp32 errs by no more than its rounding, whatever the length."""
    b, a = values(steps, 1, 3), 1 - torch.tensor([1e-3, 0.1, 0.9])
    h, _ = scan(b, a)
    by_torch = []
    for dtype in (torch.float32, torch.float64):
        states = [torch.zeros(3, dtype=dtype)]
        for row in b.to(dtype)[:, 0].unbind():
            states.append(a.to(dtype) * states[-1] + row)
        by_torch.append(torch.stack(states[1:]))
    assert_close_to_truth(h[:, 0], *by_torch)


def test_transforms():
    b, a = values(5, 2, 3).double(), values(5, 2, 3, seed=1).double()
    each = torch.stack((b, 2 * b))
    stacked = torch.func.vmap(lambda one: scan(one, a)[0])(each)
    torch.testing.assert_close(stacked, torch.stack([scan(one, a)[0] for one in each]))
    grads = torch.func.vmap(torch.func.grad(lambda one: scan(one, a)[0].square().sum()))(each)
    torch.testing.assert_close(grads[1], 2 * grads[0])
    value, tangent = torch.func.jvp(lambda one: scan(one, a)[0], (b,), (b,))
    torch.testing.assert_close(tangent, value)  # linear in b
    grad = torch.func.grad(lambda one: scan(b, one)[1].square().sum())(a)
    a.requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(scan(b, a)[1].square().sum(), a)[0])


@pytest.mark.parametrize("of_a", ["every", "call", "channels", "rows"])
@pytest.mark.parametrize("more", [(), ("resets", "lengths", "initial"), ("cu_seqlens",)], ids=["plain", "rows", "packed"])
def test_vmap_is_one_call(of_a, more):
    """Its dimension, wherever it stands, joins the rows; gradients go through. Packed sequences: one call each."""
    packed = more == ("cu_seqlens",)
    shape = (6, 3) if packed else (6, 2, 3)
    b = values(*shape, 4).double().requires_grad_()  # the mapped dimension is the last
    a = {"every": (4, *shape), "call": shape, "channels": (4, 3), "rows": (4, *shape[:-1], 1)}[of_a]
    a = values(*a, seed=1).double().sigmoid().requires_grad_()
    given = {
        "resets": (torch.rand(4, 6, 2) < 0.3, 0),
        "lengths": (torch.tensor([6, 3]), None),
        "initial": (values(4, 2, 3, seed=2).double(), 0),
        "cu_seqlens": (torch.tensor([0, 2, 6]), None),
    }
    given = {name: value for name, value in given.items() if name in more}
    dims = -1, None if of_a == "call" else 0, {name: dim for name, (_, dim) in given.items()}

    def run(b, a, options):
        return scan(b, a, **options)

    options = {name: value for name, (value, _) in given.items()}
    found = torch.func.vmap(run, dims, (0, 0))(b, a, options)
    every = [
        run(b[..., i], a if of_a == "call" else a[i], {n: v if d is None else v[i] for n, (v, d) in given.items()})
        for i in range(4)
    ]
    expected = tuple(torch.stack(parts) for parts in zip(*every, strict=True))
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(results[0].square().sum() + results[1].sum(), (b, a)) for results in (found, expected)]
    torch.testing.assert_close(*grads)
    explanation = fastseq.explain(lambda: torch.func.vmap(run, dims, (0, 0))(b.detach(), a.detach(), options))
    assert explanation.backends == ["cpu"]


def test_explain_names_the_call():
    explanation = fastseq.explain(scan, values(5, 2, 3), values(3), resets=torch.zeros(5, 2, dtype=torch.bool))
    assert explanation.backends == ["cpu"]
    assert "scan forward, real, float32 on cpu, padded, T=5 B=2 C=3, resets" in str(explanation)
