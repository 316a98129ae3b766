"""The README's figures are those of the committed result file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastseq.benchmarks import assembly
from fastseq.benchmarks.claims import table as claims
from fastseq.benchmarks.measure.results import Results
from fastseq.benchmarks.report import readme
from fastseq.benchmarks.suites import recurrent

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
LOSS = ("packed", "training", "GRU", 32, 256)


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


def test_remarks_are_those_of_the_rows(synthetic):
    """A loss is counted and named, and so is what was noisy."""
    results = synthetic.grid(lambda group, mode, cell, B, H: 0.5 if (group, mode, cell, B, H) == LOSS else 2.0)
    (said,) = recurrent.remarks(results)
    count = sum(row.group in recurrent.TIMED and row.provider.startswith("fastseq.") for row in results.rows)
    assert f"Slower than torch.nn at 1 of {count} points, at 1 of them by more than a tenth; at worst 0.50×" in said
    assert "fastseq.GRU, forward + backward, packed, B=32" in said
    (said,) = recurrent.remarks(synthetic.grid(lambda group, mode, cell, B, H: 2.0))
    assert f"Slower than torch.nn at none of {count} points." in said and "ONNX" not in said


def test_bars_are_those_of_the_rows(synthetic):
    groups = dict(
        recurrent.bars(synthetic.grid(lambda group, mode, cell, B, H: 0.5 if (group, mode, cell, B, H) == LOSS else 2.0))
    )
    assert len(groups) == 4
    bar = next(bar for bar in groups["Training step, PackedSequence"] if bar.label == "GRU")
    assert bar.losses == 1 and min(bar.values) == 0.5 and 1 < bar.mean < 2
    assert "slower at 1 of" in bar.words() and "slower" not in groups["Inference, PackedSequence"][0].words()


def test_verdicts_are_by_device(committed):
    every = claims.verdicts(committed)
    text = "\n".join(readme.verdict_tables({"one machine": every, "another": every}))
    assert "| claim | one machine | another |" in text
    for v in every:
        assert f"| {v.statement} | {v.state} | {v.state} |" in text
        assert (f"**{v.state}**: {v.experiment} {v.findings[0].sizes}" in text) == v.measured if v.measured else True
    assert "Not measured in this run; the suites for it are `attention`" in text


def test_only_what_stands_between_the_markers_changes(synthetic, tmp_path):
    results = synthetic.grid(lambda group, mode, cell, B, H: 3.0 if cell == "GRU" else 1.0 if B == 1 else 4.0)
    results.environment |= {"device name": "a device", "versions": {"torch": "2.x"}}
    file = tmp_path / "page.md"
    file.write_text(f"above\n{readme.BEGIN}\nold\n{readme.END}\nbelow\n")
    readme.update(file, assembly.figures(results))
    text = file.read_text()
    assert text.startswith("above\n") and text.endswith("\nbelow\n") and "old" not in text
    assert "| forward, rows of equal length | 2.00× (1.00 to 4.00) | 3.00× (3.00 to 3.00) | 2.00× (1.00 to 4.00) |" in text
    next(row for row in results.rows if row.provider == "fastseq.LSTM").ratio = None
    assert "not measured" in assembly.figures(results)
    file.write_text("no markers")
    with pytest.raises(ValueError, match="lacks the markers"):
        readme.update(file, assembly.figures(results))
