"""The README's figures are those of the committed result file."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib
import pytest

from fastseq.benchmarks import assembly
from fastseq.benchmarks.claims import table as claims
from fastseq.benchmarks.measure import combine
from fastseq.benchmarks.measure.results import Results
from fastseq.benchmarks.report import readme
from fastseq.benchmarks.report.findings import INCONCLUSIVE
from fastseq.benchmarks.report.plots import style
from fastseq.benchmarks.suites import SUITES

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"


@pytest.fixture(scope="module")
def committed():
    text = README.read_text(encoding="utf-8")
    named = re.search(r"`(benchmarks/results/[\w/.-]+\.json)`", text)
    assert named, "the README names the file that its figures come from"
    return Results.load(ROOT / named[1])


def test_table_is_the_files(committed):
    text = README.read_text(encoding="utf-8")
    assert text.split(readme.BEGIN)[1].split(readme.END)[0].strip() == assembly.figures(committed)
    assert "not measured" not in assembly.figures(committed)


def test_picture_is_the_files(committed, tmp_path):
    named = re.search(r"!\[.*\]\((docs/[\w.-]+\.svg)\)", README.read_text(encoding="utf-8"))
    assert named
    drawn = (ROOT / named[1]).read_text(encoding="utf-8")
    if f"<!-- matplotlib {matplotlib.__version__} -->" not in drawn:
        pytest.skip(f"drawn by another version than matplotlib {matplotlib.__version__}")
    fresh = tmp_path / "fresh.svg"
    style.save(SUITES[committed.suites()[0]].picture(committed), fresh, style.AUTO)
    assert fresh.read_text(encoding="utf-8") == drawn


def test_verdicts_are_those_of_the_claims(committed):
    text = README.read_text(encoding="utf-8")
    measured = [v for v in claims.verdicts(committed) if v.measured]
    assert len(measured) >= 4
    for v in measured:
        assert f"| {v.statement} | {v.state}: {v.brief}" in text and v.findings[0].sizes in text


def test_sentences_below_are_those_of_the_rows(committed):
    text = README.read_text(encoding="utf-8")
    rows = [row for row in committed.rows if row.suite == "recurrent"]
    rates = [
        row.roofline["seconds"] / row.time["median"]
        for row in rows
        if row.provider == "torch.nn.LSTM" and (row.group, row.H) == ("padded", 512) and row.B > 1
    ]
    assert f"at H = 512 and B of 8 and 32, oneDNN runs at {100 * min(rates):.0f} to {100 * max(rates):.0f} %" in text
    ours = [row for row in rows if row.provider.startswith("fastseq.") and row.ratio]
    losses = [row for row in ours if row.ratio["baseline"].startswith("torch.nn.") and row.ratio["median"] < 0.9]
    assert f"real, {min(row.ratio['median'] for row in losses):.2f}× at the worst" in text
    assert {(row.mode, row.packed, row.B == 1) for row in losses} == {("training", True, True)}
    times: dict[tuple[str, int, int], dict[str, float]] = {}
    for row in rows:
        if (row.mode, row.group) == ("inference", "padded"):
            times.setdefault((row.function, row.B, row.H), {})[row.provider.split(" ")[0].split(".")[0]] = row.time["median"]
    onnx = [of["ONNX"] / of["fastseq"] for of in times.values()]
    assert f"{min(onnx):.2f} to {max(onnx):.2f} times" in text and min(onnx) > 1
    noisy = sum(bool(row.noisy or row.contended) for row in committed.rows)
    assert f"{noisy} of its {len(committed.rows)} rows were noisy" in text


def test_verdicts_of_the_other_machine():
    text = README.read_text(encoding="utf-8")
    named = re.search(r"`python -m fastseq bench --json-in (\S+)`", text)
    assert named
    every = claims.verdicts(combine.load(sorted(ROOT.glob(named[1]))))
    assert len(every) == 13 and all(v.measured for v in every)
    assert f"all thirteen statements and decides {sum(v.state != INCONCLUSIVE for v in every)};" in text


def test_only_what_stands_between_the_markers_changes(synthetic, tmp_path):
    results = synthetic.grid(lambda group, mode, cell, B, H: 3.0 if cell == "GRU" else 1.0 if B == 1 else 4.0)
    results.environment |= {"device name": "a device", "versions": {"torch": "2.x"}}
    file = tmp_path / "page.md"
    file.write_text(f"above\n{readme.BEGIN}\nold\n{readme.END}\nbelow\n")
    readme.update(file, assembly.figures(results))
    text = file.read_text()
    assert text.startswith("above\n") and text.endswith("\nbelow\n") and "old" not in text
    assert "| forward, rows of equal length | 2.00× (1.00 to 4.00) | 3.00× (3.00 to 3.00) | 2.00× (1.00 to 4.00) |" in text
    assert "| claim | verdict | figures |" in text and "come from `--suite attention`" in text
    next(row for row in results.rows if row.provider == "fastseq.LSTM").ratio = None
    assert "not measured" in assembly.figures(results)
    file.write_text("no markers")
    with pytest.raises(ValueError, match="lacks the markers"):
        readme.update(file, assembly.figures(results))
