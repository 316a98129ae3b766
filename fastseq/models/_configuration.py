"""What models check alike, with errors that name the argument, what was given and what is accepted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastseq.functional import sequence_places

Shapes = Any  # tuple: a tensor of these sizes, None for any; list: a tuple of such


def check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} must be an int, got {size!r}")
        if size < 1:
            raise ValueError(f"{name} must be greater than zero, got {size}")


def check_heads(width: int, heads: int) -> None:
    check_sizes(width=width, heads=heads)
    if width % heads:
        raise ValueError(f"heads must divide width ({width}), got {heads}")


def check_rates(**rates: float) -> None:
    for name, rate in rates.items():
        if not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
            raise ValueError(f"{name} must be a number in [0, 1], got {rate!r}")


def check_choice(name: str, given: Any, accepted: Sequence[str]) -> None:
    if given not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {given!r}")


def check_input(x: Any, *sizes: int | None) -> None:
    """x is a tensor of these sizes; None: any."""
    if not isinstance(x, Tensor):
        raise TypeError(f"the input must be a Tensor, not {type(x).__name__}")
    if not _fits(x, sizes):
        raise RuntimeError(f"the input must be {_said(sizes)}, got {list(x.shape)}")


def check_lengths(lengths: Tensor | None, x: Tensor) -> None:
    """lengths are int64 [B], on a CPU (where looking costs nothing) each in 0..T of x [B, T, ..] or the whole it is a part of."""
    if lengths is None:
        return
    if not isinstance(lengths, Tensor) or lengths.shape != x.shape[:1] or lengths.dtype != torch.int64:
        raise RuntimeError(f"lengths must be an int64 Tensor [{len(x)}], one for each row, got {lengths!r}")
    if lengths.device.type != "cpu" or torch.compiler.is_compiling():
        return
    steps = sequence_places(x.shape[1])[1]
    if (lengths < 0).any() or (lengths > steps).any():
        raise RuntimeError(f"lengths must lie in 0..{steps}, got {lengths.tolist()}")


def cleared(y: Tensor, lengths: Tensor | None) -> Tensor:
    """y [B, T, ..] with zeros beyond each row's length."""
    if lengths is None:
        return y
    places, _ = sequence_places(y.shape[1], device=y.device)
    return y.masked_fill((places >= lengths[:, None])[..., None], 0.0)


def check_state(state: Any, shapes: Shapes, like: Tensor, name: str = "state") -> None:
    """state is what a model of these sizes gave back for a batch on like's device, in single or double precision as like is."""
    if isinstance(shapes, list):
        if not isinstance(state, tuple) or len(state) != len(shapes):
            given = f"a tuple of {len(state)}" if isinstance(state, tuple) else type(state).__name__
            raise RuntimeError(f"{name} must be a tuple of {len(shapes)}, as this model gives it back, got {given}")
        for place, (part, shape) in enumerate(zip(state, shapes, strict=True)):
            check_state(part, shape, like, f"{name}[{place}]")
    elif not isinstance(state, Tensor):
        raise TypeError(f"{name} must be a Tensor, not {type(state).__name__}")
    elif not _fits(state, shapes):
        raise RuntimeError(f"{name} must be {_said(shapes)} for this model and batch, got {list(state.shape)}")
    elif state.device != like.device or (state.dtype == torch.float64) != (like.dtype == torch.float64):
        raise RuntimeError(f"{name} must suit an input of {like.dtype} on {like.device}, got {state.dtype} on {state.device}")


def _fits(tensor: Tensor, sizes: Sequence[int | None]) -> bool:
    if tensor.dim() != len(sizes):
        return False
    for size, own in zip(sizes, tensor.shape, strict=True):  # every step of a model asks
        if size is not None and size != own:
            return False
    return True


def _said(sizes: Sequence[int | None]) -> str:
    return f"[{', '.join('any' if size is None else str(size) for size in sizes)}]"
