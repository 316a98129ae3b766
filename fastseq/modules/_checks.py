"""What the recurrent modules and cells check alike, with errors that say what was given."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def pair_of(module: nn.Module, hx: Any) -> tuple[Tensor, Tensor]:
    """(h, c) out of `hx`, with an error that says what was given."""
    if not isinstance(hx, (tuple, list)):
        raise TypeError(f"{kind_of(module)}: hx must be a tuple of Tensors (h, c), not {describe(hx)}")
    if len(hx) != 2:
        raise RuntimeError(f"{kind_of(module)} expects two hidden states (h, c), got {describe(hx)}")
    h, c = hx
    if not isinstance(h, Tensor) or not isinstance(c, Tensor):
        raise AttributeError(f"{kind_of(module)}: hx must be a tuple of Tensors (h, c), got {describe(hx)}")
    return h, c


def kind_of(module: nn.Module) -> str:
    """The name torch's messages use, also for a subclass: 'LSTM' or 'LSTMCell'."""
    return next(kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("fastseq."))


def describe(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        parts = ", ".join(type(part).__name__ for part in value)
        return f"a {type(value).__name__} of {len(value)} ({parts})"
    return f"a {type(value).__name__}"
