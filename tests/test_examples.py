"""The examples, in their shortest form, as a reader starts them."""

from __future__ import annotations

import csv
import importlib
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

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


FORMS = r"a step of an update, T=(\d+), \d+ environments: loop ([\d.]+) ms, one call ([\d.]+) ms, ratio ([\d.]+)"


@pytest.mark.parametrize("form, updates", [("call", 8), ("loop", 3)])
def test_a_recurrent_policy_learns_and_both_forms_agree(form, updates):
    printed = run("recurrent_ppo.py", "--form", form, "--updates", str(updates))
    first, last = map(float, re.search(r"mean return ([\d.]+) after the first rollout, ([\d.]+) at the end", printed).groups())
    assert last > first and f"({form})" in printed
    assert "both forms agree: loss" in printed and float(re.search(FORMS, printed)[4]) > 0


@pytest.mark.slow
def test_a_recurrent_policy_balances_the_pole_without_seeing_velocities():
    printed = run("recurrent_ppo.py", "--updates", "200")
    assert re.search(r"solved after \d+ steps", printed), printed


class TestCartPole:
    """The example's own environment, without gymnasium."""

    @staticmethod
    def example(monkeypatch) -> ModuleType:
        monkeypatch.syspath_prepend(str(EXAMPLES))
        return importlib.import_module("recurrent_ppo")

    def test_it_moves_as_gymnasiums_does(self, monkeypatch):
        gymnasium = pytest.importorskip("gymnasium")
        theirs = gymnasium.make("CartPole-v1").unwrapped
        theirs.reset(seed=0)
        state = torch.tensor(theirs.state, dtype=torch.float64)[None]
        for push in (1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 1):
            theirs.step(push)
            state = self.example(monkeypatch).moved(state, torch.tensor([push]))
            assert torch.allclose(state[0], torch.tensor(theirs.state, dtype=torch.float64), rtol=1e-12, atol=1e-15)

    def test_episodes_end_by_the_rules_and_begin_anew(self, monkeypatch):
        example = self.example(monkeypatch)
        poles = example.CartPole(4, torch.Generator().manual_seed(0))
        poles.state[:] = 0
        poles.state[1, 0], poles.state[2, 2], poles.steps[3] = 2.5, -0.22, example.LIMIT - 1
        assert poles.step(torch.tensor([1, 1, 1, 1])).tolist() == [False, True, True, True]
        assert poles.steps.tolist() == [1, 0, 0, 0] and poles.state[1:].abs().max() <= 0.05 and poles.seen().shape == (4, 2)

    def test_advantages_stop_where_an_episode_ends(self, monkeypatch):
        """By the sum that defines them, segment by segment."""
        example = self.example(monkeypatch)
        generator = torch.Generator().manual_seed(0)
        values, after = torch.rand(9, 3, generator=generator), torch.rand(3, generator=generator)
        ended = torch.rand(9, 3, generator=generator) < 0.3
        found = example.advantages(values, ended, after)
        following = torch.cat((values[1:], after[None]))
        for t, row in itertools.product(range(9), range(3)):
            total, weight = 0.0, 1.0
            for k in range(t, 9):
                lives = 0.0 if ended[k, row] else 1.0
                total += weight * (example.REWARD + example.GAMMA * lives * following[k, row] - values[k, row])
                weight *= example.GAMMA * example.LAMBDA * lives
            assert found[t, row] == pytest.approx(float(total), abs=1e-6)


@pytest.mark.slow
def test_a_sequence_on_two_processes_is_trained_as_on_one():
    """Twice as long as a process holds."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = subprocess.run(
        [*command, str(EXAMPLES / "context_parallel.py"), "--quick"],
        capture_output=True,
        text=True,
        timeout=250,
        cwd=EXAMPLES.parent,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "64 characters, 32 on each of 2 processes, by ring" in finished.stdout
    assert "losses agree at every one of 8 steps" in finished.stdout


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
