"""PyTorch's own kernels, for calls that they do faster than ours, or alone.

They are called before an op would be: by the functions of ``fastseq.functional`` and by the modules.
"""

from __future__ import annotations

from ..query import AttentionQuery, Query, ScanQuery
from . import attention, recurrent

__all__ = ["attention", "available", "devices", "fuses", "name", "ops", "recurrent", "serves", "why_not"]

name = "torch"
devices = ("any",)
ops: tuple[str, ...] = ()


def available() -> str | None:
    return None


def why_not(query: Query) -> list[str]:
    if query.op == "recurrent":
        return ["torch has LSTM, GRU and RNN, eager, without lengths, zoneout, weight_dropout, num_heads and return_cells"]
    if query.op == "attention":
        return ["torch has attention of padded sequences, eager, without softcap, sinks, lengths, relative keys and the lse"]
    return [f"torch has no {query.op}"]


def serves(query: Query) -> bool:
    """Whether torch has what such a call asks for, fused or not."""
    if isinstance(query, ScanQuery):
        return False
    return attention.serves(query) if isinstance(query, AttentionQuery) else recurrent.serves(query)


def fuses(query: Query) -> bool:
    """Whether torch runs such a call by a kernel of its own for it, not by several one after the other."""
    if isinstance(query, ScanQuery):
        return False
    return attention.fuses(query) if isinstance(query, AttentionQuery) else recurrent.fuses(query)
