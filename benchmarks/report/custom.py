"""Providers that no suite knows, whether they were added in this process or in that of the results."""

from __future__ import annotations

from ..measure.results import Results
from ..providers import custom
from ..providers.registry import EVERY_PROVIDER
from .model import Cell, Section, Table, bytes_text, ratio_cell, time_cell


def present(results: Results) -> list[Section]:
    """Every row of theirs."""
    body: list[list[Cell | str]] = []
    for r in results.rows:
        if r.provider in EVERY_PROVIDER and not custom.added(r.provider):
            continue
        sizes = f"{r.suite} {r.group} {r.mode} T={r.T} B={r.B} H={r.H} {r.dtype}"
        error = f"{r.check['error']:.1e}" if r.check and r.check["error"] is not None else "–"
        over = r.ratio["baseline"] if r.ratio else ""
        time = time_cell(r) if r.time or not r.ok else Cell("–", "weak")
        body.append([r.provider, sizes, time, ratio_cell(r), over, bytes_text(r.memory), error, r.reason or ""])
    columns = ["provider", "point", "time", "speed-up", "over", "peak", "error", ""]
    return [Section("Custom providers", tables=[Table(f"Every point: {len(body)}", columns, body)])] if body else []
