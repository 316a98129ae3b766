"""The report: the terminal's tables, and one HTML page that needs nothing but itself."""

from __future__ import annotations

import re
from itertools import count
from pathlib import Path
from typing import Any

import jinja2
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from . import claim_figures, claims, doubts, floor_plot, heatmaps, own, plots, reproduce
from .doubts import notes
from .presentation import NARROW, Cell, Section, Table, bytes_text, time_text
from .results import Results
from .suites import DEFAULT, SUITES

TEMPLATES = Path(__file__).resolve().parent / "templates"
SHOWN_KIB = (64, 512, 3072, 65536)  # sizes of the reading bandwidth in the table
STYLES = {"good": "green", "best": "bold green", "bad": "red", "worst": "bold red", "weak": "dim"}


def sections(results: Results) -> list[Section]:
    """One for every suite, with its floors and maps, own providers, and the measured peaks."""
    found = []
    for name in results.suites():
        rows, of_suite = results.of_suite(name), SUITES[name].present(results)
        of_suite[0].figures += floor_plot.figures(rows) + heatmaps.figures(rows)
        found += of_suite
    return [*found, *own.present(results), *doubts.starts(results), *doubts.noise(results), _peaks(results)]


def derive(results: Results) -> dict[str, Any]:
    found = {name: SUITES[name].derive(results) for name in results.suites()}
    marked = {
        "noisy": [number for number, row in enumerate(results.rows) if row.noisy],
        "disturbed": [number for number, row in enumerate(results.rows) if row.disturbed],
    }
    return {"suites": found, "verdicts": [v.as_dict() for v in claims.verdicts(results)]} | marked


def page(results: Results) -> str:
    """The HTML page."""
    loader = jinja2.FileSystemLoader(TEMPLATES)
    templates = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    names = (f"figure-{n}" for n in count(1))
    return templates.get_template("report.html.j2").render(
        results=results,
        env=results.environment,
        sections=sections(results),
        svg=lambda figure: jinja2.utils.markupsafe.Markup(plots.svg(figure, name=next(names))),
        headline=SUITES[DEFAULT].picture(results) if DEFAULT in results.suites() else None,
        verdicts=claims.verdicts(results),
        claim_figures=claim_figures.figures,
        notes=notes(results),
        starts=max((row.starts["count"] for row in results.rows if row.starts), default=1),
        watched=any(row.condition for row in results.rows),
        wrong=[r for r in results.rows if r.status == "wrong"],
        as_cell=as_cell,
        sides=sides,
        narrow=NARROW,
        environment_rows=list(_flatten(results.environment)),
        commands=reproduce.commands(results),
    )


_NUMBER = re.compile(r"\d|T\^|–")


def sides(table: Table) -> list[str]:
    """Per column "left" or "right": numbers are set right, words left."""
    found = []
    for column in range(len(table.columns)):
        texts = [text for row in table.rows if (text := as_cell(row[column]).text)]
        words = sum(not _NUMBER.match(text) for text in texts)
        found.append("left" if column == 0 or 2 * words > len(texts) else "right")
    return found


def as_cell(value: Cell | str) -> Cell:
    return value if isinstance(value, Cell) else Cell(value)


def terminal(results: Results, console: Console) -> None:
    for section in sections(results):
        console.print()
        console.rule(Text(section.title, style="bold"), align="left")
        for table in section.tables:
            if not table.folded and table.rows:
                console.print()
                console.print(rich_table(table))
                if table.note:
                    console.print(Text(table.note, style="dim"))
    verdicts = claims.verdicts(results)
    if any(v.measured for v in verdicts):
        said = RichTable(
            title="What people say, and what was measured here",
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
        console.print(Text(f"{claims.NOT_MEASURED}, and the suites that measure it: {', '.join(missing)}", style="dim"))
    for row in results.rows:
        if row.status == "wrong":
            console.print(
                Text(
                    f"WRONG RESULT, not timed: {row.provider} {row.mode} T={row.T} B={row.B} H={row.H}: {row.reason}",
                    "bold red",
                )
            )
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


def _peaks(results: Results) -> Section:
    rows: list[list[Cell | str]] = []
    columns: list[str] = []
    for p in results.peaks:
        values = {
            "threads": str(p.threads),
            "dtype": p.dtype,
            "torch.mm": f"{p.gemm / 1e9:.0f} GFLOP/s",
            "multiply-adds": f"{p.fma / 1e9:.0f} GFLOP/s" if p.fma else "–",
            **{f"read {bytes_text(k << 10)}": f"{p.read[k] / 1e9:.0f} GB/s" for k in SHOWN_KIB if k in p.read},
            **{f"copy {bytes_text(k << 10)}": f"{v / 1e9:.0f} GB/s" for k, v in sorted(p.copy.items())},
            **{how: time_text(seconds) for how, seconds in p.launch.items()},
        }
        columns = list(values)
        rows.append(list(values.values()))
    note = (
        "Measured in this run; the floors follow from them. torch.mm: the best of a few square products. multiply-adds: in a "
        "CPU's registers alone; the faster of the two bounds arithmetic. "
        "read: one buffer again and again, each thread its share, as recurrent weights are at every step. "
        "copy: bytes read and written. operator: the shortest call of a torch operator. A program that beats "
        "this way of reading, or torch.mm where nothing else bounds arithmetic, is above 100 % of its floor."
    )
    return Section("What the machine can do", tables=[Table("Measured peaks", columns, rows, note)] if rows else [])


def _flatten(values: dict[str, Any], prefix: str = "") -> Any:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name} · ")
        elif value is not None:
            yield f"{prefix}{name}", str(value)
