"""CUDA C++ kernels of the compiled library: recurrent weights that stay in registers and shared memory for a whole sequence."""

from __future__ import annotations

from functools import lru_cache

import torch

from .. import library
from ..query import Query, RecurrentQuery
from . import recurrent
from .recurrent import GPU as MACHINE
from .recurrent import form, recurrent_backward, recurrent_forward, variant

__all__ = [
    "MACHINE",
    "available",
    "devices",
    "form",
    "forms",
    "name",
    "ops",
    "recurrent_backward",
    "recurrent_forward",
    "variant",
    "why_not",
]

name = "cuda"
devices = ("cuda",)
ops = ("recurrent",)


def available() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device is visible to torch"
    return library.reason() or _obstacle(torch.cuda.current_device()) or None


@lru_cache
def _obstacle(device: int) -> str:
    return torch.ops.fastseq_native.cuda_obstacle(device)


def forms(query: Query) -> tuple[str, ...]:
    """What a measurement may choose among, for a call that the kernels can run."""
    return recurrent.forms(query) if isinstance(query, RecurrentQuery) else ("",)


def why_not(query: Query) -> list[str]:
    return recurrent.why_not(query) if isinstance(query, RecurrentQuery) else [f"no CUDA kernel for {query.op} yet"]
