"""Code of a model that asks for the class of a module, and would go another way once that is ours."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from types import CodeType, FunctionType, UnionType
from typing import Any

from .. import modules as own_modules
from .found import Found
from .table import CONVERSIONS


class Asking:
    """Which code of a model asks whether something is torch's LSTM, GRU, ..: given another class, it would go another way."""

    _OTHERS = ("torch", "fastseq")  # packages whose functions are not looked into
    _BUILDING = ("__init__", "_init_weights", "init_weights", "reset_parameters")  # which run before

    def __init__(self) -> None:
        self._of_class: dict[type, dict[str, str]] = {}

    def who(self, found: Found, name: str) -> str:
        """The qualified name of a method of the modules above one, or of a function that it calls, that asks for ``nn.name``."""
        if issubclass(getattr(own_modules, name), CONVERSIONS[name].torch_class):  # ours is torch's in any case
            return ""
        for module in found.ancestors:
            for kind in type(module).__mro__:
                if kind not in self._of_class:
                    self._of_class[kind] = self._asked_by(kind)
                if name in self._of_class[kind]:
                    return self._of_class[kind][name]
        return ""

    def _asked_by(self, kind: type) -> dict[str, str]:
        """The askers, by what they ask for."""
        methods = [value for name, value in vars(kind).items() if name not in self._BUILDING]
        methods = [value.fget if isinstance(value, property) else getattr(value, "__func__", value) for value in methods]
        waiting = [value for value in methods if self._is_looked_into(value)]
        known, asked, of_methods = set(waiting), dict[str, str](), len(waiting)
        for place, function in enumerate(waiting):
            for code in _codes_in(function.__code__):
                names = frozenset(code.co_names)
                called = [value for value in map(function.__globals__.get, names) if self._is_looked_into(value)]
                for value in called:  # and what is called by those within their file
                    if value not in known and (place < of_methods or value.__module__ == function.__module__):
                        known.add(value)
                        waiting.append(value)
                if names.isdisjoint(("isinstance", "issubclass")) and not _matches_classes(code):
                    continue
                wanted = set(names & CONVERSIONS.keys())
                for name in names:  # a tuple of classes, say, of the file or of the class
                    wanted |= _torch_names(function.__globals__.get(name, getattr(kind, name, None)))
                for name in wanted:
                    asked.setdefault(name, f"{function.__module__}.{function.__qualname__}")
        return asked

    def _is_looked_into(self, value: Any) -> bool:
        return isinstance(value, FunctionType) and (value.__module__ or "").partition(".")[0] not in self._OTHERS


def _codes_in(code: CodeType) -> Iterator[CodeType]:
    """That of a function, and of each that is defined within it."""
    yield code
    for value in code.co_consts:
        if isinstance(value, CodeType):
            yield from _codes_in(value)


def _matches_classes(code: CodeType) -> bool:
    """Whether there is a ``case nn.LSTM():`` in it."""
    return dis.opmap["MATCH_CLASS"] in code.co_code[::2]


def _torch_names(value: Any) -> set[str]:
    """Those of torch's classes that a value is or holds."""
    if isinstance(value, UnionType):
        value = value.__args__
    held = value if isinstance(value, (tuple, list, set, frozenset, dict)) else (value,)
    return {name for name, conversion in CONVERSIONS.items() if any(one is conversion.torch_class for one in held)}
