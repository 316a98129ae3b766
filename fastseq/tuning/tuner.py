"""Tuning: which calls there are, one measurement each, and what follows from it in the store."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import Context
from typing import Any

import torch
from torch import nn

from fastseq import backends
from fastseq._arguments import checked_module
from fastseq._convert import all_ours
from fastseq.backends.selection import asked
from fastseq.choice import sources, store
from fastseq.choice.decision import Call, Candidate, entry_of
from fastseq.choice.device import device_of, versions
from fastseq.parity import as_arguments, tensors_of, unchanged

from . import measure, problems
from .child import Bench, Failed
from .report import Row, TuneReport

SECONDS = 0.3  # of rounds, for a call


def tune(
    model: nn.Module, example_inputs: Any, *, training: bool = True, isolated: bool | None = None, seconds: float = SECONDS
) -> TuneReport:
    """Measure on this device which kernel is the fastest for every call that a model makes, and choose it from now on.

    The model runs on the inputs, once without gradients and once with them; what it is, parameters, buffers, ``.grad`` and random
    state, stays. Then each distinct call of LSTM, GRU, RNN, their cells and attention is made again on random numbers: every
    kernel that can run it is compared with the same in fp64, within twice the error that PyTorch itself makes, and those that
    pass are timed in turn. The fastest is stored for this device and these versions of torch, Triton, driver and library
    (``~/.cache/fastseq``, see ``FASTSEQ_CACHE``), from where other processes take it too.

    Args:
        model: converted or not: every module that ``convert`` could make fastseq's is looked at.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments, as for ``convert``.
        training: measure with gradients too.
        isolated: measure in a process of its own, in which a kernel may hang or crash; None: on a GPU.
        seconds: to spend on the rounds of a call.

    Returns:
        The report; print it.

    Raises:
        TypeError: if the model is no nn.Module, or an argument has a type that is not accepted.
        ValueError: if ``example_inputs`` are on the meta device, or ``seconds`` is not above 0.
        RuntimeError: whatever the model raises on the inputs.
    """
    checked_module(model)
    for name, value in (("training", training), *([] if isolated is None else [("isolated", isolated)])):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {value!r}")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(f"seconds must be a number, got {seconds!r}")
    if not seconds > 0:
        raise ValueError(f"seconds must be above 0, got {seconds}")
    return measured_and_stored(calls_of(model, example_inputs, training), isolated=isolated, seconds=seconds)


def calls_of(model: nn.Module, example_inputs: Any, training: bool) -> list[tuple[Call, torch.device]]:
    """The distinct calls that a model makes, in order."""
    args, kwargs = as_arguments(example_inputs)
    tensors = [*model.parameters(), *(tensor for _, tensor in tensors_of((args, kwargs)))]
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError("example_inputs: the model or the inputs are on the meta device, where nothing can be measured")
    devices = sorted({tensor.device.index or 0 for tensor in tensors if tensor.device.type == "cuda"})
    found: dict[tuple[Call, torch.device], None] = {}
    with all_ours(model), unchanged(model), torch.random.fork_rng(devices=devices), backends.use_backend(None):
        for with_gradients in (False, True) if training else (False,):
            model.train(with_gradients)
            with torch.set_grad_enabled(with_gradients), recording(found):
                outputs = model(*args, **kwargs)
            del outputs
    return list(found)


@contextmanager
def recording(found: dict[tuple[Call, torch.device], None]) -> Iterator[None]:
    """Within a ``with`` block, calls of this thread are added."""

    def take(query: backends.Query, gradients: bool) -> None:
        found.setdefault((backends.call_of(query, gradients), query.device))

    token = asked.set(take)
    try:
        with backends.watching(lambda query, name: None):  # who looks on is shown every call
            yield
    finally:
        asked.reset(token)


def measured_and_stored(
    calls: Iterable[tuple[Call, torch.device]],
    *,
    isolated: bool | None,
    seconds: float = SECONDS,
    bench: Bench | None = None,
    told: Callable[[Row | None], None] = lambda row: None,
) -> TuneReport:
    """Measures calls and stores what was found, each as it is found: whoever is interrupted keeps what there is.

    Args:
        told: is told each row, or None of a call that was left out.
    """
    report = TuneReport()
    with nullcontext(bench) if bench is not None else Bench(torch.get_num_threads()) as own:
        for call, device in calls:
            row, why = None, problems.untunable(call)
            if why is None:
                # in a context of its own, which nobody looks at and nothing is forced in
                old = Context().run(_runs, call, device)
                try:
                    if bench is not None or (device.type != "cpu" if isolated is None else isolated):
                        found = own.measured(call, device, seconds)
                    else:
                        found = Context().run(measure.measured, call, device, seconds, {}, lambda at, name: None)
                    row = _row(call, old, found)
                except Failed as error:
                    why = str(error)
            if row is None:
                report.skipped.append((call, why or "no candidate passed"))
            else:
                report.rows.append(row)
                report.unsaved = keep(call, device, row.candidates) or report.unsaved
            told(row)
    return report


def keep(call: Call, device: torch.device, candidates: Iterable[Candidate]) -> str | None:
    """Store what was found. None, or why it holds for this process alone."""
    here, programs = device_of(device), versions()
    key = " | ".join((*map(str, here), *programs.values(), str(call)))
    entry = entry_of(call, candidates, here._asdict(), programs, datetime.date.today().isoformat())
    why = store.update("tuned", {key: entry})
    sources.forget()
    return why


def _runs(call: Call, device: torch.device) -> str:
    """The backend that runs a call now."""
    return backends.chosen(problems.problem(call, device).query, call.mode == "training").backend


def _row(call: Call, old: str, found: list[Candidate]) -> Row | None:
    able = [c for c in found if not c.against]
    if not able:
        return None
    before = next((c for c in able if c.backend == old), None)
    new = able[0]
    speedup = before.us / new.us if before is not None and before.us and new.us else None
    return Row(call, old, new.name, speedup, new.error, tuple(found))
