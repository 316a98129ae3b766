"""The programs that compute a cell: torch's and fastseq's."""

from __future__ import annotations

import importlib

from .cells import CELLS, torch_cell
from .providers import RECURRENT, Provider, fastseq_chose, fastseq_missing


def torch_name(cell: str) -> str:
    return f"torch.nn.{cell}"


def own_name(cell: str) -> str:
    return f"fastseq.{cell}"


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
    ]


CELL_PROVIDERS = {p.name: p for cell in CELLS for p in _providers(cell)}
