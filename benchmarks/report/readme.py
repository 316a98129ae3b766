"""The figures of the README, from committed results: tables between two markers, and the picture beside them.

`python -m fastseq bench --json-in benchmarks/results/<device>/results.json --readme README.md --picture docs/<name>.svg` writes
both; a test fails when they differ from the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..measure.results import Results
from .findings import Verdict

BEGIN, END = "<!-- figures: begin, written by --readme -->", "<!-- figures: end -->"


def section(speed_ups: Sequence[str], verdicts: Sequence[Verdict], results: Results) -> str:
    """Markdown: the table of a suite's speed-ups, and the verdicts."""
    return "\n".join([*speed_ups, "", *verdict_table(verdicts, results)])


def verdict_table(every: Sequence[Verdict], results: Results) -> list[str]:
    """A Markdown table of the claims that were measured, and how to measure the others."""
    restarts = max((row.restarts["count"] for row in results.rows if row.restarts), default=1)
    medians = f", whose times are medians over {restarts} fresh processes" if restarts > 1 else ""
    lines = [
        f"Common claims, tested by this run; the report shows the curves behind every line{medians}:",
        "",
        "| claim | verdict | figures |",
        "|---|---|---|",
    ]
    for v in every:
        if v.measured:
            figures = "; ".join(text for text in (v.figures, v.crossovers) if text)
            sizes = ", ".join(dict.fromkeys(finding.sizes for finding in v.findings))
            lines.append(f"| {v.statement} | {v.state}: {_text(v.brief)} ({sizes}) | {_text(figures)} |")
    rest = sorted({name for v in every if not v.measured for name in v.missing})
    if rest:
        lines += ["", f"The verdicts on the other claims come from {', '.join(f'`--suite {name}`' for name in rest)}."]
    return lines


def _text(words: str) -> str:
    """For a cell of a table."""
    return words.replace("|", "\\|")


def update(readme: Path, text: str) -> None:
    """Replaces what stands between the markers.

    Raises:
        ValueError: if the file has no markers.
    """
    old = readme.read_text(encoding="utf-8")
    if BEGIN not in old or END not in old:
        raise ValueError(f"--readme: {readme} lacks the markers {BEGIN!r} and {END!r}")
    before, rest = old.split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")
