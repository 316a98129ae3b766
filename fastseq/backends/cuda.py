"""CUDA C++ kernels of the compiled library. No op has one yet."""

from __future__ import annotations

import torch

from . import library
from .query import Query

name = "cuda"
devices = ("cuda",)
ops: tuple[str, ...] = ()


def available() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device is visible to torch"
    return library.reason() or torch.ops.fastseq_native.cuda_obstacle(torch.cuda.current_device()) or None


def why_not(query: Query) -> list[str]:
    return [] if query.op in ops else [f"no CUDA kernel for {query.op} yet"]
