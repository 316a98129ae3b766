"""Of the suite models: small recurrent and attention models before and after fastseq, and whether any is slower for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..measure.case import Case, Options, Participant
from ..measure.results import Row, reliable
from ..measure.timing import Effort
from ..providers.base import RECURRENT
from ..providers.models import AFTER, BEFORE, OWN, SDPA
from ..report.model import Card, Cell, Figure, Section, Table, ratio_cell, speed_tone, target_cell, time_cell
from ..report.plots.strip import Strip, draw
from ..report.statistics import geometric_mean
from ..workloads.attention_stand_ins import ATTENTION_STAND_INS, AttentionStandInWorkload
from ..workloads.attention_stand_ins import WAYS as ATTENTION_WAYS
from ..workloads.base import MODES
from ..workloads.models import ModelWorkload
from ..workloads.stand_ins import STAND_INS, WAYS, StandInWorkload

LEAST = 0.97  # a model below this is slower; above it the difference is within the noise of a run
MEAN = 1.3  # the least geometric mean


@dataclass(frozen=True)
class Family:
    """Models of one kind. A row of `rows` has B, T, `way` and `modes`; `strip` names the strip of a figure that it is in."""

    group: str
    models: str
    built_by: str
    rows: Mapping[str, Any]
    ways: Mapping[str, str]
    workload: Callable[..., ModelWorkload]
    strips: Mapping[str, str]  # and their colors
    strip: Callable[[Any], str]


def _recurrent(row: Any, mode: str, **common: Any) -> StandInWorkload:
    return StandInWorkload(row.name, row.T, row.B, row.I, row.hidden[0], mode, **common)


FAMILIES = {
    family.group: family
    for family in (
        Family(
            "stand-ins",
            "small recurrent models",
            "built by torch.nn, before and after fastseq.convert",
            STAND_INS,
            WAYS,
            _recurrent,
            RECURRENT,
            lambda row: row.cell,
        ),
        Family(
            "attention stand-ins",
            "small attention models",
            "built by torch.nn, before and after fastseq.convert, or by transformers, with torch's attention and with fastseq's. "
            "Dropout is part of what is timed in training",
            ATTENTION_STAND_INS,
            ATTENTION_WAYS,
            AttentionStandInWorkload.of,
            {"torch.nn": "#1e88e5", "transformers": "#9467d6"},
            lambda row: row.package or "torch.nn",
        ),
    )
}


def plan(options: Options, threads: int) -> list[Case]:
    """A case for each model and mode."""
    effort = Effort(seconds=0.1, min_rounds=3, max_rounds=15) if options.quick else Effort(seconds=1.0, max_rounds=60)
    cases = []
    for family in FAMILIES.values():
        for row in family.rows.values():
            before, after = (SDPA, OWN) if getattr(row, "package", "") else (BEFORE, AFTER)
            for mode in row.modes:
                w = family.workload(row, mode, threads=threads, dtype=options.dtype, device=options.device)
                participants = Participant(before, w), Participant(after, w)
                cases.append(Case("models", family.group, participants, effort, ((after, before),)))
    return cases


def _converted(rows: list[Row]) -> list[Row]:
    return [r for r in rows if r.provider in (AFTER, OWN)]


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
    """One for each family that has rows."""
    return [_section(family, own) for family in FAMILIES.values() if (own := [r for r in rows if r.group == family.group])]


def _section(family: Family, rows: list[Row]) -> Section:
    derived, first = derive(rows), rows[0]
    text = [
        f"{family.models.capitalize()} of the kinds that people have, {family.built_by}: forward, and forward + backward. "
        f"Slower is what takes longer by more than the noise of a run ({LEAST:g}×). {first.dtype}, threads={first.threads}.",
    ]
    cards = [
        Card(f"{d['mean']:.2f}×", f"{d['models']} {family.models}, {MODES.get(name, 'both modes')}", speed_tone(d["mean"]))
        for name, d in derived.items()
        if d["reliable"]
    ]
    tables = [table for table in (_targets(derived), _models(family, rows)) if table.rows]
    return Section(f"{family.models.capitalize()} before and after", text, cards, [figure(rows)], tables)


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


def _models(family: Family, rows: list[Row]) -> Table:
    at = {(r.function, r.mode, r.provider in (AFTER, OWN)): r for r in rows}
    body: list[list[Cell | str]] = []
    for name in dict.fromkeys(r.function for r in rows):
        row = family.rows[name]
        line: list[Cell | str] = [name, f"B={row.B} T={row.T}, {family.ways[row.way]}"]
        for mode in MODES:
            before, after = (at.get((name, mode, own)) for own in (False, True))
            line += [time_cell(before), time_cell(after), ratio_cell(after, losing=LEAST)] if after else ["–", "–", "–"]
        chose = [c for r in _converted(rows) if r.function == name for c in r.chose]
        body.append([*line, ", ".join(dict.fromkeys(c.removeprefix("backend: ") for c in chose if c.startswith("backend: ")))])
    columns = [f"{title}{what}" for title in MODES.values() for what in (", before", ", after", ", speed-up")]
    return Table("Every model", ["", "", *columns, "fastseq ran"], body)


def figure(rows: list[Row]) -> Figure:
    """Strips of the family of the first row."""
    family, panels = FAMILIES[rows[0].group], []
    for mode, title in MODES.items():
        own = [r for r in _converted(rows) if (r.mode, r.group) == (mode, family.group) and r.ok and r.ratio]
        strips = [
            Strip(name, color, [r for r in own if family.strip(family.rows[r.function]) == name])
            for name, color in family.strips.items()
        ]
        panels.append((title, strips))
    return Figure(
        f"Speed-up by fastseq, {family.models}",
        "A point is a model; its size grows with the width. The bar is the geometric mean. Left of 1× fastseq is a loss.",
        lambda canvas, theme: draw(canvas, theme, panels, width_unit=16),
        (13.5, 2.6),
    )
