"""`python -m fastseq.benchmarks.gpu.baselines --out FILE`: what the device and torch's own kernels do here, before any of ours.

A copy, a matrix product, cuDNN's LSTM and GRU by precision, scaled_dot_product_attention by backend: what every other figure of a
day is compared with. FILE gets a JSON row each as soon as it is measured; one that cannot run says why, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..measure.timing import Timing
from ..workloads.base import fp32_products
from ..workloads.clocks import Clock, clock_for

SAMPLES = 7
SECONDS = 0.05  # of a sample, at least
BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
Run = Callable[[], object]


class Baseline(NamedTuple):
    """``make`` sets everything up and gives what is timed; ``work`` is in ``unit``s."""

    name: str
    make: Callable[[], Run]
    work: float
    unit: str  # "byte" or "flop"


def baselines(device: str, small: bool = False) -> Iterator[Baseline]:
    """In order of worth. ``small``: of sizes that a CPU does in no time."""
    yield from _machine(device, 1 << (20 if small else 31), 256 if small else 8192)
    rnns = ((8, 4, 32),) if small else ((512, 8, 512), (512, 64, 512), (512, 64, 1024), (512, 1, 256))
    for precision in ("float16", "bfloat16", "tf32", "ieee"):
        for (T, B, H), cell in ((sizes, cell) for sizes in rnns for cell in ("LSTM", "GRU")):
            yield from _recurrent(device, cell, precision, T, B, H)
    for T, E in ((32, 16),) if small else ((2048, 64), (2048, 128), (8192, 128)):
        for dtype in ("bfloat16", "float16"):
            for causal in (False, True):
                yield from _attention(device, dtype, T, E, causal)


def _machine(device: str, size: int, n: int) -> Iterator[Baseline]:
    def copy() -> Run:
        x = torch.empty(size, dtype=torch.uint8, device=device).random_()
        y = torch.empty_like(x)
        return lambda: y.copy_(x)

    yield Baseline(f"copy {size >> 20} MiB", copy, 2 * size, "byte")
    for dtype in ("bfloat16", "float16", "float32"):

        def product(dtype: str = dtype) -> Run:
            a, b = (torch.randn(n, n, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
            return lambda: a @ b

        yield Baseline(f"product {n} {dtype}", product, 2 * n**3, "flop")


def _recurrent(device: str, cell: str, precision: str, T: int, B: int, H: int) -> Iterator[Baseline]:
    gates = 4 if cell == "LSTM" else 3
    dtype = torch.float32 if precision in ("tf32", "ieee") else getattr(torch, precision)
    for training in (False, True):

        def make(training: bool = training) -> Run:
            layer = getattr(nn, cell)(H, H).to(device, dtype).requires_grad_(training).train(training)
            x = torch.randn(T, B, H, device=device, dtype=dtype, requires_grad=training)
            wanted = [x, *layer.parameters()]

            def run() -> object:
                with fp32_products(tf32=precision == "tf32"), nullcontext() if training else torch.inference_mode():
                    y, _ = layer(x)
                    return torch.autograd.grad(y, wanted, y.detach()) if training else y

            return run

        mode, products = ("training", 6) if training else ("inference", 2)
        yield Baseline(f"{cell} T={T} B={B} H={H} {precision} {mode}", make, products * 2 * T * B * gates * H * H, "flop")


def _attention(device: str, dtype: str, T: int, E: int, causal: bool) -> Iterator[Baseline]:
    B, heads = (1, 2) if T < 100 else (16384 // T, 2048 // E)
    for backend in BACKENDS:
        for training in (False, True):
            if backend == "MATH" and T > 4096:
                continue

            def make(backend: str = backend, training: bool = training) -> Run:
                tensors = [torch.randn(B, heads, T, E, device=device, dtype=getattr(torch, dtype)) for _ in range(3)]
                q, k, v = (tensor.requires_grad_(training) for tensor in tensors)

                def run() -> object:
                    with sdpa_kernel(SDPBackend.__members__[backend]):
                        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
                        return torch.autograd.grad(out, (q, k, v), out.detach()) if training else out

                return run

            name = f"SDPA {backend} B={B} H={heads} T={T} E={E} {dtype}" + (" causal" if causal else "")
            work = (3.5 if training else 1) * 4 * B * heads * T * T * E / (2 if causal else 1)
            yield Baseline(f"{name} {'training' if training else 'inference'}", make, work, "flop")


def measured(baseline: Baseline, clock: Clock) -> dict[str, Any]:
    """A row: seconds, what that is of bytes or operations in a second, or why there is none."""
    row: dict[str, Any] = {"name": baseline.name}
    try:
        run = baseline.make()
        run()
        once = max(clock.measure(run, 1), 1e-7)
        calls = max(1, min(100, int(SECONDS / once)))
        timing = Timing.of([clock.measure(run, calls) for _ in range(SAMPLES)], calls)
    except (RuntimeError, AssertionError) as error:  # "No available kernel", out of memory: of this one
        return row | {"failed": str(error).strip().splitlines()[0]}
    rate = baseline.work / timing.median
    return row | {"time": timing.as_dict(), "rate": rate, "unit": f"{baseline.unit}/s"}


def sentence(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['name']}: {row['failed']}"
    figure = f"{row['rate'] / 1e12:.2f} T{'B' if row['unit'] == 'byte/s' else 'FLOP'}/s"
    return f"{row['name']}: {row['time']['median'] * 1e3:.3f} ms, {figure}"


def main(argv: Sequence[str] | None = None) -> int:
    """0: all that can run was measured, or the time was up; 2: bad arguments."""
    plain = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog="python -m fastseq.benchmarks.gpu.baselines", description=__doc__, formatter_class=plain)
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON rows, one a line")
    p.add_argument("--device", default="cuda", help="default: %(default)s; cpu measures small sizes, to try it out")
    p.add_argument(
        "--seconds", type=float, default=120.0, metavar="N", help="no other is begun after so many (default: %(default)g)"
    )
    args = p.parse_args(argv)
    began = time.monotonic()
    try:
        kind = torch.device(args.device).type
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device: torch finds no CUDA device")
        file = args.out.open("w", encoding="utf-8")
    except (OSError, RuntimeError, ValueError) as error:
        p.error(str(error))
    clock = clock_for(args.device)
    with file, torch.random.fork_rng():
        torch.manual_seed(0)
        for baseline in baselines(args.device, small=kind == "cpu"):
            if time.monotonic() - began > args.seconds:
                print("the time is up")
                break
            row = measured(baseline, clock)
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(sentence(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
