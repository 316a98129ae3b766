"""torch.compile without graph breaks, with sizes that change, and torch.export."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq
from fastseq.modules import keep_type
from support.modules import OPTIONS, B, H, I, T, both, leaves, random

NAMES = ["RNN", "LSTM", "GRU"]
SIZES = [(T, B), (T + 3, B + 1), (T - 1, B + 2)]
every_option = pytest.mark.parametrize(("name", "options"), OPTIONS)
# Each takes seconds to compile: no lengths for the plain modules, lengths for those with every option.
TRAINING = [(name, options, options.get("bidirectional", False)) for name, options in OPTIONS]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(module, call, *arguments, **keywords):
    """Results and gradients of one training step."""
    module.zero_grad()
    arguments = [a.clone().requires_grad_() if a.is_floating_point() else a for a in arguments]
    results = leaves(call(*arguments, **keywords))
    sum(r.square().sum() for r in results).backward()
    return [
        *results,
        *(a.grad for a in arguments if a.grad is not None),
        *(p.grad for p in module.parameters()),
    ]


def assert_close(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def compiled(module, backend="aot_eager", dynamic=True):
    counter = CompileCounterWithBackend(backend)
    return torch.compile(module, fullgraph=True, dynamic=dynamic, backend=counter), counter


@pytest.mark.parametrize(("name", "options", "with_lengths"), TRAINING)
def test_training_with_changing_sizes(name, options, with_lengths):
    _, ours = both(name, **options)
    call, counter = compiled(ours)
    frames = None
    for time, batch in SIZES:
        input = random(time, batch, I)
        keywords = {"lengths": torch.randint(0, time + 1, (batch,))} if with_lengths else {}
        assert_close(step(ours, call, input, **keywords), step(ours, ours, input, **keywords))
        frames = frames or counter.frame_count
    assert counter.frame_count == frames, "compiled again for another size"


@pytest.mark.parametrize("name", NAMES)
def test_initial_states_batch_first_and_recompute(name):
    _, ours = both(name, batch_first=True)
    ours.recompute = True
    call, counter = compiled(ours)
    frames = None
    for time, batch in SIZES:
        input = random(batch, time, I)
        states = [random(1, batch, H) for _ in range(2 if name == "LSTM" else 1)]

        def with_states(function, x, *hx):
            return function(x, hx if name == "LSTM" else hx[0])

        actual = step(ours, lambda *a, f=with_states: f(call, *a), input, *states)
        assert_close(actual, step(ours, lambda *a, f=with_states: f(ours, *a), input, *states))
        frames = frames or counter.frame_count
    assert counter.frame_count == frames, "compiled again for another size"


@every_option
def test_inference_with_changing_sizes(name, options):
    _, ours = both(name, **options)
    call, counter = compiled(ours.eval())
    frames = None
    with torch.no_grad():
        for time, batch in SIZES:
            input = random(time, batch, I)
            assert_close(leaves(call(input)), leaves(ours(input)))
            frames = frames or counter.frame_count
    assert counter.frame_count == frames, "compiled again for another size"


def test_cells_of_every_step():
    _, ours = both("LSTM", num_layers=2, bidirectional=True)
    call, _ = compiled(ours)
    input = random(T, B, I)
    assert_close(step(ours, call, input, return_cells=True), step(ours, ours, input, return_cells=True))


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_packed_sequences_go_in_and_out(name, enforce_sorted):
    _, ours = both(name)
    lengths = torch.tensor([6, 4, 1] if enforce_sorted else [4, 1, 6])
    packed = pack_padded_sequence(random(T, B, I), lengths, enforce_sorted=enforce_sorted)
    call, _ = compiled(ours, dynamic=False)
    with torch.no_grad():
        expected, actual = ours(packed), call(packed)
    assert_close(leaves(actual), leaves(expected))
    assert torch.equal(actual[0].batch_sizes, expected[0].batch_sizes)


@pytest.mark.parametrize("name", NAMES)
def test_unbatched_dropout_and_autocast(name):
    _, ours = both(name, num_layers=2, dropout=0.5)
    call, _ = compiled(ours, dynamic=False)
    input = random(T, I)
    torch.manual_seed(0)
    expected = leaves(ours(input))
    torch.manual_seed(0)
    assert_close(leaves(call(input)), expected)
    ours.eval()
    with torch.autocast("cpu", torch.bfloat16):
        actual = leaves(call(input))
        for a, e in zip(actual, leaves(ours(input)), strict=True):
            assert a.dtype == (torch.float32 if name == "GRU" else torch.bfloat16)
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells(name):
    _, ours = both(name)
    call, counter = compiled(ours)
    for batch in (2, 3, 4):
        input = random(batch, I)
        assert_close(step(ours, call, input), step(ours, ours, input))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", NAMES)
def test_swapped_and_parametrized_modules(name):
    theirs, ours = both(name)
    theirs.__class__ = getattr(fastseq, name)
    normed = nn.utils.parametrizations.weight_norm(ours, "weight_hh_l0")
    input = random(T, B, I)
    for module in (theirs, normed):
        call, _ = compiled(module, dynamic=False)
        assert_close(step(module, call, input), step(module, module, input))


@pytest.mark.parametrize("name", NAMES)
def test_keep_type_runs_but_breaks_the_graph(name):
    module = getattr(keep_type, name)(I, H)
    input = random(T, B, I)
    assert_close(leaves(torch.compile(module, backend="aot_eager")(input)), leaves(module(input)))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(module, backend="aot_eager", fullgraph=True)(input)


def test_inductor_trains_a_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.before = nn.Linear(I, I)
            self.layer = fastseq.LSTM(I, H)
            self.after = nn.Linear(H, 3)

        def forward(self, input, lengths):
            return self.after(self.layer(self.before(input), lengths=lengths)[0].relu())

    model = Model()
    call, counter = compiled(model, "inductor")
    frames = None
    for time, batch in SIZES[:2]:
        input, lengths = random(time, batch, I), torch.randint(1, time + 1, (batch,))
        assert_close(step(model, call, input, lengths), step(model, model, input, lengths))
        frames = frames or counter.frame_count
    assert counter.frame_count == frames, "compiled again for another size"


@every_option
def test_export_with_dynamic_batch_and_time(name, options):
    _, ours = both(name, **options)
    time, batch = torch.export.Dim("time"), torch.export.Dim("batch")
    program = torch.export.export(
        ours.eval(),
        (random(T, B, I),),
        {"lengths": torch.tensor([6, 4, 1])},
        dynamic_shapes={"input": {0: time, 1: batch}, "lengths": {0: batch}},
    )
    input, lengths = random(T + 5, B + 2, I), torch.tensor([11, 4, 1, 0, 7])
    assert_close(leaves(program.module()(input, lengths=lengths)), leaves(ours(input, lengths=lengths)))
    plain = torch.export.export(ours, (random(T, B, I),), dynamic_shapes=({0: time, 1: batch},))
    assert_close(leaves(plain.module()(input)), leaves(ours(input)))
    assert set(program.state_dict) == set(ours.state_dict())
