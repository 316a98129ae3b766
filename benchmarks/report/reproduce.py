"""The commands that measure the same again, and that make the report from its file."""

from __future__ import annotations

import shlex
from typing import Any

from ..measure.case import QUICK_RESTARTS, RESTARTS
from ..measure.environment import VARIABLES
from ..measure.results import Results

CHANGED = "+changes"  # see environment.git_sha


def commands(results: Results) -> list[str]:
    """Of every run that the results come from, then of the report."""
    here = results.environment
    parts = results.options.get("parts") or [results.options | {"suites": results.suites(), "git": here.get("git")}]
    found, at = [], None
    for part in parts:
        if part["git"] and part["git"] != at:
            at = part["git"]
            found.append(
                f"git checkout {at.removesuffix(CHANGED)}" + ("  # and changes that were not committed" if CHANGED in at else "")
            )
        found.append(_bench(part, here, results))
    return [*found, "python -m fastseq bench --json-in bench-results/*/results.json"]


def _bench(part: dict[str, Any], here: dict[str, Any], results: Results) -> str:
    """With the threads and variables that were in force, whether or not they were options."""
    flags = part.get("flags", here.get("flags", {}))
    words = [f"{name}={shlex.quote(str(value))}" for name, value in flags.items() if name.startswith(VARIABLES) and value]
    words += ["python -m fastseq bench", *(f"--suite {name}" for name in part["suites"]), f"--device {here.get('device', 'cpu')}"]
    if part.get("dtype", "float32") != "float32":
        words.append(f"--dtype {part['dtype']}")
    threads = part.get("threads") or sorted({row.threads for row in results.rows if row.suite in part["suites"]})
    if threads and here.get("device", "cpu") == "cpu":
        words.append(f"--threads {','.join(map(str, threads))}")
    words += [f"--{extent}" for extent in ("quick", "full") if part.get(extent)]
    usual = QUICK_RESTARTS if part.get("quick") else RESTARTS
    if part.get("restarts", usual) != usual:
        words.append(f"--restarts {part['restarts']}")
    return " ".join(words)
