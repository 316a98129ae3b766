"""The figures of the README, from committed results: tables between two markers, and the picture beside them.

`python -m fastseq bench --json-in benchmarks/results/<device>/results.json --readme README.md --picture docs/<name>.svg` writes
both; a test fails when they differ from the file.
"""

from __future__ import annotations

from pathlib import Path

from . import claims
from .results import Results, Row
from .suites import recurrent
from .workloads import MODES

BEGIN, END = "<!-- figures: begin, written by --readme -->", "<!-- figures: end -->"
TITLES = {
    "padded": "an inner layer (the input wants a gradient too)",
    "data": "a first layer (the input is data)",
    "packed": "PackedSequence, lengths uniform in 1…T",
}


def section(results: Results) -> str:
    """Markdown: where it was measured, the geometric means of the speed-ups with their range, and the verdicts."""
    environment = results.environment
    lines = [
        f"Measured on {environment['device name']}, torch {environment['versions']['torch']}, float32, one and two threads, "
        "T=128, B in 1, 8, 32, H in 64, 128, 256, 512, providers interleaved in one run: fastseq's speed-up over torch.nn, "
        "geometric mean (lowest to highest point).",
        "",
        "| | LSTM | GRU | RNN |",
        "|---|---|---|---|",
    ]
    for group in recurrent.TIMED:
        for mode, title in MODES.items():
            if group == "data" and mode == "inference":
                continue
            what = TITLES[group] if group != "padded" or mode == "training" else "rows of equal length"
            cells = [_summary([r for r in results.rows if _is(r, group, mode, cell)]) for cell in recurrent.CELLS]
            lines.append(f"| {title}, {what} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *verdicts(results)])


def verdicts(results: Results) -> list[str]:
    """A Markdown table of the claims that were measured, and how to measure the others."""
    every = claims.verdicts(results)
    starts = max((row.starts["count"] for row in results.rows if row.starts), default=1)
    medians = f", whose times are medians over {starts} starts of the process" if starts > 1 else ""
    lines = [
        f"What people say, and what this run says to it; the report shows the curves behind every line{medians}:",
        "",
        "| they say | measured here | figures |",
        "|---|---|---|",
    ]
    for v in every:
        if v.measured:
            figures = "; ".join(text for text in (v.figures, v.crossovers) if text)
            lines.append(f"| {v.statement} | {_text(v.verdict)} ({', '.join(f.sizes for f in v.findings)}) | {_text(figures)} |")
    rest = sorted({name for v in every if not v.measured for name in v.missing})
    if rest:
        lines += ["", f"The verdicts on the other statements come from {', '.join(f'`--suite {name}`' for name in rest)}."]
    return lines


def _text(words: str) -> str:
    """For a cell of a table."""
    return words.replace("|", "\\|")


def update(readme: Path, results: Results) -> None:
    """Replaces what stands between the markers.

    Raises:
        ValueError: if the file has no markers.
    """
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"--readme: {readme} lacks the markers {BEGIN!r} and {END!r}")
    before, rest = text.split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{section(results)}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def _is(row: Row, group: str, mode: str, cell: str) -> bool:
    return row.suite == recurrent.NAME and (row.group, row.mode, row.provider) == (group, mode, f"fastseq.{cell}")


def _summary(rows: list[Row]) -> str:
    ratios = sorted(row.ratio["median"] for row in rows if row.ok and row.ratio)
    if not ratios or len(ratios) < len(rows):
        return "not measured"
    return f"{recurrent.geometric_mean(ratios):.2f}× ({ratios[0]:.2f} to {ratios[-1]:.2f})"
