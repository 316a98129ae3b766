from __future__ import annotations

import json

import pytest
import torch

from fastseq.benchmarks import cli
from fastseq.benchmarks.measure.case import Options
from fastseq.benchmarks.measure.check import check_provider
from fastseq.benchmarks.providers.scan import LOOP, OWN, SCAN_PROVIDERS
from fastseq.benchmarks.roofline.model import roofline_of
from fastseq.benchmarks.roofline.peaks import Peaks
from fastseq.benchmarks.suites import scan
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
    assert {p.provider for c in cases for p in c.participants} == set(SCAN_PROVIDERS)
    assert {dict(c.baseline)[OWN] for c in cases} == {LOOP}
    if quick:
        assert sum(c.effort.seconds for c in cases) < 10


def test_a_run_from_end_to_end(tmp_path, capsys):
    only = f"T=128 provider={LOOP.replace(' ', '_')},{OWN}"
    argv = ["--suite", "scan", "--quick", "--threads", "1", "--device", "cpu", "--only", only, "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {r["provider"] for r in rows} == {LOOP, OWN} and len(rows) == 4
    for row in rows:
        assert row["status"] == "ok" and row["check"]["ok"] and row["roofline"]["seconds"] > 0
    assert "Linear recurrence" in capsys.readouterr().out
