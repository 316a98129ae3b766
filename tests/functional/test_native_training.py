"""With gradients, a layer is one call of the library forward and, of few rows, one backward: with the results of the registered
ops, and only where nobody looks on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import fastseq
from fastseq.backends import library, watching
from fastseq.choice import lengths as of_torch
from fastseq.ops import recurrent as ops
from fastseq.ops.types import state_dtype
from fastseq.reference.cells import steps as steps_of
from fastseq.testing import assert_close_to_truth, relative_error

pytestmark = pytest.mark.skipif(library.reason() is not None, reason="needs the library")

FORWARD, BACKWARD, OF_THE_OP = (f"fastseq_native::recurrent_{name}" for name in ("layer", "layer_backward", "backward"))
STEP = ("fastseq_native::recurrent_step_trained", "fastseq_native::recurrent_step_backward")  # of one after a state


@pytest.fixture(autouse=True)
def ours():
    """Whatever the table says of so short calls."""
    library.load()
    with of_torch.everywhere(of_torch.OURS):
        yield


def calls_of(run: Callable[[], Any]) -> list[str]:
    """The library's ops that ran, which are for training alone."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        run()
    return [event.name for event in recorded.events() if event.name in (FORWARD, BACKWARD, OF_THE_OP, *STEP)]


CLASSES: dict[str, Callable[..., Any]] = {
    "LSTM": fastseq.LSTM,
    "GRU": fastseq.GRU,
    "RNN": fastseq.RNN,
    "relu": lambda *args, **kwargs: fastseq.RNN(*args, nonlinearity="relu", **kwargs),
    "projected": lambda *args, **kwargs: fastseq.LSTM(*args, proj_size=5, **kwargs),
    "CoupledLSTM": fastseq.CoupledLSTM,
    "PeepholeLSTM": fastseq.PeepholeLSTM,
}
WHOLE = ("LSTM", "GRU", "RNN", "relu", "projected", "CoupledLSTM")  # whose gradients are one native op
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((1, 1, 12, 20), (1, 9, 33, 70), (5, 2, 7, 17), (40, 3, 16, 24))  # T, B, I, H


class Call:
    """A module with its input and states, leaves that want gradients, and weights of the outputs in the loss."""

    def __init__(self, module: Any, steps: int, batch: int, states: bool = True, layout: str = "padded") -> None:
        dtype, self.module = next(module.parameters()).dtype, module
        self.layout = layout
        # in no order, so that packing sorts them; a sequence without a step, where one may be
        self.lengths = torch.tensor([(steps * (3 * b + 1) // (2 * batch)) % (steps + 1) for b in range(batch)])
        self.lengths[batch // 2] = steps
        if layout == "packed":
            self.lengths.clamp_(min=1)
        shape = (batch, steps) if module.batch_first else (steps, batch)
        self.x = torch.randn(*shape, module.input_size, dtype=dtype)
        lanes = module.num_layers * (2 if module.bidirectional else 1)
        widths = [module.proj_size or module.hidden_size]
        widths += [module.hidden_size] * hasattr(module, "get_expected_cell_size")
        self.states = [torch.randn(lanes, batch, width, dtype=dtype) for width in widths] if states else []
        for leaf in self.leaves():
            leaf.requires_grad_()
        outputs = self.outputs()
        self.weights = [torch.randn_like(out) for out in outputs]

    def leaves(self) -> list[Tensor]:
        return [self.x, *self.states, *self.module.parameters()]

    def outputs(self) -> list[Tensor]:
        hx = None if not self.states else tuple(self.states) if len(self.states) == 2 else self.states[0]
        if self.layout == "packed":
            options = {"enforce_sorted": False, "batch_first": self.module.batch_first}
            packed, finals = self.module(pack_padded_sequence(self.x, self.lengths, **options), hx)
            y = packed.data
        elif self.layout == "lengths":
            y, finals = self.module(self.x, hx, lengths=self.lengths)
        else:
            y, finals = self.module(self.x, hx)
        return [y, *(finals if isinstance(finals, tuple) else (finals,))]

    def grads(self, outputs: list[Tensor], leaves: list[Tensor] | None = None, **options: Any) -> list[Tensor]:
        return list(torch.autograd.grad(outputs, leaves or self.leaves(), self.weights, **options))

    def run(self) -> list[Tensor]:
        outputs = self.outputs()
        return [*outputs, *self.grads(outputs)]

    def by_the_ops(self) -> list[Tensor]:
        with watching(lambda query, chosen: None):  # whoever looks on sees the ops
            return self.run()

    def to(self, dtype: torch.dtype) -> Call:
        twin = copy.copy(self)
        twin.module = copy.deepcopy(self.module).to(dtype)
        for name in ("states", "weights"):
            setattr(twin, name, [t.detach().to(dtype).requires_grad_(name == "states") for t in getattr(self, name)])
        twin.x = self.x.detach().to(dtype).requires_grad_()
        return twin


def error_of_mm(dtype: torch.dtype, rows: int, depth: int, columns: int) -> float:
    """What torch.mm loses where it is the product of few rows, which the ops may form more exactly than that."""
    with torch.random.fork_rng():
        draws = [(torch.randn(rows, depth, dtype=dtype), torch.randn(depth, columns, dtype=dtype)) for _ in range(8)]
    return max(relative_error(a @ b, a.double() @ b.double()) for a, b in draws)


def error_of_ops(call: Call, expected: list[Tensor], truth: list[Tensor]) -> float:
    """Of the gradients: of the same sums as ours, in another order."""
    count = len(call.weights)
    return max(map(relative_error, expected[count:], truth[count:]))


def check(call: Call, own: float = 0.0) -> None:
    """Outputs are the ops' to the bit; gradients no further from the truth than theirs, or ``own``, may be."""
    found, expected = call.run(), call.by_the_ops()
    truth = expected if call.x.dtype == torch.float64 else call.to(torch.float64).by_the_ops()
    count = len(call.weights)
    for ours, theirs in zip(found[:count], expected[:count], strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
        assert ours._base is None
    own = max(own, error_of_ops(call, expected, truth))
    try:
        check_gradients(found[count:], expected[count:], truth[count:], own)
    except AssertionError:  # one set of gradients may have been rounded luckily
        own = max(own, *(error_of_ops(*drawn) for drawn in other_losses(call)))
        check_gradients(found[count:], expected[count:], truth[count:], own)


def other_losses(call: Call) -> Iterator[tuple[Call, list[Tensor], list[Tensor]]]:
    """The call with other weights in its loss, what the ops give, and the truth."""
    with torch.random.fork_rng():
        for _ in range(3):
            other = copy.copy(call)
            other.weights = [torch.randn_like(weight) for weight in call.weights]
            yield other, other.by_the_ops(), other.to(torch.float64).by_the_ops()


def check_gradients(found: list[Tensor], expected: list[Tensor], truth: list[Tensor], own: float) -> None:
    for index, (ours, theirs, true) in enumerate(zip(found, expected, truth, strict=True)):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        if ours.dtype == torch.float64:
            torch.testing.assert_close(ours, theirs)
        else:
            assert_close_to_truth(ours, theirs, true, f"gradient {index}", own_error=own)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CLASSES)
class TestResults:
    @pytest.mark.parametrize("layers, bidirectional, bias", [(1, False, True), (2, True, True), (3, False, False)])
    def test_stacks(self, kind, dtype, shape, layers, bidirectional, bias):
        torch.manual_seed(0)
        steps, batch, width, hidden = shape
        module = CLASSES[kind](width, hidden, layers, bidirectional=bidirectional, bias=bias, dtype=dtype)
        check(Call(module, steps, batch))
        without = Call(module, steps, batch, states=False)
        check(without)
        one = FORWARD, BACKWARD if kind in WHOLE else OF_THE_OP
        assert sorted(calls_of(without.run)) == sorted(one * layers)

    @pytest.mark.parametrize("layout", ["packed", "lengths"])
    def test_ragged(self, kind, dtype, shape, layout):
        torch.manual_seed(1)
        steps, batch, width, hidden = shape
        for layers, bidirectional, states in ((1, False, True), (2, True, True), (1, True, False)):
            module = CLASSES[kind](width, hidden, layers, bidirectional=bidirectional, dtype=dtype)
            call = Call(module, steps, batch, states, layout)
            check(call, error_of_mm(dtype, batch, module.weight_hh_l0.shape[0], width))
            one = FORWARD, BACKWARD if kind in WHOLE else OF_THE_OP
            assert sorted(calls_of(call.run)) == sorted(one * layers)

    def test_batch_first_and_strides(self, kind, dtype, shape):
        torch.manual_seed(0)
        steps, batch, width, hidden = shape
        call = Call(CLASSES[kind](width, hidden, batch_first=True, dtype=dtype), steps, batch)
        check(call)
        call.x = torch.randn(steps, batch, width, dtype=dtype).transpose(0, 1).requires_grad_()
        check(call)
        call.x = torch.randn(batch, steps + 1, width + 3, dtype=dtype)[:, 1:, :width].requires_grad_()
        check(call)

    def test_features_and_states_apart(self, kind, dtype, shape):
        """As convolutions leave them, and slices: laid out anew."""
        torch.manual_seed(0)
        steps, batch, width, hidden = shape
        call = Call(CLASSES[kind](width, hidden, batch_first=True, dtype=dtype), steps, batch)
        call.x = torch.randn(batch, width, steps, dtype=dtype).transpose(1, 2).requires_grad_()
        check(call)
        call.states = [state.detach().repeat(1, 1, 2)[..., : state.shape[-1]].requires_grad_() for state in call.states]
        check(call)
        step = steps == 1 and kind in WHOLE and kind != "projected"
        assert sorted(calls_of(call.run)) == sorted(STEP if step else (FORWARD, BACKWARD if kind in WHOLE else OF_THE_OP))


@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("kind", WHOLE)
def test_many_rows(kind, steps, monkeypatch):
    """What would be copied is too much: the products are called one by one."""
    monkeypatch.setattr(ops, "_FEW", 0)
    call = Call(CLASSES[kind](7, 17, 2, bidirectional=True, dtype=torch.float64), steps, 3)
    check(call)
    assert sorted(calls_of(call.run)) == sorted([FORWARD, OF_THE_OP] * 2)


class TestRagged:
    @pytest.mark.parametrize("steps, batch", [(1, 3), (7, 5), (40, 9)])
    @pytest.mark.parametrize("kind", ["LSTM", "GRU", "projected"])
    @pytest.mark.parametrize("few", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_what_lies_beyond_the_lengths(self, kind, steps, batch, few, dtype, monkeypatch):
        """is not the caller's: whatever it is, NaN included, nothing changes, and it has no gradient."""
        if not few:
            monkeypatch.setattr(ops, "_FEW", 0)
        torch.manual_seed(0)
        call = Call(CLASSES[kind](7, 17, 2, bidirectional=True, dtype=dtype), steps, batch, layout="lengths")
        expected = call.run()
        beyond = torch.arange(steps)[:, None] >= call.lengths
        with torch.no_grad():
            call.x[beyond] = torch.nan
        found = call.run()
        torch.testing.assert_close(found, expected)
        assert beyond.any() and not found[len(call.weights)][beyond].any()

    def test_no_steps_at_all(self):
        call = Call(fastseq.GRU(6, 9, bidirectional=True, dtype=torch.float64), 4, 20, layout="lengths")
        call.lengths.zero_()
        check(call)
        assert not any(grad.any() for grad in call.grads(call.outputs())[2:])

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    def test_dtypes_of_lengths(self, dtype):
        call = Call(fastseq.LSTM(6, 9), 4, 3, layout="lengths")
        expected = call.run()
        call.lengths = call.lengths.to(dtype)
        assert calls_of(call.run) == [FORWARD, BACKWARD]
        assert all(torch.equal(*pair) for pair in zip(call.run(), expected, strict=True))

    def test_wrong_lengths_and_batch_sizes(self):
        call = Call(fastseq.LSTM(6, 9), 4, 3, layout="lengths")
        for lengths, message in (
            ([4, 5, 1], r"lie in \[0, 4\]"),
            ([-1, 4, 1], r"lie in \[0, 4\]"),
            ([4, 1], r"lengths must be \[3\], .*, got \[2\]$"),
            ([4, 1, 1, 1], r"lengths must be \[3\], .*, got \[4\]; the batch is .* with batch_first"),
        ):
            call.lengths = torch.tensor(lengths)
            with pytest.raises(RuntimeError, match=message):
                call.outputs()
        for sizes, message in (([3, 2], "add up to 5 rows"), ([2, 3], "must not increase"), ([4, 0], "must be positive")):
            with pytest.raises(RuntimeError, match=message):
                call.module(PackedSequence(torch.randn(4, 6), torch.tensor(sizes)))

    @pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
    def test_sequences_of_one_length(self, kind):
        torch.manual_seed(0)
        module, x = CLASSES[kind](6, 9, 2, bidirectional=True), torch.randn(5, 3, 6, requires_grad=True)
        params = [x, *module.parameters()]

        def run() -> list[Tensor]:
            y = module(pack_padded_sequence(x, torch.tensor([5, 5, 5])))[0].data.view(5, 3, -1)
            return [y, *torch.autograd.grad(y.sin().sum(), params)]

        assert sorted(calls_of(run)) == sorted([FORWARD, BACKWARD] * 2)
        y = module(x)[0]
        expected = [y, *torch.autograd.grad(y.sin().sum(), params)]
        torch.testing.assert_close(run(), expected)

    def test_unbatched(self):
        module = fastseq.LSTM(6, 9)
        x = torch.randn(5, 6, requires_grad=True)
        assert calls_of(lambda: module(x)[0].sum().backward()) == [FORWARD, BACKWARD]
        alone = x.grad
        x.grad = None
        module(x[:, None])[0].sum().backward()
        assert alone is not None and x.grad is not None
        torch.testing.assert_close(alone, x.grad)


@pytest.mark.parametrize("layout", ["padded", "packed", "lengths"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "projected", "PeepholeLSTM"])
class TestZoneout:
    def test_masks_are_those_of_the_ops(self, kind, layout):
        torch.manual_seed(0)
        call = Call(CLASSES[kind](5, 7, 2, bidirectional=True, zoneout=0.3, dtype=torch.float64), 6, 4, layout=layout)
        torch.manual_seed(1)
        found = call.run()
        torch.manual_seed(1)
        torch.testing.assert_close(found, call.by_the_ops())
        one = FORWARD, BACKWARD if kind in ("LSTM", "GRU", "RNN") else OF_THE_OP
        assert sorted(calls_of(call.run)) == sorted(one * 2)

    def test_proportions(self, kind, layout):
        torch.manual_seed(0)
        call = Call(CLASSES[kind](5, 7, zoneout=0.3, dtype=torch.float64), 6, 4, layout=layout)
        call.module.eval()
        check(call)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_zoneout_of_one_step_after_a_state(kind, num_layers, training):
    """The way that steps of a loop share holds nothing."""
    torch.manual_seed(0)
    call = Call(CLASSES[kind](5, 7, num_layers, zoneout=0.5, dtype=torch.float64), 1, 4)
    call.module.train(training)
    torch.manual_seed(1)
    found = call.run()
    torch.manual_seed(1)
    torch.testing.assert_close(found, call.by_the_ops())


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("layout", ["padded", "packed", "lengths"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "projected"])
def test_each_gradient_alone(kind, layout, steps):
    """What is not wanted is not computed, and takes no other's place."""
    torch.manual_seed(0)
    call = Call(CLASSES[kind](5, 7, bidirectional=True, dtype=torch.float64), steps, 3, layout=layout)
    outputs, leaves = call.outputs(), call.leaves()
    every = call.grads(outputs, retain_graph=True)
    for index, leaf in enumerate(leaves):
        (alone,) = call.grads(outputs, [leaf], retain_graph=True)
        assert torch.equal(alone, every[index])
    for index, leaf in enumerate(leaves):  # nor when the graph is made without the others
        for other in leaves:
            other.requires_grad_(other is leaf)
        (alone,) = call.grads(call.outputs(), [leaf])
        torch.testing.assert_close(alone, every[index])


@pytest.mark.parametrize("some", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_gradients_of_some_outputs(kind, some):
    torch.manual_seed(0)
    call = Call(CLASSES[kind](5, 7, dtype=torch.float64), 1, 3)

    def grads() -> list[Tensor | None]:
        outputs = call.outputs()
        given = [outputs[i] for i in some], call.leaves(), [call.weights[i] for i in some]
        return list(torch.autograd.grad(*given, allow_unused=True))

    found = grads()
    with watching(lambda query, chosen: None):
        torch.testing.assert_close(found, grads())


@pytest.mark.parametrize("kind", WHOLE)
def test_gradients_of_gradients(kind):
    torch.manual_seed(0)
    call = Call(CLASSES[kind](3, 6, 2, bidirectional=True, dtype=torch.float64), 3, 2)

    def second() -> list[Tensor]:
        grads = call.grads(call.outputs(), create_graph=True)
        return list(torch.autograd.grad(sum((g * g).sum() for g in grads), call.leaves()))

    found = second()
    with watching(lambda query, chosen: None):
        torch.testing.assert_close(found, second())


def test_an_output_that_is_overwritten():
    """The backward pass runs the layer again, and does not read what has become of its output."""
    torch.manual_seed(0)
    call = Call(fastseq.GRU(5, 7, dtype=torch.float64), 4, 3)
    expected = call.run()[2:]
    outputs = call.outputs()
    outputs[0].zero_()
    found = torch.autograd.grad(outputs[1:], call.leaves(), call.weights[1:])
    call.weights[0].zero_()
    torch.testing.assert_close(list(found), call.run()[2:])
    assert not torch.equal(found[0], expected[0])


@pytest.mark.parametrize("steps, place", [(1, "x"), (1, "dy"), (3, "dy")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "projected"])
def test_zeros_count_as_a_state(kind, few, dtype, steps, place, monkeypatch):
    """Without h0 what is not finite reaches the gradients of the recurrent weights as in torch: zeros times NaN are NaN."""
    if not few:
        monkeypatch.setattr(ops, "_FEW", 0)
    torch.manual_seed(0)
    ours = CLASSES[kind](12, 20, bidirectional=True, dtype=dtype)
    projected = {"proj_size": ours.proj_size} if ours.proj_size else {}
    theirs = getattr(nn, "LSTM" if projected else kind)(12, 20, bidirectional=True, **projected, dtype=torch.float64)
    x, dy = torch.randn(steps, 3, 12), torch.randn(steps, 3, 2 * (ours.proj_size or 20))
    {"x": x, "dy": dy}[place][0, 1, 2] = torch.nan
    for module in (ours, theirs):
        out, _ = module(x.to(module.weight_hh_l0.dtype))
        out.backward(dy.to(out.dtype))
    assert theirs.weight_hh_l0.grad.isnan().any()
    for (name, found), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(found.grad.isnan(), expected.grad.isnan()), name


@pytest.mark.parametrize("changed", ["x", "states", "weight_ih_l0", "weight_hh_l0"])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", WHOLE)
def test_what_is_overwritten_before_the_backward_pass(kind, batch_first, apart, changed):
    """An error as torch's, or gradients of what was there; never of other numbers."""
    found = []
    for overwritten in (False, True):
        torch.manual_seed(0)
        module = CLASSES[kind](7, 17, 2, batch_first=batch_first)
        x = torch.randn(2, 5, 7) if batch_first else torch.randn(5, 2, 7)
        if apart:
            x = x.mT.contiguous().mT
        pair = hasattr(module, "get_expected_cell_size")
        states = [torch.randn(2, 2, module.proj_size or 17), torch.randn(2, 2, 17)][: 1 + pair]
        out, _ = module(x, tuple(states) if pair else states[0])
        with torch.no_grad():
            for tensor in {"x": [x], "states": states}.get(changed) or [getattr(module, changed)]:
                if overwritten:
                    tensor.add_(1)
        try:
            out.sum().backward()
        except RuntimeError as error:
            assert overwritten and "modified by an inplace operation" in str(error)
            return
        found.append([parameter.grad for parameter in module.parameters()])
    assert changed == "x" and apart
    for before, after in zip(*found, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_input_made_in_inference_mode(kind):
    """Features of a frozen model, say: torch takes them where sequences come second."""
    module = CLASSES[kind](12, 20, batch_first=True)
    with torch.inference_mode():
        x = torch.randn(3, 5, 12)
    grads = []
    for given in (x, x.clone()):
        module.zero_grad()
        module(given)[0].sum().backward()
        grads.append([parameter.grad for parameter in module.parameters()])
    for ours, expected in zip(*grads, strict=True):
        assert torch.equal(ours, expected)


def test_dropout_between_layers_draws_what_the_ops_draw():
    call = Call(fastseq.LSTM(5, 7, 3, dropout=0.4, dtype=torch.float64), 4, 3)
    torch.manual_seed(1)
    found = call.run()
    torch.manual_seed(1)
    torch.testing.assert_close(found, call.by_the_ops())
    call.module.eval()
    torch.testing.assert_close(call.run(), call.by_the_ops())


def test_recompute():
    call = Call(fastseq.LSTM(5, 7, recompute=True, dtype=torch.float64), 4, 3)
    assert calls_of(call.run) == [FORWARD, OF_THE_OP]
    torch.testing.assert_close(call.run(), call.by_the_ops())


@pytest.mark.parametrize("threads", [1, 2])
def test_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for steps, hidden in product((1, 12), (24, 200)):
            check(Call(fastseq.LSTM(40, hidden, bidirectional=True, dtype=torch.float64), steps, 20))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("level", ("default", "avx2", "avx512", "avx512_bf16", "amx"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(level, dtype, monkeypatch):
    monkeypatch.setenv("FASTSEQ_CPU_LEVEL", level)
    if torch.ops.fastseq_native.cpu_level() != level:
        pytest.skip(f"this processor has no {level}")
    torch.manual_seed(0)
    shapes = [(kind, steps, batch, "padded") for kind, steps, batch in product(("LSTM", "GRU", "RNN"), (1, 3), (1, 17))]
    shapes += product(("LSTM", "GRU", "projected"), (19,), (4, 33), ("packed", "lengths"))
    for kind, steps, batch, layout in shapes:
        module = CLASSES[kind](33, 45, bidirectional=True, dtype=dtype)
        own = error_of_mm(dtype, steps * batch, module.weight_hh_l0.shape[0], 33)
        check(Call(module, steps, batch, layout=layout), own)


class Looks(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class LooksAtFunctions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class TestWhoeverLooksOn:
    """keeps the registered ops, in the forward and in the backward pass."""

    @pytest.mark.parametrize("mode", [Looks, lambda: watching(lambda query, chosen: None)])
    def test_modes(self, mode):
        call = Call(fastseq.LSTM(6, 9), 3, 2)
        outputs, expected = call.outputs(), call.run()[3:]
        with mode():
            assert FORWARD not in calls_of(call.outputs)
            assert BACKWARD not in calls_of(lambda: call.grads(outputs, retain_graph=True))
            found = call.grads(outputs, retain_graph=True)
        torch.testing.assert_close(found, expected)
        assert calls_of(lambda: call.grads(outputs)) == [BACKWARD]

    def test_a_backward_pass_is_forced_as_its_forward_pass_was(self):
        call = Call(fastseq.LSTM(6, 9), 3, 2)
        outputs, expected = call.outputs(), call.run()[3:]
        with fastseq.use_backend("reference"):
            assert FORWARD not in calls_of(call.outputs)
            assert calls_of(lambda: call.grads(outputs, retain_graph=True)) == [BACKWARD]
            forced = call.outputs()
        assert BACKWARD not in calls_of(lambda: call.grads(forced, retain_graph=True))
        torch.testing.assert_close(call.grads(forced), expected)

    def test_a_mode_of_functions(self):
        call = Call(fastseq.LSTM(6, 9), 3, 2)
        with LooksAtFunctions():
            assert FORWARD not in calls_of(call.outputs)

    def test_watchers_are_told_of_both(self):
        call, told = Call(fastseq.LSTM(6, 9), 3, 2), []
        with watching(lambda query, chosen: told.append((query.op, query.backward, chosen))):
            call.run()
        assert told == [("recurrent", False, "cpu"), ("recurrent", True, "cpu")]

    def test_autocast(self):
        call = Call(fastseq.LSTM(6, 9), 3, 2)
        outputs = call.outputs()
        with torch.autocast("cpu", torch.bfloat16):
            assert calls_of(call.outputs) == [FORWARD]
            assert {out.dtype for out in call.outputs()} == {torch.bfloat16}
            assert BACKWARD not in calls_of(lambda: call.grads(outputs))

    def test_forced(self):
        call = Call(fastseq.LSTM(6, 9), 3, 2)
        with fastseq.use_backend("cpu"):
            assert calls_of(call.run) == [FORWARD, BACKWARD]
        with fastseq.use_backend("torch"):
            assert calls_of(call.run) == []

    def test_batched_gradients(self):
        call = Call(fastseq.LSTM(6, 9, dtype=torch.float64), 3, 2)
        outputs, many = call.outputs(), [torch.randn(4, *weights.shape, dtype=torch.float64) for weights in call.weights]
        found = torch.autograd.grad(outputs, call.leaves(), many, is_grads_batched=True, retain_graph=True)
        for index in range(4):
            one = torch.autograd.grad(outputs, call.leaves(), [weights[index] for weights in many], retain_graph=True)
            torch.testing.assert_close([grads[index] for grads in found], list(one))

    @pytest.mark.parametrize("layout", ["padded", "packed"])
    @pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "relu"])
    def test_the_table(self, kind, layout):
        call = Call(CLASSES[kind](6, 9, 2, bidirectional=True), 3, 2, layout=layout)
        with of_torch.everywhere(of_torch.Steps(1, 100)):
            assert calls_of(call.run) == []
            torch.testing.assert_close(call.run(), call.by_the_ops(), rtol=1e-4, atol=1e-5)
            expected = call.outputs()
            with torch.no_grad():
                assert all(torch.equal(*pair) for pair in zip(call.outputs(), expected, strict=True))
            call.states = []
            torch.testing.assert_close(call.run(), call.by_the_ops(), rtol=1e-4, atol=1e-5)

    def test_what_the_table_does_not_ask_of(self):
        call = Call(fastseq.LSTM(6, 9, recompute=True), 3, 2, layout="packed")
        with of_torch.everywhere(of_torch.Steps(1, 100)):
            assert calls_of(call.run) == [FORWARD, OF_THE_OP]  # torch's kernels keep the gates
            call.module.recompute = False
            with fastseq.use_backend("cpu"):
                assert calls_of(call.run) == [FORWARD, BACKWARD]

    def test_subclasses_and_strides_go_the_long_way(self):
        call = Call(fastseq.GRU(6, 9, dtype=torch.float64), 3, 2)
        call.module.weight_hh_l0 = nn.Parameter(torch.randn(9, 27, dtype=torch.float64).t())
        torch.testing.assert_close(call.run(), call.by_the_ops())
        two = Call(fastseq.GRU(6, 9, 2, dropout=0.5, dtype=torch.float64), 3, 2)
        two.module.weight_hh_l1 = nn.Parameter(torch.randn(9, 27, dtype=torch.float64).t())
        torch.manual_seed(1)
        found = two.run()  # declined before anything is drawn at random
        torch.manual_seed(1)
        torch.testing.assert_close(found, two.by_the_ops())


def test_no_rows():
    module, x = fastseq.LSTM(6, 9), torch.randn(3, 0, 6, requires_grad=True)
    module(x)[0].sum().backward()
    assert x.grad is not None and not module.weight_hh_l0.grad.any()


def test_functions_take_the_same_way():
    call = Call(fastseq.LSTM(6, 9, 2, batch_first=True), 3, 2)
    params = list(call.module.parameters())

    def run() -> list[Tensor]:
        outputs = list(fastseq.functional.lstm(call.x, tuple(call.states), params, num_layers=2, batch_first=True))
        return [*outputs, *call.grads(outputs)]

    assert sorted(calls_of(run)) == sorted([FORWARD, BACKWARD] * 2)
    assert all(torch.equal(*pair) for pair in zip(run(), call.run(), strict=True))


def test_raw_op_refuses_what_does_not_fit():
    """The kernels trust sizes and dtypes, so the native op checks them whoever calls it."""
    x, w_ih, w_hh = torch.randn(3, 2, 4), torch.randn(15, 4), torch.randn(15, 5)
    y, h_n, c_n, c, gates = torch.ops.fastseq_native.recurrent_layer(
        x, None, None, [w_ih, w_hh], *[None] * 5, "gru", False, False, 0.0, 0.0, True, False
    )

    def call(dy=y, x=x, y=y, params=(w_ih, w_hh), h0=None, ragged=(), gates=gates, cell="gru", wanted=(True,) * 5):
        ragged = [*ragged, *[None] * (5 - len(ragged))]
        torch.ops.fastseq_native.recurrent_layer_backward(
            dy, None, None, x, h0, None, list(params), *ragged, y, c, gates, cell, 0.0, 0.0, list(wanted), False
        )

    call(h0=torch.randn(1, 2, 5))
    hold = torch.zeros(3, 2, 1, 4, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="hold_h must have 30 elements, got 24"):
        torch.ops.fastseq_native.recurrent_layer(
            x, None, None, [w_ih, w_hh], *[None] * 2, hold, None, None, "gru", False, False, 0.0, 0.0, True, False
        )
    for wrong, message in (
        ({"x": x[:, :1].contiguous()}, "x must have 24 elements, got 12"),
        ({"x": x[0]}, r"x must be \[T, B, I\]"),
        ({"ragged": [torch.tensor([3])]}, "lengths must have 2 elements, got 1"),
        ({"ragged": [torch.tensor([3, 3], dtype=torch.int32)]}, "lengths has a wrong dtype"),
        ({"ragged": [None, torch.tensor([2, 2, 2])]}, r"or with batch_sizes \[N, I\]"),
        *[
            ({"ragged": [None, torch.tensor(sizes)], "x": x.flatten(0, 1), "y": y.flatten(0, 1)}, "none of a packed batch of 6")
            for sizes in ([2, 2, 1], [1, 2, 3], [6, 0])
        ],
        ({"ragged": [None, None, hold]}, "hold_h must have 30 elements, got 24"),
        ({"ragged": [*[None] * 4, torch.ones(2, 3)]}, "resets has a wrong dtype"),
        ({"ragged": [*[None] * 4, torch.ones(2, 2, dtype=torch.bool)]}, "resets must have 6 elements, got 4"),
        ({"dy": y.double()}, "dy has a wrong dtype"),
        ({"dy": y.transpose(0, 1)}, "dy must be contiguous"),
        ({"gates": gates[:2]}, "gates must have 120 elements, got 80"),
        ({"h0": torch.randn(2, 2, 5)}, "h0 must have 10 elements, got 20"),
        ({"params": (w_ih,)}, "of which wanted tells each"),
        ({"params": (w_ih, w_hh, w_hh), "wanted": (True,) * 6}, "no gradients of this projection here"),
        ({"params": (w_hh, w_hh)}, "w_ih must have 60 elements, got 75"),
        ({"wanted": (True,) * 4}, "of which wanted tells each"),
        ({"cell": "layer_norm_gru"}, "has parameters beside weights and biases"),
        ({"cell": "minimal_gru"}, "cell minimal_gru is none of"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(**wrong)


class TestVectorsOfLayerNorm:
    """The gradients of what a layer-normalized cell has inside a step: one native op for all rows of a lane."""

    OP = "fastseq_native::recurrent_norm_gradients"

    @pytest.mark.parametrize("steps, batch, hidden", [(1, 1, 5), (3, 7, 16), (400, 3, 33)])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("name", ["layer_norm_lstm", "layer_norm_gru"])
    def test_values(self, name, dtype, steps, batch, hidden):
        """Of rows further apart than they need, against the cell's own equations."""
        torch.manual_seed(0)
        cell, lstm, rows = steps_of(name), name == "layer_norm_lstm", steps * batch
        gates, vectors, wide = (4, 6, state_dtype(dtype)) if lstm else (3, 4, state_dtype(dtype))
        dgates = torch.randn(rows, 2, gates * hidden).to(dtype)[:, 1]
        saved = torch.rand(rows, 2, 2 * gates * hidden).to(dtype)[:, 1]
        dm, c = (torch.randn(rows, hidden, dtype=wide) if lstm else None for _ in range(2))
        inside = torch.randn(vectors * hidden, dtype=wide)
        found = torch.ops.fastseq_native.recurrent_norm_gradients(dgates, saved, dm, c, inside, name)

        def expected(dtype: torch.dtype) -> Tensor:
            """Of every row."""
            given = [None if t is None else t.to(dtype) for t in (dgates, dgates, dm, saved, inside, None, c)]
            return cell.vector_gradients(*given)

        # the truth of fp64 is a sum that is rounded itself: by as much as it differs from the same of the rows in another order
        each = expected(torch.float64)
        truth = each.sum(0)
        rounded = relative_error(each.flip(0).sum(0), truth) if wide == torch.float64 else 0.0
        assert_close_to_truth(found, expected(wide).sum(0), truth, own_error=rounded)

    @pytest.mark.parametrize("kind", [fastseq.LayerNormLSTM, fastseq.LayerNormGRU])
    def test_who_calls_it(self, kind):
        call = Call(kind(5, 7, bidirectional=True, dtype=torch.float64), 4, 3)
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            found = call.run()
        assert [event.name for event in recorded.events()].count(self.OP) == 2
        with fastseq.use_backend("reference"):
            with profile(activities=[ProfilerActivity.CPU]) as recorded:
                expected = call.run()
            assert self.OP not in [event.name for event in recorded.events()]
        torch.testing.assert_close(found, expected)

    def test_what_does_not_fit(self):
        dgates, gates, dm, vectors = torch.randn(6, 8), torch.randn(6, 16), torch.randn(6, 2), torch.randn(12)

        def call(dgates=dgates, gates=gates, dm=dm, c=dm, vectors=vectors, cell="layer_norm_lstm"):
            torch.ops.fastseq_native.recurrent_norm_gradients(dgates, gates, dm, c, vectors, cell)

        call()
        for wrong, message in (
            ({"dgates": dgates[:5]}, "dgates must have 48 elements, got 40"),
            ({"dgates": dgates.reshape(8, 6).t()}, "dgates must be rows"),
            ({"gates": gates.double()}, "vectors has a wrong dtype"),
            ({"dm": None}, "given of an LSTM, and only of one"),
            ({"c": dm.double()}, "c has a wrong dtype"),
            ({"cell": "lstm"}, "none of layer_norm_lstm, layer_norm_gru"),
        ):
            with pytest.raises(RuntimeError, match=message):
                call(**wrong)
