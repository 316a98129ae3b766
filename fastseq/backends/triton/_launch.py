"""What every Triton launcher asks: which dtypes run here, and with which products of fp32."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch

from ..query import Query

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETED_DTYPES = (torch.float16, torch.float32, torch.float64)
GPU_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def dtype_obstacles(query: Query) -> list[str]:
    """Why a dtype cannot run, if so."""
    if INTERPRETED:
        accepted: tuple[torch.dtype, ...] = INTERPRETED_DTYPES
        where = "in Triton's interpreter, which gets bfloat16 wrong"
    else:
        accepted = GPU_DTYPES
        where = "on a GPU"
    if query.dtype in accepted:
        return []
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in accepted)
    return [f"dtype {str(query.dtype).removeprefix('torch.')} is not one of {names} ({where})"]


def precision(flag: str) -> str:
    """Triton's ``input_precision`` for fp32 operands, as torch's own flag for this kind of work says."""
    return "tf32" if flag == "tf32" else "ieee"


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensors'."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
