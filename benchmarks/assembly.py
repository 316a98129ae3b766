"""What a report of a run consists of: every suite's sections, the claims' verdicts, the quality of the data, the peaks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from . import suites
from .claims.table import verdicts
from .measure.results import Results, write_csv
from .providers.recurrent import FORCED
from .report import custom, html, peaks, quality, summary, terminal
from .report.model import Figure, Section
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
    results = shown(results)
    return html.page(title(results), results, sections(results), verdicts(results), _headline(results))


def picture(results: Results, path: Path) -> None:
    """The run in one picture, a PNG, to share."""
    results = shown(results)
    parts = sections(results)
    figure = next((figure for part in parts for figure in part.figures), None)
    summary.save(path, title(results), results, html.cards(parts), figure)


def write(results: Results, folder: Path) -> list[Path]:
    """All that a run leaves, in a folder that is there; the files."""
    page_file, picture_file, data, rows = files = [
        folder / name for name in ("report.html", html.PICTURE, "results.json", "rows.csv")
    ]
    results.save(data, **derive(results))
    write_csv(results.rows, rows)
    page_file.write_text(page(results), encoding="utf-8")
    picture(results, picture_file)
    return files


def title(results: Results) -> str:
    environment = results.environment
    device, cpus = environment.get("device name", "this device"), environment.get("cpu", {}).get("cpus")
    of = f" ({cpus} vCPU)" if cpus and environment.get("device") == "cpu" else ""
    what = "RNN vs attention" if suites.DEFAULT in results.suites() else "fastseq benchmarks"
    dtypes = list(dict.fromkeys(row.dtype for row in results.rows))
    return f"{what} on {device}{of}" + (f", {dtypes[0]}" if len(dtypes) == 1 else "")


def shown(results: Results) -> Results:
    """Without what the device cannot have: on a CPU, programs of fastseq that are forced onto kernels of GPUs."""
    if results.environment.get("device") != "cpu":
        return results
    gone = tuple(f"({backend})" for backend in FORCED)
    rows = [row for row in results.rows if row.status != "unavailable" or not row.provider.endswith(gone)]
    return replace(results, rows=rows)


def _headline(results: Results) -> Figure | None:
    return suites.SUITES[suites.DEFAULT].picture(results) if suites.DEFAULT in results.suites() else None


def figures(results: Results) -> str:
    """What a README says of a run, in Markdown."""
    return "\n".join(recurrent.markdown(results))


def show(results: Results, console: Console) -> None:
    results = shown(results)
    terminal.show(results, sections(results), verdicts(results), console)
