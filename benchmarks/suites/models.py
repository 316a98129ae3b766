"""Whole models before and after: converted from torch.nn, or with fastseq's attention in transformers."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from ..measure.case import Case, Options, Participant
from ..measure.timing import Effort
from ..providers.models import AFTER, BEFORE, EAGER, OWN, SDPA
from ..report.curves import PEAK, TIME, Curves
from ..workloads.base import MODES
from ..workloads.models import MODELS, ModelWorkload

NAME = "models"
SUMMARY = "whole models before and after: LSTM language model and nn.Transformer converted, BERT and GPT-2 of transformers"


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
    return cases


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
derive, present, picture = CURVES.derive, CURVES.present, CURVES.picture
