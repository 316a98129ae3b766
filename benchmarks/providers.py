"""The programs that compute a function. To add one is to add an entry to PROVIDERS; suites choose entries by
name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from .layers import Attention, CellLoop, TransformerBlock
from .workloads import Call, Workload


@dataclass(frozen=True)
class Provider:
    """`build` returns a module whose parameters carry the names of the function's own module (or a
    `canonical_name` method).
    """

    name: str
    function: str
    family: str  # "recurrent" or "attention"
    layout: str  # "time" or "batch"
    build: Callable[[Workload], nn.Module]
    unavailable: Callable[[Workload], str | None] = lambda workload: None
    chose: Callable[[Call], list[str]] = lambda call: []
    color: str = "#888888"
    dashed: bool = False


def _fastseq(cls: str, **options: object) -> Callable[[Workload], nn.Module]:
    return lambda w: getattr(importlib.import_module("fastseq"), cls)(w.I, w.H, **options)


def _fastseq_missing(cls: str) -> Callable[[Workload], str | None]:
    def reason(workload: Workload) -> str | None:
        try:
            getattr(importlib.import_module("fastseq"), cls)
        except (ImportError, AttributeError) as error:
            return f"fastseq.{cls} cannot be used: {error}"
        return None

    return reason


def _fastseq_chose(call: Call) -> list[str]:
    """Backends that ran the op. fastseq.explain runs the call once."""
    explained = importlib.import_module("fastseq").explain(call.module, call.x)
    return [f"backend: {name}" for name in sorted(set(explained.backends))]


def _entries() -> list[Provider]:
    entries = [
        Provider(
            "eager LSTMCell loop",
            "lstm",
            "recurrent",
            "time",
            lambda w: CellLoop(nn.LSTMCell(w.I, w.H)),
            color="#8d99ae",
        ),
        Provider(
            "naive attention",
            "attention",
            "attention",
            "batch",
            lambda w: Attention(w.H, w.heads, fused=False),
            color="#d1495b",
            dashed=True,
        ),
        Provider(
            "fused attention",
            "attention",
            "attention",
            "batch",
            lambda w: Attention(w.H, w.heads, fused=True),
            color="#d1495b",
        ),
        Provider(
            "attention block",
            "block",
            "attention",
            "batch",
            lambda w: TransformerBlock(w.H, w.heads, fused=True),
            color="#c77dff",
        ),
    ]
    for cls, color in (("LSTM", "#1e88e5"), ("GRU", "#12a67c"), ("RNN", "#e29100")):
        function, missing = cls.lower(), _fastseq_missing(cls)
        vendor = getattr(nn, cls)
        entries += [
            Provider(
                f"torch.nn.{cls}",
                function,
                "recurrent",
                "time",
                lambda w, c=vendor: c(w.I, w.H),
                color=color,
                dashed=True,
            ),
            Provider(
                f"fastseq.{cls}", function, "recurrent", "time", _fastseq(cls), missing, _fastseq_chose, color
            ),
            Provider(
                f"fastseq.{cls} (recompute)",
                function,
                "recurrent",
                "time",
                _fastseq(cls, recompute=True),
                missing,
                _fastseq_chose,
                color,
                True,
            ),
        ]
    return entries


PROVIDERS = {p.name: p for p in _entries()}
