"""LSTM, GRU and RNN on a CPU: the lengths that torch's own kernels run faster.

``tables/cpu-lengths.json`` says it, which ``python -m fastseq.benchmarks.tables`` writes from measurements: for every level of
instructions, cell, dtype, layout, number of directions and mode, by rows of the batch and hidden units, Python included.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .decision import MODES
from .device import LEVELS, WORDS, cpu_level

FILE = Path(__file__).parent / "tables" / "cpu-lengths.json"


class Steps(NamedTuple):
    """Lengths that torch's kernel runs faster than ours: from the first to the last."""

    first: int
    last: int


OURS = Steps(1, 0)  # at every length
ENDLESS = 1 << 62  # a last length that is none

# What has not been measured is taken to be as what has; a level, as the next one below it, or without any as the next above.
LIKE = {"rnn_relu": "rnn_tanh", "float64": "float32", "float16": "bfloat16"}

Key = tuple[str, torch.dtype, str, int, bool]  # cell, dtype, layout, directions, with gradients


class Table(NamedTuple):
    """The rows of one level. A batch has the place of the first of these edges that it does not exceed, or the last place."""

    measured_on: str  # in words
    batches: list[float]
    widths: list[float]
    rows: dict[Key, list[Steps]]  # by place of the batch, then of the width

    def steps(self, cell: str, dtype: torch.dtype, layout: str, lanes: int, batch: int, hidden: int, gradients: bool) -> Steps:
        _, batches, widths, rows = self
        place = bisect_left(batches, batch) * (len(widths) + 1) + bisect_left(widths, hidden)
        return rows[cell, dtype, layout, lanes, gradients][place]


_table: Table | None = None
_changed: list[Callable[[], None]] = []  # called when other lengths hold


def table_of(level: str, file: dict[str, Any]) -> Table:
    """What the contents of the file say of a level."""
    place = LEVELS.index(level)
    near = next(name for name in (*LEVELS[place::-1], *LEVELS[place:]) if name in file["levels"])
    found, rows = file["levels"][near], {}
    cells, dtypes = ("lstm", "gru", "rnn_tanh", "rnn_relu"), ("float32", "float64", "bfloat16", "float16")
    kinds = product(cells, dtypes, ("padded", "packed"), (1, 2), (False, True))
    for cell, dtype, layout, lanes, gradients in kinds:
        likes = product((cell, LIKE.get(cell)), (dtype, LIKE.get(dtype)))
        names = (row_name(a, b, layout, lanes, gradients) for a, b in likes if a and b)
        row = next(found["rows"][name] for name in names if name in found["rows"])
        steps = [Steps(first, ENDLESS if last is None else last) for first, last in row]
        rows[cell, getattr(torch, dtype), layout, lanes, gradients] = steps
    return Table(f"{found['device']}, {WORDS[near]}", found["batches"], found["widths"], rows)


def row_name(cell: str, dtype: str, layout: str, lanes: int, gradients: bool) -> str:
    """Of a row in the file."""
    return f"{cell} {dtype} {layout} {lanes} {MODES[gradients]}"


def table() -> Table:
    """Of this CPU. The library must be loaded."""
    global _table
    if _table is None:
        _table = table_of(cpu_level(), json.loads(FILE.read_text()))
    return _table


@contextmanager
def everywhere(steps: Steps) -> Iterator[None]:
    """Within a ``with`` block these lengths are torch's, whatever the call: for measurements, and for tests."""

    class Everywhere(dict[Any, list[Steps]]):
        def __missing__(self, key: Any) -> list[Steps]:
            return [steps]

    def hold(table: Table | None) -> None:
        global _table
        _table = table
        for tell in _changed:
            tell()

    before = _table
    hold(Table("", [], [], Everywhere()))
    try:
        yield
    finally:
        hold(before)


def words(steps: Steps, gradients: bool) -> str:
    """What lengths say."""
    first, last = steps
    lengths = [f"from {first}"] * (first > 1) + [f"up to {last}"] * (last < ENDLESS)
    where = f"{' '.join(lengths)} steps" if lengths else "at every length"
    return f"torch's kernel is faster {where} {'in training' if gradients else 'without gradients'}"
