"""The Triton attention backward against plain PyTorch in fp64, with several tiles in every direction."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq.backends import triton as backend
from fastseq.backends.triton import _attention_backward as launcher
from fastseq.ops.types import GRADIENTS
from fastseq.reference import attention as reference
from fastseq.testing import assert_all_close_to_truth, assert_close_to_truth, pooled_error
from support.attention import AttentionCase, dense, make, spec_of
from support.battery import in_fp64

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = torch.float32 if DEVICE == "cuda" else torch.float64  # the widest that the kernels take there
TILES = AttentionCase("tiles", batch=1, heads=(2, 1), lengths=(33, 35), features=(8, 12))
TWO = replace(TILES, batch=2)
EVERYTHING = replace(
    TWO, name="everything", lengths=(18, 34), mask="bk", dead=True, bias="hqk", relative_bias=31, relative_k=45, slopes=2,
    softcap=2.0, sinks=True, dropout=0.3, left=25, right=9, bottom_right=True, offset=-1, q_lengths=(18, 11), k_lengths=(21, 34),
    time_first=True,
)  # fmt: skip
CASES = [
    TILES,
    replace(TWO, name="grouped", heads=(4, 2), lengths=(20, 35)),
    # several key heads: each query head reads its own, in the gradients of the biases too
    replace(TWO, name="grouped-biases", heads=(4, 2), lengths=(20, 35), bias="hqk", relative_bias=41, relative_k=30),
    replace(TWO, name="key-heads-broadcast-bias", heads=(3, 3), lengths=(20, 35), bias="qk", dropout=0.2),
    replace(TILES, name="causal", right=0),
    replace(TILES, name="causal-bottom-right-dead", right=0, bottom_right=True, lengths=(41, 37)),
    replace(TILES, name="window", left=7, right=3, offset=5, lengths=(50, 70)),
    replace(TILES, name="window-left", left=16, lengths=(70, 41)),
    replace(TWO, name="mask-dead", mask="bqk", dead=True),
    replace(TILES, name="softcap", softcap=0.7, bias="h"),
    replace(TWO, name="slopes-sinks", slopes=2, sinks=True),
    replace(TWO, name="dropout", dropout=0.3),
    replace(TWO, name="dropout-of-a-part", dropout=0.3, place=(9, 30, 6, 11), bias="hqk"),
    replace(TILES, name="dropout-of-a-part-by-distance", dropout=0.3, place=(9, 2, 0, 2), relative_bias=61, relative_k=35),
    replace(TWO, name="blocks", blocks="bqk", block_size=16, lengths=(64, 64)),
    replace(TWO, name="lengths", batch=3, q_lengths=(20, 33, 0), k_lengths=(35, 5, 9), bias="hqk"),
    replace(TILES, name="relative-bias", relative_bias=105, right=2),
    replace(TILES, name="relative-bias-keys-before-the-first", relative_bias=65, bottom_right=True, lengths=(40, 20)),
    replace(TILES, name="transformer-xl", relative_k=60, right=0, bottom_right=True, lengths=(18, 35)),
    replace(TILES, name="packed", packed=((20, 5), (0, 6), (13, 0), (33, 40)), right=0, bottom_right=True),
    replace(
        TILES,
        name="packed-positions",
        packed=((5, 17), (20, 14)),
        relative_bias=61,
        relative_k=35,
        dropout=0.3,
        bottom_right=True,
    ),
    EVERYTHING,
]


def _cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: value.detach().to(dtype).requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }


def _named(grads: Any, inputs: dict[str, Any], *without: str) -> dict[str, Tensor]:
    return {name: grad for name, grad in zip(GRADIENTS, grads, strict=False) if name in inputs and name not in without}


class Setting:
    """A case's inputs, what comes back to its results, and the gradients by plain PyTorch in the same dtype and in fp64."""

    def __init__(self, case: AttentionCase, dtype: torch.dtype = EXACT) -> None:
        self.changes: dict[str, Any] = {}  # of the spec, as the case does not have them
        self.inputs = make(case, dtype, DEVICE)
        self.spec = spec_of(self.inputs)
        self.wanted = [name in self.inputs for name in GRADIENTS]
        self.q, self.k, self.v = (self.inputs[name].detach() for name in "qkv")
        with torch.no_grad():
            self.out, self.lse = reference.forward(self.q, self.k, self.v, self.spec)
        self.spec = self.spec._replace(**{n: getattr(self.spec, n).detach() for n in GRADIENTS[3:] if n in self.inputs})
        self.dout, self.dlse = torch.randn_like(self.out), torch.randn_like(self.lse)

    def run(self, **changes: Any) -> tuple[Tensor, ...]:
        names = ("dout", "dlse", "q", "k", "v", "out", "lse", "spec", "wanted")
        return backend.attention_backward(*(changes.get(name, getattr(self, name)) for name in names))

    def by_torch(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The gradients by autograd, every score in memory."""
        given = {name: inputs[name] for name in GRADIENTS if name in inputs}
        out, lse, _ = dense(inputs, **self.changes)
        back = [self.dout.to(out.dtype), self.dlse.to(lse.dtype)]
        grads = torch.autograd.grad([out, lse], list(given.values()), back, allow_unused=True, materialize_grads=True)
        return dict(zip(given, grads, strict=True))

    def expected(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """By torch in the dtype, and the truth."""
        return self.by_torch(self.inputs), self.by_torch(_cast(self.inputs, torch.float64))

    def own_error(self) -> float:
        """Torch's in fp64, from that in fp32; in other dtypes it is measured beside the result."""
        if self.q.dtype != torch.float64:
            return 0.0
        return in_fp64(pooled_error(self.by_torch(_cast(self.inputs, torch.float32)), self.by_torch(self.inputs)))

    def check(self, grads: tuple[Tensor, ...]) -> None:
        assert_all_close_to_truth(_named(grads, self.inputs), *self.expected(), own_error=self.own_error())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case):
    setting = Setting(case)
    setting.check(setting.run())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", [TILES, replace(EVERYTHING, dropout=0.0)], ids=str)
def test_gradients_in_narrower_dtypes(case, dtype):
    setting = Setting(case, dtype)
    setting.check(setting.run())


@pytest.mark.parametrize("average", [False, True], ids=["heads", "average"])
@pytest.mark.parametrize(
    "name", ["grouped", "causal-bottom-right-dead", "mask-dead", "dropout", "lengths", "transformer-xl", "everything"]
)
def test_gradients_of_the_weights(name, average):
    setting = Setting(next(case for case in CASES if case.name == name))
    q, k, lse, spec, wanted = setting.q, setting.k, setting.lse, setting.spec, setting.wanted
    dw = torch.randn_like(reference.weights(q, k, lse, spec, average))
    *grads, delta = backend.attention_weights_backward(dw, q, k, lse, spec, average, wanted)
    assert grads[2].numel() == 0
    found = {**_named(grads, setting.inputs, "v"), "delta": delta}

    def by_torch(dtype: torch.dtype) -> dict[str, Tensor]:
        inputs = _cast(setting.inputs, dtype)
        given = {name: inputs[name] for name in GRADIENTS if name in inputs and name != "v"}
        weights = dense(inputs)[2]
        own_dw = dw.to(dtype)
        grads = torch.autograd.grad(weights.mean(1) if average else weights, list(given.values()), own_dw)
        each = own_dw[:, None] / weights.shape[1] if average else own_dw
        return {**dict(zip(given, grads, strict=True)), "delta": (weights * each).sum(-1).detach()}

    own, truth = by_torch(EXACT), by_torch(torch.float64)
    own_error = in_fp64(pooled_error(by_torch(torch.float32), truth)) if EXACT == torch.float64 else 0.0
    assert_all_close_to_truth(found, own, truth, own_error=own_error)


@pytest.mark.parametrize("shared", [1, 512], ids=["one-program", "shares"])
@pytest.mark.parametrize("dims", ["".join(d for d, on in zip("bhqk", f"{n:04b}", strict=True) if on == "1") for n in range(16)])
def test_bias_gradient_sums_what_the_bias_is_broadcast_along(dims, shared, monkeypatch):
    monkeypatch.setattr(launcher, "_SHARED", shared)
    setting = Setting(replace(TWO, lengths=(33, 17), features=(8, 8), bias=dims, right=12))
    wanted = [name == "bias" for name in GRADIENTS]
    bias = setting.run(wanted=wanted)[3]
    own, truth = setting.expected()
    assert_close_to_truth(bias, own["bias"], truth["bias"], f"bias of {dims}", own_error=setting.own_error())


@pytest.mark.parametrize(
    ("changes", "shared"),
    [
        ({}, 1),
        ({}, 512),
        ({"relative_bias_zero": -30, "relative_k_zero": 70}, 512),
        ({"relative_bias_zero": 500, "relative_k_zero": -500}, 512),
        ({"relative_bias_zero": 0, "left": 5}, 1),
        ({"left": 0, "relative_k_zero": 3}, 512),
        ({"right": 0, "offset": 20}, 512),
        ({"right": 0, "offset": -19}, 1),
    ],
    ids=str,
)
def test_relative_gradients_wherever_the_tables_begin_and_end(changes, shared, monkeypatch):
    monkeypatch.setattr(launcher, "_SHARED", shared)
    case = replace(TWO, lengths=(20, 35), features=(8, 8), q_lengths=(20, 7), relative_bias=21, relative_k=25, dropout=0.2)
    setting = Setting(replace(case, bottom_right=True), torch.float32)

    setting.spec, setting.changes = setting.spec._replace(**changes), changes
    with torch.no_grad():
        setting.out, setting.lse = reference.forward(setting.q, setting.k, setting.v, setting.spec)
    setting.check(setting.run())


def test_reruns_give_the_same_bits():
    setting = Setting(EVERYTHING, torch.float32)
    for first, second in zip(setting.run(), setting.run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", GRADIENTS)
def test_only_what_is_wanted(name):
    setting = Setting(EVERYTHING)
    grads = setting.run(wanted=[name == one for one in GRADIENTS])
    assert [one for one, grad in zip(GRADIENTS, grads, strict=True) if grad.numel()] == [name]
    place = GRADIENTS.index(name)
    own, truth = setting.expected()
    assert_close_to_truth(grads[place], own[name], truth[name], name, own_error=setting.own_error() or 1e-6)


def test_hidden_rows_and_keys_get_exact_zeros():
    """Scores that overflow without their row's lse, and NaN in all that the lengths hide."""
    lengths = {"q_lengths": (20, 33, 0, 33), "k_lengths": (35, 0, 9, 5)}
    setting = Setting(replace(TILES, batch=4, **lengths, right=0, offset=-4, relative_k=25, relative_bias=105))
    setting.spec.relative_bias.add_(1000)
    setting.lse.add_(1000)
    for b, (rows, keys) in enumerate(zip(*lengths.values(), strict=True)):
        for tensor in (setting.dout, setting.q, setting.out, setting.spec.relative_q):
            tensor[b, :, rows:] = torch.nan
        setting.lse[b, :, rows:], setting.dlse[b, :, rows:] = torch.nan, torch.nan
        for tensor in (setting.k, setting.v):
            tensor[b, :, keys:] = torch.nan
    grads = _named(setting.run(), setting.inputs)
    assert all(grad.isfinite().all() for grad in grads.values())
    for b, (rows, keys) in enumerate(zip(*lengths.values(), strict=True)):
        seen = max(0, min(keys, rows - 4))  # query i sees the keys up to i - 4
        first = 4 if seen else rows
        for name in ("q", "relative_q"):
            assert not grads[name][b, :, :first].any() and not grads[name][b, :, rows:].any()
        assert grads["q"][b, :, first + 1 : rows].any(-1).all()
        for name in ("k", "v"):
            assert not grads[name][b, :, seen:].any() and grads[name][b, :, : max(0, seen - 1)].any(-1).all()


def test_out_and_lse_may_be_of_a_larger_attention():
    setting = Setting(replace(TILES, lengths=(21, 40), right=3))
    halves = []
    for begin, end in ((0, 16), (16, 40)):
        own = setting.spec._replace(offset=-begin)
        halves.append(setting.run(k=setting.k[:, :, begin:end], v=setting.v[:, :, begin:end], spec=own))
    (dq0, dk0, dv0, *_), (dq1, dk1, dv1, *_) = halves
    setting.check((dq0 + dq1, torch.cat((dk0, dk1), 2), torch.cat((dv0, dv1), 2)))


def test_strides_of_what_comes_back():
    setting = Setting(TWO)
    plain = setting.run(dout=torch.ones_like(setting.out), dlse=torch.ones_like(setting.lse))
    ones = torch.ones((), dtype=setting.out.dtype, device=DEVICE)
    expanded = setting.run(dout=ones.expand_as(setting.out), dlse=ones.to(setting.lse.dtype).expand_as(setting.lse))
    time_first = setting.run(
        dout=torch.ones_like(setting.out).transpose(1, 2).contiguous().transpose(1, 2),
        dlse=torch.ones_like(setting.lse).mT.contiguous().mT,
        lse=setting.lse.mT.contiguous().mT,
    )
    for one, two, three in zip(plain, expanded, time_first, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


def test_without_a_gradient_of_lse():
    setting = Setting(replace(TILES, lengths=(5, 7)))
    found, zeros = setting.run(dlse=None), setting.run(dlse=torch.zeros_like(setting.lse))
    for one, two in zip(found, zeros, strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(found[0], setting.run()[0])
