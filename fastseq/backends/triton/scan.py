"""Launches ``kernels/scan/scan.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...ops.types import SCAN_CELLS, ScanSpec, empty_scan, empty_scan_gradients, scan_kind, state_dtype
from ..query import ScanQuery
from . import _launch
from .attention_args import accumulator

_KINDS = {"real": (0, 1, 1), "complex": (1, 2, 2), "blocks": (2, 2, 4)}  # KIND, N, M


def why_not(query: ScanQuery) -> list[str]:
    real = {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(query.dtype, query.dtype)
    return _launch.dtype_obstacles(query._replace(dtype=real))


def variant(query: ScanQuery, family: str) -> str:
    from fastseq.kernels.scan import configs

    config = configs.choose(query.steps, query.batch, query.channels, _processors(query.device))
    return f"{config.channels} channels" + (" in chunks" if config.chunks > 1 else "")


def _processors(device: torch.device) -> int:
    """Multiprocessors; 0 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def _numbers(tensor: Tensor | None) -> Tensor | None:
    """Complex numbers as pairs of real ones."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor is not None and tensor.is_complex() else tensor


def _rows(tensor: Tensor | None, numbers: int) -> Any:
    """[T, B, C, ..] as the kernels take it: strides in channels, whose numbers lie side by side."""
    from fastseq.kernels.scan.args import Rows

    tensor = _numbers(tensor)
    if tensor is None:
        return Rows(None, 0, 0, 0)
    stride, dims = 1, tensor.dim()
    for dim in range(dims - 1, 1, -1):
        if tensor.shape[dim] != 1 and tensor.stride(dim) != stride:
            tensor = tensor.contiguous()
            break
        stride *= tensor.shape[dim]
    if any(tensor.stride(dim) % numbers and tensor.shape[dim] != 1 for dim in (0, 1)):
        tensor = tensor.contiguous()
    step, row = (0 if tensor.shape[dim] == 1 else tensor.stride(dim) // numbers for dim in (0, 1))
    return Rows(tensor, step, row, 0 if tensor.shape[2] == 1 else 1)


def _state(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else _numbers(tensor.to(dtype).contiguous())


class _Launch:
    """What both directions share: the layout of the rows, chunks, and one launch or two."""

    def __init__(self, states: Tensor, a: Tensor, spec: ScanSpec) -> None:
        from fastseq.kernels.scan import configs
        from fastseq.kernels.scan.args import Layout, Totals

        self.kind = scan_kind(states, a)
        kind, self.state_numbers, self.numbers = _KINDS[self.kind]
        steps, batch, channels = states.shape[:3]
        rows = batch if spec.cu_seqlens is None else len(spec.cu_seqlens) - 1
        self.config = configs.choose(steps, rows, channels, _processors(states.device))
        real = _numbers(states)
        assert real is not None
        wide = state_dtype(real.dtype)
        resets = None if spec.resets is None else spec.resets.view(torch.uint8)
        strides = (0, 0) if resets is None else (resets.stride(0), resets.stride(1))
        self.layout = Layout(steps, rows, channels, spec.lengths, spec.cu_seqlens, resets, *strides)
        self.chunks = max(1, self.config.chunks)
        self.totals = Totals(None, None, None)
        if self.chunks > 1:
            product, state = (
                real.new_empty(rows, self.chunks, n, channels, dtype=wide) for n in (self.numbers, self.state_numbers)
            )
            self.totals = Totals(product, state, torch.empty(rows, self.chunks, dtype=torch.int32, device=real.device))
        self.grid = (-(-channels // self.config.channels) * self.chunks * rows,)
        self.device, self.wide = states.device, wide
        self.options = {
            "KIND": kind,
            "N": self.state_numbers,
            "M": self.numbers,
            "CELL": [*SCAN_CELLS].index(spec.cell),
            "REVERSE": spec.reverse,
            "U": self.config.unrolled,
            "BC": self.config.channels,
            "ACC": accumulator(real.dtype),
            "num_warps": self.config.warps,
            "num_stages": 1,
            "enable_fp_fusion": True,
        }

    def run(self, kernel: Callable[..., Any], *args: Any) -> None:
        if self.grid[0] == 0:
            return
        with _launch.on(self.device):
            for totals in (True, False) if self.chunks > 1 else (False,):
                kernel[self.grid](  # type: ignore[index]
                    *args, self.totals, self.layout, self.chunks, max(1, self.config.span), TOTALS=totals, **self.options
                )


def scan_forward(
    b: Tensor, a: Tensor, gate: Tensor | None, vector: Tensor | None, initial: Tensor | None, spec: ScanSpec
) -> tuple[Tensor, Tensor]:
    from fastseq.kernels.scan.scan import forward

    launch = _Launch(b, a, spec)
    h, final = empty_scan(b, launch.kind, spec)
    launch.run(
        forward,
        _rows(b, launch.state_numbers),
        _rows(a, launch.numbers),
        _rows(gate, 1),
        _rows(h, launch.state_numbers),
        _state(vector, launch.wide),
        _state(initial, state_dtype(b.dtype)),
        _numbers(final),
    )
    return h, final


def scan_backward(
    dh: Tensor | None,
    dfinal: Tensor | None,
    b: Tensor | None,
    a: Tensor,
    gate: Tensor | None,
    vector: Tensor | None,
    h: Tensor,
    initial: Tensor | None,
    spec: ScanSpec,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from fastseq.kernels.scan.scan import backward

    launch = _Launch(h, a, spec)
    wide = state_dtype(h.dtype)
    db, da, dgate, dvector, dinitial = empty_scan_gradients(a, h, launch.kind, spec, wanted)
    sums = None
    constant = wanted[1] and a.shape[0] != h.shape[0]
    if constant:
        sums = h.new_zeros(da.shape[1], launch.chunks, *da.shape[2:], dtype=da.dtype)
    elif dvector.numel():
        sums = h.new_zeros(launch.layout.rows, launch.chunks, *dvector.shape, dtype=wide)
    launch.run(
        backward,
        _rows(dh, launch.state_numbers),
        _rows(b, launch.state_numbers),
        _rows(a, launch.numbers),
        _rows(gate, 1),
        _rows(h, launch.state_numbers),
        _rows(db if wanted[0] else None, launch.state_numbers),
        _rows(da if wanted[1] and not constant else None, launch.numbers),
        _rows(dgate if dgate.dim() > 1 else None, 1),
        _state(vector, wide),
        _numbers(sums),
        _state(initial, wide),
        _state(dfinal, wide),
        _numbers(dinitial),
    )
    if sums is not None and constant:
        da = sums.sum(1)[None]
    elif sums is not None:
        dvector = sums.sum((0, 1))
    return db, da, dgate, dvector, dinitial
