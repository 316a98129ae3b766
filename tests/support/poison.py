"""Unwritten memory that is NaN, wherever fastseq allocates it: an element that nobody wrote shows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._device


def poison(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """`torch.empty` and its like, called by fastseq, return NaN."""
    torch.utils._device._device_constructors()  # remembers the real functions, which `with torch.device(...)` looks for
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        set_attribute(owner, name, _poisoned(getattr(owner, name)))


def _called_from_fastseq() -> bool:
    # Frames: this function, the poisoning wrapper, the caller.
    return str(sys._getframe(2).f_globals.get("__name__", "")).partition(".")[0] == "fastseq"


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def wrapper(*args, **kwargs):
        if torch.compiler.is_compiling():
            return allocate(*args, **kwargs)
        tensor = allocate(*args, **kwargs)
        if _called_from_fastseq() and tensor.device.type != "meta" and (tensor.is_floating_point() or tensor.is_complex()):
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return wrapper
