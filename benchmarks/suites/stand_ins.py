"""Of the suite models: small recurrent models before and after fastseq.convert, and whether any of them is slower for it."""

from __future__ import annotations

from typing import Any

from ..measure.case import Case, Options, Participant
from ..measure.results import Row, reliable
from ..measure.timing import Effort
from ..providers.base import RECURRENT
from ..providers.models import AFTER, BEFORE
from ..report.model import Card, Cell, Figure, Section, Table, ratio_cell, speed_tone, target_cell, time_cell
from ..report.plots.strip import Strip, draw
from ..report.statistics import geometric_mean
from ..workloads.base import MODES
from ..workloads.stand_ins import STAND_INS, WAYS, StandInWorkload

GROUP = "stand-ins"
LEAST = 0.97  # a model below this is slower; above it the difference is within the noise of a run
MEAN = 1.3  # the least geometric mean


def plan(options: Options, threads: int) -> list[Case]:
    """A case for each model and mode."""
    effort = Effort(seconds=0.1, min_rounds=3, max_rounds=15) if options.quick else Effort(seconds=1.0, max_rounds=60)
    cases = []
    for row in STAND_INS.values():
        for mode in row.modes:
            w = StandInWorkload(
                row.name, row.T, row.B, row.I, row.hidden[0], mode, threads=threads, dtype=options.dtype, device=options.device
            )
            cases.append(Case("models", GROUP, (Participant(BEFORE, w), Participant(AFTER, w)), effort, ((AFTER, BEFORE),)))
    return cases


def _converted(rows: list[Row]) -> list[Row]:
    return [r for r in rows if r.provider == AFTER]


def derive(rows: list[Row]) -> dict[str, Any]:
    """By mode and over both: geometric mean, what is slower, and whether the targets are reached."""
    found = {}
    for name, modes in {**{mode: (mode,) for mode in MODES}, "both": tuple(MODES)}.items():
        own = [r for r in _converted(rows) if r.mode in modes]
        ratios = {_point(r): r.ratio["median"] for r in own if r.ok and r.ratio}
        if not ratios:
            continue
        mean = geometric_mean(list(ratios.values()))
        slower = sorted((point for point in ratios if ratios[point] < LEAST), key=lambda point: ratios[point])
        untimed = len(own) - len(ratios)
        found[name] = {
            "models": len(ratios),
            "untimed": untimed,
            "mean": mean,
            "slower": slower,
            "reliable": reliable(own),
            "none slower": not slower and not untimed,
            "mean reached": mean >= MEAN,
        }
    return found


def _point(r: Row) -> str:
    return f"{r.function}, {MODES[r.mode]}"


def sections(rows: list[Row]) -> list[Section]:
    """One, or none without rows."""
    if not rows:
        return []
    derived, first = derive(rows), rows[0]
    text = [
        "Small recurrent models of the kinds that people have, built by torch.nn, before and after fastseq.convert: forward, and "
        f"forward + backward. Slower is what takes longer by more than the noise of a run ({LEAST:g}×). {first.dtype}, "
        f"threads={first.threads}.",
    ]
    cards = [
        Card(f"{d['mean']:.2f}×", f"{d['models']} small recurrent models, {MODES.get(name, 'both modes')}", speed_tone(d["mean"]))
        for name, d in derived.items()
        if d["reliable"]
    ]
    tables = [table for table in (_targets(derived), _models(rows)) if table.rows]
    return [Section("Small recurrent models before and after", text, cards, [figure(rows)], tables)]


def _targets(derived: dict[str, Any]) -> Table:
    body: list[list[Cell | str]] = []
    for name, d in derived.items():
        title, slower = MODES.get(name, "both"), ", ".join(d["slower"]) or "–"
        told = {"reliable": d["reliable"]}
        none = target_cell(told | {"reached": d["none slower"], "found": d["mean"]})
        mean = target_cell(told | {"reached": d["mean reached"], "found": d["mean"]})
        body.append([title, str(d["models"]), str(d["untimed"]), f"{d['mean']:.2f}×", f"{MEAN:g}×", mean, slower, none])
    columns = ["", "models", "without a time", "geometric mean", "at least", "", "slower after", "no slower"]
    return Table("Converted models", columns, body)


def _models(rows: list[Row]) -> Table:
    at = {(r.function, r.mode, r.provider): r for r in rows}
    body: list[list[Cell | str]] = []
    for name in dict.fromkeys(r.function for r in rows):
        row = STAND_INS[name]
        line: list[Cell | str] = [name, f"B={row.B} T={row.T}, {WAYS[row.way]}"]
        for mode in MODES:
            before, after = (at.get((name, mode, provider)) for provider in (BEFORE, AFTER))
            line += [time_cell(before), time_cell(after), ratio_cell(after, losing=LEAST)] if after else ["–", "–", "–"]
        chose = [c for r in _converted(rows) if r.function == name for c in r.chose]
        body.append([*line, ", ".join(dict.fromkeys(c.removeprefix("backend: ") for c in chose if c.startswith("backend: ")))])
    columns = [f"{title}{what}" for title in MODES.values() for what in (", before", ", after", ", speed-up")]
    return Table("Every model", ["", "", *columns, "fastseq ran"], body)


def figure(rows: list[Row]) -> Figure:
    """A strip for each cell."""
    panels = []
    for mode, title in MODES.items():
        own = [r for r in _converted(rows) if r.mode == mode and r.ok and r.ratio]
        strips = [Strip(cell, color, [r for r in own if STAND_INS[r.function].cell == cell]) for cell, color in RECURRENT.items()]
        panels.append((title, strips))
    return Figure(
        "Speed-up by fastseq.convert, small recurrent models",
        "A point is a model; its size grows with the width. The bar is the geometric mean. Left of 1× converting it is a loss.",
        lambda canvas, theme: draw(canvas, theme, panels, width_unit=16),
        (13.5, 2.6),
    )
