"""``torch.set_float32_matmul_precision``: "high" or "medium" has AMX multiply float32 in two parts of bfloat16, not in three."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq
from fastseq.backends import library, watching
from fastseq.choice import lengths as limits

pytestmark = pytest.mark.skipif(library.reason() is not None, reason="needs the library")

KINDS: dict[str, Callable[..., Any]] = {
    "LSTM": fastseq.LSTM,
    "GRU": fastseq.GRU,
    "RNN": fastseq.RNN,
    "CoupledLSTM": fastseq.CoupledLSTM,
    "PeepholeLSTM": fastseq.PeepholeLSTM,
    "LayerNormLSTM": fastseq.LayerNormLSTM,
}
HIDDEN = 112  # of fewer units, an RNN's weights are too few to be multiplied in parts
# Relative root mean squares: what two parts leave out is up to 2^-16 of a product, 5e-6 after many of them; three leave less than
# a rounding. A product that is missing beside that of the first parts would show as 1e-3.
TWO, THREE = (1e-6, 1.2e-5), (0.0, 6e-7)


@pytest.fixture(autouse=True)
def ours():
    library.load()
    with limits.everywhere(limits.OURS):
        yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def amx(monkeypatch):
    monkeypatch.setenv("FASTSEQ_CPU_LEVEL", "amx")
    if torch.ops.fastseq_native.cpu_level() != "amx":
        pytest.skip("this processor has no AMX")


class Call:
    def __init__(self, kind: str, steps: int = 24, batch: int = 32, dtype: torch.dtype = torch.float32, packed: bool = False):
        torch.manual_seed(0)
        self.module = KINDS[kind](48, HIDDEN, bidirectional=True, dtype=dtype)
        self.x, self.grad = torch.randn(steps, batch, 48, dtype=dtype), torch.randn(steps, batch, 2 * HIDDEN, dtype=dtype)
        self.lengths = torch.arange(batch) % 8 + steps - 7 if packed else None

    def outputs(self) -> list[Tensor]:
        with torch.no_grad():
            y, finals = self.module(self._input(self.x))
        return [y.data if self.lengths is not None else y, *(finals if isinstance(finals, tuple) else (finals,))]

    def gradients(self, between: Callable[[], None] = lambda: None) -> list[Tensor]:
        x = self.x.clone().requires_grad_()
        y = self.module(self._input(x))[0]
        y = y.data if self.lengths is not None else y
        between()
        grad = self.grad.flatten()[: y.numel()].view(y.shape)
        return [y, *torch.autograd.grad(y, [x, *self.module.parameters()], grad)]

    def _input(self, x: Tensor) -> Any:
        return x if self.lengths is None else pack_padded_sequence(x, self.lengths, enforce_sorted=False)

    def double(self) -> Call:
        twin = copy.copy(self)
        twin.module, twin.x, twin.grad = copy.deepcopy(self.module).double(), self.x.double(), self.grad.double()
        return twin


def rms(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    pairs = zip(found, truth, strict=True)
    return [((a - b).square().mean() / b.square().mean()).sqrt().item() for a, b in pairs]


def check(found: list[Tensor], truth: list[Tensor], bounds: tuple[float, float]) -> None:
    errors = rms(found, truth)
    assert all(bounds[0] <= error <= bounds[1] for error in errors), errors


@pytest.mark.parametrize("precision, bounds", [("highest", THREE), ("high", TWO), ("medium", TWO)])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "CoupledLSTM", "PeepholeLSTM"])
class TestParts:
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("by_ops", [False, True])
    def test_errors(self, amx, kind, precision, bounds, packed, by_ops):
        """Of outputs, of the gradients that go through the steps, and of sums over all rows."""
        call = Call(kind, packed=packed)
        truths = call.double().outputs(), call.double().gradients()
        torch.set_float32_matmul_precision(precision)
        if by_ops:  # whoever looks on sees the registered ops
            with watching(lambda query, chosen: None):
                found = call.outputs(), call.gradients()
        else:
            found = call.outputs(), call.gradients()
        check(found[0], truths[0], bounds)
        for own, true in zip(found[1], truths[1], strict=True):
            check([own], [true], bounds if true.dim() > 1 else (0.0, bounds[1]))

    def test_each_pass_asks(self, amx, kind, precision, bounds):
        """The forward and the backward pass have the precision that is set when they run."""
        call = Call(kind)
        truth = call.double().gradients()
        found = call.gradients(lambda: torch.set_float32_matmul_precision(precision))
        check(found[:1], truth[:1], THREE)
        check(found[1:4], truth[1:4], bounds)


def test_layer_norm(amx):
    """What is multiplied is normalized after, which lifts errors."""
    call = Call("LayerNormLSTM")
    truth = call.double().outputs()
    three = rms(call.outputs(), truth)
    torch.set_float32_matmul_precision("high")
    for own, full in zip(rms(call.outputs(), truth), three, strict=True):
        assert TWO[0] < 3 * full < own < 40 * full


@pytest.mark.parametrize("level", ["default", "avx2", "avx512"])
def test_without_amx_nothing_changes(level, monkeypatch):
    monkeypatch.setenv("FASTSEQ_CPU_LEVEL", level)
    if torch.ops.fastseq_native.cpu_level() != level:
        pytest.skip(f"this processor has no {level}")
    call = Call("LSTM")
    expected = call.outputs()
    torch.set_float32_matmul_precision("high")
    assert all(torch.equal(*pair) for pair in zip(call.outputs(), expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_do_not_change(amx, dtype):
    call = Call("GRU", dtype=dtype)
    expected = call.gradients()
    torch.set_float32_matmul_precision("high")
    assert all(torch.equal(*pair) for pair in zip(call.gradients(), expected, strict=True))


def test_few_sequences_are_multiplied_in_full(amx):
    call = Call("LSTM", batch=4)
    expected = call.outputs()
    torch.set_float32_matmul_precision("high")
    assert all(torch.equal(*pair) for pair in zip(call.outputs(), expected, strict=True))


@pytest.mark.parametrize("scale", [1e-34, 1e33])
def test_beyond_the_range_of_parts(amx, scale):
    """Multiply-adds take over, as they do from three parts."""
    call = Call("RNN")
    call.x *= scale
    expected = call.outputs()
    torch.set_float32_matmul_precision("high")
    assert all(torch.equal(*pair) for pair in zip(call.outputs(), expected, strict=True))


def test_precision_of_a_backend(amx):
    """What PyTorch's newer names for the same setting say."""
    call = Call("LSTM")
    expected = call.outputs()
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        check(call.outputs(), call.double().outputs(), TWO)
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"
        assert all(torch.equal(*pair) for pair in zip(call.outputs(), expected, strict=True))
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
