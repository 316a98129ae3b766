"""`pack`: weights kept for inference, as exact as they say, never stale, used in eager calls without gradients alone."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import fastseq
from fastseq.backends import library
from fastseq.functional._packing import Packing, packing_of
from fastseq.modules import recurrent, recurrent_cells
from support.recurrent import MODULES_OF_VARIANTS

pytestmark = pytest.mark.skipif(library.reason() is not None, reason="needs the library")

MODULES: dict[str, Callable[..., Any]] = {
    "LSTM": fastseq.LSTM,
    "GRU": fastseq.GRU,
    "RNN": fastseq.RNN,
    "projected": lambda *args, **kwargs: fastseq.LSTM(*args, proj_size=6, **kwargs),
    "LayerNormLSTM projected": lambda *args, **kwargs: fastseq.LayerNormLSTM(*args, proj_size=6, **kwargs),
    **{name: getattr(fastseq, name) for name in MODULES_OF_VARIANTS},
}
CELLS = {f"{name}Cell": getattr(fastseq, f"{name}Cell") for name in ("LSTM", "GRU", "RNN", *MODULES_OF_VARIANTS)}
FORMATS = (None, torch.bfloat16, torch.int8)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def flat(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    if hasattr(results, "data") and hasattr(results, "batch_sizes"):
        return [results.data]
    return [tensor for part in results for tensor in flat(part)]


def rounded(module: Any, weights: torch.dtype | None) -> Any:
    """The module with the weights that a format stands for, in fp64."""
    twin = copy.deepcopy(module)
    for name, parameter in twin.named_parameters():
        if name.startswith(("weight_ih", "weight_hh")) and parameter.dtype == torch.float32:
            if weights == torch.bfloat16:
                parameter.copy_(parameter.bfloat16())
            elif weights == torch.int8:
                most = parameter.abs().amax(1, keepdim=True)
                parameter.copy_((parameter / most * 127).round() * (most / 127))
    return twin.double()


def most(error: Tensor) -> float:
    return error.abs().max().item()


def usual(error: Tensor) -> float:
    """For layer norm, which lifts the roundings of a row of small variance by as much as it lifts the row: the largest errors are
    a matter of chance, and only bounded by ten thousand times the median."""
    return max(error.abs().median().item(), most(error) / 10_000)


def assert_as_exact(ours: Any, unpacked: Any, exact: Any, size: Callable[[Tensor], float] = most) -> None:
    """At most twice the error that the same numbers leave without packing, and two roundings."""
    for found, before, truth in zip(flat(ours), flat(unpacked), flat(exact), strict=True):
        allowed = 2 * size(before.double() - truth) + 2 * torch.finfo(found.dtype).eps * max(1.0, truth.abs().max().item())
        assert found.dtype == before.dtype and size(found.double() - truth) <= allowed


def inputs_of(module: Any, steps: int, batch: int) -> tuple[Tensor, ...]:
    dtype = next(module.parameters()).dtype
    shape = (batch,) if isinstance(module, nn.RNNCellBase) else (steps, batch)
    return (torch.randn(*shape, module.input_size, dtype=dtype),)


def as_double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else tuple(as_double(part) for part in value)


def times_packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    count = [0]
    before = Packing.again

    def again(self, params):
        count[0] += 1
        return before(self, params)

    monkeypatch.setattr(Packing, "again", again)
    return count


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("level", ["default", "avx2", "avx512", "avx512_bf16", "amx"])
@pytest.mark.parametrize("kind", [*MODULES, *CELLS])
def test_values(kind, level, weights, monkeypatch):
    """Against fp64 with the rounded weights: what fp32 leaves, at every length, however many rows."""
    monkeypatch.setenv("FASTSEQ_CPU_LEVEL", level)
    if torch.ops.fastseq_native.cpu_level() != level:
        pytest.skip(f"this processor has no {level}")
    if kind in CELLS:
        module = CELLS[kind](19, 37).eval()
    else:
        module = MODULES[kind](19, 37, 2, bidirectional=True).eval()
    truth = rounded(module, weights)
    unpacked = copy.deepcopy(truth).float()
    assert len(fastseq.pack(module, weights)) == 1
    for steps, batch in ((1, 1), (3, 2), (1, 9), (20, 33)):
        given = inputs_of(module, steps, batch)
        assert_as_exact(module(*given), unpacked(*given), truth(*as_double(given)), usual if "Norm" in kind else most)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", MODULES)
def test_own_dtype_as_exact_as_unpacked(kind, dtype):
    module = MODULES[kind](19, 70, 2, dtype=dtype).eval()
    truth = copy.deepcopy(module).double()
    for steps, batch in ((1, 1), (4, 3), (30, 5)):
        given = inputs_of(module, steps, batch)
        unpacked = module(*given)
        fastseq.pack(module)
        with fastseq.use_backend("reference"):  # other roundings than the unpacked kernels', in float64 too
            exact = truth(*as_double(given))
        assert_as_exact(module(*given), unpacked, exact, usual if "Norm" in kind else most)
        fastseq.unpack(module)


VARIANTS = [name for name in MODULES if name not in ("LSTM", "GRU", "RNN", "projected")]


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("kind", VARIANTS)
class TestVariants:
    def test_states_and_layouts(self, kind, weights):
        """Given states, sequences of several lengths and a cell without biases."""
        torch.manual_seed(0)
        for bias in (True, False):
            module = MODULES[kind](9, 40, 2, bidirectional=True, bias=bias).eval()
            truth = rounded(module, weights)
            unpacked = copy.deepcopy(truth).float()
            fastseq.pack(module, weights)
            (x,) = inputs_of(module, 7, 3)
            finals = unpacked(x)[1]
            hx = (
                tuple(torch.randn_like(state).abs() for state in finals)
                if isinstance(finals, tuple)
                else torch.randn_like(finals)
            )
            rows = pack_sequence([torch.randn(n, 9) for n in (2, 5, 1)], enforce_sorted=False)
            for call in (
                lambda m, d, x=x, hx=hx: m(d(x), as_double(hx) if d is as_double else hx),
                lambda m, d, x=x: m(d(x)),
                lambda m, d, x=x: m(d(x), lengths=torch.tensor([5, 1, 2])),
                lambda m, d, rows=rows: m(rows._replace(data=d(rows.data))),
            ):
                with fastseq.use_backend("reference"):
                    exact = call(truth, as_double)
                results = [call(m, lambda t: t) for m in (module, unpacked)]
                assert_as_exact(*results, exact, usual if "Norm" in kind else most)

    def test_never_stale(self, kind, weights):
        module = MODULES[kind](9, 40).eval()
        (x,) = inputs_of(module, 4, 2)
        fastseq.pack(module, weights)
        before = module(x)[0]
        for name, parameter in module.named_parameters():
            parameter.mul_(-2).add_(0.1)
            truth = rounded(module, weights)
            unpacked = copy.deepcopy(truth).float()
            assert_as_exact(module(x)[0], unpacked(x)[0], truth(x.double())[0], usual if "Norm" in kind else most)
            assert not torch.equal(module(x)[0], before), name
            before = module(x)[0]

    def test_one_native_call(self, kind, weights):
        cell = f"{kind.split()[0]}Cell"
        apart = kind != "SLSTM"  # whose states beside h the op gives back as one
        for module, op in ((MODULES[kind](9, 40, 2), "packed" if apart else "layers"), (CELLS[cell](9, 40), "layers")):
            fastseq.pack(module.eval(), weights)
            given = inputs_of(module, 3, 2)
            module(*given)
            with profile(activities=[ProfilerActivity.CPU]) as recorded:
                module(*given)
            names = [event.name for event in recorded.events() if event.name.startswith("fastseq")]
            assert names == [f"fastseq_native::recurrent_{op}"]


@pytest.mark.parametrize("weights", FORMATS)
def test_every_layout(weights):
    module = fastseq.LSTM(8, 48, batch_first=True).eval()
    truth = rounded(module, weights)
    unpacked = copy.deepcopy(truth).float()
    fastseq.pack(module, weights)
    x, h, c = torch.randn(3, 5, 8), torch.randn(1, 3, 48), torch.randn(1, 3, 48)
    rows = pack_sequence([torch.randn(n, 8) for n in (2, 5, 1)], enforce_sorted=False)
    for call in (
        lambda m, d: m(d(x), (d(h), d(c))),
        lambda m, d: m(d(x[0]), (d(h[:, 0]), d(c[:, 0]))),
        lambda m, d: m(d(x), lengths=torch.tensor([5, 0, 2])),
        lambda m, d: m(rows._replace(data=d(rows.data)), (d(h), d(c))),
    ):
        assert_as_exact(call(module, lambda t: t), call(unpacked, lambda t: t), call(truth, Tensor.double))


class TestNeverStale:
    """Whatever becomes of the parameters, a call is of them as they are."""

    @pytest.fixture(params=FORMATS, ids=str)
    def weights(self, request):
        return request.param

    def check(self, module: Any, weights: torch.dtype | None, x: Tensor) -> None:
        fresh = copy.deepcopy(module)
        fastseq.unpack(fresh)
        fastseq.pack(fresh, weights)
        for ours, expected in zip(flat(module(x)), flat(fresh(x)), strict=True):
            assert torch.equal(ours, expected)

    @pytest.fixture
    def module(self, weights):
        module = fastseq.GRU(8, 24, 2).eval()
        fastseq.pack(module, weights)
        return module

    def changed(self, module: Any, weights: torch.dtype | None, change: Callable[[], Any]) -> None:
        x = torch.randn(2, 1, 8)
        before = module(x)[0]
        change()
        assert not torch.equal(module(x)[0], before)
        self.check(module, weights, x)

    def test_in_place(self, module, weights):
        for name in ("weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1", "bias_ih_l0", "bias_hh_l1"):
            self.changed(module, weights, lambda name=name: getattr(module, name)[3].add_(0.5))

    def test_replaced(self, module, weights):
        self.changed(module, weights, lambda: setattr(module, "weight_hh_l1", nn.Parameter(torch.randn(72, 24))))

    def test_data_replaced(self, module, weights):
        def replace():
            module.weight_hh_l0.data = torch.randn(72, 24)

        self.changed(module, weights, replace)

    def test_data_written(self, module, weights):
        """Which PyTorch does not count."""
        self.changed(module, weights, lambda: module.weight_ih_l0.data.mul_(2))
        self.changed(module, weights, lambda: module.weight_hh_l1.data.copy_(torch.randn(72, 24)))

    def test_loaded(self, module, weights):
        other = fastseq.GRU(8, 24, 2).state_dict()
        self.changed(module, weights, lambda: module.load_state_dict(other))
        self.changed(module, weights, lambda: module.load_state_dict({k: 2 * v for k, v in other.items()}, assign=True))

    def test_trained(self, module, weights):
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)

        def train():
            module.train()
            with torch.enable_grad():
                module(torch.randn(4, 3, 8))[0].sum().backward()
            optimizer.step()
            module.eval()

        self.changed(module, weights, train)

    def test_moved(self, module, weights):
        x = torch.randn(2, 1, 8)
        before = module(x)[0]
        module.to(torch.float64)  # packed so, or, of rounded weights, not used
        torch.testing.assert_close(module(x.double())[0].float(), before, rtol=0, atol=0.05)
        assert module(x.double())[0].dtype == torch.float64
        assert module.to("meta")(x.double().to("meta"))[0].device.type == "meta"

    def test_level_lowered(self, module, weights, monkeypatch):
        x = torch.randn(2, 1, 8)
        before = module(x)[0]
        for level in ("default", "avx2", "avx512"):
            monkeypatch.setenv("FASTSEQ_CPU_LEVEL", level)
            torch.testing.assert_close(module(x)[0], before, rtol=0, atol=1e-6)

    def test_copied(self, module, weights):
        twin, x = copy.deepcopy(module), torch.randn(2, 1, 8)
        twin.weight_hh_l0.mul_(2)
        self.check(twin, weights, x)
        self.check(module, weights, x)
        assert not torch.equal(twin(x)[0], module(x)[0])

    def test_pickled(self, module, weights):
        x = torch.randn(2, 1, 8)
        size = len(pickle.dumps(module))
        twin = pickle.loads(pickle.dumps(module))
        assert torch.equal(twin(x)[0], module(x)[0]) and packing_of(twin).weights == weights
        fastseq.unpack(module)
        assert size - len(pickle.dumps(module)) < 1000
        stream = io.BytesIO()
        torch.save(twin, stream)
        stream.seek(0)
        assert torch.equal(torch.load(stream, weights_only=False)(x)[0], twin(x)[0])

    def test_state_dict(self, module, weights):
        names = set(module.state_dict())
        fastseq.unpack(module)
        assert set(module.state_dict()) == names

    def test_inference_parameters(self, module, weights):
        """They do not count their changes."""
        with torch.inference_mode():
            module.weight_hh_l0 = nn.Parameter(torch.randn(72, 24))
        x = torch.randn(2, 1, 8)
        fresh = fastseq.GRU(8, 24, 2).eval()
        fresh.load_state_dict(module.state_dict())
        torch.testing.assert_close(module(x)[0], fresh(x)[0], rtol=0, atol=1e-6)


def test_packed_once(monkeypatch):
    module, x = fastseq.LSTM(8, 16).eval(), torch.randn(2, 1, 8)
    fastseq.pack(module)
    count = times_packed(monkeypatch)
    for _ in range(3):
        module(x)
    assert count == [0]
    module.weight_hh_l0.mul_(2)
    for _ in range(3):
        module(x)
    assert count == [1]
    with pytest.raises(RuntimeError, match="input.size"):
        module(x[..., :7])


class TestOnlyThen:
    """Calls that pack does not serve are those of the unpacked module, to the bit."""

    def test_training_and_gradients(self):
        module, x = fastseq.LSTM(8, 16), torch.randn(3, 2, 8)
        expected = module(x)[0]
        report = fastseq.pack(module, torch.int8)
        assert "after model.eval()" in report.packed[0].note
        assert torch.equal(module(x)[0], expected)
        module.eval()
        assert not torch.equal(module(x)[0], expected)
        with torch.enable_grad():
            assert torch.equal(module(x)[0], expected) or module(x)[0].requires_grad
            torch.testing.assert_close(module(x)[0], expected, rtol=0, atol=1e-6)
            assert "torch.no_grad()" in str(fastseq.pack(module, torch.int8))

    @pytest.mark.parametrize("kind", CELLS)
    def test_cells_in_training(self, kind):
        cell, x = CELLS[kind](8, 16), torch.randn(3, 8)
        states = cell(x)  # that lead to others than zeros do
        expected = flat(cell(x, states))
        fastseq.pack(cell, torch.int8)
        assert all(torch.equal(a, e) for a, e in zip(flat(cell(x, states)), expected, strict=True))
        cell.eval()
        assert not torch.equal(flat(cell(x, states))[0], expected[0])

    def test_autocast_and_transforms(self):
        module, x = fastseq.GRU(8, 16).eval(), torch.randn(3, 2, 8)
        with torch.autocast("cpu", torch.bfloat16):
            lowered = module(x)[0]
        mapped = torch.vmap(lambda row: module(row)[0])(x[None])
        fastseq.pack(module, torch.int8)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(module(x)[0], lowered)
        assert torch.equal(torch.vmap(lambda row: module(row)[0])(x[None]), mapped)

    def test_forced_backends(self):
        module, x = fastseq.GRU(8, 16).eval(), torch.randn(3, 2, 8)
        fastseq.pack(module, torch.int8)
        with fastseq.use_backend("reference"):
            expected = module(x)[0]
        fastseq.unpack(module)
        with fastseq.use_backend("reference"):
            assert torch.equal(module(x)[0], expected)


class Observed(Tensor):
    """A subclass, which has a say in what is called on it."""

    seen = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen += 1
        return super().__torch_function__(function, types, args, kwargs or {})


class Heard(TorchDispatchMode):
    """Looks on."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("weights", FORMATS, ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
class TestShortWay:
    """What the few questions of a packed call of plain tensors must not overlook."""

    def made(self, kind, weights):
        module = getattr(fastseq, kind)(8, 24).eval()
        fastseq.pack(module, weights)
        shape = (2,) if kind.endswith("Cell") else (1, 2)
        states = [torch.randn(*shape, 24) for _ in range(2 if kind.startswith("LSTM") else 1)]
        return module, torch.randn(*shape, 8), tuple(states) if len(states) > 1 else states[0]

    def test_short(self, kind, weights):
        """It is taken at all: no other function asks anything."""
        module, x, hx = self.made(kind, weights)
        with pytest.MonkeyPatch.context() as patch:
            for place in (recurrent, recurrent_cells):
                patch.setattr(place, "native_layers", None)
            patch.setattr(recurrent.Sequence, "_run", None)
            patch.setattr(recurrent_cells, "_step", None)
            module(x, hx), module(x)

    def test_hooks(self, kind, weights):
        module, x, hx = self.made(kind, weights)
        expected = flat(module(2 * x, hx))
        module.register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))
        assert all(torch.equal(a, b) for a, b in zip(flat(module(x, hx)), expected, strict=True))

    def test_modes_and_subclasses(self, kind, weights):
        module, x, hx = self.made(kind, weights)
        expected = flat(module(x, hx))
        with Heard() as heard:
            found = flat(module(x, hx))
        assert heard.names and not any("native.recurrent" in name for name in heard.names)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0.05 if weights else 1e-5)
        Observed.seen = 0
        module(x.as_subclass(Observed), hx)
        assert Observed.seen
        Observed.seen = 0
        module(x, tuple(state.as_subclass(Observed) for state in hx) if isinstance(hx, tuple) else hx.as_subclass(Observed))
        assert Observed.seen

    def test_other_parameters(self, kind, weights):
        """Given for a call, or written, replaced and taken away where nothing is asked of the module."""
        module, x, hx = self.made(kind, weights)
        twice = {name: 2 * parameter for name, parameter in module.named_parameters()}
        called = flat(torch.func.functional_call(module, twice, (x, hx)))
        for name in [name for name, _ in module.named_parameters()]:
            before = flat(module(x, hx))
            module._parameters[name] = nn.Parameter(twice[name])
            assert not torch.equal(flat(module(x, hx))[0], before[0]), name
        assert all(torch.equal(a, b) for a, b in zip(flat(module(x, hx)), called, strict=True))

    def test_odd_calls(self, kind, weights):
        """As of the module without packing: what is raised, and tensors that do not lie as the kernels read them."""
        module, x, hx = self.made(kind, weights)
        odd = [(x[..., :7], hx), (x.double(), hx), (x.to("meta"), hx), (x, "state"), (x, ()), (x[:0], hx), (x[0], hx)]
        odd += [(x, (hx[0],) if isinstance(hx, tuple) else (hx, hx)), (x, 3 * (x,)), (None, hx)]
        odd += [(x, (None, None)), (x, (None,)), (x, (hx[0], None))]
        results = []
        for _ in range(2):
            results.append([])
            for given in odd:
                try:
                    results[-1].append([tuple(tensor.shape) for tensor in flat(module(*given))])
                except Exception as error:
                    results[-1].append((type(error), str(error)))
            fastseq.unpack(module)
        assert results[0] == results[1]
        fastseq.pack(module, weights)
        apart = torch.randn(*x.shape[:-1], 16)[..., ::2]
        far = tuple(torch.stack((state, state), -1)[..., 0] for state in (hx if isinstance(hx, tuple) else (hx,)))
        found = module(apart, far if len(far) > 1 else far[0])
        for a, b in zip(flat(found), flat(module(apart.contiguous(), hx)), strict=True):
            assert torch.equal(a, b)


def test_explain():
    module, x = fastseq.LSTM(8, 16, 2).eval(), torch.randn(3, 2, 8)
    fastseq.pack(module, torch.int8)
    explained = fastseq.explain(module, x)
    assert explained.backends == ["cpu"] and "weights packed in int8" in str(explained)


def test_threads():
    module, x = fastseq.LSTM(16, 64).eval(), torch.randn(2, 1, 16)
    fastseq.pack(module, torch.bfloat16)
    expected, wrong = module(x)[0].clone(), []
    scaled = {key: value.clone() for key, value in module.state_dict().items()}

    def run():
        with torch.no_grad():
            for _ in range(200):
                if not torch.equal(module(x)[0], expected):
                    wrong.append(1)

    def write():
        with torch.no_grad():
            for _ in range(50):  # the same values, counted as changes
                module.load_state_dict(scaled)

    threads = [threading.Thread(target=run) for _ in range(4)] + [threading.Thread(target=write)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _in_child(module: Any, x: Tensor, queue: Any) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        same = module(x)[0].tolist()
        module.weight_hh_l0.mul_(2)
        queue.put((same, module(x)[0].tolist()))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork():
    module, x = fastseq.LSTM(16, 32).eval(), torch.randn(2, 1, 16)
    fastseq.pack(module)
    expected = module(x)[0].tolist()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_in_child, args=(module, x, queue))
    process.start()
    same, other = queue.get(timeout=60)
    process.join()
    assert same == expected != other
    assert module(x)[0].tolist() == expected
    twin = copy.deepcopy(module)
    twin.weight_hh_l0.mul_(2)
    assert twin(x)[0].tolist() == other


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.ours, self.theirs = fastseq.LSTM(8, 64), nn.GRU(64, 64)
        self.cell, self.heads, self.norm = fastseq.GRUCell(64, 64), fastseq.GRU(8, 16, num_heads=2), fastseq.LayerNormLSTM(8, 16)
        self.variant, self.half = fastseq.CoupledLSTMCell(8, 8), fastseq.LSTM(8, 8, dtype=torch.float16)

    def forward(self, tokens: Tensor) -> dict[str, Any]:
        output, (h, _) = self.ours(self.embed(tokens))
        return {"output": output, "step": self.cell(h[0]), "tokens": tokens}


class TestReport:
    def test_of_a_model(self):
        model = Model().eval().requires_grad_(False)
        report = fastseq.pack(model, torch.int8, example=torch.randint(10, (5, 2)))
        assert [row.name for row in report.packed] == ["ours", "cell", "norm", "variant"] and report and len(report) == 4
        reasons = {row.name: row.note for row in report.skipped}
        assert set(reasons) == {"theirs", "heads", "half"}
        assert "convert it first" in reasons["theirs"] and "num_heads" in reasons["heads"] and "float16" in reasons["half"]
        assert set(report.errors) == {"['output']", "['step']"}
        assert all(0 < own < 0.05 and largest < 0.05 for largest, own in report.errors.values())
        before = 4 * (4 * 64 * (8 + 64) + 3 * 64 * (64 + 64) + 4 * 16 * (8 + 16) + 3 * 8 * (8 + 8))
        assert sum(row.bytes_before for row in report.packed) == before
        assert before * 0.5 < report.bytes_saved < before * 0.75
        text = str(report)
        assert "4 changed, 3 left alone" in text and "relative rms" in text

    def test_unpack(self):
        model = Model().eval()
        fastseq.pack(model)
        assert [row.name for row in fastseq.unpack(model).packed] == ["ours", "cell", "norm", "variant", "half"]
        assert not fastseq.unpack(model) and packing_of(model.ours) is None

    def test_other_devices_and_kinds(self):
        assert "on meta" in fastseq.pack(fastseq.LSTM(8, 8, device="meta")).skipped[0].note
        assert "made of float32" in fastseq.pack(fastseq.LSTM(8, 8).double(), torch.int8).skipped[0].note
        assert fastseq.pack(fastseq.LSTM(8, 8).bfloat16(), torch.bfloat16).packed[0].weights == "bfloat16"
        parametrized = fastseq.LSTM(8, 8)
        nn.utils.parametrizations.weight_norm(parametrized, "weight_hh_l0")
        assert "made anew" in fastseq.pack(parametrized).skipped[0].note
        with torch.inference_mode():
            module = fastseq.LSTM(8, 8)
        assert "inference mode" in fastseq.pack(module).skipped[0].note

    def test_reverted(self):
        model = nn.Sequential(nn.LSTM(8, 8)).eval()
        fastseq.convert(model)
        fastseq.pack(model)
        fastseq.revert(model)
        assert type(model[0]) is nn.LSTM and packing_of(model[0]) is None

    def test_there_is_nothing_to_pack(self):
        for function in (fastseq.pack, fastseq.unpack):
            words = f"fastseq.{function.__name__}: 0 changed, 0 left alone; there is nothing to {function.__name__}"
            assert str(function(nn.Linear(2, 2))) == words

    def test_wrong(self):
        with pytest.raises(TypeError, match="nn.Module, got list"):
            fastseq.pack([])
        with pytest.raises(TypeError, match="nn.Module, got list"):
            fastseq.unpack([])
        with pytest.raises(TypeError, match="torch.dtype or None, got 'int8'"):
            fastseq.pack(fastseq.LSTM(2, 2), "int8")
        with pytest.raises(ValueError, match="torch.bfloat16 or torch.int8, got torch.float16"):
            fastseq.pack(fastseq.LSTM(2, 2), torch.float16)
        with pytest.raises(TypeError, match="example"):
            fastseq.pack(fastseq.LSTM(2, 2), example=1)


@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="torch has no dynamic quantization here")
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_int8_beside_quantize_dynamic(kind):
    """torch rounds activations too: to int8, and its weights with one scale for each."""
    torch.manual_seed(0)
    theirs = getattr(nn, kind)(64, 128, 2).eval()
    x = torch.randn(30, 4, 64)
    exact = copy.deepcopy(theirs).double()(x.double())[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(nn.Sequential(copy.deepcopy(theirs)), {type(theirs)}, torch.qint8)
        assert type(model[0]) is not type(theirs)
        quantized = model(x)[0]
    ours = getattr(fastseq, kind)(64, 128, 2).eval()
    ours.load_state_dict(theirs.state_dict())
    fastseq.pack(ours, torch.int8)
    error, other = ((result.double() - exact).square().mean().sqrt() for result in (ours(x)[0], quantized))
    assert 0 < error <= other
