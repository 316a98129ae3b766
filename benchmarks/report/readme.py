"""What documents say of committed results: text between two markers, a table of verdicts by device.

`python -m fastseq bench --json-in benchmarks/results/<device>/results.json --readme README.md` writes the README's figures,
`python -m tools.pages` all other tables and pictures. Tests fail when they differ from the files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .findings import Verdict

BEGIN, END = "<!-- figures: begin, written by --readme -->", "<!-- figures: end -->"


def verdict_tables(devices: Mapping[str, Sequence[Verdict]]) -> list[str]:
    """Markdown: the state of every claim on every device, then for each device the sizes and figures behind it."""
    names = list(devices)
    statements = list(dict.fromkeys(v.statement for of in devices.values() for v in of))
    lines = [f"| claim | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for statement in statements:
        states = [next(v.state for v in devices[name] if v.statement == statement) for name in names]
        lines.append(f"| {statement} | {' | '.join(states)} |")
    for name, of in devices.items():
        lines += ["", f"## {name}", ""]
        for v in of:
            if v.measured:
                sizes = " and ".join(dict.fromkeys(finding.sizes for finding in v.findings))
                told = [f"{v.experiment} {sizes}.", v.verdict + ".", *(f"{text}." for text in (v.figures, v.crossovers) if text)]
                lines += [f"### {v.statement}", "", f"**{v.state}**: {' '.join(told)}", ""]
        rest = sorted({suite for v in of if not v.measured for suite in v.missing})
        if rest:
            lines += [f"Not measured in this run; the suites for it are {', '.join(f'`{suite}`' for suite in rest)}."]
    return lines


def update(file: Path, text: str, begin: str = BEGIN, end: str = END) -> None:
    """Replaces what stands between the markers.

    Raises:
        ValueError: if the file has no markers.
    """
    file.write_text(replaced(file, text, begin, end), encoding="utf-8")


def replaced(file: Path, text: str, begin: str = BEGIN, end: str = END) -> str:
    """The file with other text between the markers. Raises ValueError if it has none."""
    old = file.read_text(encoding="utf-8")
    if begin not in old or end not in old.partition(begin)[2]:
        raise ValueError(f"--readme: {file} lacks the markers {begin!r} and {end!r}")
    before, _, rest = old.partition(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}"
