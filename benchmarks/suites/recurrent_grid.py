"""The grid of LSTM, GRU and RNN on a CPU: no point of it may lose to torch.nn, and what fastseq claims over it is a gate each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from ..measure.case import Case, Options, Participant
from ..measure.results import Results, Row
from ..measure.timing import Effort
from ..providers.base import RECURRENT
from ..providers.cells import own_name, torch_name
from ..providers.onnx_runtime import layer_name
from ..providers.pack import pack_name
from ..report.model import Cell, Figure, Section, Table, heat_cell, time_cell
from ..report.plots.strip import Strip, draw
from ..workloads.base import MODES, Workload
from ..workloads.carried import CALLS, BesideWorkload, CarriedWorkload
from ..workloads.cells import CellWorkload
from . import gates
from .recurrent import over_onnx

NAME = "recurrent-grid"
SUMMARY = "LSTM, GRU, RNN on a CPU, every point: fp32 and bf16, padded and packed, one and two threads, steps with states carried"

T = 128
WIDE = 512  # units from which weights in bf16 are worth their rounding
PROMPT = 20e-6  # seconds that a packed step of 64 units may take
LEAST = 0.97  # of torch.nn's speed at every point: what a run can tell from being as fast
GROUPS = {
    "padded": "rows of equal length",
    "packed": "PackedSequence, lengths uniform in 1…T",
    "steps": f"{CALLS} calls of a layer, each from the states that the last one left",
    "cells": "calls of a cell, each from the state that the last one left",
    "beside": "two threads, alone and beside a busy program",
}
WHOLE = ("padded", "packed")
CARRIED = ("steps", "cells")


def plan(options: Options) -> list[Case]:
    quick, cores = options.quick, torch.get_num_threads()
    threads = options.threads or ((1,) if quick or cores == 1 else (1, 2))
    dtypes = ("float32", "bfloat16") if options.dtype == "float32" else (options.dtype,)
    effort = Effort(seconds=0.05, min_rounds=3, max_rounds=15) if quick else Effort(seconds=0.25, min_rounds=5, max_rounds=60)
    widths = (64, 256, 512) if quick else (64, 128, 256, 512)
    cases = []

    def add(group: str, cell: str, w: Workload) -> None:
        w = replace(w, device=options.device)
        kind = f"{cell}Cell" if group == "cells" else cell
        base, own, others = torch_name(kind), own_name(kind), []
        if (w.device, w.mode, w.packed) == ("cpu", "inference", False) and group != "beside":
            others += [layer_name(kind)] * (w.dtype == "float32")
            others += [pack_name(kind)] * (group in CARRIED)
            others += [pack_name(kind, "bfloat16")] * (group == "steps" and w.dtype == "float32" and w.H >= WIDE)
        participants = tuple(Participant(name, w) for name in (base, own, *others))
        cases.append(Case(NAME, group, participants, effort, tuple((name, base) for name in (own, *others))))

    for group, cell, dtype, B, H, mode, n in product(WHOLE, RECURRENT, dtypes, (1, 8, 32), widths, MODES, threads):
        if quick and group == "packed" and (B, H) != (32, 256):
            continue
        add(group, cell, Workload(cell.lower(), T, B, H, H, mode, packed=group == "packed", threads=n, dtype=dtype))
    lengths, modes = ((1, 16), ("inference",)) if quick else ((1, 4, 16), tuple(MODES))
    for cell, dtype, steps, B, H, mode in product(RECURRENT, dtypes, lengths, (1, 8), (64, 512), modes):
        add("steps", cell, CarriedWorkload(cell.lower(), steps, B, H, H, mode, threads=threads[0], dtype=dtype))
        add("cells", cell, CellWorkload(f"{cell.lower()}cell", steps, B, H, H, mode, threads=threads[0], dtype=dtype))
    if max(threads) > 1 and options.device == "cpu":
        for programs in (0, 1):
            add("beside", "LSTM", BesideWorkload("lstm", 16, 32, 256, 256, threads=max(threads), programs=programs))
    return cases


@dataclass(frozen=True)
class Gate(gates.Gate):
    """`packed`: rows after fastseq.pack, with weights in this dtype ("": their own)."""

    packed: str | None = None


def _lstm(dtype: str, mode: str, B: int = 0, H: int = 0) -> Callable[[Row], bool]:
    def counts(r: Row) -> bool:
        kind = r.group == "padded" and r.threads == 1 and (r.function, r.dtype, r.mode) == ("lstm", dtype, mode)
        return kind and B in (0, r.B) and H in (0, r.H)

    return counts


def _gru_and_rnn(r: Row) -> bool:
    return r.group == "padded" and r.threads == 1 and r.function in ("gru", "rnn")


def _whole(r: Row) -> bool:
    return r.group in WHOLE


def _carried(r: Row) -> bool:
    return r.group in CARRIED


def _prompt(r: Row) -> bool:
    return r.group == "steps" and (r.T, r.B, r.H, r.dtype) == (1, 1, 64, "float32")


def _inference(dtype: str, *limits: tuple[int, int, float, float]) -> list[Gate]:
    """Of LSTM, by batch and width (0: all)."""
    short = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
    return [
        Gate(f"{short} LSTM, inference, B={B}{f' H={H}' if H else ''}", must, goal, _lstm(dtype, "inference", B, H))
        for B, H, must, goal in limits
    ]


# One thread unless it says otherwise.
GATES = (
    *_inference("float32", (32, 64, 1.35, 1.9), (32, 256, 1.3, 1.5), (32, 512, 1.3, 1.5), (8, 0, 1.3, 1.5), (1, 0, 1.3, 1.5)),
    Gate("fp32 LSTM, training", 1.25, 1.5, _lstm("float32", "training"), mean=True),
    *_inference("bfloat16", (32, 64, 2.3, 2.5), (32, 256, 1.8, 2.1), (32, 512, 1.5, 1.8), (8, 0, 1.8, 3.0), (1, 0, 1.5, 2.2)),
    Gate("bf16 LSTM, training", 1.8, 2.5, _lstm("bfloat16", "training"), mean=True),
    Gate("GRU and RNN, both dtypes and modes", 2.0, 3.0, _gru_and_rnn, mean=True),
    Gate("every point, padded and packed, all threads", LEAST, 1.1, _whole),
    Gate("T = 1, 4, 16 with a state carried, layers and cells", 1.0, 1.3, _carried),
    Gate("the same after fastseq.pack, inference", 1.5, 3.0, _carried, packed=""),
    Gate("the same with bf16 weights, H = 512", 1.5, 5.0, _carried, packed="bfloat16"),
    Gate("a packed step, B=1 H=64, fp32", 1.0, 20 / 13, _prompt, over="20 µs", packed=""),
    Gate("every point that ONNX Runtime has", 1.0, 1.0, lambda r: _whole(r) or _carried(r), over="ONNX Runtime"),
    Gate("error against fp64, root mean square: torch's over ours", 1.0, 1.0, _whole, over=gates.ERROR),
)


def _is_own(r: Row, packed: str | None = None) -> bool:
    """Whether it is fastseq's as it comes, or after fastseq.pack with these weights."""
    _, _, layer = r.provider.partition("fastseq.")
    name, _, way = layer.partition(" (pack")
    return bool(name) and way == ("" if packed is None else f" {packed})" if packed else ")")


def _point_of(r: Row) -> tuple[Any, ...]:
    return r.group, r.function, r.mode, r.dtype, r.T, r.B, r.H, r.threads, str(r.detail)


def _others(rows: list[Row]) -> dict[tuple[Any, ...], Row]:
    """By package and point."""
    return {(r.provider.rpartition(" " if r.provider.startswith("ONNX") else ".")[0], *_point_of(r)): r for r in rows}


def value_of(own: Row, gate: Gate, others: dict[tuple[Any, ...], Row]) -> float | None:
    """What a gate asks of a row; None where that has no figure."""
    other = others.get(("ONNX Runtime" if gate.over == "ONNX Runtime" else "torch.nn", *_point_of(own)))
    if gate.over == "20 µs":
        return PROMPT * CALLS / own.seconds if own.ok and own.time else None
    if other is None or not (own.ok and other.ok):
        return None
    if gate.over == gates.ERROR:
        errors = [(r.check or {}).get("rms") for r in (other, own)]
        return errors[0] / errors[1] if errors[0] is not None and errors[1] else None
    if gate.over == "torch.nn":
        return own.ratio["median"] if own.ratio else None
    return other.seconds / own.seconds if other.time and own.time else None


def derive(results: Results) -> dict[str, Any]:
    rows = results.of_suite(NAME)
    own, others = [r for r in rows if _is_own(r)], _others(rows)
    every = [r for r in own if r.group != "beside" and r.ok and r.ratio]
    return {
        "gates": [_verdict(gate, [r for r in rows if _is_own(r, gate.packed)], others) for gate in GATES],
        "losses": [name_of(r) for r in sorted(every, key=_ratio) if _ratio(r) < LEAST],
        "untimed": [f"{name_of(r)}: {r.reason}" for r in own if not r.ok],
    }


def _verdict(gate: Gate, own: list[Row], others: dict[tuple[Any, ...], Row]) -> dict[str, Any]:
    counted = [r for r in own if gate.counts(r)]
    return gates.verdict(gate, counted, lambda r: value_of(r, gate, others), name_of, partial=gate.over == "ONNX Runtime")


def _ratio(r: Row) -> float:
    return r.ratio["median"] if r.ratio else 0.0


def name_of(r: Row) -> str:
    return f"{r.group} {r.provider.partition('.')[2]} {r.dtype} {r.mode} T={r.T} B={r.B} H={r.H} threads={r.threads}"


def present(results: Results) -> list[Section]:
    rows, derived = results.of_suite(NAME), derive(results)
    text = [
        f"One layer, one direction, input width = hidden width, T={T} unless it is said. Speed-up is torch.nn's median time over "
        "fastseq's, Python included, both measured in turn in one process; above 1 fastseq is faster. ONNX Runtime computes in "
        "fp32, reads and writes torch's tensors in place and has as many threads.",
    ]
    tables = [gates.table(derived["gates"])]
    tables += [_matrix(rows, group, mode) for group, mode in product(GROUPS, MODES) if group != "beside"]
    tables += [_onnx(rows), _beside(rows), _losses(derived)]
    cards = gates.cards(derived["gates"], "torch.nn")
    return [Section("The grid of recurrent layers", text, cards, [picture(results)], [t for t in tables if t.rows])]


def picture(results: Results) -> Figure:
    own = [r for r in results.of_suite(NAME) if _is_own(r) and r.ok and r.ratio and r.group != "beside"]
    panels = []
    for mode, title in MODES.items():
        strips = [
            Strip(
                f"{cell}, {group}, {dtype}",
                color,
                [r for r in own if (r.group, r.mode, r.dtype) == (group, mode, dtype) and _cell(r) == cell],
            )
            for group, (cell, color), dtype in product((*WHOLE, *CARRIED), RECURRENT.items(), dict.fromkeys(r.dtype for r in own))
        ]
        panels.append((title, [strip for strip in strips if any(r.group in strip.label for r in own)]))
    return Figure(
        "Speed-up over torch.nn, every point of the grid",
        "A point is one length, batch, width and thread count; its size grows with the width. The bar is the geometric mean.",
        lambda canvas, theme: draw(canvas, theme, panels),
        (13.5, 0.6 + 0.3 * max(len(strips) for _, strips in panels)),
    )


def _cell(r: Row) -> str:
    return next(cell for cell in RECURRENT if r.function.removesuffix("cell") == cell.lower())


def _matrix(rows: list[Row], group: str, mode: str) -> Table:
    own = [r for r in rows if _is_own(r) and (r.group, r.mode) == (group, mode)]
    at = {(_cell(r), r.dtype, r.threads, r.T, r.B, r.H): r for r in own}
    widths = sorted({r.H for r in own})
    body: list[list[Cell | str]] = []
    for line in dict.fromkeys(key[:-1] for key in at):
        body.append([*map(str, line), *(heat_cell(at.get((*line, H)), least=LEAST) for H in widths)])
    columns = ["cell", "dtype", "threads", "T", "B", *(f"H={H}" for H in widths)]
    return Table(f"Speed-up, {GROUPS[group]}, {MODES[mode]}", columns, body, heat=True)


def _onnx(rows: list[Row]) -> Table:
    others = _others(rows)
    pairs = [(r, others.get(("ONNX Runtime", *_point_of(r)))) for r in rows if _is_own(r)]
    return over_onnx([(own, other) for own, other in pairs if other], name_of)


def _beside(rows: list[Row]) -> Table:
    """Times with two threads, and what a program that computes beside them makes of these."""
    body: list[list[Cell | str]] = []
    own = [r for r in rows if r.group == "beside"]
    for provider in dict.fromkeys(r.provider for r in own):
        alone, beside = (
            next((r for r in own if r.provider == provider and (r.detail or {})["programs"] == n), None) for n in (0, 1)
        )
        if alone and beside:
            longer = f"{beside.seconds / alone.seconds:.1f}×" if alone.ok and beside.ok else "–"
            body.append([provider, time_cell(alone), time_cell(beside), longer])
    return Table(
        "LSTM with two threads, T=16 B=32 H=256",
        ["", "alone", "beside a program that computes without end", "takes"],
        body,
        "A barrier at every step waits for the thread that the other program has set aside.",
    )


def _losses(derived: dict[str, Any]) -> Table:
    body: list[list[Cell | str]] = [[point] for point in derived["losses"] + derived["untimed"]]
    return Table(f"Points below {LEAST:g}×, or without a time: {len(body)}", ["point"], body)
