"""The programs of whole systems: fastseq.models, the same source on torch's parts, and transformers' models of those names."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from ..workloads.oracles import ORACLES
from ..workloads.systems import SYSTEMS
from ..workloads.torch_models import copies
from .base import Provider, fastseq_chose, fastseq_missing


def own_name(system: str) -> str:
    return f"fastseq {system}"


def torch_name(system: str) -> str:
    return f"torch {system}"


def oracle_name(system: str) -> str:
    return f"transformers {system}"


def _own(w: Any) -> nn.Module:
    return SYSTEMS[w.function].build(importlib.import_module("fastseq.models"), w)


def _torch(w: Any) -> nn.Module:
    return SYSTEMS[w.function].build(copies(), w)


SYSTEM_PROVIDERS = {
    p.name: p
    for s in SYSTEMS.values()
    for p in (
        Provider(own_name(s.name), s.name, "", _own, fastseq_missing("LSTM"), fastseq_chose, s.color),
        *([Provider(torch_name(s.name), s.name, "", _torch, color=s.color, dashed=True)] if s.own_parts else []),
    )
} | {
    oracle_name(name): Provider(oracle_name(name), name, "", o.build, o.missing, color=SYSTEMS[name].color, dashed=True)
    for name, o in ORACLES.items()
}
