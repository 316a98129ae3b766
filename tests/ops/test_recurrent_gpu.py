"""The recurrent op on a GPU: the battery on both backends, real plans of the CUDA kernels, streams, graphs, devices."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fastseq
from fastseq import backends
from fastseq import functional as F
from fastseq.backends import RecurrentQuery, cuda
from fastseq.benchmarks.gpu.cuda_plans import forms, ranked
from fastseq.functional._recurrent_layers import LANES
from fastseq.ops.types import state_dtype
from fastseq.testing import assert_all_close_to_truth, assert_close_to_truth, pooled_error
from support import recurrent_equations
from support.battery import differentiable
from support.cases import RECURRENT_CASES, RecurrentCase
from support.recurrent import SEED, RecurrentBattery

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")]

BACKENDS = ("triton", "cuda")
PRECISIONS = {"ieee": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STEPS = 70_001  # more than fit 16 bits, where cuDNN's kernels end


class Battery(RecurrentBattery):
    """On a GPU, where products of fp32 may be TF32."""

    def own_error(self, case, dtype):
        own = super().own_error(case, dtype)
        return max(own, half_error(case)) if dtype == torch.float32 and products() == "tf32" else own

    def gradients_jump(self, case, dtype):
        exact = dtype == torch.float32 and products() == "ieee"
        return case.cell == "rnn_relu" and not exact  # test_relu_gradients instead


class Early(Battery):
    """Sequences that end long before the last step."""

    def make(self, case, dtype, device="cpu", seed=0):
        lengths = torch.arange(case.batch, device=device) % 6 + 1
        return super().make(case, dtype, device, seed) | {"lengths": lengths}


def products() -> str:
    return torch.backends.cudnn.rnn.fp32_precision


@functools.cache
def half_error(case: RecurrentCase) -> float:
    """The relative error of the equations in fp16, which keeps as many bits as TF32."""
    battery = RecurrentBattery()
    inputs = battery.make(case, torch.float16, "cuda")
    outputs, grads = battery.truth(inputs)
    found = recurrent_equations.layers(inputs, SEED)
    found_grads = battery.gradients(found, inputs)
    named = [{f"output {i}": out for i, out in enumerate(outs)} for outs in (found, outputs)]
    return pooled_error(named[0] | found_grads, named[1] | grads)


@pytest.fixture
def precise(monkeypatch):
    """Sets torch's flag for fp32 products of recurrent layers; returns the dtype of a precision."""

    def choose(precision: str) -> torch.dtype:
        monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "tf32" if precision == "tf32" else "ieee")
        return PRECISIONS[precision]

    return choose


def needs(backend: str, case: RecurrentCase, dtype: torch.dtype, device: str = "cuda") -> None:
    """Skips what the backend says that it cannot run."""
    lanes = min(LANES, case.heads * (2 if case.bidirectional else 1))
    for backward in (False, True):
        query = RecurrentQuery(
            "recurrent", torch.device(device, torch.cuda.current_device()), dtype, case.cell, case.steps, lanes,
            case.hidden // case.heads, case.projection > 0, case.layout, any(case.zoneout), case.batch, backward,
        )  # fmt: skip
        against = backends.obstacles(backend, query)
        if against:
            pytest.skip("; ".join(against))


def ran(inputs: dict, backend: str, given: list[Tensor] | None = None) -> list[Tensor]:
    """Outputs, and gradients for fixed random gradients of the outputs or for those that are given."""
    battery = Battery()
    with fastseq.use_backend(backend):
        outputs = battery.run(inputs)
        if given is None:
            return [*outputs, *battery.gradients(outputs, inputs).values()]
        return [*outputs, *torch.autograd.grad(outputs, list(differentiable(inputs).values()), given)]


def drawn(inputs: dict) -> list[Tensor]:
    """Random gradients of the outputs."""
    with torch.no_grad():
        return [torch.randn_like(out) for out in Battery().run(inputs)]


def same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# the battery


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", RECURRENT_CASES, ids=str)
def test_forward_and_gradients(case, precision, backend, precise):
    dtype = precise(precision)
    needs(backend, case, dtype)
    Battery().check(case, dtype, backend, "cuda")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ("tf32", "float16", "bfloat16"))
def test_relu_gradients(precision, backend, precise):
    """From the same forward outputs, so that both sides agree on which units were off."""
    dtype = precise(precision)
    needs(backend, RecurrentCase("rnn_relu", hidden=40, batch=9, bidirectional=True), dtype)
    torch.manual_seed(0)
    weight = (torch.randn(2, 40, 40) / 8).to("cuda", dtype)
    x, w_ih = torch.randn(6, 9, 3).to("cuda", dtype), torch.randn(80, 3).to("cuda", dtype)
    reverse = [0, 1]
    with fastseq.use_backend("reference"):
        y, *_ = torch.ops.fastseq.recurrent_forward(
            x, w_ih, None, weight, *[None] * 8, "rnn_relu", reverse, 0.0, 0.0, False, False
        )
    dy, empty = torch.randn_like(y), y.new_empty(0)

    def dgates(backend: str, dtype: torch.dtype) -> Tensor:
        with fastseq.use_backend(backend):
            return torch.ops.fastseq.recurrent_backward(
                dy.to(dtype), None, None, None, weight.to(dtype), *[None] * 8, y.to(dtype), empty.to(state_dtype(dtype)),
                empty.to(dtype), "rnn_relu", reverse, 0.0, 0.0,
            )[0]  # fmt: skip

    truth, plain = dgates("reference", torch.float64), dgates("reference", dtype)
    own = 0.0
    if precision == "tf32":
        own = pooled_error({"dgates": dgates("reference", torch.float16).float()}, {"dgates": truth})
    assert_close_to_truth(dgates(backend, dtype), plain, truth, "dgates", own_error=own)


# sizes


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch", (1, 8, 64, 200))
@pytest.mark.parametrize("hidden", (256, 512, 1024))
@pytest.mark.parametrize("cell", ("lstm", "gru"))
def test_real_plans(cell, hidden, batch, precision, precise):
    dtype = precise(precision)
    case = RecurrentCase(cell, steps=12, batch=batch, input=64, hidden=hidden)
    needs("cuda", case, dtype)
    Battery().check(case, dtype, "cuda", "cuda")


@pytest.mark.parametrize(
    ("cell", "precision", "hidden"),
    [("lstm", "bfloat16", 512), ("lstm", "float16", 640), ("gru", "tf32", 256), ("rnn_tanh", "ieee", 200), ("gru", "ieee", 24)],
)
def test_every_form(cell, precision, hidden, precise):
    """Not only the plans that the model finds best."""
    dtype = precise(precision)
    case = RecurrentCase(cell, steps=4, batch=19, input=8, hidden=hidden, layout="lengths")
    needs("cuda", case, dtype)
    device = cuda.recurrent.GPU.device(torch.device("cuda"))
    name = precision.replace("bfloat", "bf").replace("float", "fp")
    ranks = [list(forms(cell, name, backward, 19, 1, hidden, device).values()) for backward in (False, True)]
    for forward, backward in itertools.zip_longest(*ranks, fillvalue=0):
        with ranked(forward, backward):
            Battery().check(case, dtype, "cuda", "cuda")


@pytest.mark.parametrize(
    "case",
    [
        RecurrentCase("lstm", steps=3, batch=1024, input=32, hidden=1024),  # teams that meet through flags, launch after launch
        RecurrentCase("lstm", steps=3, batch=4096, input=32, hidden=32),  # teams of one CTA, more of them than run at a time
    ],
    ids=str,
)
def test_several_waves(case, precise):
    dtype = precise("ieee")
    needs("cuda", case, dtype)
    battery = Battery()
    inputs = battery.make(case, dtype, "cuda")
    with fastseq.use_backend("cuda"):
        plans = fastseq.explain(battery.run, inputs).notes
    teams, ctas = (int(word) for word in plans[0][0].replace("teams of ", "").split()[:2])
    chip = torch.cuda.get_device_properties("cuda")
    if (chip.major, chip.minor) != (9, 0) and teams * ctas <= chip.multi_processor_count:
        pytest.skip(f"one wave on this device: {plans[0][0]}")  # on a Hopper there must be more
    assert teams * ctas > chip.multi_processor_count, plans
    battery.check(case, dtype, "cuda", "cuda")


@pytest.mark.parametrize("form", ("whole", "streamed", "cuda"))
def test_beyond_65535_steps(form, monkeypatch):
    """As one call, and as two with the state carried over."""
    backend = "cuda" if form == "cuda" else "triton"
    if backend == "triton":
        monkeypatch.setenv("FASTSEQ_TRITON_RECURRENT", form)
    needs(backend, RecurrentCase("gru", steps=STEPS, batch=2, input=2, hidden=3), torch.float32)
    torch.manual_seed(0)
    params = [p.detach().cuda() for p in nn.GRU(2, 3).parameters()]
    x = torch.randn(STEPS, 2, 2, device="cuda", requires_grad=True)
    cut = 40_000
    with fastseq.use_backend(backend):
        ((note,),) = fastseq.explain(F.gru, x[:9], None, params).notes
        assert ("teams" if backend == "cuda" else form) in note
        y, h_n = F.gru(x, None, params)
        first, state = F.gru(x[:cut], None, params)
        second, final = F.gru(x[cut:], state, params)
        (grad,) = torch.autograd.grad(y[-1].sum() + y[5].sum(), x)
        (expected,) = torch.autograd.grad(second[-1].sum() + first[5].sum(), x)
    assert y.shape[0] == STEPS
    torch.testing.assert_close(y, torch.cat((first, second)))
    torch.testing.assert_close(h_n, final)
    torch.testing.assert_close(grad, expected)
    assert grad[:6].any() and grad[-1].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", ("lstm", "gru", "rnn_tanh"))
def test_sequences_end_early(cell, backend, precise):
    dtype = precise("ieee")
    case = RecurrentCase(cell, steps=300, batch=37, input=20, hidden=130, bidirectional=True, layout="lengths")
    needs(backend, case, dtype)
    battery = Early()
    battery.check(case, dtype, backend, "cuda")
    inputs = battery.make(case, dtype, "cuda")
    with fastseq.use_backend(backend), torch.no_grad():
        expected = battery.run(inputs)
        inputs["x"][6:] = torch.nan
        assert same(battery.run(inputs), expected)
    assert not expected[0][6:].any()


@pytest.mark.parametrize("precision", ("ieee", "bfloat16"))
@pytest.mark.parametrize("form", ("whole", "streamed", "stepwise", "cuda"))
def test_resets(form, precision, precise, monkeypatch):
    """A reset every ten steps or so, from learned states, in both directions; what is no number ends with its segment."""
    dtype, backend = precise(precision), "cuda" if form == "cuda" else "triton"
    if backend == "triton":
        monkeypatch.setenv("FASTSEQ_TRITON_RECURRENT", form)
    needs(backend, RecurrentCase("lstm", steps=60, batch=37, input=20, hidden=60, bidirectional=True), dtype)
    torch.manual_seed(0)
    params = [p.detach() for p in nn.LSTM(20, 60, bidirectional=True).parameters()]
    x, states = torch.randn(60, 37, 20), [torch.randn(2, 1, 60) for _ in range(2)]
    resets = torch.rand(60, 37, device="cuda") < 0.1
    resets[[20, 30], :2] = True

    def run(backend: str, dtype: torch.dtype, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
        given = [t.to("cuda", dtype).requires_grad_() for t in (x, *states, *params)]
        with fastseq.use_backend(backend):
            outputs = F.lstm(given[0], None, given[3:], bidirectional=True, resets=resets, reset_to=tuple(given[1:3]))
            grads = torch.autograd.grad([out.float().sin().sum() for out in outputs], given)
        return list(outputs), {f"{i}": value for i, value in enumerate((*outputs, *grads))}

    x = x.to(dtype)
    outputs, found = run(backend, dtype, x)
    assert_all_close_to_truth(found, run("reference", dtype, x)[1], run("reference", torch.float64, x)[1])
    x[25, :2] = torch.nan
    y, wanted = run(backend, dtype, x)[0][0], outputs[0]
    assert same([y[:20], y[30:], y[:, 2:]], [wanted[:20], wanted[30:], wanted[:, 2:]]) and y[25, :2].isnan().all()


# the machine around

MIDDLING = RecurrentCase("lstm", steps=20, batch=33, input=24, hidden=130, bidirectional=True)
CALLS = [(backend, precision) for backend in BACKENDS for precision in ("ieee", "bfloat16")]


@pytest.fixture(params=CALLS, ids="-".join)
def call(request, precise):
    """A backend, and inputs of a call that it can run."""
    backend, precision = request.param
    dtype = precise(precision)
    needs(backend, MIDDLING, dtype)
    return backend, Battery().make(MIDDLING, dtype, "cuda")


def test_reruns_are_bit_equal(call):
    backend, inputs = call
    first = ran(inputs, backend)
    for _ in range(5):
        assert same(ran(inputs, backend), first)


def test_another_stream(call):
    """Inputs arrive late on it: kernels of any other stream would not see them."""
    backend, inputs = call
    expected = ran(inputs, backend)
    late = dict(inputs, x=torch.zeros_like(inputs["x"]).requires_grad_())
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        with torch.no_grad():
            late["x"].copy_(inputs["x"])
        found = ran(late, backend)
    stream.synchronize()
    assert same(found, expected)


@pytest.mark.timeout(120)
def test_two_streams_at_once(call):
    """Kernels whose CTAs wait for each other neither mix nor block one another."""
    backend, inputs = call
    both = inputs, Battery().make(replace(MIDDLING, batch=7), inputs["x"].dtype, "cuda", seed=3)
    given = [drawn(own) for own in both]  # nothing in between waits for the device
    expected = [ran(own, backend, gradients) for own, gradients in zip(both, given, strict=True)]
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    found: list[list[list[Tensor]]] = [[], []]
    for _ in range(20):
        for stream, own, gradients, results in zip(streams, both, given, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(ran(own, backend, gradients))
    torch.cuda.synchronize()
    for results, wanted in zip(found, expected, strict=True):
        assert all(same(result, wanted) for result in results)


def test_a_graph_is_captured_and_replayed_with_other_inputs(call):
    backend, inputs = call
    given = drawn(inputs)
    others = [Battery().make(MIDDLING, inputs["x"].dtype, "cuda", seed=seed) for seed in (5, 6)]
    expected = [ran(other, backend, given) for other in others]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ran(inputs, backend, given)  # allocates and compiles what a capture may not
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ran(inputs, backend, given)
    for other, wanted in zip(others, expected, strict=True):
        with torch.no_grad():
            for name, value in differentiable(inputs).items():
                value.copy_(other[name])
        graph.replay()
        torch.cuda.synchronize()
        assert same(found, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_another_device_than_the_current_one(call):
    backend, inputs = call
    expected = ran(inputs, backend)
    there = {name: value.detach().to("cuda:1") if isinstance(value, Tensor) else value for name, value in inputs.items()}
    for name in differentiable(inputs):
        there[name].requires_grad_()
    found = ran(there, backend)
    assert torch.cuda.current_device() == 0
    for actual, wanted in zip(found, expected, strict=True):
        assert actual.device == torch.device("cuda:1")
        torch.testing.assert_close(actual.cpu(), wanted.cpu())
