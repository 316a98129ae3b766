"""Stacks of two layers: of an LSTM, of an attention block, and one of each. All have the same number of parameters."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from ..workloads.base import STACKS, Workload
from ..workloads.layers import Stack, TransformerBlock
from .base import Provider, fastseq_missing

COLORS = {"lstm lstm": "#1e88e5", "block block": "#c454b8", "lstm block": "#d55e00"}
LSTMS, BLOCKS, HYBRID = ("LSTM on LSTM", "block on block", "block on LSTM")


def _stack(function: str) -> Callable[[Workload], nn.Module]:
    def layer(kind: str, w: Workload) -> Any:
        if kind == "block":
            return TransformerBlock(w.H, w.heads, fused=True)
        return importlib.import_module("fastseq").LSTM(w.H, w.H, batch_first=True)

    return lambda w: Stack(*(layer(kind, w) for kind in function.split()))


STACK_PROVIDERS = {
    name: Provider(name, function, "batch", _stack(function), fastseq_missing("LSTM"), color=COLORS[function])
    for name, function in zip((LSTMS, BLOCKS, HYBRID), STACKS, strict=True)
}
