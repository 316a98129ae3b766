"""Scans on the native kernels of ``csrc/cpu``."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.types import ScanSpec, empty_scan, empty_scan_gradients, scan_kind, state_dtype
from ..dense import dense
from ..query import ScanQuery

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)


def why_not(query: ScanQuery) -> list[str]:
    if query.dtype in DTYPES:
        return []
    accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    return [f"dtype {str(query.dtype).removeprefix('torch.')} is not one of {accepted}"]


def _numbers(tensor: Tensor | None, channel: int) -> Tensor | None:
    """Complex numbers as pairs of real ones; what stands behind dimension ``channel`` and that itself contiguous."""
    if tensor is None:
        return None
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    stride = 1
    for dim in range(tensor.dim() - 1, channel - 1, -1):
        if tensor.shape[dim] != 1 and tensor.stride(dim) != stride:
            return tensor.contiguous()
        stride *= tensor.shape[dim]
    return tensor


def _fields(spec: ScanSpec, kind: str) -> tuple[Tensor | None, Tensor | None, Tensor | None, str, str, bool]:
    return spec.resets, dense(spec.lengths, torch.int32), dense(spec.cu_seqlens, torch.int32), kind, spec.cell, spec.reverse


def _coefficients(a: Tensor, states: Tensor, kind: str) -> Tensor:
    """a as the kernels read it: of every channel its own, or one real number for all of them."""
    if kind != "real" and a.shape[2] != states.shape[2]:
        a = a.expand(*a.shape[:2], *states.shape[2:3], *a.shape[3:])
    found = _numbers(a, 2)
    assert found is not None
    return found


def _state(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else _numbers(tensor.to(dtype).contiguous(), 1)


def scan_forward(
    b: Tensor, a: Tensor, gate: Tensor | None, vector: Tensor | None, initial: Tensor | None, spec: ScanSpec
) -> tuple[Tensor, Tensor]:
    kind, wide = scan_kind(b, a), state_dtype(b.dtype)
    if kind == "blocks" and b.dtype != wide:  # the kernels of blocks have no elements of 16 bits
        h, final = scan_forward(b.to(wide), a, None, None, initial, spec)
        return h.to(b.dtype), final
    h, final = empty_scan(b, kind, spec)
    torch.ops.fastseq_native.scan_forward.default(
        _numbers(b, 2),
        _coefficients(a, b, kind),
        _numbers(gate, 2),
        _state(vector, wide),
        _state(initial, wide),
        *_fields(spec, kind),
        _numbers(h, 2),
        _numbers(final, 1),
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
    kind, wide = scan_kind(h, a), state_dtype(h.dtype)
    if kind == "blocks" and h.dtype != wide:
        dh = None if dh is None else dh.to(wide)
        db, *others = scan_backward(dh, dfinal, b, a, None, None, h.to(wide), initial, spec, wanted)
        return db.to(h.dtype), *others  # type: ignore[return-value]
    db, da, dgate, dvector, dinitial = empty_scan_gradients(a, h, kind, spec, wanted)
    of_rows = dvector.new_empty(dinitial.shape[0], *dvector.shape) if dvector.numel() else None
    torch.ops.fastseq_native.scan_backward.default(
        _numbers(dh, 2),
        _state(dfinal, wide),
        _numbers(b, 2),
        _coefficients(a, h, kind),
        _numbers(gate, 2),
        _state(vector, wide),
        _numbers(h, 2),
        _state(initial, wide),
        *_fields(spec, kind),
        _numbers(db, 2) if wanted[0] else None,
        _numbers(da, 2) if wanted[1] else None,
        _numbers(dgate, 2) if dgate.dim() > 1 else None,
        of_rows,
        _numbers(dinitial, 1),
    )
    return db, da, dgate, dvector if of_rows is None else of_rows.sum(0), dinitial
