"""Programs over several processes, by the names of ``workloads/over_ranks.py``: which one a name means, the processes know."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from ..workloads.over_ranks import ONE, TORCH
from .base import Provider

COLORS = {
    "one process": "#7c889e",
    "ring": "#1e88e5",
    "all_gather": "#0f9a72",
    "all_to_all": "#9467d6",
    "torch context_parallel": "#d1495b",
    "wavefront of 1 micro-batch": "#b97d00",
    "wavefront of 4 micro-batches": "#0f9a72",
    "scan over ranks": "#1e88e5",
}


def _obstacle(w: Any) -> str | None:
    """Why none of it can be measured."""
    if not (dist.is_available() and dist.is_gloo_available()):
        return "this torch has no gloo"
    return None if w.device == "cpu" else "processes with a GPU each are not started here"


def _provider(name: str, color: str) -> Provider:
    def unavailable(w: Any) -> str | None:
        return _obstacle(w) or w.found(name).reason or None

    return Provider(name, "ranks", "", lambda w: name, unavailable, color=color, dashed=name in (ONE, TORCH))


RANK_PROVIDERS = {name: _provider(name, color) for name, color in COLORS.items()}
