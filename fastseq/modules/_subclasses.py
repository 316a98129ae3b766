"""Tensors of subclasses that say nothing of their own about what is called on them: they go the short way as plain tensors.

What torch would do with such a call, `Tensor.__torch_function__`, makes the results what the arguments are, and nothing else.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._C import DisableTorchFunctionSubclass

from fastseq.ops._dispatch import PLAIN, plain_call

_FUNCTION: Any = Tensor.__torch_function__.__func__  # type: ignore[attr-defined]
_DISPATCH: Any = Tensor.__torch_dispatch__


def silent(kind: Any) -> bool:
    """Whether it is a subclass of Tensor that leaves what is called on it to Tensor."""
    return (
        isinstance(kind, type)
        and issubclass(kind, Tensor)
        and kind not in PLAIN
        and getattr(kind.__torch_function__, "__func__", None) is _FUNCTION
        and kind.__torch_dispatch__ is _DISPATCH
    )


def subclass_of(*given: Any) -> type[Tensor] | None:
    """The silent subclass of some of these, tensors or tuples of them, if the others are plain and so is the call; else None."""
    found = None
    for value in given:
        for part in value if type(value) is tuple else (value,):
            kind = type(part)
            if part is None or kind in PLAIN or kind is found:
                continue
            if found is not None or not silent(kind):
                return None
            found = kind
    return found if found is not None and plain_call(unseen=True) else None


def as_subclass(kind: type[Tensor], call: Any, *given: Any) -> Any:
    """The results of a call with plain tensors in the place of those of the subclass, as tensors of it."""
    with DisableTorchFunctionSubclass():
        return _each(kind, call(*(_each(Tensor, value) for value in given)))


def _each(kind: type[Tensor], value: Any) -> Any:
    if type(value) is tuple:
        return tuple([_each(kind, part) for part in value])
    if not isinstance(value, Tensor) or type(value) is kind or (kind is Tensor and type(value) in PLAIN):
        return value
    return value.as_subclass(kind)
