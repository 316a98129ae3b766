"""Which backend runs, why the others do not, and what forcing one means."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fastseq
from fastseq import backends
from fastseq.backends import BACKENDS, ORDER, RecurrentQuery, library
from fastseq.choice import sources
from fastseq.choice.decision import Candidate
from fastseq.ops import OPS
from fastseq.ops.attention import attention
from support.attention import PLAIN, make, spec_of

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
CALL = RecurrentQuery("recurrent", torch.device("cpu"), torch.float32, "gru", 5, 1, 16, False, "padded")


def test_table_is_in_order():
    assert tuple(BACKENDS) == (*ORDER, "cuda-host")  # which tests/conftest.py adds
    for name, module in BACKENDS.items():
        assert module.name == name
        assert set(module.ops) <= set(OPS)
        for op in module.ops:
            assert callable(getattr(module, f"{op}_forward"))
            if op != "attention_decode":  # inference only
                assert callable(getattr(module, f"{op}_backward"))


def test_first_without_a_reason_runs():
    chosen = backends.select(CALL)
    assert chosen.name == "cpu"
    assert backends.obstacles("cuda", CALL) == ["runs on cuda tensors, not on cpu"]
    assert "cpu" not in BACKENDS["triton"].devices or interpreted


def test_the_interpreter_runs_only_when_it_is_forced():
    """It takes any CPU tensor of the tests, but is thousands of times slower than the CPU backend."""
    if not interpreted:
        pytest.skip("TRITON_INTERPRET is not set: there is a GPU")
    inputs = make(PLAIN, torch.float32)
    with torch.no_grad():
        call = (attention, *(inputs[name] for name in "qkv"), spec_of(inputs))
        assert fastseq.explain(*call).backends == ["cpu"]
        with fastseq.use_backend("triton"):
            assert fastseq.explain(*call).backends == ["triton"]


def test_reference_is_the_last_resort(monkeypatch):
    monkeypatch.setattr(library, "reason", lambda: "there is no library")
    assert backends.select(CALL).name == "reference"
    assert backends.obstacles("cpu", CALL) == ["there is no library"]
    half = fastseq.LayerNormGRU(3, 4, dtype=torch.float16)(torch.randn(2, 1, 3).half())[0]
    assert half.dtype == torch.float16


def test_forcing_raises_with_the_reasons():
    with fastseq.use_backend("cuda"), pytest.raises(RuntimeError, match=r"'cuda' was forced .* runs on cuda tensors"):
        fastseq.GRU(3, 4)(torch.randn(2, 1, 3))


def test_forcing_ends_with_the_block_even_on_error():
    with pytest.raises(ZeroDivisionError), fastseq.use_backend("reference"):
        assert backends.select(CALL).name == "reference"
        with fastseq.use_backend("auto"):
            assert backends.select(CALL).name == "cpu"
        raise ZeroDivisionError
    assert backends.select(CALL).name == "cpu"


def test_called_by_itself_it_holds_from_there_on():
    try:
        fastseq.use_backend("reference")
        assert backends.select(CALL).name == "reference"
        with fastseq.use_backend(None):
            assert backends.select(CALL).name == "cpu"
        assert backends.select(CALL).name == "reference"
    finally:
        fastseq.use_backend(None)
    assert backends.select(CALL).name == "cpu"


def test_forcing_again_and_by_decorator():
    force = fastseq.use_backend("reference")
    for _ in range(2):
        with force:
            assert backends.select(CALL).name == "reference"
        assert backends.select(CALL).name == "cpu"

    @fastseq.use_backend("reference")
    def chosen():
        return backends.select(CALL).name

    assert [chosen(), backends.select(CALL).name, chosen()] == ["reference", "cpu", "reference"]


def test_who_would_run_what_a_forced_backend_cannot(monkeypatch):
    monkeypatch.setattr(library, "reason", lambda: "there is no library")
    with fastseq.use_backend("cpu"), pytest.raises(RuntimeError, match=r"use_backend\(None\) lets 'reference' run it"):
        backends.select(CALL)


def test_nothing_to_explain():
    with pytest.raises(TypeError, match="a function or module and then its arguments, not Tensor"):
        fastseq.explain(torch.zeros(2))


def test_unknown_backend():
    with pytest.raises(ValueError, match="unknown backend 'gpu'; accepted: auto, triton, cuda, cpu, torch, reference"):
        with fastseq.use_backend("gpu"):
            pass


@pytest.mark.parametrize("value,expected", (("reference", "reference"), ("", "cpu"), ("auto", "cpu")))
def test_environment_variable(value, expected):
    code = "import fastseq, torch; print(fastseq.explain(fastseq.GRU(2, 3), torch.randn(40, 1, 2)).backends)"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "FASTSEQ_BACKEND": value}, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == f"['{expected}']"


def test_environment_variable_with_a_wrong_name():
    run = subprocess.run(
        [sys.executable, "-c", "import fastseq"], env={**os.environ, "FASTSEQ_BACKEND": "x"}, capture_output=True, text=True
    )
    assert run.returncode and "FASTSEQ_BACKEND: unknown backend 'x'" in run.stderr


def test_explain_names_backend_and_reasons():
    text = str(fastseq.explain(fastseq.LSTM(3, 4, num_layers=2, bidirectional=True), torch.randn(40, 1, 3)))
    assert text.startswith("recurrent lstm, float32 on cpu, padded, T=40 B=1 D=2 H=4: cpu")
    assert "not cuda: runs on cuda tensors, not on cpu" in text
    assert str(fastseq.explain(torch.nn.Linear(2, 2), torch.randn(1, 2))).startswith("no fastseq op ran (torch.nn's ")
    with pytest.raises(TypeError, match="got the class LSTM itself"):
        fastseq.explain(fastseq.LSTM, torch.randn(1, 2))
    with fastseq.use_backend("reference"):
        forced = fastseq.explain(fastseq.GRU(3, 4), torch.randn(2, 1, 3))
    assert forced.backends == ["reference"]


def test_single_steps_in_training_are_who_was_the_fastest_unless_forced():
    cell, x = fastseq.GRUCell(3, 4), torch.randn(2, 3)
    assert fastseq.explain(cell, x).backends == ["cpu"]
    seen: list[str] = []
    of_torch = sources.instead(lambda call: Candidate("torch") if call.mode == "training" else None)
    with of_torch, backends.watching(lambda query, name: seen.append(f"{query}: {name}")):
        cell(x)
        cell.double()(x.double())
    cell.float()
    assert seen[0] == "recurrent_cell gru, float32 on cpu, padded, T=1 B=2 D=1 H=4: torch" and len(seen) == 2
    assert all(line.endswith(": torch") for line in seen)
    for name in ("cpu", "reference"):
        with fastseq.use_backend(name):
            assert fastseq.explain(cell, x).backends == [name]
            forced = cell(x)
        torch.testing.assert_close(forced, cell(x))
    with fastseq.use_backend("torch"):
        assert fastseq.explain(cell, x).backends == ["torch"]
        with pytest.raises(RuntimeError, match="'torch' was forced .* torch has LSTM, GRU and RNN, eager"):
            fastseq.GRU(3, 4, num_heads=2)(x[None])


def test_explain_tells_the_form():
    if not interpreted:
        pytest.skip("TRITON_INTERPRET is not set: there is a GPU")
    with fastseq.use_backend("triton"):
        text = str(fastseq.explain(fastseq.GRU(3, 4, num_layers=2), torch.randn(2, 1, 3)))
    assert text.count("\n") == 0  # layers of one shape are explained once
    assert text.endswith("triton, whole (recurrent weights take 3 KiB of 8 KiB of shared memory)")
