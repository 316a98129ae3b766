"""Experiments: what a layer can do, where the other workloads ask how long it takes. Their figure is a Metric over seeds.

A task takes the layer that a provider builds, with parameters drawn by a seed, and gives one number. Everything is drawn from the
seed, so that providers see the same data in the same order, and a run repeats itself. Letters: T time, B batch, W = I = H width.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseq.models.positions import sinusoids

from .base import GATES, Metric, Workload
from .linear import WEIGHTS, LinearWorkload

DATA = Path(__file__).resolve().parent.parent.parent / "examples" / "data"
SYMBOLS = 8  # to be recalled; as many again that mean nothing, and one that asks
TESTED = 512  # sequences that an accuracy is taken from
COUNTED = 16  # bits whose parity is trained on, at the end of the curriculum
HELD_OUT = 0.1  # of a record, its end: never trained on


@dataclass(frozen=True)
class Experiment(Workload):
    """`task` with a layer of `function`. That layer is checked on input of the same size before anything is learned."""

    mode: str = "training"
    task: str = "gradient"
    budget: int = 0  # training steps
    seconds: float = 0.0  # of training beyond them
    seeds: int = 3
    samples: int = 0  # steps of a record that are trained on
    rate: float = 5e-3  # of learning

    def missing(self) -> str | None:
        file = TASKS[self.task].file
        return f"needs {file.name} of a checkout's examples/data" if file and not file.is_file() else None

    def measure(self, provider: Any) -> Metric:
        task = TASKS[self.task]
        values = []
        for seed in range(self.seeds):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                values.append(task.run(self, provider, torch.Generator().manual_seed(seed)))
        return Metric.of(task.metric, task.unit, values)

    def layer(self, provider: Any) -> Layer:
        return Layer(provider.build(self), provider.layout).to(device=self.device, dtype=self.torch_dtype)

    def detail(self) -> dict[str, Any]:
        return {"task": self.task, "budget": self.budget, "seeds": self.seeds, "samples": self.samples}


@dataclass(frozen=True)
class LinearExperiment(Experiment, LinearWorkload):
    """With a layer of linear recurrence."""


class Layer(nn.Module):
    """A provider's layer, time first: [T, B, W] -> [T, B, W]."""

    def __init__(self, module: nn.Module, layout: str) -> None:
        super().__init__()
        self.module, self.layout = module, layout

    def forward(self, x: Tensor) -> Tensor:
        y = self.module(x.transpose(0, 1) if self.layout == "batch" else x)
        y = y[0] if isinstance(y, tuple) else y
        return y.transpose(0, 1) if self.layout == "batch" else y


class Model(nn.Module):
    """A layer between an embedding and a readout; a layer that does not know the order is given sinusoidal positions."""

    def __init__(self, w: Experiment, provider: Any, embedding: nn.Module, outputs: int) -> None:
        super().__init__()
        self.ordered = w.function in GATES or w.function in WEIGHTS
        self.embedding, self.layer, self.readout = embedding, w.layer(provider), nn.Linear(w.H, outputs)
        self.to(device=w.device, dtype=w.torch_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[T, B] of symbols or [T, B, features] -> [T, B, outputs]."""
        h = self.embedding(x)
        return self.readout(self.layer(h if self.ordered else h + sinusoids(torch.arange(len(h)), h.shape[2]).to(h)[:, None]))


def learn(w: Any, model: nn.Module, loss_of: Callable[[], Tensor]) -> int:
    """`budget` steps of Adam, gradients clipped to norm 1, and as many more as begin in `seconds` of computing."""
    optimizer = torch.optim.Adam(model.parameters(), lr=w.rate)
    now = time.perf_counter if w.device.startswith("cuda") else time.process_time  # of a CPU what this program has of it
    steps, end = 0, now() + w.seconds if w.seconds else 0.0
    while steps < w.budget or now() < end:
        optimizer.zero_grad()
        loss_of().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
        if end and w.device.startswith("cuda"):
            torch.cuda.synchronize(w.device)
    return steps


def gradient(w: Experiment, provider: Any, generator: torch.Generator) -> float:
    """Root mean square of the singular values of d output[T] / d input[0], over a batch, each row with a random probe."""
    layer = w.layer(provider)
    x = torch.randn(w.T + 1, w.B, w.I, generator=generator).to(device=w.device, dtype=w.torch_dtype).requires_grad_()
    probe = torch.randn(w.B, w.H, generator=generator).to(x)
    (found,) = torch.autograd.grad(layer(x)[-1], x, probe)
    return math.sqrt(found[0].double().square().sum(-1).mean().item() / w.H)


def recall(w: Experiment, provider: Any, generator: torch.Generator) -> float:
    """Share of sequences whose first symbol is named after T - 1 that mean nothing. By chance: 1 / SYMBOLS."""
    model = Model(w, provider, nn.Embedding(2 * SYMBOLS + 1, w.I), SYMBOLS)

    def draw(rows: int) -> tuple[Tensor, Tensor]:
        x = torch.randint(SYMBOLS, 2 * SYMBOLS, (w.T + 1, rows), generator=generator)
        x[0], x[-1] = torch.randint(SYMBOLS, (rows,), generator=generator), 2 * SYMBOLS
        return x.to(w.device), x[0].to(w.device)

    def loss() -> Tensor:
        x, symbol = draw(w.B)
        return F.cross_entropy(model(x)[-1], symbol)

    learn(w, model, loss)
    x, symbol = draw(TESTED)
    with torch.no_grad():
        return (model(x)[-1].argmax(-1) == symbol).double().mean().item()


def parity(w: Experiment, provider: Any, generator: torch.Generator) -> float:
    """Share of sequences of T bits whose parity is named, after training on the parity so far of sequences that grow from 2 to
    COUNTED bits over the first half of the budget. By chance: a half."""
    model = Model(w, provider, nn.Embedding(2, w.I), 2)
    lengths = iter(range(w.budget))

    def draw(T: int, rows: int) -> tuple[Tensor, Tensor]:
        bits = torch.randint(0, 2, (T, rows), generator=generator).to(w.device)
        return bits, bits.cumsum(0) % 2

    def loss() -> Tensor:
        grown = min(1.0, 2 * next(lengths) / w.budget)
        bits, odd = draw(2 + round(grown * (COUNTED - 2)), w.B)
        return F.cross_entropy(model(bits).flatten(0, 1), odd.flatten())

    learn(w, model, loss)
    bits, odd = draw(w.T, TESTED)
    with torch.no_grad():
        return (model(bits)[-1].argmax(-1) == odd[-1]).double().mean().item()


def text(w: Experiment, provider: Any, generator: torch.Generator) -> float:
    """Cross entropy of the next character of a novel, in nats, on text that was not trained on."""
    record = letters()
    count = int(record.max()) + 1
    return predict(w, Model(w, provider, nn.Embedding(count, w.I), count), record, generator, of_letters)


def letters() -> Tensor:
    """The novel, its letters numbered."""
    text = TEXT.read_text(encoding="utf-8")
    alphabet = {letter: i for i, letter in enumerate(sorted(set(text)))}
    return torch.tensor([alphabet[letter] for letter in text])


def of_letters(y: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(y.flatten(0, 1), target.flatten())


def series(w: Experiment, provider: Any, generator: torch.Generator) -> float:
    """Squared error of the next month's sunspots, over that of taking this month's, on months that were not trained on."""
    with SUNSPOTS.open() as file:
        record = torch.tensor([float(row["sunspots"]) for row in csv.DictReader(file)])
    record = ((record - record.mean()) / record.std())[:, None]
    model = Model(w, provider, nn.Linear(1, w.I), 1)
    found = predict(w, model, record, generator, F.mse_loss)
    unknown = record[-_held_out(record) :]
    return found / F.mse_loss(unknown[:-1], unknown[1:]).item()


def _held_out(record: Tensor) -> int:
    return int(len(record) * HELD_OUT)


def predict(
    w: Any, model: nn.Module, record: Tensor, generator: torch.Generator, loss_of: Callable[[Tensor, Tensor], Tensor]
) -> float:
    """Trains on pieces of T steps of the last `samples` known ones; the loss on the held-out end, cut into pieces of T."""
    cut = len(record) - _held_out(record)
    known, unknown = record[max(0, cut - w.samples) : cut], record[cut:]
    starts_at = torch.arange(0, len(unknown) - w.T, w.T)[:TESTED]

    def pieces(of: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        piece = of[torch.arange(w.T + 1)[:, None] + starts].to(w.device)
        return piece[:-1], piece[1:]

    def step() -> Tensor:
        x, target = pieces(known, torch.randint(0, len(known) - w.T, (w.B,), generator=generator))
        return loss_of(model(cast(x)), cast(target))

    def cast(t: Tensor) -> Tensor:
        return t.to(w.torch_dtype) if t.is_floating_point() else t

    learn(w, model, step)
    with torch.no_grad():
        x, target = pieces(unknown, starts_at)
        return loss_of(model(cast(x)), cast(target)).item()


@dataclass(frozen=True)
class Task:
    """`run(experiment, provider, generator)` gives one number; `file`: the record that it needs."""

    run: Callable[[Experiment, Any, torch.Generator], float]
    metric: str
    unit: str = ""
    file: Path | None = None


TEXT, SUNSPOTS = DATA / "persuasion.txt", DATA / "sunspots.csv"
TASKS = {
    "gradient": Task(gradient, "gradient norm"),
    "recall": Task(recall, "accuracy"),
    "parity": Task(parity, "accuracy"),
    "text": Task(text, "test loss", "nats per character", TEXT),
    "series": Task(series, "test error", "of persistence", SUNSPOTS),
}
