"""What the suites that are tables of cases show: panels, fits, means, losses, and rows without a figure."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
from torch import nn

from fastseq.benchmarks.measure.case import Case, Participant
from fastseq.benchmarks.measure.results import Results, Row
from fastseq.benchmarks.measure.runner import Runner
from fastseq.benchmarks.measure.timing import Effort
from fastseq.benchmarks.providers.base import Provider
from fastseq.benchmarks.report.curves import PEAK, TIME, Curves, number, of_metric, share
from fastseq.benchmarks.report.model import Cell
from fastseq.benchmarks.report.plots import style
from fastseq.benchmarks.workloads.base import Metric, Workload

NAME = "curves"
ACCURACY, NORM = of_metric("Accuracy", share, 0), of_metric("Norm", number, 10, decays=True)
CURVES = Curves(
    NAME, "A title", ("Words.",), {"a": "of a", "b": "of b"}, {"a": (TIME, PEAK), "b": (ACCURACY, NORM)}, notes={"a": "A note."}
)
OTHER, OWN = "torch.nn.LSTM", "fastseq.LSTM"


def timed(T, provider, seconds, ratio=None, **values):
    row = Row.of(NAME, "a", provider, replace(Workload("lstm", T, 2, 8, 8), **values))
    row.time = {"median": seconds, "low": 0.9 * seconds, "high": 1.1 * seconds, "fastest": seconds, "rounds": 5, "calls": 1}
    row.first = 3.0 if provider == OWN else None
    row.memory, row.parameters, row.chose = 1024 * T, 640, ["backend: cpu"] if provider == OWN else []
    row.check = {"ok": True, "error": 2e-7, "bound": 1e-6, "worst": "output", "reason": None}
    row.roofline = {"seconds": seconds / 2, "bound": "weights", "note": "1 KiB at 1 GB/s each step"}
    if ratio:
        row.ratio = {"baseline": OTHER, "median": ratio, "low": 0.9 * ratio, "high": 1.1 * ratio}
    return row


def found(T, provider, values):
    row = Row.of(NAME, "b", provider, Workload("lstm", T, 2, 8, 8, "training"))
    row.metric = Metric.of("norm", "", values).as_dict()
    return row


def results(*rows):
    return Results({"device": "cpu", "device name": "a CPU"}, {}, list(rows), [], 1.0)


@pytest.fixture
def both():
    """Other takes T² ms, own T ms: 4 to 16 times as fast."""
    lengths = (4, 8, 16)
    rows = [timed(T, OTHER, 1e-3 * T * T) for T in lengths] + [timed(T, OWN, 1e-3 * T, float(T)) for T in lengths]
    return results(*rows, *(found(T, OWN, [0.5**T, 0.5**T, 0.6**T]) for T in lengths))


def table(of, title):
    (section,) = CURVES.present(of)
    return next((t for t in section.tables if t.title.startswith(title)), None)


def text(cell):
    return cell.text if isinstance(cell, Cell) else cell


def test_fits_and_means(both):
    derived = CURVES.derive(both)
    json.dumps(derived, allow_nan=False)
    fits = {(f["panel"], f["provider"], f["quantity"]): f for f in derived["fits"]}
    assert fits["of a, forward", OTHER, "Time"]["exponent"] == pytest.approx(2)
    for quantity in ("Time", "Peak memory"):
        assert fits["of a, forward", OWN, quantity]["exponent"] == pytest.approx(1)
    assert "factor" not in fits["of a, forward", OWN, "Time"]
    assert fits["of b, forward + backward", OWN, "Norm"]["factor"] == pytest.approx(0.5)
    assert ("of b, forward + backward", OWN, "Accuracy") not in fits, "what lies between 0 and 1 has no power law"
    assert derived["means"] == [
        {"panel": "of a, forward", "provider": OWN, "over": OTHER, "points": 3, "mean": pytest.approx(8), "reliable": True}
    ]
    assert derived["losses"] == derived["untimed"] == []


def test_tables(both):
    times = table(both, "Time: of a")
    assert times.columns == ["", "T=4", "T=8", "T=16", "grows as"] and times.note == "A note."
    assert [[text(c) for c in row] for row in times.rows] == [
        [OTHER, "16.0 ms", "64.0 ms", "256 ms", "T²·⁰⁰"],
        [OWN, "4.00 ms", "8.00 ms", "16.0 ms", "T¹·⁰⁰"],
    ]
    ratios = table(both, "Speed-up: of a")
    assert [text(c) for c in ratios.rows[0]] == [OWN, OTHER, "4.00×", "8.00×", "16.00×", "50%"]
    norms = table(both, "Norm: of b")
    assert norms.columns[-1] == "factor for a step" and text(norms.rows[0][-1]) == "0.5"
    assert norms.rows[0][1].hint == "0.06 to 0.13", "the extremes over seeds"
    ran = table(both, "What ran")
    assert [text(c) for c in ran.rows[1]] == [OWN, "6 of 6", "640", "2.0e-07", "20%", "3.00 s", "–", "backend: cpu"]
    (section,) = CURVES.present(both)
    assert [c.value for c in section.cards] == ["8.00×"] and section.text[-1] == "H=8, B=2, float32, threads=1."


def test_sizes_that_vary_make_panels():
    rows = [timed(4, OTHER, 1.0, B=B, dtype=dtype) for B in (1, 16) for dtype in ("float32", "bfloat16")]
    assert list(CURVES.panels(rows)) == [
        "of a, B=1, float32", "of a, B=1, bfloat16", "of a, B=16, float32", "of a, B=16, bfloat16",
    ]  # fmt: skip
    apart = [timed(4, OTHER, 1.0, H=64), found(4, OWN, [1.0])]
    assert list(CURVES.panels(apart)) == ["of a, forward", "of b, forward + backward"], "sizes of other groups say nothing"


def test_losses_and_what_has_no_figure(both):
    slow, wrong, absent = (r for r in both.rows if r.provider == OWN and r.group == "a")
    slow.ratio["median"] = 0.5
    wrong.status, wrong.reason, wrong.time, wrong.ratio = "wrong", "output is off by 1", None, None
    absent.status, absent.reason, absent.time, absent.ratio = "unavailable", "not installed", None, None
    derived = CURVES.derive(both)
    assert derived["losses"] == [{"point": f"{OWN}, of a, forward, T=4", "to": OTHER, "ratio": 0.5}]
    assert [(u["status"], u["reason"]) for u in derived["untimed"]] == [
        ("wrong", "output is off by 1"),
        ("unavailable", "not installed"),
    ]
    assert [text(c) for c in table(both, "Time: of a").rows[1]] == [OWN, "4.00 ms", "wrong result", "–", "–"]
    assert table(both, "Points that fastseq loses: 1").rows[0][1].tone == "bad"
    assert text(table(both, "What ran").rows[1][3]) == "1 wrong"


def test_nothing_but_rows_without_a_figure():
    row = timed(4, OWN, 1.0)
    row.status, row.reason, row.time = "unavailable", "not installed", None
    (section,) = CURVES.present(results(row))
    assert section.figures == [] and [t.title for t in section.tables] == ["What ran"]
    with pytest.raises(ValueError, match="--picture: this run of the suite curves has nothing to draw"):
        CURVES.picture(results(row))


@pytest.mark.parametrize("title", ["Time", "Peak memory", "Accuracy", "Norm"])
def test_figures_can_be_drawn(both, title):
    both.rows.append(timed(8, "of somebody else", 1e-3))
    (section,) = CURVES.present(both)
    figure = next(f for f in section.figures if f.title.startswith(title))
    drawn = style.svg(figure, name=title)
    assert "of a, forward" in drawn or "of b, forward + backward" in drawn
    assert (OWN in drawn) and ("of somebody else" in drawn) is (title in ("Time", "Peak memory"))


def test_a_place_on_the_axis_that_is_not_t():
    curves = replace(CURVES, x="n", at=lambda row: row.detail["n"])
    rows = [found(32, OWN, [value]) for value in (0.2, 0.4)]
    rows[0].detail, rows[1].detail = {"n": 100}, {"n": 200}
    assert curves.curve(rows, OWN, ACCURACY) == {100: 0.2, 200: 0.4}
    (section,) = curves.present(results(*rows))
    assert section.tables[0].columns == ["", "n=100", "n=200"] and [text(c) for c in section.tables[0].rows[0]] == [
        OWN,
        "20%",
        "40%",
    ]


def test_the_first_call_is_reported_apart():
    """Of a program that compiles when it is first called; one that raises has none, and no time."""
    made = []

    class Compiles(nn.LSTM):
        def forward(self, x, hx=None):
            if not made:
                made.append(True)
                time.sleep(0.3)
            return super().forward(x, hx)

    class Raises(nn.LSTM):
        def forward(self, x, hx=None):
            raise RuntimeError("no kernel")

    providers = {
        name: Provider(name, "lstm", "time", lambda w, cls=cls: cls(w.I, w.H)) for name, cls in (("a", Compiles), ("b", Raises))
    }
    case = Case(NAME, "a", tuple(Participant(name, Workload("lstm", 5, 2, 8, 8)) for name in providers), Effort(0.01, 1, 1))
    compiles, raises = Runner("cpu", providers=providers, quick=True).run(case)
    assert compiles.ok and made and compiles.first > max(0.3, compiles.seconds)
    assert raises.status == "wrong" and raises.first is None and "no kernel" in raises.reason
    (untimed,) = Runner("cpu", providers=providers).run(replace(case, participants=case.participants[:1], timed=False))
    assert untimed.ok and untimed.first is None
