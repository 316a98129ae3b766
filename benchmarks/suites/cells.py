"""Single cells against torch.nn: one step, forward and backward, and a rollout step by step, as in decoding."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from ..measure.case import Case, Options, Participant
from ..measure.results import Results, Row, reliable
from ..measure.timing import Effort
from ..providers.base import RECURRENT
from ..providers.cells import cuda_name, own_name, torch_name
from ..providers.onnx_runtime import layer_name
from ..report.model import (
    Card,
    Cell,
    Figure,
    Section,
    Table,
    heat_cell,
    ratio_cell,
    speed_tone,
    target_cell,
    time_cell,
    time_text,
)
from ..report.plots.strip import Strip, draw
from ..report.statistics import mean_of
from ..workloads.cells import CELLS, CellWorkload

NAME = "cells"
SUMMARY = "RNNCell, LSTMCell, GRUCell against torch.nn over batch and width: one step, its backward, a rollout step by step"

STEP, ROLLOUT = "step", "rollout"
STEPS = {STEP: 1, ROLLOUT: 64}
KINDS = {
    (STEP, "inference"): "one step, forward",
    (STEP, "training"): "one step, forward + backward",
    (ROLLOUT, "inference"): f"{STEPS[ROLLOUT]} steps, each output the next input, forward",
}
TARGET_CELL, TARGET_WIDTH, TARGET_BATCH = "LSTMCell", 512, 16  # on a GPU, one step forward, batches up to the last
TARGET = 2.0
LEAST = 0.9  # marked: a step that is so much slower than torch's
WIDTH_UNIT = 16  # of the figure: H that makes a point larger by one


def plan(options: Options) -> list[Case]:
    cuda = options.device.startswith("cuda")
    dtypes = ["bfloat16" if cuda and options.dtype == "float32" else options.dtype]
    if options.full and options.dtype not in dtypes:
        dtypes.append(options.dtype)
    threads = options.threads[-1] if options.threads else torch.get_num_threads()
    batches, widths = ((1, 16), (128, 512)) if options.quick else ((1, 4, 16, 64), (128, 256, 512, 1024))
    effort = Effort(seconds=0.1, max_rounds=15) if options.quick else Effort(seconds=0.25, max_rounds=60)
    cases = []
    for (group, mode), dtype, cell, B, H in product(KINDS, dtypes, CELLS, batches, widths):
        common: dict[str, Any] = {"threads": threads, "dtype": dtype, "device": options.device}
        w = CellWorkload(cell.lower(), STEPS[group], B, H, H, mode, **common)
        base, own, cuda_kernels = torch_name(cell), own_name(cell), cuda_name(cell)
        others = [cuda_kernels] + [layer_name(cell)] * (not cuda and (mode, dtype) == ("inference", "float32"))
        participants = tuple(Participant(name, w) for name in (base, own, *others))
        cases.append(Case(NAME, group, participants, effort, tuple((name, base) for name in (own, *others))))
    return cases


def cell_of(row: Row) -> str:
    return next(cell for cell in CELLS if cell.lower() == row.function)


def _own(rows: list[Row], group: str, mode: str, cell: str = "any") -> list[Row]:
    return [
        r
        for r in rows
        if r.provider == own_name(cell_of(r)) and (r.group, r.mode) == (group, mode) and cell in ("any", cell_of(r))
    ]


def derive(results: Results) -> dict[str, Any]:
    rows = results.of_suite(NAME)
    every = [r for group, mode in KINDS for r in _own(rows, group, mode)]
    means = []
    for (group, mode), cell in product(KINDS, CELLS):
        timed = [r for r in _own(rows, group, mode, cell) if r.ok and r.ratio]
        if timed:
            means.append({"group": group, "mode": mode, "cell": cell} | mean_of(timed))
    return {
        "target": _target(rows),
        "means": means,
        "losses": [_name(r) for r in every if r.ok and r.ratio and r.ratio["median"] < 1],
        "untimed": [{"point": _name(r), "reason": r.reason} for r in every if not r.ok],
    }


def _target(rows: list[Row]) -> dict[str, Any] | None:
    """The lowest of its points, which must all have a time; None on the CPU, which has no target."""
    if not rows[0].device.startswith("cuda"):
        return None
    points = [r for r in _own(rows, STEP, "inference", TARGET_CELL) if r.H == TARGET_WIDTH and r.B <= TARGET_BATCH]
    values = [r.ratio["median"] for r in points if r.ok and r.ratio]
    reached = bool(values) and len(values) == len(points) and min(values) >= TARGET
    found = {"least": TARGET, "found": min(values, default=None), "points": len(points), "reached": reached}
    return found | {"reliable": reliable(points)}


def _name(r: Row) -> str:
    return f"{cell_of(r)} {KINDS[r.group, r.mode]} B={r.B} H={r.H} {r.dtype}"


def present(results: Results) -> list[Section]:
    rows, derived = results.of_suite(NAME), derive(results)
    first = rows[0]
    where = f"{first.threads} threads" if first.device == "cpu" else "times by CUDA events with a cold L2"
    text = [
        f"Input width = hidden width, states given, {', '.join(dict.fromkeys(r.dtype for r in rows))}, {where}. Speed-up is "
        "torch.nn's median time over fastseq's, both measured in turn in the same process; above 1 fastseq is faster.",
        f"Rollout: {STEPS[ROLLOUT]} calls of the cell from Python, each with the state and the output of the last one.",
    ]
    tables = [_target_table(derived), *(_matrix(rows, *kind) for kind in KINDS), _losses(derived), _every_point(rows)]
    return [Section("Single cells against torch.nn", text, _cards(derived), [_figure(rows)], [t for t in tables if t.rows])]


def picture(results: Results) -> Figure:
    return _figure(results.of_suite(NAME))


def _figure(rows: list[Row]) -> Figure:
    panels = []
    for (group, mode), title in KINDS.items():
        strips = []
        for cell in CELLS:
            points = [r for r in _own(rows, group, mode, cell) if r.ok and r.ratio]
            strips.append(Strip(cell, RECURRENT[cell.removesuffix("Cell")], points))
        panels.append((title, strips))
    return Figure(
        "Speed-up over torch.nn's cells",
        "A point is one batch and width; its size grows with the width. The bar is the geometric mean. Left of 1× fastseq loses.",
        lambda canvas, theme: draw(canvas, theme, panels, width_unit=WIDTH_UNIT),
        (13.5, 2.6),
    )


def _cards(derived: dict[str, Any]) -> list[Card]:
    return [
        Card(f"{m['mean']:.2f}×", f"{m['cell']}, {KINDS[m['group'], m['mode']]}, {m['points']} points", speed_tone(m["mean"]))
        for m in derived["means"]
        if m["reliable"]
    ]


def _target_table(derived: dict[str, Any]) -> Table:
    body: list[list[Cell | str]] = []
    t = derived["target"]
    if t:
        what = f"{TARGET_CELL}, {KINDS[STEP, 'inference']}, B ≤ {TARGET_BATCH}, H = {TARGET_WIDTH}"
        measured = t["found"] is not None
        verdict = target_cell(t)
        body.append([what, str(t["points"]), f"{t['least']:g}×", f"{t['found']:.2f}×" if measured else "–", verdict])
    return Table("Target", ["", "points", "at least", "lowest", ""], body)


def _matrix(rows: list[Row], group: str, mode: str) -> Table:
    own = {(CELLS.index(cell_of(r)), r.dtype, r.B, r.H): r for r in _own(rows, group, mode)}
    widths = sorted({H for *_, H in own})
    body: list[list[Cell | str]] = []
    for line in sorted({key[:-1] for key in own}):
        cell, dtype, B = line
        body.append([CELLS[cell], dtype, str(B), *(heat_cell(own.get((*line, H)), least=LEAST) for H in widths)])
    return Table(f"Speed-up, {KINDS[group, mode]}", ["cell", "dtype", "B", *(f"H={H}" for H in widths)], body, heat=True)


def _losses(derived: dict[str, Any]) -> Table:
    body: list[list[Cell | str]] = [[point, ""] for point in derived["losses"]]
    body += [[u["point"], u["reason"] or ""] for u in derived["untimed"]]
    return Table(f"Points that fastseq loses: {len(body)}", ["point", ""], body)


def _every_point(rows: list[Row]) -> Table:
    """Times of a call and of a step; in a graph where there is a GPU."""
    cuda = rows[0].device.startswith("cuda")
    at = {(r.provider, r.group, r.mode, r.B, r.H, r.dtype): r for r in rows}
    body: list[list[Cell | str]] = []
    for r in (r for group, mode in KINDS for r in _own(rows, group, mode)):
        point = r.group, r.mode, r.B, r.H, r.dtype
        other, kernels = (at.get((name(cell_of(r)), *point)) for name in (torch_name, cuda_name))
        line: list[Cell | str] = [_name(r), time_cell(other), time_cell(r), ratio_cell(r)]
        if cuda:
            line += [time_cell(kernels), *(_graph(x) for x in (other, r, kernels)), *(_host(x) for x in (other, r, kernels))]
        roofline = (
            Cell(f"{r.of_roofline:.0%}", "", f"{r.roofline['bound']}: {r.roofline['note']}")
            if r.ok and r.roofline
            else Cell("–", "weak")
        )
        error = f"{r.check['error']:.1e}" if r.check and r.check["error"] is not None else "–"
        step = time_text(r.seconds / r.T)
        body.append([*line, step, roofline, error, ", ".join(r.chose), ", ".join(other.chose) if other else ""])
    graphs = []
    if cuda:
        graphs = ["(cuda)", "torch.nn in a graph", "fastseq in a graph", "(cuda) in a graph"]
        graphs += ["host time of torch.nn", "of fastseq", "of (cuda)"]
    columns = ["point", "torch.nn", "fastseq", "speed-up", *graphs, "fastseq per step", "of roofline", "error"]
    return Table(
        f"Every point: {len(body)}",
        [*columns, "fastseq ran", "torch.nn ran"],
        body,
        "Of roofline: the time that reading both weights, or computing with them, takes at the measured peaks, over the time."
        + " (cuda): fastseq on its CUDA kernels, whose launch is made for a whole sequence." * cuda,
        folded=True,
    )


def _graph(row: Row | None) -> Cell:
    return Cell(time_text(row.graph["median"])) if row and row.graph else Cell("–", "weak")


def _host(row: Row | None) -> Cell:
    return Cell(time_text(row.host["median"])) if row and row.host else Cell("–", "weak")
