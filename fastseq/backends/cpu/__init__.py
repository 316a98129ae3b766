"""The CPU: native kernels for recurrence, attention and scans (AMX, AVX-512, AVX2 or baseline code, chosen at run time)."""

from __future__ import annotations

from .. import library
from ..query import Query
from . import attention, attention_decode, recurrent, scan
from .attention import (
    attention_backward,
    attention_forward,
    attention_weights,
    attention_weights_backward,
    attention_with_weights,
)
from .attention_decode import attention_decode_forward
from .recurrent import layer_gradients, recurrent_backward, recurrent_forward
from .scan import scan_backward, scan_forward

__all__ = [
    "attention_backward",
    "attention_decode_forward",
    "attention_forward",
    "attention_weights",
    "attention_weights_backward",
    "attention_with_weights",
    "available",
    "devices",
    "layer_gradients",
    "name",
    "ops",
    "recurrent_backward",
    "recurrent_forward",
    "scan_backward",
    "scan_forward",
    "why_not",
]

name = "cpu"
devices = ("cpu",)
ops = ("recurrent", "attention", "attention_decode", "scan")

_OPS = {"recurrent": recurrent, "attention": attention, "attention_decode": attention_decode, "scan": scan}


def available() -> str | None:
    return library.reason()


def why_not(query: Query) -> list[str]:
    return _OPS[query.op].why_not(query)
