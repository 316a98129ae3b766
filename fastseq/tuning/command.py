"""``python -m fastseq tune``: standard calls measured on this device, and what is stored shown, exported, imported, cleared."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from fastseq._arguments import unknown
from fastseq.backends import library
from fastseq.choice import sources, store
from fastseq.choice.decision import Call, point_of, speed_of
from fastseq.choice.device import Device, versions

from . import grids
from .child import Bench
from .report import Row
from .tuner import SECONDS, measured_and_stored


class Bad(ValueError):
    """What was asked for cannot be done, in a sentence."""


def parser(prog: str = "fastseq tune") -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog=prog, description="Measure which kernel is the fastest for standard calls on this device.")
    p.add_argument("--minutes", type=float, metavar="N", help="stop after N minutes (default: when all are measured)")
    p.add_argument("--suite", metavar="NAME[,NAME...]", help=f"of {', '.join(grids.SUITES)} (default: all)")
    p.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ... (default: cuda if there is one, else cpu)")
    p.add_argument("--seconds", type=float, default=SECONDS, metavar="S", help="for the rounds of a call (default: %(default)s)")
    p.add_argument("--again", action="store_true", help="measure also what is stored for this device and these versions")
    p.add_argument("--quiet", action="store_true", help="print only a summary")
    others = p.add_mutually_exclusive_group()
    others.add_argument("--show", action="store_true", help="print what is stored")
    others.add_argument("--export", type=Path, metavar="FILE", help="write what is stored to a file")
    others.add_argument("--import", type=Path, metavar="FILE", dest="source", help="add what a file holds")
    others.add_argument("--clear", action="store_true", help="forget what is stored")
    return p


def main(argv: Sequence[str]) -> int:
    """0: done; 2: bad arguments or files, or a store that cannot be written; 130: interrupted, what was measured is stored."""
    p = parser()
    options = p.parse_args(argv)
    try:
        if options.show:
            print(shown())
        elif options.export:
            exported(options.export)
        elif options.source:
            print(imported(options.source))
        elif options.clear:
            _or_bad(store.clear("tuned"))
        else:
            run(options)
    except Bad as error:
        print(f"{p.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def run(options: argparse.Namespace) -> None:
    """
    Raises:
        Bad: if an option has a value that is not accepted, or nothing can be stored or measured.
    """
    if options.minutes is not None and not options.minutes > 0:
        raise Bad(f"--minutes must be above 0, got {options.minutes}")
    if not options.seconds > 0:
        raise Bad(f"--seconds must be above 0, got {options.seconds}")
    suites = tuple(options.suite.split(",")) if options.suite is not None else grids.SUITES
    wrong = [name for name in suites if name not in grids.SUITES]
    if wrong:
        raise Bad(f"--suite: {unknown('suite', wrong[0], grids.SUITES)}")
    device = _device(options.device)
    if device.type == "cpu" and library.reason():
        raise Bad(f"there is one kernel for each call and nothing to choose: {library.reason()}")
    _or_bad(store.update("tuned", {}))
    wanted = grids.mixed(suites, device.type)
    if not options.again:
        wanted = [call for call in wanted if not sources.is_tuned(call, device)]
    deadline = time.monotonic() + 60 * options.minutes if options.minutes is not None else float("inf")
    done = 0

    def in_time() -> Iterator[tuple[Call, torch.device]]:
        for call in wanted:
            if time.monotonic() > deadline:
                return
            yield call, device

    with _progress(len(wanted)) as advance, Bench(torch.get_num_threads()) as bench:

        def told(row: Row | None) -> None:
            nonlocal done
            done += 1
            advance()

        report = measured_and_stored(in_time(), isolated=True, seconds=options.seconds, bench=bench, told=told)
    text = str(report)
    print(text.splitlines()[0] if options.quiet else text)
    if done < len(wanted):
        print(f"{len(wanted) - done} calls were left when the time was up; run it again and it goes on")
    if report.unsaved:
        raise Bad(report.unsaved)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise Bad(f"--device: {name!r} is no device of torch's") from error
    if device.type not in ("cpu", "cuda"):
        raise Bad(f"--device must be cpu or cuda, got {name}")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise Bad(f"--device: there is no {name}; torch sees {count} CUDA devices")
        return torch.device("cuda", device.index or 0)
    return torch.device("cpu")


def shown() -> str:
    """What is stored, by device and versions."""
    entries = store.read("tuned")
    where = store.path("tuned")
    lines = [f"{len(entries)} calls in {where if where is not None else 'no file (FASTSEQ_CACHE=off, or no home)'}"]
    groups: dict[str, list[str]] = {}
    for key, entry in entries.items():
        try:
            call, point = point_of(entry)
            device, of = Device(**entry["device"]), entry["versions"]
        except (KeyError, TypeError, ValueError) as error:
            groups.setdefault("entries that cannot be read", []).append(f"{key}: {error}")
            continue
        head = f"{device} ({', '.join(f'{name} {version}' for name, version in of.items())})"
        head += "" if of == versions() else ": other versions than now, not used"
        first = point.candidates[0] if point.candidates else None
        speed = speed_of(point.candidates) if first else ""
        text = f"{call}: {first.name if first else 'none may run'}"
        groups.setdefault(head, []).append(", ".join(part for part in (text, speed, point.date) if part))
    for head, rows in groups.items():
        lines += [head, *(f"  {row}" for row in sorted(rows))]
    return "\n".join(lines)


def exported(file: Path) -> None:
    text = store.document("tuned", store.read("tuned"))
    new = file.with_name(f"{file.name}.{os.getpid()}.new")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(file)
    except OSError as error:
        new.unlink(missing_ok=True) if new.parent.is_dir() else None
        raise Bad(f"cannot write {file}: {error.strerror}") from error


def imported(file: Path) -> str:
    try:
        entries = store.parsed(file.read_text(encoding="utf-8"), "tuned")
    except OSError as error:
        raise Bad(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise Bad(f"{file} is no export of `fastseq tune`: {error}") from error
    for key, entry in entries.items():
        try:
            point_of(entry)
            Device(**entry["device"]), dict(entry["versions"])
        except (KeyError, TypeError, ValueError) as error:
            raise Bad(f"{file}: entry {key!r} is damaged, nothing was imported: {error}") from error
    _or_bad(store.update("tuned", entries))
    sources.forget()
    return f"{len(entries)} calls imported"


def _or_bad(why: str | None) -> None:
    if why is not None:
        raise Bad(why)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on the terminal, if the packages of the extra `bench` are there; else a line now and then."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        done = 0

        def count() -> None:
            nonlocal done
            done += 1
            if done % 50 == 0 or done == total:
                print(f"{done} of {total} calls", file=sys.stderr)

        yield count
        return
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("tuning", total=total)
        yield lambda: progress.advance(task)
