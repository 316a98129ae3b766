"""Small recurrent models as people build them, and as they call them: at once, packed, step by step, or fed by their own output.

A model is a row of STAND_INS: torch.nn layers, between an embedding and a readout where it has them. Its output is [B, T, out]
(packed [N, out]); in training the gradients are those of the mean of its squares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from .base import MODES
from .models import ModelWorkload

WAYS = {
    "whole": "one call",
    "packed": "a PackedSequence",
    "steps": "step by step",
    "rollout": "step by step, each output the next input",
}


class StandIn(NamedTuple):
    """`hidden`: of layers that are modules of their own; `layers`: of one module. `vocabulary` 0: the input is features."""

    name: str
    cell: str
    B: int
    T: int
    I: int  # noqa: E741
    hidden: tuple[int, ...]
    layers: int = 1
    both: bool = False
    way: str = "whole"
    vocabulary: int = 0
    out: int = 0  # features of the readout; 0: none, but what a vocabulary asks for
    modes: tuple[str, ...] = tuple(MODES)


INFERENCE = ("inference",)
STAND_INS = {
    row.name: row
    for row in (
        *(StandIn(f"streaming {cell} 128", cell, 1, 16, 128, (128,), way="steps") for cell in ("LSTM", "GRU", "RNN")),
        StandIn("char-rnn, sampling", "LSTM", 1, 32, 128, (128,), 2, way="steps", vocabulary=100, modes=INFERENCE),
        StandIn("DeepAR", "LSTM", 32, 72, 16, (40,), 2, out=16),
        StandIn("DeepAR, sampling", "LSTM", 100, 24, 16, (40,), 2, way="rollout", out=16, modes=INFERENCE),
        StandIn("LSTM 25", "LSTM", 64, 48, 4, (25,), out=1),
        StandIn("GRU 25", "GRU", 64, 48, 4, (25,), out=1),
        StandIn("BiLSTM 256, a sentence", "LSTM", 1, 20, 256, (256,), both=True),
        StandIn("char LSTM 128", "LSTM", 50, 50, 128, (128,), vocabulary=100),
        StandIn("LSTM 650 x 2", "LSTM", 20, 35, 650, (650,), 2, vocabulary=1000),
        StandIn("AWD-LSTM 1152", "LSTM", 4, 35, 400, (1152, 1152, 400), vocabulary=1000),
        StandIn("LSTM 128, B=128", "LSTM", 128, 50, 128, (128,), out=2),
        StandIn("GRU decoder, word by word", "GRU", 32, 12, 256, (256,), way="steps", vocabulary=1000),
        StandIn("packed LSTM 1024", "LSTM", 8, 20, 512, (1024,), way="packed", vocabulary=1000),
        StandIn("packed BiLSTM 256", "LSTM", 32, 40, 256, (256,), both=True, way="packed", out=16),
        StandIn("RNN 128", "RNN", 32, 28, 28, (128,), out=10),
    )
}


@dataclass(frozen=True)
class StandInWorkload(ModelWorkload):
    """`function` is a name of STAND_INS."""

    narrow: bool = False  # the model with layers of 24 units

    @property
    def row(self) -> StandIn:
        row = STAND_INS[self.function]
        if not self.narrow:
            return row
        return row._replace(I=24, hidden=(24,) * len(row.hidden), out=24 if row.way == "rollout" else row.out)

    @property
    def unseen(self) -> str:
        return ""

    def missing(self) -> str | None:
        return None

    def build(self) -> nn.Module:
        return Layers(self)

    def small(self) -> StandInWorkload:
        return replace(self, T=min(self.T, 7), B=min(self.B, 3), I=24, H=24, narrow=True)

    @property
    def matrices_of_a_token(self) -> int:
        """Elements of the matrices that every token goes through."""
        with torch.device("meta"):
            model = self.build()
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        return sum(p.numel() for p in model.parameters() if p.dim() > 1 and id(p) not in tables)

    def draw(self) -> Tensor:
        """[B, T] of tokens, or [B, T, I]."""
        row = self.row
        if row.vocabulary:
            return torch.randint(row.vocabulary, (self.B, self.T), generator=self.generator())
        return torch.randn(self.B, self.T, row.I, generator=self.generator(), dtype=torch.float64)

    def loss(self, output: Tensor, input: Tensor) -> Tensor:
        return output.square().mean()

    def detail(self) -> dict[str, Any]:
        return {"hidden": list(self.row.hidden), "layers": self.row.layers, "way": WAYS[self.row.way]}


class Layers(nn.Module):
    """The model of a row."""

    def __init__(self, w: StandInWorkload) -> None:
        super().__init__()
        row = w.row
        self.way, self.lengths = (
            row.way,
            torch.linspace(w.T, 1, w.B, device="cpu").long(),
        )  # as spread as can be, the longest first
        self.embedding = nn.Embedding(row.vocabulary, row.I) if row.vocabulary else nn.Identity()
        cell: Callable[..., nn.Module] = getattr(nn, row.cell)
        options: dict[str, Any] = {"num_layers": row.layers, "bidirectional": row.both, "batch_first": True}
        widths = (row.I, *row.hidden)
        self.layers = nn.ModuleList(cell(a, b, **options) for a, b in zip(widths, row.hidden, strict=False))
        out, width = row.out or row.vocabulary, widths[-1] * (1 + row.both)
        self.readout = nn.Linear(width, out) if out else nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        x = self.embedding(input)
        if self.way == "packed":
            x = pack_padded_sequence(x, self.lengths, batch_first=True)
        if self.way in ("whole", "packed"):
            y, _ = self.through(x, [None] * len(self.layers))
            return self.readout(y.data if self.way == "packed" else y)
        states, outputs = [None] * len(self.layers), []
        step = x[:, :1]
        for t in range(x.shape[1]):
            y, states = self.through(x[:, t : t + 1] if self.way == "steps" else step, states)
            step = self.readout(y)
            outputs.append(step)
        return torch.cat(outputs, 1)

    def through(self, x: Any, states: list[Any]) -> tuple[Any, list[Any]]:
        """Output, and every layer's states."""
        after = []
        for layer, state in zip(self.layers, states, strict=True):
            x, state = layer(x, state)
            after.append(state)
        return x, after
