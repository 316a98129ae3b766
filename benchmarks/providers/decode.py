"""The programs that decode: layers and cells that carry a state, an attention block that carries a cache."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from ..workloads.base import Workload
from ..workloads.decode import BlockDecoder, CellDecoder, Growing, LayerDecoder, Own, Reserved
from .base import RECURRENT, Provider, fastseq_chose, fastseq_missing

CELLS = ("LSTM", "GRU")
GROWING, RESERVED, OWN = "block (growing cache)", "block (reserved cache)", "block (fastseq's cache)"


def layer_name(package: str, cell: str) -> str:
    return f"{package}.{cell} (state)"


def cell_name(package: str, cell: str) -> str:
    return f"{package}.{cell}Cell (state)"


def _class(package: str, name: str) -> Any:
    return getattr(nn if package == "torch.nn" else importlib.import_module(package), name)


def _layer(package: str, cls: str) -> Callable[[Workload], nn.Module]:
    return lambda w: LayerDecoder(_class(package, cls)(w.I, w.H))


def _cell(package: str, cls: str) -> Callable[[Workload], nn.Module]:
    return lambda w: CellDecoder(_class(package, cls)(w.I, w.H))


def _block(cls: type[BlockDecoder]) -> Callable[[Workload], nn.Module]:
    return lambda w: cls(w.H, w.heads)


def _recurrent(cell: str, package: str) -> list[Provider]:
    own, name = package == "fastseq", f"{cell}Cell"
    missing: list[Callable[[Workload], str | None]] = [fastseq_missing(n) if own else lambda w: None for n in (cell, name)]
    chose = fastseq_chose if own else lambda call: []
    function = f"decode {cell.lower()}"
    return [
        Provider(layer_name(package, cell), function, "", _layer(package, cell), missing[0], chose, RECURRENT[cell], not own),
        Provider(cell_name(package, cell), function, "", _cell(package, name), missing[1], chose, "#7c889e", not own),
    ]


DECODE_PROVIDERS = {
    p.name: p
    for p in (
        *(provider for cell in CELLS for package in ("torch.nn", "fastseq") for provider in _recurrent(cell, package)),
        Provider(GROWING, "decode block", "", _block(Growing), color="#d1495b", dashed=True),
        Provider(RESERVED, "decode block", "", _block(Reserved), color="#d1495b"),
        Provider(
            OWN,
            "decode block",
            "",
            _block(Own),
            fastseq_missing("functional.attention_with_kv_cache"),
            fastseq_chose,
            "#9467d6",
        ),
    )
}
