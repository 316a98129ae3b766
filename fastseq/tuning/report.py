"""What tuning found out."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastseq.choice.decision import Call, Candidate


@dataclass(frozen=True)
class Row:
    """A call that was tuned.

    Attributes:
        call: what was measured.
        old: the backend that ran it before.
        new: the one that runs it from now on.
        speedup: the time of the one over that of the other; None if the old one was not timed.
        error: of the new one, the largest, relative to the largest value.
        candidates: all of them, the fastest first; last those that must not run, which say why.
    """

    call: Call
    old: str
    new: str
    speedup: float | None
    error: float | None
    candidates: tuple[Candidate, ...]

    @property
    def against(self) -> list[str]:
        return [f"{c.name}: {c.against}" for c in self.candidates if c.against]


@dataclass
class TuneReport:
    """What ``tune`` measured and decided. Print it; ``len`` counts the calls.

    Attributes:
        rows: one for each call.
        skipped: calls about which there is nothing to decide, or that could not be measured, and why.
        unsaved: why the decisions hold for this process alone; empty if they are stored.
    """

    rows: list[Row] = field(default_factory=list)
    skipped: list[tuple[Call, str]] = field(default_factory=list)
    unsaved: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def changed(self) -> list[Row]:
        """Calls that another backend runs from now on."""
        return [row for row in self.rows if row.old != row.new]

    def __str__(self) -> str:
        lines = [f"fastseq.tune: {len(self.rows)} calls measured, {len(self.changed)} run by another kernel from now on"]
        if not (self.rows or self.skipped):
            lines[0] += "; there was nothing to measure"
        head = ("call", "old", "new", "speed-up", "error")
        cells = [head] + [
            (
                str(row.call),
                row.old,
                row.new,
                "-" if row.speedup is None else f"{row.speedup:.2f}",
                "-" if row.error is None else f"{row.error:.1e}",
            )
            for row in self.rows
        ]
        if self.rows:
            widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
            lines += [
                ("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip() for row in cells
            ]
        for row in self.rows:
            lines += [f"  not for {row.call}: {against}" for against in row.against]
        lines += [f"  left out {call}: {why}" for call, why in self.skipped]
        if self.unsaved:
            lines.append(f"  kept for this process alone: {self.unsaved}")
        return "\n".join(lines)
