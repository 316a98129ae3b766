"""The programs that compute a cell: torch's, fastseq's, and fastseq's on the CUDA kernels, a sequence of one step."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from ..workloads.cells import CELLS, torch_cell
from .base import RECURRENT, Provider, fastseq_chose, fastseq_missing
from .recurrent import FORCED, forced, forced_name


def torch_name(cell: str) -> str:
    return f"torch.nn.{cell}"


def own_name(cell: str) -> str:
    return f"fastseq.{cell}"


def cuda_name(cell: str) -> str:
    return forced_name(cell, "cuda")


def _step(w: Any, steps: int = 1) -> tuple[Any, ...]:
    """A cell's input and states, the same at every step."""
    x, *states = (torch.zeros(w.B, n, device=w.device, dtype=w.torch_dtype) for n in (w.I, *(w.H for _ in w.states)))
    return x, states[0] if len(states) == 1 else tuple(states)


def _providers(cell: str) -> list[Provider]:
    function, color = cell.lower(), RECURRENT[cell.removesuffix("Cell")]
    return [
        Provider(torch_name(cell), function, "", torch_cell, color=color, dashed=True),
        Provider(
            own_name(cell),
            function,
            "",
            lambda w: getattr(importlib.import_module("fastseq"), cell)(w.I, w.H),
            fastseq_missing(cell),
            fastseq_chose,
            color,
        ),
        forced(cell, "cuda", FORCED["cuda"], color, "", _step),
    ]


CELL_PROVIDERS = {p.name: p for cell in CELLS for p in _providers(cell)}
