"""The class of a converted module whose class is a user's: a subclass of that class and of ours."""

from __future__ import annotations

from abc import ABCMeta
from types import FunctionType
from typing import Any

from .table import CONVERSIONS, Conversion


def own_class(kind: type, conversion: Conversion, keep: bool) -> type:
    """The class that makes a module of class `kind` ours; ``keep``: it is torch's as well."""
    if kind is conversion.torch_class:
        return conversion.own_class(keep)
    return _common_class(kind, conversion.name)


def _common_class(kind: type, name: str) -> type:
    """The subclass of a user's class `kind` and of ours: what `kind` says comes first, then ours, then torch's."""
    known: type
    for known in kind.__subclasses__():
        if vars(known).get("stands_for") is kind:
            return known
    namespace = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__reduce_ex__": _reduce_common,
        "stands_for": kind,
    }
    return type(kind)(kind.__name__, (kind, CONVERSIONS[name].own_class(keep_type=True)), namespace)


def _reduce_common(module: Any, protocol: Any) -> Any:
    """For pickle and copy, which would look for the class by its name, and find the user's."""
    kind = type(module)
    name = next(name for name, conversion in CONVERSIONS.items() if issubclass(kind, conversion.torch_class))
    return _common_instance, (vars(kind)["stands_for"], name), *object.__reduce_ex__(module, max(protocol, 2))[2:]


def _common_instance(kind: type, name: str) -> Any:
    common: Any = _common_class(kind, name)
    return common.__new__(common)


def why_not_subclass(kind: type, base: type) -> str:
    """What in a subclass of torch's class keeps it from a common subclass with ours; empty: nothing."""
    if type(kind) not in (type, ABCMeta):
        return f" with a metaclass of its own ({type(kind).__name__})"
    for own in kind.__mro__[: kind.__mro__.index(base)]:
        for name in ("forward", "merge_masks", "permute_hidden", "__call__", "__init_subclass__", "__reduce__", "__reduce_ex__"):
            if name in vars(own) and not (name == "forward" and _calls_super(vars(own)[name])):
                return f" with its own {name}"
    return ""


def _calls_super(forward: Any) -> bool:
    """Whether a forward does its work by that of the class above, and sets no weights in a way that only torch's reads."""
    if not isinstance(forward, FunctionType):
        return False
    code = forward.__code__
    above = "forward" in code.co_names and ("__class__" in code.co_freevars or "super" in code.co_names)
    return above and "_flat_weights" not in code.co_names
