"""fastseq's layers and cells after `fastseq.pack`, which lays their weights out once, in their own dtype or in bf16."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..workloads.cells import CELLS
from .base import RECURRENT, Provider, fastseq_layer, fastseq_missing


def pack_name(cell: str, weights: str = "") -> str:
    return f"fastseq.{cell} (pack{f' {weights}' if weights else ''})"


def _packed(build: Callable[[Any], nn.Module], weights: str) -> Callable[[Any], nn.Module]:
    """Parameters that are written later are packed again by themselves."""

    def built(w: Any) -> nn.Module:
        module = build(w).to(w.device, w.torch_dtype).eval()
        importlib.import_module("fastseq").pack(module, getattr(torch, weights) if weights else None)
        return module

    return built


def _provider(cell: str, layout: str, weights: str = "") -> Provider:
    missing, color = fastseq_missing("pack"), RECURRENT[cell.removesuffix("Cell")]

    def unavailable(w: Any) -> str | None:
        return missing(w) or ("fastseq.pack is for inference" if w.mode != "inference" else None)

    return Provider(
        pack_name(cell, weights), cell.lower(), layout, _packed(fastseq_layer(cell), weights), unavailable, color=color
    )


PACK_PROVIDERS = {
    p.name: p
    for p in (
        *(_provider(cell, "time", weights) for cell in RECURRENT for weights in ("", "bfloat16")),
        *(_provider(cell, "") for cell in CELLS),
    )
}
