"""Gates over rows: what fastseq must reach, and what it is meant to, of each of the rows or of their geometric mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..measure.results import Row, reliable
from ..report.model import Card, Cell, Table, speed_tone, target_cell
from ..report.statistics import geometric_mean

ERROR = "error"  # over which a gate of errors is


@dataclass(frozen=True)
class Gate:
    """`counts`: the rows of fastseq that it asks; `over`: what they are compared with."""

    title: str
    must: float
    goal: float
    counts: Callable[[Row], bool]
    mean: bool = False
    over: str = "torch.nn"


def verdict(
    gate: Gate,
    counted: list[Row],
    value_of: Callable[[Row], float | None],
    name_of: Callable[[Row], str],
    partial: bool = False,
) -> dict[str, Any]:
    """Of the rows that a gate counts. `partial`: one without a value, as there is nothing to compare it with, is no failure."""
    values = [(value, r) for r in counted if (value := value_of(r)) is not None]
    worst = min(values, key=lambda pair: pair[0], default=None)
    mean = geometric_mean([value for value, _ in values]) if values else None
    found = None if worst is None else mean if gate.mean else worst[0]
    expected = len(values) if partial else len(counted)
    whole = found is not None and len(values) == expected
    return {
        "gate": gate.title,
        "over": gate.over,
        "must": gate.must,
        "goal": gate.goal,
        "of": "geometric mean" if gate.mean else "lowest point",
        "found": found,
        "mean": mean,
        "worst": None if worst is None else {"point": name_of(worst[1]), "value": worst[0]},
        "points": len(values),
        "untimed": expected - len(values),
        "reliable": gate.over == ERROR or reliable(counted),
        "reached": whole and found is not None and found >= gate.must,
        "goal reached": whole and found is not None and found >= gate.goal,
    }


def cards(verdicts: list[dict[str, Any]], over: str) -> list[Card]:
    """Means of the gates over this, of more than two points."""
    return [
        Card(f"{g['mean']:.2f}×", f"{g['gate']}, {g['points']} points", speed_tone(g["mean"]))
        for g in verdicts
        if g["mean"] is not None and g["reliable"] and g["over"] == over and g["points"] > 2
    ]


def table(verdicts: list[dict[str, Any]]) -> Table:
    body: list[list[Cell | str]] = []
    for g in verdicts:
        if not g["points"] and not g["untimed"]:
            continue
        numbers = [f"{g[name]:.2f}×" if g[name] is not None else "–" for name in ("found", "mean")]
        worst = f"{g['worst']['value']:.2f}× {g['worst']['point']}" if g["worst"] else "–"
        points = f"{g['points']}" + (f", {g['untimed']} without a time" if g["untimed"] else "")
        goal = Cell("reached", "good") if g["goal reached"] and g["reliable"] else Cell("–", "weak")
        line: list[Cell | str] = [g["gate"], g["over"], points, g["of"], *numbers]
        body.append([*line, f"{g['must']:.3g}×", target_cell(g), f"{g['goal']:.3g}×", goal, worst])
    columns = ["", "over", "points", "counts", "found", "geometric mean", "must", "", "goal", "", "lowest"]
    return Table("Gates", columns, body, "One thread unless it says otherwise. Computed from the points below.")
