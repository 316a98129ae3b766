"""What becomes what, who runs it afterwards, and what else of a module changes with its class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .. import backends
from .. import modules as own_modules
from ..cells import CELLS
from ..choice import self_check
from ..modules import keep_type as keep_type_modules


@dataclass(frozen=True)
class Conversion:
    """One row of the table.

    Attributes:
        torch_class: what is converted, and subclasses that leave its forward alone.
        backend: who runs a converted module, or None where that cannot be told.
        apply: what else must change in the module once its class is ours.
        undo: takes `apply` back, once its class is torch's again.
    """

    torch_class: type[nn.Module]
    backend: Callable[[nn.Module], backends.Choice | None]
    apply: Callable[[nn.Module, Options], None] = lambda module, options: None
    undo: Callable[[nn.Module], None] = lambda module: None

    @property
    def name(self) -> str:
        return self.torch_class.__name__

    def own_class(self, keep_type: bool) -> type[nn.Module]:
        return getattr(keep_type_modules if keep_type else own_modules, self.name)

    def own_classes(self) -> tuple[type[nn.Module], type[nn.Module]]:
        return self.own_class(keep_type=False), self.own_class(keep_type=True)


@dataclass(frozen=True)
class Options:
    """What the caller of `convert` asked of every module."""

    keep_type: bool | None = None  # None: where the model's code asks for it
    recompute: bool = False


def _recurrent_backend(module: Any) -> backends.Choice | None:
    weight = next(module.parameters())
    if weight.is_meta:
        return None
    cells = {cell.mode: cell.name for cell in CELLS.values()}
    names = [kind.__name__.removesuffix("Cell") for kind in type(module).__mro__]  # a subclass may be called as it likes
    mode = getattr(module, "mode", None) or next((name for name in names if name in cells), "")
    query = backends.RecurrentQuery(
        op="recurrent" if isinstance(module, nn.RNNBase) else "recurrent_cell",
        device=weight.device,
        dtype=weight.dtype,
        cell=cells.get(mode) or f"rnn_{module.nonlinearity}",
        steps=128 if isinstance(module, nn.RNNBase) else 1,
        lanes=2 if getattr(module, "bidirectional", False) else 1,
        hidden=module.hidden_size,
        projected=getattr(module, "proj_size", 0) > 0,
        layout="padded",
    )
    return _selected(query)


def _attention_backend(module: Any) -> backends.Choice | None:
    weight = module.out_proj.weight
    if weight.is_meta:
        return None
    query = backends.AttentionQuery(
        op="attention",
        call="forward",
        device=weight.device,
        dtype=weight.dtype,
        batch=1,
        heads=(module.num_heads, module.num_heads),
        lengths=(128, 128),
        features=(module.head_dim, module.head_dim),
        layout="padded",
        window=(-1, -1),
        offset=0,
        block_size=0,
        uses=(),
        gradients=(),
    )
    return _selected(query)


def _selected(query: backends.Query) -> backends.Choice:
    """The backend of a call without gradients."""
    try:
        with self_check.known_alone():
            return backends.chosen(query)
    except RuntimeError:
        return backends.Choice("none (the one forced cannot run it)", "forced", "forced")


def _set_recompute(module: nn.Module, options: Options) -> None:
    if options.recompute:
        module.recompute = True  # type: ignore[assignment]


def _restore_flat_weights(module: Any) -> None:
    """torch.nn's forward reads a list of its weights and, on a GPU, wants them in one buffer again."""
    vars(module).pop("recompute", None)
    module._init_flat_weights()


# The classes as torch has them, whatever patched() puts in their place later.
CONVERSIONS: dict[str, Conversion] = {
    conversion.name: conversion
    for conversion in (
        Conversion(nn.RNN, _recurrent_backend, apply=_set_recompute, undo=_restore_flat_weights),
        Conversion(nn.LSTM, _recurrent_backend, apply=_set_recompute, undo=_restore_flat_weights),
        Conversion(nn.GRU, _recurrent_backend, apply=_set_recompute, undo=_restore_flat_weights),
        Conversion(nn.RNNCell, _recurrent_backend),
        Conversion(nn.LSTMCell, _recurrent_backend),
        Conversion(nn.GRUCell, _recurrent_backend),
        Conversion(nn.MultiheadAttention, _attention_backend),
        Conversion(nn.TransformerEncoderLayer, lambda layer: _attention_backend(layer.self_attn)),
    )
}


def class_name(kind: type) -> str:
    if "stands_for" in vars(kind):
        return f"{kind.__module__}.{kind.__qualname__} on fastseq's kernels"
    for name, conversion in CONVERSIONS.items():
        for prefix, own in zip(("torch.nn", "fastseq", "fastseq.modules.keep_type"),
                               (conversion.torch_class, *conversion.own_classes()), strict=True):  # fmt: skip
            if kind is own:
                return f"{prefix}.{name}"
    return f"{kind.__module__}.{kind.__qualname__}"
