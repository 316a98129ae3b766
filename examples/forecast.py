"""Sunspots a year ahead, from 260 years of monthly counts, trained with torch.nn and with fastseq.

    python examples/forecast.py                 # a GRU; about a minute on a CPU
    python examples/forecast.py --cell lstm --quick

Both models start from the same weights and see the same batches. The program checks that their losses agree,
then compares the forecast with what was observed, and the times. Data: see data/README.md.
"""

from __future__ import annotations

import argparse
import copy
import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from side_by_side import compare, nudged, print_times, train
from torch import Tensor, nn
from torch.nn import functional as F

import fastseq

DATA = Path(__file__).parent / "data" / "sunspots.csv"
AHEAD = 12  # months
LAST_TRAINING_YEAR = 1975


class Forecaster(nn.Module):
    """The next 12 months at every month: [B, T, 1] -> [B, T, 12], as change against that month."""

    def __init__(self, cell: str, hidden: int):
        super().__init__()
        kind = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[cell]
        self.rnn = kind(1, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, AHEAD)

    def forward(self, months: Tensor) -> Tensor:
        return months + self.head(self.rnn(months)[0])


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error over all months and all 12 horizons."""
    return F.mse_loss(model(inputs), targets)


def pairs(series: Tensor) -> tuple[Tensor, Tensor]:
    """Months [..., T, 1] and, for each of them, the 12 that follow [..., T, 12], from [..., T + 12]."""
    return series[..., :-AHEAD, None], series[..., 1:].unfold(-1, AHEAD, 1)


def batches(series: Tensor, steps: int, length: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows from random places."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(0, len(series) - length - AHEAD + 1, (size, 1), generator=generator)
        yield pairs(series[(starts + torch.arange(length + AHEAD)).to(series.device)])


def read() -> tuple[list[str], Tensor]:
    """Names of the months, "1749-01" and so on, and the mean number of sunspots in each."""
    with DATA.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row["month"] for row in rows], torch.tensor([float(row["sunspots"]) for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", choices=("lstm", "gru", "rnn"), default="gru")
    parser.add_argument("--steps", type=int, help="training steps (default 300, quick 20)")
    parser.add_argument("--quick", action="store_true", help="a small model and few steps: some seconds")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cudnn.allow_tf32 = False  # fp32 against fp32, on a GPU too
    torch.manual_seed(options.seed)
    hidden, length, size = (32, 66, 8) if options.quick else (64, 132, 16)
    steps = options.steps or (20 if options.quick else 300)

    months, counts = read()
    split = next(i for i, month in enumerate(months) if int(month[:4]) > LAST_TRAINING_YEAR)
    mean, deviation = counts[:split].mean(), counts[:split].std()
    series = ((counts - mean) / deviation).to(options.device)

    model = Forecaster(options.cell, hidden).to(options.device)
    converted = copy.deepcopy(model)
    print(fastseq.convert(converted, example_inputs=series[:length].view(1, -1, 1)))

    @torch.no_grad()
    def error_of(predict: Callable[[Tensor], Tensor]) -> float:
        """RMS over the months that were not trained on; the state comes warm out of those before."""
        inputs, targets = pairs(series)
        return ((predict(inputs) - targets)[split:].square().mean().sqrt() * deviation).item()

    untrained = error_of(model)
    histories = train(
        {"torch.nn": model, "fastseq": converted, "nudged": nudged(model)},
        batches(series[:split], steps, length, size, options.seed),
        loss_of,
        learning_rate=2e-3,
    )
    compare(histories)

    errors = {"fastseq": error_of(converted), "torch.nn": error_of(model), "untrained": untrained}
    errors["as this month"] = error_of(lambda months: months.expand(-1, AHEAD))
    for name, error in errors.items():
        print(f"test error from {months[split]} on, {name}: {error:.2f} sunspots (RMS, 1 to 12 months ahead)")
    assert errors["fastseq"] < untrained, "training did not help"
    print_times(histories)

    print(f"\nforecast made after {months[-AHEAD - 1]}")
    with torch.no_grad():
        last = (converted(series[:-AHEAD, None])[-1].cpu() * deviation + mean).clamp(min=0)
    for month, forecast, observed in zip(months[-AHEAD:], last, counts[-AHEAD:], strict=True):
        print(f"  {month}  forecast {forecast:6.1f}  observed {observed:6.1f}")


if __name__ == "__main__":
    main()
