"""Experiments on single statements: whether a system knows the order, how far cached segments reach, what a stack of both can do.

Letters as in experiments.py: T time, B batch, W = I = H width.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseq.models.positions import sinusoids

from .base import Call, Metric, Problem, Workload, results_of
from .experiments import SYMBOLS, TASKS, TESTED, Experiment, Task, learn
from .systems import SystemWorkload
from .torch_models import copies

PLAIN, POSITIONED = "without positions", "with positions"
ALONE, CACHED = "segments alone", "cached segments"
LAYERS = 2  # of a model that is given segments, and of a stack


def _blocks(models: Any, w: Workload) -> list[nn.Module]:
    return [models.blocks.Block(w.H, w.heads, 2 * w.H, activation="gelu") for _ in range(LAYERS)]


# All have 16 W² elements in their matrices. A hybrid of depth one is an LSTM and an attention block.
STACKS: dict[str, Callable[[Any, Workload], nn.Module]] = {
    "lstms": lambda models, w: models.hybrid.LSTM(w.H, w.H, LAYERS, batch_first=True),
    "encoder": lambda models, w: models.transformer.Encoder(_blocks(models, w), nn.LayerNorm(w.H)),
    "decoder": lambda models, w: models.transformer.Decoder(_blocks(models, w), nn.LayerNorm(w.H)),
    "both": lambda models, w: models.Hybrid(w.H, w.heads, LAYERS // 2, feedforward=2 * w.H),
}


def own_stack(w: Workload) -> nn.Module:
    return STACKS[w.function](importlib.import_module("fastseq.models"), w)


def torch_stack(w: Workload) -> nn.Module:
    return STACKS[w.function](copies(), w)


@dataclass(frozen=True)
class Statement(Experiment):
    """`function`: of STACKS. `variant`: how it is used."""

    variant: str = ""

    @property
    def growth(self) -> int:
        return 2

    def problem(self) -> Problem:
        return Problem.of(self, torch_stack)

    def torch_results(self, problem: Problem, dtype: torch.dtype, device: str, *, in_parts: bool) -> dict[str, Tensor]:
        return results_of(Call(torch_stack(self), problem, "batch", dtype=dtype, device=device))

    def cost(self) -> tuple[int, float, float]:
        """Every matrix times every token, without what attention adds."""
        weights = LAYERS * 8 * self.H * self.H
        return 1, 2.0 * 3 * weights * self.tokens, float(weights * self.torch_dtype.itemsize)

    def detail(self) -> dict[str, Any]:
        return super().detail() | {"variant": self.variant}


def order(w: Any, provider: Any, generator: torch.Generator) -> float:
    """How much the last output changes, relative to it, when the steps before it change places."""
    layer = w.layer(provider)
    x = torch.randn(w.T + 1, w.B, w.I, generator=generator).to(device=w.device, dtype=w.torch_dtype)
    places = torch.cat((torch.randperm(w.T, generator=generator), torch.tensor([w.T])))
    where = sinusoids(torch.arange(w.T + 1), w.I).to(x)[:, None] if w.variant == POSITIONED else 0.0
    with torch.no_grad():
        before, after = layer(x + where)[-1], layer(x[places] + where)[-1]
    return ((after - before).norm() / before.norm()).item()


TASKS["order"] = Task(order, "change of the last output")


@dataclass(frozen=True)
class Context(SystemWorkload):
    """Transformer-XL on a token, T tokens that mean nothing, and the first one again; segments of `span` end with the sequence.

    `variant`: whether a segment is given the memory of those before it, which gets no gradient, or none.
    """

    mode: str = "training"
    vocabulary: int = 2 * SYMBOLS + 1
    same_length: bool = False
    variant: str = ""
    budget: int = 0
    seconds: float = 0.0
    seeds: int = 3
    rate: float = 5e-3

    def measure(self, provider: Any) -> Metric:
        values = []
        for seed in range(self.seeds):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                system = provider.build(self).to(device=self.device, dtype=self.torch_dtype)
                values.append(self._learned(system.model, torch.Generator().manual_seed(seed)))
        return Metric.of("test loss", "nats", values)

    def _learned(self, model: Any, generator: torch.Generator) -> float:
        """Cross entropy of the last token, which repeats one that stands T tokens before it."""

        def loss(rows: int = self.B) -> Tensor:
            x = torch.randint(SYMBOLS, 2 * SYMBOLS, (rows, self.T + 1), generator=generator)
            x[:, 0], x[:, -1] = torch.randint(SYMBOLS, (rows,), generator=generator), 2 * SYMBOLS
            x = x.to(self.device)
            return F.cross_entropy(through_segments(model, x, self.span, cached=self.variant == CACHED)[:, -1], x[:, 0])

        learn(self, model, loss)
        with torch.no_grad():
            return loss(TESTED).item()

    def detail(self) -> dict[str, Any]:
        return super().detail() | {"variant": self.variant, "budget": self.budget, "seeds": self.seeds}


def through_segments(model: Any, tokens: Tensor, segment: int, *, cached: bool) -> Tensor:
    """Logits [B, T, words] of a Transformer-XL, whose last segment ends with the sequence."""
    first = tokens.shape[1] % segment
    parts = [tokens[:, :first], *tokens[:, first:].split(segment, 1)] if first else tokens.split(segment, 1)
    logits, state = [], model.start(len(tokens))
    for part in parts:
        y, state = model(part, state if cached else model.start(len(tokens)))
        logits.append(y)
    return torch.cat(logits, 1)
