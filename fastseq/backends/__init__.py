"""Who can run an op, and if not, why not.

A backend is a module with ``name``, ``devices`` (torch device types), ``available()`` (None, or why it cannot run on this
machine), ``why_not(query)`` (reasons against one call; empty: it can) and one function per op with the op's signature; one that
has several ways names them by ``forms(query)``.
``registry`` has them in order, ``fastseq.choice`` ranks them call by call, ``selection`` picks the first without a reason; a
backend that is forced (``wish``) raises instead of falling back. ``torch`` has no ops: what it is to run is asked before one is
called. Whoever adds a module to ``BACKENDS`` without a place in the order can force it.
"""

from __future__ import annotations

from . import cpu, cuda, reference, torch, triton
from .explanation import Explanation, explain
from .notes import note, watched, watched_eagerly, watching
from .query import AttentionQuery, Query, RecurrentQuery, ScanQuery
from .registry import BACKENDS, ORDER, able, obstacles, reasons
from .selection import (
    Choice,
    Refused,
    call_of,
    chosen,
    decision,
    select,
    solved,
    step_is_torchs,
    steps_with,
    torch_runs,
    torch_takes,
)
from .wish import forced, forced_eagerly, heeding, set_backend, use_backend

__all__ = [
    "BACKENDS",
    "ORDER",
    "AttentionQuery",
    "Choice",
    "Explanation",
    "Query",
    "RecurrentQuery",
    "Refused",
    "ScanQuery",
    "able",
    "call_of",
    "chosen",
    "cpu",
    "cuda",
    "decision",
    "explain",
    "forced",
    "forced_eagerly",
    "heeding",
    "note",
    "obstacles",
    "reasons",
    "reference",
    "select",
    "set_backend",
    "solved",
    "step_is_torchs",
    "steps_with",
    "torch",
    "torch_runs",
    "torch_takes",
    "triton",
    "use_backend",
    "watched",
    "watched_eagerly",
    "watching",
]
