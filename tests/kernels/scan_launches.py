"""Every launch of the scan kernels that the compiler's gate looks at, and the figures of each.

`python tests/kernels/scan_launches.py --write` compiles them all and writes scan_resources.json beside this file; `--json` prints
the figures of those that match the options, a line each. No GPU is needed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, it finds the checkout
from tools.triton_gate import Gate, Row  # noqa: E402

CAPABILITIES = (80, 90, 100, 120)
CALLS = ("forward", "backward")
PROCESSORS = 132
MANY, FEW = (512, 64, 1024), (8192, 2, 64)  # T, B, C: programs of 128 channels and of all steps; of 32, and chunks of time
CELLS = ("log", "min_gru", "min_lstm", "hgrn", "rg_lru", "qrnn", "qrnn_ifo")
VARIANTS = (*CELLS, "reverse", "resets", "lengths", "packed", "constant", "state")


class Point(NamedTuple):
    call: str
    kind: str
    variant: str
    dtype: str
    cut: str  # "whole" or "chunks"
    capability: int

    @property
    def key(self) -> str:
        return f"{self.call} {self.kind} {self.variant} {self.dtype} {self.cut} sm_{self.capability}"


def points() -> list[Point]:
    """Each kind and dtype, whole and in chunks; on one architecture each feature by itself."""
    found = []
    for capability in CAPABILITIES:
        for call in CALLS:
            for cut in ("whole", "chunks"):
                found += [Point(call, "real", "plain", dtype, cut, capability) for dtype in ("float32", "bfloat16", "float16")]
                found += [Point(call, kind, "plain", "float32", cut, capability) for kind in ("complex", "blocks")]
                if capability == 90:
                    found += [Point(call, "real", variant, "float32", cut, 90) for variant in VARIANTS]
    return found


def launches(point: Point) -> list[Any]:
    """What the launcher gives the kernels, on tensors without memory; of a kernel that runs twice, what walks the steps."""
    import torch

    from fastseq.backends.triton import scan
    from fastseq.benchmarks.gpu.triton_compile import recorded
    from fastseq.ops.types import SCAN_CELLS, ScanSpec

    steps, batch, channels = MANY if point.cut == "whole" else FEW
    packed = point.variant == "packed"
    rows = 1 if packed else batch
    dtype = torch.complex64 if point.kind == "complex" else getattr(torch, point.dtype)
    wide = dtype if point.kind == "complex" else torch.float32

    def empty(*shape: int, of: Any = wide) -> Any:
        return torch.empty(shape, device="meta", dtype=of)

    pair = [2] if point.kind == "blocks" else []
    b = empty(steps, rows, channels, *pair, of=dtype)
    a = empty(*((1, 1) if point.variant == "constant" else (steps, rows)), channels, *pair, *pair)
    state = empty(batch, channels, *pair)
    spec = ScanSpec(
        resets=empty(steps, rows, of=torch.bool) if point.variant == "resets" else None,
        lengths=empty(batch, of=torch.int32) if point.variant == "lengths" else None,
        cu_seqlens=empty(batch + 1, of=torch.int32) if packed else None,
        cell=point.variant if point.variant in SCAN_CELLS else "given",
        reverse=point.variant == "reverse",
    )
    initial, cell = state if point.variant == "state" else None, SCAN_CELLS[spec.cell]
    gate, vector = b if cell.gate else None, empty(channels) if cell.vector else None
    before, scan._processors = scan._processors, lambda device: PROCESSORS
    try:
        with recorded() as found:
            if point.call == "forward":
                scan.scan_forward(b, a, gate, vector, initial, spec)
            else:
                read = b if cell.reads_b else None
                scan.scan_backward(b, initial, read, a, gate, vector, b, initial, spec, [True] * 4)
    finally:
        scan._processors = before
    assert (len(found) == 2) == (point.cut == "chunks")
    return found[-1:]


def reason_of(key: str, spilled: int) -> str | None:
    """No kernel may spill."""
    return None


def faults_of(row: Row) -> list[str]:
    """A scan multiplies no matrices, and shares nothing between its threads."""
    found = [f"multiplies by {row['products']}, where nothing is to"] if row["products"] else []
    return found + ([f"takes {row['shared']} bytes of shared memory, where nothing is shared"] if row["shared"] else [])


GATE = Gate(
    script=Path(__file__),
    table=Path(__file__).with_name("scan_resources.json"),
    points=points,
    launches=launches,
    tiles=("BC", "U"),
    reason_of=reason_of,
    faults_of=faults_of,
)

if __name__ == "__main__":
    sys.exit(GATE.main(__doc__))
