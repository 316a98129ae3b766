"""What an answer to a claim consists of: lines in panels, parts of an answer, crossovers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ..measure.results import DOUBTFUL
from .model import bytes_text, time_text

NOT_MEASURED = "not measured"
HOLDS, PARTLY, FAILS, UNDECIDED, INCONCLUSIVE = "holds", "partly", "fails", "undecided", "inconclusive"
WORDS = 12  # of a verdict in brief
BRIEF = {HOLDS: "holds", PARTLY: "partly", FAILS: "fails", UNDECIDED: "undecided", INCONCLUSIVE: "inconclusive"}
FORMATS: dict[str, Callable[[float], str]] = {
    "seconds": time_text,
    "bytes": bytes_text,
    "share": lambda v: f"{v:.0%}",
    "number": lambda v: f"{v:.3g}",
}


@dataclass(frozen=True)
class Line:
    """y over x; `spread` holds the 20 % and 80 % quantiles where there are any; at `doubtful` x it decides nothing."""

    name: str
    values: dict[float, float]
    spread: dict[float, tuple[float, float]] = field(default_factory=dict)
    color: str | None = None
    dashed: bool = False
    doubtful: frozenset[float] = frozenset()
    timed: bool = False  # whether its values are times, which a busy machine spoils

    @property
    def firm(self) -> dict[float, float]:
        return {x: y for x, y in self.values.items() if x not in self.doubtful}

    def __bool__(self) -> bool:
        return bool(self.values)


@dataclass(frozen=True)
class Panel:
    """Lines in one picture; `unit` is a name in FORMATS."""

    title: str
    lines: tuple[Line, ...]
    unit: str = "seconds"
    x_label: str = "T, sequence length"
    log: bool = True

    def words(self) -> str:
        """The picture for those who do not see it: the ends of every line."""
        form, letter = FORMATS[self.unit], self.x_label.partition(",")[0]
        ends = [
            f"{line.name} from {form(line.values[min(line.values)])} at {letter} = {min(line.values):g} "
            f"to {form(line.values[max(line.values)])} at {letter} = {max(line.values):g}"
            for line in self.lines
            if line
        ]
        return f"{self.title}, over {self.x_label}: {'; '.join(ends)}."


@dataclass(frozen=True)
class Part:
    """One answer, `about` what if the claim has several."""

    state: str
    text: str
    about: str = ""

    def __str__(self) -> str:
        return f"{self.about}: {self.text}" if self.about else self.text


@dataclass(frozen=True)
class Meeting:
    """Where the lower one of two lines changes: `low` to `high` is the interval in which it is open who is lower."""

    first: str  # lower up to there
    second: str  # lower from there on
    at: float
    low: float
    high: float
    about: str = ""
    letter: str = "T"

    def __str__(self) -> str:
        what = f"{self.about}: " if self.about else ""
        where = f"{self.letter} ≈ {self.at:.0f} ({self.low:.0f}…{self.high:.0f})"
        return f"{what}{self.first} lower up to {where}, {self.second} beyond"


@dataclass(frozen=True)
class Finding:
    """What the rows of one size say to a claim."""

    sizes: str
    parts: tuple[Part, ...]
    figures: str  # the numbers that it follows from
    meetings: tuple[Meeting, ...] = ()
    panels: tuple[Panel, ...] = ()

    @property
    def doubt(self) -> str:
        """Why nothing follows from its rows, if so: too many of the times behind it were contended or noisy."""
        timed = {id(a): a for panel in self.panels for a in panel.lines if a.timed}.values()
        count, doubtful = sum(len(a.values) for a in timed), sum(len(a.doubtful) for a in timed)
        return f"{doubtful} of {count} times were contended or noisy" if doubtful > DOUBTFUL * count else ""

    @property
    def void(self) -> bool:
        """Whether it has no answer at all, and so no figures to go with it."""
        return bool(self.doubt) or all(part.state == INCONCLUSIVE for part in self.parts)

    @property
    def verdict(self) -> str:
        return f"{INCONCLUSIVE}: {self.doubt}" if self.doubt else "; ".join(map(str, self.parts))

    @property
    def state(self) -> str:
        return INCONCLUSIVE if self.doubt else together(part.state for part in self.parts)

    @property
    def crossovers(self) -> tuple[Meeting, ...]:
        return () if self.doubt else self.meetings

    def as_dict(self) -> dict[str, Any]:
        return {
            "sizes": self.sizes,
            "verdict": self.verdict,
            "state": self.state,
            "figures": self.figures,
            "crossovers": [
                {"about": m.about, "lower before": m.first, "lower after": m.second, "of": m.letter}
                | {"at": m.at, "low": m.low, "high": m.high}
                for m in self.crossovers
            ],
            "lines": [
                {
                    "panel": p.title,
                    "x": p.x_label,
                    "unit": p.unit,
                    "name": a.name,
                    "points": [[x, y] for x, y in a.values.items()],
                }
                for p in self.panels
                for a in p.lines
                if a
            ],
        }


def together(states: Iterable[str]) -> str:
    """One state for several answers: what all of them say, else that it holds in part; an undecided one changes nothing.

    Where one is inconclusive, so are all of them together.
    """
    found = set(states) - {UNDECIDED}
    if INCONCLUSIVE in found:
        return INCONCLUSIVE
    return found.pop() if len(found) == 1 else PARTLY if found else UNDECIDED


@dataclass(frozen=True)
class Verdict:
    claim: str
    statement: str
    experiment: str
    device: str
    findings: tuple[Finding, ...]  # one for each size that was measured; none: not measured
    missing: tuple[str, ...]  # suites that would say more and were not run

    @property
    def measured(self) -> bool:
        return bool(self.findings)

    @property
    def state(self) -> str:
        return together(finding.state for finding in self.findings) if self.findings else NOT_MEASURED

    @property
    def verdict(self) -> str:
        if not self.findings:
            return f"{NOT_MEASURED} in this run: {self.advice}" if self.missing else f"{NOT_MEASURED}: its rows are missing"
        if len(self.findings) == 1:
            return self.findings[0].verdict
        return "; ".join(f"{finding.sizes}: {finding.verdict}" for finding in self.findings)

    @property
    def brief(self) -> str:
        """In a dozen words."""
        doubts = [finding.doubt for finding in self.findings if finding.doubt]
        if doubts:
            return doubts[0]
        parts = [part for finding in self.findings for part in finding.parts]
        if len(parts) == 1:
            text = parts[0].text.removeprefix(f"{INCONCLUSIVE}, ").partition(" (")[0]
            shorter = (text, text.partition(": ")[0], BRIEF[parts[0].state])
            return next(words for words in shorter if len(words.split()) <= WORDS)
        of_state = {state: [part for part in parts if part.state == state] for state in BRIEF}
        told = [f"{', '.join(p.about for p in of)}: {BRIEF[state]}" for state, of in of_state.items() if of]
        if len(self.findings) == 1 and len(" ".join(told).split()) <= WORDS:
            return "; ".join(told)
        return ", ".join(f"{len(of)} {BRIEF[state]}" for state, of in of_state.items() if of) + f" of {len(parts)}"

    @property
    def advice(self) -> str:
        """How to measure what is missing; "" if nothing is."""
        return "python -m fastseq bench" + "".join(f" --suite {name}" for name in self.missing) if self.missing else ""

    @property
    def where(self) -> str:
        return f"on {self.device}, {' and '.join(finding.sizes for finding in self.findings)}" if self.findings else ""

    @property
    def figures(self) -> str:
        return "; ".join(finding.figures for finding in self.findings if not finding.void)

    @property
    def crossovers(self) -> str:
        return "; ".join(str(meeting) for finding in self.findings for meeting in finding.crossovers)

    def as_dict(self) -> dict[str, Any]:
        return {
            "claim": self.claim,
            "statement": self.statement,
            "experiment": self.experiment,
            "state": self.state,
            "verdict": self.verdict,
            "figures": self.figures,
            "device": self.device,
            "findings": [finding.as_dict() for finding in self.findings],
            "missing": list(self.missing),
        }
