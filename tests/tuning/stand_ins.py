"""What a measuring process is given instead of a device's kernels: candidates that are slow, wrong, hang or crash."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from torch import Tensor

from fastseq import backends
from fastseq.backends import cpu, notes, registry


class StandIn:
    """The CPU's kernels under another name, which do something else on the way."""

    devices, ops = ("cpu",), ("recurrent", "attention")

    def __init__(self, name: str, way: Any) -> None:
        self.name, self.way = name, way

    def available(self) -> str | None:
        return None

    def why_not(self, query: backends.Query) -> list[str]:
        return cpu.why_not(query)

    def recurrent_forward(self, call: Any) -> tuple[Tensor, ...]:
        results = cpu.recurrent_forward(call)
        self.way(results)
        return results

    recurrent_backward = staticmethod(cpu.recurrent_backward)


def add(name: str, way: Any) -> None:
    """A candidate for calls on the CPU, asked before the CPU's own kernels."""
    registry.BACKENDS[name] = StandIn(name, way)  # type: ignore[assignment]
    notes.watchers.set((notes.Watcher(lambda *told: None, lambda noted: None),))  # the short ways know the CPU's kernels alone
    registry.CANDIDATES["cpu"] = (name, *registry.CANDIDATES["cpu"])


def hanging() -> None:
    add("hangs", lambda results: time.sleep(1000))


def crashing() -> None:
    add("crashes", lambda results: os.kill(os.getpid(), signal.SIGSEGV))


def wrong() -> None:
    add("wrong", lambda results: results[0].mul_(1.001))


def raising() -> None:
    def way(results: Any) -> None:
        raise RuntimeError("out of resources")

    add("raises", way)


def hanging_late() -> None:
    """In the rounds, not in the check."""
    seen = []
    add("hangs late", lambda results: time.sleep(1000) if len(seen) > 3 else seen.append(1))


def noisy() -> None:
    """Prints where answers go."""
    add("noisy", lambda results: os.write(1, b"noise\n"))


def all_of_them() -> None:
    for plant in (hanging, crashing, wrong, raising):
        plant()


def dying() -> None:
    os._exit(3)
