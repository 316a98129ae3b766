"""Who can run an op, and if not, why not.

A backend is a module with ``name``, ``devices`` (torch device types), ``available()`` (None, or why it cannot run on this
machine), ``why_not(query)`` (reasons against one call; empty: it can) and one function per op with the op's signature. The
first backend of ``ORDER`` without a reason runs; a forced backend raises instead of falling back. ``torch`` has no ops: what it
is to run is asked before one is called, by ``torch_runs``. A backend with ``stands_back`` gives reasons there that hold only
while it is not forced. Whoever adds a module to ``BACKENDS`` without a place in the order can force it.
"""

from __future__ import annotations

from . import cpu, cuda, reference, torch, triton
from .explanation import Explanation, explain
from .notes import note
from .query import AttentionQuery, Query, RecurrentQuery, ScanQuery
from .selection import (
    BACKENDS,
    ORDER,
    Refused,
    forced,
    obstacles,
    reasons,
    select,
    torch_runs,
    use_backend,
    watched,
    watching,
)

__all__ = [
    "BACKENDS",
    "ORDER",
    "AttentionQuery",
    "Explanation",
    "Query",
    "RecurrentQuery",
    "Refused",
    "ScanQuery",
    "cpu",
    "cuda",
    "explain",
    "forced",
    "note",
    "obstacles",
    "reasons",
    "reference",
    "select",
    "torch",
    "torch_runs",
    "triton",
    "use_backend",
    "watched",
    "watching",
]
