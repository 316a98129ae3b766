"""Triton kernels (the ``kernels/`` folder, installed as ``fastseq.kernels``). No op has one yet."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from . import Query

name = "triton"
devices = ("cuda",)
ops: tuple[str, ...] = ()


def available() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    return None if torch.cuda.is_available() else "no CUDA device is visible to torch"


def why_not(query: Query) -> list[str]:
    return [] if query.op in ops else [f"no Triton kernel for {query.op} yet"]
