"""What a backend says of the way it takes, to whoever asked for an explanation."""

from __future__ import annotations

from collections.abc import Callable

listeners: list[Callable[[str], None]] = []


def note(way: object) -> None:
    """Tell it, as a string, of the call that runs."""
    for listen in listeners:
        listen(str(way))
