"""Decoding: the context at once, and token by token with a state of fixed size or a cache that grows with the context."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from ..measure.case import Case, Options, Participant
from ..measure.timing import Effort
from ..providers.decode import CELLS, DECODE_PROVIDERS, GROWING, OWN, RESERVED, cell_name, layer_name
from ..report.curves import PER_STEP, TIME, Curves, of_bytes
from ..workloads.decode import PREFILL, TOKENS, DecodeWorkload

NAME = "decode"
SUMMARY = "prefill and token by token against context: recurrent state against KV cache, torch and fastseq"

LAYERS = [layer_name(package, cell) for cell in CELLS for package in ("torch.nn", "fastseq")]
STEPPING = [cell_name(package, cell) for cell in CELLS for package in ("torch.nn", "fastseq")]
BASELINE = {
    **{name("fastseq", cell): name("torch.nn", cell) for cell in CELLS for name in (layer_name, cell_name)},
    OWN: RESERVED,
    GROWING: RESERVED,
}
PROVIDERS = {PREFILL: (*LAYERS, RESERVED, OWN), TOKENS: (*LAYERS, *STEPPING, GROWING, RESERVED, OWN)}
LARGEST = 1 << 17  # tokens of all contexts together


def plan(options: Options) -> list[Case]:
    cuda = options.device.startswith("cuda")
    dtype = "bfloat16" if cuda and options.dtype == "float32" else options.dtype
    threads = options.threads[-1] if options.threads else torch.get_num_threads()
    common: dict[str, Any] = {"threads": threads, "dtype": dtype, "device": options.device, "heads": 16 if cuda else 4}
    contexts, batches, W = _grid(cuda, options.quick)
    effort = Effort(seconds=0.4, min_rounds=3, max_rounds=10) if options.quick else Effort(seconds=2.0, max_rounds=40)
    cases = []
    for stage, B, T in product(PROVIDERS, batches, contexts):
        if (stage == PREFILL and T > 4096) or B * T > LARGEST:
            continue  # the truth of a prefill has every score in memory; the context is drawn on the host, in fp64
        participants = []
        for name in PROVIDERS[stage]:
            function = DECODE_PROVIDERS[name].function.removeprefix("decode ")
            participants.append(Participant(name, DecodeWorkload(function, T, B, W, W, stage=stage, **common)))
        cases.append(Case(NAME, stage, tuple(participants), effort, tuple(BASELINE.items())))
    return cases


def _grid(cuda: bool, quick: bool) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Contexts, batches, width."""
    if cuda:
        return ((512, 4096), (1, 64), 1024) if quick else ((128, 512, 2048, 4096, 8192, 32768), (1, 16, 64), 1024)
    return ((64, 512), (1,), 256) if quick else ((64, 256, 1024, 4096), (1, 8), 256)


CURVES = Curves(
    NAME,
    "Decoding with one layer",
    (
        "Prefill: the whole context in one call. Token by token: 16 calls after it, each with the state or the cache of the last "
        "one. Equal width; the attention block has the parameters of the LSTM. States and caches are in place before the clock "
        "restarts; a growing cache is concatenated anew for each token.",
        "The state of a recurrence has one size whatever the context; a cache has a key and a value for each token of it.",
    ),
    {TOKENS: "token by token", PREFILL: "prefill"},
    {
        PREFILL: (TIME,),
        TOKENS: (PER_STEP, of_bytes("State or cache", lambda r: r.detail["state bytes"] if r.detail else None)),
    },
    x_label="T, tokens of context",
)
derive, present, picture = CURVES.derive, CURVES.present, CURVES.picture
