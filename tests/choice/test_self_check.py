"""The self-check of a GPU's kernels, on a pretended one: the interpreter, the CUDA kernels on the host, and stand-ins that can be
wrong, crash or count."""

from __future__ import annotations

import _thread
import importlib
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastseq
from fastseq import backends, info
from fastseq.backends import BACKENDS, AttentionQuery, ScanQuery, explanation, reference, registry, selection
from fastseq.choice import Candidate, Decision, problems, self_check, sources, store
from support.stand_in import StandIn, recurrent

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
on_host = pytest.mark.skipif(BACKENDS["cuda-host"].available() is not None, reason="needs the CUDA kernels built for the host")


def attention(call="forward", dtype=torch.float32, uses=(), **changes):
    given = dict(op="attention", batch=2, heads=(4, 2), lengths=(64, 64), features=(24, 24), layout="padded", window=(-1, 0),
                 offset=0, block_size=0, gradients=()) | changes  # fmt: skip
    return AttentionQuery(call=call, device=CPU, dtype=dtype, uses=uses, **given)


def decoding(dtype, **changes):
    return attention(
        "decode", dtype, ("sinks",), op="attention_decode", layout="paged", block_size=16, lengths=(2, 64), **changes
    )


def scanned(kind, dtype, uses=(), **changes):
    given = dict(op="scan", call="forward", device=CPU, steps=40, batch=3, channels=37, layout="padded") | changes
    return ScanQuery(kind=kind, dtype=dtype, uses=uses, **given)


@pytest.fixture(autouse=True)
def pretended(monkeypatch, tmp_path):
    """The CPU as a device whose kernels are to be tried, with a store of its own."""
    monkeypatch.setattr(self_check, "CHECKED", {name: ("cpu",) for name in ("triton", "cuda-host", "stand-in")})
    monkeypatch.setenv("FASTSEQ_CACHE", str(tmp_path))
    monkeypatch.delenv("FASTSEQ_SELF_CHECK", raising=False)
    self_check.forget()
    yield
    self_check.forget()


@pytest.fixture
def first(monkeypatch):
    """Makes a backend the first choice on a CPU."""

    def put(backend):
        monkeypatch.setitem(BACKENDS, backend.name, backend)
        monkeypatch.setitem(registry.CANDIDATES, "cpu", (backend.name, "reference"))
        decided = Decision((Candidate(backend.name),), "tuned", "tuned here")
        monkeypatch.setattr(selection, "decision", lambda query, gradients, meeting=False: decided)
        return backend

    return put


def against(backend, query):
    return self_check.against(backend, query, reference)


def seldom(query):
    return pytest.param(query, marks=pytest.mark.slow)


@interpreted
@pytest.mark.parametrize(
    "query",
    [
        recurrent("gru", torch.bfloat16),
        seldom(recurrent("lstm", torch.bfloat16, resets=True)),
        seldom(recurrent("slstm", torch.float32, hidden=7, zoned=True)),
        seldom(recurrent("lstm", torch.float16, projected=True, layout="packed")),
        seldom(recurrent("lstm", torch.bfloat16, steps=1)),
        attention("forward", torch.bfloat16, ("bias",)),
        seldom(attention("forward", torch.float32, ("relative_q", "dropout"), window=(-1, -1))),
        pytest.param(
            attention("forward", torch.float16, ("sinks", "blocks", "mask", "k_lengths"), block_size=16, window=(30, 0)),
            marks=pytest.mark.slow,
        ),
        attention("forward", torch.bfloat16, ("sinks",), layout="packed"),
        seldom(attention("weights", torch.bfloat16, ("slopes",))),
        decoding(torch.bfloat16),
        scanned("real", torch.bfloat16, ("initial", "resets"), layout="lengths"),
        seldom(scanned("complex", torch.complex64, ("initial", "reverse"), layout="packed")),
        seldom(scanned("blocks", torch.float16)),
        seldom(scanned("real", torch.float32, ("resets", "log"))),
        seldom(scanned("real", torch.float16, ("initial", "min_gru"))),
    ],
    ids=str,
)
def test_the_triton_kernels_are_right(query):
    found = self_check.check(BACKENDS["triton"], query, reference)
    assert found.keys() == {*problems.families(query)} and all(verdict.right for verdict in found.values()), found


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_on_a_gpu(backend, dtype, monkeypatch):
    """A model trains on a family that has been tried: the backward pass, in a thread of autograd, with it."""
    monkeypatch.setattr(self_check, "CHECKED", {"triton": ("cuda",), "cuda": ("cuda",)})
    query = recurrent("gru", dtype, hidden=64)._replace(device=torch.device("cuda", 0))
    assert BACKENDS[backend].why_not(query) == []
    assert against(BACKENDS[backend], query) == []
    found, done = [], threading.Event()

    def backward():
        found.append(against(BACKENDS[backend], query._replace(backward=True)))
        done.set()

    _thread.start_new_thread(backward, ())
    assert done.wait(60) and found == [[]]


@on_host
@pytest.mark.parametrize(
    "query",
    [
        recurrent("gru", torch.float32),
        recurrent("lstm", torch.bfloat16, hidden=16),
        recurrent("lstm", torch.bfloat16, hidden=16, resets=True),
    ],
    ids=str,
)
def test_the_cuda_kernels_are_right(query):
    assert against(BACKENDS["cuda-host"], query) == []
    assert [verdict.right for _, verdict in self_check.known(CPU)] == [True, True]


@interpreted
@pytest.mark.parametrize(
    ("query", "module", "name", "wrong"),
    [
        (recurrent("gru", hidden=16), "recurrent.whole", "choose", []),  # a GRU has no c
        (recurrent("lstm", hidden=16), "recurrent.whole", "choose", ["forward", "backward"]),
        (recurrent("lstm", hidden=16, resets=True), "recurrent.whole", "cut_before", ["forward", "backward"]),
        (attention(), "attention.forward", "finish", ["forward"]),
        (attention(uses=("bias",)), "attention.bias_gradient", "load_rows", ["bias_gradient"]),
        (attention("weights"), "attention.weights", "load_rows", ["weights"]),
    ],
)
def test_a_kernel_with_a_fault_is_refused(query, module, name, wrong, monkeypatch, caplog):
    """Each in one helper of a kernel; the families that do not call it stay."""
    kernels = importlib.import_module(f"fastseq.kernels.{module}")
    monkeypatch.setattr(kernels, name, FAULTS[name])
    found = self_check.check(BACKENDS["triton"], query, reference)
    assert [name for name, verdict in found.items() if not verdict.right] == wrong
    assert [record.levelname for record in caplog.records] == ["WARNING"] * len(wrong)
    for family in wrong:
        (words,) = against(BACKENDS["triton"], query._replace(**AS.get(family, {})))
        assert "error" in words and "exceeds the bound" in words


AS = {"bias_gradient": {"call": "backward", "gradients": ("q", "bias")}, "backward": {"backward": True}}  # calls of a family

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton
    from triton import language as tl

    from fastseq.kernels.attention import memory, softmax
    from fastseq.kernels.recurrent import step

    @triton.jit
    def always_new(mask, new, old, N: tl.constexpr):
        """`step.choose` that forgets which sequences have ended."""
        return new

    @triton.jit
    def cut_alike(layout, resets, t, back, lengths, b):
        """`step.cut_before` that takes a lane backwards for one forward."""
        return step.cut_before(layout, resets, t, t < 0, lengths, b)

    @triton.jit
    def finished_late(m_i, l_i, parts):
        """`softmax.finish` with a sum that is a thousandth too large."""
        return softmax.finish(m_i, l_i * 1.001, parts)

    @triton.jit
    def one_late(x, b, h, first, rows, T, cols, E: tl.constexpr, BE: tl.constexpr, WHOLE: tl.constexpr = False):
        """`memory.load_rows` with the last feature left out."""
        return memory.load_rows(x, b, h, first, rows, T, cols, E, BE, WHOLE) * (cols < E - 1)[None, :]

    FAULTS = {"choose": always_new, "cut_before": cut_alike, "finish": finished_late, "load_rows": one_late}


def test_a_family_is_tried_once(first):
    backend = first(StandIn())
    assert against(backend, recurrent()) == []
    tried = len(backend.calls)
    assert tried >= 6 and {"recurrent_forward", "recurrent_backward"} == set(backend.calls)
    for query in (recurrent(), recurrent(steps=100), recurrent(backward=True)):
        assert against(backend, query) == []
    assert len(backend.calls) == tried
    against(backend, recurrent("gru"))
    assert len(backend.calls) == 2 * tried


def test_a_form_that_was_tuned_is_tried_as_such(first):
    """And anew when another one is tuned, in this process or another."""
    backend, seen, form = first(StandIn()), [], "plan 2"
    forward = backend.recurrent_forward

    def watching(call):
        decided = sources.decide(selection.call_of(recurrent(batch=call.batch), False), CPU, False)
        seen.append(decided.candidates[:1])
        return forward(call)

    backend.recurrent_forward = watching
    backend.form = backend.variant = lambda query, family: form
    assert against(backend, recurrent()) == [] and set(seen) == {(Candidate("stand-in", "plan 2"),)}
    assert against(backend, recurrent()) == [] and len(seen) == 3
    form = "plan 1"
    store.update("tuned", {})
    assert against(backend, recurrent()) == [] and seen[3:] == 3 * [(Candidate("stand-in", "plan 1"),)]
    assert sources.decide(selection.call_of(recurrent(), False), CPU, False).source != "asked for"


def test_what_is_wrong_is_off_and_the_next_backend_serves(first, caplog):
    """The backward alone: the forward stays, and the gradients are the reference's."""
    torch.manual_seed(0)
    first(StandIn("recurrent_backward"))
    module, x = fastseq.GRU(3, 5), torch.randn(4, 2, 3, requires_grad=True)
    with caplog.at_level(logging.WARNING, "fastseq"):
        out = module(x)[0]
        (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert backends.select(recurrent("gru", backward=True)).name == "reference"
    stock = nn.GRU(3, 5)
    stock.load_state_dict(module.state_dict())
    (expected,) = torch.autograd.grad(stock(x)[0].square().sum(), x)
    torch.testing.assert_close(grad, expected)
    (said,) = [record.getMessage() for record in caplog.records if "are off on this device" in record.getMessage()]
    assert "stand-in: recurrent backward, gru, float32" in said and "dgates: error" in said and "python -m fastseq info" in said


def test_explain_and_info_say_so(first, monkeypatch):
    monkeypatch.setattr(explanation, "ORDER", ("stand-in", "reference"))
    backend = first(StandIn("recurrent_forward"))
    module, x = fastseq.GRU(3, 5), torch.randn(4, 2, 3)
    explained = fastseq.explain(module, x)
    assert explained.backends == ["torch"] and "was wrong in its self-check on this device: " in str(explained)
    explained = fastseq.explain(fastseq.SLSTM(3, 5), x)  # which torch has not
    assert explained.backends == ["reference"] and "not stand-in: was wrong in its self-check on this device: " in str(explained)
    said = info.as_text()
    assert "self-check" in said and "stand-in: recurrent forward, gru, float32: wrong, " in said
    assert "stand-in: recurrent backward, gru, float32: right" in said
    found = info.collect()["self_check"]
    assert [(entry["right"], entry["device"]) for entry in found] == 2 * [(False, "cpu")] + 2 * [(True, "cpu")]
    assert backend.calls


def test_info_tries_nothing(first):
    backend = first(StandIn())
    info.collect()
    assert backend.calls == []
    with self_check.known_alone():
        assert against(backend, recurrent()) == [] and backend.calls == []


@pytest.mark.parametrize(("mode", "again"), [("1", False), ("force", True), ("0", False)])
def test_what_was_found_is_remembered(first, monkeypatch, mode, again):
    wrong = first(StandIn("recurrent_forward"))
    assert against(wrong, recurrent())
    self_check.forget()  # as another process
    monkeypatch.setenv("FASTSEQ_SELF_CHECK", mode)
    right = StandIn()  # mended, which the same build could not be
    assert bool(against(right, recurrent())) == (mode == "1")
    assert bool(right.calls) == again


def test_another_build_or_driver_is_tried_anew(first, monkeypatch):
    against(first(StandIn("recurrent_forward")), recurrent())
    self_check.forget()
    monkeypatch.setattr(self_check, "_build", lambda backend: "another")
    assert against(StandIn(), recurrent()) == []


def test_an_unknown_mode_is_named(monkeypatch):
    monkeypatch.setenv("FASTSEQ_SELF_CHECK", "yes")
    with pytest.raises(ValueError, match="FASTSEQ_SELF_CHECK=yes is none of 0, 1, force"):
        against(StandIn(), recurrent())


WAITS = {"capture": "while a CUDA graph is captured", "compile": "while torch.compile traces"}


@pytest.mark.parametrize("where", ["capture", "compile", "thread", "beside"])
def test_it_waits_where_it_must_not_run(first, monkeypatch, where):
    """The next backend serves, and the check runs at the next call that may."""
    backend, chosen, done = first(StandIn()), [], threading.Event()

    def select():
        chosen.append(backends.select(recurrent()).name)
        done.set()

    with monkeypatch.context() as patch:
        if where == "capture":
            patch.setattr(self_check, "_capturing", lambda device: True)
        elif where == "compile":
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
        elif where == "beside":
            patch.setattr(self_check, "_running", SimpleNamespace(acquire=lambda blocking: False))
        if where == "thread":  # which is none of Python's, as those of autograd are
            _thread.start_new_thread(select, ())
            assert done.wait(30)
        else:
            select()
        assert chosen == ["reference"] and backend.calls == []
        if where in WAITS:
            with self_check.known_alone():  # as explain looks
                assert against(backend, recurrent()) == [
                    f"its self-check on this device has not run yet, and does not {WAITS[where]}"
                ]
    select()
    assert chosen == ["reference", "stand-in"] and backend.calls


def test_a_compiled_model_is_checked_when_it_runs(first):
    backend = first(StandIn())
    module, x = fastseq.GRU(3, 5), torch.randn(4, 2, 3)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
    assert "recurrent_backward" in backend.calls  # of the check, as nobody went back


def test_what_the_caller_has_set_is_left_alone_and_does_not_matter(first):
    """Random numbers, default device and dtype, modes, deterministic algorithms."""
    backend = first(StandIn())
    torch.manual_seed(0)
    before = torch.get_rng_state()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.device("meta"), FlopCounterMode(display=False) as counted:
            assert against(backend, attention(uses=("dropout", "mask", "blocks"), block_size=16)) == []
            assert against(backend, recurrent(zoned=True)) == []
            assert torch.empty(1).is_meta
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
    assert counted.get_total_flops() == 0 and torch.equal(torch.get_rng_state(), before)


def test_what_could_not_be_tried_is_off_in_this_process_alone(first, monkeypatch, caplog):
    def no_memory(call):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def unable(call):
        raise RuntimeError("the reference is out of order")

    backend = first(StandIn())
    backend.recurrent_forward = no_memory
    for _ in range(2):
        (said,) = against(backend, recurrent())
        assert said.startswith("could not be tried in its self-check on this device: OutOfMemoryError: CUDA out of memory")
    broken = SimpleNamespace(recurrent_forward=unable)
    (said,) = self_check.against(backend, recurrent("gru"), broken)
    assert said.endswith("by the reference: the reference is out of order") and "could not be tried" in said
    assert len(caplog.records) == 3  # the gru's backward pass is as untried
    self_check.forget()
    assert against(StandIn(), recurrent()) == [] == against(StandIn(), recurrent("gru"))


def test_a_backend_that_is_forced_is_taken_as_it_is(first):
    backend = first(StandIn("recurrent_forward"))
    with fastseq.use_backend("stand-in"):
        assert backends.select(recurrent()) is backend
    assert backend.calls == []


def test_an_exception_is_a_verdict_and_an_interrupt_is_none(first):
    def crash(call):
        raise error

    backend = first(StandIn())
    backend.recurrent_forward, error = crash, RuntimeError("CUDA error: an illegal instruction was encountered")
    assert against(backend, recurrent())[0].endswith("RuntimeError: CUDA error: an illegal instruction was encountered")
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        against(backend, recurrent("gru"))
    self_check.forget()
    assert against(StandIn(), recurrent("gru")) == []


def test_numbers_that_are_not_finite_are_told(first):
    backend = StandIn()
    backend.attention_forward = lambda *arguments: tuple(t * torch.nan for t in reference.attention_forward(*arguments))
    assert "not finite" in against(first(backend), attention())[0]


def test_an_entry_that_nobody_wrote_counts_for_nothing(first):
    backend = first(StandIn())
    key = self_check._key(backend, recurrent(), "forward")
    for entry in ("right", {}, {"right": "yes"}, {"began": "then", "node": "elsewhere", "pid": 1}):
        store.update("self_check", {key: entry})
        self_check.forget()
        backend.calls.clear()
        assert against(backend, recurrent()) == [] and backend.calls


CHILD = """
import os, sys, torch
sys.path.insert(0, {tests!r})
from support.stand_in import StandIn, recurrent
from fastseq.backends import reference
from fastseq.choice import self_check

self_check.CHECKED["stand-in"] = ("cpu",)
backend = StandIn()
if sys.argv[1] == "dies":
    backend.recurrent_forward = lambda call: os._exit(7)
print(len(backend.calls), self_check.against(backend, recurrent(), reference), len(backend.calls))
"""


def test_other_processes_know_and_know_of_one_that_died(caplog):
    def child(what):
        code = CHILD.format(tests=str(Path(__file__).parents[1]))
        done = subprocess.run([sys.executable, "-c", code, what], capture_output=True, text=True, env=os.environ)
        assert done.returncode in (0, 7), done.stderr
        return done.stdout, done.stderr

    assert child("dies")[0] == ""
    (said,) = against(StandIn(), recurrent())
    assert said.startswith("was wrong in its self-check on this device: the process that checked it on ")
    assert said.endswith("crashed or was ended") and [record.levelname for record in caplog.records] == ["WARNING"]
    store.clear("self_check")
    self_check.forget()
    assert against(StandIn(), recurrent()) == []
    assert child("lives")[0] == "0 [] 0\n"


def test_tf32_may_err_as_fp16_does():
    query = recurrent()
    exact, coarse = (next(problems.problems_of(query, "forward", coarse)) for coarse in (False, True))
    backend = StandIn()

    def rounded(call):  # to the 10 bits of TF32
        weight = (call.weight.view(torch.int32) & ~0x1FFF).view(torch.float32)
        call.weight = weight
        return reference.recurrent_forward(call)

    backend.recurrent_forward = rounded
    coarse.check(backend, reference)
    with pytest.raises(AssertionError, match="exceeds the bound"):
        exact.check(backend, reference)
