"""``python -m fastseq``: ``info`` tells what is installed and what runs where, ``bench`` measures, ``tune``
chooses kernels by measurement."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from fastseq._version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a report of minutes must not end at a sign that the terminal's encoding lacks
            stream.reconfigure(errors="replace")
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read has what it wanted (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes when it ends
        return 141  # as of a program that SIGPIPE ended
    return status


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["bench"]:  # its options, --help too, are the benchmark's own
        from fastseq import benchmarks

        return benchmarks.main(arguments[1:])

    if arguments[:1] == ["tune"]:
        from fastseq.tuning import command

        return command.main(arguments[1:])

    parser = argparse.ArgumentParser(prog="fastseq", description="Fast kernels for sequence models.")
    parser.add_argument("--version", action="version", version=f"fastseq {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,bench,tune}")
    info_parser = commands.add_parser("info", help="devices, versions, the compiled library, and which backend runs what")
    info_parser.add_argument("--json", action="store_true", help="print it as JSON")
    commands.add_parser(
        "bench",
        help="measure on this device and write a report (bench --help has its options)",
        add_help=False,
    )
    commands.add_parser("tune", help="choose kernels by measurement on this device (tune --help has its options)", add_help=False)
    options = parser.parse_args(arguments)

    from fastseq import info

    print(info.as_json() if options.json else info.as_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
