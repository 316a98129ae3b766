from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastseq.benchmarks import cli
from fastseq.benchmarks.measure.case import Options
from fastseq.benchmarks.measure.check import check_provider, problem_of
from fastseq.benchmarks.providers.variable_length import FLASH, VARIABLE_PROVIDERS
from fastseq.benchmarks.roofline.model import roofline_of
from fastseq.benchmarks.roofline.peaks import Peaks
from fastseq.benchmarks.suites import variable_length
from fastseq.benchmarks.workloads.variable_length import SPREADS, EncoderBlock, VariableWorkload, WithLengths, flash_missing

SMALL = VariableWorkload("encoder", 11, 4, 24, 24, "training")
HERE = [name for name in VARIABLE_PROVIDERS if name != FLASH]


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("name", HERE)
def test_every_provider_passes_the_gate(name, mode):
    provider = VARIABLE_PROVIDERS[name]
    w = replace(SMALL, function=provider.function.removeprefix("variable "), mode=mode)
    result = check_provider(lambda shape: (provider.build(shape), provider.layout), w)
    assert result.ok, result.reason
    assert 0 < result.error <= result.bound < 1e-5


class Unmasked(EncoderBlock):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


def test_attention_that_sees_padding_is_refused():
    result = check_provider(lambda w: (Unmasked(w), "batch"), SMALL)
    assert not result.ok and "is off by" in result.reason


def test_lengths_that_are_wrong_are_refused():
    import fastseq

    short = lambda w: [max(1, n - 1) for n in w.lengths]  # noqa: E731
    result = check_provider(lambda w: (WithLengths(fastseq.LSTM(w.I, w.H), short(w)), "time"), replace(SMALL, function="lstm"))
    assert not result.ok and "output is off by" in result.reason


@pytest.mark.parametrize("layout", ["time", "batch", "packed", "rows"])
def test_every_layout_holds_the_same_rows(layout):
    """What a module that changes nothing gives back are the valid rows, one sequence after the other."""
    w = replace(SMALL, function="lstm", mode="inference")
    problem = problem_of(w)
    call = w.call(nn.LSTM(24, 24), problem, layout if layout == "packed" else "time")
    call.layout = layout
    placed = call._place(problem.x, w)
    if layout in ("time", "batch"):
        at = placed if layout == "time" else placed.transpose(0, 1)
        assert all(not at[n:, b].any() for b, n in enumerate(w.lengths)), "what lies beyond a row is zero"
    found = call._restore(placed.data if layout == "packed" else placed)
    assert torch.equal(found, torch.cat([problem.x[:n, b] for b, n in enumerate(w.lengths)]))


@pytest.mark.parametrize("spread", SPREADS)
def test_lengths(spread):
    w = VariableWorkload("lstm", 1000, 400, 8, 8, spread=spread)
    assert len(w.lengths) == 400 and max(w.lengths) == w.lengths[0] == 1000 and min(w.lengths) >= 1
    assert w.waste == pytest.approx({"uniform": 1 / 2, "skewed": 3 / 4}[spread], abs=0.05)
    assert w.tokens == sum(w.lengths) == w.offsets[-1] and w.steps == 1000


def test_the_roofline_of_attention_counts_valid_rows():
    peaks = Peaks("cpu", 1, "float32", {16: 1e15, 65536: 1e15}, {131072: 1e15}, 1e9)
    w = replace(SMALL, mode="inference")
    pairs = sum(n * n for n in w.lengths)
    assert roofline_of(w, peaks).seconds == pytest.approx((16 * w.tokens * 24 * 24 + 4 * pairs * 24) / 1e9)
    assert roofline_of(SMALL, peaks).seconds == pytest.approx(3 * roofline_of(w, peaks).seconds)
    assert roofline_of(replace(w, function="lstm"), peaks).seconds < roofline_of(replace(w, function="lstm", B=40), peaks).seconds


def test_flash_attn_says_why_it_is_missing():
    assert "flash-attn" in flash_missing(SMALL)


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_plan(device, quick):
    cases = variable_length.plan(Options(device, "float32", (1,), quick))
    assert {p.provider for c in cases for p in c.participants} == set(VARIABLE_PROVIDERS)
    assert {c.group for c in cases} <= set(variable_length.CURVES.groups) == set(variable_length.CURVES.shown)
    for case in cases:
        (w,) = {p.workload for p in case.participants}
        assert {VARIABLE_PROVIDERS[p.provider].function for p in case.participants} == {f"variable {w.function}"}
        assert w.dtype == ("bfloat16" if device == "cuda" else "float32") and w.device == device
        first = case.participants[0].provider
        assert first.endswith("(padded)") and {base for _, base in case.baseline} == {first}
    if quick:
        assert sum(c.effort.seconds for c in cases) < 10


def test_a_run_from_end_to_end(tmp_path):
    providers = "fastseq.GRU_(lengths),fastseq_encoder_block_(rows),encoder_block_(flash-attn)"
    only = f"T=32 mode=inference cell=gru,encoder provider={providers}"
    argv = ["--suite", "variable-length", "--quick", "--threads", "1", "--device", "cpu", "--only", only, "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    rows = {r["provider"]: r for r in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert rows.pop(FLASH)["status"] == "unavailable"
    assert len(rows) == 4
    for row in rows.values():
        assert row["status"] == "ok" and row["check"]["ok"] and row["time"]["median"] > 0 and row["roofline"]["seconds"] > 0
        assert 0 < row["detail"]["padding"] < 1 and row["tokens"] < row["T"] * row["B"]
    assert rows["fastseq.GRU (lengths)"]["ratio"]["baseline"] == "torch.nn.GRU (padded)"
