"""Little data: what recurrence and attention learn from it in a fixed budget, with as many parameters."""

from __future__ import annotations

from itertools import product
from typing import Any

from ..measure.case import Case, Options, Participant
from ..measure.timing import Effort
from ..providers.base import PROVIDERS
from ..report.curves import Curves, number, of_metric
from ..workloads.experiments import Experiment

NAME = "small-data"
SUMMARY = "experiments against the amount of data: test loss of recurrence and attention on a novel and on sunspots, fixed budget"

NAMES = ("fastseq.RNN", "fastseq.LSTM", "fastseq.GRU", "attention block")
TEXT, SERIES = "text", "series"
T, B = 32, 16


def plan(options: Options) -> list[Case]:
    threads = options.threads[-1] if options.threads else 1  # small models, and nothing is timed
    common: dict[str, Any] = {"threads": threads, "device": options.device, "dtype": options.dtype}
    common |= {"seeds": 2, "budget": 100} if options.quick else {"seeds": 3, "budget": 600}
    W = 32 if options.quick else 64
    cases = []
    for task, samples in _amounts(options.quick):
        works = {name: Experiment(PROVIDERS[name].function, T, B, W, W, task=task, samples=samples, **common) for name in NAMES}
        cases.append(Case(NAME, task, tuple(Participant(name, w) for name, w in works.items()), Effort()))
    return cases


def _amounts(quick: bool) -> list[tuple[str, int]]:
    """Tasks and their known steps."""
    text, series = ((2048, 32768), (128, 2048)) if quick else ((1024, 8192, 65536, 262144), (128, 512, 2048))
    return [*product((TEXT,), text), *product((SERIES,), series)]


CURVES = Curves(
    NAME,
    "Little data",
    (
        f"Models of one layer between embedding and readout, trained on pieces of {T} steps of the known part of a record, for a "
        "fixed number of steps of Adam; the loss is that of the last tenth of the record, which nobody trained on. At one width "
        "the attention block has the parameters of the LSTM, the GRU three quarters of them, the RNN a quarter.",
        "Text: Jane Austen's Persuasion, next character. Series: the sunspot record since 1749, next month, squared error over "
        "that of taking this month's value. Medians over seeds; same data in the same order for all.",
    ),
    {TEXT: "next character, nats", SERIES: "next month, of persistence"},
    {TEXT: (of_metric("Test loss", number, 0),), SERIES: (of_metric("Test error", number, 0),)},
    x_label="steps of the record that are trained on",
    x="n",
    at=lambda row: row.detail["samples"] if row.detail else 0,
)
derive, present, picture = CURVES.derive, CURVES.present, CURVES.picture
