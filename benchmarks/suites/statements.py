"""Single statements: order, the reach of cached segments, recall by a stack of recurrence and attention beside stacks of one."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch

from ..measure.case import Case, Options, Participant
from ..measure.timing import Effort
from ..providers.stacks import DECODER, ENCODER, HYBRID, LSTMS, STACK_PROVIDERS
from ..providers.systems import own_name
from ..report.curves import Curves, number, of_metric, share
from ..workloads.experiments import SYMBOLS
from ..workloads.statements import ALONE, CACHED, LAYERS, PLAIN, POSITIONED, Context, Statement

NAME = "statements"
SUMMARY = (
    "experiments on single statements: order of the input, reach of cached segments, recall by a stack of LSTM and attention"
)

ORDER = {variant: f"order, {variant}" for variant in (PLAIN, POSITIONED)}
CONTEXT = {variant: f"context, {variant}" for variant in (ALONE, CACHED)}
RECALL = "stacks, recall"
SEGMENT = 16
STACKS = (LSTMS, DECODER, HYBRID)
BLIND = (ENCODER, DECODER)  # without a recurrence that tells the order
XL = own_name("Transformer-XL")


def plan(options: Options) -> list[Case]:
    threads = options.threads[-1] if options.threads else torch.get_num_threads()
    common: dict[str, Any] = {"threads": threads, "device": options.device}
    seeds, budget = (2, 100) if options.quick else (3, 600)
    cases: list[Case] = []

    def stacks(group: str, names: tuple[str, ...], T: int, B: int, **given: Any) -> None:
        made = {name: Statement(STACK_PROVIDERS[name].function, T, B, 32, 32, seeds=seeds, **common, **given) for name in names}
        cases.append(Case(NAME, group, tuple(Participant(name, w) for name, w in made.items()), Effort()))

    for (variant, group), T in product(ORDER.items(), (8, 64) if options.quick else (8, 32, 128, 512)):
        recurrent = (LSTMS, HYBRID) if variant == PLAIN else ()
        stacks(group, (*BLIND, *recurrent), T, 8, task="order", variant=variant, dtype="float64")
    for (variant, group), T in product(CONTEXT.items(), (8, 24) if options.quick else (4, 8, 16, 24, 32, 64)):
        w = Context("Transformer-XL", T, 32, 32, 32, variant=variant, span=SEGMENT, seeds=seeds, budget=budget, **common)
        cases.append(Case(NAME, group, (Participant(XL, w),), Effort()))
    for T in (4, 32) if options.quick else (4, 16, 64, 128):
        stacks(RECALL, STACKS, T, 32, task="recall", budget=budget)
    return cases


CURVES = Curves(
    NAME,
    "Single statements",
    (
        "Order: the change of the last output of a stack as torch initializes it, relative to it, when the T steps before it "
        "change places. It is that of rounding where a stack does not know the order. A decoder's blocks see what came before, "
        "an encoder's all.",
        f"Context: Transformer-XL of {LAYERS} layers on segments of {SEGMENT} tokens, alone or beside the memory of those before "
        "them, which gets no gradient; the loss of the last token, which repeats one that stands "
        f"T tokens before it. By chance it is {math.log(SYMBOLS):.2f} nats.",
        "Stacks: LSTMs, a decoder's attention blocks, or one of each, all with as many parameters and with positions; recall as "
        "in the suite long-range. Their times: the suite systems.",
    ),
    {group: group for group in (*ORDER.values(), *CONTEXT.values(), RECALL)},
    {
        **dict.fromkeys(ORDER.values(), (of_metric("Change of the last output", number, 10),)),
        **dict.fromkeys(CONTEXT.values(), (of_metric("Loss of the last token", number, 0),)),
        RECALL: (of_metric("Accuracy of recall", share, 0),),
    },
)
derive, present, picture = CURVES.derive, CURVES.present, CURVES.picture
