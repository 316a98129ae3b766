"""A provider that computes something else gets no time."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastseq.benchmarks.measure.case import Case, Participant
from fastseq.benchmarks.measure.check import TF32_EPS, Expected, check_provider, compare, rounding
from fastseq.benchmarks.measure.runner import Runner
from fastseq.benchmarks.measure.timing import Effort
from fastseq.benchmarks.providers.base import PROVIDERS, Provider
from fastseq.benchmarks.roofline.peaks import Peaks
from fastseq.benchmarks.workloads.base import FUNCTIONS, Workload, fp32_products

GRU = Workload("gru", T=9, B=2, I=24, H=24, mode="training")


class Off(nn.GRU):
    """A GRU whose output is off by a relative 1e-4: too little to be seen, far too much for fp32."""

    def forward(self, x, hx=None):
        output, h_n = super().forward(x, hx)
        return output * 1.0001, h_n


class LyingGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


class WrongBackward(nn.GRU):
    def forward(self, x, hx=None):
        return super().forward(LyingGradient.apply(x), hx)


class OnlyWrongWhenLong(nn.GRU):
    def forward(self, x, hx=None):
        output, h_n = super().forward(x, hx)
        return output + (0.1 if x.shape[0] > 8 else 0.0), h_n


class NotANumber(nn.GRU):
    def forward(self, x, hx=None):
        output, h_n = super().forward(x, hx)
        output = output.clone()
        output[-1, -1, -1] = float("nan")
        return output, h_n


class Short(nn.GRU):
    def forward(self, x, hx=None):
        output, h_n = super().forward(x, hx)
        return output[:-1], h_n


class Raises(nn.GRU):
    def forward(self, x, hx=None):
        raise RuntimeError("no such kernel\nsecond line")


def check(cls, workload=GRU):
    return check_provider(lambda w: (cls(w.I, w.H), "time"), workload)


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("function", ["lstm", "gru", "rnn"])
def test_torch_passes(function, packed, mode):
    w = Workload(function, T=9, B=4, I=24, H=24, mode=mode, packed=packed)
    result = check_provider(lambda shape: (FUNCTIONS[function].module(shape), "time"), w)
    assert result.ok, result.reason


@pytest.mark.parametrize("name", ["eager LSTMCell loop", "naive attention", "fused attention", "attention block"])
def test_the_other_providers_pass(name):
    p = PROVIDERS[name]
    result = check_provider(lambda w: (p.build(w), p.layout), Workload(p.function, T=40, B=3, I=32, H=32, mode="training"))
    assert result.ok, result.reason
    assert 0 < result.error < result.bound < 1e-4


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Off, "small shape .* output is off by"),
        (WrongBackward, "grad input is off by"),
        (OnlyWrongWhenLong, "actual shape .* output is off by"),
        (NotANumber, "output is off by nan"),
        (Short, "raised RuntimeError: Mismatch in shape"),
        (Raises, "raised RuntimeError: no such kernel$"),
    ],
)
def test_wrong_providers_are_refused(cls, reason):
    result = check(cls)
    assert not result.ok
    assert re.search(reason, result.reason), result.reason


def test_a_wrong_shape_is_refused_without_gradients_too():
    result = check(Short, replace(GRU, mode="inference"))
    assert "output has shape (6, 2, 24), not (7, 2, 24)" in result.reason


def test_a_wrong_gradient_does_not_count_in_inference():
    assert check(WrongBackward, replace(GRU, mode="inference")).ok


def test_a_red_row_has_no_time_and_no_speed_up():
    providers = PROVIDERS | {"wrong": Provider("wrong", "gru", "time", lambda w: Off(w.I, w.H))}
    runner = Runner("cpu", providers=providers)
    runner.peaks[1, "float32"] = Peaks("cpu", 1, "float32", {1: 1e11, 64: 1e11}, {1: 1e10}, 1e11)
    case = Case(
        "recurrent",
        "padded",
        (Participant("torch.nn.GRU", GRU), Participant("wrong", GRU)),
        Effort(seconds=0.01, min_rounds=2, max_rounds=2),
        (("wrong", "torch.nn.GRU"),),
    )
    good, bad = runner.run(case)
    assert good.status == "ok" and good.time and good.seconds > 0 and good.check["ok"]
    assert bad.status == "wrong"
    assert "off by" in bad.reason
    assert (bad.time, bad.ratio, bad.roofline, bad.memory) == (None, None, None, None)


def test_a_missing_provider_has_its_reason_in_the_row():
    absent = Provider("absent", "gru", "time", lambda w: nn.GRU(w.I, w.H), lambda w: "needs a GPU")
    runner = Runner("cpu", providers={"absent": absent})
    runner.peaks[1, "float32"] = Peaks("cpu", 1, "float32")
    (row,) = runner.run(Case("recurrent", "padded", (Participant("absent", GRU),), Effort()))
    assert (row.status, row.reason, row.time) == ("unavailable", "needs a GPU", None)


def test_what_would_not_fit_is_skipped(monkeypatch):
    monkeypatch.setattr("fastseq.benchmarks.measure.runner._free_memory", lambda device: 10**6)
    runner = Runner("cpu")
    runner.peaks[1, "float32"] = Peaks("cpu", 1, "float32", {1: 1e11, 64: 1e11}, {1: 1e10}, 1e11)
    effort = Effort(seconds=0.01, min_rounds=2, max_rounds=2)

    def run(T):
        w = Workload("attention", T, 1, 32, 32, "training")
        return runner.run(Case("sequential-vs-parallel", "length", (Participant("naive attention", w),), effort))[0]

    assert run(16).ok
    row = run(1024)
    assert row.status == "skipped" and "GiB" in row.reason and row.time is None


def test_a_recurrence_grows_with_the_length_and_attention_with_its_square(monkeypatch):
    runner = Runner("cpu")
    monkeypatch.setattr("fastseq.benchmarks.measure.runner._free_memory", lambda device: 2 * 1000 * 100)
    for function, name, skipped in (("gru", "torch.nn.GRU", False), ("attention", "naive attention", True)):
        w, provider = Workload(function, 10, 1, 32, 32), PROVIDERS[name]
        runner._last_peak[runner._series(provider, w)] = (w.T, 1000)
        assert (runner._too_large(provider, replace(w, T=700)) is not None) is skipped


@pytest.mark.parametrize("tf32", [False, True])
def test_a_gpus_rounding_is_that_of_the_products_that_the_function_makes(tf32):
    layer, attention = Workload("lstm", 8, 1, 8, 8, device="cuda"), Workload("attention", 8, 1, 8, 8, device="cuda")
    ieee = torch.finfo(torch.float32).eps
    with fp32_products(tf32=tf32):
        assert rounding(layer) == (TF32_EPS if tf32 else ieee)
    assert rounding(layer) == TF32_EPS and rounding(attention) == ieee  # torch's defaults
    assert rounding(replace(layer, device="cpu")) == ieee
    with layer.settings():
        assert rounding(layer) == ieee  # what every suite runs under


def test_fp64_is_held_to_torchs_error_in_fp32_at_its_own_rounding_step():
    """There is no finer truth: torch in fp64 is the reference itself, and others round in another order."""
    w = Workload("lstm", 40, 3, 16, 16, "training", dtype="float64")

    class Off(nn.LSTM):
        def forward(self, x, hx=None):
            y, state = super().forward(x, hx)
            return y * (1 + 1e-13), state

    right = check_provider(lambda s: (PROVIDERS["fastseq.LSTM"].build(s), "time"), w)
    assert right.ok and 0 < right.error <= right.bound < 1e-14
    assert not check_provider(lambda s: (Off(s.I, s.H), "time"), w).ok


@pytest.mark.parametrize(("name", "off", "allowed"), [("y", 1e-3, False), ("grad x", 1e-3, True), ("grad x", 1e-2, False)])
def test_torch_is_held_to_a_coarse_limit(name, off, allowed):
    """Were torch wrong, the error that it allows others would be; where a derivative jumps, terms of gradients are not alike."""
    truth = torch.ones(100, dtype=torch.float64)
    found = compare({name: truth + off}, Expected({name: truth}, {name: off}), torch.finfo(torch.float32).eps)
    assert found.ok == allowed and ("root mean square" in (found.reason or "")) != allowed


def test_a_term_of_a_gradient_may_be_another_where_a_derivative_jumps():
    truth = torch.ones(10_000, dtype=torch.float64)
    found = truth.clone()
    found[7] += 0.02  # as far as torch itself is off
    eps = torch.finfo(torch.float32).eps
    assert compare({"grad x": found}, Expected({"grad x": truth}, {"grad x": 0.02}), eps).ok
    assert not compare({"grad x": found}, Expected({"grad x": truth}, {"grad x": 1e-6}), eps).ok
