"""What was measured on other devices and comes with the package: ``tables/points.json``, which ``python -m
fastseq.benchmarks.tables`` writes from results that are committed.

    {"devices": [{"type": "cuda", "name": "NVIDIA H200", "level": "9.0", "date": "2026-11-29", "calls": [
        {"kin": [op, mode, kind, dtype, precision, layout, lanes], "points": [[sizes, [[backend, form, us], ...]], ...]}, ...]}]}

A GPU is served by what was measured on one of its name, a CPU by what was measured with its level of instructions, or the next
one below it, or without any the next above.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from .decision import Candidate, Point, Points
from .device import LEVELS, WORDS, Device

FILE = Path(__file__).parent / "tables" / "points.json"
MEASURED = FILE.with_name("measured.json")  # of which calls there are times at all, for `fastseq.support_matrix`


@cache
def points_for(type: str, name: str, level: str) -> tuple[Points, str]:
    """Of a device, and the words for what was measured; none and "" if nothing like it was."""
    return found_in(json.loads(FILE.read_text()), type, name, level)


def found_in(file: dict[str, Any], type: str, name: str, level: str) -> tuple[Points, str]:
    devices = [row for row in file["devices"] if row["type"] == type]
    if type == "cpu":
        place = LEVELS.index(level) if level in LEVELS else 0
        by_level = {row["level"]: row for row in devices}
        near = [by_level[other] for other in (*LEVELS[place::-1], *LEVELS[place:]) if other in by_level]
        row = near[0] if near and level in LEVELS else None
    else:
        row = next((row for row in devices if row["name"] == name), None)
    if row is None:
        return {}, ""
    words = f"{row['name']}, {WORDS[row['level']]}" if type == "cpu" else row["name"]
    return {tuple(call["kin"]): [_point(point, row["date"]) for point in call["points"]] for call in row["calls"]}, words


def _point(point: Any, date: str) -> Point:
    sizes, candidates = point
    return Point(tuple(sizes), tuple(Candidate(backend, form, us) for backend, form, us in candidates), date)


def row_of(device: Device, date: str, points: dict[tuple[Any, ...], list[Point]]) -> dict[str, Any]:
    """A device's row of the file."""
    calls = [
        {
            "kin": list(kin),
            "points": [[list(p.sizes), [[c.backend, c.form, c.us] for c in p.candidates]] for p in sorted(own)],
        }
        for kin, own in sorted(points.items(), key=str)
    ]
    return {"type": device.type, "name": device.name, "level": device.level, "date": date, "calls": calls}
