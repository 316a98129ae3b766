"""What makes figures doubtful or firm: noise, contention, and the processes behind them."""

from __future__ import annotations

import numpy as np

from ..measure import environment
from ..measure.contention import OTHERS, THROTTLED
from ..measure.results import NOISY, Results, Row
from .model import Cell, Section, Table, time_text

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
            _contended_rows(results),
            _few_restarts(results),
            given.get("interrupted") and "This run was interrupted: what follows is what had been measured by then.",
        )
        if note
    ]


def _noisy_rows(results: Results) -> str:
    timed, noisy = sum(bool(row.time) for row in results.rows), sum(row.noisy for row in results.rows)
    return f"{noisy} of {timed} rows are noisy: their times spread by more than {NOISY:.0%}. They are listed." if noisy else ""


def _contended_rows(results: Results) -> str:
    timed, contended = sum(bool(row.time) for row in results.rows), sum(bool(row.contended) for row in results.rows)
    if not contended:
        return ""
    return f"{contended} of {timed} rows were contended while they were timed: a busy or throttled machine. They are listed."


def _few_restarts(results: Results) -> str:
    wanted, rows = results.options.get("restarts") or 1, [row for row in results.rows if row.restarts]
    few = sum(row.restarts["count"] < wanted for row in rows if row.restarts)
    return f"{few} of {len(rows)} headlines were measured in fewer than {wanted} processes. They are listed." if few else ""


def _named(row: Row) -> list[Cell | str]:
    return [
        row.provider,
        f"{row.suite}, {row.mode}",
        f"T={row.T} B={row.B} H={row.H}, {row.dtype}, threads {row.threads}",
        time_text(row.seconds),
    ]


def noise(results: Results) -> list[Section]:
    """The rows whose times spread far, the worst first, and those that something contended."""
    noisy = sorted((row for row in results.rows if row.noisy), key=lambda row: -row.spread)
    contended = [row for row in results.rows if row.contended]
    note = (
        f"More than {NOISY:.0%} of the median lies between the 20 and the 80 % quantile of the rounds, or between "
        "processes: smaller differences say nothing."
    )
    spreads = [[*_named(row), Cell(f"{row.spread:.0%}", "bad")] for row in noisy]
    bounds = (
        f"Other programs used more than {OTHERS:.0%} of the CPU, or more than {THROTTLED:.0%} of the GPU's readings named a "
        "reason to slow down, also when the row was timed once more: its figures are no ground for a verdict."
    )
    causes = [[*_named(row), Cell(row.contended or "", "bad")] for row in contended]
    tables = [
        Table("Noisy rows", [*NAMED, "spread"], spreads, note, folded=True),
        Table("Contended rows", [*NAMED, "by"], causes, bounds, folded=True),
    ]
    return [Section("What was noisy", tables=[table for table in tables if table.rows])] if noisy or contended else []


def restarts(results: Results) -> list[Section]:
    """The headlines by what each start of the process found."""
    rows = [(row, row.restarts) for row in results.rows if row.restarts and row.time]
    if not rows:
        return []
    lines: list[list[Cell | str]] = [
        [
            *_named(row),
            " ".join(time_text(seconds) for seconds in restarts["medians"]),
            *_percent(restarts["between"], restarts["within"]),
            f"{row.ratio['median']:.2f}×" if row.ratio else "",
            " ".join(f"{ratio:.2f}" for ratio in restarts["ratios"]),
            *_percent(restarts["ratio_between"], restarts["ratio_within"]),
            restarts["missing"] or "",
        ]
        for row, restarts in rows
    ]
    most = max(restarts["count"] for _, restarts in rows)
    apart = [restarts["between"] for _, restarts in rows if restarts["between"] is not None]
    text = f"{len(apart)} rows were measured in up to {most} processes, one after another, each time checked against fp64 anew."
    if apart:
        text += f" Their medians lie {np.median(apart):.1%} apart at half of the rows and {max(apart):.1%} at most."
    note = (
        "Median: over processes, of each one's median over rounds. Between: from the lowest to the highest process; within: from "
        "the 20 to the 80 % quantile of a process's rounds, median over processes; both relative to the median. Speed-ups: of "
        "each process by itself, then the median over processes."
    )
    columns = [*NAMED, "each process", "between", "within", "speed-up", "each process", "between", "within", ""]
    return [Section("Process restarts", [text], tables=[Table("Headlines by process", columns, lines, note, folded=True)])]


def _percent(*shares: float | None) -> list[Cell | str]:
    return ["" if share is None else f"{share:.1%}" for share in shares]
