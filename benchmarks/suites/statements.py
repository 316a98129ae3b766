"""Single statements: order, the reach of cached segments, and a stack of recurrence and attention beside stacks of either."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch

from ..measure.case import Case, Options, Participant
from ..measure.timing import Effort
from ..providers.base import PROVIDERS
from ..providers.stacks import BLOCKS, HYBRID, LSTMS, STACK_PROVIDERS
from ..report.curves import PEAK, TIME, Curves, number, of_metric, share
from ..workloads.experiments import SYMBOLS, Experiment
from ..workloads.statements import ALONE, CACHED, LAYERS, PLAIN, POSITIONED, StackWorkload, Statement

NAME = "statements"
SUMMARY = "experiments on single statements: order of the input, reach of cached segments, a stack of LSTM and attention block"

ORDER = {variant: f"order, {variant}" for variant in (PLAIN, POSITIONED)}
CONTEXT = {variant: f"context, {variant}" for variant in (ALONE, CACHED)}
RECALL, COST = "stacks, recall", "stacks, cost"
SEGMENT = 16
STACKS = (LSTMS, BLOCKS, HYBRID)


def plan(options: Options) -> list[Case]:
    cuda = options.device.startswith("cuda")
    threads = options.threads[-1] if options.threads else torch.get_num_threads()
    common: dict[str, Any] = {"threads": threads, "device": options.device}
    seeds, budget = (2, 100) if options.quick else (3, 600)
    cases: list[Case] = []

    def add(group: str, names: tuple[str, ...], make: Any, **more: Any) -> None:
        providers = PROVIDERS | STACK_PROVIDERS
        participants = tuple(Participant(name, make(providers[name].function)) for name in names)
        cases.append(Case(NAME, group, participants, **{"effort": Effort()} | more))

    for (variant, group), T in product(ORDER.items(), (8, 64) if options.quick else (8, 32, 128, 512)):
        given = common | {"task": "order", "variant": variant, "seeds": seeds, "dtype": "float64"}
        recurrent = ("fastseq.LSTM",) if variant == PLAIN else ()
        add(group, ("fastseq attention", "attention block", *recurrent), lambda f, T=T, g=given: Statement(f, T, 8, 32, 32, **g))
    for (variant, group), T in product(CONTEXT.items(), (8, 24) if options.quick else (4, 8, 16, 24, 32, 64)):
        given = common | {"task": "context", "variant": variant, "segment": SEGMENT, "seeds": seeds, "budget": budget}
        add(group, ("attention block",), lambda f, T=T, g=given: Statement(f, T, 32, 32, 32, **g))
    for T in (4, 32) if options.quick else (4, 16, 64, 128):
        given = common | {"task": "recall", "seeds": seeds, "budget": budget}
        add(RECALL, STACKS, lambda f, T=T, g=given: Experiment(f, T, 32, 32, 32, **g))
    B, W = (16, 512) if cuda else (8, 128)
    effort = Effort(seconds=0.3, min_rounds=3, max_rounds=10) if options.quick else Effort(seconds=2.0, max_rounds=40)
    for T in (64, 256) if options.quick else (64, 256, 1024) + (4096,) * cuda:
        add(COST, STACKS, lambda f, T=T: StackWorkload(f, T, B, W, W, "training", dtype=options.dtype, **common), effort=effort)
    return cases


CURVES = Curves(
    NAME,
    "Single statements",
    (
        "Order: the change of the last output of a layer as torch initializes it, relative to it, when the T steps before it "
        "change places. It is that of rounding where a layer does not know the order.",
        f"Context: {LAYERS} attention blocks that see segments of {SEGMENT} steps, alone or beside the {SEGMENT} hidden states "
        "before them, which get no gradient, as in Transformer-XL; the loss of the last token, which repeats one that stands "
        f"T steps before it. By chance it is {math.log(SYMBOLS):.2f} nats.",
        "Stacks: two layers, LSTM, attention block or one of each, all with as many parameters and with positions; recall as in "
        "the suite long-range, and a training step of the two layers.",
    ),
    {group: group for group in (*ORDER.values(), *CONTEXT.values(), RECALL, COST)},
    {
        **dict.fromkeys(ORDER.values(), (of_metric("Change of the last output", number, 10),)),
        **dict.fromkeys(CONTEXT.values(), (of_metric("Loss of the last token", number, 0),)),
        RECALL: (of_metric("Accuracy of recall", share, 0),),
        COST: (TIME, PEAK),
    },
)
derive, present, picture = CURVES.derive, CURVES.present, CURVES.picture
