"""Tuning: what is measured and stored decides from then on, here and in other processes; candidates that hang, crash or are wrong
do not."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import fastseq
from fastseq import backends
from fastseq.backends import library
from fastseq.choice import sources, store
from fastseq.choice.decision import Call, Candidate, entry_of, ranked
from fastseq.choice.device import device_of, versions
from fastseq.tuning import child, first_meeting, measure, problems, tuner

CPU = torch.device("cpu")
LSTM = Call("recurrent", "inference", "lstm", "float32", "", "padded", 1, (2, 20, 8))
HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def own_store(monkeypatch, tmp_path):
    library.load()  # whose level of instructions is a fact of the CPU
    monkeypatch.setenv("FASTSEQ_CACHE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(HERE), str(HERE.parents[1]))))  # for measuring processes
    sources.forget()
    yield tmp_path
    monkeypatch.undo()
    sources.forget()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.cell, self.attention = nn.LSTM(4, 8), nn.GRUCell(8, 8), nn.MultiheadAttention(8, 2)

    def forward(self, x):
        y = self.rnn(x)[0]
        return self.attention(y, y, y, need_weights=False)[0] + self.cell(y[-1])


def plant(call: Call, *candidates: Candidate) -> None:
    entry = entry_of(call, candidates, device_of(CPU)._asdict(), versions(), "2026-01-01")
    key = " | ".join((*map(str, device_of(CPU)), *versions().values(), str(call)))
    assert store.update("tuned", {key: entry}) is None
    sources.forget()


class TestTune:
    def test_a_decision_that_was_planted_wrong_flips(self):
        """Of a call for which one kernel takes several times as long as the other."""
        call = Call("attention", "inference", "plain", "float32", "", "padded", 1, (8, 64, 64, 16))

        def slow(other):
            return Candidate("torch") if other.op == "attention" else None

        q = torch.randn(1, 8, 64, 16)
        plant(call, Candidate("torch", us=1.0), Candidate("cpu", us=2.0))
        query = problems.problem(call, CPU).query
        assert backends.chosen(query).backend == "torch"

        class Attention(nn.Module):
            def forward(self, q):
                return fastseq.functional.scaled_dot_product_attention(q, q, q)

        report = fastseq.tune(Attention(), q, training=False, seconds=0.05)
        (row,) = report.rows
        assert row.call == call and row.old == "torch" and {c.name for c in row.candidates} == {"cpu", "torch"}
        faster = min(row.candidates, key=lambda c: c.us * (1 + c.doubt))  # torch's, if a busy machine leaves that open
        assert row.new == faster.name == backends.chosen(query).backend and row.error is not None and row.error < 1e-5
        assert backends.chosen(query).source == "tuned"

    def test_whose_times_decide(self, monkeypatch):
        """Whatever the machine does: the times are given."""
        times = {"cpu": measure.Time(3e-3), "torch": measure.Time(2e-3)}
        monkeypatch.setattr(measure, "in_turn", lambda *arguments: times)
        module, x = fastseq.LSTM(8, 8), torch.randn(20, 2, 8)
        report = fastseq.tune(module, x)
        assert [(row.old, row.new, row.speedup) for row in report.rows] == [("cpu", "torch", 1.5)] * 2
        assert [row.call.mode for row in report.changed] == ["inference", "training"]
        assert str(fastseq.explain(module, x)).split("torch, ")[1].startswith("tuned here, 1.50x cpu, ")
        converted = fastseq.convert(nn.Sequential(nn.LSTM(8, 8))).converted[0]
        assert converted.backend == "cpu" and not converted.choice.startswith("tuned")
        times["torch"] = measure.Time(4e-3)
        fastseq.tune(module, x)
        assert "cpu, tuned here, 1.33x torch" in str(fastseq.explain(module, x))
        long = nn.LSTM(8, 8)
        fastseq.tune(long, torch.randn(128, 1, 8), training=False)
        assert fastseq.convert(long).converted[0].choice.startswith("tuned here, 1.33x torch, ")
        lines = str(report).splitlines()
        assert lines[0] == "fastseq.tune: 2 calls measured, 2 run by another kernel from now on"
        assert lines[1].split() == ["call", "old", "new", "speed-up", "error"]
        assert str(fastseq.tune(nn.Linear(4, 4), torch.randn(1, 4))).endswith("; there was nothing to measure")

    def test_the_model_stays_what_it_is(self):
        model, x = Model(), torch.randn(5, 2, 4)
        before, state, rng = copy.deepcopy(model), model.training, torch.get_rng_state()
        kinds = [type(module) for module in model.modules()]
        report = fastseq.tune(model, x, seconds=0.01)
        assert [type(module) for module in model.modules()] == kinds and model.training is state
        assert all(p.grad is None for p in model.parameters()) and torch.equal(torch.get_rng_state(), rng)
        for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        assert {row.call.op for row in report.rows} == {"recurrent", "recurrent_cell", "attention"}
        assert {row.call.mode for row in report.rows} == {"inference", "training"} and len(report) >= 6
        assert not report.skipped and not report.unsaved

    def test_every_kind_of_call_that_is_a_question(self):
        x = torch.randn(6, 2, 4)
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([6, 2]))
        kinds = {}
        for module, given in (
            (nn.GRU(4, 8, bidirectional=True, num_layers=2), x),
            (nn.RNN(4, 8, nonlinearity="relu", dtype=torch.bfloat16), x.bfloat16()),
            (nn.LSTM(4, 8), packed),
            (nn.RNNCell(4, 8), x[0]),
        ):
            for row in fastseq.tune(module, given, seconds=0.001).rows:
                kinds[row.call.op, row.call.kind, row.call.dtype, row.call.layout, row.call.lanes] = len(row.candidates)
        assert kinds["recurrent", "gru", "float32", "padded", 2] == kinds["recurrent", "rnn_relu", "bfloat16", "padded", 1] == 2
        assert (
            kinds["recurrent", "lstm", "float32", "packed", 1] == kinds["recurrent_cell", "rnn_tanh", "float32", "padded", 1] == 2
        )

    def test_what_has_one_kernel_is_left_out(self):
        report = fastseq.tune(fastseq.SLSTM(4, 8), torch.randn(6, 2, 4))
        assert not report.rows and not report.skipped
        (skipped,) = tuner.measured_and_stored([(LSTM._replace(kind="slstm"), CPU)], isolated=False).skipped
        assert skipped[1] == "slstm in 1 lanes has one kernel"
        (skipped,) = tuner.measured_and_stored([(LSTM._replace(lanes=6), CPU)], isolated=False).skipped
        assert skipped[1] == "lstm in 6 lanes has one kernel"

    @pytest.mark.parametrize("mode", ["inference", "training"])
    @pytest.mark.parametrize("layout", ["padded", "lengths", "packed"])
    def test_heads_of_one_unit(self, layout, mode):
        """Lanes of a call. torch has no such layer: a candidate has to agree with the reference."""
        call = LSTM._replace(lanes=6, sizes=(2, 5, 1), layout=layout, mode=mode)
        (row,) = tuner.measured_and_stored([(call, CPU)], isolated=False, seconds=0.001).rows
        assert [(c.name, c.against) for c in row.candidates] == [("cpu", "")] and row.error < 1e-5

    @pytest.mark.parametrize(
        ("given", "error", "words"),
        [
            ((lambda x: x, torch.zeros(1)), TypeError, "model must be an nn.Module, got function"),
            ((nn.LSTM, torch.zeros(1)), TypeError, "model must be an nn.Module, got the class LSTM itself"),
            ((nn.LSTM(4, 8), 7), TypeError, "example_inputs"),
            ((nn.LSTM(4, 8), torch.zeros(3, 2, 5)), RuntimeError, "input.size"),
            ((nn.LSTM(4, 8), torch.zeros(3, 2, 4, device="meta")), ValueError, "meta device"),
            ((nn.LSTM(4, 8), torch.zeros(3, 2, 4), {"training": 1}), TypeError, "training must be a bool, got 1"),
            ((nn.LSTM(4, 8), torch.zeros(3, 2, 4), {"isolated": "yes"}), TypeError, "isolated must be a bool, got 'yes'"),
            ((nn.LSTM(4, 8), torch.zeros(3, 2, 4), {"seconds": 0}), ValueError, "seconds must be above 0, got 0"),
            ((nn.LSTM(4, 8), torch.zeros(3, 2, 4), {"seconds": "1"}), TypeError, "seconds must be a number"),
        ],
    )
    def test_bad_input(self, given, error, words):
        *args, options = given if isinstance(given[-1], dict) else (*given, {})
        with pytest.raises(error, match=words):
            fastseq.tune(*args, **options)
        assert not store.read("tuned")

    def test_a_store_that_cannot_be_written(self, monkeypatch):
        monkeypatch.setenv("FASTSEQ_CACHE", "off")
        report = fastseq.tune(nn.LSTM(8, 8), torch.randn(20, 2, 8), training=False, seconds=0.01)
        assert "there is no directory" in report.unsaved and "kept for this process alone" in str(report)
        assert sources.is_tuned(LSTM, CPU)
        store.clear("tuned")


class TestIsolated:
    @pytest.mark.parametrize(
        ("setup", "name", "why"),
        [
            ("hanging", "hangs", "check took longer than 2 s"),
            ("hanging_late", "hangs late", "took longer than"),
            ("crashing", "crashes", r"check ended the process \(SIGSEGV\)"),
            ("raising", "raises", "RuntimeError: out of resources"),
            ("wrong", "wrong", "wrong: output: error"),
        ],
    )
    def test_a_bad_candidate_is_left_out_and_the_others_are_timed(self, setup, name, why):
        limit = 2.0 if setup.startswith("hanging") else 60.0  # a busy machine takes its time where nothing hangs
        with child.Bench(1, f"stand_ins:{setup}", part_seconds=limit) as bench:
            found = bench.measured(LSTM, CPU, 0.01)
            again = bench.measured(LSTM._replace(sizes=(2, 5, 8)), CPU, 0.01) if setup == "wrong" else found
        able = {c.name for c in found if not c.against}
        assert {"cpu", "torch"} <= able and all(c.us and c.error is not None for c in found if not c.against)
        (bad,) = [c for c in found if c.against]
        assert bad.name == name and re.search(why, bad.against) and bad.us is None and again

    def test_all_of_them_at_once(self):
        with child.Bench(1, "stand_ins:all_of_them", part_seconds=2.0) as bench:
            report = tuner.measured_and_stored([(LSTM, CPU)], isolated=True, seconds=0.01, bench=bench)
        (row,) = report.rows
        assert row.new in ("cpu", "torch") and len(row.against) == 4
        assert backends.chosen(problems.problem(LSTM, CPU).query).source == "tuned"
        assert "not for" in str(report)

    def test_what_a_candidate_prints_is_no_answer(self):
        with child.Bench(1, "stand_ins:noisy") as bench:
            assert {c.name for c in bench.measured(LSTM, CPU, 0.01)} == {"cpu", "torch", "noisy"}

    def test_a_process_that_cannot_start(self):
        with child.Bench(1, "stand_ins:dying") as bench:
            report = tuner.measured_and_stored([(LSTM, CPU)], isolated=True, bench=bench)
        assert report.skipped == [(LSTM, "starting ended the process (status 3)")] and not store.read("tuned")

    def test_a_tune_of_a_model_isolated(self):
        report = fastseq.tune(nn.GRU(4, 8), torch.randn(5, 2, 4), training=False, isolated=True, seconds=0.01)
        assert len(report) == 1 and report.rows[0].new in ("cpu", "torch")


class TestRounds:
    @staticmethod
    def clock(slow=()):
        """Seconds pass as the programs say; rounds of the pilot in ``slow`` take twice as long."""
        now, rounds = [0.0], [0]

        def sample(run, count):
            start = now[0]
            for _ in range(count):
                now[0] += run()
            return now[0] - start

        def pilot():
            rounds[0] += 1
            return 1e-3 * (2.0 if (rounds[0] - 1) // 4 in slow else 1.0)

        return measure.Clock(sample, pilot if slow is not None else None), rounds

    def test_medians_of_interleaved_rounds(self):
        order = []

        def program(name, times):
            def run():
                order.append(name)
                return times[order.count(name) % len(times)]

            return run

        found = [Candidate("cpu"), Candidate("torch")]
        programs = {"cpu": program("cpu", (1e-3, 1e-3, 9e-3)), "torch": program("torch", (2e-3,))}
        clock, _ = self.clock(None)
        times = measure.in_turn(LSTM, found, programs, clock, 0.1)
        assert {name: time.seconds for name, time in times.items()} == pytest.approx({"cpu": 1e-3, "torch": 2e-3})
        assert order[6:14] == ["cpu"] * 2 + ["torch"] * 4 + ["cpu"] * 2

    @pytest.mark.parametrize("seconds", (1e-6, 1e-3, 1e-1))
    def test_a_call_is_timed_after_one_of_its_own(self, seconds):
        """As a loop finds the caches; a long one does not notice them."""
        calls, timed, now = [], [False], [0.0]

        def sample(run, count):
            start, timed[0] = now[0], True
            for _ in range(count):
                now[0] += run()
            timed[0] = False
            return now[0] - start

        def program(name):
            def run():
                calls.append((name, timed[0]))
                return seconds

            return run

        programs = {name: program(name) for name in ("cpu", "torch")}
        measure.in_turn(LSTM, [Candidate("cpu"), Candidate("torch")], programs, measure.Clock(sample, None), 1.0)
        rounds = calls[6 if seconds < measure.LONG else 4 :]
        changes = [(before, after) for before, after in zip(rounds, rounds[1:], strict=False) if before[0] != after[0]]
        assert len(changes) >= measure.LEAST_ROUNDS
        assert all(before[1] and after[1] == (seconds > measure.LONG) for before, after in changes)

    @pytest.mark.parametrize(("slow", "first"), [(1, "cpu"), (4, "torch")])
    def test_doubt_is_torchs(self, slow, first):
        """Four hundredths faster at the median, but in so many rounds of eleven slower: more than a quarter of them is doubt."""
        rounds = [0]

        def ours():
            rounds[0] += 1
            return 0.96 if (rounds[0] - 3) % 11 >= slow else 1.1

        found = [Candidate("cpu"), Candidate("torch")]
        programs = {"cpu": ours, "torch": lambda: 1.0}
        times = measure.in_turn(LSTM, found, programs, self.clock(None)[0], 44.0)
        assert times["cpu"].seconds == pytest.approx(0.96) and times["torch"] == pytest.approx((1.0, 0.0))
        candidates = [c._replace(us=times[c.name].seconds, doubt=times[c.name].doubt) for c in found]
        assert ranked(candidates)[0].backend == first

    @pytest.mark.parametrize("seconds", (1e-6, 1e-3, 1e-1))
    def test_what_takes_a_sample_does_not_find_its_own_in_the_caches(self, seconds):
        """A loop of short calls does; a long one does not notice."""
        events = []

        def program(name):
            def run():
                events.append(name)
                return seconds

            return run

        clock = self.clock(None)[0]._replace(others=lambda: events.append("others"))
        programs = {name: program(name) for name in ("cpu", "torch")}
        measure.in_turn(LSTM, [Candidate("cpu"), Candidate("torch")], programs, clock, 1.0)
        assert (events.count("others") >= 2 * measure.LEAST_ROUNDS) == (seconds == 1e-3)
        if seconds == 1e-3:
            rounds = events[6:]
            assert rounds[::3] == rounds[2::3] and set(rounds[1::3]) == {"others"}

    @pytest.mark.parametrize(("other", "rounds"), [(1.3e-3, measure.CLEAR_ROUNDS), (1.1e-3, measure.MOST_ROUNDS)])
    def test_what_is_clear_takes_few_rounds(self, other, rounds):
        calls = []

        def program(name, seconds):
            def run():
                calls.append(name)
                return seconds

            return run

        programs = {"cpu": program("cpu", 1e-3), "torch": program("torch", other)}
        measure.in_turn(LSTM, [Candidate("cpu"), Candidate("torch")], programs, self.clock(None)[0], 1.0)
        assert len(calls) == 6 + 4 * rounds

    def test_rounds_that_something_slowed_down_do_not_count_and_are_repeated(self):
        slow = set(range(1, 9))
        clock, rounds = self.clock(slow)

        def run():
            return 1e-3 * (3.0 if (rounds[0] - 1) // 4 in slow else 1.0)

        times = measure.in_turn(LSTM, [Candidate("cpu")], {"cpu": run}, clock, 0.001)
        assert times["cpu"] == pytest.approx((1e-3, 0.0))
        assert rounds[0] // 4 == len(slow) + measure.FEWEST_ROUNDS


class TestFirstMeeting:
    @pytest.fixture(autouse=True)
    def tuning(self, monkeypatch):
        monkeypatch.setattr(sources, "meet", first_meeting.meet)
        monkeypatch.setattr(sources, "at_leisure", first_meeting.at_leisure)
        monkeypatch.setattr(first_meeting, "_tried", set())
        monkeypatch.setattr(tuner, "SECONDS", 0.01)
        sources.forget()
        yield
        monkeypatch.undo()
        sources.forget()

    def test_it_tunes_once(self, caplog):
        module, x = fastseq.LSTM(8, 8).eval(), torch.randn(20, 2, 8)
        with caplog.at_level(logging.INFO, "fastseq"), torch.no_grad():
            for steps in (20, 20, 21):
                module(torch.randn(steps, 2, 8))
        assert caplog.text.count("fastseq: tuned recurrent lstm") == 1
        assert sources.is_tuned(LSTM, CPU) and "tuned here" in str(fastseq.explain(module, x))

    def test_in_inference_mode_and_under_autocast(self):
        module, x = fastseq.LSTM(8, 8), torch.randn(20, 2, 8)
        with torch.inference_mode():
            module(x)
        assert sources.is_tuned(LSTM, CPU)
        with torch.autocast("cpu", torch.bfloat16):
            module(x)
        assert sources.is_tuned(LSTM._replace(mode="training", dtype="bfloat16"), CPU)

    def test_not_while_somebody_traces_transforms_or_differentiates(self):
        from torch.fx.experimental.proxy_tensor import make_fx

        module, x = fastseq.GRU(8, 8), torch.randn(20, 2, 8)
        make_fx(lambda x: module(x)[0])(x)
        torch.func.vmap(lambda x: module(x)[0])(x[None])
        torch.func.jvp(lambda x: module(x)[0], (x,), (x,))

        class Inside(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, grad):
                module(x)
                return grad

        y = Inside.apply(torch.ones(1, requires_grad=True))
        y.backward()
        assert not store.read("tuned")
        module(x)
        assert store.read("tuned")

    def test_of_several_threads_one_measures(self):
        module, x = fastseq.LSTM(8, 8).eval(), torch.randn(20, 2, 8)

        def work():
            with torch.no_grad():
                module(x)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sources.is_tuned(LSTM, CPU)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)


def test_a_saved_model_makes_the_tuned_choice_in_another_process(tmp_path):
    """Counted calls of torch's kernel."""
    model = fastseq.LSTM(8, 8).eval()
    torch.save(model, tmp_path / "model.pt")
    code = (
        f"import sys; sys.path.insert(0, {str(HERE.parent)!r})\n"
        "import torch, fastseq; from fastseq.backends.torch import recurrent\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "calls, own = [], recurrent.LAYERS['lstm']\n"
        "recurrent.LAYERS['lstm'] = lambda *args: calls.append(1) or own(*args)\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "with torch.no_grad(): [model(torch.randn(20, 2, 8)) for _ in range(3)]\n"
        "print(len(calls))"
    )
    assert run(code).stdout == "0\n"
    plant(LSTM, Candidate("torch", us=1.0), Candidate("cpu", us=2.0))
    done = run(code)
    assert done.stdout == "3\n", done.stderr


def test_two_processes_tune_at_once(own_store):
    code = (
        "import sys, torch, fastseq; torch.set_num_threads(1)\n"
        "fastseq.tune(torch.nn.GRU(4, int(sys.argv[1])), torch.randn(5, 2, 4), seconds=0.01)"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(hidden)], stderr=subprocess.PIPE, text=True) for hidden in (8, 16)
    ]
    assert [process.communicate()[1] for process in processes] == ["", ""]
    (file,) = own_store.glob("tuned-*.json")
    entries = json.loads(file.read_text())["entries"].values()
    assert {(entry["call"]["sizes"][2], entry["call"]["mode"]) for entry in entries} == {
        (hidden, mode) for hidden in (8, 16) for mode in ("inference", "training")
    }


def test_the_variable_that_asks_for_it():
    wrong = run("import fastseq", FASTSEQ_TUNE="yes")
    assert wrong.returncode and "FASTSEQ_TUNE must be 0 or 1, got 'yes'" in wrong.stderr
    code = (
        "import torch, fastseq; fastseq.GRU(4, 8)(torch.randn(5, 2, 4))\n"
        "from fastseq.choice import store; print(len(store.read('tuned')))"
    )
    assert run(code, FASTSEQ_TUNE="1").stdout == "1\n"
    store.clear("tuned")
    assert run(code, FASTSEQ_TUNE="0").stdout == run(code).stdout == "0\n"
