"""What the programs share: their options, training the same model on torch's parts and on fastseq's, comparing losses and times.

Two programs that compute the same in floating point never agree in the last bit, and training makes the
difference grow. How far is too far? That is measured here too: `nudged` gives a copy of the model with every
weight moved by one unit of rounding, and it is trained along. Its losses drift from the original's by
rounding alone. The other model may drift 16 times as far as that copy has drifted so far (plus 16
roundings of the loss itself), because it rounds differently at every step and the copy was nudged only once.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import fastseq
from fastseq.benchmarks.workloads.torch_models import on_parts

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
except ModuleNotFoundError as error:
    sys.exit(f"the examples need {error.name}: pip install '.[examples]' (in the clone)")

ALLOWANCE = 16
JUMP = 0.02  # of the loss, for a model of which rounding decides more than the last digits


def positive(text: str) -> int:
    """An int from 1 on, for argparse."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return int(text)


def parser_of(doc: str | None, models: Iterable[str], default: str) -> argparse.ArgumentParser:
    """The options that all programs have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(models), default=default, help=f"what is trained (default {default})")
    parser.add_argument("--steps", type=positive, help="training steps (default 300, quick 20)")
    parser.add_argument("--quick", action="store_true", help="a small model and few steps: some seconds")
    parser.add_argument("--device", default="cpu", help="where, such as cpu or cuda (default cpu)")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="FILE", help="picture of the losses (default: <program>-<model>.png); none: no picture")
    return parser


def prepared(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked, and what they say of the whole process done."""
    options = parser.parse_args(arguments)
    try:
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"argument --device: {options.device!r} is no device here: {str(error).splitlines()[0]}")
    if options.plot is None:
        options.plot = f"{Path(parser.prog).stem}-{options.model}.png"
    elif options.plot != "none":
        if not Path(options.plot).resolve().parent.is_dir():
            parser.error(f"argument --plot: there is no folder {Path(options.plot).resolve().parent}")
        if Path(options.plot).suffix not in (".png", ".svg", ".pdf"):
            parser.error(f"argument --plot: must be none or end with .png, .svg or .pdf, got {options.plot!r}")
    if options.threads:
        torch.set_num_threads(options.threads)
    options.steps = options.steps or (20 if options.quick else 300)
    if torch.device(options.device).type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # fp32 against fp32
    torch.manual_seed(options.seed)
    return options


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


def sides(model: nn.Module) -> dict[str, nn.Module]:
    """The model on torch's parts, on fastseq's, and on torch's from weights that are a rounding away."""
    ours, theirs = copy.deepcopy(model), on_parts(copy.deepcopy(model))
    if any(type(module) in (nn.LSTM, nn.GRU, nn.RNN) for module in ours.modules()):
        print(fastseq.convert(ours))
    return {"torch.nn": theirs, "fastseq": ours, "nudged": nudged(theirs)}


def train(
    models: dict[str, nn.Module],
    batches: Iterable[tuple[Tensor, ...]],
    steps: int,
    loss_of: Callable[..., Tensor],
    learning_rate: float,
) -> dict[str, History]:
    """Train every model on the same batches, one step of each in turn: a slow moment hits them alike."""
    histories = {name: History() for name in models}
    optimizers = {name: torch.optim.Adam(model.parameters(), learning_rate) for name, model in models.items()}
    names = list(models)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=steps, loss="-")
        for step, batch in zip(range(steps), batches, strict=False):
            for name in names:
                torch.manual_seed(step)  # a model that draws numbers draws the same
                start = time.perf_counter()
                optimizers[name].zero_grad()
                loss = loss_of(models[name], *batch)
                loss.backward()
                nn.utils.clip_grad_norm_(models[name].parameters(), 1.0)
                optimizers[name].step()
                histories[name].losses.append(loss.item())  # .item() waits for the device
                histories[name].seconds.append(time.perf_counter() - start)
            names.reverse()
            progress.update(task, advance=1, loss=f"{histories['fastseq'].losses[-1]:.3f}")
    return histories


def compare(histories: dict[str, History], jumps: bool = False) -> None:
    """Print the losses of "torch.nn" and "fastseq", and raise AssertionError unless they agree.

    `jumps`: of a model of which rounding decides more than the last digits, such as in which bucket a token falls.
    """
    torch_losses, losses = histories["torch.nn"].losses, histories["fastseq"].losses
    drift, bounds = 0.0, []
    for ours, theirs in zip(histories["nudged"].losses, torch_losses, strict=True):
        drift = max(drift, abs(ours - theirs))
        bounds.append(ALLOWANCE * (drift + torch.finfo(torch.float32).eps * abs(theirs)) + jumps * JUMP * abs(theirs))

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


def medians(histories: dict[str, History]) -> dict[str, float]:
    """Milliseconds of a step, without the first steps, which warm up."""
    seconds = {name: history.seconds for name, history in histories.items()}
    return {name: 1e3 * statistics.median(times[min(3, len(times) - 1) :]) for name, times in seconds.items()}


def print_times(histories: dict[str, History]) -> None:
    times = medians(histories)
    theirs, ours = times["torch.nn"], times["fastseq"]
    print(f"training step: torch.nn {theirs:.2f} ms, fastseq {ours:.2f} ms, ratio {theirs / ours:.2f}")


def plot(histories: dict[str, History], title: str, loss: str, file: str) -> None:
    """Both losses, step by step, as a picture; nothing if the file is "none"."""
    if file == "none":
        return
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        sys.exit(f"a picture needs {error.name}: pip install '.[examples]' (in the clone), or --plot none")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes, times = figure.subplots(), medians(histories)
    for name, style in (("torch.nn", {"linewidth": 3, "alpha": 0.4}), ("fastseq", {"linewidth": 1})):
        axes.plot(histories[name].losses, label=f"{name}: {times[name]:.2f} ms a step", **style)
    axes.set(title=title, xlabel="step", ylabel=loss)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file)
    print(f"losses drawn in {file}")
