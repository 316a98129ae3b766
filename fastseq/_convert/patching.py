"""`patched`: torch's constructors build our modules for a while."""

from __future__ import annotations

import functools
import sys
import threading
from abc import ABCMeta
from collections.abc import Iterable
from contextlib import ContextDecorator
from typing import Any

from torch import nn

from .table import CONVERSIONS

ModuleKinds = type[nn.Module] | str | Iterable[type[nn.Module] | str]


class patched(ContextDecorator):
    """Within `with fastseq.patched():` the constructors nn.RNN, nn.LSTM, nn.GRU, their cells,
    nn.MultiheadAttention and nn.TransformerEncoderLayer build fastseq's modules.

    For code that builds models out of your reach. The names are replaced in torch.nn, torch.nn.modules and
    the modules below that, so `from torch.nn import LSTM` inside the block gets ours too, and so do torch's
    own nn.Transformer and its layers; a name that a file imported before is out of reach (use `convert` on the
    result). Only calls change: `class Mine(nn.LSTM)` derives from torch's class, inside as outside, and
    `isinstance(m, nn.LSTM)` is true for fastseq's modules and torch's. On the way out, also by an error, torch's
    classes stand there again; modules built inside stay fastseq's (`revert` makes them torch's). Blocks nest.
    Also a decorator.

    The replacement holds for the whole process: other threads see it as well while any thread is inside, and
    it is taken back when the last leaves. Keep the block to building models.

    Args:
        modules: which classes, as for `convert`.
        keep_type: as for `convert`.

    Raises:
        TypeError, ValueError: an argument that is not what it has to be.
    """

    _lock = threading.RLock()
    _entries: list[dict[str, type[nn.Module]]] = []  # of all threads, the latest last

    def __init__(self, modules: ModuleKinds | None = None, *, keep_type: bool = False):
        self._classes: dict[str, type[nn.Module]] = {name: _STAND_INS[name, bool(keep_type)] for name in names_of(modules)}
        self._mine: list[dict[str, type[nn.Module]]] = []

    def __enter__(self) -> None:
        entry = dict(self._classes)
        with self._lock:
            self._entries.append(entry)
            self._mine.append(entry)
            self._install()

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            entry = self._mine.pop()
            del self._entries[next(i for i, other in enumerate(self._entries) if other is entry)]
            self._install()

    @classmethod
    def _install(cls) -> None:
        """Put the latest entry's classes, else torch's, in every place that has one of ours or torch's."""
        for name, conversion in CONVERSIONS.items():
            wanted = next((entry[name] for entry in reversed(cls._entries) if name in entry), conversion.torch_class)
            known = (conversion.torch_class, _STAND_INS[name, False], _STAND_INS[name, True])
            for place in (nn, nn.modules, nn.modules.transformer, sys.modules[conversion.torch_class.__module__]):
                if getattr(place, name, None) in known:
                    setattr(place, name, wanted)


class _StandIn(ABCMeta):
    """What stands in a class's place within `patched`: called, it builds ours; as a base class it is torch's."""

    torch_class: type[nn.Module]
    own_class: type[nn.Module]

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> Any:
        bases = tuple(base.torch_class if isinstance(base, _StandIn) else base for base in bases)
        kind: type = functools.reduce(lambda a, b: b if issubclass(b, a) else a, map(type, bases), type)
        return kind(name, bases, namespace, **options)

    @classmethod
    def of(mcs, torch_class: type[nn.Module], own_class: type[nn.Module]) -> _StandIn:
        names = {"__module__": torch_class.__module__, "__qualname__": torch_class.__qualname__, "__doc__": torch_class.__doc__}
        stand_in = super().__new__(mcs, torch_class.__name__, (torch_class,), names)
        stand_in.torch_class, stand_in.own_class = torch_class, own_class
        return stand_in

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.own_class(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, (cls.torch_class, cls.own_class))

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, (cls.torch_class, cls.own_class))


_STAND_INS: dict[tuple[str, bool], Any] = {
    (name, keep): _StandIn.of(conversion.torch_class, conversion.own_class(keep))
    for name, conversion in CONVERSIONS.items()
    for keep in (False, True)
}


def names_of(modules: ModuleKinds | None) -> set[str]:
    """Names in `CONVERSIONS` for what the caller gave."""
    if modules is None:
        return set(CONVERSIONS)
    accepted = f"accepted: {', '.join(f'nn.{name} or {name!r}' for name in CONVERSIONS)}, or several of these"
    if isinstance(modules, type | str):
        modules = (modules,)
    if not isinstance(modules, Iterable) or isinstance(modules, nn.Module):
        raise TypeError(f"modules must be classes or their names, got {type(modules).__name__}; {accepted}")
    chosen = set()
    for kind in modules:
        if isinstance(kind, str):
            name = kind.removeprefix("torch.").removeprefix("nn.")
            known = name in CONVERSIONS
        elif isinstance(kind, type):
            name = kind.__name__
            known = name in CONVERSIONS and any(
                kind is one
                for one in (
                    CONVERSIONS[name].torch_class,
                    *CONVERSIONS[name].own_classes(),
                    _STAND_INS[name, False],
                    _STAND_INS[name, True],
                )
            )
        else:
            raise TypeError(f"modules must be classes or their names, got {kind!r} among them; {accepted}")
        if not known:
            raise ValueError(f"modules: {kind!r} is nothing that can be converted; {accepted}")
        chosen.add(name)
    if not chosen:
        raise ValueError(f"modules is empty, so there is nothing to convert; {accepted}")
    return chosen
