"""The tables that the package ships, from results that are committed: who runs which call on devices that were measured.

    python -m fastseq.benchmarks.tables                      write fastseq/choice/tables/*.json from benchmarks/results
    python -m fastseq.benchmarks.tables measure DIR          tune this CPU, level by level of instructions, and keep it in DIR

`cpu-lengths.json` follows from the files choice.json (cpu/choice.py), `points.json` from the files tuned*.json: what `python -m
fastseq tune --export` writes, on a GPU as on a CPU. Of two files about one device and level the last in order of names holds.
`measured.json` follows from these and from the files results.json: of which ops, dtypes and devices there are times at all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastseq.backends import library
from fastseq.choice import lengths, shipped, store
from fastseq.choice.decision import MODES, Candidate, Point, point_of
from fastseq.choice.device import LEVELS, Device, cpu_level

from .cpu import choice
from .measure.results import Results, Row
from .workloads import attention
from .workloads.linear import WEIGHTS

RESULTS = Path(__file__).resolve().parent / "results"
# A CPU's call goes to torch's kernel if ours takes so much longer: what a measurement can tell from equal. A cell's training
# step, which is measured among other functions (`fastseq.tuning.problems`), goes there if ours is not faster.
MARGIN = 1.02
# us that a training call of our attention takes more among a model's other functions than in a loop over nothing else, where its
# Python stays in the caches: what whole steps of small transformers took more by it than by torch's kernel (30 to 50 a call, of
# two to eight sequences times heads of 13 to 24 steps), and what a loop over the calls took less. Torch's stays in C++.
AMONG_OTHERS = 45.0
SECONDS = 0.1  # for the rounds of a call
SUITES = "attention,cells"  # of layers cpu-lengths.json tells
CELLS = {"lstm": "lstm", "gru": "gru", "rnn": "rnn_tanh"}  # functions of workloads
SCORES, RETURNED, CACHE = "scores never materialized", "returned weights", "KV cache"  # of fastseq.support_matrix


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 2: bad arguments or files."""
    p = argparse.ArgumentParser(
        prog="python -m fastseq.benchmarks.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(dest="command")
    measure = commands.add_parser("measure", help="tune this CPU, level by level of instructions")
    measure.add_argument("folder", type=Path, metavar="DIR", help="gets a file tuned-LEVEL.json of each")
    measure.add_argument("--levels", metavar="NAME[,NAME...]", help="default: all that this CPU has, of " + ", ".join(LEVELS))
    measure.add_argument("--minutes", type=float, metavar="N", help="of each level at most (default: as long as it takes)")
    args = p.parse_args(argv)
    try:
        if args.command == "measure":
            return _measure(args.folder, args.levels, args.minutes)
        for file, text in texts(RESULTS).items():
            file.write_text(text)
    except (OSError, ValueError) as error:
        p.error(str(error))
    return 0


def texts(results: Path) -> dict[Path, str]:
    """The text of each table.

    Raises:
        ValueError: if a file of results holds something else.
    """
    return {
        lengths.FILE: choice.text_of(sorted(results.glob("*/choice.json"))),
        shipped.FILE: points_text(sorted(results.glob("*/tuned*.json"))),
        shipped.MEASURED: measured_text(results),
    }


def measured_text(results: Path) -> str:
    """Of ``measured.json``: type of device, op, what of it, call, dtype, and the names of devices with a time of fastseq's."""
    found: dict[tuple[str, ...], set[str]] = {}
    for file in sorted(results.rglob("results.json")):
        of_file = Results.load(file)
        name = str(of_file.environment["device name"])
        for row in of_file.rows:
            place = _place(row)
            if place:
                mode = MODES[row.mode != MODES[0]]
                found.setdefault((row.device.partition(":")[0], *place, mode, row.dtype), set()).add(name)
    for file in sorted(results.glob("*/choice.json")):
        of_choice = choice.read(file)
        for row in of_choice["rows"]:
            key = ("cpu", "recurrent", row["cell"], row["mode"], row["dtype"])
            found.setdefault(key, set()).add(of_choice["environment"]["device name"])
    for device in json.loads(points_text(sorted(results.glob("*/tuned*.json"))))["devices"]:
        for called in device["calls"]:
            op, mode, kind, dtype, *_ = called["kin"]
            ours = any(backend != "torch" for _, candidates in called["points"] for backend, *_ in candidates)
            what = {"attention": SCORES, "attention_decode": CACHE}.get(op, kind)
            if ours:
                found.setdefault((device["type"], op.removesuffix("_cell"), what, mode, dtype), set()).add(device["name"])
    lines = ",\n".join(json.dumps([*key, sorted(names)]) for key, names in sorted(found.items()))
    what = "of which calls there are times of fastseq's kernels: type of device, op, what of it, call, dtype, devices"
    return f'{{\n"what": {json.dumps(what)},\n"command": "python -m fastseq.benchmarks.tables",\n"calls": [\n{lines}\n]\n}}\n'


def _place(row: Row) -> tuple[str, str] | None:
    """The op and what of it a row is a time of; None: it is of none, or of nothing of fastseq's."""
    if "fastseq" not in row.provider or not row.ok or not row.time:
        return None
    function = row.function.removesuffix("cell")
    if function in CELLS:
        return "recurrent", CELLS[function]
    if function == "decode" or row.suite == "decode":
        return "attention_decode", CACHE
    if function == "weights":
        return "attention", RETURNED
    if function == "attention" or (function in attention.CASES and not attention.CASES[function].hashed):
        return "attention", SCORES
    return ("scan", "real") if function == "scan" or function in WEIGHTS else None


def points_text(files: Iterable[Path]) -> str:
    """Of ``points.json``, a call a line."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for file in files:
        try:
            entries = store.parsed(file.read_text(), "tuned")
        except ValueError as error:
            raise ValueError(f"{file} is no export of `fastseq tune`: {error}") from error
        for device, (date, points) in _by_device(entries).items():
            rows[(device.type, device.level) if device.type == "cpu" else (device.type, device.name)] = shipped.row_of(
                device, date, points
            )
    parts = []
    for _, row in sorted(rows.items()):
        calls = ",\n".join(json.dumps(call, separators=(",", ":")) for call in row.pop("calls"))
        parts.append(f'{json.dumps(row)[:-1]}, "calls": [\n{calls}\n]}}')
    what = "who runs which call, by device: times in us of the candidates, the best first, at measured sizes"
    return (
        f'{{\n"what": {json.dumps(what)},\n"command": "python -m fastseq.benchmarks.tables",\n"devices": [\n'
        + ",\n".join(parts)
        + "\n]}\n"
    )


def _by_device(entries: dict[str, Any]) -> dict[Device, tuple[str, dict[tuple[Any, ...], list[Point]]]]:
    found: dict[Device, tuple[str, dict[tuple[Any, ...], list[Point]]]] = {}
    for entry in entries.values():
        device = Device(**entry["device"])
        call, point = point_of(entry)
        if not point.candidates:
            continue
        date, points = found.get(device, ("", {}))
        margin = MARGIN if device.type == "cpu" and (call.op, call.mode) != ("recurrent_cell", MODES[True]) else 1.0
        more = AMONG_OTHERS if device.type == "cpu" and (call.op, call.mode) == ("attention", MODES[True]) else 0.0
        candidates = tuple(Candidate(c.backend, c.form, c.us) for c in _with_margin(point.candidates, margin, more))
        points.setdefault(call.kin, []).append(Point(point.sizes, candidates, ""))
        found[device] = max(date, point.date), points
    return found


def _with_margin(candidates: tuple[Candidate, ...], margin: float, more: float) -> tuple[Candidate, ...]:
    def time(candidate: Candidate) -> float:
        return (candidate.us or 0.0) * margin if candidate.backend == "torch" else (candidate.us or 0.0) + more

    return tuple(sorted(candidates, key=time))


def _measure(folder: Path, levels: str | None, minutes: float | None) -> int:
    if library.reason():
        raise ValueError(library.reason())
    here = LEVELS[: LEVELS.index(cpu_level()) + 1]
    names = levels.split(",") if levels else here
    wrong = [name for name in names if name not in here]
    if wrong:
        raise ValueError(f"--levels: {wrong[0]!r} is not one that this CPU has: {', '.join(here)}")
    folder.mkdir(parents=True, exist_ok=True)
    limit = [] if minutes is None else ["--minutes", str(minutes)]
    command = [sys.executable, "-m", "fastseq", "tune", "--device", "cpu"]
    quick = ["--suite", SUITES, "--quiet", "--seconds", str(SECONDS)]
    for level in names:
        with tempfile.TemporaryDirectory() as cache:
            alone = {"FASTSEQ_CPU_LEVEL": level, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "FASTSEQ_CACHE": cache}
            environment = os.environ | alone | choice.LOWERED[level]
            for more in ([*quick, *limit], ["--export", str(folder / f"tuned-{level}.json")]):
                done = subprocess.run([*command, *more], env=environment)
                if done.returncode:
                    return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
