"""The reports of committed results as a small site: `python -m fastseq.benchmarks.publish FOLDER [--results DIR]`.

FOLDER gets a page, a picture and the data of each folder in DIR, and an index.html that leads to them. Files of a folder that
belong together, of one device and one version, make one report; where they do not, each makes its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import assembly
from .measure import combine
from .measure.environment import where
from .measure.results import Results
from .report import html, quality

RESULTS = Path(__file__).resolve().parent / "results"
TITLE = "Benchmark reports"


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 2: bad arguments or files."""
    p = argparse.ArgumentParser(
        prog="python -m fastseq.benchmarks.publish", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("folder", type=Path, metavar="FOLDER", help="is made, or added to")
    p.add_argument("--results", type=Path, metavar="DIR", default=RESULTS, help="default: those of this checkout")
    args = p.parse_args(argv)
    try:
        listed = [_write(name, results, args.folder) for name, results in _reports(args.results)]
        if not listed:
            raise ValueError(f"there is no results.json under {args.results}")
        (args.folder / "index.html").write_text(html.index(TITLE, listed), encoding="utf-8")
    except (OSError, ValueError) as error:
        p.error(str(error))
    print(args.folder / "index.html")
    return 0


def _reports(results: Path) -> Iterator[tuple[str, Results]]:
    """Their folders, and what they show."""
    for folder in sorted(path for path in results.iterdir() if path.is_dir()) if results.is_dir() else ():
        files = sorted(folder.rglob("results.json"))
        try:
            parts = [(folder, combine.load(files))] if files else []
        except ValueError:  # they do not belong together
            parts = [(file.parent, combine.load([file])) for file in files]
        for place, found in parts:
            yield place.relative_to(results).as_posix().replace("/", "-"), found


def _write(name: str, results: Results, folder: Path) -> html.Listed:
    (folder / name).mkdir(parents=True, exist_ok=True)
    assembly.write(results, folder / name)
    status = quality.status(results)
    return html.Listed(name, assembly.title(results), where(results.environment), status, results.suites())


if __name__ == "__main__":
    sys.exit(main())
