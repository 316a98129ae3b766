"""What documents show of the suite models: bars for each kind of model, what is slower afterwards, a table of every model."""

from __future__ import annotations

from ..measure.results import Results, Row
from ..providers.models import AFTER, OWN
from ..report.model import time_text
from ..report.plots.bars import Bar
from ..report.plots.heatmap import LOSS
from ..report.statistics import geometric_mean
from ..workloads.base import MODES
from ..workloads.models import MODELS
from . import models, stand_ins

RECURRENT, OF_TORCH, OF_TRANSFORMERS = "recurrent", "torch.nn attention", "Hugging Face"
KINDS = {RECURRENT: "#1e88e5", OF_TORCH: "#b97d00", OF_TRANSFORMERS: "#9467d6"}  # of models, and the colors of their bars
NAMED = 4  # models that are slower afterwards, of which a sentence names no more


def kind(row: Row) -> str:
    if row.provider == OWN:
        return OF_TRANSFORMERS
    return RECURRENT if row.group in ("lstm-lm", "stand-ins") else OF_TORCH


def afterwards(results: Results) -> list[Row]:
    """Rows of models on fastseq that have a speed-up."""
    rows = results.of_suite(models.NAME)
    return [row for row in rows if row.provider in (AFTER, OWN) and row.ok and row.ratio]


def bars(results: Results, dtype: str) -> list[tuple[str, list[Bar]]]:
    """A group for each mode, training first; a bar for each kind of model."""
    found = []
    for mode in reversed(MODES):
        of_mode = [row for row in afterwards(results) if (row.mode, row.dtype) == (mode, dtype)]
        of_kinds = {name: [row for row in of_mode if kind(row) == name] for name in KINDS}
        drawn = [
            Bar(f"{len({row.function for row in rows})} {name}", KINDS[name], [_speed(row) for row in rows])
            for name, rows in of_kinds.items()
            if rows
        ]
        if drawn:
            found.append((f"{'Training step' if mode == 'training' else 'Inference'}, whole models before and after", drawn))
    return found


def words(results: Results) -> str:
    """Geometric means with their range, and what is slower: how many of how many, the slowest by name."""
    rows = afterwards(results)
    lost = sorted((row for row in rows if _speed(row) < 1), key=_speed)
    means = []
    for mode, title in MODES.items():
        values = [_speed(row) for row in rows if row.mode == mode]
        if values:
            means.append(f"{title} {geometric_mean(values):.2f}× ({min(values):.2f} to {max(values):.2f})")
    told = [f"{len({row.function for row in rows})} whole models before and after: {', '.join(means)}."]
    if lost:
        beyond = sum(_speed(row) < stand_ins.LEAST for row in lost)
        worst = "; ".join(f"{name(row)}, {MODES[row.mode]} {_speed(row):.2f}×" for row in lost[:NAMED])
        told.append(
            f"Slower afterwards at {len(lost)} of {len(rows)} points, at {beyond} of them by more than "
            f"{1 - stand_ins.LEAST:.0%}: {worst}{f'; and {len(lost) - NAMED} more' if len(lost) > NAMED else ''}."
        )
    else:
        told.append(f"Slower afterwards at none of {len(rows)} points.")
    return " ".join([*told, f"{sum(row.doubtful for row in rows)} of these were noisy or contended."])


def name(row: Row) -> str:
    return f"{MODELS[row.function].title}, T={row.T}" if row.function in MODELS else row.function


def table(results: Results) -> list[str]:
    """Markdown: a line for each model, the time before and after for each mode."""
    columns = ["model", "built by", "sizes", *(MODES.values())]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    before = {(row.group, row.function, row.mode, row.T, row.provider): row for row in results.of_suite(models.NAME)}
    of_models: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in afterwards(results):
        told = ", ".join((f"B={row.B}", f"T={row.T}", f"width {row.H}", *([] if row.dtype == "float32" else [row.dtype])))
        of_models.setdefault((name(row), kind(row), told), {})[row.mode] = row
    order = list(KINDS)
    for (model, built, told), rows in sorted(of_models.items(), key=lambda item: order.index(item[0][1])):
        cells = []
        for mode in MODES:
            timed = rows.get(mode)
            if timed is None:
                cells.append("–")
                continue
            assert timed.ratio
            base = before[timed.group, timed.function, timed.mode, timed.T, timed.ratio["baseline"]]
            mark = (LOSS if _speed(timed) < 1 else "") + (" ~" if timed.doubtful or base.doubtful else "")
            cells.append(f"**{_speed(timed):.2f}×**{mark} {time_text(base.seconds)} → {time_text(timed.seconds)}")
        lines.append(f"| {' | '.join((model, built, told, *cells))} |")
    return lines


def _speed(row: Row) -> float:
    assert row.ratio
    return float(row.ratio["median"])
