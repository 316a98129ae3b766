"""The examples, in their shortest form, as a reader starts them."""

from __future__ import annotations

import csv
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(program: str, *arguments: str) -> str:
    """What the program prints; its own checks raise, and then this fails."""
    finished = subprocess.run(
        [sys.executable, str(EXAMPLES / program), "--quick", "--threads", "1", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=EXAMPLES.parent,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def curves(printed: str) -> list[list[float]]:
    """Rows of the printed table: step, torch.nn, fastseq, difference, allowed."""
    rows = [line.split() for line in printed.splitlines() if re.match(r"\s+\d+(\s+[\d.]+){2}(\s+\S+){2}$", line)]
    return [[float(number) for number in row] for row in rows]


@pytest.mark.parametrize(
    "program, cell, test",
    [
        ("char_lm.py", "lstm", r"test loss: (?P<before>\S+) untrained, .* fastseq (?P<after>\S+) nats"),
        ("forecast.py", "gru", r"fastseq: (?P<after>\S+) sunspots.*untrained: (?P<before>\S+) sunspots"),
    ],
    ids=["char_lm", "forecast"],
)
def test_losses_agree_and_fall(program, cell, test):
    printed = run(program, "--cell", cell)
    assert f"torch.nn.{cell.upper()}  fastseq.{cell.upper()}" in printed
    table = curves(printed)
    assert len(table) >= 5 and table[-1][0] == 19
    for _, theirs, ours, difference, allowed in table:
        assert difference <= allowed < 1e-3 * theirs
        assert abs(theirs - ours) <= difference + 1e-6
    losses = re.search(test, printed, re.DOTALL)
    assert float(losses["after"]) < 0.99 * float(losses["before"])
    assert float(re.search(r"ratio ([\d.]+)", printed).group(1)) > 0


def test_options_are_heard():
    """Another seed means another start: the first loss differs from the one with the default, 0."""
    table = curves(run("forecast.py", "--cell", "rnn", "--steps", "5", "--seed", "1"))
    assert [row[0] for row in table] == [0, 1, 2, 3, 4]
    zero = curves(run("forecast.py", "--cell", "rnn", "--steps", "1"))
    assert len(zero) == 1 and zero[0][1] != table[0][1]


@pytest.fixture
def side_by_side(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("side_by_side")


class TestComparison:
    """The programs' own check has to notice."""

    @staticmethod
    def histories(side_by_side: ModuleType, change: Callable[[int, float], float]) -> dict:
        losses = [3.0 - 0.1 * step for step in range(20)]
        curves = {
            "torch.nn": losses,
            "nudged": [loss * (1 + 1e-7) for loss in losses],
            "fastseq": [change(step, loss) for step, loss in enumerate(losses)],
        }
        seconds = {"torch.nn": 1.0, "nudged": 1.0, "fastseq": 0.5}
        return {name: side_by_side.History(curves[name], [seconds[name]] * 20) for name in curves}

    def test_accepts_rounding(self, side_by_side, capsys):
        histories = self.histories(side_by_side, lambda step, loss: loss * (1 + 5e-7))
        side_by_side.compare(histories)
        side_by_side.print_times(histories)
        assert "ratio 2.00" in capsys.readouterr().out

    @pytest.mark.parametrize("wrong", [1e-4, float("nan"), float("inf")])
    def test_refuses_more(self, side_by_side, wrong):
        histories = self.histories(side_by_side, lambda step, loss: loss + (wrong if step == 7 else 0))
        with pytest.raises(AssertionError, match="step 7: losses differ"):
            side_by_side.compare(histories)


def test_data_is_what_its_readme_says():
    readme = (EXAMPLES / "data" / "README.md").read_text(encoding="utf-8")
    text = (EXAMPLES / "data" / "persuasion.txt").read_bytes()
    assert f"{len(text.splitlines()):,} lines, {len(text):,} bytes, plain ASCII" in " ".join(readme.split())
    assert text.decode("ascii").startswith("Persuasion\n")
    with (EXAMPLES / "data" / "sunspots.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["month"] for row in rows] == [f"{1749 + i // 12}-{1 + i % 12:02}" for i in range(len(rows))]
    assert f"January 1749 to June 2009, {len(rows):,} months" in " ".join(readme.split())
    assert min(float(row["sunspots"]) for row in rows) == 0.0
