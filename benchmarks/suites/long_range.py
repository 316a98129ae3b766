"""How far a layer reaches: the gradient across a distance at initialization, recall and parity across it after training."""

from __future__ import annotations

from typing import Any

from ..measure.case import Case, Options, Participant
from ..measure.timing import Effort
from ..providers.base import PROVIDERS
from ..providers.linear import LINEAR_PROVIDERS
from ..report.curves import Curves, number, of_metric, share
from ..workloads.experiments import COUNTED, SYMBOLS, Experiment, LinearExperiment

NAME = "long-range"
SUMMARY = "experiments against distance: norm of the gradient, recall and parity after a fixed budget; recurrence and attention"

NAMES = ("fastseq.RNN", "fastseq.LSTM", "fastseq.GRU", "fastseq attention", "attention block")
COUNT = ("fastseq.LSTM", "fastseq.GRU", "fastseq.MinGRU")  # recurrence whose gates read the state, and one whose gates do not
KNOWN = PROVIDERS | LINEAR_PROVIDERS
GRADIENT, RECALL, PARITY = "gradient", "recall", "parity"


def plan(options: Options) -> list[Case]:
    cuda = options.device.startswith("cuda")
    threads = options.threads[-1] if options.threads else 1  # small models, and nothing is timed
    common: dict[str, Any] = {"threads": threads, "device": options.device, "seeds": 2 if options.quick else 3}
    # fp64: what is left of a gradient after a few hundred steps is below the range of fp32
    settings: dict[str, dict[str, Any]] = {
        GRADIENT: {"B": 8, "W": 32, "dtype": "float64"},
        RECALL: {"B": 32, "W": 32, "dtype": options.dtype, "budget": 100 if options.quick else 600},
        PARITY: {"B": 32, "W": 32, "dtype": options.dtype, "budget": 200 if options.quick else 400, "rate": 1e-2},
    }
    distances = _distances(cuda, options.quick)
    cases = []
    for group, given in settings.items():
        for T in distances[group]:
            more = common | given
            B, W = more.pop("B"), more.pop("W")
            names = COUNT if group == PARITY else NAMES
            works = {name: _kind(name)(KNOWN[name].function, T, B, W, W, task=group, **more) for name in names}
            cases.append(Case(NAME, group, tuple(Participant(name, w) for name, w in works.items()), Effort()))
    return cases


def _kind(name: str) -> type[Experiment]:
    return LinearExperiment if name in LINEAR_PROVIDERS else Experiment


def _distances(cuda: bool, quick: bool) -> dict[str, tuple[int, ...]]:
    if quick:
        return {GRADIENT: (2, 8, 32, 128), RECALL: (4, 32), PARITY: (8 * COUNTED,)}
    gradients = tuple(2**k for k in range(1, 12 if cuda else 10))
    return {GRADIENT: gradients, RECALL: (4, 16, 64, 256) if cuda else (2, 8, 32, 128), PARITY: (COUNTED, 16 * COUNTED)}


CURVES = Curves(
    NAME,
    "How far a layer reaches",
    (
        "Gradient: the root mean square of the singular values of d output[t + T] / d input[t] of one layer as torch initializes "
        "it. Fitted by a power of T and by a factor for each step; a recurrence forgets by a factor.",
        f"Recall: name one of {SYMBOLS} symbols after T steps that mean nothing, by a model of one layer, after a fixed budget "
        f"of training; chance is {1 / SYMBOLS:.1%}. Same data, same order, same number of steps for all; positions are added for "
        "attention. Medians over seeds.",
        f"Parity: whether the number of ones among T bits is odd, after a fixed budget on sequences of up to {COUNTED}; chance "
        "is a half. What is parallel in time has gates that read the input alone, coefficients above zero: it flips no state.",
    ),
    {GRADIENT: "at initialization", RECALL: "after training", PARITY: "after training on short ones"},
    {
        GRADIENT: (of_metric("Norm of the gradient", number, 10, decays=True),),
        RECALL: (of_metric("Accuracy of recall", share, 0),),
        PARITY: (of_metric("Accuracy of parity", share, 0),),
    },
    x_label="T, distance",
)
derive, present, picture = CURVES.derive, CURVES.present, CURVES.picture
