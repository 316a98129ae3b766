"""Which backend the caller asks for: in a block by ``use_backend``, in the whole process by ``set_backend``."""

from __future__ import annotations

import os
from contextlib import ContextDecorator
from contextvars import ContextVar
from typing import Any

from torch.compiler import is_compiling

from .._arguments import Function, unknown
from .registry import BACKENDS, ORDER


def _checked(name: str | None, source: str) -> str | None:
    if name is None or name in ("", "auto"):
        return None
    if not isinstance(name, str):
        raise TypeError(f"{source}: a backend is named by a str, not {type(name).__name__}")
    if name not in BACKENDS:
        raise ValueError(f"{source}: {unknown('backend', name, ('auto', *ORDER))}")
    return name


NOTHING: Any = object()  # what a context says that says nothing
_process: str | None = _checked(os.environ.get("FASTSEQ_BACKEND"), "FASTSEQ_BACKEND")
context: ContextVar[Any] = ContextVar("fastseq_backend", default=NOTHING)
_inherited: ContextVar[bool] = ContextVar("fastseq_backend_inherited", default=False)


class use_backend(ContextDecorator):
    """Force a backend: within a ``with`` block or a decorated function, or, called by itself, from here on.

    ``"auto"`` or None: the best one, call by call; called by itself, whatever ``set_backend`` says.

    A call that the forced backend cannot run raises ``RuntimeError`` with its reasons instead of falling back. The setting is the
    context's: of this thread or asynchronous task alone. A backward pass, whichever thread runs it, heeds what held for its
    forward pass if that backend can run it; a compiled program is made without regard to it and heeds it when it runs.
    ``set_backend`` sets it for the whole process, ``FASTSEQ_BACKEND`` from outside.

    Args:
        name: one of ``ORDER`` ("triton", "cuda", "cpu", "torch", "reference"), "auto" or None.

    Raises:
        ValueError: if there is no such backend.
        TypeError: if it is no str.
    """

    def __init__(self, name: str | None) -> None:
        self.name = _checked(name, "use_backend")
        self._before = context.get()
        context.set(NOTHING if self.name is None else self.name)
        self._called = True  # and not yet entered

    def __enter__(self) -> None:
        if not self._called:
            self._before = context.get()
        self._called = False
        context.set(self.name)

    def __exit__(self, *error: object) -> None:
        context.set(self._before)

    def __call__(self, function: Function) -> Function:
        self.__exit__()
        return super().__call__(function)

    def _recreate_cm(self) -> use_backend:
        return use_backend(self.name)


def set_backend(name: str | None) -> None:
    """Force a backend in all threads of the process, but where ``use_backend`` says something else.

    Args:
        name: one of ``ORDER``; ``"auto"`` or None: the best one, call by call.

    Raises:
        ValueError: if there is no such backend.
        TypeError: if it is no str.
    """
    global _process
    _process = _checked(name, "set_backend")


def forced() -> str | None:
    """The backend that is forced; None: the best one is chosen call by call. What is traced sees the process's wish alone."""
    return _process if is_compiling() else forced_eagerly()


def forced_eagerly() -> str | None:
    """The same, where it is known that nothing is traced."""
    own = context.get()
    return _process if own is NOTHING else own


def inherited() -> bool:
    """Whether what is ``forced`` was so of a forward pass whose backward pass runs outside of that block: a wish, no demand."""
    return _inherited.get()


class heeding:
    """Within a ``with`` block what was ``forced`` elsewhere is forced here: for a backward pass, of its forward pass."""

    __slots__ = ("_tokens", "wish")

    def __init__(self, wish: str | None) -> None:
        self.wish = wish

    def __enter__(self) -> None:
        self._tokens = context.set(self.wish), _inherited.set(True)

    def __exit__(self, *error: object) -> None:
        context.reset(self._tokens[0])
        _inherited.reset(self._tokens[1])
