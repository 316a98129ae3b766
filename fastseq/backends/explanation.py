"""`explain`: which backend ran each call, where that choice comes from, and what stood against the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import no_grad
from torch.nn import Module

from .notes import watching
from .query import Query
from .registry import ORDER, reasons
from .wish import forced


@dataclass
class Explanation:
    """Which backend ran each call, and what stood against the others. ``print`` it.

    Attributes:
        calls: for each call what was asked, the backend that ran it, and of others what stood against them.
        notes: for each call where the choice is known from, and what its backend says of it.
    """

    calls: list[tuple[Query, str, dict[str, list[str]]]] = field(default_factory=list)
    # of each call: where the choice comes from, what its backend says, of calls alike what any of them says
    notes: list[list[str]] = field(default_factory=list)

    @property
    def backends(self) -> list[str]:
        """The backend of every call, in order."""
        return [chosen for _, chosen, _ in self.calls]

    def __str__(self) -> str:
        if not self.calls:
            return "no fastseq op ran (torch.nn's modules call none until fastseq.convert made them fastseq's)"
        lines = []
        for (query, chosen, against), notes in zip(self.calls, self.notes, strict=True):
            lines.append(f"{query}: {chosen}" + "".join(f", {note}" for note in notes))
            lines += [f"  not {name}: {'; '.join(why)}" for name, why in against.items()]
        return "\n".join(lines)


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Run ``function(*args, **kwargs)`` without gradients: which backend each fastseq op chose that it calls in this thread,
    where the choice comes from, and why not the others.

    Args:
        function: a module, or whatever is called.
        args, kwargs: its arguments.

    Example:
        >>> print(fastseq.explain(fastseq.GRU(8, 16), torch.randn(5, 2, 8)))

    Raises:
        TypeError: if there is nothing to call.
    """
    if isinstance(function, type) and issubclass(function, Module):
        raise TypeError(f"explain takes a module, got the class {function.__name__} itself, not one that it made")
    if not callable(function):
        raise TypeError(f"explain takes a function or module and then its arguments, not {type(function).__name__}")
    explanation = Explanation()
    seen: dict[Query, list[str]] = {}
    notes: list[str] = []  # of the call that runs

    def told(query: Query, chosen: str) -> None:
        nonlocal notes
        known = seen.get(query)
        notes = seen[query] = [] if known is None else known
        if known is None:
            explanation.notes.append(notes)
            # PyTorch's own kernel is not asked for after the others
            better = ORDER[: ORDER.index(chosen)] if forced() is None and chosen != "torch" else ()
            against = {name: reasons(name, query) for name in better}
            explanation.calls.append((query, chosen, {name: why for name, why in against.items() if why}))

    def noted(text: str) -> None:
        if text not in notes:
            notes.append(text)

    with watching(told, noted), no_grad():
        function(*args, **kwargs)
    return explanation
