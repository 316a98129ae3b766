"""Sunspots a year ahead, from 260 years of monthly counts: any causal model by name, on torch's parts and on fastseq's.

    python examples/forecast.py                 # a GRU; about a minute on a CPU
    python examples/forecast.py --model tcn --quick

Both start from the same weights and see the same batches. The program checks that their losses agree, then compares
the forecast with what was observed, and the times. Data: see data/README.md.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from bodies import BODIES, JUMPING, Sizes, output_of
from side_by_side import compare, parser_of, plot, prepared, print_times, sides, train
from torch import Tensor, nn
from torch.nn import functional as F

DATA = Path(__file__).parent / "data" / "sunspots.csv"
AHEAD = 12  # months
LAST_TRAINING_YEAR = 1975


class Forecaster(nn.Module):
    """The next 12 months at every month: [B, T, 1] -> [B, T, 12], as change against that month."""

    def __init__(self, s: Sizes, name: str):
        super().__init__()
        self.into, self.head = nn.Linear(1, s.width), nn.Linear(s.width, AHEAD)
        self.body = BODIES[name](s)

    def forward(self, months: Tensor) -> Tensor:
        return months + self.head(output_of(self.body, self.into(months)))


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error over all months and all 12 horizons."""
    return F.mse_loss(model(inputs), targets)


def pairs(series: Tensor) -> tuple[Tensor, Tensor]:
    """Months [..., T, 1] and, for each of them, the 12 that follow [..., T, 12], from [..., T + 12]."""
    return series[..., :-AHEAD, None], series[..., 1:].unfold(-1, AHEAD, 1)


def batches(series: Tensor, length: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows from random places."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(series) - length - AHEAD + 1, (size, 1), generator=generator)
        yield pairs(series[(starts + torch.arange(length + AHEAD)).to(series.device)])


def read() -> tuple[list[str], Tensor]:
    """Names of the months, "1749-01" and so on, and the mean number of sunspots in each."""
    with DATA.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row["month"] for row in rows], torch.tensor([float(row["sunspots"]) for row in rows])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, BODIES, "gru")
    options = prepared(parser, arguments)
    s, size = (Sizes(32, 2, 1, 64), 8) if options.quick else (Sizes(64, 4, 2, 128), 16)

    months, counts = read()
    split = next(i for i, month in enumerate(months) if int(month[:4]) > LAST_TRAINING_YEAR)
    mean, deviation = counts[:split].mean(), counts[:split].std()
    series = ((counts - mean) / deviation).to(options.device)
    models = sides(Forecaster(s, options.model).to(options.device))

    @torch.no_grad()
    def error_of(predict: Callable[[Tensor], Tensor]) -> float:
        """RMS from months that were not trained on, the last year of each window; the state comes warm out of those before."""
        windows = series[split - s.length + AHEAD :].unfold(0, s.length + AHEAD, AHEAD)
        inputs, targets = pairs(windows)
        return ((predict(inputs) - targets)[:, -AHEAD:].square().mean().sqrt() * deviation).item()

    untrained = error_of(models["fastseq"])
    histories = train(models, batches(series[:split], s.length, size, options.seed), options.steps, loss_of, 2e-3)
    compare(histories, options.model in JUMPING)

    errors = {side: error_of(models[side]) for side in ("fastseq", "torch.nn")}
    errors |= {"untrained": untrained, "as this month": error_of(lambda months: months.expand(-1, -1, AHEAD))}
    for name, error in errors.items():
        print(f"test error from {months[split]} on, {name}: {error:.2f} sunspots (RMS, 1 to 12 months ahead)")
    assert errors["fastseq"] < untrained, "training did not help"
    print_times(histories)
    plot(histories, f"{options.model}: sunspots a year ahead", "squared error", options.plot)

    print(f"\nforecast made after {months[-AHEAD - 1]}")
    with torch.no_grad():
        last = models["fastseq"](series[None, -s.length - AHEAD : -AHEAD, None])[0, -1].cpu()
    for month, forecast, observed in zip(months[-AHEAD:], (last * deviation + mean).clamp(min=0), counts[-AHEAD:], strict=True):
        print(f"  {month}  forecast {forecast:6.1f}  observed {observed:6.1f}")


if __name__ == "__main__":
    main()
