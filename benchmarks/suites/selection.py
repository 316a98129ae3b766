"""--only: which points of a suite to run, as in "cell=GRU B=8,32 threads=1"."""

from __future__ import annotations

from dataclasses import replace

from ..measure.case import Case, Participant

Wanted = dict[str, set[str]]


def _values(case: Case, participant: Participant) -> dict[str, str]:
    w = participant.workload
    return {
        "cell": w.function,
        "group": case.group,
        "mode": w.mode,
        "provider": participant.provider.lower().replace("_", " "),
        "T": str(w.T),
        "B": str(w.B),
        "H": str(w.H),
        "E": str(w.H // w.heads),
        "precision": w.precision,
        "threads": str(w.threads),
    }


KEYS = ("cell", "group", "mode", "provider", "precision", "T", "B", "H", "E", "threads")


def parse(text: str) -> Wanted:
    """Raises ValueError, naming the part that is wrong. Spaces in a provider's name are written as "_"."""
    wanted: Wanted = {}
    for part in text.split():
        key, equals, values = part.partition("=")
        key = {k.lower(): k for k in KEYS}.get(key.lower(), key)
        if key not in KEYS:
            raise ValueError(f"--only: unknown key {key!r} in {part!r}; known: {', '.join(KEYS)}")
        chosen = {v.lower().replace("_", " ") for v in values.split(",") if v}
        if not equals or not chosen:
            raise ValueError(f"--only: {part!r} is not of the form key=value[,value...]")
        wanted[key] = chosen
    if not wanted:
        raise ValueError('--only: nothing given; an example: --only "cell=GRU B=8 threads=1"')
    return wanted


def select(cases: list[Case], wanted: Wanted) -> list[Case]:
    """Cases with the participants that match, and their baselines. Raises ValueError if nothing is left."""
    kept = []
    for case in cases:
        matching = {
            p.provider for p in case.participants if all(_values(case, p)[key] in values for key, values in wanted.items())
        }
        baselines = {base for name, base in case.baseline if name in matching}
        participants = tuple(p for p in case.participants if p.provider in matching | baselines)
        if matching:
            kept.append(replace(case, participants=participants))
    if not kept:
        have: dict[str, set[str]] = {key: set() for key in wanted}
        for case in cases:
            for p in case.participants:
                for key in wanted:
                    have[key].add(_values(case, p)[key])
        listed = "; ".join(f"{key}: {', '.join(sorted(v, key=lambda s: (len(s), s)))}" for key, v in have.items())
        raise ValueError(f"--only: no point matches; these exist: {listed}")
    return kept
