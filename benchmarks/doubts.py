"""What makes figures doubtful or firm: noise, disturbances of the machine, and the starts of the process behind them."""

from __future__ import annotations

import numpy as np

from . import environment
from .condition import OTHERS, THROTTLED
from .presentation import Cell, Section, Table, time_text
from .results import NOISY, Results, Row

NAMED = ["provider", "suite", "size", "median"]


def notes(results: Results) -> list[str]:
    """What makes the figures of a run doubtful or few."""
    given = results.options
    return [
        note
        for note in (
            environment.busy(results.environment),
            given.get("quick")
            and "A quick run: short sequences or few points, few repetitions. The run without --quick says more.",
            _noisy_rows(results),
            _disturbed_rows(results),
            _few_starts(results),
            given.get("interrupted") and "This run was interrupted: what follows is what had been measured by then.",
        )
        if note
    ]


def _noisy_rows(results: Results) -> str:
    timed, noisy = sum(bool(row.time) for row in results.rows), sum(row.noisy for row in results.rows)
    return f"{noisy} of {timed} rows are noisy: their times spread by more than {NOISY:.0%}. They are listed." if noisy else ""


def _disturbed_rows(results: Results) -> str:
    timed, disturbed = sum(bool(row.time) for row in results.rows), sum(bool(row.disturbed) for row in results.rows)
    if not disturbed:
        return ""
    return f"{disturbed} of {timed} rows were disturbed while they were timed: a busy or throttled machine. They are listed."


def _few_starts(results: Results) -> str:
    wanted, rows = results.options.get("starts") or 1, [row for row in results.rows if row.starts]
    few = sum(row.starts["count"] < wanted for row in rows if row.starts)
    return f"{few} of {len(rows)} headlines were measured in fewer than {wanted} processes. They are listed." if few else ""


def _named(row: Row) -> list[Cell | str]:
    return [
        row.provider,
        f"{row.suite}, {row.mode}",
        f"T={row.T} B={row.B} H={row.H}, {row.dtype}, threads {row.threads}",
        time_text(row.seconds),
    ]


def noise(results: Results) -> list[Section]:
    """The rows whose times spread far, the worst first, and those that something disturbed."""
    noisy = sorted((row for row in results.rows if row.noisy), key=lambda row: -row.spread)
    disturbed = [row for row in results.rows if row.disturbed]
    note = (
        f"More than {NOISY:.0%} of the median lies between the 20 and the 80 % quantile of the rounds, or between starts of the "
        "process: smaller differences say nothing."
    )
    spreads = [[*_named(row), Cell(f"{row.spread:.0%}", "bad")] for row in noisy]
    bounds = (
        f"Other programs used more than {OTHERS:.0%} of the CPU, or more than {THROTTLED:.0%} of the GPU's readings named a "
        "reason to slow down, also when the row was timed once more: its figures are no ground for a verdict."
    )
    causes = [[*_named(row), Cell(row.disturbed or "", "bad")] for row in disturbed]
    tables = [
        Table("Noisy rows", [*NAMED, "spread"], spreads, note, folded=True),
        Table("Disturbed rows", [*NAMED, "by"], causes, bounds, folded=True),
    ]
    return [Section("What was noisy", tables=[table for table in tables if table.rows])] if noisy or disturbed else []


def starts(results: Results) -> list[Section]:
    """The headlines by what each start of the process found."""
    rows = [(row, row.starts) for row in results.rows if row.starts and row.time]
    if not rows:
        return []
    lines: list[list[Cell | str]] = [
        [
            *_named(row),
            " ".join(time_text(seconds) for seconds in starts["medians"]),
            *_percent(starts["between"], starts["within"]),
            f"{row.ratio['median']:.2f}×" if row.ratio else "",
            " ".join(f"{ratio:.2f}" for ratio in starts["ratios"]),
            *_percent(starts["ratio_between"], starts["ratio_within"]),
            starts["missing"] or "",
        ]
        for row, starts in rows
    ]
    most = max(starts["count"] for _, starts in rows)
    apart = [starts["between"] for _, starts in rows if starts["between"] is not None]
    text = f"{len(apart)} rows were measured in up to {most} processes, one after another, each time checked against fp64 anew."
    if apart:
        text += f" Their medians lie {np.median(apart):.1%} apart at half of the rows and {max(apart):.1%} at most."
    note = (
        "Median: over starts, of each start's median over rounds. Between: from the lowest to the highest start; within: from "
        "the 20 to the 80 % quantile of a start's rounds, median over starts; both relative to the median. Speed-ups: of each "
        "start by itself, then the median over starts."
    )
    columns = [*NAMED, "each start", "between", "within", "speed-up", "each start", "between", "within", ""]
    return [Section("Starts of the process", [text], tables=[Table("Headlines by start", columns, lines, note, folded=True)])]


def _percent(*shares: float | None) -> list[Cell | str]:
    return ["" if share is None else f"{share:.1%}" for share in shares]
