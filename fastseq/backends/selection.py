"""Which backend runs a call: the first of ``ORDER`` without a reason against it, or the one that is forced."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager
from types import ModuleType
from typing import Any

from .._arguments import Function, unknown
from ..choice import self_check
from . import cpu, cuda, reference, torch, triton
from .notes import note
from .query import Query, RecurrentQuery

ORDER = ("cuda", "triton", "cpu", "torch", "reference")
BACKENDS: dict[str, ModuleType] = {module.name: module for module in (cuda, triton, cpu, torch, reference)}


def _checked(name: str | None, source: str) -> str | None:
    if name is None or name in ("", "auto"):
        return None
    if not isinstance(name, str):
        raise TypeError(f"{source}: a backend is named by a str, not {type(name).__name__}")
    if name not in BACKENDS:
        raise ValueError(f"{source}: {unknown('backend', name, ('auto', *ORDER))}")
    return name


# backends in order, by the type of device that they may run on; Triton's interpreter, on the CPU, only runs when it is forced
_CANDIDATES: dict[str, tuple[str, ...]] = {
    "cpu": tuple(name for name in ORDER if {"cpu", "any"} & set(BACKENDS[name].devices) and name != "triton"),
    "cuda": tuple(name for name in ORDER if {"cuda", "any"} & set(BACKENDS[name].devices)),
}

_forced: str | None = _checked(os.environ.get("FASTSEQ_BACKEND"), "FASTSEQ_BACKEND")
_watchers: list[Callable[[Query, str], None]] = []
_said: set[tuple[Any, ...]] = set()
logger = logging.getLogger("fastseq")


class Refused(RuntimeError):
    """The backend that is forced cannot run a call, for these reasons."""

    def __init__(self, message: str, reasons: list[str]) -> None:
        super().__init__(message)
        self.reasons = reasons


class use_backend(ContextDecorator):
    """Force a backend: within a ``with`` block or a decorated function, or, called by itself, from here on.

    One of ``ORDER``; ``"auto"`` or None: the best one, call by call.

    A call that the forced backend cannot run raises ``RuntimeError`` with its reasons instead of falling back. The setting
    holds for the whole process (backward passes run in other threads). ``FASTSEQ_BACKEND`` sets the same from outside.

    Raises:
        ValueError: if there is no such backend.
        TypeError: if it is no str.
    """

    def __init__(self, name: str | None) -> None:
        global _forced
        self.name = _checked(name, "use_backend")
        self._before, _forced = _forced, self.name
        self._called = True  # and not yet entered

    def __enter__(self) -> None:
        global _forced
        if not self._called:
            self._before = _forced
        self._called, _forced = False, self.name

    def __exit__(self, *error: object) -> None:
        global _forced
        _forced = self._before

    def __call__(self, function: Function) -> Function:
        self.__exit__()
        return super().__call__(function)

    def _recreate_cm(self) -> use_backend:
        return use_backend(self.name)


def forced() -> str | None:
    """The backend that is forced, by ``use_backend`` or ``FASTSEQ_BACKEND``; None: the best one is chosen call by call."""
    return _forced


def reasons(name: str, query: Query) -> list[str]:
    """Why a backend does not run a call by itself; empty if it does."""
    backend = BACKENDS[name]
    stands_back = backend.stands_back(query) if hasattr(backend, "stands_back") else []
    with self_check.known_alone():
        return obstacles(name, query) or stands_back or self_check.against(backend, query, reference)


def _serves(name: str, query: Query) -> bool:
    """Whether there are no `reasons`, without forming them."""
    stands_back = getattr(BACKENDS[name], "stands_back", None)
    if (stands_back and stands_back(query)) or obstacles(name, query):
        return False
    return name not in self_check.CHECKED or not self_check.against(BACKENDS[name], query, reference)


def obstacles(name: str, query: Query) -> list[str]:
    """Why a backend cannot run a call, forced or not; empty if it can."""
    backend = BACKENDS[name]
    if query.device.type not in backend.devices and "any" not in backend.devices:
        return [f"runs on {', '.join(backend.devices)} tensors, not on {query.device.type}"]
    missing = backend.available()
    return [missing] if missing else backend.why_not(query)


def select(query: Query) -> ModuleType:
    """The backend that runs a call.

    Raises:
        RuntimeError: if a backend is forced and cannot run it, with its reasons.
    """
    if _forced is not None:
        against = obstacles(_forced, query)
        if against:
            free = next(name for name in _CANDIDATES.get(query.device.type, ORDER) if _serves(name, query))
            raise Refused(
                f"backend {_forced!r} was forced but cannot run [{query}]: {'; '.join(against)} "
                f"(use_backend(None) lets {free!r} run it)",
                against,
            )
        chosen = _forced
    else:
        for chosen in _CANDIDATES.get(query.device.type, ORDER):  # the reference, the last, runs everything
            if _serves(chosen, query):
                break
        if chosen == reference.name:
            _say_once(query)
    for watch in _watchers:
        watch(query, chosen)
    return BACKENDS[chosen]


def _say_once(query: Query) -> None:
    """That the reference runs a call that nobody asked it to run, and why, once for each kind of call."""
    cell = query.cell if isinstance(query, RecurrentQuery) else ", ".join(query.uses)
    kind = (query.op, cell, query.dtype, query.device.type)
    if kind not in _said:
        _said.add(kind)
        others = [name for name in _CANDIDATES.get(query.device.type, ORDER) if name not in (torch.name, reference.name)]
        why = "; ".join(f"not {name}: {', '.join(reasons(name, query))}" for name in others)
        logger.warning("fastseq: no kernel runs %s, and the reference in plain PyTorch is slower (%s)", query, why)


@contextmanager
def watching(watch: Callable[[Query, str], None]) -> Iterator[None]:
    """Within a ``with`` block, ``watch`` is told every call and the backend that runs it."""
    _watchers.append(watch)
    try:
        yield
    finally:
        _watchers.remove(watch)


def watched() -> bool:
    """Whether somebody wants to know who runs what."""
    return bool(_watchers)


def torch_runs(query: Callable[[], Query], why: str | None) -> bool:
    """Whether PyTorch's own kernel takes a call that it can run: if there is a reason why, or if it is forced.

    The query is made only if somebody wants to know.
    """
    if _forced is None:
        if why is None:
            return False
    elif _forced != torch.name:
        return False
    if _watchers:
        for watch in _watchers:
            watch(query(), torch.name)
        note(why or "forced")
    return True
