"""Scans of every kind, and what a loop over rows and steps in PyTorch makes of them: shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastseq.functional import scan
from fastseq.ops.scan import scan as scan_op
from fastseq.ops.types import SCAN_CELLS, ScanSpec


@dataclass(frozen=True)
class ScanCase:
    """A call of ``fastseq.functional.scan``, with another cell of the op; letters as in ``reference/scan.py``."""

    steps: int = 9
    batch: int = 3
    channels: int = 5
    kind: str = "real"  # "complex", "blocks"
    a: str = "tbc"  # the dimensions that a has
    cell: str = "given"  # "log", and padded, time first, any other of ``SCAN_CELLS``
    reverse: bool = False
    initial: bool = True
    resets: bool = False
    layout: str = "padded"  # "lengths", "packed"
    batch_first: bool = False

    def __str__(self) -> str:
        marks = [
            f"{self.kind}-T{self.steps}-B{self.batch}-C{self.channels}",
            self.layout if self.layout != "padded" else "",
            f"a_{self.a or 'one'}" if self.a != "tbc" else "",
            self.cell if self.cell != "given" else "",
            *(name for name in ("reverse", "resets", "batch_first") if getattr(self, name)),
            "" if self.initial else "nostate",
        ]
        return "-".join(filter(None, marks))


LAYER_CELLS = [name for name, cell in SCAN_CELLS.items() if cell.reads_b]  # which layers alone call

SMALL_SCAN_CASES = [
    ScanCase(),
    ScanCase(resets=True, layout="lengths", reverse=True, cell="log"),
    ScanCase(layout="packed", initial=False, resets=True, a="c"),
    ScanCase(kind="complex", a="c"),
    ScanCase(kind="blocks", reverse=True, resets=True),
    *(ScanCase(cell=cell, resets=True, layout="lengths", reverse=i % 2 == 1) for i, cell in enumerate(LAYER_CELLS)),
]

SCAN_CASES = [
    *SMALL_SCAN_CASES,
    ScanCase(1, 1, 1),
    ScanCase(2, 1, 70, initial=False, reverse=True),
    ScanCase(33, 2, 67, resets=True),
    ScanCase(33, 2, 67, resets=True, reverse=True, initial=False),
    ScanCase(17, 4, 16, cell="log", batch_first=True, resets=True),
    ScanCase(17, 4, 16, reverse=True, batch_first=True, layout="lengths", initial=False),
    ScanCase(17, 3, 33, layout="packed"),
    ScanCase(17, 3, 33, layout="packed", reverse=True, resets=True, cell="log"),
    ScanCase(70, 2, 3, a="c", layout="lengths", resets=True),
    ScanCase(70, 2, 3, a="bc", reverse=True),
    ScanCase(12, 2, 18, a="tc"),
    ScanCase(12, 2, 18, a="tb", resets=True),
    ScanCase(12, 2, 18, a="", cell="log"),
    ScanCase(70, 3, 4, a="c", layout="packed", reverse=True),
    ScanCase(9, 3, 35, kind="complex", resets=True, layout="lengths"),
    ScanCase(70, 3, 5, kind="complex", a="c", layout="packed", reverse=True, resets=True),
    ScanCase(9, 3, 5, kind="complex", a="tb", cell="log", batch_first=True),
    ScanCase(9, 3, 21, kind="blocks", layout="lengths", initial=False),
    ScanCase(70, 2, 5, kind="blocks", a="c", batch_first=True),
    ScanCase(9, 3, 4, kind="blocks", layout="packed", reverse=True),
    ScanCase(33, 2, 67, cell="min_gru", resets=True, reverse=True),
    *(ScanCase(12, 3, 34, cell=cell, initial=False) for cell in ("min_gru", "rg_lru")),
    ScanCase(0, 2, 3),
    ScanCase(5, 0, 3, a="c"),
    ScanCase(5, 2, 0),
    ScanCase(0, 3, 4, a="c", layout="packed"),
]


def bounds(case: ScanCase) -> list[int]:
    """``cu_seqlens`` of a packed case: one sequence is empty."""
    return [case.steps * min(i, case.batch - 1) // max(1, case.batch - 1) for i in range(case.batch + 1)]


def make_scan(case: ScanCase, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Arguments of ``run_scan``; complex numbers as pairs of real ones. What lies beyond a row's length is NaN."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    packed, pairs = case.layout == "packed", [] if case.kind == "real" else [2]
    sizes = {"t": case.steps, "b": case.batch, "c": case.channels}
    order = "tc" if packed else "btc" if case.batch_first else "tbc"

    def random(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(of).to(device)

    b = random(*(sizes[dim] for dim in order), *pairs)
    of_a = [sizes[dim] if dim in case.a else 1 for dim in order]
    of_block = [2, 2] if case.kind == "blocks" else pairs
    a = (0.9 if case.kind == "real" else 0.45) * torch.randn(*of_a, *of_block, generator=generator, dtype=torch.float64).tanh()
    if case.cell == "log":
        a = -a.abs() if case.kind == "real" else a - 0.5
    a = a.to(wide if case.cell == "given" else dtype).to(device)
    cell = SCAN_CELLS[case.cell]
    gate = random(*b.shape) if cell.gate else None
    vector = torch.rand(case.channels, generator=generator, dtype=torch.float64).to(wide).to(device) if cell.vector else None
    resets = torch.rand(sizes["t"], *([] if packed else [sizes["b"]]), generator=generator) < 0.3 if case.resets else None
    if resets is not None and case.batch_first:
        resets = resets.mT
    lengths = (
        torch.tensor([case.steps, 0, max(1, case.steps // 2), case.steps - 1][: case.batch]) if case.layout == "lengths" else None
    )
    if lengths is not None:
        beyond = torch.arange(case.steps)[:, None] >= lengths
        beyond = beyond.mT if case.batch_first else beyond
        b[beyond] = torch.nan
        if case.a == "tbc":
            a[beyond] = torch.nan
        if gate is not None:
            gate[beyond] = torch.nan
    return {
        "b": b.requires_grad_(),
        "a": a.requires_grad_(),
        "gate": None if gate is None else gate.requires_grad_(),
        "vector": None if vector is None else vector.requires_grad_(),
        "initial": random(case.batch, case.channels, *pairs, of=wide).requires_grad_() if case.initial else None,
        "resets": None if resets is None else resets.to(device),
        "lengths": None if lengths is None else lengths.to(device),
        "cu_seqlens": torch.tensor(bounds(case), device=device) if packed else None,
        "kind": case.kind,
        "cell": case.cell,
        "reverse": case.reverse,
        "batch_first": case.batch_first,
    }


def run_scan(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """h and the final states of what ``make_scan`` gives."""
    given = dict(inputs)
    kind, cell, gate, vector = (given.pop(name) for name in ("kind", "cell", "gate", "vector"))
    if cell in LAYER_CELLS:
        spec = ScanSpec(given["resets"], given["lengths"], None, cell, given["reverse"])
        return scan_op(given["b"], given["a"], gate, vector, given["initial"], spec)
    names = ("b", "a", "initial") if kind == "complex" else ()
    given |= {name: torch.view_as_complex(given[name]) for name in names if given[name] is not None}
    results = scan(given.pop("b"), **{"log_a" if cell == "log" else "a": given.pop("a")}, **given)
    return tuple(torch.view_as_real(result) if kind == "complex" else result for result in results)  # type: ignore[return-value]


def layer_step(cell: str, a: Tensor, b: Tensor, gate: Tensor, vector: Tensor, state: Tensor | None) -> Tensor:
    """A step of a layer's cell by its equations; ``state``: before it, None at the beginning of a sequence."""
    before = torch.zeros_like(b) if state is None else state
    if cell in ("min_gru", "min_lstm"):
        candidate = torch.where(b >= 0, b + 0.5, torch.sigmoid(b))
        if cell == "min_gru":
            return (1 - torch.sigmoid(a)) * before + torch.sigmoid(a) * candidate
        f, i = torch.sigmoid(a), torch.sigmoid(gate)
        return f / (f + i) * before + i / (f + i) * candidate
    if cell == "hgrn":
        f = vector + (1 - vector) * torch.sigmoid(a)
        return f * before + (1 - f) * b * torch.sigmoid(b)
    if cell == "rg_lru":
        log = -vector * torch.sigmoid(a)
        root = 1 if state is None else torch.sqrt(-torch.expm1(2 * log))
        return torch.exp(log) * before + root * torch.sigmoid(gate) * b
    f = torch.sigmoid(a)
    return f * before + (1 - f if cell == "qrnn" else torch.sigmoid(gate)) * torch.tanh(b)


def scan_by_torch(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The same by plain PyTorch, row by row, step by step, in fp32 (fp64), looking at nothing that is cut off or padded."""
    b, a, initial, kind = (inputs[name] for name in ("b", "a", "initial", "kind"))
    stored, wide = b.dtype, torch.promote_types(b.dtype, torch.float32)
    b, a = b.to(wide), a.to(wide)
    if kind == "complex":
        b, a = torch.view_as_complex(b), torch.view_as_complex(a)
        initial = initial if initial is None else torch.view_as_complex(initial)
    packed = inputs["cu_seqlens"] is not None
    resets, dims = inputs["resets"], b.dim()
    a = a.expand(*b.shape, 2) if kind == "blocks" else a.expand(b.shape)
    if packed:
        b, a, resets = b[:, None], a[:, None], None if resets is None else resets[:, None]
    elif inputs["batch_first"]:
        b, a, resets = b.transpose(0, 1), a.transpose(0, 1), None if resets is None else resets.mT
    if packed:
        cu = inputs["cu_seqlens"].tolist()
        rows = [(0, begin, end) for begin, end in zip(cu, cu[1:], strict=False)]
    else:
        ends = [b.shape[0]] * b.shape[1] if inputs["lengths"] is None else inputs["lengths"].tolist()
        rows = [(r, 0, end) for r, end in enumerate(ends)]
    h = {(t, r): torch.zeros_like(b[t, r]) for t in range(b.shape[0]) for r in range(b.shape[1])}
    final = []
    for s, (r, begin, end) in enumerate(rows):
        state = None if initial is None else initial[s]
        for t in reversed(range(begin, end)) if inputs["reverse"] else range(begin, end):
            link = t + 1 if inputs["reverse"] else t  # a reset is between a step and the one before it in time
            if resets is not None and link < end and bool(resets[link, r]):
                state = None
            if inputs["cell"] in LAYER_CELLS:
                gate = a[t, r] if inputs["gate"] is None else inputs["gate"][t, r].to(wide)
                state = layer_step(inputs["cell"], a[t, r], b[t, r], gate, inputs["vector"], state)
            elif state is None:
                state = b[t, r]
            elif kind == "blocks":
                state = b[t, r] + torch.einsum("...ij,...j->...i", a[t, r], state)
            else:
                state = b[t, r] + (a[t, r].exp() if inputs["cell"] == "log" else a[t, r]) * state
            h[t, r] = state
        final.append(b.new_zeros(b.shape[2:]) if state is None else state)
    out = (
        torch.stack([torch.stack([h[t, r] for r in range(b.shape[1])]) for t in range(b.shape[0])]) if h else torch.zeros_like(b)
    )
    out = out[:, 0] if packed else out.transpose(0, 1) if inputs["batch_first"] else out
    last = torch.stack(final) if final else b.new_zeros(0, *b.shape[2:])
    assert out.dim() == dims
    if kind == "complex":
        return torch.view_as_real(out).to(stored), torch.view_as_real(last)
    return out.to(stored), last
