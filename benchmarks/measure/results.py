"""The results of a run: rows, peaks, environment. Written as JSON (with a version) and as CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any

from ..roofline.peaks import Peaks
from ..workloads.base import Workload

SCHEMA = "fastseq-benchmark"
VERSION = 2
STATUS = ("ok", "wrong", "unavailable", "skipped")
NOISY = 0.25  # of the median: between the quantiles of a row that is called noisy
DOUBTFUL = 0.2  # of the rows behind a conclusion: with more of them contended or noisy there is none
COUNTED = ("flops", "bytes", "amount")  # in a row's detail, by formulas


@dataclass
class Row:
    """One provider on one workload. `time` and what derives from it are None unless `status` is "ok"."""

    suite: str
    group: str  # the set of rows that were measured in turn with this one, and are compared with it
    provider: str
    function: str
    mode: str
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    packed: bool
    threads: int
    dtype: str
    device: str
    tokens: int
    status: str = "ok"
    reason: str | None = None
    parameters: int | None = None
    time: dict[str, float] | None = None  # timing.Timing, seconds; over processes where there are several, see `restarts`
    first: float | None = None  # seconds of the very first call: compiling, warming up, allocating; in no other figure
    graph: dict[str, float] | None = None  # the same inside a CUDA graph
    host: dict[str, float] | None = None  # host time until the call returns, on CUDA
    ratio: dict[str, Any] | None = None  # timing.Ratio
    memory: int | None = None  # peak of the call in bytes, see memory.py
    kept: int | None = None  # bytes alive between forward and backward, output included; of a token those of the state
    metric: dict[str, Any] | None = None  # workloads.Metric: what an experiment found, in place of a time
    check: dict[str, Any] | None = None  # check.Check
    roofline: dict[str, Any] | None = None  # roofline.model.Roofline
    chose: list[str] = field(default_factory=list)  # operators or kernels that show the implementation
    launches: int | None = None  # kernels that a call launches, on CUDA
    detail: dict[str, Any] | None = None  # what the workload says of itself beyond these columns
    restarts: dict[str, Any] | None = None  # rerestarts.Restarts, of a headline: what each process found
    contention: dict[str, Any] | None = None  # contention.Contention: the machine while this was timed

    @classmethod
    def of(cls, suite: str, group: str, provider: str, w: Workload, **values: Any) -> Row:
        return cls(
            suite,
            group,
            provider,
            w.function,
            w.mode,
            w.T,
            w.B,
            w.I,
            w.H,
            w.packed,
            w.threads,
            w.dtype,
            w.device,
            w.tokens,
            detail=w.detail(),
            **values,
        )

    @property
    def key(self) -> tuple[Any, ...]:
        """What was measured, and by whom: rows of two runs that have the same key can be compared."""
        columns = [self.suite, self.group, self.provider, self.function, self.mode, self.T, self.B, self.I, self.H]
        particulars = json.dumps(self.particulars, sort_keys=True)
        return *columns, self.packed, self.threads, self.dtype, self.device, particulars

    @property
    def particulars(self) -> dict[str, Any]:
        """What the detail tells of the workload, without figures that were counted or measured."""
        return {k: v for k, v in (self.detail or {}).items() if k not in COUNTED and not isinstance(v, float)}

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def seconds(self) -> float:
        """Median time; NaN where there is none."""
        return self.time["median"] if self.ok and self.time else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """Seconds between which the time lies: the quantiles over rounds, and the medians of all processes."""
        assert self.time
        return _around(self.time, self.restarts, ("medians", "lows", "highs"))

    @property
    def ratio_interval(self) -> tuple[float, float]:
        """The same for the speed-up."""
        assert self.ratio
        return _around(self.ratio, self.restarts, ("ratios", "ratio_lows", "ratio_highs"))

    @property
    def spread(self) -> float:
        """The length of `interval`, in medians; NaN where there is no time."""
        if not (self.ok and self.time):
            return float("nan")
        low, high = self.interval
        return (high - low) / self.time["median"]

    @property
    def noisy(self) -> bool:
        """Whether the time spreads so far that small differences say nothing."""
        return self.spread > NOISY

    @property
    def contended(self) -> str | None:
        """What was wrong with the machine: other programs, or throttling, also when the row was timed once more."""
        return self.contention["contended"] if self.contention else None

    @property
    def doubtful(self) -> bool:
        """Whether its time is no ground for a verdict, a crossover or a headline."""
        return bool(self.time) and (bool(self.contended) or self.noisy)

    @property
    def of_roofline(self) -> float:
        """Fraction of the roofline reached: 1 is the fastest that the measured peaks allow."""
        return self.roofline["seconds"] / self.seconds if self.roofline else float("nan")


@dataclass
class Results:
    environment: dict[str, Any]
    options: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    peaks: list[Peaks] = field(default_factory=list)
    seconds: float = 0.0  # the whole run

    def of_suite(self, suite: str) -> list[Row]:
        return [row for row in self.rows if row.suite == suite]

    def suites(self) -> list[str]:
        return list(dict.fromkeys(row.suite for row in self.rows))

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "environment": self.environment,
            "options": self.options,
            "seconds": self.seconds,
            "peaks": [p.as_dict() for p in self.peaks],
            "rows": [asdict(row) for row in self.rows],
        }

    def save(self, path: Path, **derived: Any) -> None:
        """`derived` is written for readers of the file and ignored on loading: it follows from the rows.

        Whoever is stopped in the middle of this leaves the earlier file whole.
        """
        new = path.with_name(path.name + ".new")
        new.write_text(compact(self.as_dict() | {"derived": derived}))
        new.replace(path)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Raises ValueError, naming the file and what is wrong with it."""
        try:
            d = json.loads(Path(path).read_text())
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(d, dict) or d.get("schema") != SCHEMA:
            raise ValueError(f'{path} is not a result file of this benchmark (it has no "schema": "{SCHEMA}")')
        if d.get("version") != VERSION:
            raise ValueError(f"{path} has version {d.get('version')!r}; this fastseq reads version {VERSION}")
        try:
            rows = [Row(**row) for row in d["rows"]]
            bad = sorted({row.status for row in rows} - set(STATUS))
            if bad:
                raise ValueError(f"unknown status {bad}")
            return cls(d["environment"], d["options"], rows, [Peaks.from_dict(p) for p in d["peaks"]], d["seconds"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} does not have the fields of version {VERSION}: {error}") from error


def reliable(rows: Iterable[Row]) -> bool:
    """Whether something may be concluded from these rows: at most a fifth of their times are doubtful."""
    timed = [row.doubtful for row in rows if row.ok and row.time]
    return sum(timed) <= DOUBTFUL * len(timed)


def _around(overall: dict[str, Any], restarts: dict[str, Any] | None, names: tuple[str, str, str]) -> tuple[float, float]:
    """With several processes, whatever reaches further: their medians, or the quantiles that are usual within one of them.

    The quantiles over two or three medians alone would lie closer together than the next process may fall.
    """
    if not restarts or len(restarts[names[0]]) < 2:
        return overall["low"], overall["high"]
    medians, lows, highs = (restarts[name] for name in names)
    return min(*medians, median(lows)), max(*medians, median(highs))


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """One line a row; nested fields become columns such as time.median."""
    flat = [_flat(asdict(row)) for row in rows]
    plain = [f.name for f in fields(Row)]
    names = sorted({k for row in flat for k in row}, key=lambda k: (plain.index(k.split(".")[0]), k))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(flat)


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            out |= {f"{name}.{k}": _words(v) for k, v in value.items()}
        elif value is not None:
            out[name] = _words(value)
    return out


def _words(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list) else value


def compact(results: dict[str, Any]) -> str:
    """As JSON, one line for each row, peak and derived list: two files can be compared line by line."""

    def dump(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

    def lines(name: str, value: Any) -> str:
        if name in ("peaks", "rows"):
            return "[\n" + ",\n".join(map(dump, value)) + "\n]"
        if name == "derived":
            return "{\n" + ",\n".join(f"{dump(key)}:{dump(found)}" for key, found in value.items()) + "\n}"
        return dump(value)

    return "{\n" + ",\n".join(f"{dump(name)}:{lines(name, value)}" for name, value in results.items()) + "\n}\n"


def last_line(file: Path) -> str:
    """The last line that is not empty; "" without one."""
    if not file.is_file():
        return ""
    lines = [line.strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")
