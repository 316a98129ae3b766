"""Who decides: what was tuned here, else what is shipped, else torch's kernel where it has one."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq
from fastseq import backends
from fastseq.backends import AttentionQuery, RecurrentQuery
from fastseq.choice import lengths, sources, store
from fastseq.choice.decision import CHAIN, Call, Candidate, Point, distance, entry_of, nearest, ranked, speed_of
from fastseq.choice.device import Device, device_of, versions

CPU = torch.device("cpu")
LSTM = Call("recurrent", "inference", "lstm", "float32", "", "padded", 1, (2, 20, 8))


@pytest.fixture(autouse=True)
def own_store(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTSEQ_CACHE", str(tmp_path))
    sources.forget()
    yield tmp_path
    monkeypatch.undo()
    sources.forget()


def plant(call: Call, *candidates: Candidate, device: Device | None = None, **of: str) -> None:
    here = device or device_of(CPU)
    entry = entry_of(call, candidates, here._asdict(), versions() | of, "2026-11-29")
    assert store.update("tuned", {f"{here} {of} {call}": entry}) is None
    sources.forget()


def torchs_first(call: Call = LSTM, **of: str) -> None:
    plant(call, Candidate("torch", us=10.0), Candidate("cpu", us=18.3), **of)


def ran(function, *args, **kwargs) -> list[str]:
    """Of a call as it is made: fast ways are not told apart from slow ones, so that the decision is asked for its kernels."""
    return fastseq.explain(function, *args, **kwargs).backends


class TestOrder:
    def test_tuned_here_comes_before_shipped(self):
        module, x = fastseq.LSTM(8, 8), torch.randn(20, 2, 8)
        assert ran(module, x) == ["cpu"]
        torchs_first()
        text = str(fastseq.explain(module, x))
        assert text.endswith(": torch, tuned here, 1.83x cpu, 2026-11-29")
        with fastseq.use_backend("cpu"):
            assert ran(module, x) == ["cpu"]

    def test_the_fast_way_heeds_it(self, monkeypatch):
        """Counted calls of torch's kernel, of a module that nobody looks at."""
        module, x, calls = fastseq.LSTM(8, 8).eval(), torch.randn(20, 2, 8), []
        layers = fastseq.backends.torch.recurrent.LAYERS
        lstm = layers["lstm"]
        monkeypatch.setitem(layers, "lstm", lambda *args: calls.append(1) or lstm(*args))
        with torch.no_grad():
            expected = module(x)[0]
            assert not calls
            torchs_first()
            torch.testing.assert_close(module(x)[0], expected)
        assert calls == [1]
        torchs_first(LSTM._replace(mode="training"))
        module(x)[0].sum().backward()
        assert len(calls) == 2

    def test_single_steps_and_attention_heed_it(self, monkeypatch):
        cell, x = fastseq.GRUCell(8, 8), torch.randn(2, 8)
        q, k = torch.randn(1, 8, 1, 64), torch.randn(1, 8, 16, 64)  # of fewer keys torch's kernel loses NaN
        before = cell(x), fastseq.functional.scaled_dot_product_attention(q, k, k)
        step = Call("recurrent_cell", "training", "gru", "float32", "", "padded", 1, (2, 1, 8))
        one = Call("attention", "inference", "plain", "float32", "", "padded", 1, (8, 1, 16, 64))
        calls = []
        for name, owner in (("gru", fastseq.backends.torch.recurrent.STEPS),):
            monkeypatch.setitem(owner, name, lambda *args, run=owner[name]: calls.append("step") or run(*args))
        torch_s = torch.nn.functional.scaled_dot_product_attention
        monkeypatch.setattr(
            torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append("attention") or torch_s(*a, **k)
        )
        plant(step, Candidate("cpu", us=1.0), Candidate("torch", us=2.0))
        plant(one, Candidate("cpu", us=1.0), Candidate("torch", us=2.0))
        cell(x), fastseq.functional.scaled_dot_product_attention(q, k, k)
        assert calls == []
        torchs_first(step)
        torchs_first(step._replace(mode="inference"))
        torchs_first(one)
        after = cell(x), fastseq.functional.scaled_dot_product_attention(q, k, k)
        assert calls == ["step", "attention"]
        torch.testing.assert_close(after, before)
        with torch.no_grad():
            torch.testing.assert_close(cell(x), before[0])
        torch.testing.assert_close(fastseq.functional.attention(q, k, k), before[1])
        assert calls[2:] == ["attention"]
        with fastseq.use_backend("cpu"):
            fastseq.functional.scaled_dot_product_attention(q, k, k)
        assert len(calls) == 3

    @pytest.mark.parametrize("name", ["rnn_cell", "gru_cell", "lstm_cell"])
    def test_a_step_after_another_is_a_chains(self, name):
        """Of a state that no other step led to the decision is one on a single step; without gradients every step is one."""
        weights, x, h = [torch.randn(32, 8, requires_grad=True), torch.randn(32, 8)], torch.randn(2, 8), torch.randn(2, 8)
        weights = [w[: {"rnn_cell": 8, "gru_cell": 24, "lstm_cell": 32}[name]] for w in weights]
        asked, step = [], getattr(fastseq.functional, name)
        pair = name == "lstm_cell"
        with sources.instead(lambda call: asked.append(call.sizes) or Candidate("cpu")):
            state = (h, h) if pair else h
            for hx in (None, state, step(x, state, *weights)):
                step(x, hx, *weights)
        assert list(dict.fromkeys(asked)) == [(2, 1, 8), (2, CHAIN, 8)]
        asked.clear()
        with sources.instead(lambda call: asked.append(call.sizes) or Candidate("cpu")), torch.no_grad():
            step(x, step(x, state, *weights), *weights)
        assert set(asked) == {(2, 1, 8)}

    def test_packed_sequences_heed_it(self):
        module, x = fastseq.GRU(8, 8), pack_padded_sequence(torch.randn(20, 2, 8), torch.tensor([20, 3]))
        assert ran(module, x) == ["cpu"]
        torchs_first(LSTM._replace(kind="gru", layout="packed"))
        assert ran(module, x) == ["torch"]

    def test_what_must_not_run_does_not(self):
        plant(LSTM, Candidate("cpu", us=1.0, against="wrong: error 1"), Candidate("torch", us=10.0))
        assert ran(fastseq.LSTM(8, 8), torch.randn(20, 2, 8)) == ["torch"]

    def test_what_cannot_run_here_does_not(self, monkeypatch):
        plant(LSTM, Candidate("cuda", us=1.0), Candidate("cpu", us=2.0), Candidate("torch", us=10.0))
        assert ran(fastseq.LSTM(8, 8), torch.randn(20, 2, 8)) == ["cpu"]


class TestShippedForACpu:
    """What no point is near is ours; of single steps the smallest that were measured tell of those that are smaller."""

    @pytest.fixture(autouse=True)
    def table(self, monkeypatch):
        def points(backend, *kins_and_sizes):
            ranks = Candidate(backend, us=1.0), Candidate("cpu" if backend == "torch" else "torch", us=2.0)
            return {kin: [Point(sizes, ranks, "")] for kin, sizes in kins_and_sizes}

        decoding = ("attention", "inference", "plain", "float32", "", "padded", 4), (8, 4, 512, 64)
        step = ("recurrent_cell", "training", "gru", "float32", "", "padded", 1), (1, 1, 128)
        monkeypatch.setattr(sources.shipped, "points_for", lambda *facts: (points("torch", decoding, step), "CPU, AMX"))
        sources.forget()

    @pytest.mark.parametrize(
        ("heads", "tq", "tk", "dtype", "backend"),
        [
            ((8, 2), 4, 512, torch.float32, "torch"),
            ((8, 2), 4, 2048, torch.float64, "torch"),
            ((8, 2), 512, 512, torch.float32, "cpu"),
            ((8, 4), 4, 512, torch.float32, "cpu"),
            ((8, 2), 4, 512, torch.bfloat16, "cpu"),
        ],
    )
    def test_attention(self, heads, tq, tk, dtype, backend):
        facts = dict(op="attention", call="forward", device=CPU, dtype=dtype, batch=1, heads=heads, lengths=(tq, tk))
        facts |= dict(features=(64, 64), layout="padded", window=(-1, -1), offset=0, block_size=0, uses=(), gradients=())
        choice = backends.chosen(AttentionQuery(**facts))
        assert (choice.backend, choice.source, choice.about) == (backend, "shipped", "shipped for CPU, AMX")

    @pytest.mark.parametrize(("hidden", "gradients", "backend"), [(4, True, "torch"), (4, False, "cpu"), (4096, True, "torch")])
    def test_single_steps(self, hidden, gradients, backend):
        query = RecurrentQuery("recurrent_cell", CPU, torch.float32, "gru", 1, 1, hidden, False, "padded", batch=2)
        assert backends.chosen(query, gradients).backend == backend


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("lanes", [3, 62])
def test_heads_on_a_cpu_are_ours(monkeypatch, lanes, gradients):
    """The lengths that are shipped are those of one and two directions."""
    monkeypatch.setattr(lengths, "_table", lengths.table_of("avx2", json.loads(lengths.FILE.read_text())))
    sources.forget()
    query = RecurrentQuery("recurrent", CPU, torch.float32, "gru", 20, lanes, 8, False, "padded", batch=2)
    assert backends.chosen(query, gradients).backend == "cpu"


class TestNearness:
    def test_octaves(self):
        assert distance((1, 8, 64), (2, 8, 16)) == 3.0 and distance((0,), (1,)) == 0.0

    def test_the_nearest_within_reach_and_torchs_of_two(self):
        points = {
            LSTM.kin: [
                Point((2, 10, 8), (Candidate("cpu", us=1.0),), ""),
                Point((2, 40, 8), (Candidate("torch", us=1.0),), ""),
                Point((2, 20, 64), (Candidate("cuda", us=1.0),), ""),
            ]
        }
        found = nearest(points, LSTM, 2.0)
        assert found and found.candidates[0].backend == "torch"
        found = nearest(points, LSTM._replace(sizes=(2, 12, 8)), 2.0)
        assert found and found.candidates[0].backend == "cpu"
        assert nearest(points, LSTM._replace(sizes=(2, 20, 1000)), 2.0) is None
        assert nearest(points, LSTM._replace(dtype="bfloat16"), 2.0) is None

    def test_calls_near_what_was_tuned_go_its_way(self):
        torchs_first()
        module = fastseq.LSTM(8, 8)
        for steps, backend in ((20, "torch"), (40, "torch"), (10, "torch"), (41, "cpu"), (9, "cpu")):
            assert ran(module, torch.randn(steps, 2, 8)) == [backend]
        assert ran(fastseq.LSTM(8, 8, bidirectional=True), torch.randn(20, 2, 8)) == ["cpu"]
        assert ran(module.double(), torch.randn(20, 2, 8).double()) == ["cpu"]

    def test_ranking(self):
        a, b, c = Candidate("cpu", us=2.0), Candidate("torch", us=2.0), Candidate("cuda", us=1.0, against="hangs")
        assert ranked([a, b, c, Candidate("triton")]) == (b, a)
        assert speed_of((a, b)) == "1.00x torch" and speed_of((a,)) == ""
        doubtful = a._replace(us=1.9, doubt=0.1)
        assert ranked([doubtful, b]) == (b, doubtful) and ranked([doubtful._replace(doubt=0.01), b])[0].backend == "cpu"


class TestValidity:
    """Downgrade and upgrade: what was measured with other programs waits until they are back."""

    @pytest.mark.parametrize("program", ["torch", "triton", "driver", "library"])
    def test_of_another_version(self, program):
        torchs_first(**{program: "0.1"})
        module, x = fastseq.LSTM(8, 8), torch.randn(20, 2, 8)
        assert ran(module, x) == ["cpu"]
        torchs_first()
        assert ran(module, x) == ["torch"] and len(store.read("tuned")) == 2

    @pytest.mark.parametrize("change", [{"name": "another"}, {"level": "none"}, {"threads": 77}, {"type": "cuda"}])
    def test_of_another_device(self, change):
        plant(LSTM, Candidate("torch", us=1.0), device=device_of(CPU)._replace(**change))
        assert ran(fastseq.LSTM(8, 8), torch.randn(20, 2, 8)) == ["cpu"]

    def test_of_another_number_of_threads(self):
        module, x, before = fastseq.LSTM(8, 8).eval(), torch.randn(20, 2, 8), torch.get_num_threads()
        torchs_first()
        with torch.no_grad():
            module(x)
            try:
                torch.set_num_threads(before + 1)
                assert not sources.layers_are_torchs("lstm", torch.float32, "padded", 1, 2, 20, 8, False)
                assert ran(module, x) == ["cpu"]
            finally:
                torch.set_num_threads(before)
            assert sources.layers_are_torchs("lstm", torch.float32, "padded", 1, 2, 20, 8, False)
            assert ran(module, x) == ["torch"]

    @pytest.mark.parametrize(
        "damage",
        [
            lambda entry: entry.pop("call"),
            lambda entry: entry["call"].update(sizes=[1]),
            lambda entry: entry["call"].update(mode=[]),
            lambda entry: entry["candidates"][0].update(us="fast"),
            lambda entry: entry["candidates"].append({"unknown": 1}),
            lambda entry: entry.update(device=7),
        ],
    )
    def test_a_damaged_entry_is_ignored_with_one_warning(self, caplog, damage):
        torchs_first(LSTM._replace(kind="gru"))
        entry = entry_of(LSTM, [Candidate("torch", us=1.0)], device_of(CPU)._asdict(), versions(), "2026-11-29")
        damage(entry)
        store.update("tuned", {"damaged": entry})
        sources.forget()
        with caplog.at_level(logging.WARNING, "fastseq"):
            assert ran(fastseq.LSTM(8, 8), torch.randn(20, 2, 8)) == ["cpu"]
            sources.forget()
            assert ran(fastseq.GRU(8, 8), torch.randn(20, 2, 8)) == ["torch"]
        assert caplog.text.count("entry 'damaged'") <= 1
        sources._told.discard(("entry", "damaged"))


class TestPretendedGpu:
    """Queries about a GPU that is not there: what runs without measurements, and with them."""

    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch):
        monkeypatch.setenv("FASTSEQ_SELF_CHECK", "0")
        pretended = Device("cuda", "NVIDIA H999", "9.9", 0)
        monkeypatch.setattr(sources, "device_of", lambda device: pretended if device.type == "cuda" else device_of(device))
        for backend in (backends.triton, backends.cuda):
            monkeypatch.setattr(backend, "available", lambda: None)
            monkeypatch.setattr(backend, "why_not", lambda query: [])
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        return pretended

    def layers(self, **more) -> RecurrentQuery:
        facts = dict(op="recurrent", device=torch.device("cuda", 0), dtype=torch.bfloat16, cell="lstm", steps=64, lanes=1)
        return RecurrentQuery(**facts | dict(hidden=256, projected=False, layout="padded", batch=8) | more)

    def attention(self, **more) -> AttentionQuery:
        facts = dict(op="attention", call="forward", device=torch.device("cuda", 0), dtype=torch.bfloat16, batch=2, heads=(8, 8))
        facts |= dict(lengths=(512, 512), features=(64, 64), layout="padded", window=(-1, 0), offset=0, block_size=0)
        return AttentionQuery(**facts | dict(uses=(), gradients=()) | more)

    @pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
    @pytest.mark.parametrize("layout", ["padded", "packed"])
    @pytest.mark.parametrize("gradients", [False, True])
    def test_layers_are_cudnns(self, cell, layout, gradients):
        choice = backends.chosen(self.layers(cell=cell, layout=layout), gradients)
        assert choice == ("torch", "default", sources.UNMEASURED)
        assert backends.chosen(self.layers(cell=cell, op="recurrent_cell", steps=1), gradients).backend == "torch"

    @pytest.mark.parametrize(
        "more", [{"layout": "lengths"}, {"zoned": True}, {"cell": "slstm"}, {"cell": "layer_norm_lstm"}, {"steps": 70_000}]
    )
    def test_what_torch_has_no_kernel_for_is_tritons(self, more):
        assert backends.chosen(self.layers(**more)).backend == "triton"

    def test_without_cudnn_layers_are_tritons(self, monkeypatch):
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
        assert backends.chosen(self.layers()).backend == "triton"

    @pytest.mark.parametrize(
        ("more", "backend"),
        [
            ({}, "torch"),
            ({"window": (-1, -1)}, "torch"),
            ({"uses": ("dropout",)}, "torch"),
            ({"window": (-1, -1), "uses": ("mask",)}, "torch"),
            ({"dtype": torch.float32}, "torch"),
            ({"heads": (8, 2)}, "torch"),
            ({"heads": (8, 2), "window": (-1, -1), "uses": ("bias",)}, "triton"),
            ({"dtype": torch.float32, "heads": (8, 2)}, "triton"),
            ({"dtype": torch.float64}, "triton"),
            ({"uses": ("mask",)}, "triton"),
            ({"window": (128, 0)}, "triton"),
            ({"uses": ("relative_bias",)}, "triton"),
            ({"uses": ("slopes",)}, "triton"),
            ({"uses": ("weights",)}, "triton"),
            ({"layout": "packed"}, "triton"),
        ],
    )
    def test_attention(self, more, backend):
        assert backends.chosen(self.attention(**more)).backend == backend

    def test_what_was_tuned_there_decides(self, gpu):
        call = backends.call_of(self.layers(), True)
        plant(call, Candidate("cuda", "plan 1", 5.0), Candidate("torch", us=8.0), Candidate("triton", us=9.0), device=gpu)
        assert backends.chosen(self.layers(), True) == ("cuda", "tuned", "tuned here, 1.60x torch, 2026-11-29")
        assert backends.chosen(self.layers(), False).backend == "torch"
        assert backends.select(self.layers(saving=True)).name == "cuda" == backends.select(self.layers(backward=True)).name
        form = sources.form_of("cuda", torch.device("cuda", 0), "lstm", torch.bfloat16, "", "padded", 1, 8, 64, 256, True)
        assert form == "plan 1"

    def test_its_kernel_that_cannot_run_gives_way_to_the_next(self, gpu, monkeypatch):
        call = backends.call_of(self.layers(), False)
        plant(call, Candidate("cuda", us=5.0), Candidate("triton", us=7.0), Candidate("torch", us=8.0), device=gpu)
        assert backends.chosen(self.layers()).backend == "cuda"
        monkeypatch.setattr(backends.cuda, "why_not", lambda query: ["it does not fit"])
        sources.forget()
        assert backends.chosen(self.layers()).backend == "triton"

    def test_shipped_for_a_gpu_of_that_name(self, monkeypatch):
        call = backends.call_of(self.layers(), False)
        points = {call.kin: [Point(call.sizes, (Candidate("triton", "", 1.0), Candidate("torch", "", 2.0)), "")]}
        monkeypatch.setattr(sources.shipped, "points_for", lambda *facts: (points, "NVIDIA H999"))
        sources.forget()
        assert backends.chosen(self.layers()) == ("triton", "shipped", "shipped for NVIDIA H999")
        assert backends.chosen(self.layers(hidden=256 * 8)).backend == "torch"


def test_choosing_costs_a_microsecond():
    torchs_first()
    step = Call("recurrent_cell", "training", "gru", "float32", "", "padded", 1, (2, 1, 8))
    torchs_first(step)
    cpu, fp32 = torch.device("cpu"), torch.float32
    questions = [
        lambda: sources.layers_are_torchs("lstm", fp32, "padded", 1, 2, 20, 8, False),
        lambda: backends.step_is_torchs("gru", cpu, fp32, 2, 8, True),
        lambda: sources.may_be_torchs("attention", False),
    ]
    for ask in questions:
        ask()
        best = 1e9
        for _ in range(50):
            start = time.thread_time()
            for _ in range(100):
                ask()
            best = min(best, (time.thread_time() - start) * 1e4)
        assert best < 1.0, f"{best:.2f} us"


def test_a_new_kind_of_call_is_told_once(caplog):
    module = fastseq.LSTM(8, 8).eval()
    sources._told.clear()
    with caplog.at_level(logging.INFO, "fastseq"), torch.no_grad():
        for steps in (20, 21, 20):
            module(torch.randn(steps, 2, 8))
    (record,) = caplog.records
    assert record.getMessage().startswith("fastseq: recurrent lstm float32 padded D=1 B=2 T=20 H=8 inference on cpu: cpu (")


def test_the_first_question_of_a_process_is_answered_right():
    """Before anything has loaded the library, whose level of instructions finds the table."""
    code = "import fastseq, torch; print(fastseq.convert(torch.nn.LSTM(4, 4)).converted[0].choice)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("shipped for"), done.stderr


def log(level: str) -> subprocess.CompletedProcess[str]:
    code = "import fastseq, torch; fastseq.LSTM(8, 8)(torch.randn(20, 2, 8))"
    environment = __import__("os").environ | {"FASTSEQ_LOG": level}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_the_log_is_shown_if_asked_for():
    assert "INFO fastseq: recurrent lstm" in log("info").stderr
    assert log("").stderr == log("warning").stderr == ""
    wrong = log("loud")
    assert wrong.returncode and "FASTSEQ_LOG: unknown level 'loud'; accepted: debug, info, warning, error" in wrong.stderr


def test_threads_that_forget_while_others_decide():
    module, x, wrong = fastseq.LSTM(8, 8).eval(), torch.randn(20, 2, 8), []
    end = time.monotonic() + 1

    def work():
        try:
            with torch.no_grad():
                while time.monotonic() < end:
                    module(x)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    while time.monotonic() < end:
        torchs_first()
        sources.forget()
    for thread in threads:
        thread.join()
    assert not wrong


def test_no_point_of_torchs(monkeypatch):
    """Though it was said, for another level of instructions, that there are some."""
    monkeypatch.setattr(sources, "may_be_torchs", lambda *_: True)
    monkeypatch.setattr(sources, "_torchs", lambda *_: iter(()))
    assert sources.least_of_torchs("attention", False, "Tk") == 0
