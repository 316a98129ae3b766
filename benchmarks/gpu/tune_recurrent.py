"""`python -m fastseq.benchmarks.gpu.tune_recurrent --out FILE`: which plan the CUDA kernels of the recurrence should take here.

A plan says how a call is cut for the device. The planner lists all that fit, ordered by a model of estimates. With a GPU
every candidate is checked against fp64 and timed: the kernel alone, on inputs that are projected already; a forward pass
keeps what a backward pass wants. A step's time is that of T steps less that of T/2, over the steps between: launch and loading
of weights drop out. Without a GPU the predictions are all there is, and it says so. FILE gets a JSON row for each candidate.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fastseq.backends import BACKENDS, library
from fastseq.backends.cuda import recurrent
from fastseq.backends.cuda.recurrent import Device

from ..workloads.clocks import CudaClock, GraphClock
from .recurrent_plans import DIRECTIONS, EXCHANGES, MODULES, WORKLOADS, Point, Target, candidates

MODELS = {
    "h200": Device(132, 227 << 10, 16, True),
    "h100": Device(132, 227 << 10, 16, True),
    "a100": Device(108, 163 << 10, 0, True),
    "rtx5090": Device(170, 99 << 10, 8, True),
}
COLUMNS = (
    "rank", "units", "CTAs", "parts", "batch tiles", "warps", "segments", "teams at once", "shared", "exchange", "predicted",
    "measured", "20 % to 80 %", "",
)  # fmt: skip
SHOWN = 10  # rows of a table, beside the model's choice and what fails
MOST_STATES = 2**31 - 1  # that the planner counts
LOG_WIDTH = 150
Row = dict[str, Any]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m fastseq.benchmarks.gpu.tune_recurrent",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON rows, one a line")
    for name, default, known in (
        ("cell", "lstm,gru", MODULES),
        ("precision", ",".join(WORKLOADS), WORKLOADS),
        ("direction", ",".join(DIRECTIONS), DIRECTIONS),
    ):
        words = f"of {', '.join(known)} (default: %(default)s)"
        p.add_argument(f"--{name}", default=default, metavar="NAME[,NAME...]", help=words)
    for name, default in (("hidden", "256,512,1024"), ("batch", "1,8,64"), ("lanes", "1,2")):
        p.add_argument(f"--{name}", default=default, metavar="N[,N...]", help="default: %(default)s")
    p.add_argument("--steps", type=int, default=256, metavar="T", help="default: %(default)s")
    p.add_argument("--candidates", type=int, metavar="N", help="the best by the model, for each combination (default: all)")
    p.add_argument("--device-model", choices=sorted(MODELS), help="only predict, for this device (without a GPU: h200)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 1: a plan fails or gives wrong results; 2: bad arguments, or no planner; 130: interrupted."""
    p = parser()
    args = p.parse_args(argv)
    try:
        points = _points(args)
        if args.candidates is not None and args.candidates < 1:
            raise ValueError(f"--candidates: {args.candidates} is not above 0")
        here = target(args.device_model)
        file = args.out.open("w")
    except (OSError, ValueError) as error:
        p.error(str(error))
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, LOG_WIDTH)
    if here.machine is None:
        console.print(f"No GPU is used: these are a model's predictions for {here.name}. Nothing is measured.", style="yellow")
    every: list[Row] = []
    with file:
        try:
            for point in points:
                console.print(f"\n{point}", style="bold")  # before it runs, for who looks where a kernel hangs
                rows = []
                for row in candidates(point, here, args.candidates):
                    rows.append(row)
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                every += rows
                _show(console, rows)
        except KeyboardInterrupt:
            console.print("interrupted", style="yellow")
            _summarize(console, every)
            return 130
    _summarize(console, every)
    return int(any("failed" in row for row in every))


def target(model: str | None) -> Target:
    """The GPU, or the model of a device where there is none or one is named.

    Raises:
        ValueError: if there is no library, or its kernels cannot run on the GPU.
    """
    if library.reason():
        raise ValueError(f"the planner is in the compiled library: {library.reason()}")
    if model or not torch.cuda.is_available():
        name = model or "h200"
        return Target(name, MODELS[name])
    obstacle = BACKENDS["cuda"].available()
    if obstacle:
        raise ValueError(f"backend cuda: {obstacle}")
    limits = recurrent.GPU.device(torch.device("cuda"))
    return Target(torch.cuda.get_device_name(), limits, recurrent.GPU, "cuda", "cuda", (GraphClock(), CudaClock()))


def _points(args: argparse.Namespace) -> list[Point]:
    cells, precisions = _known("--cell", args.cell, MODULES), _known("--precision", args.precision, WORKLOADS)
    directions = _known("--direction", args.direction, DIRECTIONS)
    hidden, batch = _numbers("--hidden", args.hidden), _numbers("--batch", args.batch)
    lanes = [int(n) for n in _known("--lanes", args.lanes, ("1", "2"))]
    if max(hidden) * max(batch) * max(lanes) > MOST_STATES:
        raise ValueError(f"--hidden, --batch, --lanes: their product may be {MOST_STATES} at most")
    if args.steps < 2:
        raise ValueError(f"--steps: {args.steps} has no half; it must be at least 2")
    grid = product(cells, precisions, hidden, batch, lanes, directions)
    return [Point(cell, precision, direction, args.steps, B, H, n) for cell, precision, H, B, n, direction in grid]


def _known(option: str, text: str, known: Iterable[str]) -> list[str]:
    names = text.split(",")
    wrong = [name for name in names if name not in known]
    if wrong:
        raise ValueError(f"{option}: {wrong[0]!r} is none of {', '.join(known)}")
    return names


def _numbers(option: str, text: str) -> list[int]:
    try:
        values = [int(n) for n in text.split(",")]
    except ValueError:
        values = [0]
    if min(values) < 1:
        raise ValueError(f"{option}: {text!r} is not a list of positive numbers")
    return values


def regret(rows: Iterable[Row]) -> float | None:
    """Of one call: how much longer a step takes on the model's choice than on the best measured plan, relative to that."""
    times = {row["rank"]: row["measured_us"] for row in _measured(rows)}
    return times[0] / min(times.values()) - 1 if 0 in times else None


def fits(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """By exchange: the median of measured over predicted, their correlation, and measured = offset + slope predicted."""
    found = {}
    measured_rows = _measured(rows)
    for exchange in EXCHANGES:
        pairs = [(row["predicted_us"], row["measured_us"]) for row in measured_rows if row["exchange"] == exchange]
        if not pairs:
            continue
        predicted, measured = np.asarray(pairs).T
        fit = found[exchange] = {"plans": len(pairs), "ratio": float(np.median(measured / predicted))}
        if len(pairs) > 2 and np.ptp(predicted) > 0 and np.ptp(measured) > 0:
            slope, offset = np.polyfit(predicted, measured, 1).tolist()
            fit |= {"correlation": float(np.corrcoef(predicted, measured)[0, 1]), "slope": slope, "offset": offset}
    return found


def _measured(rows: Iterable[Row]) -> list[Row]:
    """Those with a time; one that noise makes negative is none."""
    return [row for row in rows if (row.get("measured_us") or 0) > 0]


def _order(row: Row) -> tuple[bool, bool, float]:
    """What fails last, then what has no time, then by time."""
    timed = row["measured_us"] is not None
    return ("failed" in row, not timed, row["measured_us"] if timed else row["predicted_us"])


def _show(console: Console, rows: list[Row]) -> None:
    """The best first, by what was measured or else predicted; the model's choice wherever it is."""
    if "obstacle" in rows[0]:
        console.print(f"no plan: {rows[0]['obstacle']}")
        return
    table = Table(title=f"{len(rows)} of {rows[0]['of']} plans, microseconds of a step", title_justify="left", box=None)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for place, row in enumerate(sorted(rows, key=_order)):
        if place < SHOWN or not row["rank"] or "failed" in row:
            table.add_row(*_cells(row))
    console.print(table)
    found = regret(rows)
    if found is not None:
        best = min(_measured(rows), key=_order)
        console.print(f"the model's choice takes {found:.1%} longer than the best measured plan, that of rank {best['rank']}")


def _cells(row: Row) -> Iterator[str]:
    """Of COLUMNS."""
    yield from (str(row[name]) for name in ("rank", "units", "ctas", "parts", "batch_tiles"))
    yield f"{1 << row['m_bits']} x {row['k_warps']}"
    yield from (str(row[name]) for name in ("k_segments", "teams_at_once", "shared_bytes"))
    yield row["exchange"] + (", wide" if row["n_tiles"] > 1 else "")
    yield f"{row['predicted_us']:.2f}"
    timed = row["measured_us"] is not None
    yield f"{row['measured_us']:.2f}" if timed else "–"
    yield f"{row['low_us']:.2f} to {row['high_us']:.2f}" if timed else "–"
    yield row.get("failed", "")[:60] or ("" if row["rank"] else "the model's choice")


def _summarize(console: Console, rows: list[Row]) -> None:
    """The model as a whole; the last line says it in a sentence."""
    table = Table(title="\nThe model, by exchange", title_justify="left", box=None)
    for column in ("exchange", "plans", "measured / predicted, median", "correlation", "least squares, us"):
        table.add_column(column, justify="right")
    for exchange, fit in fits(rows).items():
        fitted = "slope" in fit
        line = f"{fit['offset']:.2f} + {fit['slope']:.2f} predicted" if fitted else "–"
        correlation = f"{fit['correlation']:.3f}" if fitted else "–"
        table.add_row(exchange, str(fit["plans"]), f"{fit['ratio']:.2f}", correlation, line)
    if table.row_count:
        console.print(table)
    console.print("; ".join(_words(rows)), soft_wrap=True)


def _words(rows: list[Row]) -> Iterator[str]:
    calls: dict[Point, list[Row]] = {}
    for row in rows:
        calls.setdefault(Point(*(row[name] for name in Point._fields)), []).append(row)
    yield f"{len(calls)} combinations, {sum('rank' in row for row in rows)} plans"
    regrets = {point: found for point, own in calls.items() if (found := regret(own)) is not None}
    if regrets:
        worst = max(regrets, key=regrets.__getitem__)
        middle = float(np.median(list(regrets.values())))
        yield f"the model's choice takes {middle:.1%} longer than the best measured plan in the median"
        yield f"{regrets[worst]:.1%} at most ({worst})"
    else:
        yield "nothing is measured"
    failed = sum("failed" in row for row in rows)
    if failed:
        yield f"{failed} plans failed"


if __name__ == "__main__":
    sys.exit(main())
