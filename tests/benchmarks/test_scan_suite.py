from __future__ import annotations

import json

import pytest
import torch

from fastseq.benchmarks import cli
from fastseq.benchmarks.measure.case import Options
from fastseq.benchmarks.measure.check import check_provider
from fastseq.benchmarks.measure.results import Row
from fastseq.benchmarks.providers.linear import IN_LOGARITHMS, LAYERS, LINEAR_PROVIDERS
from fastseq.benchmarks.providers.scan import LOOP, OWN, SCAN_PROVIDERS
from fastseq.benchmarks.roofline.model import roofline_of
from fastseq.benchmarks.roofline.peaks import Peaks
from fastseq.benchmarks.suites import scan
from fastseq.benchmarks.workloads.linear import InLogarithms, LinearWorkload, Loop
from fastseq.benchmarks.workloads.scan import ScanWorkload, loop


def checked(build, w):
    return check_provider(lambda shape: (build(shape), ""), w)


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("name", SCAN_PROVIDERS)
def test_every_provider_passes_the_gate(name, mode):
    result = checked(SCAN_PROVIDERS[name].build, ScanWorkload("scan", 40, 2, 8, 8, mode))
    assert result.ok, result.reason
    assert result.bound < 1e-3


@pytest.mark.parametrize(
    "wrong",
    [
        lambda b, a: loop(b.flip(0), a.flip(0)).flip(0),  # the other way
        lambda b, a: torch.cat((loop(b[:4], a[:4]), loop(b[4:], a[4:]))),  # a chunk that starts anew
        lambda b, a: loop(b, a.roll(1, 0)),  # another step's coefficient
        lambda b, a: loop(b, a.roll(1, 1)),  # another row's
    ],
    ids=["reversed", "cut", "late", "row"],
)
def test_a_wrong_scan_is_refused(wrong):
    result = checked(lambda w: wrong, ScanWorkload("scan", 40, 3, 8, 8))
    assert not result.ok and "output is off by" in result.reason


def test_roofline():
    """At 1 GB/s three numbers of each step forward, eight with the way back."""
    peaks = Peaks("cpu", 1, "float32", {16: 1e9, 1 << 20: 1e9}, {131072: 1e9}, 1e12)
    numbers = 1000 * 2 * 64
    for mode, streams in (("inference", 3), ("training", 8)):
        found = roofline_of(ScanWorkload("scan", 1000, 2, 64, 64, mode), peaks)
        assert found.seconds == pytest.approx(streams * 4 * numbers / 1e9)


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_plan(device, quick):
    cases = scan.plan(Options(device, "float32", (1,), quick))
    scans, layers = ([c for c in cases if (c.group == scan.GROUP) == of_scan] for of_scan in (True, False))
    assert {p.provider for c in scans for p in c.participants} == set(SCAN_PROVIDERS)
    assert {p.provider for c in layers for p in c.participants} == {*LINEAR_PROVIDERS, scan.GRU}
    assert {dict(c.baseline)[OWN] for c in scans} == {LOOP} and {over for c in layers for _, over in c.baseline} == {scan.GRU}
    assert {c.group for c in cases} == set(scan.CURVES.groups)
    if quick:
        assert sum(c.effort.seconds for c in cases) < 10


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("name", LINEAR_PROVIDERS)
def test_every_layer_passes_the_gate(name, mode):
    provider = LINEAR_PROVIDERS[name]
    result = check_provider(lambda w: (provider.build(w), provider.layout), LinearWorkload(provider.function, 40, 2, 8, 8, mode))
    assert result.ok, result.reason


def test_a_wrong_layer_is_refused():
    class Late(Loop):
        def forward(self, x):
            return super().forward(x.roll(1, 0))

    result = check_provider(lambda w: (Late(w.function, w.I, w.H), "time"), LinearWorkload("min_gru", 40, 2, 8, 8))
    assert not result.ok and "output is off by" in result.reason


def test_logarithms_are_the_loop():
    """In fp64 minGRU's closed form is its loop; in fp32 it is further off than the loop's own check allows."""
    one, other = Loop("min_gru", 4, 8), InLogarithms("min_gru_log", 4, 8)
    other.load_state_dict(one.state_dict())
    x = torch.randn(50, 2, 4, dtype=torch.float64)
    torch.testing.assert_close(one.double()(x), other.double()(x))


def test_gates_ask_every_point_that_was_measured():
    def row(provider, seconds, T, B, H=256, mode="training"):
        w = LinearWorkload("min_gru", T, B, H, H, mode)
        found = Row.of(scan.NAME, "layers MinGRU", provider, w)
        found.status, found.time = "ok", {"median": seconds, "low": seconds, "high": seconds}
        return found

    rows = [row("fastseq.MinGRU", 1.0, 1024, B) for B in (1, 8)]
    rows += [row(scan.GRU, seconds, 1024, B) for B, seconds in ((1, 3.0), (8, 1.5))]
    rows += [row(IN_LOGARITHMS, 6.0, 1024, B) for B in (1, 8)] + [row(scan.GRU, 0.1, 128, 1)]
    gru, logs = scan.verdicts(rows)
    assert gru["found"] == 1.5 and not gru["reached"] and gru["points"] == 2 and gru["worst"]["point"] == "T=1024, B=8"
    assert logs["found"] == 6.0 and logs["reached"] and not logs["goal reached"]
    assert len(LAYERS) == 6


def test_a_run_from_end_to_end(tmp_path, capsys):
    only = f"T=128 provider={LOOP.replace(' ', '_')},{OWN}"
    argv = ["--suite", "scan", "--quick", "--threads", "1", "--device", "cpu", "--only", only, "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {r["provider"] for r in rows} == {LOOP, OWN} and len(rows) == 4
    for row in rows:
        assert row["status"] == "ok" and row["check"]["ok"] and row["roofline"]["seconds"] > 0
    assert "Linear recurrence" in capsys.readouterr().out
