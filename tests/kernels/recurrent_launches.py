"""Every launch of the recurrent kernels that the compiler's gate looks at, and the figures of each.

`python tests/kernels/recurrent_launches.py --write` compiles them all and writes recurrent_resources.json beside this file;
`--json` prints the figures of those that match the options, a line each. No GPU is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, it finds the checkout
from fastseq.cells import CELLS  # noqa: E402
from tools.triton_gate import Gate, Row, point_of  # noqa: E402

T, B, D = 4, 64, 2  # sizes of 1 would compile to less
CALLS = ("forward", "backward")
CAPABILITIES = (80, 90, 100, 120)
# Hidden sizes of sequences by dtype, so that every form is there: 64 and 128 fit a program, 256 is read from L2, 1024 goes step
# by step (in fp32 or on sm_120 sooner). fp16 differs from bf16 in nothing but the instruction's name; TF32 differs from fp32 in
# products alone, which the step-by-step kernels leave to torch.
HIDDEN = {"bfloat16": (64, 128, 256, 1024), "float16": (128,), "float32": (64, 128, 256, 1024), "tf32": (64, 128, 256)}
# Cells differ in elementwise work only: those of torch.nn stand for all, the others are compiled on one architecture.
FULL = ("lstm", "gru", "rnn_tanh")
OTHERS = (("bfloat16", 64), ("bfloat16", 128), ("bfloat16", 256), ("bfloat16", 1024), ("float32", 64), ("float32", 256))
ODD = (100, 250, 1000)  # rows that are no whole vectors, in tiles wider than they: more addresses and masks
ONE_STEP = (1, 16)  # batches: products in registers, and by matrix instructions
# Features, each once for every form: they come from functions that all cells and dtypes share.
FEATURES = (64, 256, 1024)
VARIANTS = {
    "lstm": ("bare", "lengths", "packed", "masks", "proportion", "cells", "resets", "reset_to"),
    "gru": ("bare", "masks", "resets"),  # without the bias inside; the output before, as it was
    "rnn_tanh": ("masks",),  # which saves the output before zoneout
}
BEST = "mma.sync"  # a tile has 16 rows of the batch, where wgmma and tcgen05 take 64
ANOTHER_BLOCK = "some words of a thread, which the compiler gives up for another block on the multiprocessor"
VALUE_BY_VALUE = "weights whose rows are no whole vectors are loaded value by value, once, before the first step"
REASONS = (  # words of a key, bytes that a thread may spill, and why
    (
        "whole layer_norm_lstm bfloat16 H=128",
        32,
        "vectors, beside saved gates and saved products: a step reads a few words again",
    ),
    ("whole float32 H=64", 24, ANOTHER_BLOCK),
    ("whole H=100", 16, VALUE_BY_VALUE),
    ("whole H=250", 48, VALUE_BY_VALUE),
    ("streamed", 40, ANOTHER_BLOCK),
    ("stepwise layer_norm_gru", 8, ANOTHER_BLOCK),
)


class Point(NamedTuple):
    call: str
    form: str
    cell: str
    variant: str
    dtype: str
    hidden: int
    batch: int
    capability: int

    @property
    def key(self) -> str:
        return (
            f"{self.call} {self.form} {self.cell} {self.variant} {self.dtype} H={self.hidden} B={self.batch} sm_{self.capability}"
        )


def points() -> list[Point]:
    """Sequences of every cell, in the form that the backend takes by itself; features; odd sizes; single steps."""
    found = []
    for capability in CAPABILITIES:
        sizes = [(dtype, hidden) for dtype, every in HIDDEN.items() for hidden in every]
        for cell in CELLS:
            chosen = sizes if cell in FULL else OTHERS if capability == 90 else ()
            found += [_walk(call, cell, "plain", *size, capability) for size in chosen for call in CALLS]
        if capability == 90:
            every = [(cell, variant, hidden) for cell in VARIANTS for variant in VARIANTS[cell] for hidden in FEATURES]
            found += [_walk(call, c, v, "bfloat16", hidden, 90) for c, v, hidden in every for call in CALLS]
            projected = ("projection", "projection-resets")
            found += [_walk(call, "lstm", variant, "bfloat16", 256, 90) for variant in projected for call in CALLS]
            found += [Point("forward", "single", "lstm", "resets", "bfloat16", 1024, batch, 90) for batch in ONE_STEP]
            found += [_walk(call, cell, "plain", "bfloat16", hidden, 90) for cell in FULL for hidden in ODD for call in CALLS]
        for cell, dtype in [(c, d) for c in FULL for d in HIDDEN if capability == 90 or d in ("bfloat16", "tf32")]:
            found += [Point("forward", "single", cell, "plain", dtype, 1024, batch, capability) for batch in ONE_STEP]
    return [p for p in found if (p.form, p.dtype) != ("stepwise", "tf32")]


def _walk(call: str, cell: str, variant: str, dtype: str, hidden: int, capability: int) -> Point:
    point = Point(call, "", cell, variant, dtype, hidden, B, capability)
    return point._replace(form=form_of(point))


def call_of(point: Point) -> Any:
    """Arguments of the op, on tensors without memory."""
    import torch

    from fastseq.ops.types import Backward, Forward, state_dtype

    _, form, cell, variant, name, hidden, batch, _ = point
    row, bare = CELLS[cell], variant == "bare"
    dtype = torch.float32 if name == "tf32" else getattr(torch, name)
    width = hidden // 2 if variant.startswith("projection") else hidden
    resets, reset_to = variant.endswith("resets") or variant == "reset_to", variant in ("reset_to", "projection-resets")
    steps = 1 if form == "single" else T
    rows = (steps * batch,) if variant == "packed" else (steps, batch)
    zoned_c = row.wide_states == 1

    def narrow(*shape: int, there: bool = True) -> Any:
        return torch.empty(shape, device="meta", dtype=dtype) if there else None

    def wide(*shape: int, there: bool = True) -> Any:
        return torch.empty(shape, device="meta", dtype=state_dtype(dtype)) if there and row.has_c else None

    def mask(*shape: int, there: bool = True) -> Any:
        return torch.empty(shape, device="meta", dtype=torch.bool) if there else None

    gates, states = len(row.gates) * hidden, row.wide_states * hidden
    fields: dict[str, Any] = {
        "weight": narrow(D, gates, width),
        "vectors": narrow(D, len(row.vectors) * hidden, there=bool(row.vectors) and not (bare and row.recurrent_bias)),
        "projection": narrow(D, width, hidden, there=variant.startswith("projection")),
        "h0": narrow(D, batch, width, there=not bare),
        "c0": wide(D, batch, states, there=not bare),
        "lengths": torch.empty(batch, device="meta", dtype=torch.int64) if variant == "lengths" else None,
        "batch_sizes": torch.full((steps,), batch) if variant == "packed" else None,
        "hold_h": mask(*rows, D, width, there=variant == "masks"),
        "hold_c": mask(*rows, D, hidden, there=variant == "masks" and zoned_c),
        "cell": cell,
        "reverse": [0, 1],
        "zoneout_h": 0.1 if variant == "proportion" else 0.0,
        "zoneout_c": 0.1 if variant == "proportion" and zoned_c else 0.0,
        "resets": mask(*rows, there=resets),
        "reset_h": narrow(D, batch, width, there=reset_to),
        "reset_c": wide(D, batch, states, there=reset_to),
    }
    if point.call == "forward":
        x = narrow(*rows, D * gates if bare else hidden)
        weights = (narrow(D * gates, hidden, there=not bare), narrow(D * gates, there=not bare))
        return Forward(x, *weights, **fields, save_c=not bare, save_gates=not bare)
    saved = len(row.saved) or int(variant in ("masks", "proportion"))
    c = wide(*rows, D, states)
    return Backward(
        dy=narrow(*rows, D, width),
        dh_n=narrow(D, batch, width, there=not bare),
        dc_n=wide(D, batch, states, there=not bare),
        dc=wide(*rows, D, states, there=variant == "cells"),
        y=narrow(*rows, D, width),
        c=narrow(0) if c is None else c,
        gates=narrow(*rows, D, saved * hidden),
        **fields,
    )


def form_of(point: Point) -> str:
    """The form that the backend takes by itself."""
    from fastseq.backends.triton.recurrent_args import BackwardLaunch, ForwardLaunch
    from fastseq.benchmarks.gpu.triton_compile import recurrent_configs

    with _precision(point), recurrent_configs(point.capability):
        return (ForwardLaunch if point.call == "forward" else BackwardLaunch)(call_of(point)).config.form


@contextmanager
def _precision(point: Point) -> Iterator[None]:
    import torch

    before = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = "tf32" if point.dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        torch.backends.cudnn.rnn.fp32_precision = before


def launches(point: Point) -> list[Any]:
    """What the launcher gives the kernels, of each kernel the last launch; configs are those of the architecture."""
    from fastseq.backends.triton import recurrent
    from fastseq.benchmarks.gpu.triton_compile import recorded, recurrent_configs

    run = recurrent.recurrent_forward if point.call == "forward" else recurrent.recurrent_backward
    with recorded() as found, _precision(point), recurrent_configs(point.capability):
        run(call_of(point))
    return list({launch.kernel.__name__: launch for launch in found}.values())


def reason_of(key: str, spilled: int) -> str | None:
    """Why the kernel may spill so many bytes of each thread, if it may."""
    words = set(point_of(key).split())
    return next((reason for those, most, reason in REASONS if set(those.split()) <= words and spilled <= most), None)


def faults_of(row: Row) -> list[str]:
    """Of matrix products: where they are, and by which instruction."""
    _, form, _, _, dtype, _, batch, _ = point_of(row["key"]).split()
    if form == "stepwise" or dtype == "float32" or (form, batch) == ("single", f"B={ONE_STEP[0]}"):
        return [f"multiplies by {row['products']}, where nothing is to"] if row["products"] else []
    return [] if row["products"] == BEST else [f"multiplies by {row['products'] or 'no matrix instruction'}, 16 rows take {BEST}"]


GATE = Gate(
    script=Path(__file__),
    table=Path(__file__).with_name("recurrent_resources.json"),
    points=points,
    launches=launches,
    tiles=("BB", "BH", "BK", "BP"),
    reason_of=reason_of,
    faults_of=faults_of,
)

if __name__ == "__main__":
    sys.exit(GATE.main(__doc__))
