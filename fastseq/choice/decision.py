"""What a decision is about, and what it says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

MODES = ("inference", "training")  # without gradients, with them
_HEADS = ("BH", "Tq", "Tk", "E")
SIZES = {
    "recurrent": ("B", "T", "H"),
    "recurrent_cell": ("B", "T", "H"),
    "attention": _HEADS,
    "attention_decode": _HEADS,
    "scan": ("B", "T", "C"),
}
# T of a cell's steps with gradients that come one after the other and share what those of the weights cost. It is 1 where no
# other step led to the state: this one may be the only one.
CHAIN = 4
FIRST = "torch"  # of two that are equally far or fast


class Call(NamedTuple):
    """What a decision depends on, beside the device: sizes as far as they are near, all else exactly."""

    op: str  # a key of SIZES
    mode: str  # one of MODES
    kind: str  # the cell; the features of attention in use, "+" between them, or "plain"
    dtype: str
    precision: str  # of products of fp32 numbers on a GPU, "ieee" or "tf32"; else ""
    layout: str  # "padded", "lengths" or "packed"
    lanes: int  # directions; of attention query heads for a key head
    sizes: tuple[int, ...]  # by SIZES; BH: rows of the batch times query heads

    @property
    def kin(self) -> tuple[Any, ...]:
        """What calls of near sizes share."""
        return self[:-1]

    def __str__(self) -> str:
        lanes = f"{'Hq/Hkv' if self.op.startswith('attention') else 'D'}={self.lanes}"
        sizes = " ".join(f"{name}={size}" for name, size in zip(SIZES[self.op], self.sizes, strict=True))
        parts = (self.op, self.kind, self.dtype, self.precision, self.layout, lanes, sizes, self.mode)
        return " ".join(part for part in parts if part)


class Candidate(NamedTuple):
    """A backend, in one of its forms or plans, as it was measured."""

    backend: str
    form: str = ""  # "": the one that the backend chooses
    us: float | None = None  # of the call, at the median; None: not measured
    error: float | None = None  # the largest, relative to the largest value
    doubt: float | None = None  # beside torch's kernel, the part of its time that every fourth round took longer
    against: str = ""  # why it must not run: it is wrong, hangs, crashes

    @property
    def name(self) -> str:
        return f"{self.backend} ({self.form})" if self.form else self.backend


class Decision(NamedTuple):
    """Who may run a call, best first, and where that is known from."""

    candidates: tuple[Candidate, ...]
    source: str  # "tuned", "shipped", "default" or "asked for"
    about: str  # the source in words

    @property
    def backend(self) -> str:
        return self.candidates[0].backend if self.candidates else ""


class Point(NamedTuple):
    """What was measured at some sizes."""

    sizes: tuple[int, ...]
    candidates: tuple[Candidate, ...]  # best first; those that must not run are left out
    date: str


Points = Mapping[tuple[Any, ...], Iterable[Point]]  # by `Call.kin`


def nearest(points: Points, call: Call, reach: float) -> Point | None:
    """The point of a call's kin with the least distance, at most ``reach``: the sum of the octaves between the sizes."""
    best, found = (reach, True), None
    for point in points.get(call.kin, ()):
        place = distance(point.sizes, call.sizes, best[0]), point.candidates[0].backend != FIRST
        if place <= best:
            best, found = place, point
    return found


def distance(a: tuple[int, ...], b: tuple[int, ...], enough: float = math.inf) -> float:
    """In octaves; what is more than enough is not counted to its end."""
    octaves = 0.0
    for x, y in zip(a, b, strict=True):
        octaves += abs(math.log2((x or 1) / (y or 1)))
        if octaves > enough:
            break
    return octaves


def ranked(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """Those that may run, the fastest first; before torch's kernel, those that were faster in three rounds of four."""
    able = [c for c in candidates if not c.against and c.us is not None]
    return tuple(sorted(able, key=lambda c: ((c.us or 0) * (1 + (c.doubt or 0)), c.backend != FIRST)))


def speed_of(candidates: tuple[Candidate, ...]) -> str:
    """How much faster the first is than torch's kernel, or if it is that, than the next of the others; empty: there is none."""
    first = candidates[0]
    for other in candidates[1:]:
        if first.backend == FIRST or other.backend == FIRST:
            return f"{(other.us or 0) / (first.us or 1):.2f}x {other.backend}"
    return ""


def entry_of(
    call: Call, candidates: Iterable[Candidate], device: Mapping[str, Any], versions: Mapping[str, str], date: str
) -> Any:
    """JSON-able. Reads back by `point_of`."""
    return {
        "device": dict(device),
        "versions": dict(versions),
        "call": call._asdict(),
        "candidates": [{name: value for name, value in c._asdict().items() if value not in ("", None)} for c in candidates],
        "date": date,
    }


def point_of(entry: Any) -> tuple[Call, Point]:
    """
    Raises:
        ValueError: if an entry is not of this form.
    """
    try:
        call = Call(**{**entry["call"], "sizes": tuple(int(size) for size in entry["call"]["sizes"])})
        candidates = tuple(Candidate(**candidate) for candidate in entry["candidates"])
        able = ranked(candidates)
        date = str(entry["date"])
        well = len(call.sizes) == len(SIZES[call.op]) and call.mode in MODES and min(call.sizes) >= 0 and hash(call) is not None
        well = well and all(isinstance(c.backend, str) and isinstance(c.us, (int, float)) for c in able)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if not well:
        raise ValueError(f"sizes or times do not fit {call.op}")
    return call, Point(call.sizes, able, date)
