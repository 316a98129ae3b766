"""convert, revert and patched on nn.MultiheadAttention and what torch.nn builds around it."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fastseq
from fastseq.modules import keep_type
from fastseq.testing import assert_close_to_truth

E, H, N, T = 8, 2, 3, 6


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def encoder(layers=2, **options) -> nn.TransformerEncoder:
    options = dict(dropout=0.0, batch_first=True) | options
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 16, **options), layers).eval()


def padded(*lengths) -> torch.Tensor:
    return torch.arange(T) >= torch.tensor(lengths)[:, None]


@contextmanager
def counted(model: nn.Module) -> Iterator[list[str]]:
    """The names of the attention modules in `model` whose forward runs, or with gradients is a part of their layer's one call;
    without hooks, which would change the path."""
    calls: list[str] = []
    names = {id(module): name for name, module in model.named_modules()}
    original, in_one_call = fastseq.MultiheadAttention.forward, fastseq.TransformerEncoderLayer._in_one_call

    def forward(self, *args, **kwargs):
        calls.append(names[id(self)])
        return original(self, *args, **kwargs)

    def whole(self, *args):
        out = in_one_call(self, *args)
        if out is not None and out.requires_grad:
            calls.append(names[id(self.self_attn)])
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastseq.MultiheadAttention, "forward", forward)
        patch.setattr(fastseq.TransformerEncoderLayer, "_in_one_call", whole)
        yield calls


class TestEncoder:
    @pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but:UserWarning")  # tanh
    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
    @pytest.mark.parametrize("padding", [None, padded(T, 3, 2)])
    @pytest.mark.parametrize("activation", ["relu", "gelu", torch.tanh])
    def test_fused_path_stays(self, padding, activation):
        """In eval mode without gradients a layer is computed from its parameters, converted or not, where it can be."""
        model, x = encoder(activation=activation), torch.randn(N, T, E)
        expected, exact = model(x, src_key_padding_mask=padding), copy.deepcopy(model).double()
        with torch.no_grad():
            before = model(x, src_key_padding_mask=padding)
            report = fastseq.convert(model)
            assert [row.names[0] for row in report.converted] == [
                name for layer in ("layers.0", "layers.1") for name in (layer, f"{layer}.self_attn")
            ]
            assert {row.note for row in report.converted} == {""}
            with counted(model) as calls:
                actual = model(x, src_key_padding_mask=padding)
            truth = exact(x.double(), src_key_padding_mask=padding)
        assert calls == (["layers.0.self_attn", "layers.1.self_attn"] if activation is torch.tanh else [])
        assert_close_to_truth(actual, before, truth)
        with counted(model) as calls:
            torch.testing.assert_close(model(x, src_key_padding_mask=padding), expected)
        assert len(calls) == 2

    def test_some_layers_only(self):
        model, x = encoder(3), torch.randn(N, T, E)
        padding = padded(T, 3, 2)
        expected = model(x, src_key_padding_mask=padding)
        fastseq.convert(model, filter_fn=lambda module, name: "1" in name)
        with counted(model) as calls:
            torch.testing.assert_close(model(x, src_key_padding_mask=padding), expected)
        assert calls == ["layers.1.self_attn"]

    def test_revert_is_exact(self):
        model = encoder()
        before = [dict(vars(module)) for module in model.modules()]
        identities = [id(p) for p in model.parameters()]
        fastseq.convert(model)
        fastseq.convert(model)
        again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        for reverted in (model, again):
            fastseq.revert(reverted)
            assert {type(layer.self_attn) for layer in reverted.layers} == {nn.MultiheadAttention}
        assert [dict(vars(module)) for module in model.modules()] == before
        assert [id(p) for p in model.parameters()] == identities

    def test_shared_by_two_layers(self):
        model, x = encoder(), torch.randn(N, T, E)
        model.layers[1].self_attn = model.layers[0].self_attn
        expected = model(x)
        report = fastseq.convert(model)
        assert [row.names for row in report.converted] == [
            ("layers.0",),
            ("layers.0.self_attn", "layers.1.self_attn"),
            ("layers.1",),
        ]
        with counted(model) as calls:
            torch.testing.assert_close(model(x), expected)
        assert len(calls) == 2

    def test_a_failed_conversion_takes_everything_back(self, monkeypatch):
        model, x = encoder(), torch.randn(N, T, E)
        forward = fastseq.MultiheadAttention.forward
        monkeypatch.setattr(fastseq.MultiheadAttention, "forward", lambda *a, **k: (forward(*a, **k)[0] * 1.01, None))
        with pytest.raises(RuntimeError, match="the converted model disagrees"):
            fastseq.convert(model, example_inputs=x)
        assert {type(layer.self_attn) for layer in model.layers} == {nn.MultiheadAttention}


class TestTransformer:
    def model(self, **options):
        torch.manual_seed(2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return nn.Transformer(E, H, 1, 2, 16, **dict(dropout=0.0, batch_first=True) | options)

    def inputs(self):
        source, target = torch.randn(N, T, E), torch.randn(N, T - 1, E)
        masks = dict(
            src_key_padding_mask=padded(T, 3, 2),
            memory_key_padding_mask=padded(T, 3, 2),
            tgt_key_padding_mask=padded(5, 4, 3)[:, : T - 1],
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(T - 1) < 0,
            tgt_is_causal=True,
        )
        return source, target, masks

    def test_all_of_them_run(self):
        model = self.model().eval()
        source, target, masks = self.inputs()
        with torch.no_grad():
            expected = model(source, target, **masks)
            report = fastseq.convert(model, example_inputs=(source, target, masks))
            assert len(report) == 6 and not report.skipped
        with counted(model) as calls:
            torch.testing.assert_close(model(source, target, **masks), expected)
        assert sorted(calls) == sorted(name for row in report.converted for name in row.names if name.endswith("attn"))

    @pytest.mark.parametrize("batch_first", [False, True])
    def test_example_inputs_with_dropout_and_gradients(self, batch_first):
        model = self.model(dropout=0.3, batch_first=batch_first)
        source, target, masks = self.inputs()
        if not batch_first:
            source, target = source.transpose(0, 1), target.transpose(0, 1)
        assert fastseq.convert(model, example_inputs=(source, target, masks))

    def test_training_goes_the_same_way(self):
        """Losses of eight steps of SGD, as near to those in fp64 as torch's own."""
        source, target, masks = self.inputs()

        def losses(model):
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            values = []
            dtype = next(model.parameters()).dtype
            for step in range(8):
                if step == 2 and convert:
                    fastseq.convert(model)
                optimizer.zero_grad()
                loss = (model(source.to(dtype), target.to(dtype), **masks) - target.to(dtype).flip(1)).square().mean()
                loss.backward()
                optimizer.step()
                values.append(loss.detach())
            return torch.stack(values)

        convert = False
        truth, expected = losses(self.model().double()), losses(self.model())
        convert = True
        actual = losses(self.model())
        assert truth[-1] < truth[0] - 0.1
        assert_close_to_truth(actual, expected, truth)

    def test_patched_builds_ours(self):
        with fastseq.patched():
            patched = self.model().eval()
            layer = nn.TransformerEncoderLayer(E, H, 16, batch_first=True).eval()
            assert nn.MultiheadAttention is nn.modules.activation.MultiheadAttention
            assert type(nn.MultiheadAttention(E, H)) is fastseq.MultiheadAttention
        assert nn.modules.transformer.MultiheadAttention is nn.MultiheadAttention
        assert type(nn.MultiheadAttention(E, H)) is nn.MultiheadAttention
        plain = self.model().eval()
        source, target, masks = self.inputs()
        attentions = [m for m in patched.modules() if isinstance(m, nn.MultiheadAttention)]
        assert {type(m) for m in attentions} == {fastseq.MultiheadAttention} and len(attentions) == 5
        with counted(patched) as calls:
            actual = patched(source, target, **masks)
        assert len(calls) == 5
        torch.testing.assert_close(actual, plain(source, target, **masks))
        with counted(layer) as calls:
            layer(source)
        assert calls == ["self_attn"]


class Own(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return nn.MultiheadAttention.forward(self, *args, **kwargs)


def parametrized():
    module = nn.MultiheadAttention(E, H)
    parametrizations.weight_norm(module, "in_proj_weight")
    return module


REFUSED = [
    (lambda: Own(E, H), "subclass of torch.nn.MultiheadAttention with its own forward"),
    (parametrized, r"parametrized .*in_proj_weight.*convert before"),
    (lambda: torch.ao.nn.quantizable.MultiheadAttention(E, H), "quantized"),
    (lambda: nn.MultiheadAttention(E, H).to(torch.float8_e5m2), "no fastseq kernel runs float8_e5m2 on cpu here"),
]


class TestChoice:
    @pytest.mark.parametrize(("build", "reason"), REFUSED)
    def test_left_alone(self, build, reason):
        model = nn.Sequential(build())
        kinds = [type(m) for m in model.modules()]
        with pytest.raises(NotImplementedError, match=reason):
            fastseq.convert(model, on_unsupported="raise")
        with pytest.warns(UserWarning, match="nothing to convert"):
            report = fastseq.convert(model)
        assert re.search(reason, report.skipped[0].reason) and [type(m) for m in model.modules()] == kinds

    @pytest.mark.parametrize(
        "modules", ["MultiheadAttention", "nn.MultiheadAttention", nn.MultiheadAttention, fastseq.MultiheadAttention]
    )
    def test_by_name(self, modules):
        model = nn.ModuleDict({"rnn": nn.LSTM(E, E), "attention": nn.MultiheadAttention(E, H)})
        report = fastseq.convert(model, modules)
        assert [row.names for row in report.converted] == [("attention",)] and type(model.rnn) is nn.LSTM

    @pytest.mark.parametrize("keep", [False, True])
    def test_type_and_backend(self, keep):
        module, x = nn.MultiheadAttention(E, H), torch.randn(T, N, E)
        expected, state = module(x, x, x), list(module.state_dict())
        report = fastseq.convert(module, keep_type=keep)
        assert type(module) is fastseq.MultiheadAttention is keep_type.MultiheadAttention
        assert isinstance(module, nn.MultiheadAttention) and list(module.state_dict()) == state
        assert report.converted[0].new == "fastseq.MultiheadAttention"
        used = fastseq.explain(module, x, x, x, need_weights=False).backends
        assert [report.converted[0].backend] == used == ["cpu"]
        for a, e in zip(module(x, x, x), expected, strict=True):
            torch.testing.assert_close(a, e)
        fastseq.revert(module)
        assert type(module) is nn.MultiheadAttention

    def test_meta(self):
        report = fastseq.convert(nn.MultiheadAttention(E, H, device="meta"))
        assert report.converted[0].backend is None
