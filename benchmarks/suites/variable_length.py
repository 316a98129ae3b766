"""Rows of unequal length: what padding costs, and what packed, nested and concatenated rows and lengths save of it."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from ..measure.case import Case, Options, Participant
from ..measure.timing import Effort
from ..providers.variable_length import CELLS, FLASH, MASK, NESTED, OWN_LENGTHS, OWN_ROWS, layer_name
from ..report.curves import PEAK, TIME, Curves
from ..workloads.base import MODES
from ..workloads.variable_length import SPREADS, VariableWorkload

NAME = "variable-length"
SUMMARY = "rows of unequal length: padded, packed, with lengths, nested, concatenated; recurrence and attention"

LAYOUTS = {"torch.nn": ("padded", "packed"), "fastseq": ("padded", "packed", "lengths")}
PROVIDERS = {
    **{cell.lower(): [layer_name(package, cell, layout) for package in LAYOUTS for layout in LAYOUTS[package]] for cell in CELLS},
    "encoder": [MASK, NESTED, FLASH, OWN_LENGTHS, OWN_ROWS],
}


def plan(options: Options) -> list[Case]:
    cuda = options.device.startswith("cuda")
    dtype = "bfloat16" if cuda and options.dtype == "float32" else options.dtype
    threads = options.threads[-1] if options.threads else torch.get_num_threads()
    common: dict[str, Any] = {"threads": threads, "dtype": dtype, "device": options.device, "heads": 8 if cuda else 4}
    lengths, spreads, B, W = _grid(cuda, options.quick)
    effort = Effort(seconds=0.3, min_rounds=3, max_rounds=10) if options.quick else Effort(seconds=2.0, max_rounds=40)
    cases = []
    for spread, mode, T, function in product(spreads, MODES, lengths, PROVIDERS):
        w = VariableWorkload(function, T, B, W, W, mode, spread=spread, **common)
        names = PROVIDERS[function]
        participants = tuple(Participant(name, w) for name in names)
        cases.append(Case(NAME, f"{spread} {function}", participants, effort, tuple((name, names[0]) for name in names[1:])))
    return cases


def _grid(cuda: bool, quick: bool) -> tuple[tuple[int, ...], tuple[str, ...], int, int]:
    """Longest rows, spreads of the lengths, batch, width."""
    if cuda:
        return ((512,), ("skewed",), 32, 512) if quick else ((128, 512, 2048), tuple(SPREADS), 32, 512)
    return ((32, 128), ("skewed",), 8, 64) if quick else ((64, 256, 512), tuple(SPREADS), 16, 256)


CURVES = Curves(
    NAME,
    "Rows of unequal length",
    (
        "Every provider is handed the batch in its own layout, masks and offsets built; the valid rows of its output and of its "
        "gradients are compared with each sequence computed alone. Skewed lengths are T u³, uniform ones T u, with u uniform.",
        "Padded: what a program does that ignores the lengths (recurrence), or hides padding by a mask (attention). The encoder "
        "block has the parameters of an LSTM, and every valid position sees every other.",
    ),
    {f"{spread} {function}": f"{function} on {spread} lengths" for spread in SPREADS for function in PROVIDERS},
    {f"{spread} {function}": (TIME, PEAK) for spread in SPREADS for function in PROVIDERS},
    x_label="T, the longest row",
)
derive, present, picture = CURVES.derive, CURVES.present, CURVES.picture
