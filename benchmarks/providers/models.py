"""Whole models before and after: as built, through fastseq.convert, and with each attention that transformers offers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from .base import Provider, fastseq_chose, fastseq_missing

BEFORE, AFTER = "torch.nn as built", "fastseq.convert"
EAGER, SDPA, OWN = (f"transformers ({name})" for name in ("eager", "sdpa", "fastseq"))


def _built(w: Any) -> nn.Module:
    return w.build()


def _converted(w: Any) -> nn.Module:
    """Where its parameters are to lie: `convert` looks at their device."""
    model = _built(w).to(device=w.device, dtype=w.torch_dtype)
    importlib.import_module("fastseq").convert(model)
    return model


def _exchanged(attention: str) -> Callable[[Any], nn.Module]:
    def build(w: Any) -> nn.Module:
        if attention == "fastseq":
            importlib.import_module("fastseq.integrations.transformers").register()
        model: Any = _built(w)
        model.model.set_attn_implementation(attention)
        return model

    return build


MODEL_PROVIDERS = {
    p.name: p
    for p in (
        Provider(BEFORE, "model", "", _built, color="#d1495b", dashed=True),
        Provider(AFTER, "model", "", _converted, fastseq_missing("convert"), fastseq_chose, "#1e88e5"),
        Provider(EAGER, "model", "", _exchanged("eager"), color="#7c889e", dashed=True),
        Provider(SDPA, "model", "", _exchanged("sdpa"), color="#d1495b", dashed=True),
        Provider(OWN, "model", "", _exchanged("fastseq"), fastseq_missing("convert"), fastseq_chose, "#1e88e5"),
    )
}
