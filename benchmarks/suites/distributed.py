"""Sequences over several processes of this machine: time, bytes and memory of a rank, how much of the exchange is hidden."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from ..measure.case import Case, Options, Participant
from ..measure.ranks import ATTENTION, DELAY, PAUSE, RECURRENCE, SCAN, RanksWorkload
from ..measure.results import Results, Row
from ..measure.timing import Effort
from ..report.curves import Curves, Quantity, number, of_bytes, of_metric, time_tick
from ..report.model import Cell, Section, Table, bytes_text, time_text
from ..workloads.over_ranks import METHODS, ONE, PAIRS, TORCH, WAVES

NAME = "distributed"
SUMMARY = "attention, recurrence, scans over ranks that this machine starts, against one process; a model of 1,024 ranks"

SECONDS, BYTES, MEMORY, HIDDEN = "seconds", "bytes", "memory", "hidden"
KINDS: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {  # what a group's name begins with: its function, and who is in it
    "": (ATTENTION, {SECONDS: (ONE, *METHODS, TORCH), BYTES: METHODS, MEMORY: (ONE, *METHODS), HIDDEN: ("ring",)}),
    "recurrence ": (RECURRENCE, {SECONDS: (ONE, *WAVES), BYTES: tuple(WAVES), MEMORY: (ONE, *WAVES)}),
    "scan ": (SCAN, {SECONDS: (ONE, PAIRS), BYTES: (PAIRS,), MEMORY: (ONE, PAIRS)}),
}
LINEAR = 1.15  # times its share of one process, or what its method holds: the memory of a rank, by step
# Over the 8 tensors of q's size of one process, which are q, k, v, the output and their gradients: q, k, v, the output and its
# gradient once more, of own heads.
HOLD = {"all_to_all": 13 / 8}
BANDWIDTHS = (1e8, 1e9, 5e10)  # bytes in a second from rank to rank, given to the model
RANKS = (2, 8, 64, 256, 1024)  # of the model


def plan(options: Options) -> list[Case]:
    counts, rounds = ((2,), 3) if options.quick else ((2, 4), 7)
    sizes = {ATTENTION: (2048, 1, 256), RECURRENCE: (1024, 16, 128), SCAN: (2048, 4, 512)}  # T, B, H
    cases = []
    for ranks in counts:
        every = {}
        for function, (T, B, H) in sizes.items():
            w = RanksWorkload(function, T // 4 if options.quick else T, B, H, H, "training", device=options.device)
            every[function] = replace(w, ranks=ranks, rounds=rounds)
        together = tuple(w.shape for w in every.values())
        for begin, (function, groups) in KINDS.items():
            for what, names in groups.items():
                w = replace(every[function], what=what, beside=together)
                participants = tuple(Participant(name, w) for name in names)
                cases.append(Case(NAME, begin + what, participants, Effort(), check=False, timed=False))
    return cases


def _ranks(row: Row) -> int:
    return (row.detail or {})["ranks"]


OF = {"": "attention", "recurrence ": "LSTMs", "scan ": "scan"}
SAYS = {SECONDS: "forward and backward", BYTES: "both ways", MEMORY: "for each step", HIDDEN: "of a delay"}
SHOWN = {
    SECONDS: Quantity("Time", lambda r: r.metric["median"] if r.metric else math.nan, time_text, time_tick),
    BYTES: of_bytes("Sent by a rank", lambda r: r.metric["median"] if r.metric else None),
    MEMORY: of_bytes("Memory of a rank", lambda r: r.metric["median"] if r.metric else None),
    HIDDEN: of_metric("Hidden", number, 0),
}
CURVES = Curves(
    NAME,
    "Sequences over several processes",
    (
        "Forward and backward of one sequence on processes of this machine, a thread each, gloo between them: causal attention "
        "in zigzag parts, two LSTMs, a scan. Every program's results are first compared with fp64. Where processes outnumber "
        "free cores, times say nothing of a cluster: equal work, linear memory and hidden messages do.",
        "Bytes are those that the largest rank sent, counted, and equal in sum to the formula. Memory: what a step of the whole "
        "sequence adds to the peak of a rank, its inputs and gradients included, between T and 2 T. Hidden: of a delay "
        f"that every message of the ring is given, {1e3 * DELAY:.0f} ms, the share that a forward pass does not wait for, while "
        f"each of its blocks takes {1e3 * PAUSE:.0f} ms more than it does.",
    ),
    {begin + what: f"{OF[begin]}, {SAYS[what]}" for begin, (_, groups) in KINDS.items() for what in groups},
    {begin + what: (SHOWN[what],) for begin, (_, groups) in KINDS.items() for what in groups},
    x_label="n, ranks",
    x="n",
    at=_ranks,
    split=("threads", "dtype"),
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
    for begin, (_, groups) in KINDS.items():
        for ranks in sorted({_ranks(row) for row in rows}):
            one = _value(rows, begin + MEMORY, ONE, ranks)
            for name in groups[MEMORY]:
                own = _value(rows, begin + MEMORY, name, ranks)
                if one and own is not None and name != ONE:
                    found.append({"program": name, "ranks": ranks, "of its share": own / (one / ranks)})
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
        value, name = found["of its share"], found["program"]
        most = LINEAR * HOLD.get(name, 1)
        tone = "good" if value <= most else "bad"
        shares.append([found["program"], str(found["ranks"]), Cell(number(value), tone)])
    if shares:
        note = (
            f"A rank's peak over that of one process divided by the ranks, by step: at most {LINEAR} times what its method has "
            f"to hold, which is one, but of {' and '.join(HOLD)}: all steps of its heads as well."
        )
        sections[0].tables.insert(0, Table("Memory is linear", ["program", "ranks", "of its share"], shares, note))
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
