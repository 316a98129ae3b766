"""Which backend runs a call: the one that is forced, else the first that can of those that a decision ranks.

``fastseq.choice`` has the decisions. Ops ask `select`; what PyTorch's own kernels may take is asked before an op is called, by
`torch_takes` and `torch_runs`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..choice import sources
from ..choice.decision import CHAIN, MODES, Call, Decision
from . import library, reference
from . import torch as torchs
from .notes import note, tell, watched
from .precision import fp32_precision
from .query import AttentionQuery, Query, RecurrentQuery, ScanQuery
from .registry import BACKENDS, CANDIDATES, ORDER, able, obstacles, reasons
from .wish import forced, inherited

# is shown each call of the context whose kernel is a question, and whether it is with gradients
asked: ContextVar[Callable[[Query, bool], None] | None] = ContextVar("fastseq_asked", default=None)
_said: set[tuple[Any, ...]] = set()
_decisions, _taken, _steps = sources.memory(), sources.memory(), sources.memory()
LACKING = "no kernel of ours runs it"
logger = logging.getLogger("fastseq")


class Refused(RuntimeError):
    """The backend that is forced cannot run a call, for these reasons."""

    def __init__(self, message: str, reasons: list[str]) -> None:
        super().__init__(message)
        self.reasons = reasons


def decision(query: Query, gradients: bool, meeting: bool = False) -> Decision:
    """Who may run a call, with or without gradients, and where that is known from; whether they can is another question.

    ``meeting``: this is where a call that was not met yet may be tuned.
    """
    key = query, gradients, query.dtype.itemsize == 4 and query.device.type == "cuda" and fp32_precision()
    known = _decisions.get(key)
    if known is None:
        library.load()  # whose level of instructions is a fact of the CPU
        known = sources.decide(call_of(query, gradients), query.device, torchs.fuses(query), meeting)
        if meeting or sources.meet is None:
            sources.remember(_decisions, key, known)
    return known


def call_of(query: Query, gradients: bool) -> Call:
    """What a decision depends on of a call."""
    dtype = str(query.dtype).removeprefix("torch.")
    precision = fp32_precision() if query.device.type == "cuda" and dtype == "float32" else ""
    if isinstance(query, AttentionQuery):
        q = query
        window: tuple[str, ...] = {(-1, -1): (), (-1, 0): ("causal",)}.get(q.window, ("window",))
        if q.call.startswith("weights"):
            window += ("weights",)
        sizes = q.batch * q.heads[0], *q.lengths, max(q.features)
        kind = "+".join((*window, *q.uses)) or "plain"
        lanes = q.heads[0] // q.heads[1] if q.heads[1] else 1
        return Call(query.op, MODES[gradients], kind, dtype, precision, q.layout, lanes, sizes)
    if isinstance(query, ScanQuery):
        kind = "+".join((query.kind, *query.uses))
        return Call(
            query.op, MODES[gradients], kind, dtype, precision, query.layout, 1, (query.batch, query.steps, query.channels)
        )
    more = [name for name, given in (("projected", query.projected), ("zoneout", query.zoned)) if given]
    kind = "+".join((query.cell, *more))
    of_steps = query.batch, query.steps, query.hidden
    return Call(query.op, MODES[gradients], kind, dtype, precision, query.layout, query.lanes, of_steps)


def _ranked(query: Query) -> tuple[str, ...]:
    """Backends with the op, in the order in which they are asked."""
    names = CANDIDATES.get(query.device.type, ORDER)
    meeting = query.device.type != "cpu" and not torchs.serves(query) and not _goes_backward(query)
    known = [c.backend for c in decision(query, _with_gradients(query), meeting).candidates if c.backend != torchs.name]
    return (*dict.fromkeys(name for name in known if name in names), *(name for name in names if name not in known))


def _with_gradients(query: Query) -> bool:
    if isinstance(query, RecurrentQuery):
        return query.backward or query.saving
    return _goes_backward(query)


def _goes_backward(query: Query) -> bool:
    return query.backward if isinstance(query, RecurrentQuery) else query.call.endswith("backward")


def select(query: Query) -> ModuleType:
    """The backend that runs a call.

    Raises:
        RuntimeError: if a backend is forced and cannot run it, with its reasons.
    """
    wish = forced()
    if wish is not None:
        against = obstacles(wish, query)
        if against and inherited():
            wish = None
        elif against:
            free = next(name for name in _ranked(query) if not reasons(name, query))
            raise Refused(
                f"backend {wish!r} was forced but cannot run [{query}]: {'; '.join(against)} "
                f"(use_backend(None) lets {free!r} run it)",
                against,
            )
    if wish is not None:
        chosen = wish
    else:
        for chosen in _ranked(query):  # the reference, the last, runs everything
            if able(chosen, query):
                break
        if chosen == reference.name:
            _say_once(query)
    if watched():
        tell(query, chosen)
        hear = asked.get()
        if hear is not None and query.device.type != "cpu" and not torchs.serves(query) and not _goes_backward(query):
            hear(query, _with_gradients(query))
        if wish is None:
            about = decision(query, _with_gradients(query))
            if chosen == about.backend:
                note(about.about)
    return BACKENDS[chosen]


def solved(query: RecurrentQuery, scans: ScanQuery, report: object) -> None:
    """Tell who looks on of a call whose steps were solved at once, by such scans, and what became of it."""
    tell(query, select(scans).name)
    note(report)


class Choice(NamedTuple):
    """Who runs a call."""

    backend: str
    source: str  # of the decision; "forced"; "lacking": nothing else can run it
    about: str  # the same in words


def chosen(query: Query, gradients: bool = False) -> Choice:
    """Who would run a call, torch's own kernels among them.

    Raises:
        RuntimeError: if a backend is forced and cannot run it, with its reasons.
    """
    as_op, wish = _as_op(query), forced()
    if wish == torchs.name and torchs.serves(query):
        return Choice(torchs.name, "forced", "forced")
    if wish is not None:
        return Choice(select(as_op).name, "forced", "forced")
    decided = decision(query, gradients)
    why = torch_takes(query, gradients) if torchs.serves(query) else None
    if why is not None:
        return Choice(torchs.name, decided.source if why == decided.about else "lacking", why)
    backend = select(as_op._replace(saving=gradients) if isinstance(as_op, RecurrentQuery) else as_op).name
    if backend == decided.backend:
        return Choice(backend, decided.source, decided.about)
    return Choice(backend, "default", decided.about if decided.source == "default" and not decided.candidates else "")


def _as_op(query: Query) -> Query:
    return query._replace(op="recurrent") if query.op == "recurrent_cell" else query


def _say_once(query: Query) -> None:
    """That the reference runs a call that nobody asked it to run, and why, once for each kind of call."""
    cell = query.cell if isinstance(query, RecurrentQuery) else ", ".join(query.uses)
    kind = (query.op, cell, query.dtype, query.device.type)
    if kind not in _said:
        _said.add(kind)
        others = [name for name in CANDIDATES.get(query.device.type, ORDER) if name not in (torchs.name, reference.name)]
        why = "; ".join(f"not {name}: {', '.join(reasons(name, query))}" for name in others)
        logger.warning("fastseq: no kernel runs %s, and the reference in plain PyTorch is slower (%s)", query, why)


def torch_takes(query: Query, gradients: bool) -> str | None:
    """Why PyTorch's own kernel takes a call that it can run, and no backend is forced; None: a kernel of ours does."""
    hear = asked.get()
    if hear is not None:
        hear(query, gradients)
    if query.device.type == "cpu":
        return _torch_takes(query, gradients)
    key = query, gradients, fp32_precision()
    if key not in _taken:
        why = _torch_takes(query, gradients)
        if why not in (None, decision(query, gradients).about):  # for want of another, which may come
            return why
        sources.remember(_taken, key, why)
    return _taken.get(key)


def _torch_takes(query: Query, gradients: bool) -> str | None:
    decided, as_op = decision(query, gradients, True), _as_op(query)
    missing: list[str] = []
    for candidate in decided.candidates:
        if candidate.backend == torchs.name:
            if decided.source == "default":
                break
            return "; ".join(missing) or decided.about
        if able(candidate.backend, as_op):
            return None
        missing = reasons(candidate.backend, as_op)
    for name in CANDIDATES.get(query.device.type, ORDER):
        if name not in (torchs.name, reference.name):
            against = obstacles(name, as_op)
            if not against and decided.backend == torchs.name:
                return decided.about
            if not against and able(name, as_op):
                return None
            against = against or reasons(name, as_op)
            missing = missing if query.device.type not in BACKENDS[name].devices else against
    return "; ".join(missing) or LACKING


def steps_with(h: Tensor | None, gradients: bool) -> int:
    """T of a decision on a cell's step after the state h (None: the first): whether steps with gradients came before it."""
    return 1 if not gradients or h is None or h.is_leaf else CHAIN


def step_is_torchs(
    cell: str, device: torch.device, dtype: torch.dtype, batch: int, hidden: int, gradients: bool, steps: int = 1
) -> bool:
    """Whether torch's kernel takes a step of a cell, while no backend is forced; ``steps``: as of ``steps_with``."""
    if sources._threads is not None:
        sources.heed_threads()
    key = cell, device, dtype, batch, hidden, gradients, steps
    known = _steps.get(key)
    if known is None:
        query = RecurrentQuery("recurrent_cell", device, dtype, cell, steps, 1, hidden, False, "padded", batch=batch)
        known = sources.remember(_steps, key, torch_takes(query, gradients) is not None)
    return known


def torch_runs(query: Callable[[], Query], why: str | None) -> bool:
    """Whether PyTorch's own kernel takes a call that it can run: if there is a reason why, or if it is forced.

    The query is made only if somebody wants to know.
    """
    wish = forced()
    if wish is None:
        if why is None:
            return False
    elif wish != torchs.name:
        return False
    if watched():
        tell(query(), torchs.name)
        note(why or "forced")
    return True
