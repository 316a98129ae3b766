"""The recurrent layers against torch.nn, over cell, batch, width and threads, padded and packed. On a GPU: recurrent_gpu.py."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch

from ..measure.case import Case, Options, Participant
from ..measure.environment import where
from ..measure.results import Results, Row, reliable
from ..measure.timing import Effort
from ..providers.base import RECURRENT
from ..providers.onnx_runtime import layer_name
from ..report.model import (
    Card,
    Cell,
    Figure,
    Section,
    Table,
    bytes_text,
    heat_cell,
    ratio_cell,
    speed_tone,
    target_cell,
    time_cell,
)
from ..report.plots.bars import Bar
from ..report.plots.strip import Strip, draw
from ..report.statistics import geometric_mean
from ..workloads.base import MODES, Workload
from . import recurrent_gpu, recurrent_gpu_report, recurrent_gpu_targets

NAME = "recurrent"
SUMMARY = "LSTM, GRU, RNN against torch.nn over batch, width and threads, on a GPU over precision and depth: padded and packed"

CELLS = tuple(RECURRENT)
T = 128
GROUPS = {
    "padded": "rows of equal length",
    "data": "rows of equal length, the input is data (a first layer: no gradient of the input)",
    "packed": "PackedSequence, lengths uniform in 1…T",
    "activations": "activations",
}
TITLES = {
    "padded": "input.requires_grad=True",
    "data": "input.requires_grad=False",
    "packed": "PackedSequence, lengths uniform in 1…T",
}
TIMED = ("padded", "data", "packed")  # groups compared with torch.nn
# The least that a release must reach over torch.nn: geometric means over B, H and threads ("any": and cells).
TARGETS = {
    ("padded", "inference", "LSTM"): 1.05,
    ("padded", "inference", "GRU"): 1.6,
    ("padded", "inference", "RNN"): 1.6,
    ("padded", "training", "LSTM"): 1.2,
    ("padded", "training", "GRU"): 1.8,
    ("padded", "training", "RNN"): 1.8,
    ("data", "training", "LSTM"): 1.2,
    ("data", "training", "GRU"): 1.8,
    ("data", "training", "RNN"): 1.8,
    ("packed", "inference", "any"): 1.3,
    ("packed", "training", "any"): 1.8,
}
LEAST = 0.9  # no single point below this


def plan(options: Options) -> list[Case]:
    if options.device.startswith("cuda"):
        return recurrent_gpu.plan(options)
    cores = torch.get_num_threads()
    threads = options.threads or ((cores,) if options.quick or cores == 1 else (1, min(2, cores)))
    batches, widths = ((1, 32), (64, 256)) if options.quick else ((1, 8, 32), (64, 128, 256, 512))
    effort = Effort(seconds=0.15, max_rounds=15) if options.quick else Effort(seconds=0.25, min_rounds=5, max_rounds=60)
    cases = []

    def add(group: str, cell: str, mode: str, B: int, H: int, n: int, providers: tuple[str, ...], baseline: str) -> None:
        w = Workload(
            cell.lower(),
            T,
            B,
            H,
            H,
            mode,
            packed=group == "packed",
            input_grad=group != "data",
            threads=n,
            dtype=options.dtype,
            device=options.device,
        )
        cases.append(
            Case(
                NAME,
                group,
                tuple(Participant(p, w) for p in providers),
                effort,
                tuple((p, baseline) for p in providers),
            )
        )

    for group, cell, B, H, mode, n in product(TIMED, CELLS, batches, widths, MODES, threads):
        if group == "data" and mode == "inference":
            continue
        onnx = (layer_name(cell),) if (group, mode, options.dtype) == ("padded", "inference", "float32") else ()
        add(group, cell, mode, B, H, n, (f"torch.nn.{cell}", f"fastseq.{cell}", *onnx), f"torch.nn.{cell}")
    for cell, B, H in product(CELLS, batches[-1:], widths[-2:]):
        saved = f"fastseq.{cell}"
        add(
            "activations",
            cell,
            "training",
            B,
            H,
            threads[-1],
            (f"torch.nn.{cell}", saved, f"{saved} (recompute)"),
            saved,
        )
    return cases


def cell_of(row: Row) -> str:
    return next(cell for cell in CELLS if cell.lower() == row.function)


def _points(rows: list[Row], group: str, mode: str, cell: str = "any", threads: int | None = None) -> list[Row]:
    """fastseq's rows."""
    return [
        r
        for r in rows
        if r.provider.startswith("fastseq.")
        and (r.group, r.mode) == (group, mode)
        and cell in ("any", cell_of(r))
        and threads in (None, r.threads)
    ]


def _mean(points: list[Row]) -> float:
    return geometric_mean([r.ratio["median"] for r in points if r.ok and r.ratio])


def _on_gpu(rows: list[Row]) -> bool:
    return rows[0].device.startswith("cuda")


def derive(results: Results) -> dict[str, Any]:
    rows = results.of_suite(NAME)
    if _on_gpu(rows):
        return recurrent_gpu_targets.derive(rows)
    means = []
    for (group, mode, cell), target in TARGETS.items():
        points = _points(rows, group, mode, cell)
        timed = [r for r in points if r.ok and r.ratio]
        value = _mean(timed)
        means.append(
            {
                "group": group,
                "mode": mode,
                "cell": cell,
                "points": len(timed),
                "untimed": len(points) - len(timed),
                "mean": value if timed else None,
                "target": target,
                "reliable": reliable(timed),
                "reached": bool(timed) and len(timed) == len(points) and value >= target,
                "threads": {str(n): _mean([r for r in timed if r.threads == n]) for n in sorted({r.threads for r in timed})},
            }
        )
    every = [r for r in rows if r.group != "activations" and r.ok and r.ratio and r.provider.startswith("fastseq.")]
    worst = min(every, key=_ratio, default=None)
    return {
        "means": means,
        "worst": None if worst is None or worst.ratio is None else {"point": _name(worst), "ratio": worst.ratio["median"]},
        "below least": [_name(r) for r in every if r.ratio and r.ratio["median"] < LEAST],
        "losses": [_name(r) for r in every if r.ratio and r.ratio["median"] < 1],
    }


def _ratio(r: Row) -> float:
    return r.ratio["median"] if r.ratio else 0.0


def _name(r: Row) -> str:
    return f"{r.group} {cell_of(r)} {r.mode} B={r.B} H={r.H} threads={r.threads}"


def present(results: Results) -> list[Section]:
    rows = results.of_suite(NAME)
    if _on_gpu(rows):
        return recurrent_gpu_report.present(rows)
    derived = derive(results)
    w = rows[0]
    text = [
        f"One layer, one direction, T={w.T}, input width = hidden width, {w.dtype}. Speed-up is torch.nn's "
        "median time over fastseq's, both measured in turn in the same process with the same thread count; "
        "above 1 fastseq is faster.",
        "Packed: PackedSequence in, PackedSequence out, on both sides, packing itself not timed.",
    ]
    sections = [Section("Recurrent layers against torch.nn", text, _cards(derived), _figures(rows), [_targets(derived)])]
    sections[0].tables += [t for group in TIMED for t in _matrices(rows, group)]
    activations = _activations(rows)
    if activations.rows:
        sections[0].tables.append(activations)
    others = {(r.function, r.B, r.H, r.threads): r for r in rows if r.provider.startswith("ONNX")}
    own = [r for r in _points(rows, "padded", "inference") if (r.function, r.B, r.H, r.threads) in others]
    onnx = over_onnx([(r, others[r.function, r.B, r.H, r.threads]) for r in own], _name)
    sections[0].tables += [table for table in (onnx,) if table.rows] + [_losses(rows), _every_point(rows)]
    return sections


def picture(results: Results) -> Figure:
    rows = results.of_suite(NAME)
    return recurrent_gpu_report.figure(rows) if _on_gpu(rows) else _figures(rows)[0]


def _targets(derived: dict[str, Any]) -> Table:
    body: list[list[Cell | str]] = []
    for m in derived["means"]:
        if not m["points"] and not m["untimed"]:
            continue
        verdict = target_cell(m | {"found": m["mean"]})
        by_threads = ", ".join(f"{v:.2f}× on {n}" for n, v in m["threads"].items())
        cells = "all cells" if m["cell"] == "any" else m["cell"]
        mean = "–" if m["mean"] is None else f"{m['mean']:.2f}×"
        untimed = f", {m['untimed']} without a time" if m["untimed"] else ""
        body.append(
            [
                m["group"],
                MODES[m["mode"]],
                cells,
                f"{m['points']}{untimed}",
                mean,
                by_threads,
                f"{m['target']}×",
                verdict,
            ]
        )
    worst = derived["worst"]
    if worst:
        verdict = Cell("reached", "good") if worst["ratio"] >= LEAST else Cell("not reached", "bad")
        body.append(["every point", "", worst["point"], "", f"{worst['ratio']:.2f}×", "", f"{LEAST}×", verdict])
    return Table(
        "Targets",
        ["", "mode", "cell", "points", "speed-up", "by threads", "target", ""],
        body,
        "Speed-up: geometric mean over batch, width and threads. Computed from the points below.",
    )


def _matrices(rows: list[Row], group: str) -> list[Table]:
    tables = []
    for mode, title in MODES.items():
        points = _points(rows, group, mode)
        widths = sorted({r.H for r in points})
        lines = sorted({(CELLS.index(cell_of(r)), r.threads, r.B) for r in points})
        at = {(CELLS.index(cell_of(r)), r.threads, r.B, r.H): r for r in points}
        body: list[list[Cell | str]] = [
            [CELLS[c], str(n), str(B), *(heat_cell(at.get((c, n, B, H)), least=LEAST) for H in widths)] for c, n, B in lines
        ]
        if body:
            tables.append(
                Table(
                    f"Speed-up, {GROUPS[group]}, {title}",
                    ["cell", "threads", "B", *(f"H={H}" for H in widths)],
                    body,
                    heat=True,
                )
            )
    return tables


def over_onnx(pairs: list[tuple[Row, Row]], name: Callable[[Row], str]) -> Table:
    """Of rows of fastseq and of ONNX Runtime, where fastseq does worst by comparison first."""
    timed = [(other.seconds / own.seconds, own, other) for own, other in pairs if own.ok and other.ok]
    body: list[list[Cell | str]] = [
        [name(own), time_cell(other), time_cell(own), Cell(f"{ratio:.2f}×", "good" if ratio >= 1 else "bad")]
        for ratio, own, other in sorted(timed, key=lambda found: found[0])
    ]
    absent = dict.fromkeys(other.reason for _, other in pairs if other.reason)
    body += [["ONNX Runtime", "", "", Cell(reason or "", "weak")] for reason in absent]
    return Table("Speed-up over ONNX Runtime", ["point", "ONNX Runtime", "fastseq", ""], body, folded=True)


def _activations(rows: list[Row]) -> Table:
    body: list[list[Cell | str]] = []
    for r in (r for r in rows if r.group == "activations"):
        ratio = Cell(ratio_cell(r).text if r.ratio and r.ratio["baseline"] != r.provider else "")
        memory = [bytes_text(r.kept if r.ok else None), bytes_text(r.memory if r.ok else None)]
        body.append([r.provider, str(r.B), str(r.H), str(r.threads), time_cell(r), ratio, *memory])
    return Table(
        "Activations saved or recomputed, forward + backward",
        ["", "B", "H", "threads", "time", "vs saved", "kept for backward", "peak of the step"],
        body,
        "(recompute): gate activations are not kept for the backward pass but computed again from inputs "
        "and states. Kept: what is alive between forward and backward, output included; a model's layers "
        "add up; the peak of one layer's step also holds what its backward needs at once.",
    )


def _losses(rows: list[Row]) -> Table:
    lost = [
        r
        for r in rows
        if r.provider.startswith("fastseq.") and r.group != "activations" and not (r.ok and r.ratio and r.ratio["median"] >= 1)
    ]
    lost.sort(key=_ratio)
    body: list[list[Cell | str]] = [[_name(r), ratio_cell(r), r.reason or _roofline(r)] for r in lost]
    return Table(f"Points that fastseq loses: {len(lost)}", ["point", "speed-up", ""], body, folded=not lost)


def _roofline(r: Row) -> str:
    return f"{r.of_roofline:.0%} of the roofline ({r.roofline['bound']}: {r.roofline['note']})" if r.roofline else ""


def _every_point(rows: list[Row]) -> Table:
    base = {(r.group, r.function, r.mode, r.B, r.H, r.threads): r for r in rows if r.provider.startswith("torch.")}
    body: list[list[Cell | str]] = []
    for r in (r for r in rows if r.provider.startswith("fastseq.") and r.group != "activations"):
        other = base.get((r.group, r.function, r.mode, r.B, r.H, r.threads))
        roofline: list[Cell | str] = ["–", "–", "–"]
        if r.roofline and other is not None:
            roofline = [
                Cell(r.roofline["bound"], "", r.roofline["note"]),
                f"{r.of_roofline:.0%}",
                f"{other.of_roofline:.0%}" if other.ok else "–",
            ]
        error = f"{r.check['error']:.1e}" if r.check and r.check["error"] is not None else "–"
        backend = next((c.removeprefix("backend: ") for c in r.chose if c.startswith("backend: ")), "–")
        spread = f"{r.ratio['low']:.2f}–{r.ratio['high']:.2f}" if r.ratio else "–"
        point: list[Cell | str] = [r.group, cell_of(r), MODES[r.mode], str(r.B), str(r.H), str(r.threads)]
        body.append(
            [*point, time_cell(other), time_cell(r), ratio_cell(r), spread, *roofline, error, backend],
        )
    sizes = ["", "cell", "mode", "B", "H", "threads"]
    figures = [
        "torch.nn",
        "fastseq",
        "speed-up",
        "20–80 %",
        "bound by",
        "of roofline",
        "torch of roofline",
        "error",
    ]
    columns = [*sizes, *figures, "backend"]
    return Table(
        f"Every point: {len(body)}",
        columns,
        body,
        folded=True,
        note="Bound by: which measured peak limits the point: weights (R streamed once per step from the "
        "cache that holds it) or arithmetic. Of roofline: the time that this limit allows over the measured "
        "time, for fastseq and for torch.nn.",
    )


def _cards(derived: dict[str, Any]) -> list[Card]:
    cards = []
    for m in derived["means"]:
        if m["mean"] is not None and m["reliable"]:
            cells = "all cells" if m["cell"] == "any" else m["cell"]
            kind = "inference" if m["mode"] == "inference" else "training step"
            cards.append(Card(f"{m['mean']:.2f}×", f"{cells}, {m['group']}, {kind}", speed_tone(m["mean"])))
    return cards


def _figures(rows: list[Row]) -> list[Figure]:
    return [
        Figure(
            "Speed-up over torch.nn, every point",
            "A point is one batch, width and thread count; its size grows with the width. The bar is the "
            "geometric mean, the triangle the target. Left of 1× fastseq loses.",
            lambda canvas, theme: draw(canvas, theme, _panels(rows)),
            (11.5, 4.2),
        )
    ]


def _panels(rows: list[Row]) -> list[tuple[str, list[Strip]]]:
    panels = []
    for mode, title in MODES.items():
        strips = []
        for group, cell in product(TIMED, CELLS):
            points = [r for r in _points(rows, group, mode, cell) if r.ok and r.ratio]
            target = TARGETS.get((group, mode, cell), TARGETS.get((group, mode, "any")))
            strips.append(Strip(f"{cell}, {group}", RECURRENT[cell], points, target))
        panels.append((f"{title}: speed-up over torch.nn", strips))
    return panels


def markdown(results: Results) -> list[str]:
    """For a README: where it was measured, and the geometric means of the speed-ups with their range."""
    environment = results.environment
    measured = [row for row in results.of_suite(NAME) if row.group in TIMED and row.ok]
    sizes = [
        f"{name} in {', '.join(map(str, values))}" if len(values) > 1 else f"{name}={values[0]}"
        for name in ("threads", "T", "B", "H")
        if (values := sorted({getattr(row, name) for row in measured}))
    ]
    lines = [
        f"Measured on {where(environment)}, torch {environment['versions']['torch']}, "
        f"{', '.join(dict.fromkeys(row.dtype for row in measured))}, {', '.join(sizes)}, providers interleaved in one run: "
        "fastseq's speed-up over torch.nn, geometric mean (lowest to highest point).",
        "",
        "| | LSTM | GRU | RNN |",
        "|---|---|---|---|",
    ]
    for group in TIMED:
        for mode, title in MODES.items():
            if group == "data" and mode == "inference":
                continue
            what = TITLES[group] if group != "padded" or mode == "training" else "rows of equal length"
            cells = [_summary([r for r in results.rows if _is(r, group, mode, cell)]) for cell in CELLS]
            lines.append(f"| {title}, {what} | {' | '.join(cells)} |")
    return [*lines, "", *remarks(results)]


def bars(results: Results) -> list[tuple[str, list[Bar]]]:
    """The same as bars, a group for each kind of call."""
    found = []
    for mode, group in product(reversed(MODES), ("packed", "padded")):
        rows = {cell: [row for row in results.rows if _is(row, group, mode, cell) and row.ok and row.ratio] for cell in CELLS}
        of_kind = [
            Bar(cell, RECURRENT[cell], [row.ratio["median"] for row in of if row.ratio]) for cell, of in rows.items() if of
        ]
        what = "PackedSequence" if group == "packed" else "rows of equal length"
        found.append((f"{'Training step' if mode == 'training' else 'Inference'}, {what}", of_kind))
    return [(title, of_kind) for title, of_kind in found if of_kind]


def remarks(results: Results) -> list[str]:
    """Below the table: where fastseq is slower, how far torch's own kernel gets, ONNX Runtime, how much of it was noisy."""
    rows = [row for row in results.of_suite(NAME) if row.ok and row.time]
    ours = [row for row in rows if row.ratio and row.provider.startswith("fastseq.") and row.group in TIMED]
    lost = sorted((row for row in ours if _speed(row) < 1), key=_speed)
    found = []
    if lost:
        worst = lost[0]
        told = f"{worst.provider}, {MODES[worst.mode]}, {'packed' if worst.packed else 'padded'}, B={worst.B}, H={worst.H}"
        found.append(
            f"Slower than torch.nn at {len(lost)} of {len(ours)} points, at {sum(_speed(row) < LEAST for row in lost)} of them "
            f"by more than a tenth; at worst {_speed(worst):.2f}× ({told})."
        )
    elif ours:
        found.append(f"Slower than torch.nn at none of {len(ours)} points.")
    large = [r for r in rows if (r.provider, r.group, r.H) == ("torch.nn.LSTM", "padded", 512) and r.B > 1 and r.roofline]
    if large:
        rates = [100 * row.of_roofline for row in large]
        found.append(
            f"At H = 512 and batches above one oneDNN, behind torch.nn.LSTM, runs at {min(rates):.0f} to {max(rates):.0f} % of "
            "the rate of a plain matrix product."
        )
    times = {(row.provider, row.mode, row.group, row.B, row.H, row.threads): row.seconds for row in rows}
    own = {layer_name(cell): f"fastseq.{cell}" for cell in CELLS}
    pairs = [times[key] / times[mine] for key in times if (mine := (own.get(key[0], ""), *key[1:])) in times]
    if pairs:
        found.append(
            f"ONNX Runtime, inference on rows of equal length, is slower than fastseq at {sum(pair > 1 for pair in pairs)} of "
            f"{len(pairs)} points, {min(pairs):.2f} to {max(pairs):.2f} times."
        )
    doubtful = sum(bool(row.noisy or row.contended) for row in results.rows)
    return [
        " ".join([*found, f"{doubtful} of the file's {len(results.rows)} rows were noisy or contended; they decide no verdict."])
    ]


def _speed(row: Row) -> float:
    assert row.ratio
    return float(row.ratio["median"])


def _is(row: Row, group: str, mode: str, cell: str) -> bool:
    return row.suite == NAME and (row.group, row.mode, row.provider) == (group, mode, f"fastseq.{cell}")


def _summary(rows: list[Row]) -> str:
    ratios = sorted(row.ratio["median"] for row in rows if row.ok and row.ratio)
    if not ratios or len(ratios) < len(rows):
        return "not measured"
    return f"{geometric_mean(ratios):.2f}× ({ratios[0]:.2f} to {ratios[-1]:.2f})"
