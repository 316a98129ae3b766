"""TransformerEncoderLayer with gradients and dropout: a pass is one call of the library."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from modules.test_transformer import KINDS, E, H, N, both, masks, source
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastseq
from fastseq.modules import transformer
from fastseq.ops import _encoder_eager
from fastseq.testing import assert_all_close_to_truth

ONE_CALL = "_LayerBackward"
EXACT: dict[str, Any] = dict(rtol=1e-10, atol=1e-11)
RATES = {"dropout1": 0.2, "dropout": 0.3, "dropout2": 0.4, "self_attn": 0.1}  # each its own


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Scratch holds NaN until it is written."""
    monkeypatch.setenv("FASTSEQ_CPU_POISON", "1")


def results(layer: nn.Module, x: Tensor, given: dict[str, Any] | None = None, dout: Tensor | None = None) -> dict[str, Tensor]:
    """The output and every gradient."""
    x = x.detach().requires_grad_()
    out = layer(x, **(given or {}))
    parameters = dict(layer.named_parameters())
    grads = torch.autograd.grad(out, [x, *parameters.values()], torch.cos(out.detach()) if dout is None else dout)
    return {"out": out.detach(), **dict(zip(["x", *parameters], grads, strict=True))}


def check(found: dict[str, Tensor], expected: dict[str, Tensor], **bounds: Any) -> None:
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}", **(bounds or EXACT))


class Composed(nn.Module):
    """A layer of ours by functions of PyTorch, which drops what the library drops."""

    def __init__(self, layer: fastseq.TransformerEncoderLayer) -> None:
        super().__init__()
        self.layer = layer

    def named_parameters(self, *given: Any, **options: Any) -> Any:
        return self.layer.named_parameters(*given, **options)

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        calls: list[Any] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transformer, "encoder_layer", lambda *call: calls.append(call) or x)
            self.layer(x, **given)
        ((_, parameters, layer, _, meaning),) = calls
        if layer.dropouts:
            layer = layer._replace(seed=torch.randint(2**63 - 1, (2,), dtype=torch.int64))
        return _encoder_eager.composed(x, *parameters, layer=layer, meaning=meaning)


def dropping(layer: nn.Module, **rates: float) -> nn.Module:
    for name, rate in rates.items():
        setattr(layer.get_submodule(name), "dropout" if name == "self_attn" else "p", rate)
    return layer.train()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_gradients(kind, norm_first, batch_first):
    for activation in ("relu", "gelu"):
        theirs, ours = both(norm_first=norm_first, batch_first=batch_first, activation=activation)
        x, given = source(batch_first), masks(kind)
        assert ours(x.requires_grad_(), **given).grad_fn.name() == ONE_CALL
        expected = results(theirs, x, given)
        check(results(ours, x, given), expected)
        check(results(Composed(ours), x, given), expected)  # what stands for it in derivatives of another kind, and below


@pytest.mark.parametrize("shape", [(1, 1), (1, 33), (5, 1), (3, 130)])
@pytest.mark.parametrize("norm_first", [False, True])
def test_sizes(shape, norm_first):
    theirs, ours = both(batch_first=True, norm_first=norm_first)
    x = torch.randn(*shape, E).double()
    check(results(ours, x), results(theirs, x))
    check(results(ours, x[0]), results(theirs, x[0]))
    swapped = x.transpose(0, 1).contiguous().transpose(0, 1)  # time before batch in memory
    check(results(ours, swapped), results(theirs, x))
    for alike in (x[:1].expand(x.shape), x[:, :1].expand(x.shape)):  # sequences, or steps, that are one in memory
        check(results(ours, alike), results(theirs, alike))
    everywhere = torch.ones(()).double().expand(x.shape)
    check(results(ours, x, dout=everywhere), results(theirs, x, dout=everywhere))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"norm_first": True, "activation": "gelu"}, {"activation": "gelu"}], ids=str)
def test_levels(dtype, options, level):
    """Sizes from which the library's own products serve, none a multiple of a tile or of a part of the rows."""
    torch.manual_seed(1)
    theirs = nn.TransformerEncoderLayer(72, 3, 100, 0.0, batch_first=True, **options).to(dtype)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    ours = copy.deepcopy(theirs)
    fastseq.convert(ours)
    x, dout = torch.randn(2, 5, 33, 72).to(dtype)
    found, expected = results(ours, x, dout=dout), results(theirs, x, dout=dout)
    if dtype == torch.float64:
        return check(found, expected)
    truth = results(copy.deepcopy(theirs).double(), x.double(), dout=dout.double())
    assert_all_close_to_truth(found, expected, truth)
    assert all(torch.equal(value, found[name]) for name, value in results(ours, x, dout=dout).items())
    return None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("features", [1, 31, 48, 257])
def test_rows_of_equal_numbers(features, norm_first, dtype, level):
    """Nothing is left of them but the rounding of their mean, which is made large: torch's is none, or nearly so."""
    torch.manual_seed(1)
    theirs = nn.TransformerEncoderLayer(features, 1, 20, 0.0, batch_first=True, norm_first=norm_first).to(dtype)
    ours = copy.deepcopy(theirs)
    fastseq.convert(ours)
    x, dout = (torch.randn(2, 9, 1) * 3).expand(2, 9, features).to(dtype), torch.randn(2, 9, features).to(dtype)
    found, expected = results(ours, x, dout=dout), results(theirs, x, dout=dout)
    if dtype == torch.float64:
        return check(found, expected)
    truth = results(copy.deepcopy(theirs).double(), x.double(), dout=dout.double())
    return assert_all_close_to_truth(found, expected, truth)


def test_sums_of_bfloat16_are_those_of_float():
    """torch adds the rows of layer norm's gradients in bfloat16, where 256 + 1 is 256."""
    ours = fastseq.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True).bfloat16()
    x = torch.randn(4, 128, 64).bfloat16()
    found = results(ours, x, dout=torch.ones_like(x))
    assert found["norm2.bias"].eq(512).all()


def test_threads_change_nothing():
    ours = dropping(both(torch.float32, batch_first=True)[1], **RATES)
    x, found, before = torch.randn(3, 150, E), [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            found.append(results(ours, x))
    finally:
        torch.set_num_threads(before)
    for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "out"):
        assert torch.equal(found[0][name], found[1][name]), name


class TestDropout:
    @pytest.mark.parametrize("which", [*RATES, "all"])
    @pytest.mark.parametrize("norm_first", [False, True])
    @pytest.mark.parametrize("activation", ["relu", "gelu"])
    def test_as_told_by_place(self, which, norm_first, activation, level):
        """Against masks that Python draws: outputs and gradients."""
        for batch_first, dtype, bounds in ((True, torch.float64, EXACT), (False, torch.float32, dict(rtol=1e-3, atol=1e-4))):
            torch.manual_seed(1)
            options = dict(norm_first=norm_first, activation=activation, batch_first=batch_first)
            ours = fastseq.TransformerEncoderLayer(84, 3, 150, 0.0, **options).to(dtype)  # more than a group of 64 numbers
            dropping(ours, **(RATES if which == "all" else {which: RATES[which]}))
            x, dout = torch.randn(2, 5, 21, 84).to(dtype)
            found = []
            for module in (ours, Composed(ours)):
                torch.manual_seed(5)
                found.append(results(module, x, masks("none"), dout))
            check(*found, **bounds)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_short_numbers(self, dtype):
        torch.manual_seed(1)
        ours = dropping(fastseq.TransformerEncoderLayer(64, 4, 256, 0.0, "gelu").to(dtype), dropout=0.5)
        with torch.no_grad():
            ours.linear1.weight.mul_(12)
            ours.linear1.bias[::3] = 0
            ours.linear1.weight[::3] = 0
        x, dout = torch.randn(2, 9, 4, 64).to(dtype)
        found = []
        for module in (ours, Composed(ours), Composed(copy.deepcopy(ours).double())):
            torch.manual_seed(5)
            given = (x, dout) if len(found) < 2 else (x.double(), dout.double())
            found.append(results(module, given[0], dout=given[1]))
        assert_all_close_to_truth(*found)

    @pytest.mark.parametrize("bias", [0.0, -(2.0**-149)])
    def test_numbers_that_are_zero_have_gradients(self, bias):
        """gelu(0) = 0, and of the negative number that is next to 0 it is 0 with a sign, but the derivative is not."""
        ours = dropping(both(torch.float32, activation="gelu")[1], dropout=0.5)
        with torch.no_grad():
            ours.linear1.weight.zero_()
            ours.linear1.bias.fill_(bias)
        found = []
        for module in (ours, Composed(ours)):
            torch.manual_seed(5)
            found.append(results(module, source(False, torch.float32)))
        check(*found, rtol=1e-4, atol=1e-5)
        assert found[0]["linear1.bias"].ne(0).any()

    def test_rates(self):
        ours = fastseq.TransformerEncoderLayer(256, 4, 512, 0.0).train()
        with torch.no_grad():
            for parameter in (ours.self_attn.out_proj.weight, ours.linear2.weight):
                parameter.zero_()
            ours.self_attn.out_proj.bias.fill_(1e4)
            ours.linear2.bias.fill_(1e4)
        for which, expected in (("dropout1", 0.1), ("dropout2", 0.7)):
            dropping(ours, **{"dropout1": 0.0, "dropout2": 0.0, which: expected})
            out = ours(torch.zeros(64, 32, 256))
            dropped = (out < out.mean(-1, keepdim=True)).double()
            assert abs(dropped.mean() - expected) < 0.003
            assert (dropped.mean((0, 1)) - expected).abs().max() < 0.06  # of no feature, and in no row, more than elsewhere
            assert (dropped.mean(2) - expected).abs().max() < 0.2

    def test_repeatable_and_the_same_without_gradients(self):
        ours, x = dropping(both(batch_first=True)[1], **RATES), source(True)
        outs = []
        for gradients in (True, True, False):
            torch.manual_seed(3)
            with torch.set_grad_enabled(gradients):
                outs.append(ours(x).detach())
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
        assert not torch.equal(outs[0], ours(x))

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpoints(self, reentrant):
        ours, x = dropping(both(batch_first=True)[1], **RATES), source(True)
        torch.manual_seed(3)
        expected = results(ours, x)

        def stored(x: Tensor) -> Tensor:
            return checkpoint(ours, x, use_reentrant=reentrant)

        torch.manual_seed(3)
        given = x.detach().requires_grad_()
        out = stored(given)
        out.backward(torch.cos(out.detach()))
        assert torch.equal(out, expected["out"]) and torch.equal(given.grad, expected["x"])
        assert all(torch.equal(p.grad, expected[name]) for name, p in ours.named_parameters())

    @pytest.mark.parametrize("part", ["dropout", "dropout1", "dropout2", "self_attn"])
    def test_alone_in_training(self, part):
        """Monte Carlo dropout: the model in eval mode, what draws in training, without gradients."""
        ours, x = dropping(both()[1], **RATES).eval(), source(False)
        ours.get_submodule(part).train()
        found = []
        for module in (ours, Composed(ours)):
            torch.manual_seed(5)
            with torch.no_grad():
                found.append(module(x))
        torch.testing.assert_close(*found, **EXACT)
        with torch.no_grad():
            assert not torch.equal(found[0], ours.eval()(x))

    def test_what_is_declined_draws_nothing(self):
        theirs, ours = both(bias=True)
        for module in (theirs, ours):
            dropping(module, dropout=0.3)
            module.linear2.bias = None  # the library wants one
            torch.manual_seed(5)
            module.found = module(source(False))
        torch.testing.assert_close(ours.found, theirs.found, **EXACT)
        states = []
        for x in (source(False), source(False)[..., ::2]):
            layer = dropping(both()[1], dropout=0.3)
            torch.manual_seed(5)
            before = torch.get_rng_state()
            try:
                layer(x)
            except (RuntimeError, AssertionError):
                states.append(torch.equal(before, torch.get_rng_state()))
        assert states == [True]


class TestDerivatives:
    @pytest.mark.parametrize("rates", [{}, RATES], ids=["plain", "dropout"])
    @pytest.mark.parametrize("norm_first", [False, True])
    def test_of_derivatives(self, norm_first, rates):
        """torch's attention has none."""
        ours = dropping(both(norm_first=norm_first, activation="gelu", batch_first=True)[1], **rates)
        x, found = source(True)[:2, :3], []
        for module in (ours, Composed(ours)):
            torch.manual_seed(5)
            given = x.detach().requires_grad_()
            out = module(given)
            tensors = [given, *(p for _, p in module.named_parameters())]
            grads = torch.autograd.grad(out.sin().sum(), tensors, create_graph=True)
            found.append([*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)])
        for own, other in zip(*found, strict=True):
            torch.testing.assert_close(own, other, **EXACT)

    def test_many_at_once(self):
        theirs, ours = both(batch_first=True)
        found = []
        for module in (ours, theirs):
            x = source(True).requires_grad_()
            out = module(x)
            douts = torch.eye(4, dtype=torch.float64)[:, None, :, None].expand(4, N, 4, E)
            douts = nn.functional.pad(douts, (0, 0, 0, out.shape[1] - 4))
            found.append(torch.autograd.grad(out, [x, *module.parameters()], douts, is_grads_batched=True))
        for own, other in zip(*found, strict=True):
            torch.testing.assert_close(own, other, **EXACT)

    def test_twice_through_one_graph(self):
        ours, x = dropping(both()[1], **RATES), source(False).requires_grad_()
        out = ours(x)
        first, second = (torch.autograd.grad(out, [x, *ours.parameters()], out.detach(), retain_graph=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_parameters_changed_in_between(self):
        ours = both()[1]
        out = ours(source(False).requires_grad_())
        with torch.no_grad():
            ours.linear1.weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()

    @pytest.mark.parametrize("norm_first", [False, True])
    @pytest.mark.parametrize("wanted", ["x", "linear1.weight", "norm1.bias", "self_attn.in_proj_bias", "norm2.weight"])
    def test_some(self, wanted, norm_first):
        theirs, ours = both(norm_first=norm_first)
        found = []
        for module in (ours, theirs):
            module.requires_grad_(False)
            x = source(False)
            tensor = x if wanted == "x" else module.get_parameter(wanted)
            tensor.requires_grad_()
            out = module(x)
            assert module is theirs or out.grad_fn.name() == ONE_CALL
            out.sin().sum().backward()
            found.append(tensor.grad)
            assert sum(p.grad is not None for p in module.parameters()) == (wanted != "x")
        torch.testing.assert_close(*found, **EXACT)

    def test_added_to_those_that_are_there(self):
        theirs, ours = both()
        for module in (ours, theirs):
            for _ in range(2):
                module(source(False)).sin().sum().backward()
        for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad, **EXACT)


class TestOtherWays:
    @pytest.mark.parametrize("part", ["self_attn.out_proj", "linear1", "norm1", "dropout2", "self_attn"])
    @pytest.mark.parametrize(
        "register", ["register_full_backward_hook", "register_full_backward_pre_hook", "register_forward_hook"]
    )
    def test_hooks(self, part, register):
        theirs, ours = both()
        seen: dict[nn.Module, list[int]] = {theirs: [], ours: []}
        for module, calls in seen.items():
            getattr(module.get_submodule(part), register)(lambda *_, calls=calls: calls.append(1))
        check(results(ours, source(False)), results(theirs, source(False)))
        assert seen[ours] == [1]  # torch's attention does not call its out_proj

    def test_masks_with_gradients(self):
        theirs, ours = both()
        found = []
        for module in (ours, theirs):
            mask = torch.zeros(source(False).shape[0], source(False).shape[0], dtype=torch.float64, requires_grad=True)
            module(source(False), mask).sin().sum().backward()
            found.append(mask.grad)
        torch.testing.assert_close(*found, **EXACT)

    def test_autocast(self):
        theirs, ours = both(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            assert ours(source(False, torch.float32)).grad_fn.name() != ONE_CALL

    def test_whole_encoder(self):
        torch.manual_seed(0)
        theirs = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 20, 0.0, batch_first=True), 3).double()
        ours = copy.deepcopy(theirs)
        fastseq.convert(ours)
        for given in ({}, {"src_key_padding_mask": masks("padding")["src_key_padding_mask"]}):
            check(results(ours.train(), source(True), given), results(theirs.train(), source(True), given))
