"""Attention over several processes of this machine: time, bytes and memory of a rank, how much of the exchange is hidden."""

from __future__ import annotations

import math
from typing import Any

from ..measure.case import Case, Options, Participant
from ..measure.ranks import DELAY, METHODS, ONE, PAUSE, TORCH, RanksWorkload
from ..measure.results import Results, Row
from ..measure.timing import Effort
from ..providers.ranks import FUNCTION
from ..report.curves import Curves, Quantity, number, of_bytes, of_metric, time_tick
from ..report.model import Cell, Section, Table, bytes_text, time_text

NAME = "distributed"
SUMMARY = "attention over ranks that this machine starts: ring, all_gather, all_to_all, one process; a model of 1,024 ranks"

SECONDS, BYTES, MEMORY, HIDDEN = "seconds", "bytes", "memory", "hidden"
WHO = {SECONDS: (ONE, *METHODS, TORCH), BYTES: METHODS, MEMORY: (ONE, *METHODS), HIDDEN: ("ring",)}
LINEAR = 1.15  # times its share of one process: the memory of a rank in a ring, by step
BANDWIDTHS = (1e8, 1e9, 5e10)  # bytes in a second from rank to rank, given to the model
RANKS = (2, 8, 64, 256, 1024)  # of the model


def plan(options: Options) -> list[Case]:
    counts, T, rounds = ((2,), 512, 3) if options.quick else ((2, 4), 2048, 7)
    cases = []
    for ranks in counts:
        for what, names in WHO.items():
            w = RanksWorkload(FUNCTION, T, 1, 256, 256, "training", device=options.device, ranks=ranks, rounds=rounds, what=what)
            participants = tuple(Participant(name, w) for name in names)
            cases.append(Case(NAME, what, participants, Effort(), check=False, timed=False))
    return cases


def _ranks(row: Row) -> int:
    return (row.detail or {})["ranks"]


CURVES = Curves(
    NAME,
    "Sequences over several processes",
    (
        "Causal attention, forward and backward, of one sequence in zigzag parts on processes of this machine, a thread each, "
        "gloo between them. Every program's results are first compared with fp64. Where processes outnumber free cores, times "
        "say nothing of a cluster: equal work, linear memory and hidden messages do.",
        "Bytes are those that the largest rank sent, counted, and equal in sum to the formula. Memory: what a step of the whole "
        "sequence adds to the peak of a rank, its inputs and gradients included, between T and 2 T. Hidden: of a delay "
        f"that every message of the ring is given, {1e3 * DELAY:.0f} ms, the share that a forward pass does not wait for, while "
        f"each of its blocks takes {1e3 * PAUSE:.0f} ms more than it does.",
    ),
    {SECONDS: "time of a call", BYTES: "bytes that a rank sends", MEMORY: "memory of a rank", HIDDEN: "delay that is hidden"},
    {
        SECONDS: (Quantity("Time", lambda r: r.metric["median"] if r.metric else math.nan, time_text, time_tick),),
        BYTES: (of_bytes("Sent", lambda r: r.metric["median"] if r.metric else None),),
        MEMORY: (of_bytes("For each step", lambda r: r.metric["median"] if r.metric else None),),
        HIDDEN: (of_metric("Hidden", number, 0),),
    },
    x_label="n, ranks",
    x="n",
    at=_ranks,
)
picture = CURVES.picture


def _value(rows: list[Row], group: str, provider: str, ranks: int) -> float | None:
    for row in rows:
        if row.group == group and row.provider == provider and _ranks(row) == ranks and row.ok and row.metric:
            return row.metric["median"]
    return None


def memory(rows: list[Row]) -> list[dict[str, Any]]:
    """A rank's memory by step, over its share of that of one process."""
    found = []
    for ranks in sorted({_ranks(row) for row in rows}):
        one = _value(rows, MEMORY, ONE, ranks)
        for name in METHODS:
            own = _value(rows, MEMORY, name, ranks)
            if one and own is not None:
                found.append({"method": name, "ranks": ranks, "of its share": own / (one / ranks)})
    return found


def model(rows: list[Row]) -> dict[str, Any]:
    """Not measured: what a ring would take if every rank held as many steps as here.

    A block, what a rank computes in a hop, takes the time of one process here divided by the number of blocks, n^2. A hop takes
    as long as the slower of a block and its messages, those of forward and backward together.
    """
    ranks = max((_ranks(row) for row in rows), default=0)
    first = next((row for row in rows if row.group == SECONDS and _ranks(row) == ranks), None)
    one = _value(rows, SECONDS, ONE, ranks)
    if first is None or first.detail is None or one is None:
        return {}
    steps, block = first.T // ranks, one / ranks**2
    message = 3 * steps * 2 * first.detail["kv_heads"] * first.detail["E"] * 4
    lines = []
    for n in RANKS:
        times = [block + (n - 1) * max(block, message / rate) for rate in BANDWIDTHS]
        lines.append({"ranks": n, "steps": steps * n, "seconds": times, "busy": [n * block / t for t in times]})
    return {"block": block, "message": message, "enough": message / block, "lines": lines}


def derive(results: Results) -> dict[str, Any]:
    rows = results.of_suite(NAME)
    return CURVES.derive(results) | {"memory": memory(rows), "model": model(rows)}


def present(results: Results) -> list[Section]:
    sections, rows = CURVES.present(results), results.of_suite(NAME)
    shares: list[list[Cell | str]] = []
    for found in memory(rows):
        value = found["of its share"]
        tone = "" if found["method"] != "ring" else "good" if value <= LINEAR else "bad"
        shares.append([found["method"], str(found["ranks"]), Cell(number(value), tone)])
    if shares:
        note = f"A rank's peak over that of one process divided by the ranks, by step. The ring must stay within {LINEAR}."
        sections[0].tables.insert(0, Table("Memory is linear", ["method", "ranks", "of its share"], shares, note))
    far = model(rows)
    if far:
        lines: list[list[Cell | str]] = [
            [f"{n['ranks']:,}", f"{n['steps']:,}", time_text(n["seconds"][-1]), *(f"{busy:.0%}" for busy in n["busy"])]
            for n in far["lines"]
        ]
        note = (
            f"A model, not a measurement: a block takes {time_text(far['block'])}, as here, a hop the slower of that and "
            f"its {bytes_text(far['message'])}, for which {far['enough'] / 1e9:.3g} GB/s are enough. Percent: the share of its "
            "time in which a rank computes."
        )
        columns = ["ranks", "T", f"time at {BANDWIDTHS[-1] / 1e9:g} GB/s", *(f"{rate / 1e9:g} GB/s" for rate in BANDWIDTHS)]
        sections[0].tables.append(Table("Model: the ring on more ranks", columns, lines, note))
    return sections
