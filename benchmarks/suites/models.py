"""Models before and after: converted from torch.nn, or with fastseq's attention in transformers. Small ones: stand_ins.py."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import torch

from ..measure.case import Case, Options, Participant
from ..measure.results import Results, Row
from ..measure.timing import Effort
from ..providers.models import AFTER, BEFORE, EAGER, OWN, SDPA
from ..report.curves import PEAK, TIME, Curves
from ..report.model import Figure, Section
from ..workloads.base import MODES
from ..workloads.models import MODELS, ModelWorkload
from . import stand_ins

NAME = "models"
SUMMARY = "models before and after: LSTM language model, nn.Transformer, BERT, GPT-2; small recurrent and attention models"


def plan(options: Options) -> list[Case]:
    cuda = options.device.startswith("cuda")
    dtype = "bfloat16" if cuda and options.dtype == "float32" else options.dtype
    threads = options.threads[-1] if options.threads else torch.get_num_threads()
    common: dict[str, Any] = {"threads": threads, "dtype": dtype, "device": options.device}
    effort = Effort(seconds=0.3, min_rounds=3, max_rounds=10) if options.quick else Effort(seconds=4.0, max_rounds=40)
    lengths, B, W, sizes = _sizes(cuda, options.quick)
    cases = []
    for function, mode, T in product(MODELS, MODES, lengths):
        w = ModelWorkload(function, T, B, W, W, mode, **sizes, **common)
        before, after = (SDPA, OWN) if MODELS[function].package else (BEFORE, AFTER)
        names = (before, after) if before == BEFORE else (EAGER, before, after)
        baseline = tuple((name, before) for name in names if name != before)
        cases.append(Case(NAME, function, tuple(Participant(name, w) for name in names), effort, baseline))
    return cases if cuda else cases + stand_ins.plan(options, threads)


def _sizes(cuda: bool, quick: bool) -> tuple[tuple[int, ...], int, int, dict[str, Any]]:
    """Lengths, batch, width and the rest: on a GPU those of the base models."""
    if cuda:
        return (256,) if quick else (128, 512), 16, 768, {"heads": 12, "layers": 2 if quick else 12, "vocabulary": 8192}
    if quick:
        return (64,), 4, 64, {"layers": 2, "vocabulary": 500}
    return (64, 256), 8, 256, {"layers": 2, "vocabulary": 2000}


CURVES = Curves(
    NAME,
    "Whole models before and after",
    (
        "Forward: logits. Forward + backward: a training step without the optimizer, cross entropy and the gradients of every "
        "parameter. Models are built from sizes and a seed; all of one kind get the same parameters and tokens, and are timed "
        "only if logits and gradients are within the error that the model as built makes in that dtype.",
    ),
    {name: model.title for name, model in MODELS.items()},
    dict.fromkeys(MODELS, (TIME, PEAK)),
)


def _parts(results: Results) -> tuple[Results | None, list[Row]]:
    """The results of the whole models, if there are any, and the rows of the small ones."""
    rows = results.of_suite(NAME)
    whole = [r for r in rows if r.group not in stand_ins.FAMILIES]
    return replace(results, rows=whole) if whole else None, [r for r in rows if r.group in stand_ins.FAMILIES]


def derive(results: Results) -> dict[str, Any]:
    whole, small = _parts(results)
    found = CURVES.derive(whole) if whole else {}
    own = {group: [r for r in small if r.group == group] for group in stand_ins.FAMILIES}
    return found | {group: stand_ins.derive(rows) for group, rows in own.items() if rows}


def present(results: Results) -> list[Section]:
    whole, small = _parts(results)
    return (CURVES.present(whole) if whole else []) + stand_ins.sections(small)


def picture(results: Results) -> Figure:
    whole, small = _parts(results)
    return CURVES.picture(whole) if whole else stand_ins.figure(small)
