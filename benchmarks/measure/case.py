"""What is measured together: programs that are timed in turn; and what the command line asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..workloads.base import Workload
from .results import Row
from .timing import Effort

RESTARTS, QUICK_RESTARTS = 3, 1  # processes that measure the headlines, unless the command line says otherwise


@dataclass(frozen=True)
class Participant:
    provider: str
    workload: Workload


@dataclass(frozen=True)
class Case:
    """Participants that are timed in turn. They share mode, threads and device; `baseline` maps a provider to what it is
    compared with (no entry: no speed-up in its row)."""

    suite: str
    group: str
    participants: tuple[Participant, ...]
    effort: Effort
    baseline: tuple[tuple[str, str], ...] = ()
    check: bool = True
    timed: bool = True  # else memory alone is observed
    headline: bool = False  # measured again in further processes, see restarts.py

    @property
    def label(self) -> str:
        w = self.participants[0].workload
        return f"{self.group} {w.mode} T={w.T} B={w.B} H={w.H} threads={w.threads}"

    def keys(self) -> set[tuple[Any, ...]]:
        """Of the rows that it leaves."""
        return {Row.of(self.suite, self.group, p.provider, p.workload).key for p in self.participants}


@dataclass(frozen=True)
class Options:
    """What the command line asks of a suite."""

    device: str
    dtype: str
    threads: tuple[int, ...]  # empty: the suite's own choice
    quick: bool
    full: bool = False  # the whole grid, where a suite measures a part of it by default
    restarts: int = 1  # processes that measure the headlines
