"""From measurements to the table of lengths that torch's LSTM, GRU and RNN take on a CPU, `cpu-lengths.json`.

Of one kind of call, `torch` and `ours` are the least times at several lengths. Torch's kernel gets the stretch of lengths over
which it wins most in all, each length counting by the logarithm of the ratio less a MARGIN: one disturbed point neither opens a
stretch nor cuts one in two. Between a length inside and one outside it ends where the ratio, a straight line in logarithms,
passes 1; beyond the longest length, where the times meet as straight lines.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

from fastseq.choice.decision import MODES
from fastseq.choice.device import LEVELS
from fastseq.choice.lengths import row_name

MARGIN = 0.02
Row = dict[str, Any]
Interval = tuple[int, int | None]  # None: without end
NOWHERE: Interval = (1, 0)


def interval(steps: Sequence[int], torch: Sequence[float], ours: Sequence[float]) -> Interval:
    """The first and the last length of torch's."""
    logs = [math.log(b / a) for a, b in zip(torch, ours, strict=True)]  # above 0: torch's is the faster one
    best, found = 0.0, None
    for i in range(len(logs)):
        for j in range(i, len(logs)):
            gain = sum(logs[i : j + 1]) - MARGIN * (j + 1 - i)
            if gain > best:
                best, found = gain, (i, j)
    if found is None:
        return NOWHERE
    i, j = found
    first = int(_crossing(steps, logs, i, i - 1)) + 1 if i else 1
    return first, int(_crossing(steps, logs, j, j + 1)) if j + 1 < len(logs) else _beyond(steps, torch, ours)


def _beyond(steps: Sequence[int], torch: Sequence[float], ours: Sequence[float]) -> int | None:
    """Where ours catches up beyond the longest length, if every further step takes what those before it took; None: nowhere.

    A single length tells nothing of others.
    """
    if len(steps) < 2:
        return steps[-1]
    theirs, own = ((times[-1] - times[-2]) / (steps[-1] - steps[-2]) for times in (torch, ours))
    if theirs <= (1 + MARGIN) * own:
        return None
    return int(steps[-1] + max(ours[-1] - torch[-1], 0.0) / (theirs - own))


def _crossing(steps: Sequence[int], logs: Sequence[float], inside: int, outside: int) -> float:
    """Between two lengths, where the ratio is 1; the outer one's very neighbor where it is not above 1 at both."""
    a, b = max(logs[inside], 0.0), max(-logs[outside], 0.0)
    share = a / (a + b) if a + b else 0.0
    return steps[inside] * (steps[outside] / steps[inside]) ** share


def edges(values: Iterable[int]) -> list[float]:
    """Between neighbors, their geometric mean."""
    ordered = sorted(set(values))
    return [round(math.sqrt(a * b), 1) for a, b in zip(ordered, ordered[1:], strict=False)]


def table(rows: Sequence[Row]) -> dict[str, Any]:
    """What `levels` of the file holds.

    Raises:
        ValueError: if a level lacks a point that its other points call for.
    """
    levels = {}
    for level in (name for name in LEVELS if any(row["level"] == name for row in rows)):
        own = [row for row in rows if row["level"] == level]
        batches, widths = (sorted({row[letter] for row in own}) for letter in ("B", "H"))
        at = {(_name(row), row["B"], row["H"]): row for row in own}
        names = list(dict.fromkeys(map(_name, own)))
        missing = [place for place in product(names, batches, widths) if place not in at]
        if missing:
            name, B, H = missing[0]
            raise ValueError(
                f"level {level} lacks {len(missing)} points, the first: {name} B={B} H={H}; measure again, it goes on"
            )
        found: dict[str, list[Interval]] = {name: [] for name in names}
        for name, B, H in product(names, batches, widths):
            found[name].append(interval(*(at[name, B, H][what] for what in ("steps", "torch", "ours"))))
        levels[level] = {"batches": edges(batches), "widths": edges(widths), "rows": found}
    return levels


def _name(row: Row) -> str:
    return row_name(row["cell"], row["dtype"], row["layout"], row["lanes"], row["mode"] == MODES[True])


def summary(rows: Sequence[Row]) -> list[tuple[str, str, float, float]]:
    """Level, kind of call, geometric mean and least of torch / ours over all lengths and sizes."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        kind = f"{row['cell']} {row['dtype']} {row['layout']} {row['mode']}"
        found.setdefault((row["level"], kind), []).extend(a / b for a, b in zip(row["torch"], row["ours"], strict=True))
    return [(*key, math.exp(sum(map(math.log, ratios)) / len(ratios)), min(ratios)) for key, ratios in found.items()]
