"""Converted models in PyTorch's own tools: torch.fx, TorchScript, both ONNX exporters, eager-mode quantization."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastseq

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]


class First(nn.Module):
    """The output of a recurrent module."""

    def __init__(self, rnn: nn.Module):
        super().__init__()
        self.rnn = rnn

    def forward(self, x):
        return self.rnn(x)[0]


class Attend(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options)

    def forward(self, x, y):
        return self.attention(x, y, y, need_weights=False)[0]


SEQUENCES = {
    "LSTM": lambda: First(nn.LSTM(4, 8)),
    "GRU": lambda: First(nn.GRU(4, 8, num_layers=2)),
    "RNN": lambda: First(nn.RNN(4, 8, nonlinearity="relu", bias=False)),
    "both directions": lambda: First(nn.LSTM(4, 8, num_layers=2, bidirectional=True, batch_first=True)),
}
CELLS = {
    "LSTMCell": lambda: First(nn.LSTMCell(4, 8)),
    "GRUCell": lambda: nn.Sequential(nn.GRUCell(4, 8)),
    "RNNCell": lambda: nn.Sequential(nn.RNNCell(4, 8)),
}
ATTENTION = {"MultiheadAttention": lambda: Attend(), "batch first": lambda: Attend(batch_first=True)}
MODELS = SEQUENCES | CELLS | ATTENTION


def inputs(name: str, first: int = 5, second: int = 2) -> tuple[torch.Tensor, ...]:
    if name in ATTENTION:
        return torch.randn(first, second, 8), torch.randn(first, second, 8)
    return (torch.randn(second, 4),) if name in CELLS else (torch.randn(first, second, 4),)


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    plain = MODELS[name]().eval()
    converted = copy.deepcopy(plain)
    assert fastseq.convert(converted)
    return plain, converted


class TestFx:
    @pytest.mark.parametrize("name", MODELS)
    def test_every_module_is_a_leaf(self, name):
        plain, converted = pair(name)
        traced = torch.fx.symbolic_trace(converted)
        expected = torch.fx.symbolic_trace(plain)
        assert [(n.op, str(n.target), n.args, n.kwargs) for n in traced.graph.nodes if n.op == "call_module"].__repr__() == (
            [(n.op, str(n.target), n.args, n.kwargs) for n in expected.graph.nodes if n.op == "call_module"].__repr__()
        )
        given = inputs(name, 6, 3)
        torch.testing.assert_close(traced(*given), plain(*given))

    def test_variants_and_arguments(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = fastseq.PeepholeLSTM(4, 8), fastseq.LSTM(8, 8)
                self.third, self.cell = fastseq.SLSTM(8, 8), fastseq.PeepholeLSTMCell(8, 8)

            def forward(self, x, lengths):
                y, hx = self.first(x)
                y, _, cells = self.second(y, hx, lengths=lengths, return_cells=True)
                return self.cell(self.third(y)[0][0])[0], cells

        net, x, lengths = Net(), torch.randn(5, 2, 4), torch.tensor([5, 3])
        traced = torch.fx.symbolic_trace(net)
        assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["first", "second", "third", "cell"]
        for a, b in zip(traced(x, lengths), net(x, lengths), strict=True):
            torch.testing.assert_close(a, b)
        assert torch.equal(pickled(traced)(x, lengths)[0], traced(x, lengths)[0])


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def reloaded(scripted: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


class TestTorchScript:
    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("gradients", [True, False])
    def test_trace(self, name, gradients):
        """As of the unconverted model: checked, saved, loaded, with other sizes, and with gradients; no op of fastseq's."""
        plain, converted = pair(name)
        with torch.set_grad_enabled(gradients):
            traced = torch.jit.trace(converted, inputs(name))
        loaded = reloaded(traced)
        assert "fastseq::" not in str(loaded.inlined_graph)
        given = inputs(name, 7, 3)
        torch.testing.assert_close(loaded(*given), plain(*given))
        loaded(*given).square().sum().backward()
        plain(*given).square().sum().backward()
        for (key, a), (_, b) in zip(loaded.named_parameters(), plain.named_parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, msg=key)

    @pytest.mark.parametrize("gradients", [True, False])
    def test_trace_packed(self, gradients):
        class Packed(nn.Module):
            def __init__(self):
                super().__init__()
                self.rnn = nn.GRU(4, 8)

            def forward(self, x, lengths):
                return pad_packed_sequence(self.rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))[0])[0]

        plain = Packed()
        converted = copy.deepcopy(plain)
        fastseq.convert(converted)
        given = torch.randn(5, 3, 4), torch.tensor([2, 5, 3])
        with torch.set_grad_enabled(gradients):
            loaded = reloaded(torch.jit.trace(converted, given))
        other = torch.randn(6, 3, 4), torch.tensor([6, 1, 3])
        torch.testing.assert_close(loaded(*other), plain(*other))

    def test_trace_of_what_torch_lacks_records_our_op(self):
        net, x = First(fastseq.PeepholeLSTM(4, 8)), torch.randn(5, 2, 4)
        loaded = reloaded(torch.jit.trace(net, x))
        assert "fastseq::" in str(loaded.inlined_graph)
        x = torch.randn(7, 3, 4)
        torch.testing.assert_close(loaded(x), net(x))

    @pytest.mark.parametrize("name", MODELS)
    def test_script(self, name):
        plain, converted = pair(name)
        given = inputs(name, 7, 3)
        with pytest.warns(UserWarning, match="fastseq.convert it again"):
            loaded = reloaded(torch.jit.script(converted))
        torch.testing.assert_close(loaded(*given), plain(*given))
        torch.testing.assert_close(converted(*given), plain(*given))
        assert [type(m) for m in converted.modules()] == [type(m) for m in plain.modules()]
        assert fastseq.convert(converted)

    def test_script_keeps_the_parameters(self):
        _, converted = pair("GRU")
        before, module = [id(p) for p in converted.parameters()], converted.rnn
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.script(converted)
        assert [id(p) for p in converted.parameters()] == before
        converted.half()  # who still holds the module sees it
        assert next(module.parameters()).dtype == torch.float16

    @pytest.mark.parametrize(
        "build,what",
        [
            (lambda: fastseq.PeepholeLSTM(4, 8), "PeepholeLSTM"),
            (lambda: fastseq.SLSTMCell(4, 8), "SLSTMCell"),
            (lambda: fastseq.LSTM(4, 8, zoneout=0.1), "LSTM with zoneout"),
            (lambda: fastseq.GRU(4, 8, num_heads=2), "GRU with num_heads"),
        ],
    )
    def test_script_of_what_torch_lacks(self, build, what):
        model = nn.Sequential(nn.LSTM(4, 4), build())
        with pytest.raises(NotImplementedError, match=f"torch.jit.script: torch.nn has no {what}"):
            torch.jit.script(model)


@pytest.fixture
def runtime():
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


class TestOnnx:
    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("dynamo", [True, False])
    def test_same_numbers(self, name, dynamo, runtime, tmp_path):
        plain, converted = pair(name)
        given = inputs(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(converted, given, str(tmp_path / "model.onnx"), dynamo=dynamo, verbose=False)
        session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
        fed = {place.name: tensor.numpy() for place, tensor in zip(session.get_inputs(), given, strict=True)}
        torch.testing.assert_close(torch.from_numpy(session.run(None, fed)[0]), plain(*given), rtol=1e-5, atol=1e-5)

    def test_functions(self, runtime, tmp_path):
        class Net(nn.Module):
            def forward(self, q, k, v):
                attended = fastseq.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
                return attended + fastseq.functional.attention(q, k, v, scale=0.3)

        given = tuple(torch.randn(1, 2, 5, 8) for _ in range(3))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(Net(), given, str(tmp_path / "model.onnx"), dynamo=True, verbose=False)
        session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
        fed = {place.name: tensor.numpy() for place, tensor in zip(session.get_inputs(), given, strict=True)}
        torch.testing.assert_close(torch.from_numpy(session.run(None, fed)[0]), Net()(*given), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        "build,what",
        [
            (lambda: fastseq.PeepholeLSTM(4, 8), "a layer of peephole_lstm"),
            (lambda: fastseq.GRU(4, 8, num_heads=2), "gru with num_heads"),
            (lambda: fastseq.LSTM(4, 8, zoneout=0.1), "lstm with zoneout"),
        ],
    )
    @pytest.mark.parametrize("dynamo", [True, False])
    def test_what_torch_lacks_is_refused(self, build, what, dynamo, runtime):
        with warnings.catch_warnings(), pytest.raises(Exception) as raised:
            warnings.simplefilter("ignore")
            torch.onnx.export(First(build()).eval(), (torch.randn(5, 2, 4),), io.BytesIO(), dynamo=dynamo, verbose=False)
        chain = [raised.value]
        while chain[-1].__cause__ or chain[-1].__context__:
            chain.append(chain[-1].__cause__ or chain[-1].__context__)
        assert any(f"ONNX export: {what}" in str(error) for error in chain)


class TestQuantization:
    @pytest.mark.parametrize("name", [name for name in (*SEQUENCES, *CELLS) if name != "RNN"])
    def test_dynamic_says_what_it_passes_by(self, name):
        _, converted = pair(name)
        with pytest.warns(UserWarning, match=r"leaves .* in floating point: fastseq.revert\(model\) first"):
            left = torch.ao.quantization.quantize_dynamic(converted, dtype=torch.qint8)
        assert "Dynamic" not in str(left)
        fastseq.revert(converted)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", "torch.ao.quantization knows")
            assert "Dynamic" in str(torch.ao.quantization.quantize_dynamic(converted, dtype=torch.qint8))

    def test_static(self):
        model = nn.Sequential(nn.MultiheadAttention(8, 2))
        fastseq.convert(model)
        with pytest.warns(UserWarning, match="leaves MultiheadAttention in floating point"):
            model[0].qconfig = torch.ao.quantization.default_qconfig
