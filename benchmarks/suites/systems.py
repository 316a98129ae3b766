"""The systems that articles name, with as many parameters each: what a training step and a generated token take as T grows."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

from ..measure.case import Case, Options, Participant
from ..measure.results import Results, Row
from ..measure.timing import Effort
from ..providers.systems import SYSTEM_PROVIDERS, oracle_name, own_name, torch_name
from ..report.curves import PEAK, TIME, Curves, Quantity, number, of_bytes, of_metric
from ..report.model import Figure, Section, time_text
from ..workloads.systems import STEP, SYSTEMS, TOKEN, SystemWorkload, TextExperiment, at_budget
from . import gates

NAME = "systems"
SUMMARY = "the systems that articles name at equal parameters: a training step and a generated token against T, torch and fastseq"

TEXT = "text at equal time"
FAMILY = ("LSTM", "GPT", "hybrid")  # the last one is made of what the others are made of
OWN = tuple(own_name(name) for name in SYSTEMS)
LEAST = 0.97  # a system below this is slower; above it the difference is within the noise of a run


def plan(options: Options) -> list[Case]:
    cuda = options.device.startswith("cuda")
    dtype = "bfloat16" if cuda and options.dtype == "float32" else options.dtype
    threads = options.threads[-1] if options.threads else 1
    common: dict[str, Any] = {"threads": threads, "device": options.device, "heads": 8 if cuda else 2}
    lengths, B, budget, span = _sizes(cuda, options.quick)
    effort = Effort(seconds=0.05, min_rounds=3, max_rounds=8) if options.quick else Effort(seconds=1.5, max_rounds=60)
    cases = []
    for (stage, mode), T, system in product(((STEP, "training"), (TOKEN, "inference")), lengths, SYSTEMS.values()):
        longest = system.longest * 4 if cuda else system.longest // 4 if options.quick else system.longest
        if T > longest or (stage == TOKEN and not system.generates):
            continue
        w = SystemWorkload(system.name, T, B, 0, 0, mode, dtype=dtype, stage=stage, span=span, seed=system.seed, **common)
        w = at_budget(w, budget)
        own, torchs, oracle = own_name(system.name), torch_name(system.name), oracle_name(system.name)
        names = [name for name in (torchs, own, oracle)[: 2 if options.quick else 3] if name in SYSTEM_PROVIDERS]
        baseline = ((own, torchs), (oracle, torchs)) if torchs in names else ()
        cases.append(Case(NAME, stage, tuple(Participant(name, w) for name in names), effort, baseline))
    return cases + _text(options, common)


def _sizes(cuda: bool, quick: bool) -> tuple[tuple[int, ...], int, int, int]:
    """Lengths (squares, of pictures' patches, and multiples of the span), batch, parameters, the span of windows and memories."""
    if cuda:
        return ((256,) if quick else (256, 1024, 4096)), 16, 30_000_000, 128
    return ((16, 64), 2, 500_000, 16) if quick else ((64, 256, 1024), 4, 500_000, 32)


def _text(options: Options, common: dict[str, Any]) -> list[Case]:
    """One case: systems that learn for as long."""
    given: dict[str, Any] = {"heads": 2} | ({"seconds": 1.0, "seeds": 1} if options.quick else {"seconds": 20.0, "seeds": 3})
    participants = []
    for name in FAMILY:
        w = TextExperiment(name, 64, 16, 0, 0, dtype=options.dtype, **common | given)
        participants.append(Participant(own_name(name), at_budget(w, 200_000)))
    return [Case(NAME, TEXT, tuple(participants), Effort())]


def _compared(stage: str, row: Row) -> bool:
    return row.group == stage and row.provider in OWN and SYSTEMS[row.function].own_parts


RATE = Quantity("Tokens per second", lambda r: r.tokens / r.seconds, lambda v: f"{v:,.0f}", lambda v: f"{v:,.0f}")
STATE = of_bytes("Kept of the context", lambda r: r.kept)
CURVES = Curves(
    NAME,
    "The systems that articles name",
    (
        "Every system has two layers (an encoder-decoder one of each, a TCN five levels) and the width that brings it nearest to "
        "the same number of parameters. A training step: logits, cross entropy, the gradient of every parameter, without the "
        "optimizer. A token: one more after T, from the state or the cache that these left. An encoder-decoder reads T tokens "
        "and says as many; windows, chunks, blocks and memories are of one length.",
        "fastseq: the models of fastseq.models. torch: the same source on torch.nn's layers and scaled_dot_product_attention. "
        "transformers: its models of those names, with the same parameters. TCN has nothing of fastseq in it. Figures show "
        "fastseq.",
        "Text: the loss of the next letter of Jane Austen's Persuasion, in nats, on its last tenth, after as many seconds of "
        "computing for each; medians over seeds.",
    ),
    {STEP: "a training step", TOKEN: "a generated token", TEXT: "text, after equal time"},
    {STEP: (TIME, RATE, PEAK), TOKEN: (TIME, RATE, STATE), TEXT: (of_metric("Test loss", number, 0),)},
    split=("B", "threads", "dtype"),
    drawn=lambda row: row.provider in OWN and row.group != TEXT,
    height=6.6,
)
GATES = [
    gates.Gate(f"no system slower, {CURVES.groups[stage]}", LEAST, 1.0, partial(_compared, stage), over="torch")
    for stage in (STEP, TOKEN)
]


def picture(results: Results) -> Figure:
    """Times of both stages, a line for each system."""
    words = []
    for stage in (STEP, TOKEN):
        timed = [row for row in results.of_suite(NAME) if row.group == stage and row.provider in OWN and row.ok]
        longest = sorted((row for row in timed if row.T == max(r.T for r in timed)), key=lambda row: row.seconds)
        if longest:
            each = ", ".join(f"{row.function} {time_text(row.seconds)}" for row in longest)
            words.append(f"{CURVES.groups[stage][:1].upper()}{CURVES.groups[stage][1:]} at T = {longest[0].T}: {each}")
    return replace(CURVES.picture(results), title="The systems that articles name, at equal parameters", alt="; ".join(words))


def verdicts(rows: list[Row]) -> list[dict[str, Any]]:
    def value(r: Row) -> float | None:
        return r.ratio["median"] if r.ok and r.ratio else None

    return [gates.verdict(g, [r for r in rows if g.counts(r)], value, lambda r: f"{r.function}, T={r.T}") for g in GATES]


def derive(results: Results) -> dict[str, Any]:
    return CURVES.derive(results) | {"gates": verdicts(results.of_suite(NAME))}


def present(results: Results) -> list[Section]:
    (section,) = CURVES.present(results)
    found = verdicts(results.of_suite(NAME))
    section.cards = gates.cards(found, "torch")
    section.tables.insert(0, gates.table(found))
    return [section]
