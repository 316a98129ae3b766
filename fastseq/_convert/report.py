"""What `convert` and `revert` return."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """One module of the model, tied or not.

    Attributes:
        names: every name that reaches it from the model ("" is the model itself).
        old: its class before.
        new: its class after, or None if it was left alone.
        backend: the backend that runs a long call of it where its parameters lie now, or, with example_inputs,
            those that ran it; None if left alone, on the meta device, or not called.
        choice: where it is known from that this backend is the one ("tuned here, 1.83x torch, 2026-11-29").
        note: what a conversion does not change in it; empty if there is nothing to say.
        reason: why it was left alone; empty if it was converted.
        unsupported: whether it was left alone because it cannot be converted, not because nobody asked for
            it.
    """

    names: tuple[str, ...]
    old: str
    new: str | None = None
    backend: str | None = None
    choice: str = ""
    note: str = ""
    reason: str = ""
    unsupported: bool = False


@dataclass
class Report:
    """What `convert` or `revert` did. Print it. True if it changed anything; `len` counts those modules.

    Attributes:
        title: what was called.
        converted: a row for each module that was changed: names, classes, backend.
        skipped: a row for each that was left alone, with the reason.
    """

    title: str
    converted: list[Row] = field(default_factory=list)
    skipped: list[Row] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.converted)

    def __str__(self) -> str:
        lines = [self._summary()]
        for head, rows in self._tables():
            widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
            for row in [head, *rows]:
                cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
                lines.append(("  " + "  ".join(cells)).rstrip())
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        parts = [f"<p>{html.escape(self._summary())}</p>"]
        for head, rows in self._tables():
            parts.append("<table>")
            for tag, row in [("th", head), *(("td", row) for row in rows)]:
                cells = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
                parts.append(f"<tr>{cells}</tr>")
            parts.append("</table>")
        return "".join(parts)

    def _summary(self) -> str:
        return f"{self.title}: {len(self.converted)} changed, {len(self.skipped)} left alone"

    def _tables(self) -> Iterator[tuple[list[str], list[list[str]]]]:
        if self.converted:
            rows = [[named(r.names), r.old, r.new or "", r.backend or "-", r.choice, r.note] for r in self.converted]
            yield ["name", "was", "is", "backend", "choice", "note"], rows
        if self.skipped:
            rows = [[named(r.names), r.old, r.reason] for r in self.skipped]
            yield ["name", "is", "left alone because"], rows


def named(names: Iterable[str]) -> str:
    return ", ".join(name or "(model)" for name in names)
