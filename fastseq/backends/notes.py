"""Who looks on: whom a call's backend is told, and what the backend says of the way it takes. Each context has its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from torch.compiler import is_compiling

from .query import Query


class Watcher(NamedTuple):
    told: Callable[[Query, str], None]  # every call and the backend that runs it
    noted: Callable[[str], None]  # then, of the call that runs, the ways it takes


watchers: ContextVar[tuple[Watcher, ...]] = ContextVar("fastseq_watchers", default=())


@contextmanager
def watching(told: Callable[[Query, str], None], noted: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Within a ``with`` block, ``told`` is told every call of this thread and the backend that runs it, and ``noted`` how."""
    token = watchers.set((*watchers.get(), Watcher(told, noted)))
    try:
        yield
    finally:
        watchers.reset(token)


def watched() -> bool:
    """Whether somebody wants to know who runs what."""
    return not is_compiling() and watched_eagerly()


def watched_eagerly() -> bool:
    """The same, where it is known that nothing is traced."""
    return bool(watchers.get())


def tell(query: Query, backend: str) -> None:
    for watcher in watchers.get():
        watcher.told(query, backend)


def note(way: object) -> None:
    """Tell it, as a string, of the call that runs."""
    for watcher in watchers.get():
        watcher.noted(str(way))
