"""The examples, in their shortest form: every model of every program trains on both sides, and they agree."""

from __future__ import annotations

import csv
import datetime
import importlib
import importlib.util
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastseq
from examples import dates

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
BODIES = ("lstm", "gru", "rnn", "linear_recurrent", "tcn", "hybrid", "block_recurrent", "transformer", "reformer")
MODELS = {
    "text": (*BODIES, "gpt", "transformer_xl", "ntm", "dnc"),
    "forecast": BODIES,
    "translate": ("seq2seq", "transformer", "t5"),
    "classify": (*BODIES, "encoder", "bert", "longformer", "vit"),
}
pytestmark = pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")
TEST_LOSS = r"test loss: (?P<before>\S+) untrained, .* fastseq (?P<after>\S+) nats"
TESTED = {"forecast": r"fastseq: (?P<after>\S+) sunspots.*untrained: (?P<before>\S+) sunspots"}


@pytest.fixture
def run(monkeypatch, capsys) -> Iterator[Callable[..., str]]:
    """A program's main in this process, in its shortest form: what it prints. Its own checks raise."""
    pytest.importorskip("rich", reason="needs rich")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()

    def main(program: str, *arguments: str) -> str:
        importlib.import_module(program).main(["--quick", "--threads", "1", *arguments])
        return capsys.readouterr().out

    yield main
    torch.set_num_threads(threads)


def curves(printed: str) -> list[list[float]]:
    """Rows of the printed table: step, torch.nn, fastseq, difference, allowed."""
    rows = [line.split() for line in printed.splitlines() if re.match(r"\s+\d+(\s+[\d.]+){2}(\s+\S+){2}$", line)]
    return [[float(number) for number in row] for row in rows]


@pytest.mark.parametrize(("program", "model"), [(program, model) for program, models in MODELS.items() for model in models])
def test_losses_agree_and_fall(run, program, model):
    options = ("--data", "drawn") if program == "classify" else ()
    again = program in ("forecast", "classify") and model in BODIES[3:]  # they run in text.py as well
    steps = 8 if again else 5 if model in ("ntm", "dnc") else 20
    printed = run(program, "--model", model, "--plot", "none", "--steps", str(steps), *options)
    table = curves(printed)
    assert len(table) >= 5 and table[-1][0] == steps - 1 and f"losses agree at every one of {steps} steps" in printed
    for _, theirs, ours, difference, allowed in table:
        assert difference <= allowed < (0.03 if model == "reformer" else 0.01) * theirs
        assert abs(theirs - ours) <= difference + 2e-6
    losses = re.search(TESTED.get(program, TEST_LOSS), printed, re.DOTALL)
    assert float(losses["after"]) < float(losses["before"])
    assert float(re.search(r"ratio ([\d.]+)", printed).group(1)) > 0
    if model in ("lstm", "gru", "rnn"):
        assert f"torch.nn.{model.upper()}  fastseq.{model.upper()}" in printed


@pytest.mark.parametrize("attention", ["none", "dot", "concat", "bahdanau"])
def test_every_attention_of_seq2seq(run, attention):
    options = {"dot": ("--cell", "lstm", "--feeding"), "concat": ("--cell", "rnn")}.get(attention, ())
    printed = run("translate", "--attention", attention, "--plot", "none", "--steps", "3", *options)
    assert "losses agree at every one of 3 steps" in printed and "exact dates: " in printed


def test_the_digits_of_scikit_learn(run):
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    assert "losses agree at every one of 20 steps" in run("classify", "--model", "vit", "--plot", "none")


def test_a_program_starts_alone_and_hears_its_options(run, tmp_path):
    """As a reader starts it; another seed means another start: the first loss differs from the one with the default, 0."""
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    picture = tmp_path / "losses.png"
    arguments = ["--quick", "--threads", "1", "--model", "rnn", "--steps", "5", "--seed", "1", "--plot", str(picture)]
    finished = subprocess.run(
        [sys.executable, str(EXAMPLES / "forecast.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert picture.read_bytes().startswith(b"\x89PNG") and [path.name for path in tmp_path.iterdir()] == ["losses.png"]
    table = curves(finished.stdout)
    assert [row[0] for row in table] == [0, 1, 2, 3, 4]
    zero = curves(run("forecast", "--model", "rnn", "--steps", "1", "--plot", "none"))
    assert len(zero) == 1 and zero[0][1] != table[0][1]


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        ("text", ["--model", "bert"], "argument --model: invalid choice: 'bert' (choose from"),
        ("text", ["--steps", "0"], "argument --steps: must be a whole number from 1 on, got '0'"),
        ("text", ["--threads", "two"], "argument --threads: must be a whole number from 1 on, got 'two'"),
        ("text", ["--device", "gpu"], "argument --device: 'gpu' is no device here: "),
        ("text", ["--plot", "nowhere/losses.png"], "argument --plot: there is no folder "),
        ("text", ["--plot", "losses.txt"], "argument --plot: must be none or end with .png, .svg or .pdf, got 'losses.txt'"),
        ("translate", ["--model", "t5", "--cell", "gru"], "argument --cell: goes with --model seq2seq, got --model t5"),
        ("translate", ["--feeding", "--attention", "none"], "argument --feeding: goes with --attention dot, general or concat"),
        ("classify", [], "--data digits needs scikit-learn"),
    ],
)
def test_wrong_options(run, capsys, monkeypatch, program, arguments, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        run(program, *arguments)
    assert stopped.value.code == 2 and message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("model", MODELS["text"])
def test_the_sides_run_on_what_they_are_called_after(model, monkeypatch, capsys):
    """Nothing of torch's side calls fastseq; all of fastseq's but torch's convolutions does."""
    pytest.importorskip("rich", reason="needs rich")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    text, shared, bodies = (importlib.import_module(name) for name in ("text", "side_by_side", "bodies"))
    models = shared.sides(text.MODELS[model](9, bodies.Sizes(16, 2, 1, 16)))
    codes = torch.zeros(2, 16, dtype=torch.int64)
    assert fastseq.explain(models["torch.nn"], codes).backends == []
    assert (fastseq.explain(models["fastseq"], codes).backends == []) == (model == "tcn")


def test_the_models_of_the_programs_and_of_the_page_are_these(monkeypatch):
    pytest.importorskip("rich", reason="needs rich")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    page = (EXAMPLES.parent / "docs" / "examples.md").read_text(encoding="utf-8")
    for program, models in MODELS.items():
        module = importlib.import_module(program)
        assert set(getattr(module, "MODELS", None) or module.BODIES) == set(models)
        (row,) = re.findall(rf"^\| `{program}\.py` \|.*\| ([^|]*) \|$", page, re.MULTILINE)
        assert set(models) == set(re.findall(r"`(\w+)`", row))
    programs = {path.name for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    assert programs == set(re.findall(r"^\| `(\w+\.py)`", page, re.MULTILINE))


def test_dates_are_those_of_the_calendar():
    source, lengths, target = next(dates.batches(200, seed=0))
    forms = [r"\d+ [A-Z][a-z]+ \d{4}", r"[A-Z][a-z]+ \d+, \d{4}", r"[A-Z][a-z]{2} \d+ [A-Z][a-z]{2} \d{4}",
             r"\d\d/\d\d/\d{4}", r"\d+\.\d+\.\d\d"]  # fmt: skip
    seen = set()
    for row, length, said in zip(source, lengths, target, strict=True):
        text, date = dates.text_of(row[:length]), datetime.date.fromisoformat(dates.text_of(said))
        (form,) = (k for k, pattern in enumerate(forms) if re.fullmatch(pattern, text))
        assert dates.FORMS[form](date) == text and 1950 <= date.year <= 2049 and (row[length:] == dates.PAD).all()
        seen.add(form)
    assert seen == set(range(5)) and dates.FORMS[2](datetime.date(1997, 5, 3)) == "Sat 3 May 1997"


FORMS = r"a step of an update, T=(\d+), \d+ environments: loop ([\d.]+) ms, one call ([\d.]+) ms, ratio ([\d.]+)"


@pytest.mark.parametrize("form, updates", [("call", 8), ("loop", 3)])
def test_a_recurrent_policy_learns_and_both_forms_agree(run, form, updates):
    printed = run("recurrent_ppo", "--form", form, "--updates", str(updates))
    first, last = map(float, re.search(r"mean return ([\d.]+) after the first rollout, ([\d.]+) at the end", printed).groups())
    assert last > first and f"({form})" in printed
    assert "both forms agree: loss" in printed and float(re.search(FORMS, printed)[4]) > 0


@pytest.mark.slow
def test_a_recurrent_policy_balances_the_pole_without_seeing_velocities(run):
    printed = run("recurrent_ppo", "--updates", "200")
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


@pytest.fixture
def side_by_side(monkeypatch) -> ModuleType:
    pytest.importorskip("rich", reason="needs rich")
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
