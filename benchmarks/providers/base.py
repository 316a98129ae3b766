"""The programs that compute a function. To add one is to add an entry; suites choose entries by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn

from ..workloads.base import Workload
from ..workloads.layers import Attention, CellLoop, TransformerBlock

RECURRENT = {"LSTM": "#1e88e5", "GRU": "#0f9a72", "RNN": "#b97d00"}  # and their colors


@dataclass(frozen=True)
class Provider:
    """A row of the table.

    `build` makes what `workload.call` takes: a module whose parameters have the names that the function's own module gives
    them, or that has a method `canonical_name` to translate them; for attention alone a program. `unavailable` says why it
    cannot run a workload, `chose` which of its implementations ran. Color and dashes are those of its line in a figure.
    """

    name: str
    function: str
    layout: str  # "time" or "batch"
    build: Callable[[Workload], Any]
    unavailable: Callable[[Any], str | None] = lambda workload: None
    chose: Callable[[Any], list[str]] = lambda call: []
    color: str = "#888888"
    dashed: bool = False


def fastseq_layer(cls: str, **options: object) -> Callable[[Workload], nn.Module]:
    return lambda w: getattr(importlib.import_module("fastseq"), cls)(w.I, w.H, **w.options, **options)


def fastseq_missing(cls: str) -> Callable[[Workload], str | None]:
    def reason(workload: Workload) -> str | None:
        try:
            attrgetter(cls)(importlib.import_module("fastseq"))
        except (ImportError, AttributeError) as error:
            return f"fastseq.{cls} cannot be used: {error}"
        return None

    return reason


def fastseq_chose(call: Any) -> list[str]:
    """Backends that ran the op. fastseq.explain runs the forward pass once."""
    explained = importlib.import_module("fastseq").explain(call.forward)
    return [f"backend: {name}" for name in sorted(set(explained.backends))]


def _vendor(cls: str) -> Callable[[Workload], nn.Module]:
    return lambda w: getattr(nn, cls)(w.I, w.H, **w.options)


def _recurrent(cls: str, color: str) -> list[Provider]:
    """A loop over torch's cell, torch.nn's layer, fastseq's, and fastseq's that recomputes the gates for the backward pass."""
    function, missing, one = cls.lower(), fastseq_missing(cls), getattr(nn, f"{cls}Cell")
    own, frugal = fastseq_layer(cls), fastseq_layer(cls, recompute=True)
    return [
        Provider(f"eager {cls}Cell loop", function, "time", lambda w: CellLoop(one(w.I, w.H)), color="#7c889e"),
        Provider(f"torch.nn.{cls}", function, "time", _vendor(cls), color=color, dashed=True),
        Provider(f"fastseq.{cls}", function, "time", own, missing, fastseq_chose, color),
        Provider(f"fastseq.{cls} (recompute)", function, "time", frugal, missing, fastseq_chose, color, True),
    ]


PROVIDERS = {
    p.name: p
    for p in (
        *(provider for cls, color in RECURRENT.items() for provider in _recurrent(cls, color)),
        Provider(
            "naive attention",
            "attention",
            "batch",
            lambda w: Attention(w.H, w.heads, fused=False),
            color="#d1495b",
            dashed=True,
        ),
        Provider(
            "fused attention",
            "attention",
            "batch",
            lambda w: Attention(w.H, w.heads, fused=True),
            color="#d1495b",
        ),
        Provider(
            "fastseq attention",
            "attention",
            "batch",
            lambda w: Attention(w.H, w.heads, fused=importlib.import_module("fastseq.functional").scaled_dot_product_attention),
            fastseq_missing("functional.scaled_dot_product_attention"),
            fastseq_chose,
            "#9467d6",
        ),
        Provider(
            "attention block",
            "block",
            "batch",
            lambda w: TransformerBlock(w.H, w.heads, fused=True),
            color="#c454b8",
        ),
    )
}
