"""`python -m fastseq bench`: runs suites on one device and leaves results.json, rows.csv, report.html and summary.png.

`python -m fastseq bench compare OLD NEW` compares two of these results: compare.py.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from . import assembly, suites
from .measure import combine, environment, restarts
from .measure.case import QUICK_RESTARTS, RESTARTS, Case, Options
from .measure.check import forget_references
from .measure.results import Results
from .measure.runner import Runner
from .report import compare, quality, readme
from .report.plots import style
from .suites import DEFAULT, SUITES, selection

LOG_WIDTH = 170
KEEP_SECONDS = 30  # after which what was measured is written
DTYPES = ("float32", "float64", "bfloat16", "float16")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m fastseq bench",
        description="Benchmark fastseq against PyTorch on this device and write an HTML report.",
        epilog="examples:\n"
        "  python -m fastseq bench --quick\n"
        '  python -m fastseq bench --suite recurrent --only "cell=GRU,LSTM B=8 threads=1 mode=training"\n'
        "  python -m fastseq bench --json-in results.json --picture picture.svg\n"
        "  python -m fastseq bench compare old/results.json new/results.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--suite", action="append", metavar="NAME", help=f"suite to run, repeatable (default: {DEFAULT})")
    p.add_argument("--list", action="store_true", help="list the suites and stop")
    p.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N")
    p.add_argument("--dtype", default="float32", choices=DTYPES)
    p.add_argument(
        "--threads",
        metavar="N[,N...]",
        help="CPU threads; several for suites that compare them (default: the suite's)",
    )
    extent = p.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="fewer points and repetitions")
    extent.add_argument("--full", action="store_true", help="every point where a suite chooses among them: hours, see --only")
    p.add_argument(
        "--only",
        metavar="FILTER",
        help='points to run, for instance "cell=GRU B=8 threads=1"; keys: ' + ", ".join(selection.KEYS),
    )
    p.add_argument(
        "--restarts",
        metavar="N",
        type=int,
        help="processes that measure the headlines, each of them once, after everything else "
        f"(default: {RESTARTS}, with --quick {QUICK_RESTARTS})",
    )
    p.add_argument("--out", metavar="DIR", type=Path, help="folder for the results (default: bench-results/<time>)")
    p.add_argument("--resume", action="store_true", help="go on with the run that --out holds, which was interrupted or killed")
    p.add_argument(
        "--json-in",
        metavar="FILE",
        type=Path,
        nargs="+",
        help="measure nothing, show the results in FILE, or in several of one device",
    )
    p.add_argument("--picture", metavar="FILE", type=Path, help="also draw the first suite's figure as .svg or .png")
    p.add_argument(
        "--readme", metavar="FILE", type=Path, help="also write speed-ups and verdicts between the markers of a Markdown file"
    )
    p.add_argument("--theme", default="auto", choices=sorted(style.THEMES), help="colors of --picture (default: as the reader's)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 1: a provider was wrong; 2: bad arguments; 130: interrupted, what was measured is written."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    console = Console()
    if not console.is_terminal:  # a file or a log: tables need not be squeezed into 80 columns
        console.width = max(console.width, LOG_WIDTH)
    if arguments[:1] == ["compare"]:
        return compare.main(arguments[1:], console)
    p = parser()
    args = p.parse_args(arguments)
    if args.list:
        for name in SUITES:
            console.print(f"[bold]{name}[/bold]  {SUITES[name].SUMMARY}", highlight=False)
        return 0
    try:
        if args.picture and args.picture.suffix.lower() not in (".svg", ".png"):
            raise ValueError(f"--picture: {args.picture} ends in neither .svg nor .png")
        if args.resume and not args.out:
            raise ValueError("--resume: --out is needed, the folder of the run to go on with")
        if args.json_in:
            results = combine.load(args.json_in)
        else:
            cases, options = _planned(args)
            out = _folder(args.out)
            results = _begin(options, out / "results.json" if args.resume else None)
    except ValueError as error:
        p.error(str(error))
    if args.json_in:
        assembly.show(results, console)
        if args.out or not (args.picture or args.readme):
            _write(results, _folder(args.out), console)
    else:
        console.print(f"{len(cases)} cases on {options.device}, into {out}", highlight=False, soft_wrap=True)
        measure(cases, results, options, console, lambda results: results.save(out / "results.json"))
        assembly.show(results, console)
        _write(results, out, console)
    if args.picture or args.readme:
        refusal = quality.refusal(results)
        if refusal:
            p.error(f"{'--readme' if args.readme else '--picture'}: {refusal}")
    if args.picture:
        suite = results.suites()[0]
        style.save(SUITES[suite].picture(results), args.picture, style.THEMES[args.theme])
        console.print(f"picture: {args.picture}", highlight=False)
    if args.readme:
        try:
            readme.update(args.readme, assembly.figures(results))
        except (OSError, ValueError) as error:
            p.error(str(error))
    if results.options.get("interrupted"):
        return 130
    return 1 if any(row.status == "wrong" for row in results.rows) else 0


def measure(
    cases: list[Case],
    results: Results,
    options: Options,
    console: Console,
    keep: Callable[[Results], None] = lambda results: None,
) -> None:
    """Runs the cases that `results` lacks and adds them, then the headlines again in fresh processes; Ctrl-C ends it early.

    `keep` gets what there is after every group and every process, and twice a minute.
    """
    start, earlier = time.monotonic() - results.seconds, list(results.peaks)
    kept = time.monotonic()
    measured = {row.key for row in results.rows}
    planned, cases = cases, [case for case in cases if not measured.issuperset(case.keys())]
    others = environment.Others()
    runner = Runner(options.device, quick=options.quick)

    def flush() -> None:
        results.environment["cpu used by others"] = round(others.share(), 3)
        results.peaks = earlier + list(runner.peaks.values())
        results.seconds = round(time.monotonic() - start, 1)
        keep(results)
        if not console.is_terminal:  # where no bar moves
            at = progress.tasks[task]
            console.print(f"{at.completed:.0f} of {at.total:.0f} after {results.seconds:.0f} s", highlight=False)

    columns = (
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console, transient=True, speed_estimate_period=math.inf) as progress:
        task = progress.add_task("measuring the machine's peaks", total=len(cases) + restarts.left(planned, results, options))
        try:
            with closing(runner):
                for _, group in groupby(cases, lambda case: (case.suite, case.group)):
                    for case in group:
                        results.rows += runner.run(case, lambda step: progress.update(task, description=step))
                        progress.advance(task)
                        if time.monotonic() > kept + KEEP_SECONDS:
                            flush()
                            kept = time.monotonic()
                    flush()
            forget_references()
            progress.update(task, total=progress.tasks[task].completed + restarts.left(planned, results, options))
            restarts.measure(
                planned,
                results,
                options,
                tell=lambda step: progress.update(task, description=step),
                advance=lambda: progress.advance(task),
                keep=flush,
            )
        except KeyboardInterrupt:
            results.options["interrupted"] = True
        finally:
            forget_references()
    flush()


def _begin(options: Options, earlier: Path | None) -> Results:
    """No rows, or those of `earlier` if that file is there; ValueError if they were measured otherwise. Commits are listed."""
    given: dict[str, Any] = {
        "dtype": options.dtype,
        "quick": options.quick,
        "full": options.full,
        "threads": list(options.threads),
        "restarts": options.restarts,
    }
    begun = Results(environment.collect(options.device), given)
    if earlier is None or not earlier.is_file():
        return begun
    found = Results.load(earlier)
    found.options.pop("interrupted", None)
    most = max(options.restarts, found.options.get("restarts", 1))  # another number is no other measurement
    found.options["restarts"] = given["restarts"] = most
    differing = environment.otherwise(found.environment, begun.environment)
    if found.options != given:
        differing.append(f"options were {found.options}, are {given}")
    if differing:
        raise ValueError(f"--resume: {earlier} was measured otherwise: {'; '.join(differing)}")
    commits = [commit for results in (found, begun) for commit in results.environment.get("git", "unknown").split(", ")]
    begun.environment["git"] = ", ".join(dict.fromkeys(commits))
    return Results(begun.environment, given, found.rows, found.peaks, found.seconds)


def device_of(name: str) -> str:
    """A usable device, or ValueError with what is missing."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return name
    kind, _, index = name.partition(":")
    if kind != "cuda" or (index and not index.isdigit()) or name.endswith(":"):
        raise ValueError(f"--device: {name!r} is none of auto, cpu, cuda, cuda:N")
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no GPU or no driver"
        raise ValueError(f"--device: {name} is not present: {why}; accepted here: auto, cpu")
    if index and int(index) >= torch.cuda.device_count():
        raise ValueError(f"--device: {name} is not present; this machine has {torch.cuda.device_count()} CUDA device(s)")
    return name


def _threads(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    try:
        counts = tuple(int(n) for n in text.split(","))
    except ValueError:
        counts = (0,)
    if min(counts) < 1:
        raise ValueError(f"--threads: {text!r} is not a list of positive numbers such as 2 or 1,2")
    return counts


def _planned(args: argparse.Namespace) -> tuple[list[Case], Options]:
    names = list(dict.fromkeys(args.suite or [DEFAULT]))
    for name in names:
        if name not in SUITES:
            raise ValueError(f"--suite: there is no suite {name!r}; there are: {', '.join(SUITES)}")
    device = device_of(args.device)
    if device == "cpu" and args.dtype == "float16":
        raise ValueError("--dtype: float16 is for GPUs; on the CPU use float32, float64 or bfloat16")
    if args.restarts is not None and args.restarts < 1:
        raise ValueError(f"--restarts: {args.restarts} is not a positive number of processes")
    count = args.restarts or (QUICK_RESTARTS if args.quick else RESTARTS)
    options = Options(device, args.dtype, _threads(args.threads), args.quick, args.full, count)
    cases = suites.plan(names, options)
    return (selection.select(cases, selection.parse(args.only)) if args.only is not None else cases), options


def _folder(out: Path | None) -> Path:
    folder = out or Path("bench-results") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: cannot make the folder {folder}: {error.strerror}") from error
    return folder


def _write(results: Results, out: Path, console: Console) -> None:
    written = assembly.write(results, out)
    console.print("\n" + "\n".join(map(str, written)), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    raise SystemExit(main())
