"""Experiments on single statements: whether a layer knows the order, how far cached segments reach, what a stack of both can do.

Letters as in experiments.py: T time, B batch, W = I = H width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Workload
from .experiments import SYMBOLS, TASKS, TESTED, Experiment, Task, learn, positions
from .layers import TransformerBlock, materialized

PLAIN, POSITIONED = "without positions", "with positions"
ALONE, CACHED = "segments alone", "cached segments"
LAYERS = 2  # of a model that is given segments, and of a stack


@dataclass(frozen=True)
class Statement(Experiment):
    """`variant`: how the layer is used. `segment`: steps that are seen at once."""

    variant: str = ""
    segment: int = 0

    def detail(self) -> dict[str, Any]:
        return super().detail() | {"variant": self.variant, "segment": self.segment}


@dataclass(frozen=True)
class StackWorkload(Workload):
    """Two layers, one on the other."""

    @property
    def growth(self) -> int:
        return 2

    def cost(self) -> tuple[int, float, float]:
        """Every matrix times every token, without what attention adds."""
        weights = LAYERS * 8 * self.H * self.H
        passes = 3 if self.mode == "training" else 1
        return 1, 2.0 * passes * weights * self.tokens, float(weights * self.torch_dtype.itemsize)


def order(w: Any, provider: Any, generator: torch.Generator) -> float:
    """How much the last output changes, relative to it, when the steps before it change places."""
    layer = w.layer(provider)
    x = torch.randn(w.T + 1, w.B, w.I, generator=generator).to(device=w.device, dtype=w.torch_dtype)
    places = torch.cat((torch.randperm(w.T, generator=generator), torch.tensor([w.T])))
    where = positions(w.T + 1, w.I).to(x)[:, None] if w.variant == POSITIONED else 0.0
    with torch.no_grad():
        before, after = layer(x + where)[-1], layer(x[places] + where)[-1]
    return ((after - before).norm() / before.norm()).item()


class Segments(nn.Module):
    """Blocks over segments that end with the sequence, each beside the inputs before it, which get no gradient: [B, T, W].

    Transformer-XL's recurrence (Dai et al., 2019), with positions of the whole sequence added in front.
    """

    def __init__(self, blocks: list[TransformerBlock], segment: int, cache: int) -> None:
        super().__init__()
        self.blocks, self.segment, self.cache = nn.ModuleList(blocks), segment, cache

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            ends = range(x.shape[1], 0, -self.segment)
            x = torch.cat([self._one(block, x, max(0, end - self.segment), end) for end in reversed(ends)], dim=1)
        return x

    def _one(self, block: Any, x: Tensor, start: int, end: int) -> Tensor:
        past, here = x[:, max(0, start - self.cache) : start].detach(), x[:, start:end]
        q, k, v = block.attention.split(block.attention_norm(torch.cat((past, here), dim=1)))
        y = materialized(q[:, :, -here.shape[1] :], k, v)
        return block.feed_forward(here + block.attention.join(y))


def context(w: Any, provider: Any, generator: torch.Generator) -> float:
    """Cross entropy, in nats, of the last token, which repeats one that stands T steps before it."""
    blocks = [provider.build(w) for _ in range(LAYERS)]
    parts = nn.ModuleDict(
        {
            "embedding": nn.Embedding(2 * SYMBOLS + 1, w.I),
            "layers": Segments(blocks, w.segment, w.segment if w.variant == CACHED else 0),
            "readout": nn.Linear(w.H, SYMBOLS),
        }
    ).to(device=w.device, dtype=w.torch_dtype)

    def loss(rows: int = w.B) -> Tensor:
        x = torch.randint(SYMBOLS, 2 * SYMBOLS, (rows, w.T + 1), generator=generator)
        x[:, 0], x[:, -1] = torch.randint(SYMBOLS, (rows,), generator=generator), 2 * SYMBOLS
        x = x.to(w.device)
        h = parts["embedding"](x)
        y = parts["layers"](h + positions(w.T + 1, w.I).to(h))
        return F.cross_entropy(parts["readout"](y[:, -1]), x[:, 0])

    learn(w, parts, loss)
    with torch.no_grad():
        return loss(TESTED).item()


TASKS.update(order=Task(order, "change of the last output"), context=Task(context, "test loss", "nats"))
