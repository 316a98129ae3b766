"""The programs of layers of linear recurrence: a loop over the steps, fastseq's layer, of minGRU its form in logarithms."""

from __future__ import annotations

from ..workloads.linear import module_of
from .base import Provider, fastseq_chose, fastseq_layer, fastseq_missing

LAYERS = {  # function, color
    "MinGRU": ("min_gru", "#e8710a"),
    "MinLSTM": ("min_lstm", "#1e88e5"),
    "HGRN": ("hgrn", "#b97d00"),
    "RGLRU": ("rg_lru", "#9467d6"),
    "QRNN": ("qrnn", "#d1495b"),
    "LRU": ("lru", "#c454b8"),
}
IN_LOGARITHMS = "minGRU in logarithms"


def loop_name(cls: str) -> str:
    return f"eager {cls} loop"


def _layer(cls: str, function: str, color: str) -> list[Provider]:
    own = fastseq_layer(cls, **({"lower_bound": False} if cls == "HGRN" else {}))  # a single layer's is zero
    return [
        Provider(loop_name(cls), function, "time", module_of, color=color, dashed=True),
        Provider(f"fastseq.{cls}", function, "time", own, fastseq_missing(cls), fastseq_chose, color),
    ]


LINEAR_PROVIDERS = {p.name: p for cls, row in LAYERS.items() for p in _layer(cls, *row)} | {
    IN_LOGARITHMS: Provider(IN_LOGARITHMS, "min_gru_log", "time", module_of, color="#7c889e")
}
