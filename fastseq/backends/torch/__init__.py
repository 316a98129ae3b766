"""PyTorch's own kernels, for calls that they do faster than ours, or alone: ``limits.py`` says which, and why.

They are called before an op would be: by the functions of ``fastseq.functional`` and by the modules.
"""

from __future__ import annotations

from ..query import Query
from . import attention, recurrent

__all__ = ["attention", "available", "devices", "name", "ops", "recurrent", "why_not"]

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
