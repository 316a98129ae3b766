"""The report in a terminal: its tables that are not folded, the verdicts, and what makes them doubtful."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from ..measure.results import Results
from .findings import NOT_MEASURED, Verdict
from .model import Section, Table, as_cell, sides
from .quality import notes, status

STYLES = {"good": "green", "best": "bold green", "bad": "red", "worst": "bold red", "weak": "dim", "part": "yellow"}


def show(results: Results, sections: Sequence[Section], verdicts: Sequence[Verdict], console: Console) -> None:
    for section in sections:
        shown = [table for table in section.tables if not table.folded and table.rows]
        if shown:
            console.print()
            console.rule(Text(section.title, style="bold"), align="left")
        for table in shown:
            console.print()
            console.print(rich_table(table))
            if table.note:
                console.print(Text(table.note, style="dim"))
    if any(v.measured for v in verdicts):
        said = RichTable(
            title="Claims",
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            show_lines=True,
        )
        for column in ("statement", "verdict", "where", "figures"):
            said.add_column(column)
        for v in verdicts:
            if v.measured:
                said.add_row(v.statement, v.verdict, v.where, "; ".join(text for text in (v.figures, v.crossovers) if text))
        console.print()
        console.print(said)
    missing = [f"{v.claim} ({', '.join(v.missing)})" if v.missing else v.claim for v in verdicts if not v.measured]
    if missing:
        console.print(Text(f"{NOT_MEASURED}, and the suites that measure it: {', '.join(missing)}", style="dim"))
    for row in results.rows:
        if row.status == "wrong":
            console.print(
                Text(
                    f"WRONG RESULT, not timed: {row.provider} {row.mode} T={row.T} B={row.B} H={row.H}: {row.reason}",
                    "bold red",
                )
            )
    quality = status(results)
    console.print(Text(quality.text, style=STYLES[quality.tone]))
    for note in notes(results):
        console.print(Text(note, style="yellow"))


def rich_table(table: Table) -> RichTable:
    out = RichTable(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, (column, side) in enumerate(zip(table.columns, sides(table), strict=True)):
        out.add_column(column, justify="left" if side == "left" else "right", overflow="fold", no_wrap=i == 0)
    for row in table.rows:
        cells = [as_cell(value) for value in row]
        out.add_row(*(Text(cell.text, style=STYLES.get(cell.tone, "")) for cell in cells))
    return out
