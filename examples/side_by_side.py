"""Training models side by side: same start, same batches, steps in turn; then comparing losses and times.

Two programs that compute the same in floating point never agree in the last bit, and training makes the
difference grow. How far is too far? That is measured here too: `nudged` gives a copy of the model with every
weight moved by one unit of rounding, and it is trained along. Its losses drift from the original's by
rounding alone. The converted model may drift 16 times as far as that copy has drifted so far (plus 16
roundings of the loss itself), because it rounds differently at every step and the copy was nudged only once.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

ALLOWANCE = 16


@dataclass
class History:
    """Loss and wall time of every step of one model."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def nudged(model: nn.Module) -> nn.Module:
    """A copy with every weight one unit of rounding higher or lower."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in twin.parameters():
            sign = torch.randint(0, 2, weight.shape, generator=generator).to(weight) * 2 - 1
            weight.mul_(1 + sign * torch.finfo(weight.dtype).eps)
    return twin


def train(
    models: dict[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor],
    learning_rate: float,
) -> dict[str, History]:
    """Train every model on the same batches, one step of each in turn: a slow moment hits them alike."""
    histories = {name: History() for name in models}
    optimizers = {name: torch.optim.Adam(model.parameters(), learning_rate) for name, model in models.items()}
    names = list(models)
    for step, (inputs, targets) in enumerate(batches):
        print(f"\rstep {step}", end="", file=sys.stderr)
        for name in names:
            start = time.perf_counter()
            optimizers[name].zero_grad()
            loss = loss_of(models[name], inputs, targets)
            loss.backward()
            nn.utils.clip_grad_norm_(models[name].parameters(), 1.0)
            optimizers[name].step()
            histories[name].losses.append(loss.item())  # .item() waits for the device
            histories[name].seconds.append(time.perf_counter() - start)
        names.reverse()
    print(file=sys.stderr)
    return histories


def compare(histories: dict[str, History]) -> None:
    """Print the losses of "torch.nn" and "fastseq", and raise AssertionError unless they agree."""
    torch_losses, losses = histories["torch.nn"].losses, histories["fastseq"].losses
    drift, bounds = 0.0, []
    for ours, theirs in zip(histories["nudged"].losses, torch_losses, strict=True):
        drift = max(drift, abs(ours - theirs))
        bounds.append(ALLOWANCE * (drift + torch.finfo(torch.float32).eps * abs(theirs)))

    print(f"\n{'step':>6}{'torch.nn':>12}{'fastseq':>12}{'difference':>12}{'allowed':>12}")
    count = len(losses)
    for step in sorted({*range(0, count, max(1, count // 8)), count - 1}):
        row = (torch_losses[step], losses[step])
        difference = abs(losses[step] - torch_losses[step])
        print(f"{step:>6}{row[0]:>12.6f}{row[1]:>12.6f}{difference:>12.1e}{bounds[step]:>12.1e}")

    for step in range(count):
        difference = abs(losses[step] - torch_losses[step])
        assert difference <= bounds[step], f"step {step}: losses differ by {difference}, allowed is {bounds[step]}"
    print(f"losses agree at every one of {count} steps")


def print_times(histories: dict[str, History]) -> None:
    """Median step times, without the first steps, which warm up."""
    medians = {}
    for name in ("torch.nn", "fastseq"):
        seconds = histories[name].seconds
        medians[name] = 1e3 * statistics.median(seconds[min(3, len(seconds) - 1) :])
    theirs, ours = medians["torch.nn"], medians["fastseq"]
    print(f"training step: torch.nn {theirs:.2f} ms, fastseq {ours:.2f} ms, ratio {theirs / ours:.2f}")
