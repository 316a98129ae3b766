"""`python -m fastseq.benchmarks.gpu.tune_attention --out FILE`: which tiles, warps and stages the attention kernels should have.

Every candidate is compiled; registers, shared memory and the model of `attention_model` give a predicted time. With a GPU every
candidate is also checked against fp64 and timed, kernel by kernel; without one the predictions are all there is, and it says so.
FILE gets one JSON row for each candidate.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..measure.check import check_provider
from ..providers.attention import ATTENTION_PROVIDERS, OWN
from ..workloads.attention import AttentionWorkload
from ..workloads.clocks import CudaClock
from . import attention_model as model

KERNELS = ("forward", "bwd_dq", "bwd_dkdv")  # by their names, which those of configs are
BM, BN, WARPS, STAGES = (32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3, 4)
ROUNDS = 10
LOG_WIDTH = 150


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m fastseq.benchmarks.gpu.tune_attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON rows, one a line")
    p.add_argument("--kernel", action="append", choices=sorted(KERNELS), help="repeatable (default: all)")
    p.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    p.add_argument("--features", type=int, default=128, help="of a head")
    p.add_argument("--shape", default="4,16,4096", metavar="B,H,T")
    p.add_argument("--causal", action="store_true")
    p.add_argument("--capability", type=int, choices=sorted(model.DEVICES), help="without a GPU: 80, 90 (default), 100 or 120")
    for name, values in (("bm", BM), ("bn", BN), ("warps", WARPS), ("stages", STAGES)):
        p.add_argument(f"--{name}", default=",".join(map(str, values)), metavar="N[,N...]")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 2: bad arguments."""
    p = parser()
    args = p.parse_args(argv)
    try:
        B, H, T = _numbers("--shape", args.shape, 3)
        grid = [_numbers(f"--{name}", getattr(args, name)) for name in ("bm", "bn", "warps", "stages")]
        capability = _capability(args.capability)
        if os.environ.get("TRITON_INTERPRET") == "1":
            raise ValueError("TRITON_INTERPRET=1 is set: its kernels are interpreted and cannot be compiled")
        file = args.out.open("w")
    except (OSError, ValueError) as error:
        p.error(str(error))
    device = "cuda" if torch.cuda.is_available() else "meta"
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, LOG_WIDTH)
    if device == "meta":
        console.print(
            f"No GPU here: the compiler's figures for sm_{capability} and what the model predicts for a "
            f"{model.DEVICES[capability].name}. Nothing is measured.",
            style="yellow",
        )
    W = H * args.features
    w = AttentionWorkload("dense", T, B, W, W, "training", heads=H, causal=args.causal, dtype=args.dtype, device=device)
    with file:
        for kernel in args.kernel or KERNELS:
            rows = []
            for row in candidates(kernel, w, capability, grid):
                rows.append(row)
                file.write(json.dumps(row) + "\n")
                file.flush()
            _show(console, kernel, rows)
    return 0


def candidates(kernel: str, w: AttentionWorkload, capability: int, grid: list[list[int]]) -> Iterator[dict[str, Any]]:
    """A row for each: config, the compiler's figures, the model's, and where there is a GPU what was measured."""
    from fastseq.kernels.attention.configs import Config

    from .triton_compile import attention_configs, resources

    for bm, bn, warps, stages in product(*grid):
        config = Config(bm, bn, warps, stages)
        row: dict[str, Any] = {"kernel": kernel, "capability": capability, "dtype": w.dtype, "B": w.B, "H": w.heads, "T": w.T}
        row |= {"E": w.E, "causal": w.causal, "BM": bm, "BN": bn, "warps": warps, "stages": stages, "measured": None}
        with attention_configs(capability, {kernel: config}):
            launch = _launch(kernel, w)
            try:
                found = resources(launch, capability)
            except Exception as error:  # noqa: BLE001  whatever the compiler says is the result
                yield row | {"failed": f"{type(error).__name__}: {str(error).strip()[-200:]}"}
                continue
            row |= found.as_dict()
            sizes = (w.B, w.heads, w.T, w.S)
            of = (w.E, w.E), w.torch_dtype.itemsize, sizes, w.causal, capability, found.resident, found.products
            row["model"] = model.cost(kernel, (bm, bn), *of).as_dict()
            if not found.resident:
                yield row | {"failed": "does not fit on a multiprocessor"}
                continue
            if w.device != "meta":
                check = check_provider(lambda shape: (ATTENTION_PROVIDERS[OWN].build(shape), ""), w)
                row["check"] = check.as_dict()
                if check.ok:
                    clock = CudaClock(device=w.device)
                    clock.measure(launch.make, 1)
                    row["measured"] = min(clock.measure(launch.make, 1) for _ in range(ROUNDS))
        yield row


def _launch(kernel: str, w: AttentionWorkload) -> Any:
    """What fastseq's own launcher gives this kernel for the workload."""
    from fastseq.backends.triton import attention
    from fastseq.ops.attention import Spec

    from .triton_compile import recorded

    make = torch.empty if w.device == "meta" else torch.randn
    q, k, v, dout = (make(w.B, w.heads, w.T, w.E, device=w.device, dtype=w.torch_dtype) for _ in range(4))
    spec = Spec(scale=w.E**-0.5, right=0 if w.causal else -1)
    with recorded() as launches:
        out, lse = attention.attention_forward(q, k, v, spec)
        if kernel != "forward":
            attention.attention_backward(dout, None, q, k, v, out, lse, spec, [True] * 3 + [False] * 4)
    return next(launch for launch in launches if launch.kernel.__name__ == kernel)


def _numbers(option: str, text: str, count: int | None = None) -> list[int]:
    try:
        values = [int(n) for n in text.split(",")]
    except ValueError:
        values = [0]
    if min(values) < 1 or (count and len(values) != count):
        raise ValueError(f"{option}: {text!r} is not a list of {count or ''} positive numbers")
    return values


def _capability(wanted: int | None) -> int:
    if not torch.cuda.is_available():
        return wanted or 90
    major, minor = torch.cuda.get_device_capability()
    here = {8: 80, 9: 90, 10: 100, 12: 120}.get(major)
    if here is None or wanted not in (None, here):
        raise ValueError(f"--capability: this GPU is sm_{major}{minor}; there is a model of {sorted(model.DEVICES)}")
    return here


def _show(console: Console, kernel: str, rows: list[dict[str, Any]]) -> None:
    """The best first, by what was measured or else predicted."""
    table = Table(title=f"{kernel}: {len(rows)} candidates", title_justify="left", box=None)
    for column in (
        "BM",
        "BN",
        "warps",
        "stages",
        "registers",
        "spilled",
        "shared",
        "blocks/SM",
        "products",
        "bound",
        "predicted",
        "measured",
    ):
        table.add_column(column, justify="right")
    for row in sorted(rows, key=_rank):
        tile = [str(row[name]) for name in ("BM", "BN", "warps", "stages")]
        if "registers" not in row:
            table.add_row(*tile, row["failed"][:60])
            continue
        figures = [str(row[name]) for name in ("registers", "spilled", "shared", "resident", "products")]
        measured = "–" if row["measured"] is None else f"{row['measured'] * 1e3:.3f} ms"
        table.add_row(*tile, *figures, row["model"]["bound"], f"{row['model']['seconds'] * 1e3:.3f} ms", measured)
    console.print(table)


def _rank(row: dict[str, Any]) -> tuple[bool, bool, float]:
    """What cannot run last, then what spills, then by time."""
    if "failed" in row or (row.get("check") and not row["check"]["ok"]):
        return (True, True, 0.0)
    return (False, bool(row["spilled"]), row["measured"] or row["model"]["seconds"])


if __name__ == "__main__":
    sys.exit(main())
