"""The programs for rows of unequal length."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from ..workloads.base import Workload
from ..workloads.variable_length import EncoderBlock, FlashRows, Lengths, Masked, Nested, Rows, WithLengths, flash_missing
from .base import RECURRENT, Provider, fastseq_chose, fastseq_missing

CELLS = ("LSTM", "GRU")
MASK, NESTED, FLASH = "encoder block (padded)", "encoder block (nested)", "encoder block (flash-attn)"
OWN_LENGTHS, OWN_ROWS = "fastseq encoder block (lengths)", "fastseq encoder block (rows)"


def layer_name(package: str, cell: str, layout: str) -> str:
    return f"{package}.{cell} ({layout})"


def _layer(package: str, cell: str) -> Callable[[Workload], nn.Module]:
    return lambda w: getattr(nn if package == "torch.nn" else importlib.import_module(package), cell)(w.I, w.H)


def _told(build: Callable[[Workload], nn.Module]) -> Callable[[Any], nn.Module]:
    return lambda w: WithLengths(build(w), w.lengths)


def _recurrent(cell: str, color: str) -> list[Provider]:
    function, missing = f"variable {cell.lower()}", fastseq_missing(cell)
    other, own = _layer("torch.nn", cell), _layer("fastseq", cell)
    return [
        Provider(layer_name("torch.nn", cell, "padded"), function, "time", other, color="#7c889e", dashed=True),
        Provider(layer_name("torch.nn", cell, "packed"), function, "packed", other, color=color, dashed=True),
        Provider(layer_name("fastseq", cell, "padded"), function, "time", own, missing, fastseq_chose, "#7c889e"),
        Provider(layer_name("fastseq", cell, "packed"), function, "packed", own, missing, fastseq_chose, color),
        Provider(layer_name("fastseq", cell, "lengths"), function, "time", _told(own), missing, fastseq_chose, "#9467d6"),
    ]


def _encoder(cls: type[EncoderBlock]) -> Callable[[Any], nn.Module]:
    return lambda w: cls(w)


VARIABLE_PROVIDERS = {
    p.name: p
    for p in (
        *(provider for cell in CELLS for provider in _recurrent(cell, RECURRENT[cell])),
        Provider(MASK, "variable encoder", "batch", _encoder(Masked), color="#d1495b", dashed=True),
        Provider(NESTED, "variable encoder", "rows", _encoder(Nested), color="#c454b8", dashed=True),
        Provider(FLASH, "variable encoder", "rows", _encoder(FlashRows), flash_missing, color="#888888"),
        Provider(
            OWN_LENGTHS,
            "variable encoder",
            "batch",
            _encoder(Lengths),
            fastseq_missing("functional.attention"),
            fastseq_chose,
            "#9467d6",
        ),
        Provider(
            OWN_ROWS,
            "variable encoder",
            "rows",
            _encoder(Rows),
            fastseq_missing("functional.attention"),
            fastseq_chose,
            "#1e88e5",
        ),
    )
}
