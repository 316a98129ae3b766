"""What makes figures doubtful or firm: noise, contention, and the processes behind them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..measure import environment
from ..measure.contention import OTHERS, THROTTLED
from ..measure.results import DOUBTFUL, NOISY, Results, Row
from .model import Cell, Section, Table, time_text

PUBLISHED = 0.05  # of the times: with more of them doubtful a file makes no figure for a README
NAMED = ["provider", "suite", "size", "median"]


@dataclass(frozen=True)
class Status:
    """`tone`: "good", "part" or "bad"."""

    tone: str
    text: str


def status(results: Results) -> Status:
    """How far the figures of a run may be trusted, in a line."""
    timed = [row for row in results.rows if row.time]
    doubtful, contended, noisy = (sum(map(bool, of)) for of in zip(*map(_doubts, timed), strict=True)) if timed else (0, 0, 0)
    found = [f"{contended} of {len(timed)} times contended"] if contended else []
    found += [f"{noisy} of {len(timed)} noisy"] if noisy else []
    busy = environment.busy(results.environment)
    found += [busy] if busy else []
    words = "; ".join(found) or f"none of {len(timed)} times contended or noisy"
    if doubtful > DOUBTFUL * len(timed):
        return Status("bad", f"Low confidence: {words}")
    if busy or doubtful > PUBLISHED * len(timed) or results.options.get("quick"):
        quick = "a quick run; " if results.options.get("quick") else ""
        return Status("part", f"Medium confidence: {quick}{words}")
    return Status("good", f"Data quality is good: {words}")


def _doubts(row: Row) -> tuple[bool, bool, bool]:
    return row.doubtful, bool(row.contended), row.noisy


def refusal(results: Results) -> str:
    """Why no figure for a README may be made of a run; "": it may."""
    timed = [row for row in results.rows if row.time]
    doubtful = sum(row.doubtful for row in timed)
    if doubtful <= PUBLISHED * len(timed):
        return ""
    return (
        f"{doubtful} of {len(timed)} times ({doubtful / len(timed):.0%}) were contended or noisy, and a figure that is published "
        f"takes at most {PUBLISHED:.0%}; measure again on a quiet machine"
    )


def notes(results: Results) -> list[str]:
    """What else there is to say of the figures of a run."""
    given = results.options
    return [
        note
        for note in (
            given.get("quick")
            and "A quick run: short sequences or few points, few repetitions. The run without --quick says more.",
            _doubtful_rows(results),
            _few_restarts(results),
            given.get("interrupted") and "This run was interrupted: what follows is what had been measured by then.",
        )
        if note
    ]


def _doubtful_rows(results: Results) -> str:
    if not any(row.doubtful for row in results.rows):
        return ""
    return "Contended and noisy times are listed under Data quality; no verdict, crossover or headline is taken from them."


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
    return [Section("Data quality", tables=[table for table in tables if table.rows])] if noisy or contended else []


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
