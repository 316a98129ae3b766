"""A stack without gradients is one call of the library: with the bits of the registered op, and only where nobody looks on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastseq
from fastseq.backends import library, watching
from fastseq.cells import CELLS
from fastseq.choice import sources
from fastseq.choice.decision import Candidate
from fastseq.testing import assert_close_to_truth

NATIVE, STEP, OP = (f"fastseq_native::recurrent_{name}" for name in ("layers", "step", "forward"))
ALONE = "fastseq_native::recurrent_one_layer"

pytestmark = pytest.mark.skipif(library.reason() is not None, reason="needs the library")


class Subclass(Tensor):
    pass


class Other(Tensor):
    pass


class Says(Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs)


class Dispatches(Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        with torch._C._DisableTorchDispatch():
            return function(*args, **(kwargs or {}))


def ops_of(run: Callable[[], Any]) -> list[str]:
    """The library's ops that ran."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        run()
    return [event.name for event in recorded.events() if event.name in (NATIVE, ALONE, STEP, OP)]


def calls_of(run: Callable[[], Any]) -> list[str]:
    """The same, where it does not matter whether a stack is of one layer."""
    return [NATIVE if name == ALONE else name for name in ops_of(run)]


def tensors_of(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    if isinstance(results, PackedSequence):
        return [results.data]
    return [tensor for part in results for tensor in tensors_of(part)]


def assert_same(run: Callable[[], Any], native: int = 1, name: str = NATIVE) -> None:
    """That ``run`` is so many native calls, and gives what the registered ops give: bits, strides, and no views."""
    with torch.no_grad():
        run()
        assert calls_of(run) == [name] * native
        found = tensors_of(run())
        with watching(lambda query, chosen: None):  # whoever looks on sees the ops
            assert name not in calls_of(run)
            expected = tensors_of(run())
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
        assert ours.stride() == theirs.stride() and ours.storage_offset() == theirs.storage_offset() == 0
        assert ours._base is None and not ours.requires_grad


CLASSES: dict[str, Callable[..., Any]] = {
    "LSTM": fastseq.LSTM,
    "GRU": fastseq.GRU,
    "RNN": fastseq.RNN,
    "relu": lambda *args, **kwargs: fastseq.RNN(*args, nonlinearity="relu", **kwargs),
    "projected": lambda *args, **kwargs: fastseq.LSTM(*args, proj_size=5, **kwargs),
    "CoupledLSTM": fastseq.CoupledLSTM,
    "PeepholeLSTM": fastseq.PeepholeLSTM,
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# T, B, I, H: one step, a step of many rows, a short and a longer sequence, odd sizes
SHAPES = ((1, 1, 12, 20), (1, 9, 33, 70), (5, 2, 7, 17), (40, 6, 16, 24))


def states_of(module: Any, batch: int) -> Any:
    width = module.proj_size or module.hidden_size
    lanes = module.num_layers * (2 if module.bidirectional else 1)
    dtype = next(module.parameters()).dtype
    h = torch.randn(lanes, batch, width, dtype=dtype)
    pair = hasattr(module, "get_expected_cell_size")
    return (h, torch.randn(lanes, batch, module.hidden_size, dtype=dtype)) if pair else h


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CLASSES)
class TestBits:
    @pytest.mark.parametrize("layers, bidirectional, bias", [(1, False, True), (2, True, True), (3, False, False)])
    def test_stacks(self, kind, dtype, shape, layers, bidirectional, bias):
        steps, batch, width, hidden = shape
        module = CLASSES[kind](width, hidden, layers, bidirectional=bidirectional, bias=bias, dtype=dtype)
        x = torch.randn(steps, batch, width, dtype=dtype)
        assert_same(lambda: module(x))
        states = states_of(module, batch)
        assert_same(lambda: module(x, states))

    def test_batch_first_and_strides(self, kind, dtype, shape):
        steps, batch, width, hidden = shape
        module = CLASSES[kind](width, hidden, batch_first=True, dtype=dtype)
        for x in (
            torch.randn(batch, steps, width, dtype=dtype),
            torch.randn(steps, batch, width, dtype=dtype).transpose(0, 1),
            torch.randn(batch, steps + 1, width + 3, dtype=dtype)[:, 1:, :width],
        ):
            assert_same(lambda x=x: module(x))
        module.batch_first = False
        by_row = torch.randn(batch, steps, width, dtype=dtype).transpose(0, 1)
        assert_same(lambda: module(by_row))

    def test_features_and_states_apart(self, kind, dtype, shape):
        """As convolutions leave them, and slices: declined once, and laid out anew."""
        steps, batch, width, hidden = shape
        module = CLASSES[kind](width, hidden, 2, batch_first=True, dtype=dtype)
        x, states = torch.randn(batch, width, steps, dtype=dtype).transpose(1, 2), states_of(module, batch)
        assert_same(lambda: module(x), native=1 if x.stride(-1) == 1 else 2)
        apart = torch.utils._pytree.tree_map(lambda state: state.repeat(1, 1, 2)[..., : state.shape[-1]], states)
        assert_same(lambda: module(x, apart), native=2)
        with torch.no_grad():
            assert all(map(torch.equal, tensors_of(module(x, apart)), tensors_of(module(x.contiguous(), states))))

    def test_lengths(self, kind, dtype, shape):
        steps, batch, width, hidden = shape
        module = CLASSES[kind](width, hidden, 2, bidirectional=True, batch_first=True, dtype=dtype)
        x, states = torch.randn(batch, steps, width, dtype=dtype), states_of(module, batch)
        for lengths in (torch.randint(0, steps + 1, (batch,)), torch.full((batch,), steps, dtype=torch.int32)):
            hidden_beyond = x.masked_fill(torch.arange(steps)[:, None] >= lengths[:, None, None], float("nan"))
            assert_same(lambda lengths=lengths, x=hidden_beyond: module(x, states, lengths=lengths))

    def test_packed(self, kind, dtype, shape):
        steps, batch, width, hidden = shape
        module = CLASSES[kind](width, hidden, 2, bidirectional=True, dtype=dtype)
        for lengths in ([steps] * batch, [max(1, steps - i) for i in range(batch)], [1 + i % steps for i in range(batch)]):
            packed = pack_sequence([torch.randn(n, width, dtype=dtype) for n in lengths], enforce_sorted=False)
            states = states_of(module, batch)
            assert_same(lambda packed=packed: module(packed))
            assert_same(lambda packed=packed, states=states: module(packed, states))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_cells(dtype, batch, bias):
    x, h, c = (torch.randn(batch, size, dtype=dtype) for size in (11, 21, 21))
    for module, hx in (
        (fastseq.LSTMCell(11, 21, bias, dtype=dtype), (h, c)),
        (fastseq.GRUCell(11, 21, bias, dtype=dtype), h),
        (fastseq.RNNCell(11, 21, bias, dtype=dtype), h),
        (fastseq.RNNCell(11, 21, bias, nonlinearity="relu", dtype=dtype), h),
    ):
        assert_same(lambda module=module, hx=hx: module(x, hx), name=STEP)
        assert_same(lambda module=module: module(x), name=STEP)
        columns, apart = torch.randn(11, 2 * batch, dtype=dtype)[:, ::2].T, torch.randn(2, batch, 42, dtype=dtype)[..., :21]
        hx = tuple(apart) if isinstance(hx, tuple) else apart[0]
        assert_same(lambda module=module, hx=hx, columns=columns: module(columns, hx), native=2, name=STEP)


@pytest.mark.parametrize("zoneout", [0.25, (0.1, 0.3)])
def test_zoneout_at_inference(zoneout):
    module = fastseq.LSTM(6, 9, zoneout=zoneout).eval()
    x = torch.randn(4, 2, 6)
    assert_same(lambda: module(x))


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize("training", [False, True])
def test_states_of_which_some_are_given(training, backend):
    """The others are those of nothing seen."""
    x, state = torch.randn(4, 2, 6), torch.randn(1, 2, 9)
    for module in (fastseq.LSTM(6, 9), fastseq.SLSTM(6, 9)):
        cell, params = module.cell, list(module.parameters())
        nothing = [torch.full_like(state, -torch.inf if name == "m" else 0.0) for name in CELLS[cell].states]
        for place in range(len(nothing)):
            some, every = [None] * len(nothing), list(nothing)
            some[place] = every[place] = state
            with torch.set_grad_enabled(training), fastseq.use_backend(backend):
                found, expected = (fastseq.functional.recurrent(cell, x, hx, params) for hx in (some, every))
            torch.testing.assert_close(found[:2], expected[:2])


class LSTMState(NamedTuple):
    h: Tensor
    c: Tensor


@pytest.mark.parametrize("form", [list, LSTMState._make])
@pytest.mark.parametrize("kind", ["LSTM", "PeepholeLSTM"])
def test_states_in_a_list_or_a_named_tuple(kind, form):
    """They take the way of those in a tuple, with gradients too."""
    x, states = torch.randn(4, 2, 6), torch.randn(2, 1, 2, 9)
    layers, cell = getattr(fastseq, kind)(6, 9), getattr(fastseq, f"{kind}Cell")(6, 9)
    for module, given, pair in ((layers, x, states), (cell, x[0], states[:, 0])):
        run = {make: partial(module, given, make(pair)) for make in (tuple, form)}
        for found, expected in zip(tensors_of(run[form]()), tensors_of(run[tuple]()), strict=True):
            assert found.grad_fn.name() == expected.grad_fn.name()
            assert torch.equal(found, expected)
        with torch.no_grad():
            names = {make: calls_of(call) for make, call in run.items()}
            assert names[form] == names[tuple] and names[form] in ([NATIVE], [STEP])
            assert_same(run[form], name=names[form][0])


@pytest.mark.parametrize("kind", ["SLSTM", "SLSTMCell"])
def test_four_states_in_a_list(kind):
    module, x, states = getattr(fastseq, kind)(6, 9), torch.randn(4, 2, 6), torch.randn(4, 1, 2, 9)
    if kind.endswith("Cell"):
        x, states = x[0], states[:, 0]
    with torch.no_grad():
        names = [calls_of(partial(module, x, form(states))) for form in (list, tuple)]
    assert names[0] == names[1] and NATIVE in names[0]


def test_unbatched():
    module = fastseq.GRU(6, 9)
    with torch.no_grad():
        assert calls_of(lambda: module(torch.randn(4, 6))) == [NATIVE]


class Looks(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class LooksAtFunctions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class TestDefaultDevice:
    """A default device is a function mode, but where it names the CPU it has no part in a call on tensors of the CPU."""

    @pytest.mark.parametrize(
        ("module", "inputs", "op"),
        [
            (fastseq.LSTM(6, 9), (torch.randn(3, 2, 6),), "recurrent_one_layer"),
            (fastseq.GRUCell(6, 9), (torch.randn(2, 6), torch.randn(2, 9)), "recurrent_step"),
            (fastseq.MultiheadAttention(8, 2), (torch.randn(3, 2, 8),) * 3, "multihead_attention"),
            (fastseq.TransformerEncoderLayer(8, 2, 16).eval(), (torch.randn(3, 2, 8),), "transformer_encoder_layer"),
        ],
        ids=["layers", "cell", "attention", "encoder"],
    )
    def test_the_fast_way_is_kept(self, module, inputs, op):
        def ops_of(device: str | None, inner: AbstractContextManager[Any] | None = None) -> list[str]:
            with torch.no_grad(), torch.device(device) if device else nullcontext(), inner or nullcontext():
                module(*inputs)
                with profile(activities=[ProfilerActivity.CPU]) as recorded:
                    module(*inputs)
            return [event.name for event in recorded.events() if event.name == f"fastseq_native::{op}"]

        assert len(ops_of(None)) == len(ops_of("cpu")) == 1
        assert ops_of("meta") == ops_of("cpu", LooksAtFunctions()) == []

    @pytest.mark.parametrize("kind", [fastseq.TransformerEncoderLayer, fastseq.MultiheadAttention])
    def test_training_draws_the_same(self, kind):
        module, x = kind(8, 2, dropout=0.4), torch.randn(3, 2, 8)
        results = []
        for context in (nullcontext(), torch.device("cpu")):
            module.zero_grad()
            torch.manual_seed(3)
            with context:
                out = tensors_of(module(x) if kind is fastseq.TransformerEncoderLayer else module(x, x, x))[0]
                out.square().sum().backward()
            results.append([out, *(parameter.grad for parameter in module.parameters())])
        assert out.grad_fn.name() == results[0][0].grad_fn.name()
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name, value", [("zoneout", 0.25), ("weight_dropout", 0.5), ("batch_first", True), ("dropout", 0.5)])
def test_options_that_are_set_later(name, value):
    """On a module of ours and on one that was torch.nn's: what was known of it before does not hold on."""
    x = torch.randn(3, 3, 6)
    made = fastseq.LSTM(6, 9)
    swapped = nn.LSTM(6, 9)
    swapped.load_state_dict(made.state_dict())
    assert fastseq.convert(swapped)
    expected = fastseq.LSTM(6, 9, **({} if name == "dropout" else {name: value}))  # which a single layer has no use for
    expected.load_state_dict(made.state_dict())
    for training, module in product((False, True), (made, swapped)):
        module.__dict__.update(training=training)
        with torch.no_grad():
            before = getattr(module, name)
            module(x)
            setattr(module, name, value)
            torch.manual_seed(0)
            found = tensors_of(module(x))
            torch.manual_seed(0)
            assert all(torch.equal(a, b) for a, b in zip(found, tensors_of(expected.train(training)(x)), strict=True))
            setattr(module, name, before)


class TestSilentSubclasses:
    """Tensors of a subclass that leaves what is called on it to Tensor: the way of plain ones, results as torch.nn gives them."""

    @pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell", "PeepholeLSTM"])
    @pytest.mark.parametrize("packed", [False, True])
    def test_results(self, kind, packed):
        module, cell, pair = getattr(fastseq, kind)(6, 9).eval(), kind.endswith("Cell"), "LSTM" in kind
        x, h = (torch.randn(2, 6), torch.randn(2, 9)) if cell else (torch.randn(3, 2, 6), torch.randn(1, 2, 9))
        hx: Any = (h, h + 1) if pair else h
        marked = tuple(state.as_subclass(Subclass) for state in hx) if pair else hx.as_subclass(Subclass)
        if packed:
            fastseq.pack(module)
        with torch.no_grad():
            expected = tensors_of(module(x, hx))
            for given in ((x.as_subclass(Subclass), hx), (x, marked), (x.as_subclass(Subclass), marked)):
                names = calls_of(lambda given=given: module(*given))
                assert names == calls_of(lambda: module(x, hx)) and (names or packed)
                found = tensors_of(module(*given))
                assert all(type(tensor) is Subclass for tensor in found)
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            if hasattr(nn, kind):
                twin = getattr(nn, kind)(6, 9)
                assert [type(tensor) for tensor in tensors_of(twin(*given))] == [type(tensor) for tensor in found]
            assert all(type(tensor) is Subclass for tensor in tensors_of(module(x.as_subclass(Subclass))))

    @pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
    def test_gradients(self, kind):
        module, leaf = getattr(fastseq, kind)(6, 9), torch.randn(2, 6) if kind.endswith("Cell") else torch.randn(3, 2, 6)
        gradients = []
        for wrap in (lambda x: x, lambda x: x.as_subclass(Subclass)):
            x = leaf.clone().requires_grad_()
            module.zero_grad()
            tensors_of(module(wrap(x)))[0].square().sum().backward()
            gradients.append([x.grad, *(parameter.grad for parameter in module.parameters())])
        for ours, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(ours.as_subclass(Tensor), expected)

    def test_two_kinds(self):
        """Whose is the say? torch refuses, and so do we."""
        module, x, h = fastseq.GRU(6, 9), torch.randn(3, 2, 6), torch.randn(1, 2, 9)
        for own in (module, nn.GRU(6, 9)):
            with torch.no_grad(), pytest.raises(TypeError):
                own(x.as_subclass(Subclass), h.as_subclass(Other))

    def test_modes_see_them(self):
        module, x = fastseq.GRU(6, 9), torch.randn(3, 2, 6).as_subclass(Subclass)
        with torch.no_grad(), LooksAtFunctions():
            assert NATIVE not in calls_of(lambda: module(x))


class TestSteps:
    """Few sequences, by weights as they lie and by packed ones, between the ways for many."""

    @pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "relu"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("batch", [1, 2, 7, 15, 16])
    @pytest.mark.parametrize("sizes", [(100, 97), (130, 96), (200, 100)])
    def test_step(self, kind, dtype, batch, sizes):
        module = CLASSES[kind](*sizes, dtype=dtype).eval()
        truth = nn.RNN(*sizes, nonlinearity="relu") if kind == "relu" else getattr(nn, kind)(*sizes)
        truth.load_state_dict(module.state_dict())
        torchs, truth = copy.deepcopy(truth).to(dtype), truth.double()
        truth.load_state_dict(module.state_dict())
        x, states = torch.randn(1, batch, sizes[0], dtype=dtype), states_of(module, batch)
        for packed in (False, True):
            if packed:
                fastseq.pack(module)
            else:
                assert_same(lambda: module(x, states))
            for hx in (None, states):
                wide = hx if hx is None else torch.utils._pytree.tree_map(lambda state: state.double(), hx)
                with torch.no_grad():
                    found, theirs, expected = (tensors_of(run) for run in (module(x, hx), torchs(x, hx), truth(x.double(), wide)))
                for ours, own, true in zip(found, theirs, expected, strict=True):
                    assert_close_to_truth(ours, own, true)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_steps_under_autocast_are_torchs(kind, batch_first, bidirectional):
    """With its types, also for inputs that are lowered already."""
    options: dict[str, Any] = dict(batch_first=batch_first, bidirectional=bidirectional, num_layers=2)
    ours, torchs = getattr(fastseq, kind)(6, 9, **options), getattr(nn, kind)(6, 9, **options)
    torchs.load_state_dict(ours.state_dict())
    for dtype, gradients, given in product((torch.float32, torch.bfloat16), (False, True), (False, True)):
        x = torch.randn((3, 1, 6) if batch_first else (1, 3, 6)).to(dtype)
        states = states_of(ours, 3)
        hx = torch.utils._pytree.tree_map(lambda state, dtype=dtype: state.to(dtype), states) if given else None
        with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16):
            assert calls_of(lambda x=x, hx=hx: ours(x, hx)) == []
            for found, expected in zip(tensors_of(ours(x, hx)), tensors_of(torchs(x, hx)), strict=True):
                assert torch.equal(found, expected) and found.dtype == expected.dtype


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "relu"])
@pytest.mark.parametrize("layout", ["padded", "batch_first", "packed", "lengths", "resets", "unbatched"])
class TestLayersUnderAutocast:
    """take the short way, with the bits and the types of the registered ops, which whoever looks on sees."""

    def calls(self, kind, layout, **more):
        module = CLASSES[kind](6, 9, 2, bidirectional=True, batch_first=layout == "batch_first", **more)
        for dtype, given in product((torch.float32, torch.bfloat16), (False, True)):
            x, options = torch.randn(5, 3, 6).to(dtype), {}
            states = torch.utils._pytree.tree_map(lambda state, dtype=dtype: state.to(dtype), states_of(module, 3))
            if layout == "batch_first":
                x = x.transpose(0, 1)
            elif layout == "unbatched":
                x, states = x[:, 0].clone(), torch.utils._pytree.tree_map(lambda state: state[:, 0].clone(), states)
            elif layout == "packed":
                x = pack_sequence([x[:n, b] for b, n in enumerate((2, 5, 3))], enforce_sorted=False)
            elif layout == "lengths":
                options["lengths"] = torch.tensor([2, 5, 0])
            elif layout == "resets":
                options["resets"] = torch.arange(15).reshape(5, 3) % 4 == 1
            yield module, x, states if given else None, options

    def both(self, run):
        """The results, and what whoever looks on is given."""
        with torch.autocast("cpu", torch.bfloat16):
            found = run()
        with torch.autocast("cpu", torch.bfloat16), watching(lambda query, chosen: None):
            return found, run()

    def test_inference(self, kind, layout):
        for module, x, hx, options in self.calls(kind, layout):
            if options.get("lengths") is None and hx is None:
                fastseq.pack(module.eval())  # no matter: packed weights are not those that autocast lowers
            run = partial(module, x, hx, **options)
            with torch.no_grad():
                with torch.autocast("cpu", torch.bfloat16):
                    assert calls_of(run) == [NATIVE]
                found, expected = self.both(lambda run=run: tensors_of(run()))
            for ours, theirs in zip(found, expected, strict=True):
                assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype and not ours.requires_grad
            fastseq.unpack(module)

    def test_training(self, kind, layout):
        for module, x, hx, options in self.calls(kind, layout, dropout=0.5):
            leaves = [*module.parameters(), x.data.requires_grad_() if layout == "packed" else x.requires_grad_()]

            def run(module=module, x=x, hx=hx, options=options, leaves=leaves):
                torch.manual_seed(0)
                outputs = tensors_of(module(x, hx, **options))
                weights = [torch.ones_like(out) for out in outputs]
                return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]

            found, expected = self.both(run)
            for ours, theirs in zip(found, expected, strict=True):
                assert ours.dtype == theirs.dtype
                torch.testing.assert_close(ours, theirs)
            assert {grad.dtype for grad in found[-len(leaves) : -1]} == {torch.float32}


def test_what_is_wrong_under_autocast_is_said():
    lstm, gru = fastseq.LSTM(6, 9), fastseq.GRU(6, 9)
    h = torch.zeros(1, 3, 9)
    with torch.autocast("cpu", torch.bfloat16):
        for steps in (1, 5):
            x = torch.randn(steps, 3, 6)
            for wrong in (lambda x=x: gru(x, (h,)), lambda x=x: lstm(x, h)):
                with pytest.raises((AttributeError, TypeError)):
                    wrong()
            for wrong in (lambda x=x: lstm(x[..., :5]), lambda x=x: gru(x, h[:, :2]), lambda x=x: lstm(x, (h, h[..., :8]))):
                with pytest.raises(RuntimeError):
                    wrong()


def test_a_wide_gru_under_autocast_is_torchs(monkeypatch):
    """Its products are in bfloat16 there, where those of ours, whose state is in float32, are not."""
    x, ours = torch.randn(3, 33, 4), fastseq.GRU(4, 256)
    torchs = nn.GRU(4, 256)
    torchs.load_state_dict(ours.state_dict())
    for level, calls in (("avx512_bf16", []), ("amx", []), ("avx2", [NATIVE])):
        monkeypatch.setattr("fastseq.modules.recurrent.cpu_level", lambda level=level: level)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert calls_of(lambda: ours(x)) == calls
            assert calls_of(lambda: ours(x[:, :8])) == [NATIVE] == calls_of(lambda: ours(x.bfloat16()))
            if not calls:
                assert torch.equal(ours(x)[0], torchs(x)[0])


class TestWhoeverLooksOn:
    """keeps the registered ops."""

    @pytest.mark.parametrize("mode", [Looks, LooksAtFunctions, lambda: FlopCounterMode(display=False)])
    def test_modes(self, mode):
        module, x = fastseq.LSTM(6, 9), torch.randn(3, 2, 6)
        with torch.no_grad(), mode():
            assert NATIVE not in calls_of(lambda: module(x))

    def test_flops_are_counted(self):
        module, x = fastseq.LSTM(6, 9), torch.randn(3, 2, 6)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(x)
        assert counter.get_total_flops() > 0

    def test_explain(self):
        for module, x in ((fastseq.LSTM(6, 9), torch.randn(3, 2, 6)), (fastseq.LSTMCell(6, 9), torch.randn(2, 6))):
            assert fastseq.explain(module, x).backends == ["cpu"]

    def test_forced_backends(self):
        module, x = fastseq.LSTM(6, 9), torch.randn(3, 2, 6)
        with torch.no_grad():
            with fastseq.use_backend("cpu"):
                assert calls_of(lambda: module(x)) == [NATIVE]
            for name in ("torch", "reference"):
                with fastseq.use_backend(name):
                    assert calls_of(lambda: module(x)) == []

    def test_gradients(self):
        module, x = fastseq.GRU(6, 9), torch.randn(3, 2, 6)
        assert NATIVE not in calls_of(lambda: module(x)) and module(x)[0].requires_grad
        module.requires_grad_(False)
        assert calls_of(lambda: module(x)) == [NATIVE]
        assert module(x.requires_grad_())[0].requires_grad

    def test_autocast(self):
        """Cells whose types nothing short knows."""
        module, x = fastseq.CoupledLSTM(6, 9), torch.randn(3, 2, 6)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert NATIVE not in calls_of(lambda: module(x))

    def test_transforms(self):
        module, x = fastseq.GRU(6, 9).requires_grad_(False), torch.randn(4, 3, 2, 6)
        assert NATIVE not in calls_of(lambda: torch.vmap(lambda own: module(own)[0])(x))
        assert NATIVE not in calls_of(lambda: torch.func.jvp(lambda own: module(own)[0], (x[0],), (x[1],)))
        with forward_ad.dual_level():
            assert NATIVE not in calls_of(lambda: module(forward_ad.make_dual(x[0], x[1])))

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:DeprecationWarning")
    def test_recorded(self):
        module, x = fastseq.GRU(6, 9).requires_grad_(False), torch.randn(3, 2, 6)
        for graph in (torch.jit.trace(module, x).graph, torch.export.export(module, (x,)).graph):
            assert "fastseq_native" not in str(graph)

    def test_subclasses(self):
        """One with a say in what is called on it; and parameters of any."""
        module, x = fastseq.GRU(6, 9).requires_grad_(False), torch.randn(3, 2, 6)
        for kind in (Says, Dispatches):
            assert NATIVE not in calls_of(lambda kind=kind: module(x.as_subclass(kind)))
            assert NATIVE not in calls_of(lambda kind=kind: module(x, torch.zeros(1, 2, 9).as_subclass(kind)))
        module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.as_subclass(Subclass), requires_grad=False)
        assert NATIVE not in calls_of(lambda: module(x))

    def test_replaced_parameters(self):
        module, x = fastseq.GRU(6, 9), torch.randn(3, 2, 6)
        nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
        module.requires_grad_(False)
        plain = fastseq.GRU(6, 9)
        plain.load_state_dict({name: getattr(module, name).detach() for name in module._flat_weights_names})
        with torch.no_grad():
            assert torch.equal(module(x)[0], plain(x)[0])
            module.parametrizations.weight_hh_l0.original0.mul_(2)
            assert not torch.equal(module(x)[0], plain(x)[0])
            doubled = {name: 2 * value for name, value in plain.state_dict().items()}
            assert torch.equal(torch.func.functional_call(plain, doubled, (x,))[0], fastseq_of(doubled)(x)[0])


def fastseq_of(state: dict[str, Tensor]) -> fastseq.GRU:
    module = fastseq.GRU(6, 9)
    module.load_state_dict(state)
    return module


def _wrong() -> dict[str, Callable[[], Any]]:
    lstm, gru, cell = fastseq.LSTM(6, 9), fastseq.GRU(6, 9), fastseq.GRUCell(6, 9)
    x, h, one = torch.randn(3, 2, 6), torch.zeros(1, 2, 9), torch.randn(2, 6)
    packed = pack_sequence([torch.randn(3, 6)])
    return {
        "no steps": lambda: lstm(x[:0]),
        "features": lambda: lstm(x[..., :5]),
        "dtype": lambda: lstm(x.double()),
        "integers": lambda: lstm(x.long()),
        "rank": lambda: lstm(x[None]),
        "no tensor": lambda: lstm([1.0]),
        "state of another batch": lambda: gru(x, h[:, :1]),
        "state of another width": lambda: gru(x, h[..., :8]),
        "state of another dtype": lambda: gru(x, h.double()),
        "unbatched state": lambda: gru(x, h[0]),
        "a tuple for h": lambda: gru(x, (h,)),
        "a pair for h": lambda: gru(x, (h, h)),
        "a tensor for a pair": lambda: lstm(x, h),
        "three states": lambda: lstm(x, (h, h, h)),
        "half a pair": lambda: lstm(x, (h, None)),
        "c of another width": lambda: lstm(x, (h, h[..., :8])),
        "meta state": lambda: gru(x, h.to("meta")),
        "lengths too long": lambda: lstm(x, lengths=torch.tensor([4, 1])),
        "lengths negative": lambda: lstm(x, lengths=torch.tensor([-1, 1])),
        "lengths of another batch": lambda: lstm(x, lengths=torch.tensor([1])),
        "lengths floating": lambda: lstm(x, lengths=torch.tensor([1.0, 2.0])),
        "lengths and packed": lambda: lstm(packed, lengths=torch.tensor([3])),
        "batch_sizes that grow": lambda: lstm(PackedSequence(torch.randn(3, 6), torch.tensor([1, 2]))),
        "batch_sizes too few": lambda: lstm(PackedSequence(torch.randn(3, 6), torch.tensor([2]))),
        "no batch_sizes": lambda: lstm(PackedSequence(torch.randn(3, 6), torch.tensor([], dtype=torch.int64))),
        "cell: features": lambda: cell(one[:, :5]),
        "cell: dtype": lambda: cell(one.double()),
        "cell: batch": lambda: cell(one, h[0, :1]),
        "cell: width": lambda: cell(one, h[0, :, :8]),
        "cell: rank": lambda: cell(x),
        "cell: state rank": lambda: cell(one, h),
        "cell: a tuple": lambda: cell(one, (h[0],)),
    }


@pytest.mark.parametrize("name", _wrong())
def test_errors_are_those_of_the_ops(name):
    with fastseq.use_backend("cpu"), torch.enable_grad(), pytest.raises(Exception) as expected:
        _wrong()[name]()
    with torch.no_grad(), pytest.raises(type(expected.value)) as found:
        _wrong()[name]()
    assert str(found.value) == str(expected.value)


def test_no_rows():
    module, x = fastseq.LSTM(6, 9), torch.randn(3, 0, 6)
    with torch.no_grad():
        output, (h_n, c_n) = module(x)
    assert output.shape == (3, 0, 9) and h_n.shape == c_n.shape == (1, 0, 9)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "PeepholeLSTM", "SLSTM", "LayerNormGRU"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_gradients_of_no_rows(kind, steps, bidirectional):
    module, x = getattr(fastseq, kind)(6, 9, bidirectional=bidirectional), torch.randn(steps, 0, 6, requires_grad=True)
    module(x)[0].sum().backward()
    assert x.grad.shape == x.shape
    assert not any(parameter.grad.any() for parameter in module.parameters())


@pytest.mark.parametrize("threads", [1, 2])
def test_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for steps, hidden in product((1, 30), (24, 300)):
            module, x = fastseq.LSTM(40, hidden, 2, bidirectional=True), torch.randn(steps, 20, 40)
            assert_same(lambda module=module, x=x: module(x))
    finally:
        torch.set_num_threads(before)


def test_inference_mode():
    module, x = fastseq.LSTM(6, 9), torch.randn(3, 2, 6)
    with torch.inference_mode():
        assert calls_of(lambda: module(x)) == [NATIVE]
        output, _ = module(x)
    assert output.is_inference()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_slstm_that_has_seen_nothing(dtype):
    """Its first step forgets all, whatever its gates say: the logarithm of what was seen is minus infinity, not 0."""
    torch.manual_seed(0)
    cell, layers = fastseq.SLSTMCell(9, 40, dtype=dtype), fastseq.SLSTM(9, 40, bidirectional=True, dtype=dtype)
    x = 3 * torch.randn(8, 9, dtype=dtype)
    for run in (lambda: cell(x), lambda: layers(x[None])[1]):
        with torch.no_grad():
            found = run()
            with fastseq.use_backend("reference"):
                expected = run()
        torch.testing.assert_close(found, expected)


OF_ONE_STEP = {
    "nothing": ({}, {}),
    "lengths": ({}, {"lengths": torch.arange(40) % 2}),
    "resets": ({}, {"resets": torch.arange(40)[None] % 3 == 0}),
    "zoneout": ({"zoneout": 0.3}, {}),
    "projection": ({"proj_size": 5}, {}),
}


@pytest.mark.parametrize(
    "kind, more", [pair for pair in product(("LSTM", "GRU", "RNN"), OF_ONE_STEP) if pair[0] == "LSTM" or pair[1] != "projection"]
)
def test_one_step_of_many_sequences(kind, more):
    """Which has kernels of its own: what these lack goes another way, in every layer and direction."""
    options, given = OF_ONE_STEP[more]
    module = getattr(fastseq, kind)(12, 20, 2, bidirectional=True, **options).eval()
    x, hx = torch.randn(1, 40, 12), states_of(module, 40)
    with torch.no_grad():
        assert calls_of(partial(module, x, hx, **given)) == [NATIVE]
        found = tensors_of(module(x, hx, **given))
        with fastseq.use_backend("reference"):
            torch.testing.assert_close(found, tensors_of(module(x, hx, **given)))


@pytest.mark.parametrize("largest", [1e4, 1e30, torch.inf])
@pytest.mark.parametrize("batch", [1, 3, 20])
def test_gates_that_are_open_or_shut_for_good(batch, largest):
    """Their sums are beyond what powers of e can be formed of."""
    torch.manual_seed(0)
    theirs, ours = nn.LSTM(8, 40), fastseq.LSTM(8, 40)
    with torch.no_grad():
        theirs.bias_ih_l0[::3] = largest
        theirs.bias_ih_l0[1::7] = -largest
        ours.load_state_dict(theirs.state_dict())
        x, exact = torch.randn(6, batch, 8), copy.deepcopy(theirs).double()
        assert_close_to_truth(ours(x)[0], theirs(x)[0], exact(x.double())[0])


@pytest.mark.parametrize("batch", [1, 3, 20])
def test_gates_that_are_shut(batch):
    """Sigmoids of numbers far below zero, of which few sequences have a form of their own."""
    torch.manual_seed(0)
    theirs, ours = nn.LSTM(8, 40), fastseq.LSTM(8, 40)
    with torch.no_grad():
        theirs.bias_ih_l0.copy_(torch.linspace(-40, 10, 160)[torch.randperm(160)])
        ours.load_state_dict(theirs.state_dict())
        x, exact = torch.randn(6, batch, 8), copy.deepcopy(theirs).double()
        assert_close_to_truth(ours(x)[0], theirs(x)[0], exact(x.double())[0])


class TestALayerAlone:
    """One layer in one direction, padded, has an op whose arguments are its parameters, one by one."""

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "relu"])
    def test_it_runs(self, kind, bias, training):
        module = CLASSES[kind](6, 9, bias=bias, batch_first=True).train(training)
        x, (lengths, resets) = torch.randn(2, 5, 6), (torch.tensor([5, 3]), torch.zeros(2, 5, dtype=torch.bool))
        with torch.no_grad():
            for given in ((x,), (x, states_of(module, 2)), (x.transpose(0, 1).contiguous().transpose(0, 1),)):
                assert ops_of(lambda given=given: module(*given)) == [ALONE]
            assert ops_of(lambda: module(x, lengths=lengths)) == ops_of(lambda: module(x, resets=resets)) == [NATIVE]
            with fastseq.use_backend("cpu"):
                assert ops_of(lambda: module(x)) == [ALONE]

    @pytest.mark.parametrize(
        ("kind", "options"),
        [
            ("LSTM", dict(num_layers=2)),
            ("GRU", dict(bidirectional=True)),
            ("LSTM", dict(proj_size=3)),
            ("LSTM", dict(zoneout=0.1)),
            ("CoupledLSTM", dict()),
            ("PeepholeLSTM", dict()),
        ],
    )
    def test_others_do_not(self, kind, options):
        module, x = CLASSES[kind](6, 8, **options).eval(), torch.randn(5, 2, 6)
        with torch.no_grad():
            assert ops_of(lambda: module(x)) == [NATIVE]

    def test_what_weight_dropout_and_heads_ask_for(self):
        x = torch.randn(5, 2, 6)
        dropped, heads = fastseq.LSTM(6, 8, weight_dropout=1.0), fastseq.LSTM(6, 8, num_heads=2)
        with torch.no_grad():
            assert ops_of(lambda: dropped(x)) == ops_of(lambda: heads(x)) == [OP]
            assert ops_of(lambda: dropped.eval()(x)) == [ALONE]

    def test_weights_that_are_computed_are_those_of_now(self):
        """A parametrization takes a parameter away from its place; pruning leaves a tensor there that is none."""
        x = torch.randn(5, 2, 6)
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            module = fastseq.LSTM(6, 8).eval()
            nn.utils.parametrize.register_parametrization(module, name, Doubled())
            twin = nn.LSTM(6, 8)
            twin.load_state_dict({key: getattr(module, key).detach() for key in twin.state_dict()})
            with torch.no_grad():
                torch.testing.assert_close(module(x), twin(x))
                assert ALONE not in ops_of(lambda module=module: module(x))

    def test_what_is_no_state_raises_what_it_did(self):
        x, h = torch.randn(5, 2, 6), torch.randn(1, 2, 8)
        lstm, gru = fastseq.LSTM(6, 8).eval(), fastseq.GRU(6, 8).eval()
        with torch.no_grad():
            for module, hx in ((lstm, h), (lstm, (h,)), (lstm, (None, None)), (lstm, (h, None)), (gru, (h, h)), (gru, 3)):
                with pytest.raises((AttributeError, TypeError, RuntimeError)):
                    module(x, hx)

    def test_torchs_kernel_is_the_one_where_it_is_the_faster_one(self):
        module, x = fastseq.LSTM(6, 8).eval(), torch.randn(5, 2, 6)
        with torch.no_grad(), sources.instead(lambda call: Candidate("torch")):
            assert ops_of(lambda: module(x)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTMCell", "GRUCell"])
def test_nothing_that_a_call_is_given_is_held(kind, packed, dtype):
    """The ops of a layer alone and of a cell take their arguments from the dispatcher by hand, and have to let go of each."""
    alone = kind.endswith("Cell")
    module = getattr(fastseq, kind)(6, 8, dtype=dtype).eval()
    if packed:
        fastseq.pack(module)
    x, h, c = (torch.randn(2, size, dtype=dtype) if alone else torch.randn(1, 2, size, dtype=dtype) for size in (6, 8, 8))
    states = (h, c) if kind.startswith("LSTM") else h
    with torch.no_grad():
        module(x, states)
        given = [x, h, c, *module.parameters()]
        before = [tensor._use_count() for tensor in given]
        results = [tensors_of(module(x, state)) for state in (states, states, None)]
        assert ops_of(lambda: module(x, states)) == [STEP if alone else ALONE] or packed
    assert [tensor._use_count() for tensor in given] == before
    assert all(result._use_count() == 1 for call in results for result in call)


class Doubled(nn.Module):
    def forward(self, parameter: Tensor) -> Tensor:
        return 2 * parameter
