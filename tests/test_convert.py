"""convert, revert and patched, on models as people write them."""

from __future__ import annotations

import abc
import copy
import importlib
import io
import pickle
import random
import re
import sys
import threading
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastseq
from fastseq import Report, backends, convert, patched, revert
from fastseq._convert.table import CONVERSIONS
from fastseq.backends import library
from fastseq.choice import lengths, sources
from fastseq.modules import keep_type as kept
from fastseq.testing import assert_close_to_truth

SEQUENCES = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")


def torch_class(name: str) -> type[nn.Module]:
    return getattr(nn, name)


def own_class(name: str) -> type[nn.Module]:
    return getattr(fastseq.modules, name)


class Tagger(nn.Module):
    """A label for every token: [B, T] -> [B, T, 5]."""

    def __init__(self, kind: str = "LSTM", **options):
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        options = {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.2} | options
        self.rnn = getattr(nn, kind)(6, 7, **options)
        self.head = nn.Linear(14, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(tokens))[0])

    @staticmethod
    def example() -> tuple[Tensor]:
        return (torch.randint(0, 20, (3, 9), generator=torch.Generator().manual_seed(1)),)


class Translator(nn.Module):
    """Encoder and decoder are one and the same GRU, the output layer shares the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.encoder = nn.GRU(6, 6)
        self.decoder = self.encoder
        self.head = nn.Linear(6, 20)
        self.head.weight = self.embedding.weight

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        _, state = self.encoder(self.embedding(source))
        return self.head(self.decoder(self.embedding(target), state)[0])

    @staticmethod
    def example() -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, 20, (8, 3), generator=generator), torch.randint(0, 20, (5, 3), generator=generator)


class Looper(nn.Module):
    """A loop over an LSTMCell and a GRUCell, in time-major order."""

    def __init__(self):
        super().__init__()
        self.lower = nn.LSTMCell(4, 6)
        self.upper = nn.GRUCell(6, 5)

    def forward(self, steps: Tensor) -> Tensor:
        state, top, tops = None, None, []
        for step in steps:
            state = self.lower(step, state)
            top = self.upper(state[0], top)
            tops.append(top)
        return torch.stack(tops)

    @staticmethod
    def example() -> tuple[Tensor]:
        return (torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(1)),)


class Packer(nn.Module):
    """Rows of different lengths through a PackedSequence, not sorted."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 6, num_layers=2, bidirectional=True, proj_size=3)

    def forward(self, steps: Tensor, lengths: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        packed = pack_padded_sequence(steps, lengths, enforce_sorted=False)
        output, states = self.rnn(packed)
        return pad_packed_sequence(output)[0], states

    @staticmethod
    def example() -> tuple[Tensor, Tensor]:
        return torch.randn(7, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 7, 1, 5])


class Elman(nn.Module):
    """A stack of both nonlinearities, without biases, and a cell."""

    def __init__(self):
        super().__init__()
        self.lower = nn.RNN(4, 6, nonlinearity="relu", bias=False)
        self.upper = nn.RNN(6, 6)
        self.last = nn.RNNCell(6, 6, nonlinearity="relu")

    def forward(self, steps: Tensor) -> Tensor:
        output, state = self.upper(self.lower(steps)[0])
        return self.last(output[-1], state[0])

    @staticmethod
    def example() -> tuple[Tensor]:
        return (torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(1)),)


class Normed(nn.Module):
    """Old-style weight normalization: a hook computes weight_hh_l0 before every call."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(self.rnn, "weight_hh_l0")
            nn.utils.weight_norm(self.rnn, "weight_ih_l0")

    def forward(self, steps: Tensor) -> Tensor:
        return self.rnn(steps)[0]

    @staticmethod
    def example() -> tuple[Tensor]:
        return (torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(1)),)


MODELS = [Tagger, Translator, Looper, Packer, Elman, Normed]


@pytest.fixture(autouse=True)
def _seed_and_one_thread():
    """Tiny models: a second thread would only wait for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def results(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """Outputs in eval and training, and every gradient, always from the same random state."""
    values: dict[str, Tensor] = {}
    for training in (False, True):
        torch.manual_seed(3)
        model.train(training)
        output = model(*inputs)
        flat = torch.utils._pytree.tree_leaves(output)
        values |= {f"output {i}, training={training}": tensor.detach() for i, tensor in enumerate(flat)}
    model.zero_grad()
    sum((tensor * tensor).sum() for tensor in flat).backward()
    values |= {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return values


def in_double(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs)


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


class TestSameModel:
    @pytest.mark.parametrize("kind", MODELS)
    @pytest.mark.parametrize("keep_type", [False, True])
    def test_results_and_gradients(self, kind, keep_type):
        model, inputs = kind(), kind.example()
        exact = kind().double()  # old weight_norm has no deepcopy
        exact.load_state_dict(model.state_dict())
        truth = results(exact, *in_double(inputs))
        before = results(model, *inputs)
        report = convert(model, keep_type=keep_type)
        assert report and not report.skipped
        after = results(model, *inputs)
        assert after.keys() == before.keys()
        for name in before:
            assert_close_to_truth(after[name], before[name], truth[name], name)

    @pytest.mark.parametrize("kind", MODELS)
    def test_everything_in_it_stays(self, kind):
        model = kind()
        parameters = {name: id(p) for name, p in model.named_parameters()}
        addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        modules = {name: id(module) for name, module in model.named_modules()}
        convert(model)
        assert {name: id(p) for name, p in model.named_parameters()} == parameters
        assert {name: p.data_ptr() for name, p in model.named_parameters()} == addresses
        assert {name: id(module) for name, module in model.named_modules()} == modules
        assert list(model.state_dict()) == list(state)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name])
        kind().load_state_dict(model.state_dict())

    @pytest.mark.parametrize("name", SEQUENCES + CELLS)
    def test_the_model_itself(self, name):
        module = torch_class(name)(4, 6)
        report = convert(module)
        assert type(module) is own_class(name)
        assert [row.names for row in report.converted] == [("",)]
        assert "(model)" in str(report)
        revert(module)
        assert type(module) is torch_class(name)

    def test_hooks_stay(self):
        model = Tagger()
        calls = []
        model.rnn.register_forward_pre_hook(lambda module, args: calls.append(("pre", type(module))))
        model.rnn.register_forward_hook(lambda module, args, output: calls.append(("post", type(module))))
        convert(model)
        model(*Tagger.example())
        assert calls == [("pre", fastseq.modules.LSTM), ("post", fastseq.modules.LSTM)]

    def test_optimizer_made_before(self):
        model, inputs = Tagger(dropout=0.0), Tagger.example()
        reference = copy.deepcopy(model)
        losses: dict[str, list[float]] = {}
        for name, trained in (("torch", reference), ("converted", model)):
            optimizer = torch.optim.Adam(trained.parameters(), 0.05)
            losses[name] = []
            for step in range(12):
                if step == 4 and trained is model:
                    convert(model)
                optimizer.zero_grad()
                loss = trained(*inputs).logsumexp(-1).mean()
                loss.backward()
                optimizer.step()
                losses[name].append(loss.item())
        assert losses["torch"][-1] < losses["torch"][4] - 0.1
        # Adam divides by the gradient's size, so rounding can double from step to step at worst.
        for step, (a, b) in enumerate(zip(losses["torch"], losses["converted"], strict=True)):
            assert abs(a - b) <= 2**step * 4 * torch.finfo(torch.float32).eps

    def test_averaged_copy_and_deepcopy(self):
        model, inputs = Tagger().eval(), Tagger.example()
        average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
        convert(model)
        twin = copy.deepcopy(model)
        assert type(twin.rnn) is fastseq.modules.LSTM
        assert torch.equal(twin(*inputs), model(*inputs))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3)
        assert not torch.equal(twin(*inputs), model(*inputs))
        average.update_parameters(model)
        average.update_parameters(model)
        for mean, parameter in zip(average.module.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(mean, parameter)

    def test_pickle_and_save(self):
        model, inputs = Tagger().eval(), Tagger.example()
        convert(model, recompute=True)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for loaded in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
            assert type(loaded.rnn) is fastseq.modules.LSTM
            assert loaded.rnn.recompute
            assert torch.equal(loaded(*inputs), model(*inputs))

    def test_moving_it_afterwards(self):
        model, inputs = Tagger().eval(), Tagger.example()
        convert(model)
        expected = model(*inputs)
        model.double()
        torch.testing.assert_close(model(*inputs), expected.double(), rtol=1e-5, atol=1e-5)
        revert(model)
        torch.testing.assert_close(model(*inputs), expected.double(), rtol=1e-5, atol=1e-5)

    def test_meta_device(self):
        model = Tagger().to("meta")
        report = convert(model)
        assert type(model.rnn) is fastseq.modules.LSTM
        assert report.converted[0].backend is None
        model.to_empty(device="cpu")
        model.load_state_dict(Tagger().state_dict())
        assert model(*Tagger.example()).isfinite().all()

    def test_compiled_wrapper(self):
        model, inputs = Tagger().eval(), Tagger.example()
        expected = model(*inputs)
        compiled = torch.compile(model, backend="eager")
        compiled(*inputs)
        report = convert(compiled, example_inputs=inputs)
        assert report.converted[0].names == ("_orig_mod.rnn",)
        assert type(model.rnn) is fastseq.modules.LSTM
        torch.testing.assert_close(compiled(*inputs), expected)
        with torch.no_grad():
            model.rnn.forward = lambda *args: pytest.fail("torch.compile still runs what it compiled before")
            with pytest.raises(BaseException, match="still runs"):
                compiled(*inputs)


class TestTied:
    def test_one_line_with_every_name(self):
        model = Translator()
        report = convert(model)
        assert len(report) == 1
        assert report.converted[0].names == ("encoder", "decoder")
        assert model.encoder is model.decoder
        assert "encoder, decoder" in str(report)

    def test_two_modules_with_one_weight(self):
        model = nn.ModuleList([nn.LSTM(4, 4), nn.LSTM(4, 4)])
        model[1].weight_hh_l0 = model[0].weight_hh_l0
        report = convert(model)
        assert len(report) == 2
        assert model[0].weight_hh_l0 is model[1].weight_hh_l0
        steps = torch.randn(3, 2, 4)
        model[1](model[0](steps)[0])[0].sum().backward()
        assert model[0].weight_hh_l0.grad is model[1].weight_hh_l0.grad

    def test_shared_container(self):
        block = nn.Sequential(nn.LSTM(4, 4))
        report = convert(nn.ModuleDict({"a": block, "b": block}))
        assert [row.names for row in report.converted] == [("a.0", "b.0")]

    @pytest.mark.parametrize("wanted, refused", [("decoder", "encoder"), ("encoder", "decoder")])
    def test_filter_has_to_accept_every_name(self, wanted, refused):
        model = Translator()
        with pytest.warns(UserWarning, match="nothing to convert"):
            report = convert(model, filter_fn=lambda module, name: name == wanted)
        assert not report
        assert type(model.encoder) is nn.GRU
        assert report.skipped[0].reason == f"filter_fn refused {refused}"

    def test_child_that_holds_its_parent(self):
        model = nn.Sequential(nn.LSTM(4, 4))
        model[0].parent = model
        assert len(convert(model)) == 1


class TestAgain:
    @pytest.mark.parametrize("keep_type", [False, True])
    def test_convert_twice(self, keep_type):
        model = Tagger()
        convert(model, keep_type=keep_type)
        once = classes(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            report = convert(model, on_unsupported="raise")
        assert classes(model) == once
        assert not report and len(report) == 0
        assert [row.reason for row in report.skipped] == ["already fastseq's"]
        assert not report.skipped[0].unsupported

    def test_revert_twice(self):
        model = Tagger()
        convert(model)
        assert len(revert(model)) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not revert(model)
        assert type(model.rnn) is nn.LSTM

    @pytest.mark.parametrize("kind", MODELS)
    @pytest.mark.parametrize("keep_type", [False, True])
    def test_revert_is_exact(self, kind, keep_type):
        model, inputs = kind(), kind.example()
        before, kinds, expected = (
            [dict(vars(m)) for m in model.modules()],
            classes(model),
            results(model, *inputs),
        )
        identities = [id(parameter) for parameter in model.parameters()]
        convert(model, keep_type=keep_type, recompute=True)
        results(model, *inputs)
        report = revert(model)
        assert report.title == "fastseq.revert"
        assert classes(model) == kinds
        assert [id(parameter) for parameter in model.parameters()] == identities
        assert [vars(m).keys() for m in model.modules()] == [attributes.keys() for attributes in before]
        for name, value in results(model, *inputs).items():
            assert torch.equal(value, expected[name]), name

    def test_revert_sees_weights_changed_meanwhile(self):
        module, steps = nn.LSTM(4, 6), torch.randn(3, 2, 4)
        convert(module)
        module.weight_hh_l0 = nn.Parameter(torch.zeros_like(module.weight_hh_l0))
        expected = module(steps)[0]
        revert(module)
        torch.testing.assert_close(module(steps)[0], expected)

    def test_torch_lays_out_its_weights(self, monkeypatch):
        """On a GPU torch wants them in one buffer; its own method does that."""
        module, laid_out = nn.LSTM(4, 6), []
        convert(module)
        monkeypatch.setattr(nn.RNNBase, "flatten_parameters", lambda self: laid_out.append(type(self)))
        module.double()
        assert laid_out == [fastseq.LSTM]
        revert(module)
        assert laid_out == [fastseq.LSTM, nn.LSTM]

    def test_revert_takes_modules_built_as_ours(self):
        model = nn.Sequential(fastseq.modules.GRU(4, 6), kept.LSTM(4, 6))
        revert(model)
        assert [type(module) for module in model] == [nn.GRU, nn.LSTM]

    def test_revert_says_what_it_cannot(self):
        model = nn.Sequential(nn.LSTM(4, 6), nn.GRU(4, 6))
        convert(model)
        parametrizations.weight_norm(model[0], "weight_hh_l0")
        with pytest.warns(UserWarning, match="0 .*ParametrizedLSTM.*revert before"):
            report = revert(model)
        assert len(report) == 1 and report.skipped[0].names == ("0",)
        assert type(model[1]) is nn.GRU
        assert model[0](torch.randn(3, 2, 4))[0].shape == (3, 2, 6)


class OwnForward(nn.LSTM):
    def forward(self, input, hx=None):
        return nn.LSTM.forward(self, input, hx)[0]


class CallsSuper(nn.LSTM):
    """A base that others call with more arguments, as packages have them for sequences of no length."""

    def forward(self, input, hx=None, scale=1.0):
        output, (h, _) = super().forward(scale * input, hx=hx)
        return output, h


class CallsSuperTwice(CallsSuper):
    def forward(self, input):
        return super(CallsSuperTwice, self).forward(input, scale=0.5)[0]  # noqa: UP008


class SetsFlatWeights(nn.LSTM):
    def forward(self, input):
        self._flat_weights = [0.5 * weight for weight in self._flat_weights]
        return super().forward(input)


class Subclass(nn.GRU):
    """A GRU with a method and an attribute."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.label = "mine"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.label}"


class Watched(nn.GRU):
    def __init_subclass__(cls):
        pytest.fail("a class was made of it")


def quantized() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(4, 6)), dtype=torch.qint8)


def parametrized() -> nn.Module:
    model = nn.Sequential(nn.LSTM(4, 6))
    parametrizations.weight_norm(model[0], "weight_hh_l0")
    return model


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(torch.jit.script(nn.LSTM(4, 6)))


def forward_replaced() -> nn.Module:
    model = nn.Sequential(nn.LSTM(4, 6))
    model[0].forward = types.MethodType(lambda self, x: nn.LSTM.forward(self, x), model[0])
    return model


def not_initialized() -> nn.Module:
    model = nn.Sequential(nn.LSTMCell(4, 6))
    model[0].weight_ih = nn.UninitializedParameter()
    return model


def wrapped_weights() -> nn.Module:
    from torch.testing._internal.two_tensor import TwoTensor

    model = nn.Sequential(nn.LSTM(4, 6))
    weight = model[0].weight_hh_l0.detach()
    model[0].weight_hh_l0 = nn.Parameter(TwoTensor(weight, weight.clone()))
    return model


UNSUPPORTED = [
    (lambda: nn.Sequential(OwnForward(4, 6)), "subclass of torch.nn.LSTM with its own forward"),
    (lambda: nn.Sequential(SetsFlatWeights(4, 6)), "subclass of torch.nn.LSTM with its own forward"),
    (lambda: nn.Sequential(Watched(4, 6)), "subclass of torch.nn.GRU with its own __init_subclass__"),
    (parametrized, r"parametrized .*weight_hh_l0.*convert before"),
    (quantized, "quantized"),
    (scripted, "TorchScript"),
    (lambda: nn.Sequential(torch.ao.nn.quantizable.LSTM(4, 6)), "quantized"),
    (forward_replaced, "forward is replaced on the instance"),
    (not_initialized, "weight_ih is not initialized"),
    (wrapped_weights, "weight_hh_l0 is a TwoTensor"),
]


@pytest.mark.parametrize("build, reason", UNSUPPORTED)
class TestLeftAlone:
    def test_skip(self, build, reason):
        model = build()
        kinds = classes(model)
        with pytest.warns(UserWarning, match="nothing to convert"):
            report = convert(model)
        assert classes(model) == kinds
        assert not report
        assert [row.names for row in report.skipped] == [("0",)]
        assert report.skipped[0].unsupported and report.skipped[0].new is None
        assert re.search(reason, report.skipped[0].reason)
        assert report.skipped[0].reason in str(report)

    def test_warn(self, build, reason):
        with pytest.warns(UserWarning) as caught:
            convert(build(), on_unsupported="warn")
        assert re.search(reason, str(caught[0].message))
        assert caught[0].filename == __file__

    def test_raise_changes_nothing(self, build, reason):
        model = nn.Sequential(nn.GRU(4, 4), build(), nn.LSTM(4, 4))
        kinds = classes(model)
        with pytest.raises(NotImplementedError, match=reason):
            convert(model, on_unsupported="raise")
        assert classes(model) == kinds

    def test_the_rest_is_converted(self, build, reason):
        model = nn.Sequential(nn.GRU(4, 4), build(), nn.LSTM(4, 4))
        report = convert(model)
        assert [row.names for row in report.converted] == [("0",), ("2",)]
        assert type(model[0]) is fastseq.modules.GRU

    def test_nobody_asked(self, build, reason):
        model = nn.Sequential(build(), nn.RNN(4, 4))
        convert(model, "RNN", on_unsupported="raise")
        convert(model, filter_fn=lambda module, name: name == "1", on_unsupported="raise")
        assert type(model[1]) is fastseq.modules.RNN


@pytest.mark.parametrize("kind", [CallsSuper, CallsSuperTwice])
def test_forward_that_calls_super(kind):
    module, steps = kind(4, 6), torch.randn(3, 2, 4)
    with torch.no_grad():
        expected = module(steps)
    report = convert(module)
    assert [row.new for row in report.converted] == [f"{__name__}.{kind.__name__} on fastseq's kernels"]
    with torch.no_grad():
        torch.testing.assert_close(module(steps), expected)
        ran = fastseq.explain(module, steps)
        torch.testing.assert_close(pickle.loads(pickle.dumps(module))(steps), expected)
    assert "cpu" in str(ran)
    revert(module)
    assert type(module) is kind


@pytest.mark.parametrize("name", CELLS)
def test_subclass_of_a_cell(name):
    torch_class = getattr(nn, name)

    class Own(torch_class):
        def forward(self, *args):
            return super().forward(*args)

    cell, x = Own(4, 6), torch.randn(3, 4)
    expected = cell(x)
    assert len(convert(cell)) == 1 and isinstance(cell, getattr(fastseq, name))
    torch.testing.assert_close(cell(x), expected)


def with_cell(hidden, rnn):
    return (hidden, hidden) if isinstance(rnn, nn.LSTM) else hidden


class Asks(nn.Module):
    """As decoders do that take either kind."""

    def __init__(self, rnn: nn.Module):
        super().__init__()
        assert isinstance(rnn, (nn.GRU, nn.LSTM))
        self.rnn = rnn

    def forward(self, steps):
        hidden = steps.new_zeros(1, steps.shape[1], 6)
        if isinstance(self.rnn, nn.LSTM):
            hidden = (hidden, hidden)
        return self.rnn(steps, hidden)[0]


class AsksThere(Asks):
    def forward(self, steps):
        return self.rnn(steps, with_cell(steps.new_zeros(1, steps.shape[1], 6), self.rnn))[0]


class AsksBelow(nn.Sequential):
    @property
    def has_cell(self):
        return any(isinstance(module, nn.LSTM) for module in self.modules())


class AsksFarther(Asks):
    def forward(self, steps):
        return self.rnn(steps, by_way_of(steps.new_zeros(1, steps.shape[1], 6), self.rnn))[0]


def by_way_of(hidden, rnn):
    return with_cell(hidden, rnn)


OF_TWO_STATES = (nn.LSTM, nn.LSTMCell)


class AsksForSome(Asks):
    def forward(self, steps):
        hidden = steps.new_zeros(1, steps.shape[1], 6)
        return self.rnn(steps, (hidden, hidden) if isinstance(self.rnn, OF_TWO_STATES) else hidden)[0]


class AsksForItsOwn(Asks):
    pair = nn.LSTM

    def forward(self, steps):
        hidden = steps.new_zeros(1, steps.shape[1], 6)
        return self.rnn(steps, (hidden, hidden) if isinstance(self.rnn, self.pair) else hidden)[0]


class Matches(Asks):
    def forward(self, steps):
        hidden = steps.new_zeros(1, steps.shape[1], 6)
        match self.rnn:
            case nn.LSTM():
                hidden = (hidden, hidden)
        return self.rnn(steps, hidden)[0]


@pytest.mark.parametrize(
    "kind, asker",
    [
        (Asks, "Asks.forward"),
        (AsksThere, "with_cell"),
        (AsksFarther, "with_cell"),
        (AsksBelow, "AsksBelow.has_cell"),
        (AsksForSome, "AsksForSome.forward"),
        (AsksForItsOwn, "AsksForItsOwn.forward"),
        (Matches, "Matches.forward"),
    ],
)
def test_code_that_asks_for_torchs_class(kind, asker):
    model, steps = kind(nn.LSTM(4, 6)), torch.randn(3, 2, 4)
    expected = model(steps)
    report = convert(model)
    assert isinstance(next(model.children()), nn.LSTM)
    assert f"an nn.LSTM as well, since {__name__}.{asker} asks for it" in report.converted[0].note
    torch.testing.assert_close(model(steps), expected)
    revert(model)
    assert type(next(model.children())) is nn.LSTM
    convert(model, keep_type=False)
    assert type(next(model.children())) is fastseq.LSTM


def test_code_that_asks_for_another_class():
    model = nn.Sequential(Asks(nn.GRU(4, 6)), nn.LSTM(6, 6))
    report = convert(model)
    assert type(model[0].rnn) is fastseq.GRU and type(model[1]) is fastseq.LSTM
    assert not any(row.note for row in report.converted)


class OwnAttention(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class OwnAttentionBelow(OwnAttention):
    pass


class OwnAttentionByName(nn.Module):
    def attend(self, x):
        return scaled_dot_product_attention(x, x, x)


class OwnAttentionUnderAnotherName(nn.Module):
    def forward(self, x):
        return sdpa(x, x, x)


class OwnProjections(nn.Module):
    def forward(self, x, *weights):
        return F.multi_head_attention_forward(x, x, x, *weights)


class AnotherFunction(nn.Module):
    def forward(self, x):
        return multi_head_attention_forward(x)


def multi_head_attention_forward(x):
    return x


class AnotherMethod(nn.Module):
    def forward(self, x):
        return self.scaled_dot_product_attention(F.relu(x))

    def scaled_dot_product_attention(self, x):
        return x


@pytest.mark.parametrize(
    "kind, words",
    [
        (OwnAttention, "its forward calls torch's scaled_dot_product_attention itself: fastseq.functional.scaled_dot_product"),
        (OwnAttentionBelow, "its forward calls torch's scaled_dot_product_attention itself"),
        (OwnAttentionByName, "its attend calls torch's scaled_dot_product_attention itself"),
        (OwnAttentionUnderAnotherName, "its forward calls torch's scaled_dot_product_attention itself"),
        (OwnProjections, "its forward calls torch's multi_head_attention_forward itself: fastseq.MultiheadAttention takes"),
        (AnotherFunction, None),
        (AnotherMethod, None),
        (nn.TransformerDecoderLayer, None),
    ],
)
def test_attention_in_code_of_its_own(kind, words):
    model = nn.Sequential(nn.LSTM(4, 6), kind(*((4, 2) if kind is nn.TransformerDecoderLayer else ())))
    report = convert(model, on_unsupported="raise")
    assert type(model[0]) is fastseq.LSTM
    if words is None:
        assert not report.skipped
        return
    (row,) = report.skipped
    assert row.names == ("1",) and row.reason.startswith(words) and not row.unsupported
    assert row.old == f"{__name__}.{kind.__name__}" and row.reason in str(report)
    revert(model)
    assert not convert(model, "LSTM").skipped


def test_nothing_to_convert_tells_of_attention_in_code_of_its_own():
    with pytest.warns(UserWarning, match="nothing to convert in OwnAttention .*; 1 left alone, see the report"):
        convert(OwnAttention())


def test_module_inside_a_subclass_is_converted():
    outer = OwnForward(4, 6)
    outer.inner = nn.GRU(4, 6)
    report = convert(outer)
    assert type(outer.inner) is fastseq.modules.GRU
    assert [row.names for row in report.skipped] == [("",)]


def test_parametrization_after_convert_works():
    module, steps = nn.LSTM(4, 6), torch.randn(3, 2, 4)
    expected = module(steps)[0]
    convert(module)
    parametrizations.weight_norm(module, "weight_hh_l0")
    torch.testing.assert_close(module(steps)[0], expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = convert(module)
    assert report.skipped[0].reason == "already fastseq's"


class TestChoice:
    @pytest.mark.parametrize(
        "modules",
        ["LSTM", "nn.LSTM", "torch.nn.LSTM", nn.LSTM, fastseq.modules.LSTM, (nn.LSTM,), ["LSTM"], {nn.LSTM}],
    )
    def test_modules(self, modules):
        model = nn.Sequential(nn.LSTM(4, 4), nn.GRU(4, 4), nn.LSTMCell(4, 4))
        report = convert(model, modules)
        assert [type(m) for m in model] == [fastseq.modules.LSTM, nn.GRU, nn.LSTMCell]
        assert [row.reason for row in report.skipped] == ["not among the modules asked for"] * 2
        assert not any(row.unsupported for row in report.skipped)

    def test_several(self):
        model = nn.Sequential(nn.LSTM(4, 4), nn.GRU(4, 4), nn.LSTMCell(4, 4))
        convert(model, modules=(nn.GRU, "LSTMCell"))
        assert [type(m) for m in model] == [nn.LSTM, fastseq.modules.GRU, fastseq.modules.LSTMCell]

    @pytest.mark.parametrize("modules", [3, nn.Linear(2, 2), [3], (nn.LSTM, None), 1.5])
    def test_modules_of_the_wrong_type(self, modules):
        with pytest.raises(TypeError, match="accepted: nn.RNN or 'RNN'"):
            convert(Tagger(), modules)

    @pytest.mark.parametrize("modules", ["lstm", "Linear", nn.Linear, OwnForward, nn.Module, (nn.LSTM, "MHA"), (), ""])
    def test_modules_nobody_knows(self, modules):
        with pytest.raises(ValueError, match="accepted: nn.RNN or 'RNN'"):
            convert(Tagger(), modules)

    def test_filter(self):
        model = nn.ModuleDict({"keep": nn.LSTM(4, 4), "take": nn.LSTM(4, 4), "linear": nn.Linear(2, 2)})
        seen = []

        def chosen(module: nn.Module, name: str) -> bool:
            seen.append((type(module), name))
            return name == "take"

        report = convert(model, filter_fn=chosen)
        assert seen == [(nn.LSTM, "keep"), (nn.LSTM, "take")]
        assert [row.names for row in report.converted] == [("take",)]
        assert [(row.names, row.reason) for row in report.skipped] == [(("keep",), "filter_fn refused keep")]

    def test_filter_error_changes_nothing(self):
        model = nn.Sequential(nn.LSTM(4, 4), nn.LSTM(4, 4))

        def broken(module: nn.Module, name: str) -> bool:
            return {"0": True}[name]

        with pytest.raises(KeyError):
            convert(model, filter_fn=broken)
        assert [type(m) for m in model] == [nn.LSTM, nn.LSTM]

    @pytest.mark.parametrize("model", [None, [nn.LSTM(4, 4)], nn.LSTM, torch.zeros(2)])
    def test_no_module(self, model):
        given = "the class LSTM itself" if model is nn.LSTM else type(model).__name__
        for function in (convert, revert):
            with pytest.raises(TypeError, match=f"model must be an nn.Module, got {given}"):
                function(model)

    def test_other_bad_arguments(self):
        with pytest.raises(TypeError, match="filter_fn"):
            convert(Tagger(), filter_fn="rnn")
        with pytest.raises(ValueError, match="skip, warn, raise, got 'ignore'"):
            convert(Tagger(), on_unsupported="ignore")
        model = Tagger()
        with pytest.raises(TypeError, match="example_inputs"):
            convert(model, example_inputs=3)
        assert type(model.rnn) is nn.LSTM

    def test_nothing_there(self):
        with pytest.warns(UserWarning, match="nothing to convert in Sequential") as caught:
            report = convert(nn.Sequential(nn.Linear(2, 2)))
        assert caught[0].filename == __file__
        assert not report and len(report) == 0 and not report.skipped

    @pytest.mark.parametrize("name", SEQUENCES + CELLS)
    def test_keep_type(self, name):
        module = torch_class(name)(4, 6)
        report = convert(module, keep_type=True)
        assert isinstance(module, torch_class(name)) and isinstance(module, own_class(name))
        assert report.converted[0].new == f"fastseq.modules.keep_type.{name}"
        revert(module)
        assert type(module) is torch_class(name)

    def test_keep_type_costs_full_graphs(self):
        steps = torch.randn(3, 2, 4)
        for keep_type in (False, True):
            module = nn.GRU(4, 6).eval()
            convert(module, keep_type=keep_type)
            compiled = torch.compile(module, fullgraph=True, backend="eager")
            if keep_type:
                with pytest.raises(torch._dynamo.exc.Unsupported):
                    compiled(steps)
            else:
                torch.testing.assert_close(compiled(steps)[0], module(steps)[0])

    def test_recompute(self):
        model = nn.Sequential(nn.LSTM(4, 4), nn.GRU(4, 4), nn.RNN(4, 4), nn.LSTMCell(4, 4))
        convert(model, recompute=True)
        assert [vars(m).get("recompute") for m in model] == [True, True, True, None]
        revert(model)
        assert not any("recompute" in vars(m) for m in model)


class TestReport:
    def test_table(self):
        model = nn.ModuleDict({"first": nn.LSTM(4, 4), "second_one": nn.GRUCell(4, 4), "own": OwnForward(4, 4)})
        with fastseq.use_backend("reference"):
            report = convert(model)
        assert isinstance(report, Report)
        lines = str(report).splitlines()
        assert lines[0] == "fastseq.convert: 2 changed, 1 left alone"
        assert [line.split() for line in lines[1:4]] == [
            ["name", "was", "is", "backend", "choice", "note"],
            ["first", "torch.nn.LSTM", "fastseq.LSTM", "reference", "forced"],
            ["second_one", "torch.nn.GRUCell", "fastseq.GRUCell", "reference", "forced"],
        ]
        columns = [[line.index(word) for word in line.split()[:4]] for line in lines[1:4]]
        assert columns[0] == columns[1] == columns[2]
        assert lines[5].split(maxsplit=2)[0] == "own"
        assert lines[5].endswith("subclass of torch.nn.LSTM with its own forward")
        assert not any(line.endswith(" ") for line in lines)

    def test_what_is_not_measured_stays(self, monkeypatch):
        """cuDNN's recurrence on a GPU is not given up for kernels that nobody has timed there, unless they are asked for."""
        gpu = backends.Choice("torch", "default", sources.UNMEASURED)
        monkeypatch.setattr(sys.modules["fastseq._convert.table"], "_selected", lambda query: gpu)
        with pytest.warns(UserWarning, match="nothing to convert in LSTM"):
            report = convert(nn.LSTM(4, 4))
        assert report.skipped[0].reason == "no measurement for this device: torch's kernel; run python -m fastseq tune"
        with fastseq.use_backend("triton"):
            assert convert(nn.LSTM(4, 4)).converted[0].backend == "torch"

    def test_what_is_tuned_or_shipped_is_converted_and_says_so(self, monkeypatch):
        for source, about in (("tuned", "tuned here, 1.83x torch, 2026-11-29"), ("shipped", "shipped for NVIDIA H100")):
            for backend in ("triton", "torch"):  # of a long call; others may be ours
                choice = backends.Choice(backend, source, about)
                monkeypatch.setattr(sys.modules["fastseq._convert.table"], "_selected", lambda query, choice=choice: choice)
                report = convert(nn.LSTM(4, 4))
                assert (report.converted[0].backend, report.converted[0].choice) == (backend, about) and about in str(report)

    def test_backend_is_the_one_that_runs(self):
        for name in SEQUENCES + CELLS:
            module = torch_class(name)(4, 6)
            report = convert(module)
            steps = torch.randn(2, 4) if name in CELLS else torch.randn(128, 2, 4)
            assert [report.converted[0].backend] == fastseq.explain(module, steps).backends

    def test_backend_that_cannot(self):
        module = nn.LSTM(4, 6)
        with fastseq.use_backend("cuda"):
            report = convert(module)
        assert report.converted[0].backend.startswith("none")

    def test_html(self):
        class Odd(nn.Module):
            def __init__(self):
                super().__init__()
                self.add_module("<b>", nn.LSTM(4, 4))

        text = convert(Odd())._repr_html_()
        assert "<td>&lt;b&gt;</td><td>torch.nn.LSTM</td>" in text and "<b>" not in text


class TestExampleInputs:
    @pytest.mark.parametrize("kind", MODELS)
    def test_accepts_what_is_right(self, kind):
        model = kind()
        assert convert(model, example_inputs=kind.example())

    @pytest.mark.parametrize(
        "given",
        [
            lambda x, y: (x, y),
            lambda x, y: [x, {"target": y}],
            lambda x, y: {"source": x, "target": y},
            lambda x, y: (x, y, {}),
        ],
    )
    def test_forms(self, given):
        assert convert(Translator(), example_inputs=given(*Translator.example()))

    def test_packed_sequence_is_one_argument(self):
        packed = pack_padded_sequence(torch.randn(5, 2, 4), torch.tensor([5, 3]))
        assert convert(nn.LSTM(4, 6), example_inputs=packed)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_other_dtypes(self, dtype):
        assert convert(nn.GRU(4, 6).to(dtype), example_inputs=torch.randn(9, 3, 4, dtype=dtype))

    def test_under_autocast(self):
        class Cast(nn.Module):
            def __init__(self):
                super().__init__()
                self.rnn = nn.LSTM(16, 32)

            def forward(self, steps: Tensor) -> Tensor:
                with torch.autocast("cpu", torch.bfloat16):
                    return self.rnn(steps)[0].float()

        assert convert(Cast(), example_inputs=torch.randn(20, 3, 16))

    def test_long_sequence(self):
        assert convert(nn.RNN(4, 16, nonlinearity="relu"), example_inputs=torch.randn(300, 2, 4))

    @pytest.mark.parametrize("kind", MODELS)
    def test_nothing_remains(self, kind):
        class Statistics(nn.BatchNorm1d):
            def forward(self, noise: Tensor) -> None:
                super().forward(noise)

        model, inputs = kind(), kind.example()
        model.norm = Statistics(3)
        model.register_forward_pre_hook(lambda module, args: module.norm(torch.randn(4, 3) + random.random()))
        model.norm.eval()
        flags = [module.training for module in model.modules()]
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        attributes = [vars(module).keys() for module in model.modules()]
        given = [tensor.clone() for tensor in inputs]
        torch_state, python_state = torch.get_rng_state(), random.getstate()
        convert(model, example_inputs=inputs)
        assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state
        assert [module.training for module in model.modules()] == flags
        assert [vars(module).keys() for module in model.modules()] == attributes
        assert all(parameter.grad is None for parameter in model.parameters())
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name]), name
        for before, after in zip(given, inputs, strict=True):
            assert torch.equal(before, after)

    def test_model_that_keeps_its_state_and_draws_numbers(self):
        """Teacher forcing by random.random(), a hidden state on self: both runs must start alike."""

        class Stateful(nn.Module):
            def __init__(self):
                super().__init__()
                self.rnn, self.state = nn.GRU(4, 4), None

            def forward(self, steps: Tensor) -> Tensor:
                scale = random.random() + torch.rand(())
                output, self.state = self.rnn(steps * scale, self.state)
                return output

        model = Stateful()
        assert convert(model, example_inputs=torch.randn(3, 2, 4))
        assert model.state is None

    def test_model_that_writes_into_its_input(self):
        model, steps = nn.Sequential(nn.Hardtanh(-0.1, 0.1, inplace=True), nn.GRU(4, 4)), torch.randn(3, 2, 4)
        given = steps.clone()
        convert(model, example_inputs=steps)
        assert torch.equal(steps, given)

    def test_gradient_of_inputs_counts(self, monkeypatch):
        class Detached(nn.RNNBase):
            def forward(self, input, hx=None):
                return nn.GRU.forward(self, input.detach(), hx)

        self._break(monkeypatch, "GRU", Detached)
        with pytest.raises(RuntimeError, match="gradient of input"):
            convert(nn.GRU(4, 4), example_inputs=torch.randn(3, 2, 4, requires_grad=True))

    @staticmethod
    def _break(monkeypatch, name: str, kind: type) -> None:
        """Makes `kind` the class that convert puts in the place of nn.<name>."""
        kind.check_forward_args = torch_class(name).check_forward_args
        kind.permute_hidden = torch_class(name).permute_hidden
        monkeypatch.setattr(fastseq.modules, name, kind)

    @pytest.mark.parametrize(
        "fault, names",
        [
            (lambda y, s, m: (y * (1 + 1e-4), s), "output"),
            (lambda y, s, m: (y, s * (1 + 1e-4)), "output"),
            (lambda y, s, m: (y, s) if m.training else (y + 1e-4, s), "in eval"),
            (lambda y, s, m: (y + 1e-4, s) if m.training else (y, s), "in training"),
            (lambda y, s, m: (y + (y * 1e-2 - (y * 1e-2).detach()), s), "gradient of"),
            (lambda y, s, m: (y.masked_fill(y == y.max(), torch.nan), s), "infinite or NaN"),
            (
                lambda y, s, m: (y[:, :1], s),
                r"was torch.float32 \[3, 2, 4\] and is torch.float32 \[3, 1, 4\]",
            ),
            (lambda y, s, m: (y.double(), s), "is torch.float64"),
            (lambda y, s, m: (y, None), "came or went"),
        ],
    )
    def test_mismatch_takes_everything_back(self, monkeypatch, fault, names):
        class Faulty(nn.RNNBase):
            def forward(self, input, hx=None):
                return fault(*nn.GRU.forward(self, input, hx), self)

        self._break(monkeypatch, "GRU", Faulty)
        model = nn.Sequential(nn.GRU(4, 4))
        model.forward = types.MethodType(lambda self, steps: self[0](steps), model)
        expected, steps = model(torch.ones(3, 2, 4))[0], torch.randn(3, 2, 4)
        with pytest.raises(RuntimeError, match=f"disagrees: .*{names}"):
            convert(model, example_inputs=steps, recompute=True)
        assert type(model[0]) is nn.GRU and "recompute" not in vars(model[0])
        assert torch.equal(model(torch.ones(3, 2, 4))[0], expected)

    def test_names_the_worst_output(self, monkeypatch):
        class Faulty(nn.RNNBase):
            def forward(self, input, hx=None):
                output, state = nn.GRU.forward(self, input, hx)
                return output + 1e-3, state + 1e-1

        self._break(monkeypatch, "GRU", Faulty)
        with pytest.raises(RuntimeError, match=r"disagrees: output\[1\] in .* is off by up to 0.1"):
            convert(nn.GRU(4, 4), example_inputs=torch.randn(3, 2, 4))

    def test_failing_forward_takes_everything_back(self, monkeypatch):
        class Failing(nn.RNNBase):
            def forward(self, input, hx=None):
                raise ArithmeticError("no")

        self._break(monkeypatch, "GRU", Failing)
        model = nn.GRU(4, 4)
        with pytest.raises(ArithmeticError):
            convert(model, example_inputs=torch.randn(3, 2, 4))
        assert type(model) is nn.GRU

    def test_wrong_inputs(self):
        model = nn.GRU(4, 4)
        with pytest.raises(RuntimeError, match="input.size"):
            convert(model, example_inputs=torch.randn(3, 2, 5))
        assert type(model) is nn.GRU
        with pytest.raises(ValueError, match="meta device"):
            convert(nn.GRU(4, 4, device="meta"), example_inputs=torch.randn(3, 2, 4))

    def test_no_gradients_without_autograd(self, monkeypatch):
        class WrongGradient(nn.RNNBase):
            def forward(self, input, hx=None):
                output, state = nn.GRU.forward(self, input, hx)
                return output * 2 - output.detach(), state

        self._break(monkeypatch, "GRU", WrongGradient)
        steps = torch.randn(3, 2, 4)
        with pytest.raises(RuntimeError, match="gradient"):
            convert(nn.GRU(4, 4), example_inputs=steps)
        with torch.no_grad():
            assert convert(nn.GRU(4, 4), example_inputs=steps)


def builds(kind: type) -> type:
    return type(kind(4, 6))


class TestPatched:
    @pytest.mark.parametrize("name", SEQUENCES + CELLS)
    def test_every_way_to_the_name(self, name):
        with patched():
            from_nn = getattr(__import__("torch.nn", fromlist=[name]), name)
            from_rnn = getattr(importlib.import_module("torch.nn.modules.rnn"), name)
            from_modules = getattr(importlib.import_module("torch.nn.modules"), name)
            built = [getattr(nn, name)(4, 6), from_nn(4, 6), from_rnn(4, 6), from_modules(4, 6)]
        assert [type(module) for module in built] == [own_class(name)] * 4
        assert type(getattr(nn, name)(4, 6)) is not own_class(name)
        assert torch.nn.modules.rnn.LSTM is nn.LSTM is nn.modules.LSTM

    def test_builds_a_whole_model(self):
        with patched():
            torch.manual_seed(2)
            model = Tagger()
        torch.manual_seed(2)
        reference = Tagger()
        assert type(model.rnn) is fastseq.modules.LSTM
        torch.testing.assert_close(model.eval()(*Tagger.example()), reference.eval()(*Tagger.example()))
        revert(model)
        assert type(model.rnn) is nn.LSTM

    def test_import_inside(self):
        with patched():
            namespace: dict = {}
            exec("from torch.nn import LSTM\nfrom torch.nn.modules.rnn import GRU", namespace)
        assert type(namespace["LSTM"](4, 6)) is fastseq.modules.LSTM and type(namespace["GRU"](4, 6)) is fastseq.modules.GRU

    def test_restores_after_an_error(self):
        original = nn.LSTM
        with pytest.raises(ZeroDivisionError), patched():
            assert builds(nn.LSTM) is fastseq.modules.LSTM
            raise ZeroDivisionError
        assert nn.LSTM is original is torch.nn.modules.rnn.LSTM is CONVERSIONS["LSTM"].torch_class

    def test_nests(self):
        original = nn.LSTM, nn.GRU
        again = patched()
        with again:
            with patched(keep_type=True, modules="LSTM"), again:
                assert (builds(nn.LSTM), builds(nn.GRU)) == (fastseq.modules.LSTM, fastseq.modules.GRU)
            with patched(keep_type=True, modules="LSTM"):
                assert (builds(nn.LSTM), builds(nn.GRU)) == (kept.LSTM, fastseq.modules.GRU)
                assert isinstance(nn.LSTM(4, 6), original[0])
            assert (builds(nn.LSTM), builds(nn.GRU)) == (fastseq.modules.LSTM, fastseq.modules.GRU)
        assert (nn.LSTM, nn.GRU) == original

    def test_decorator(self):
        @patched(modules=nn.LSTM)
        def build() -> nn.Module:
            return nn.Sequential(nn.LSTM(4, 4), nn.GRU(4, 4))

        assert [type(m) for m in build()] == [fastseq.modules.LSTM, nn.GRU]
        assert [type(m) for m in build()] == [fastseq.modules.LSTM, nn.GRU]

    def test_convert_and_revert_inside(self):
        model = Tagger()
        with patched():
            convert(model, nn.LSTM)
            assert type(model.rnn) is builds(nn.LSTM) is fastseq.modules.LSTM
            revert(model)
            convert(model, keep_type=True)
            assert type(model.rnn) is kept.LSTM
        revert(model)
        assert type(model.rnn) is nn.LSTM

    def test_leaves_other_peoples_patches(self, monkeypatch):
        class Theirs(nn.GRU):
            pass

        monkeypatch.setattr(nn, "GRU", Theirs)
        with patched():
            assert nn.GRU is Theirs
        assert nn.GRU is Theirs

    def test_threads_that_leave_in_another_order(self):
        original = nn.LSTM
        entered, leave = threading.Event(), threading.Event()

        def other() -> None:
            with patched():
                entered.set()
                leave.wait(10)

        thread = threading.Thread(target=other)
        with patched(keep_type=True):
            thread.start()
            assert entered.wait(10)
        assert builds(nn.LSTM) is fastseq.modules.LSTM
        leave.set()
        thread.join()
        assert nn.LSTM is original

    def test_classes_made_inside_are_torchs(self):
        """Their bases, their constructors and their methods: all the block changes is what a call of the name builds."""

        class Plain(abc.ABC):
            @abc.abstractmethod
            def label(self):
                """What it calls itself."""

        with patched():

            class Mine(nn.LSTM):
                def __init__(self):
                    nn.LSTM.__init__(self, 4, 6)

                def forward(self, input, hx=None):
                    return nn.LSTM.forward(self, input, hx)[0]

            class Both(Plain, nn.GRU):
                def label(self):
                    return super().extra_repr()

            mine, both, built = Mine(), Both(4, 6), nn.LSTM(4, 6)
            assert isinstance(mine, nn.LSTM) and isinstance(built, nn.LSTM) and not isinstance(both, nn.LSTM)
            assert issubclass(Mine, nn.LSTM) and issubclass(nn.LSTM, nn.RNNBase) and isinstance(nn.LSTM, type)
            assert mine(torch.randn(5, 2, 4)).shape == (5, 2, 6)
        assert (
            Mine.__bases__ == (nn.LSTM,)
            and type(Mine) is type
            and Both.__bases__ == (Plain, nn.GRU)
            and type(Both) is abc.ABCMeta
        )
        assert type(built) is fastseq.LSTM and both.label() == "4, 6"
        assert fastseq.convert(nn.ModuleList([both])).converted and isinstance(both, Both)

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="accepted"):
            patched("Linear")
        with pytest.raises(TypeError, match="accepted"):
            patched(modules=4)


class Bidirectional(Subclass):
    """A subclass of a subclass."""


class TestSubclasses:
    @pytest.mark.parametrize("kind", [Subclass, Bidirectional])
    @pytest.mark.parametrize("keep_type", [False, True])
    def test_identity_stays(self, kind, keep_type):
        model, x = nn.Sequential(kind(4, 6)), torch.randn(150, 3, 4)
        expected = model(x)[0]
        report = convert(model, keep_type=keep_type)
        module = model[0]
        assert report.converted[0].backend == "cpu" and "on fastseq's kernels" in str(report)
        assert isinstance(module, kind) and isinstance(module, nn.GRU) and isinstance(module, fastseq.GRU)
        assert type(module).__qualname__ == kind.__qualname__ and type(module).__module__ == kind.__module__
        assert module.label == "mine" and module.extra_repr().startswith("4, 6") and module.extra_repr().endswith("mine")
        assert fastseq.explain(model, x).backends == ["cpu"]
        torch.testing.assert_close(model(x)[0], expected)
        assert convert(model).skipped[0].reason == "already fastseq's"
        other = nn.Sequential(kind(4, 6))
        convert(other)
        assert type(other[0]) is type(module)
        revert(model)
        assert type(module) is kind

    def test_copies(self):
        model, x = nn.Sequential(Subclass(4, 6)), torch.randn(150, 3, 4)
        convert(model)
        model[0].label = "other"
        for twin in (copy.copy(model[0]), copy.deepcopy(model)[0], pickle.loads(pickle.dumps(model))[0]):
            assert type(twin) is type(model[0]) and twin.label == "other"
            assert torch.equal(twin(x)[0], model(x)[0])
            revert(twin)
            assert type(twin) is Subclass

    def test_super_reaches_ours(self):
        class Checked(nn.LSTM):
            def check_forward_args(self, *args):
                super().check_forward_args(*args)
                calls.append(type(self))

        calls: list[type] = []
        module = Checked(4, 6)
        convert(module)
        module(torch.randn(150, 3, 4), (torch.randn(1, 3, 6), torch.randn(1, 3, 6)))
        assert calls == [type(module)]

    @pytest.mark.parametrize("name", ["check_input", "check_hidden_size"])
    @pytest.mark.parametrize("gradients", [False, True])
    def test_what_checks_calls_is_called(self, name, gradients):
        def check(self, *given):
            raise ArithmeticError("NaN")

        module = type("Checked", (nn.LSTM,), {name: check})(4, 6)
        convert(module)
        assert isinstance(module, fastseq.LSTM)
        with torch.set_grad_enabled(gradients), pytest.raises(ArithmeticError):
            module(torch.randn(150, 3, 4), (torch.randn(1, 3, 6), torch.randn(1, 3, 6)))

    def test_states_in_an_order_of_its_own(self):
        module = type("Ordered", (nn.LSTM,), {"permute_hidden": lambda self, hx, order: hx})(4, 6)
        with pytest.warns(UserWarning, match="nothing to convert"):
            assert "permute_hidden" in convert(module).skipped[0].reason

    def test_attention(self):
        class Mine(nn.MultiheadAttention):
            def describe(self):
                return self.embed_dim

        module, x = Mine(8, 2), torch.randn(20, 3, 8)
        expected = module(x, x, x)
        convert(module)
        assert module.describe() == 8 and isinstance(module, Mine) and isinstance(module, fastseq.MultiheadAttention)
        for a, b in zip(module(x, x, x), expected, strict=True):
            torch.testing.assert_close(a, b)

    def test_of_ours(self):
        class Mine(fastseq.GRU):
            pass

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert convert(Mine(4, 6)).skipped[0].reason == "already fastseq's"


class Borrowed(nn.Module):
    """Calls a function with the weights of a module whose forward it never calls, as WavLM does."""

    def __init__(self):
        super().__init__()
        self.attention, self.rnn = nn.MultiheadAttention(8, 2), nn.GRU(8, 8)

    def forward(self, x):
        a = self.attention
        weights = a.in_proj_weight, a.in_proj_bias, None, None, False, 0.0, a.out_proj.weight, a.out_proj.bias
        return self.rnn(nn.functional.multi_head_attention_forward(x, x, x, 8, 2, *weights)[0])[0]


class TestWhatHappens:
    def test_forward_that_is_not_called(self):
        report = convert(Borrowed(), example_inputs=torch.randn(150, 2, 8))
        attention, rnn = report.converted
        assert (
            attention.backend is None and attention.note == "its forward is not called on example_inputs: nothing changes there"
        )
        assert rnn.backend == "cpu" and not rnn.note
        assert "nothing changes there" in str(report)

    def test_backends_that_ran(self):
        with lengths.everywhere(lengths.Steps(1, 8)):
            report = convert(Borrowed(), example_inputs=torch.randn(1, 2, 8))
        assert report.converted[1].backend == "torch"
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in Borrowed().modules())

    def test_torchs_kernel_being_faster_is_no_reason_to_leave_a_module(self):
        """That is for each call to decide: batch and length are not known before it."""
        with lengths.everywhere(lengths.Steps(1, lengths.ENDLESS)):
            report = convert(nn.LSTM(4, 6))
        assert report.converted[0].backend == "torch" and not report.skipped

    def test_even_if_slower(self, monkeypatch):
        monkeypatch.setattr(library, "reason", lambda: "there is no library")
        module = nn.LSTM(4, 6).half()
        with pytest.warns(UserWarning, match="nothing to convert"):
            assert "no fastseq kernel runs float16 on cpu" in convert(module).skipped[0].reason
        report = convert(module, even_if_slower=True)
        assert report.converted[0].backend == "torch" and type(module) is fastseq.LSTM


@pytest.fixture(scope="class")
def process_group(tmp_path_factory):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path_factory.mktemp('gloo')}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.usefixtures("process_group")
class TestDistributed:
    def test_inside_ddp(self, monkeypatch):
        plain, inputs = Tagger(dropout=0.0), Tagger.example()
        model = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
        expected = results(plain, *inputs)
        truth = results(copy.deepcopy(plain).double(), *inputs)
        with monkeypatch.context() as without_communication:
            without_communication.setattr(type(model), "forward", lambda *args: pytest.fail("one rank alone hangs"))
            report = convert(model, example_inputs=inputs)
        assert report.converted[0].names == ("module.rnn",)
        for name, value in results(model, *inputs).items():
            name = name.removeprefix("module.")
            assert_close_to_truth(value, expected[name], truth[name], name)

    def test_ddp_around_a_converted_model(self):
        plain, inputs = Tagger(dropout=0.0), Tagger.example()
        expected, truth = results(plain, *inputs), results(copy.deepcopy(plain).double(), *inputs)
        convert(plain)
        for name, value in results(nn.parallel.DistributedDataParallel(plain), *inputs).items():
            name = name.removeprefix("module.")
            assert_close_to_truth(value, expected[name], truth[name], name)

    @pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")  # torch.nn.LSTM does
    @pytest.mark.parametrize("whole", [False, True])
    def test_fully_sharded_is_refused(self, whole):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model, inputs = Tagger(dropout=0.0), Tagger.example()
        expected = model(*inputs)
        fully_shard(model if whole else model.rnn, mesh=init_device_mesh("cpu", (1,)))
        kinds = classes(model)
        with pytest.raises(NotImplementedError, match="rnn .*managed by FSDP: convert before fully_shard"):
            convert(model, on_unsupported="raise")
        assert classes(model) == kinds
        torch.testing.assert_close(model(*inputs), expected)

    @pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")  # torch.nn.LSTM does
    def test_fully_shard_after_convert(self):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model, inputs = Tagger(dropout=0.0), Tagger.example()
        expected = model(*inputs)
        convert(model)
        mesh = init_device_mesh("cpu", (1,))
        fully_shard(model.rnn, mesh=mesh)
        fully_shard(model, mesh=mesh)
        torch.testing.assert_close(model(*inputs), expected)
        with pytest.warns(UserWarning, match="managed by FSDP: revert before fully_shard"):
            assert not revert(model)

    def test_tensor_parallel_weights_are_refused(self):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import distribute_module

        model = distribute_module(nn.Sequential(nn.LSTM(4, 6)), init_device_mesh("cpu", (1,)))
        with pytest.raises(NotImplementedError, match="is a DTensor: convert before"):
            convert(model, on_unsupported="raise")


def test_public_names():
    assert fastseq.convert is convert and fastseq.revert is revert and fastseq.patched is patched


def test_what_no_kernel_runs_stays_torchs(monkeypatch):
    """A module that only the reference could run would become slower; forcing the reference converts it all the same."""
    monkeypatch.setattr(library, "reason", lambda: "there is no library")
    model = nn.LSTM(3, 4, dtype=torch.float16)
    with pytest.warns(UserWarning, match="nothing to convert"):
        report = fastseq.convert(model)
    assert type(model) is nn.LSTM and not report.converted
    assert "no fastseq kernel runs float16 on cpu here" in report.skipped[0].reason
    with pytest.raises(NotImplementedError, match="float16"):
        fastseq.convert(model, on_unsupported="raise")
    with fastseq.use_backend("reference"):
        assert fastseq.convert(model).converted
    assert type(model) is fastseq.LSTM
