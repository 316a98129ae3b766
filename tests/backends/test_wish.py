"""Forcing a backend: in a context, in the process, in a backward pass that another thread runs; and who sees whose calls."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

import fastseq
from fastseq import backends
from fastseq.backends import RecurrentQuery
from fastseq.functional import scaled_dot_product_attention

CALL = RecurrentQuery("recurrent", torch.device("cpu"), torch.float32, "gru", 5, 1, 16, False, "padded")


@pytest.fixture(autouse=True)
def free():
    yield
    fastseq.set_backend(None)


def elsewhere(function):
    """What a function gives in another thread."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_a_block_is_its_threads_own():
    with fastseq.use_backend("reference"):
        assert backends.select(CALL).name == "reference" and elsewhere(lambda: backends.select(CALL).name) == "cpu"


def test_a_process_is_everybodys_but_a_blocks():
    fastseq.set_backend("reference")
    assert backends.select(CALL).name == elsewhere(lambda: backends.select(CALL).name) == "reference"
    with fastseq.use_backend("cpu"):
        assert backends.select(CALL).name == "cpu" and elsewhere(lambda: backends.select(CALL).name) == "reference"
        fastseq.set_backend("torch")
        assert backends.select(CALL).name == "cpu"
    with fastseq.use_backend("auto"):
        assert backends.forced() is None
    fastseq.set_backend("auto")
    assert backends.forced() is None


@pytest.mark.parametrize(("given", "error"), [("gpu", ValueError), (3, TypeError)])
def test_what_is_no_backend(given, error):
    fastseq.set_backend("cpu")
    with pytest.raises(error, match="set_backend: "):
        fastseq.set_backend(given)
    assert backends.forced() == "cpu"


def test_tasks_do_not_see_each_others():
    async def task(name, order):
        with fastseq.use_backend(name):
            await asyncio.sleep(order)
            return backends.select(CALL).name

    async def both():
        return await asyncio.gather(task("reference", 0.02), task("cpu", 0.01), task(None, 0))

    assert asyncio.run(both()) == ["reference", "cpu", "cpu"]


def gradients_of(out, leaf):
    torch.autograd.grad(out.sum(), leaf, retain_graph=True)


def recurrent(x):
    return fastseq.GRU(4, 4)(x)[0]


def attention(x):
    q = x.unsqueeze(0)
    return scaled_dot_product_attention(q, q, q)


def weighted(x):
    return fastseq.MultiheadAttention(4, 2, batch_first=True)(x, x, x)[0]


@pytest.mark.parametrize("function", [recurrent, attention, weighted])
@pytest.mark.parametrize(("forward", "backward"), [("reference", None), (None, "reference"), ("cpu", "reference")])
def test_a_backward_pass_does_as_its_forward_pass(function, forward, backward, monkeypatch):
    """In this thread and in another, as a GPU's backward passes run."""
    x = torch.randn(3, 2, 4, requires_grad=True)
    with fastseq.use_backend(forward):
        out = function(x)
    ran = []
    for module, name in ((backends.reference, "recurrent_backward"), (backends.reference, "attention_backward")):
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, own=own: ran.append("reference") or own(*args))
    with fastseq.use_backend(backward):
        gradients_of(out, x)
        elsewhere(lambda: gradients_of(out, x))
    assert ran == (["reference"] * 2 if forward == "reference" else [])


def test_explain_sees_the_calls_of_its_own_thread():
    module, x = fastseq.GRU(4, 4), torch.randn(3, 2, 4)
    begun, stop = threading.Event(), threading.Event()

    def work():
        with torch.no_grad():
            while not stop.is_set():
                fastseq.LSTM(4, 4)(x)
                begun.set()

    thread = threading.Thread(target=work)
    thread.start()

    def explained():
        begun.wait(5)
        begun.clear()
        begun.wait(5)
        return module(x)

    try:
        explanation = fastseq.explain(explained)
    finally:
        stop.set()
        thread.join()
    assert [query.cell for query, *_ in explanation.calls] == ["gru"]
    assert len(explanation.notes) == 1


def test_what_is_compiled_heeds_a_block_when_it_runs():
    module, x = fastseq.GRU(4, 4), torch.randn(3, 2, 4)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    ran = []
    with torch.no_grad():
        compiled(x)
        for name in ("reference", "cpu"):
            with fastseq.use_backend(name), backends.watching(lambda query, backend: ran.append(backend)):
                compiled(x)
    assert ran == ["reference", "cpu"]
