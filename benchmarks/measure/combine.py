"""Several result files of one device and one version as one result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .results import Results


def load(files: Sequence[Path]) -> Results:
    """Raises ValueError if a file is none of this benchmark's, or if they do not belong together."""
    every = [Results.load(file) for file in files]
    for file, results in zip(files[1:], every[1:], strict=True):
        _same(files[0], every[0], file, results)
    _disjoint(files, every)
    return every[0] if len(every) == 1 else _together(every)


def _same(first_file: Path, first: Results, file: Path, other: Results) -> None:
    for what in ("device name", "device"):
        a, b = first.environment.get(what), other.environment.get(what)
        if a != b:
            raise ValueError(f"--json-in: different devices in one report: {first_file} is from {a}, {file} from {b}")
    versions, others = (r.environment.get("versions", {}) for r in (first, other))
    for name in sorted(versions.keys() | others.keys()):
        if versions.get(name) != others.get(name):
            raise ValueError(
                f"--json-in: different versions in one report: {first_file} has {name} {versions.get(name)}, "
                f"{file} has {name} {others.get(name)}"
            )


def _disjoint(files: Sequence[Path], every: Sequence[Results]) -> None:
    seen: dict[Any, Path] = {}
    for file, results in zip(files, every, strict=True):
        for row in results.rows:
            if row.key in seen and seen[row.key] != file:
                point = f"{row.provider} {row.mode} T={row.T} B={row.B} H={row.H}"
                raise ValueError(
                    f"--json-in: {seen[row.key]} and {file} both have {point} of the suite {row.suite}: give one of them"
                )
            seen[row.key] = file


def _together(every: Sequence[Results]) -> Results:
    first = every[0]
    environment = dict(first.environment)
    for name in ("time", "git"):
        values = [str(r.environment[name]) for r in every if name in r.environment]
        if values:
            environment[name] = ", ".join(dict.fromkeys(values))
    shares = [r.environment["cpu used by others"] for r in every if "cpu used by others" in r.environment]
    if shares:
        environment["cpu used by others"] = max(shares)
    options: dict[str, Any] = {name: any(r.options.get(name) for r in every) for name in ("quick", "full")}
    options["restarts"] = max(r.options.get("restarts", 1) for r in every)
    options["parts"] = [
        r.options | {"suites": r.suites(), "git": r.environment.get("git"), "flags": r.environment.get("flags", {})}
        for r in every
    ]
    if any(r.options.get("interrupted") for r in every):
        options["interrupted"] = True
    peaks = {(p.device, p.threads, p.dtype): p for r in every for p in r.peaks}
    rows = [row for r in every for row in r.rows]
    return Results(environment, options, rows, list(peaks.values()), sum(r.seconds for r in every))
