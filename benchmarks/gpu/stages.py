"""Commands one after another within a time: what is finished is not run again, and what fails or takes too long stops nothing.

After every stage the folder of results holds all there is; its `stages.json` is the memory of a later run.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..measure.results import last_line

ROOT = Path(__file__).resolve().parent.parent.parent  # in a checkout
STATE = "stages.json"
LEAST_MINUTES = 0.5  # a stage that would get less is left out, in a day of full length
BEGIN_SECONDS = 8.0  # of its time, that a command is not told of: to import torch, and to end
TOOLS = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"))
STOPS = ((signal.SIGINT, 20.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))  # and the seconds to end by itself after each
FINISHED, FAILED, TIMED_OUT, LEFT_OUT = "finished", "failed", "timed out", "left out"


@dataclass(frozen=True)
class Stage:
    """`command` starts in the checkout; "{folder}" in it is the folder of results, "{seconds}" and "{minutes}" what it may take.
    What it prints goes to `log`."""

    name: str
    command: tuple[str, ...]
    minutes: float  # at most, unless it was cut short before
    leaves: str  # its file: in the folder, or anywhere by an absolute path
    drops: tuple[str, ...] = ()  # files that follow from `leaves`
    environment: Mapping[str, str] = field(default_factory=dict)  # "{folder}" as in the command
    tool: str = ""  # the program that it needs beside Python

    @property
    def log(self) -> str:
        return f"{self.name}.txt"


@dataclass(frozen=True)
class Outcome:
    """How a stage ended, and the minutes that it took."""

    status: str
    reason: str = ""
    minutes: float = 0.0


Execute = Callable[[Stage, Path, float], "int | None"]


def execute(stage: Stage, folder: Path, seconds: float) -> int | None:
    """The exit status, or None if the command was stopped because its time was up. OSError if it cannot be started."""
    told = max(seconds / 2, seconds - BEGIN_SECONDS)
    command = [part.format(folder=folder, seconds=f"{told:.0f}", minutes=f"{told / 60:.3f}") for part in stage.command]
    environment = {name: value.format(folder=folder) for name, value in stage.environment.items()}
    with (folder / stage.log).open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | {"PATH": TOOLS} | environment,
            preexec_fn=_heed_interrupts,
            start_new_session=True,  # signals reach its children, and Ctrl-C here does not
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _stop(process)


def _heed_interrupts() -> None:
    """A shell's background job ignores Ctrl-C, and so would its children; here it is how a stage is asked to end."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """First as Ctrl-C would, so that it can write what it has."""
    if process.poll() is not None:
        return
    for number, patience in STOPS:
        with suppress(ProcessLookupError):  # the last one is for children that outlive it
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def walk(
    stages: Sequence[Stage],
    folder: Path,
    minutes: float,
    *,
    again: bool = False,
    scale: float = 1.0,
    now: Callable[[], float] = time.monotonic,
    execute: Execute = execute,
    keep: Callable[[Stage, dict[str, Outcome]], None] = lambda stage, outcomes: None,
) -> dict[str, Outcome]:
    """Runs what is not finished, in this order but the never tried first; the outcomes of this run and of earlier ones.

    `again` forgets the stages, and removes what they left. `scale` shortens what each may take, for a short day. `keep` gets the
    stage that ended and all outcomes so far.
    """
    start, outcomes = now(), recall(folder)
    for stage in stages if again else ():
        outcomes.pop(stage.name, None)
        (folder / stage.leaves).unlink(missing_ok=True)
    tried = {name for name, outcome in outcomes.items() if outcome.status != LEFT_OUT}
    for stage in sorted(stages, key=lambda stage: stage.name in tried):
        before = outcomes.get(stage.name)
        if before and before.status == FINISHED and (folder / stage.leaves).is_file():
            continue
        left = minutes - (now() - start) / 60
        limit = left if before and before.status == TIMED_OUT else min(scale * stage.minutes, left)
        obstacle = _obstacle(stage, limit, scale * LEAST_MINUTES)
        if not obstacle:
            began = now()
            status, reason = _attempt(stage, folder, limit, execute)
            outcomes[stage.name] = Outcome(status, reason, round((now() - began) / 60, 2))
            _tidy(stage, folder, status)
        elif stage.name not in tried:  # else what is known of it stays
            outcomes[stage.name] = Outcome(LEFT_OUT, obstacle)
        (folder / STATE).write_text(json.dumps({name: asdict(o) for name, o in outcomes.items()}, indent=1) + "\n")
        keep(stage, outcomes)
    return outcomes


def recall(folder: Path) -> dict[str, Outcome]:
    """The outcomes of earlier runs; none if there is no file.

    Raises:
        ValueError: if the file is not one of this program's.
    """
    file = folder / STATE
    if not file.is_file():
        return {}
    try:
        return {name: Outcome(**outcome) for name, outcome in json.loads(file.read_text()).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{file} does not hold the stages of an earlier run ({error}): remove it to start anew") from error


def _obstacle(stage: Stage, limit: float, least: float) -> str:
    if stage.tool and not shutil.which(stage.tool, path=TOOLS):
        return f"{stage.tool} is not installed"
    return "no time was left" if limit < least else ""


def _attempt(stage: Stage, folder: Path, limit: float, execute: Execute) -> tuple[str, str]:
    (folder / stage.leaves).parent.mkdir(parents=True, exist_ok=True)
    try:
        code = execute(stage, folder, 60 * limit)
    except OSError as error:
        return FAILED, f"cannot start {stage.command[0]}: {error.strerror}"
    if code is None:
        return TIMED_OUT, f"stopped after {limit:.1f} minutes"
    if code:
        return FAILED, f"exit code {code}: {last_line(folder / stage.log)}"
    if not (folder / stage.leaves).is_file():
        return FAILED, f"it left no {stage.leaves}"
    return FINISHED, ""


def _tidy(stage: Stage, folder: Path, status: str) -> None:
    """Only what somebody reads stays: the log of a stage that leaves something else, where it did not finish."""
    for name in stage.drops:
        (folder / name).unlink(missing_ok=True)
    if status == FINISHED and stage.log != stage.leaves:
        (folder / stage.log).unlink(missing_ok=True)
