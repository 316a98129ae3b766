"""The programs for a rollout whose states start anew: torch's layer in a masked loop, fastseq's in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..workloads.base import FUNCTIONS
from ..workloads.resets import MaskedLoop, OneCall
from .base import RECURRENT, Provider, fastseq_chose, fastseq_layer, fastseq_missing

CELLS = ("LSTM", "GRU")


def loop_name(cell: str) -> str:
    return f"torch.nn.{cell} (masked loop)"


def own_name(cell: str) -> str:
    return f"fastseq.{cell} (resets)"


def plain_name(cell: str) -> str:
    return f"fastseq.{cell} (no resets)"


def _loop(w: Any) -> nn.Module:
    return MaskedLoop(FUNCTIONS[w.function].module(w), w)


def _call(cell: str) -> Callable[[Any], nn.Module]:
    own = fastseq_layer(cell)
    return lambda w: OneCall(own(w), w)


def _providers(cell: str) -> list[Provider]:
    function, color, missing = f"rollout {cell.lower()}", RECURRENT[cell], fastseq_missing(cell)
    return [
        Provider(loop_name(cell), function, "time", _loop, color="#7c889e", dashed=True),
        Provider(own_name(cell), function, "time", _call(cell), missing, fastseq_chose, color),
        Provider(plain_name(cell), function, "time", _call(cell), missing, fastseq_chose, color, True),
    ]


RESET_PROVIDERS = {p.name: p for cell in CELLS for p in _providers(cell)}
