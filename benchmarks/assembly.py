"""What a report of a run consists of: every suite's sections, the claims' verdicts, the quality of the data, the peaks."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from . import suites
from .claims.table import verdicts
from .measure.results import Results
from .report import custom, html, peaks, quality, terminal
from .report.model import Section
from .suites import recurrent


def sections(results: Results) -> list[Section]:
    own = [*custom.present(results), *quality.restarts(results), *quality.noise(results), *peaks.present(results)]
    return [*suites.sections(results), *own]


def derive(results: Results) -> dict[str, Any]:
    """What follows from the rows, for readers of the file."""
    return {
        "suites": suites.derive(results),
        "verdicts": [verdict.as_dict() for verdict in verdicts(results)],
        "noisy": [number for number, row in enumerate(results.rows) if row.noisy],
        "contended": [number for number, row in enumerate(results.rows) if row.contended],
    }


def page(results: Results) -> str:
    environment = results.environment
    headline = suites.SUITES[suites.DEFAULT].picture(results) if suites.DEFAULT in results.suites() else None
    device, cpus = environment.get("device name", "this device"), environment.get("cpu", {}).get("cpus")
    of = f" ({cpus} vCPU)" if cpus and environment.get("device") == "cpu" else ""
    what = "RNN vs attention" if headline else "fastseq benchmarks"
    return html.page(f"{what} on {device}{of}", results, sections(results), verdicts(results), headline)


def figures(results: Results) -> str:
    """What a README says of a run, in Markdown."""
    return "\n".join(recurrent.markdown(results))


def show(results: Results, console: Console) -> None:
    terminal.show(results, sections(results), verdicts(results), console)
