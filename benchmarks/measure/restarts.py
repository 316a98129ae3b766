"""Headlines measured again in further processes: a figure of one process holds that process's luck.

Where its memory lies, how its code is aligned and which processor its threads began on stay as they are for as long as a
process lives, so that rounds within it agree on a figure that the next process may not find. A headline's time is the median
over processes of each one's median, its speed-up the median of the speed-ups within each; both keep what each process found.
What else a row holds is of the first process.

`python -m fastseq.benchmarks.suites.restart REQUEST ANSWER` is such a process; `measure` starts it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..providers import custom as own
from ..roofline.peaks import Peaks
from . import environment
from .case import Case, Options
from .check import forget_references
from .contention import Contention
from .results import Results, Row, last_line
from .runner import Runner

COMMAND = (sys.executable, "-m", "fastseq.benchmarks.suites.restart")
HERE = str(Path(__file__).resolve().parent.parent)
STEP, DONE = "step ", "case measured"  # lines that a process prints
NOT_KNOWN = "added by add_provider, which another process does not know"
PATIENCE = 5.0  # seconds that a process has to end by itself


@dataclass
class Restarts:
    """What each process found of a row: seconds, and speed-ups; median and quantiles over its rounds."""

    medians: list[float] = field(default_factory=list)
    lows: list[float] = field(default_factory=list)
    highs: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    ratio_lows: list[float] = field(default_factory=list)
    ratio_highs: list[float] = field(default_factory=list)
    missing: str | None = None  # why there are no more

    @classmethod
    def of(cls, row: Row) -> Restarts:
        """Of a row that has a time: one process, unless it tells more."""
        if row.restarts:
            return cls(**{f.name: row.restarts[f.name] for f in fields(cls)})
        return cls().with_row(row)

    def with_row(self, row: Row) -> Restarts:
        """And one process more."""
        assert row.time
        more = {"medians": row.time["median"], "lows": row.time["low"], "highs": row.time["high"]}
        if row.ratio:
            more |= {"ratios": row.ratio["median"], "ratio_lows": row.ratio["low"], "ratio_highs": row.ratio["high"]}
        grown: dict[str, Any] = {name: [*getattr(self, name), value] for name, value in more.items()}
        return replace(self, **grown)

    def as_dict(self) -> dict[str, Any]:
        """With the number of processes, and in medians how far they lie apart and the rounds usually do within one."""
        return {
            "count": len(self.medians),
            **asdict(self),
            "between": _between(self.medians),
            "within": _within(self.medians, self.lows, self.highs),
            "ratio_between": _between(self.ratios),
            "ratio_within": _within(self.ratios, self.ratio_lows, self.ratio_highs),
        }


def _between(medians: list[float]) -> float | None:
    return (max(medians) - min(medians)) / float(np.median(medians)) if len(medians) > 1 else None


def _within(medians: list[float], lows: list[float], highs: list[float]) -> float | None:
    spreads = [(high - low) / middle for middle, low, high in zip(medians, lows, highs, strict=True)]
    return float(np.median(spreads)) if spreads else None


def _over(values: list[float]) -> dict[str, float]:
    return dict(zip(("low", "median", "high"), np.quantile(values, (0.2, 0.5, 0.8)).tolist(), strict=True))


def join(row: Row, again: Row) -> None:
    """Adds what another process found. A wrong result there makes the row wrong, and a row that is wrong stays it."""
    if not (row.ok and row.time):
        return
    found = Restarts.of(row)
    number = len(found.medians) + 1
    if again.status == "wrong":
        row.status, row.reason, row.check = "wrong", f"process {number}: {again.reason}", again.check
        row.time = row.first = row.graph = row.host = row.ratio = row.memory = row.kept = row.roofline = None
        row.restarts = row.contention = None
    elif not again.time:
        row.restarts = replace(found, missing=f"process {number}: {again.status}, {again.reason}").as_dict()
    else:
        found = replace(found.with_row(again), missing=None)
        rounds, fastest = row.time["rounds"] + again.time["rounds"], min(row.time["fastest"], again.time["fastest"])
        row.time = row.time | _over(found.medians) | {"fastest": fastest, "rounds": rounds}
        if row.ratio and again.ratio:
            row.ratio = row.ratio | _over(found.ratios)
        row.restarts, row.contention = found.as_dict(), _contention(row.contention, again.contention, number)


def _contention(one: dict[str, Any] | None, other: dict[str, Any] | None, number: int) -> dict[str, Any] | None:
    """The worst of the processes before and this one, and whatever is said of either; clocks are those of the first."""
    if not other:
        return one
    found = dict(one or Contention().as_dict())
    for name in ("others", "throttled"):
        found |= {name: max((c[name] for c in (found, other) if c[name] is not None), default=None)}
    for name in ("redone", "contended"):
        said = [found[name], other[name] and f"process {number}: {other[name]}"]
        found |= {name: "; ".join(words for words in said if words) or None}
    return found | {"reasons": found["reasons"] or other["reasons"]}


def count(case: Case, rows: dict[Any, Row]) -> int:
    """The processes that have measured a case; 0 if none of its rows has a time that another process could measure."""
    found = [rows[key] for key in _keys(case) if key in rows]
    return max((row.restarts["count"] if row.restarts else 1 for row in found if row.ok and row.time), default=0)


def lacking(cases: Sequence[Case], results: Results, number: int) -> list[Case]:
    """Headlines that fewer than `number` processes have measured, of those that have a time at all."""
    rows = {row.key: row for row in results.rows}
    return [case for case in cases if case.headline and 0 < count(case, rows) < number]


def left(cases: Sequence[Case], results: Results, options: Options) -> int:
    """How many times a case is still to be measured by further processes; one not measured yet is thought to get a time."""
    rows = {row.key: row for row in results.rows}
    counts = [1 if rows.keys().isdisjoint(case.keys()) else count(case, rows) for case in cases if case.headline]
    return sum(max(0, options.restarts - n) for n in counts if n)


def _keys(case: Case) -> set[tuple[Any, ...]]:
    known = tuple(p for p in case.participants if not own.added(p.provider))
    return replace(case, participants=known).keys()


def measure(
    cases: Sequence[Case],
    results: Results,
    options: Options,
    tell: Callable[[str], None] = lambda step: None,
    advance: Callable[[], None] = lambda: None,
    keep: Callable[[], None] = lambda: None,
) -> None:
    """Fresh processes until every headline has `options.restarts` of them, or one fails; the rows get the reason.

    `keep` follows each.
    """
    for number in range(2, options.restarts + 1):
        wanted = lacking(cases, results, number)
        if not wanted:
            continue
        tell(f"process {number}")
        failure = _start(wanted, results, options, tell, advance)
        for case in lacking(cases, results, options.restarts) if failure else lacking(wanted, results, number):
            _note(case, results, failure)
        keep()
        if failure:
            return


def _note(case: Case, results: Results, failure: str | None) -> None:
    """Why a case was measured in fewer processes, in its rows, unless these tell more already."""
    every, known = case.keys(), _keys(case)
    for row in results.rows:
        if row.ok and row.time and row.key in every:
            found = Restarts.of(row)
            reason = failure or found.missing or "the other process did not measure it"
            row.restarts = replace(found, missing=reason if row.key in known else NOT_KNOWN).as_dict()


def _start(
    cases: list[Case], results: Results, options: Options, tell: Callable[[str], None], advance: Callable[[], None]
) -> str | None:
    """One process, ended whatever happens; what it had measured by then joins the rows. Why it failed, or None."""
    if options.device.startswith("cuda"):
        torch.cuda.empty_cache()  # the other process has the whole memory but for this one's context
    with tempfile.TemporaryDirectory() as folder:
        request, answer, errors = (Path(folder) / name for name in ("request.json", "answer.json", "errors.txt"))
        request.write_text(json.dumps(_request(cases, results, options)))
        try:
            with errors.open("w") as log, Process((*COMMAND, str(request), str(answer)), log) as process:
                assert process.stdout
                for line in process.stdout:
                    if line.startswith(STEP):
                        tell(f"again, {line.removeprefix(STEP).rstrip()}")
                    elif line.rstrip() == DONE:
                        advance()
            status = process.returncode
        finally:
            different = _join(cases, results, answer)
        if different:
            return different
        return f"the process ended with {status}: {last_line(errors)}" if status else None


class Process(subprocess.Popen[str]):
    """In the same group as this one, so that Ctrl-C and whoever stops this process reach both; ended on leaving the block."""

    def __init__(self, command: Sequence[str], log: Any) -> None:
        super().__init__(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True)

    def __exit__(self, *error: Any) -> None:
        if error[0]:
            self.terminate()
            try:
                self.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.kill()
        super().__exit__(*error)


def _request(cases: list[Case], results: Results, options: Options) -> dict[str, Any]:
    return {
        "here": HERE,
        "options": asdict(options),
        "torch threads": torch.get_num_threads(),
        "suites": list(dict.fromkeys(case.suite for case in cases)),
        "keys": [key for case in cases for key in _keys(case)],
        "peaks": [peaks.as_dict() for peaks in results.peaks],
    }


def _join(cases: list[Case], results: Results, answer: Path) -> str | None:
    """Why the answer cannot be used, if it cannot."""
    if not answer.is_file():
        return None
    found = Results.load(answer)
    differing = environment.otherwise(results.environment, found.environment)
    if differing:
        return f"the process ran under other conditions: {'; '.join(differing)}"
    rows, again = {row.key: row for row in results.rows}, {row.key: row for row in found.rows}
    for case in cases:
        if again.keys().isdisjoint(case.keys()):
            continue
        mine = [rows[key] for key in case.keys() if key in rows]
        for row in mine:
            if row.key in again:
                join(row, again[row.key])
            elif row.ok and row.time:
                row.restarts = replace(Restarts.of(row), missing=NOT_KNOWN).as_dict()
        wrong = {row.provider for row in mine if row.status == "wrong"}
        for row in mine:
            if row.ratio and row.ratio["baseline"] in wrong:
                row.ratio = None
                row.restarts = replace(Restarts.of(row), ratios=[], ratio_lows=[], ratio_highs=[]).as_dict()
    return None


Plan = Callable[[Sequence[str], Options], list[Case]]  # of suites, by their names


def planned(request: dict[str, Any], options: Options, plan: Plan) -> list[Case]:
    """The cases that are asked for, with the participants that are."""
    wanted = {tuple(key) for key in request["keys"]}
    found = []
    for case in plan(request["suites"], options):
        kept = tuple(p for p in case.participants if replace(case, participants=(p,)).keys() <= wanted)
        if kept:
            found.append(replace(case, participants=kept))
    return found


def main(argv: Sequence[str], plan: Plan) -> int:
    """0: the answer has a row for every key; 2: this is not the package that asks; 130: interrupted, it has those measured."""
    request, answer = json.loads(Path(argv[0]).read_text()), Path(argv[1])
    if request["here"] != HERE:
        print(f"another process finds another fastseq, in {HERE} and not in {request['here']}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    torch.set_num_threads(request["torch threads"])
    options = Options(**request["options"] | {"threads": tuple(request["options"]["threads"])})
    results = Results(environment.collect(options.device), {})
    runner = Runner(options.device, quick=options.quick)
    runner.peaks = {(peaks.threads, peaks.dtype): peaks for peaks in map(Peaks.from_dict, request["peaks"])}
    try:
        for case in planned(request, options, plan):
            results.rows += runner.run(case, lambda step: print(f"{STEP}{step}", flush=True))
            results.save(answer)  # whole at any time: whoever ends this process keeps what was measured
            print(DONE, flush=True)
    except (KeyboardInterrupt, BrokenPipeError):  # the process that asked is stopped, or gone
        return 130
    finally:
        forget_references()
        runner.close()
    return 0
