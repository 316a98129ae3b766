"""Which calls of LSTM, GRU and RNN go to torch's kernels on a CPU: measured, and written as the table that the package reads.

    python -m fastseq.benchmarks.cpu.choice measure benchmarks/results/<device>/choice.json
    python -m fastseq.benchmarks.tables

`measure` times torch's layer and ours, one thread, Python included, in turn: the least CPU time of the thread over rounds, which
neither other programs nor a clock that comes and goes move much. Every level of instructions has a process of its own, with
torch's libraries lowered to it. A run that is ended goes on where it was, unless the commit is another. `tables` writes
`fastseq/choice/tables/cpu-lengths.json` from all committed results (see steps.py), `table` from some; a level is taken from the
last one that has it.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq
from fastseq.backends import library
from fastseq.choice import lengths
from fastseq.choice.decision import MODES
from fastseq.choice.device import LEVELS

from ..measure import environment
from . import steps
from .steps import Row

SCHEMA, VERSION = "fastseq-choice", 1
CELLS: dict[str, Callable[..., nn.Module]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN}
LAYOUTS = ("padded", "packed")
# What lowers torch's own kernels, oneDNN's and MKL's to a level.
LOWERED = {
    "amx": {},
    "avx512_bf16": {
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "ATEN_CPU_CAPABILITY": "avx512", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "default": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}
LONGEST = 0.15  # seconds that a call may take: a length at which it would take longer is left out
NEAR = 1.2  # times torch's time at the last length: ours that is as near may be the faster one at a later length
LATEST = 0.6  # seconds of a call at that
LONG = 0.02  # seconds of a call that does not notice what the other has left in the caches
AGREE = 0.03  # to which the least times of both halves of the rounds agree, or there are more rounds


class Grid(NamedTuple):
    batches: tuple[int, ...]
    widths: tuple[int, ...]
    lengths: tuple[int, ...]
    later: int  # a length more, at which what training saves is beyond the caches
    dtypes: tuple[str, ...]
    lanes: tuple[int, ...]
    seconds: float  # for both programs at one length


FULL = Grid((1, 8, 32), (64, 128, 256, 512), (1, 4, 16, 64), 256, ("float32", "bfloat16", "float16"), (1, 2), 0.01)
QUICK = Grid((1, 32), (64, 256), (1, 4, 16, 64), 256, ("float32", "bfloat16", "float16"), (1, 2), 0.005)


class Point(NamedTuple):
    """A kind of call, of which every length is measured."""

    cell: str
    dtype: str
    lanes: int
    H: int
    layout: str
    mode: str
    B: int


def points(grid: Grid) -> Iterator[Point]:
    for cell, dtype, lanes, H, layout, mode, B in product(
        CELLS, grid.dtypes, grid.lanes, grid.widths, LAYOUTS, MODES, grid.batches
    ):
        yield Point(cell, dtype, lanes, H, layout, mode, B)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m fastseq.benchmarks.cpu.choice", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("measure", help="time torch's layers and ours")
    measure.add_argument("file", type=Path, metavar="FILE", help="the results, which are added to")
    measure.add_argument("--levels", metavar="NAME[,NAME...]", help="default: all that this CPU has, of " + ", ".join(LEVELS))
    measure.add_argument("--quick", action="store_true", help="fewer sizes and lengths")
    measure.add_argument("--minutes", type=float, metavar="N", help="of each level at most (default: as long as it takes)")
    measure.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # the process of a level
    table = commands.add_parser("table", help="write the table that follows from results")
    table.add_argument("files", type=Path, nargs="+", metavar="FILE", help="results")
    table.add_argument("--out", type=Path, metavar="FILE", default=lengths.FILE, help="the table (default: the package's)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 2: bad arguments or files; 130: interrupted, what was measured is written."""
    p = parser()
    args = p.parse_args(argv)
    try:
        if args.command == "table":
            args.out.write_text(text_of(args.files))
            return 0
        if library.reason():
            raise ValueError(library.reason())
        if args.minutes is not None and args.minutes <= 0:
            raise ValueError(f"--minutes: {args.minutes} is not above 0")
        levels = _levels(args.levels)
        load(args.file)
    except (OSError, ValueError) as error:
        p.error(str(error))
    grid = QUICK if args.quick else FULL
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else math.inf
    if args.here:
        _measure_here(args.file, levels[0], grid, deadline)
        return 0
    given = ["--quick"] * args.quick + (["--minutes", str(args.minutes)] if args.minutes else [])
    try:
        for level in levels:
            command = [
                sys.executable,
                "-m",
                "fastseq.benchmarks.cpu.choice",
                "measure",
                str(args.file),
                "--here",
                "--levels",
                level,
            ]
            alone = {"FASTSEQ_CPU_LEVEL": level, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            done = subprocess.run([*command, *given, "--levels", level], env=os.environ | alone | LOWERED[level])
            if done.returncode:
                return done.returncode
    except KeyboardInterrupt:
        return 130
    _show(load(args.file)["rows"])
    return 0


def _levels(text: str | None) -> list[str]:
    """In the order of LEVELS, the highest first."""
    here = LEVELS[: LEVELS.index(torch.ops.fastseq_native.cpu_level()) + 1]
    names = text.split(",") if text else list(here)
    wrong = [name for name in names if name not in here]
    if wrong:
        raise ValueError(f"--levels: {wrong[0]!r} is not one that this CPU has: {', '.join(here)}")
    return sorted(names, key=LEVELS.index, reverse=True)


def load(path: Path) -> dict[str, Any]:
    """The results in a file; those of none if there is no file.

    Raises:
        ValueError: if it holds something else, or was measured on another device or with other programs.
    """
    now = environment.collect("cpu")
    env: dict[str, Any] = {key: now[key] for key in ("time", "device name", "cpu", "system", "versions", "git") if key in now}
    if not path.is_file():
        return {"schema": SCHEMA, "version": VERSION, "environment": env, "rows": []}
    found = read(path)
    differing = environment.differences(found["environment"], env, ("device name", "versions", "git"))
    if differing:
        raise ValueError(f"{path} was measured otherwise: {'; '.join(differing)}")
    return found


def read(path: Path) -> dict[str, Any]:
    """Raises ValueError, naming the file and what is wrong with it."""
    try:
        found = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict) or (found.get("schema"), found.get("version")) != (SCHEMA, VERSION):
        raise ValueError(f'{path} holds no measurements of this command ("schema": "{SCHEMA}", "version": {VERSION})')
    return found


def save(path: Path, found: dict[str, Any]) -> None:
    """A row a line. Whoever is stopped in the middle of this leaves the earlier file whole."""
    head = ",\n".join(f"{json.dumps(key)}:{json.dumps(value)}" for key, value in found.items() if key != "rows")
    rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in found["rows"])
    new = path.with_name(path.name + ".new")
    new.write_text(f'{{\n{head},\n"rows":[\n{rows}\n]\n}}\n')
    new.replace(path)


def text_of(files: Sequence[Path]) -> str:
    """The table that follows from results, as it is written.

    Raises:
        ValueError: if a file holds something else, or a level lacks points.
    """
    rows: dict[str, list[Row]] = {}
    devices: dict[str, str] = {}
    for file in files:
        found = read(file)
        own = found["rows"]
        for level in dict.fromkeys(row["level"] for row in own):
            rows[level] = [row for row in own if row["level"] == level]
            devices[level] = found["environment"]["device name"]
    levels = steps.table([row for level in LEVELS for row in rows.get(level, [])])
    about = {
        "what": "lengths (first, last; null: without end; 1, 0: none) that torch's LSTM, GRU and RNN run faster than fastseq's "
        "on a CPU, by level of instructions, kind of call, and place of the batch and of the hidden units between these edges",
        "command": "python -m fastseq.benchmarks.tables",
    }
    parts = []
    for level, found in levels.items():
        lines = ",\n".join(f"{json.dumps(name)}:{json.dumps(row, separators=(',', ':'))}" for name, row in found["rows"].items())
        facts = {"device": devices[level], "batches": found["batches"], "widths": found["widths"]}
        edges = ",".join(f"{json.dumps(key)}:{json.dumps(value)}" for key, value in facts.items())
        parts.append(f'"{level}":{{{edges},"rows":{{\n{lines}\n}}}}')
    head = ",\n".join(f"{json.dumps(key)}:{json.dumps(value)}" for key, value in about.items())
    return f'{{\n{head},\n"levels":{{\n' + ",\n".join(parts) + "\n}}\n"


def _measure_here(path: Path, level: str, grid: Grid, deadline: float) -> None:
    """Adds the points of a level that the file lacks."""
    torch.set_num_threads(1)
    file = load(path)
    measured = {tuple(row[name] for name in ("level", *Point._fields)) for row in file["rows"]}
    left = [point for point in points(grid) if (level, *point) not in measured]
    since = time.monotonic()
    with lengths.everywhere(lengths.OURS), Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(level, total=len(left))
        for pair, point in _built(left):
            if time.monotonic() > deadline:
                break
            file["rows"].append({"level": level} | point._asdict() | _times(pair, point, grid))
            progress.advance(task)
            if time.monotonic() - since > 5:
                save(path, file)
                since = time.monotonic()
    save(path, file)


Pair = tuple[nn.Module, nn.Module]  # torch's layer and ours, of the same parameters


def _built(wanted: Sequence[Point]) -> Iterator[tuple[Pair, Point]]:
    last, pair = None, None
    for point in wanted:
        if pair is None or last != point[:4]:
            torch.manual_seed(0)
            theirs = CELLS[point.cell](point.H, point.H, bidirectional=point.lanes == 2).to(getattr(torch, point.dtype))
            ours = copy.deepcopy(theirs)
            fastseq.convert(ours)
            last, pair = point[:4], (theirs, ours)
        yield pair, point


def _times(pair: Pair, point: Point, grid: Grid) -> dict[str, list[Any]]:
    """Microseconds at every length."""
    found: dict[str, list[Any]] = {"steps": [], "torch": [], "ours": []}
    theirs = ours = 0.0
    for T in (*grid.lengths, grid.later):
        later = T == grid.later
        if later and not (point.mode == MODES[True] and theirs < ours < NEAR * theirs):
            break
        if found["steps"] and max(theirs, ours) * T / found["steps"][-1] > (LATEST if later else LONGEST):
            break
        calls = [_call(module, point, T) for module in pair]
        _check([call() for call in calls], point)
        theirs, ours = least(calls, grid.seconds)
        found["steps"].append(T)
        found["torch"].append(round(1e6 * theirs, 1))
        found["ours"].append(round(1e6 * ours, 1))
    return found


def _call(module: nn.Module, point: Point, T: int) -> Callable[[], Sequence[Tensor]]:
    """One call; what it returns is compared."""
    generator = torch.Generator().manual_seed(T)
    training, dtype = point.mode == MODES[True], getattr(torch, point.dtype)
    module.train(training)
    x = torch.randn(T, point.B, point.H, generator=generator).to(dtype)
    input: Any = x
    if point.layout == "packed":
        lengths = [T, *torch.randint(1, T + 1, (point.B - 1,), generator=generator).tolist()]
        input = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
        x = input.data
    x.requires_grad_(training)

    def output() -> Tensor:
        y = module(input)[0]
        return y.data if point.layout == "packed" else y

    if not training:
        return lambda: _without_gradients(output)
    grad, leaves = torch.randn(output().shape, generator=generator).to(dtype), [x, *module.parameters()]
    return lambda: torch.autograd.grad(output(), leaves, grad)


def _without_gradients(output: Callable[[], Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [output()]


def _check(results: Sequence[Sequence[Tensor]], point: Point) -> None:
    """That both compute the same, to half the digits: times of anything else would say nothing."""
    for theirs, ours in zip(*results, strict=True):
        apart, size = (theirs.double() - ours.double()).norm().item(), theirs.double().norm().item()
        if not apart <= size * torch.finfo(theirs.dtype).eps ** 0.5:  # also if it is NaN
            raise RuntimeError(f"{point}: results of size {size:.1e} are {apart:.1e} apart")


def least(calls: Sequence[Callable[[], object]], seconds: float, now: Callable[[], float] = time.thread_time) -> list[float]:
    """The least CPU seconds of a call of each, taken in turn. More rounds than `seconds` hold, up to four times as many, are made
    while the first and the second half of them disagree."""

    def sample(call: Callable[[], object], count: int) -> float:
        start = now()
        for _ in range(count):
            call()
        return (now() - start) / count

    once = [sample(call, 1) for call in calls]
    counts = [max(1, min(100, math.ceil(2e-4 / max(t, 1e-9)))) for t in once]
    rounds = max(2, min(40, round(seconds / max(sum(t * n for t, n in zip(once, counts, strict=True)), 1e-9))))
    taken: list[list[float]] = [[] for _ in calls]
    enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(4):
            for _ in range(rounds):
                for times, call, count, first in zip(taken, calls, counts, once, strict=True):
                    if first < LONG:
                        call()
                    times.append(sample(call, count))
            if all(_agree(times) for times in taken):
                break
    finally:
        if enabled:
            gc.enable()
    return [min(times) for times in taken]


def _agree(times: Sequence[float]) -> bool:
    a, b = min(times[: len(times) // 2]), min(times[len(times) // 2 :])
    return abs(a - b) <= AGREE * min(a, b)


def _show(rows: Sequence[Row]) -> None:
    for level, kind, mean, worst in steps.summary(rows):
        print(f"{level:8} {kind:36} torch / ours {mean:5.2f}, least {worst:5.2f}")


if __name__ == "__main__":
    sys.exit(main())
