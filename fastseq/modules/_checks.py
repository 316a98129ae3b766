"""What the recurrent modules and cells check alike, with errors that say what was given."""

from __future__ import annotations

import types
from typing import Any, TypeVar

from torch import Tensor, nn

from fastseq._arguments import own_keywords

Kind = TypeVar("Kind", bound=type[nn.Module])


def public(kind: Kind) -> Kind:
    """A module that users construct: it prints as fastseq's, and its constructor and forward, also where a private base defines
    them, go by its name in help() and in Python's own errors.
    """
    for name in ("__init__", "forward"):
        owner = next(base for base in kind.__mro__ if name in vars(base))
        if "_get_name" in vars(owner):  # a public class itself
            continue
        function: Any = vars(owner)[name]
        if owner is not kind:
            found, function = (
                function,
                types.FunctionType(function.__code__, function.__globals__, name, function.__defaults__, function.__closure__),
            )
            function.__kwdefaults__, function.__annotations__ = found.__kwdefaults__, found.__annotations__
            function.__doc__, function.__module__ = found.__doc__, kind.__module__
            function.__qualname__ = f"{kind.__qualname__}.{name}"
        setattr(kind, name, own_keywords(function, getattr(kind, "_REFUSED", {})) if name == "__init__" else function)
    kind._get_name = _get_name  # type: ignore[method-assign]
    return kind


def _get_name(module: nn.Module) -> str:
    """For repr: ``fastseq.LSTM``, to be told from torch's; the names of subclasses are their own."""
    kind = type(module)
    return f"fastseq.{kind.__name__}" if kind.__module__.startswith("fastseq.") else kind.__name__


def as_plain_tuple(hx: Any, count: int) -> Any:
    """States in a list or in a named tuple, both of which torch takes, as the tuple that fast ways look for; else ``hx``."""
    return tuple(hx) if isinstance(hx, (tuple, list)) and len(hx) == count > 1 else hx


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
