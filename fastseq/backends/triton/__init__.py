"""Triton kernels (the ``kernels/`` folder, installed as ``fastseq.kernels``).

With ``TRITON_INTERPRET=1`` they also run on CPU tensors, in Triton's interpreter: slowly, for tests, and only when forced.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from ..query import Query, RecurrentQuery
from . import attention, attention_decode, recurrent, scan
from .attention import attention_backward, attention_forward, attention_weights, attention_weights_backward
from .attention_decode import attention_decode_forward
from .recurrent import recurrent_backward, recurrent_forward
from .scan import scan_backward, scan_forward

__all__ = [
    "attention_backward",
    "attention_decode_forward",
    "attention_forward",
    "attention_weights",
    "attention_weights_backward",
    "available",
    "devices",
    "form",
    "forms",
    "name",
    "ops",
    "recurrent_backward",
    "recurrent_forward",
    "scan_backward",
    "scan_forward",
    "variant",
    "why_not",
]

name = "triton"
interpreted = os.environ.get("TRITON_INTERPRET") == "1"
devices = ("cuda", "cpu") if interpreted else ("cuda",)
ops = ("recurrent", "attention", "attention_decode", "scan")

_OPS = {"recurrent": recurrent, "attention": attention, "attention_decode": attention_decode, "scan": scan}


def available() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; CUDA builds of torch bring it, beside another torch: pip install triton"
    return None if interpreted or torch.cuda.is_available() else "no CUDA device is visible to torch"


def forms(query: Query) -> tuple[str, ...]:
    """What a measurement may choose among, for a call that the kernels can run."""
    return recurrent.forms(query) if isinstance(query, RecurrentQuery) else ("",)


def why_not(query: Query) -> list[str]:
    return _OPS[query.op].why_not(query)


def form(query: Query, family: str) -> str:
    """The form of its kernels that was measured to be the fastest for a call; "": it chooses by itself."""
    return recurrent.form(query, family) if isinstance(query, RecurrentQuery) else ""


def variant(query: Query, family: str) -> str:
    """Which of its kernels a family of calls runs, beside what cell, features and dtype say."""
    return _OPS[query.op].variant(query, family)
