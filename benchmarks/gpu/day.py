"""`make gpu-day`: everything that only a machine with a GPU can tell, in order of worth and within a time; no network needed.

Whether the library loads and every family of kernels is right; what torch's kernels take; which of all kernels a call should
have; the tests that need a GPU; the suites. A day of few minutes gives each stage its share of them. What is known after a stage
is on disk before the next one begins, and in one archive if asked for; a stage that crashes or hangs costs its own time.

It leaves one folder to commit, benchmarks/results/<device>: self-check.jsonl, baselines.jsonl, tuned-1.json (from which `python
-m fastseq.benchmarks.tables` makes the table that the package ships), results.json of each suite, tests.txt, what
compute-sanitizer says, environment.json, and summary.md with what ran, what was wrong and what was left out. Run again, also on
another machine that has the folder, it goes on where it stopped: finished stages are skipped, those that were never tried come
before those that failed or were cut short, and a suite measures only the points that it lacks.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fastseq.choice import store

from ..measure.results import last_line
from ..suites import DEFAULT, SUITES
from . import stages, transfer
from .stages import FAILED, FINISHED, LEFT_OUT, ROOT, TIMED_OUT, Outcome, Stage

MINUTES = 25.0
# Minutes that a suite gets at most in its first run, the worthiest suite first; the others of the registry follow.
SUITE_MINUTES = {"attention": 4.0, "recurrent": 4.0, "sequential-vs-parallel": 3.0, "limits": 3.0, "cells": 3.0}
OTHER_SUITE_MINUTES = 4.0
TEST_PROCESSES = 8
LIBRARY = ROOT / "fastseq" / "lib" / "libfastseq.so"
SUMMARY = "summary.md"
MOST_WRONG = 40  # lines of what is wrong in the summary
LOCKS = tuple(f"{kind}-{store.VERSION}.lock" for kind in store.KINDS)
REHEARSAL = ROOT / "build" / "gpu-day"


def table(python: str = sys.executable, device: str = "cuda") -> list[Stage]:
    """Every stage, the worthiest first. A library that is already there is taken as it is; "cpu" is for trying the day out."""
    module = (python, "-m")
    parallel = ("-n", str(min(TEST_PROCESSES, os.cpu_count() or 1)), "--dist", "loadgroup") if find_spec("xdist") else ()
    build = Stage("library", (python, "setup.py", "--quiet", "build_native", "--inplace"), 8, str(LIBRARY))
    suites = [*SUITE_MINUTES, *(name for name in SUITES if name not in SUITE_MINUTES)]
    within = ("--device", device, "--seconds", "{seconds}", "--out")
    quick = ("--quick",) if device == "cpu" else ()
    options = ("-q", "-m", "gpu and not slow", "--maxfail=50", "--durations=15", *parallel)
    short = (*module, "pytest", *options, *_files_with_gpu_tests())

    def of(name: str, minutes: float, leaves: str, *command: str) -> Stage:
        return Stage(name, (*module, *command), minutes, leaves)

    every = [
        *([] if LIBRARY.is_file() else [build]),
        of("environment", 2, "environment.json", "fastseq.benchmarks.measure.environment", "{folder}/environment.json"),
        of("info", 2, "info.txt", "fastseq", "info"),
        of("self-check", 5, "self-check.jsonl", "fastseq.benchmarks.gpu.self_check", *within, "{folder}/self-check.jsonl"),
        of("baselines", 2.5, "baselines.jsonl", "fastseq.benchmarks.gpu.baselines", *within, "{folder}/baselines.jsonl"),
        of("tune", 6, f"tuned-{store.VERSION}.json", "fastseq", "tune", "--device", device, "--minutes", "{minutes}"),
        Stage("tests", short, 5, "tests.txt", environment={"FASTSEQ_SELF_CHECK": "0"}),  # of kernels, whatever was found of them
        *(_suite(name, module, device, "--restarts", "1", *quick) for name in suites[:3]),
        _sanitizer("memcheck", module),
        _plans(module),
        *(_suite(name, module, device, "--restarts", "1", *quick) for name in suites[3:]),
        _sanitizer("racecheck", module),
        # of the headlines; other suites come before they are measured again
        replace(_suite(DEFAULT, module, device, *quick), name="restarts"),
    ]
    # what one stage finds out of kernels the next ones know, and it comes back with the rest
    shared = {"FASTSEQ_CACHE": "{folder}"}
    return [replace(stage, environment={**shared, **stage.environment}, drops=(*stage.drops, *LOCKS)) for stage in every]


def _files_with_gpu_tests() -> list[str]:
    """To collect all others would take a short day's time."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "mark.gpu" in file.read_text(encoding="utf-8")]


def _sanitizer(tool: str, module: tuple[str, ...]) -> Stage:
    command = ("compute-sanitizer", "--tool", tool, "--target-processes", "application-only", "--error-exitcode", "9")
    # Without torch's cache of memory, an access beyond a tensor is one beyond an allocation.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    program = (*module, "fastseq.benchmarks.gpu.sanitizer_smoke")
    return Stage(tool, (*command, *program), 3, f"{tool}.txt", environment=alone, tool="compute-sanitizer")


def _suite(name: str, module: tuple[str, ...], device: str, *more: str) -> Stage:
    command = (*module, "fastseq", "bench", "--suite", name, "--device", device, "--out", f"{{folder}}/{name}", "--resume", *more)
    drops = (f"{name}/rows.csv", f"{name}/report.html", f"{name}/summary.png")  # bench --json-in writes them again
    return Stage(name, command, SUITE_MINUTES.get(name, OTHER_SUITE_MINUTES), f"{name}/results.json", drops)


def _plans(module: tuple[str, ...]) -> Stage:
    """The rows lie beside its tables and verdict on the planner's model, which it leaves."""
    command = (*module, "fastseq.benchmarks.gpu.tune_recurrent", "--out", "{folder}/recurrent-plans.jsonl")
    grid = ("--precision", "bf16,tf32", "--hidden", "512,1024", "--batch", "1,64", "--lanes", "1", "--candidates", "3")
    return Stage("recurrent-plans", (*command, *grid), 3, "recurrent-plans.txt")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m fastseq.benchmarks.gpu.day",
        description=__doc__,
        epilog="examples:\n"
        "  make gpu-day\n"
        '  make gpu-day PYTHON=python3 ARGS="--minutes 8 --archive day.tar.gz"\n'
        "  make gpu-day ARGS=--rehearse\n"
        '  make gpu-day ARGS="--again --stage tests"\n'
        "  make gpu-day ARGS=--list",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    more = "for everything, and half a minute more if a stage must be stopped (default: %(default)g)"
    p.add_argument("--minutes", type=float, default=MINUTES, metavar="N", help=more)
    p.add_argument("--again", action="store_true", help="also what is finished, as if nothing had run before")
    p.add_argument("--stage", action="append", metavar="NAME", help="only this one, repeatable")
    p.add_argument("--out", type=Path, metavar="DIR", help="the folder (default: benchmarks/results/<device>)")
    back = f"all that there is, written anew after each stage: a .tar.gz of at most {transfer.MOST_BACK >> 20} MiB"
    p.add_argument("--archive", type=Path, metavar="FILE", help=back)
    p.add_argument("--rehearse", action="store_true", help="on this CPU, with small sizes: tries the day, measures nothing")
    p.add_argument("--list", action="store_true", help="list the stages and stop")
    there = f"list what has to travel to a machine, and whether it is at most {transfer.MOST_THERE >> 20} MiB"
    p.add_argument("--travels", action="store_true", help=there)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """0: done, as far as the time went; 1: a stage failed; 2: bad arguments or no CUDA device; 130: interrupted."""
    args = parser().parse_args(argv)
    if args.travels:
        return _travels()
    every = table(device="cpu") if args.rehearse else table()
    if args.list:
        for stage in every:
            print(f"{stage.name:24}{stage.minutes:3g} minutes at most, leaves {stage.leaves}")
        return 0
    try:
        wanted = _wanted(every, args.stage)
        if not args.minutes > 0:
            raise ValueError(f"--minutes: {args.minutes:g} is not above 0")
        name = "rehearsal on a CPU" if args.rehearse else device_name()
        folder = _folder(args.out or (REHEARSAL if args.rehearse else ROOT / "benchmarks" / "results" / slug(name)))
        file = _archive(args.archive, folder)

        def keep(stage: Stage, outcomes: dict[str, Outcome]) -> None:
            print(_sentence(stage.name, outcomes[stage.name]), flush=True)
            (folder / SUMMARY).write_text(summary(name, outcomes, every, folder), encoding="utf-8")
            for left in transfer.archive(folder, file) if file else ():
                print(f"{left} has no room in {file}", flush=True)

        outcomes = stages.walk(wanted, folder, args.minutes, again=args.again, scale=min(1.0, args.minutes / MINUTES), keep=keep)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; {folder} has what was finished")
        return 130
    print(folder / SUMMARY)
    return int(any(outcomes[stage.name].status == FAILED for stage in wanted))


def summary(name: str, outcomes: dict[str, Outcome], every: Sequence[Stage], folder: Path) -> str:
    """Markdown: the device, then the stages, those that did not finish first."""
    rank = (FAILED, TIMED_OUT, LEFT_OUT, FINISHED)
    leaves = {stage.name: folder / stage.leaves for stage in every}
    lines = [f"# {name}", "", *_versions(folder), "| stage | outcome | minutes | |", "|---|---|---|---|"]
    for stage, outcome in sorted(outcomes.items(), key=lambda item: rank.index(item[1].status)):
        words = said(leaves[stage], outcome.status) if stage in leaves else ""
        told = "; ".join(part for part in (outcome.reason, words) if part).replace("|", "\\|")
        lines.append(f"| {stage} | {outcome.status} | {outcome.minutes:.1f} | {told} |")
    return "\n".join([*lines, *_wrong(folder)]) + "\n"


def _wrong(folder: Path) -> list[str]:
    """The families of kernels that were wrong in the self-check, and how."""
    rows = [row for row in _rows(folder / "self-check.jsonl") if not row["right"]]
    if not rows:
        return []
    more = [f"* and {len(rows) - MOST_WRONG} others"] if len(rows) > MOST_WRONG else []
    return ["", "## Wrong kernels", "", *(f"* {row['family']}: {row['words']}" for row in rows[:MOST_WRONG]), *more]


def _rows(file: Path) -> list[dict[str, Any]]:
    """Of a file of JSON rows, which whoever wrote it may have been stopped in."""
    rows = []
    for line in file.read_text().splitlines() if file.is_file() else ():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def said(file: Path, status: str) -> str:
    """A result file in a few words: its rows; or the line that the log of a finished stage ends with."""
    if file.name == "self-check.jsonl":
        counts = Counter("right" if row["right"] else "wrong" for row in _rows(file))
        return "families: " + (", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()) or "none")
    if file.suffix == ".jsonl":
        return f"rows: {len(_rows(file))}"
    if file.name != "results.json":
        return last_line(file) if file.suffix == ".txt" and status == FINISHED else ""
    if not file.is_file():
        return ""
    counts = Counter(row["status"] for row in json.loads(file.read_text())["rows"])
    return "rows: " + ", ".join(f"{count} {status}" for status, count in counts.most_common())


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _versions(folder: Path) -> list[str]:
    try:
        found = json.loads((folder / "environment.json").read_text())
    except (OSError, ValueError):
        return []
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return [f"{versions}; commit {found.get('git', 'unknown')}; {found['time']}. Library: {found['library']}.", ""]


def _sentence(stage: str, outcome: Outcome) -> str:
    took = "" if outcome.status == LEFT_OUT else f" after {outcome.minutes:.1f} minutes"
    return f"{stage}: {outcome.status}{took}{': ' if outcome.reason else ''}{outcome.reason}"


def _wanted(every: list[Stage], names: list[str] | None) -> list[Stage]:
    unknown = sorted(set(names or ()) - {stage.name for stage in every})
    if unknown:
        raise ValueError(f"--stage: there is no stage {unknown[0]!r}; there are: {', '.join(stage.name for stage in every)}")
    return [stage for stage in every if not names or stage.name in names]


def device_name() -> str:
    if not (ROOT / "setup.py").is_file():
        raise ValueError(f"gpu-day runs in a checkout, which has the tests; {ROOT} is none")
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no GPU or no driver"
        raise ValueError(f"gpu-day needs a CUDA device: {why}")
    return torch.cuda.get_device_name()


def _archive(file: Path | None, folder: Path) -> Path | None:
    """Tries at once whether it can be written."""
    if file is None:
        return None
    try:
        transfer.archive(folder, file)
    except OSError as error:
        raise ValueError(f"--archive: cannot write {file}: {error.strerror}") from error
    return file.resolve()


def _travels() -> int:
    """Print the files that travel, the largest first; 1 if they are too many bytes."""
    try:
        sizes = transfer.travels(ROOT)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name in sorted(sizes, key=lambda name: -sizes[name])[:10]:
        print(f"{sizes[name] / 2**20:6.1f} MiB  {name}")
    complaint, total = transfer.too_large(sizes), sum(sizes.values()) / 2**20
    if not LIBRARY.is_file():
        print("there is no library: it would be built there, which takes minutes (make library)")
    elif any(file.stat().st_mtime > LIBRARY.stat().st_mtime for file in (ROOT / "csrc").rglob("*") if file.is_file()):
        print("the library may be older than csrc/ (make library)")
    print(complaint or f"{total:6.1f} MiB  in {len(sizes)} files, of at most {transfer.MOST_THERE >> 20} MiB")
    return int(bool(complaint))


def _folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: cannot make the folder {folder}: {error.strerror}") from error
    return folder.resolve()


if __name__ == "__main__":
    sys.exit(main())
