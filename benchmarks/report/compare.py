"""`python -m fastseq bench compare OLD NEW`: what a second run measured faster, slower, or the same within the noise.

A row's times lie between their 20 % and 80 % quantiles, and between the medians of all processes where there were
several. Two rows are the same where these intervals overlap. A row whose timing was contended decides nothing. Where both rows
have a speed-up over the same program of others, measured in turn with them, that must have moved in the same direction: it
does not see a clock that was slower on one of the two days.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from ..measure import environment
from ..measure.results import Results, Row
from .model import Cell, Table, time_cell
from .terminal import rich_table

SAME, FASTER, SLOWER, CONTENDED = "same", "faster", "slower", "contended"
FOUND, LOST, NEITHER = "has a time now", "has no time now", "no time in either"
ONLY_OLD, ONLY_NEW = "only in OLD", "only in NEW"
# In the order of the table: what matters most stands last, above the summary.
TONES = {ONLY_OLD: "weak", NEITHER: "weak", SAME: "weak", ONLY_NEW: "", CONTENDED: ""}
TONES |= {FOUND: "good", FASTER: "good", LOST: "bad", SLOWER: "bad"}
WORSE = (LOST, SLOWER)
OWN = "fastseq"


@dataclass(frozen=True)
class Change:
    """A row of either file or of both. `speed` is the old time over the new one, with the ends of its interval."""

    verdict: str
    old: Row | None
    new: Row | None
    speed: tuple[float, float, float] | None = None
    reason: str = ""

    @property
    def row(self) -> Row:
        row = self.new or self.old
        assert row
        return row

    @property
    def own(self) -> bool:
        return self.row.provider.startswith(OWN)


def notes(old: Results, new: Results) -> list[str]:
    """What else differs, and what else speaks against the figures."""
    found = environment.differences(old.environment, new.environment, ("git", "versions", "flags", "gpu", "cpu"))
    for which, results in (("old", old), ("new", new)):
        quick = results.options.get("quick") and "a quick run: fewer repetitions"
        interrupted = results.options.get("interrupted") and "it was interrupted"
        said = (environment.busy({"cpu": {}} | results.environment), quick, interrupted)
        found += [f"{which}: {sentence}" for sentence in said if sentence]
    return found


def changes(old: Results, new: Results) -> list[Change]:
    """One for every row of either file, in the order of TONES and within it of NEW."""
    before, after = ({row.key: row for row in results.rows} for results in (old, new))
    same_others = _torch(old) == _torch(new)
    found = [_change(before.get(key), after.get(key), same_others) for key in {**after, **before}]
    return sorted(found, key=lambda change: list(TONES).index(change.verdict))


def _change(old: Row | None, new: Row | None, same_others: bool) -> Change:
    if old is None or new is None:
        return Change(ONLY_NEW if old is None else ONLY_OLD, old, new)
    if not (old.ok and old.time and new.ok and new.time):
        verdict = FOUND if new.ok and new.time else LOST if old.ok and old.time else NEITHER
        return Change(verdict, old, new, reason=f"{new.status}: {new.reason}" if not new.ok else "")
    (then_low, then_high), (now_low, now_high) = old.interval, new.interval
    speed = then_low / now_high, old.seconds / new.seconds, then_high / now_low
    doubts = [f"{which}: {row.contended}" for which, row in (("old", old), ("new", new)) if row.contended]
    if doubts:
        return Change(CONTENDED, old, new, speed, "; ".join(doubts))
    verdict = _direction(speed[0], speed[2])
    moved = _against_others(old, new) if same_others else None
    if moved is None or moved == verdict:
        return Change(verdict, old, new, speed)
    assert new.ratio
    return Change(SAME, old, new, speed, f"{new.ratio['baseline']} moved alike" if verdict != SAME else "")


def _direction(low: float, high: float) -> str:
    return FASTER if low > 1 else SLOWER if high < 1 else SAME


def _against_others(old: Row, new: Row) -> str | None:
    """How the speed-up over somebody else's program moved; None without one in both."""
    if not old.ratio or not new.ratio or old.ratio["baseline"] != new.ratio["baseline"] or new.ratio["baseline"].startswith(OWN):
        return None
    (then_low, then_high), (now_low, now_high) = old.ratio_interval, new.ratio_interval
    return _direction(now_low / then_high, now_high / then_low)


def _torch(results: Results) -> str | None:
    return results.environment.get("versions", {}).get("torch")


def table(found: Sequence[Change]) -> Table:
    details = _varying(change.row for change in found)
    body: list[list[Cell | str]] = []
    for c in found:
        speed = ["–", "–"] if c.speed is None else [f"{c.speed[1]:.2f}×", f"{c.speed[0]:.2f}–{c.speed[2]:.2f}"]
        point = [c.row.suite, c.row.provider, _point(c.row, details[c.row.suite])]
        body.append([*point, time_cell(c.old), time_cell(c.new), *speed, Cell(c.verdict, TONES[c.verdict]), c.reason])
    columns = ["suite", "provider", "point", "old", "new", "speed", "between", "verdict", ""]
    note = "Speed: the old time over the new one; between: with both times at the worse and the better end of their intervals."
    return Table(f"{len(found)} rows", columns, body, note)


def _varying(rows: Iterable[Row]) -> dict[str, list[str]]:
    """By suite, the details that tell its rows apart."""
    values: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for row in rows:
        for key, value in row.particulars.items():
            values[row.suite][key].add(str(value))
    return defaultdict(list, {s: [k for k, seen in d.items() if len(seen) > 1] for s, d in values.items()})


def _point(row: Row, details: list[str]) -> str:
    sizes = f"{row.group} {row.function} {row.mode} T={row.T} B={row.B} H={row.H} {row.dtype} threads={row.threads}"
    told = [f"{key}={row.particulars.get(key)}" for key in details]
    return " ".join([sizes, *(["packed"] if row.packed else []), *told])


def summary(found: Sequence[Change]) -> list[str]:
    own = Counter(change.verdict for change in found if change.own)
    counted = ", ".join(f"{own[verdict]} {verdict}" for verdict in reversed(TONES) if own[verdict])
    said = [f"rows of {OWN}: {counted or 'none'}"]
    others = [change.speed[1] for change in found if change.speed and not change.own]
    if others:
        said.append(
            f"programs of others, which tell how far the machine moved: {np.median(others):.2f}×, median of {len(others)} rows"
        )
    return said


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m fastseq bench compare",
        description=__doc__,
        epilog="exit code: 0; 1 with --fail-on-slower if a row of fastseq is slower or has lost its time; 2 if a file cannot be "
        "read or the runs cannot be compared",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("old", metavar="OLD", type=Path, help="a results.json")
    p.add_argument("new", metavar="NEW", type=Path, help="another one, of the same device")
    p.add_argument(
        "--fail-on-slower", action="store_true", help="exit with 1 if a row of fastseq is slower or has no time any more"
    )
    return p


def main(argv: Sequence[str] | None, console: Console) -> int:
    """0, 1 or 2: see `parser`."""
    p = parser()
    args = p.parse_args(argv)
    try:
        old, new = Results.load(args.old), Results.load(args.new)
    except ValueError as error:
        p.error(str(error))
    differing = environment.conflicts(old.environment, new.environment)
    if differing:
        p.error(f"{args.old} and {args.new} cannot be compared: {'; '.join(differing)}")
    found = changes(old, new)
    console.print(rich_table(table(found)))
    for line in notes(old, new):
        console.print(Text(line, "yellow"))
    for line in summary(found):
        console.print(Text(line, "bold"))
    return int(args.fail_on_slower and any(change.own and change.verdict in WORSE for change in found))
