"""The recurrent op on the native kernels of ``csrc/cpu``."""

from __future__ import annotations

import torch
from torch import Tensor

from ...cells import CELLS
from ...reference.recurrent import input_gates, state_dtype
from .. import library
from ..query import RecurrentQuery

# Rows of a step from which the input projection is done step by step, beside the recurrent product: it then keeps the registers
# as busy as one large product would, and the projected input is never stored. With fewer rows, each weight fetched would serve
# too few of them. A single step is two plain matrix products, for which packing the weights would not pay; 16-bit inputs go to
# torch's 16-bit product.
_FUSED_ROWS = 4

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def why_not(query: RecurrentQuery) -> list[str]:
    missing = library.reason()
    if missing:
        return [missing]
    against = []
    if query.dtype not in _DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        against.append(f"dtype {str(query.dtype).removeprefix('torch.')} is not one of {accepted}")
    return against


def recurrent_forward(
    x: Tensor,
    w_ih: Tensor,
    b_ih: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    projection: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    cell: str,
    reverse: list[int],
    save_c: bool,
    save_gates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    row, dtype, wide = CELLS[cell], x.dtype, state_dtype(x.dtype)
    lanes, width = weight.shape[0], weight.shape[2]
    hidden = weight.shape[1] // len(row.gates)
    leading = x.shape[:-1]
    steps = _steps(x, batch_sizes)
    batch = x.shape[1] if batch_sizes is None else int(batch_sizes[0])
    y = x.new_empty(*leading, lanes, width)
    h_n = x.new_empty(lanes, batch, width)
    c_n = x.new_empty((lanes, batch, hidden) if row.has_c else (0,), dtype=wide)
    c = x.new_empty((*leading, lanes, hidden) if row.has_c and save_c else (0,), dtype=wide)
    gates = x.new_empty((*leading, lanes, len(row.saved) * hidden) if row.saved and save_gates else (0,))
    h0 = _state(h0, dtype)
    h_gates = None
    if steps == 1:
        h_gates = x.new_zeros(lanes, batch, weight.shape[1], dtype=wide) if h0 is None else _product(h0, weight.mT)
    fused = steps > 1 and dtype == wide and 0 < _FUSED_ROWS * steps * x.shape[-1] <= x.numel()
    torch.ops.fastseq_native.recurrent_forward.default(
        x.contiguous() if fused else None,
        w_ih.contiguous() if fused else None,
        _dense(b_ih) if fused else None,
        None if fused else input_gates(x, w_ih, b_ih, lanes),
        h_gates,
        weight.contiguous(),
        _dense(bias),
        _dense(projection),
        h0,
        _state(c0, wide),
        _int64(lengths),
        batch_sizes,
        cell,
        _bits(reverse),
        y,
        h_n,
        c_n,
        c,
        gates,
    )
    return y, h_n, c_n, c, gates


def recurrent_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc: Tensor | None,
    weight: Tensor,
    projection: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    y: Tensor,
    c: Tensor,
    gates: Tensor,
    cell: str,
    reverse: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    row, dtype, wide = CELLS[cell], y.dtype, state_dtype(y.dtype)
    lanes, width = weight.shape[0], weight.shape[2]
    hidden = weight.shape[1] // len(row.gates)
    leading = y.shape[:-2]
    batch = y.shape[1] if batch_sizes is None else int(batch_sizes[0])
    dgates = y.new_empty(*leading, lanes, weight.shape[1])
    drecurrent = y.new_empty((*leading, lanes, hidden) if row.recurrent_bias else (0,))
    dprojected = y.new_empty((*leading, lanes, width) if projection is not None else (0,))
    dh0 = y.new_empty(lanes, batch, width)
    dc0 = y.new_empty((lanes, batch, hidden) if row.has_c else (0,), dtype=wide)
    once = _steps(y, batch_sizes) == 1
    torch.ops.fastseq_native.recurrent_backward.default(
        _state(dy, dtype),
        _state(dh_n, dtype),
        _state(dc_n, wide),
        _state(dc, wide),
        weight.contiguous(),
        _dense(projection),
        _state(h0, dtype),
        _state(c0, wide),
        _int64(lengths),
        batch_sizes,
        y.contiguous(),
        c.contiguous(),
        gates.contiguous(),
        cell,
        _bits(reverse),
        not once,
        dgates,
        drecurrent,
        dprojected,
        dh0,
        dc0,
    )
    if once:
        dr = dgates.view(batch, lanes, -1).transpose(0, 1)
        if row.recurrent_bias:
            dr = torch.cat((dr[..., :-hidden], drecurrent.view(batch, lanes, -1).transpose(0, 1)), -1)
        dh0 += _product(dr, weight).to(dtype)
    return dgates, drecurrent, dprojected, dh0, dc0


def _steps(rows: Tensor, batch_sizes: Tensor | None) -> int:
    return rows.shape[0] if batch_sizes is None else batch_sizes.shape[0]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b [D, .., ..] accumulated and returned in the state's dtype."""
    wide = state_dtype(a.dtype)
    a, b = a.to(wide), b.to(wide)
    return torch.mm(a[0], b[0]).unsqueeze(0) if a.shape[0] == 1 else torch.bmm(a, b)


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _state(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype).contiguous()


def _int64(lengths: Tensor | None) -> Tensor | None:
    return None if lengths is None else lengths.to(torch.int64).contiguous()


def _bits(reverse: list[int]) -> int:
    return sum(1 << lane for lane, backwards in enumerate(reverse) if backwards)
