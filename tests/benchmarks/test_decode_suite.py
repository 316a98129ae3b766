from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastseq.benchmarks import cli
from fastseq.benchmarks.measure.case import Options
from fastseq.benchmarks.measure.check import check_provider, problem_of
from fastseq.benchmarks.providers.decode import DECODE_PROVIDERS, GROWING, OWN, RESERVED, layer_name
from fastseq.benchmarks.roofline.model import roofline_of
from fastseq.benchmarks.roofline.peaks import Peaks
from fastseq.benchmarks.suites import decode
from fastseq.benchmarks.workloads.decode import PREFILL, TOKENS, Cache, DecodeWorkload, LayerDecoder, Own, Reserved

SMALL = DecodeWorkload("block", 9, 2, 24, 24, new=4)


def checked(build, w):
    return check_provider(lambda shape: (build(shape), ""), w)


@pytest.mark.parametrize("stage", [PREFILL, TOKENS])
@pytest.mark.parametrize("name", DECODE_PROVIDERS)
def test_every_provider_passes_the_gate(name, stage):
    provider = DECODE_PROVIDERS[name]
    w = replace(SMALL, function=provider.function.removeprefix("decode "), stage=stage)
    result = checked(provider.build, w)
    assert result.ok, result.reason
    assert 0 < result.error <= result.bound < 1e-5


class Blind(Reserved):
    """A cache whose newest key nobody reads."""

    def attend(self, q, k, v, cache):
        y, after = super().attend(q, k, v, cache)
        past = (t[:, :, : cache.length] for t in (cache.k, cache.v))
        return nn.functional.scaled_dot_product_attention(q, *past), after


class Stale(Reserved):
    """Writes every token to the same place."""

    def attend(self, q, k, v, cache):
        y, after = super().attend(q, k, v, cache)
        return y, Cache(after.k, after.v, cache.length)


class Forgets(LayerDecoder):
    def step(self, x, state):
        y, _ = super().step(x, state)
        return y, state


@pytest.mark.parametrize("build", [lambda w: Blind(w.H, w.heads), lambda w: Stale(w.H, w.heads)])
def test_a_wrong_cache_is_refused(build):
    result = checked(build, SMALL)
    assert not result.ok and "output is off by" in result.reason
    assert checked(build, replace(SMALL, stage=PREFILL)).ok


def test_a_lost_state_is_refused():
    result = checked(lambda w: Forgets(nn.LSTM(w.I, w.H)), replace(SMALL, function="lstm"))
    assert not result.ok and "output is off by" in result.reason


@pytest.mark.parametrize("name", [GROWING, RESERVED, OWN, layer_name("fastseq", "LSTM")])
def test_tokens_can_be_decoded_again(name):
    """A call is timed many times: each begins with the cache or the state that the context left."""
    provider = DECODE_PROVIDERS[name]
    w = replace(SMALL, function=provider.function.removeprefix("decode "))
    call = w.call(provider.build(w), problem_of(w))
    first, second = call.outputs()["output"], call.outputs()["output"]
    assert first.shape == (4, 2, 24) and torch.equal(first, second)


def test_prefill_leaves_the_cache_that_tokens_go_on_from():
    w = replace(SMALL, stage=PREFILL)
    call = w.call(Own(24, 4), problem_of(w))
    with call.context():
        _, cache = call.forward()
    assert cache.k.shape == (2, 4, 9 + 4, 6) and cache.length.tolist() == [9, 9]


def test_a_state_has_one_size_and_a_cache_grows():
    def size(function, T):
        return DecodeWorkload(function, T, 3, 64, 64).state_bytes

    assert size("lstm", 10) == size("lstm", 1000) == 2 * 3 * 64 * 4 and size("gru", 10) == 3 * 64 * 4
    assert size("block", 1000) == 100 * size("block", 10) == 2 * 1000 * 3 * 64 * 4


def test_rooflines():
    """At 1 GFLOP/s and 1 GB/s: tokens of one row are bound by what is read, the prefill of attention by its products."""
    peaks = Peaks("cpu", 1, "float32", {16: 1e9, 65536: 1e9}, {131072: 1e9}, 1e12)
    tokens = roofline_of(DecodeWorkload("block", 1000, 1, 64, 64, new=16), peaks)
    assert tokens.bound == "weights" and tokens.seconds == pytest.approx(16 * 4 * (8 * 64 * 64 + 2 * 1000 * 64) / 1e9)
    step = roofline_of(DecodeWorkload("lstm", 1000, 1, 64, 64, new=16), peaks)
    assert step.seconds == pytest.approx(16 * 4 * 8 * 64 * 64 / 1e9)
    prefill = roofline_of(DecodeWorkload("block", 4000, 1, 64, 64, stage=PREFILL), peaks)
    assert prefill.bound == "arithmetic"
    assert prefill.seconds == pytest.approx(2 * 4000 * (8 * 64 * 64 + 4001 * 64) / 1e12)
    chain = roofline_of(DecodeWorkload("lstm", 4000, 1, 64, 64, stage=PREFILL), peaks)
    assert chain.seconds == pytest.approx(4000 * 4 * 4 * 64 * 64 / 1e9)


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_plan(device, quick):
    cases = decode.plan(Options(device, "float32", (1,), quick))
    assert {p.provider for c in cases for p in c.participants} == set(DECODE_PROVIDERS)
    workloads = [p.workload for c in cases for p in c.participants]
    assert {w.dtype for w in workloads} == {"bfloat16" if device == "cuda" else "float32"} and {w.device for w in workloads} == {
        device
    }
    assert max(w.T for w in workloads if w.stage == PREFILL) <= 4096
    if device == "cuda":
        assert {w.H // w.heads for w in workloads} == {64} and max(w.T for w in workloads) == (4096 if quick else 32768)
    for case in cases:
        assert len({(p.workload.T, p.workload.B, p.workload.stage) for p in case.participants}) == 1
        for p in case.participants:
            assert DECODE_PROVIDERS[p.provider].function == f"decode {p.workload.function}"
    if quick:
        assert len(cases) <= 8 and sum(c.effort.seconds for c in cases) < 10


def test_a_run_from_end_to_end(tmp_path, capsys):
    only = "T=64 provider=fastseq.LSTM_(state),block_(fastseq's_cache)"
    argv = ["--suite", "decode", "--quick", "--threads", "1", "--device", "cpu", "--only", only, "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {r["provider"] for r in rows} == {"torch.nn.LSTM (state)", "fastseq.LSTM (state)", RESERVED, OWN} and len(rows) == 8
    for row in rows:
        assert row["status"] == "ok" and row["check"]["ok"] and row["time"]["median"] > 0 and row["roofline"]["seconds"] > 0
    assert {r["detail"]["state bytes"] for r in rows if r["function"] == "lstm"} == {2 * 256 * 4}
    said = capsys.readouterr().out
    assert "Time per token" in said and "State or cache" in said
