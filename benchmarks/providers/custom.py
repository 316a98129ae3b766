"""A provider of your own beside those of the suites. It takes part wherever the one that it is like does:

    from torch import nn
    from fastseq.benchmarks import main
    from fastseq.benchmarks.providers.custom import add_provider

    class MyLSTM(nn.LSTM):
        ...

    add_provider("my.LSTM", lambda w: MyLSTM(w.I, w.H), like="torch.nn.LSTM")
    main(["--suite", "sequential-vs-parallel", "--quick"])

It is checked alike, timed in the same rounds, and compared with the one that it is like.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..workloads.base import Workload
from .base import Provider
from .registry import EVERY_PROVIDER

TAKEN = ("torch", "fastseq")  # beginnings of names: reports tell by them who is who
_beside: dict[str, str] = {}  # own providers, and whom they are like


def add_provider(
    name: str,
    build: Callable[[Any], Any],
    *,
    like: str,
    unavailable: Callable[[Workload], str | None] = lambda workload: None,
    chose: Callable[[Any], list[str]] = lambda call: [],
    color: str = "#888888",
) -> Provider:
    """Adds a provider to every case in which `like` takes part, in this process.

    Args:
        name: as reports show it; not taken, and not beginning with "torch" or "fastseq".
        build: from a workload to what `like` builds for it. For "torch.nn.LSTM" an nn.Module from ``[T, B, w.I]`` to
            ``[T, B, w.H]`` (first, if it returns a tuple) whose parameters are called as those of torch.nn.LSTM, or that has
            a method ``canonical_name(name)`` to translate them. It is given its parameters, dtype and device afterwards.
        like: the name of a provider of the suites, with its function and layout; speed-ups are over it.
        unavailable: why it cannot run a workload; None: it can.
        chose: from the call that is timed to words on which of its implementations ran.
        color: of its line in figures.

    Returns:
        the provider, as ``registry.EVERY_PROVIDER`` now holds it.

    Raises:
        TypeError: if ``build`` cannot be called.
        ValueError: if ``name`` is empty, taken or begins with "torch" or "fastseq", or no provider is called ``like``.
    """
    if not callable(build):
        raise TypeError(f"build must be callable, a function of a workload, not {type(build).__name__}")
    if not name or name in EVERY_PROVIDER or name.startswith(TAKEN):
        raise ValueError(f"name must be new and begin with neither {' nor '.join(TAKEN)}, got {name!r}")
    if like not in EVERY_PROVIDER or like in _beside:
        known = ", ".join(n for n in EVERY_PROVIDER if n not in _beside)
        raise ValueError(f"like must be the name of a provider of the suites, got {like!r}; there are: {known}")
    other = EVERY_PROVIDER[like]
    EVERY_PROVIDER[name] = Provider(name, other.function, other.layout, build, unavailable, chose, color)
    _beside[name] = like
    return EVERY_PROVIDER[name]


def remove_provider(name: str) -> None:
    """Takes `add_provider` back. Raises ValueError if `name` was not added."""
    if _beside.pop(name, None) is None:
        raise ValueError(f"{name!r} was not added; added are: {', '.join(_beside) or 'none'}")
    del EVERY_PROVIDER[name]


def added(name: str) -> bool:
    return name in _beside


def likes() -> dict[str, str]:
    """The providers that were added, and whom each is like."""
    return dict(_beside)
