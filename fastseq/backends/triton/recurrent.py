"""The recurrent op on the Triton kernels of ``kernels/recurrent``.

Whole sequences in one launch where the recurrent weights fit a multiprocessor, else a matrix product and one fused kernel per
step; ``kernels/recurrent/configs.py`` says which and why.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...cells import CELLS
from ...reference.recurrent import input_gates, state_dtype
from ..query import RecurrentQuery
from ._launch import dtype_obstacles, precision


def why_not(query: RecurrentQuery) -> list[str]:
    from .. import forced  # which imports this module

    if forced() != "triton":
        return ["not chosen by itself before it is measured on a GPU: fastseq.use_backend('triton') runs it"]
    from fastseq.kernels.recurrent import configs

    unknown = [] if query.cell in configs.CELLS else [f"no Triton cell {query.cell}"]
    return unknown + dtype_obstacles(query)


def _precision() -> str:
    return precision(getattr(torch.backends.cudnn.rnn, "fp32_precision", "tf32"))


def _layout(rows: Tensor, lengths: Tensor | None, batch_sizes: Tensor | None, batch: int, lanes: int, reverse: list[int]) -> Any:
    from fastseq.kernels.recurrent.parts import Layout

    bits = sum(1 << lane for lane, backwards in enumerate(reverse) if backwards)
    if batch_sizes is None:
        own = None if lengths is None else lengths.to(torch.int64).contiguous()
        return Layout(None, own, rows.shape[0], batch, lanes, bits)
    starts = batch_sizes.cumsum(0) - batch_sizes
    # sequence b has a step t if batch_sizes[t] > b, and the sizes do not increase
    ends = (batch_sizes[None, :] > torch.arange(batch)[:, None]).sum(1)
    return Layout(starts.to(rows.device), ends.to(rows.device), batch_sizes.shape[0], batch, lanes, bits)


def _rows(rows: Tensor, *shape: int, dtype: torch.dtype | None = None, ragged: bool = False) -> Tensor:
    """Room for one row per step and sequence; zero where rows end early, since no program visits what lies beyond."""
    return rows.new_zeros(*shape, dtype=dtype) if ragged else rows.new_empty(*shape, dtype=dtype)


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
    from fastseq.kernels.recurrent import configs, stepwise, whole

    row, dtype, wide = CELLS[cell], x.dtype, state_dtype(x.dtype)
    lanes, width = weight.shape[0], weight.shape[2]
    gates_count, saved = len(row.gates), len(row.saved)
    hidden = weight.shape[1] // gates_count
    leading, ragged = x.shape[:-1], lengths is not None
    batch = x.shape[1] if batch_sizes is None else int(batch_sizes[0])
    weight = weight.contiguous()
    x_gates = input_gates(x, w_ih, b_ih, lanes)
    y = _rows(x, *leading, lanes, width, ragged=ragged)
    h_n = x.new_empty(lanes, batch, width)
    c_n = x.new_empty((lanes, batch, hidden) if row.has_c else (0,), dtype=wide)
    c = _rows(x, *((*leading, lanes, hidden) if row.has_c and save_c else (0,)), dtype=wide, ragged=ragged)
    gates = _rows(x, *((*leading, lanes, saved * hidden) if saved and save_gates else (0,)), ragged=ragged)
    h0, c0 = _state(h0, dtype), _state(c0, wide)
    if batch == 0 or hidden == 0:
        return y, h_n, c_n, c, gates
    layout = _layout(x, lengths, batch_sizes, batch, lanes, reverse)
    math = configs.CELLS[cell]
    kept_c, kept_gates = c if c.numel() else None, gates if gates.numel() else None
    common = {"G": gates_count, "S": saved, "HAS_C": row.has_c, "ACC": configs.accumulator(wide)}
    config = configs.of(x.device, dtype, gates_count, hidden, batch, projection is not None)
    bias = None if bias is None else bias.contiguous()
    if config.whole:
        whole.forward[config.grid(batch, hidden, lanes)](
            x_gates, weight, bias, h0, c0, y, h_n, c_n, kept_c, kept_gates, layout, hidden,
            STEP=math.step, PRECISION=_precision(), **common, **config.tiles, **config.options,
        )  # fmt: skip
        return y, h_n, c_n, c, gates
    state = x.new_zeros(lanes, batch, width) if h0 is None else h0.clone()
    cells = c0.clone() if c0 is not None else x.new_zeros((lanes, batch, hidden) if row.has_c else (0,), dtype=wide)
    inner = state if projection is None else x.new_empty(lanes, batch, hidden)
    product = x.new_empty(lanes, batch, weight.shape[1], dtype=wide)
    projected = x.new_empty((lanes, batch, width) if projection is not None else (0,), dtype=wide)
    for n in range(layout.T):
        _product(state, weight.mT, product)
        stepwise.forward[config.grid(batch, hidden, lanes)](
            x_gates, product, bias, inner, cells, None if projection is not None else y, kept_c, kept_gates, layout, n, hidden,
            STEP=math.step, PROJECTED=projection is not None, **common, **config.tiles, **config.options,
        )  # fmt: skip
        if projection is not None:
            _product(inner, projection.mT, projected)
            tiles = {"BB": config.tiles["BB"], "BP": config.tiles["BH"]}
            stepwise.emit[config.grid(batch, width, lanes)](projected, state, y, layout, n, width, **tiles, **config.options)
    h_n.copy_(state)
    if row.has_c:
        c_n.copy_(cells)
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
    from fastseq.kernels.recurrent import configs, stepwise, whole

    row, dtype, wide = CELLS[cell], y.dtype, state_dtype(y.dtype)
    lanes, width = weight.shape[0], weight.shape[2]
    gates_count, saved = len(row.gates), len(row.saved)
    hidden = weight.shape[1] // gates_count
    leading, ragged = y.shape[:-2], lengths is not None
    batch = y.shape[1] if batch_sizes is None else int(batch_sizes[0])
    weight = weight.contiguous()
    dgates = _rows(y, *leading, lanes, weight.shape[1], ragged=ragged)
    drecurrent = _rows(y, *((*leading, lanes, hidden) if row.recurrent_bias else (0,)), ragged=ragged)
    dprojected = _rows(y, *((*leading, lanes, width) if projection is not None else (0,)), ragged=ragged)
    dh0 = y.new_empty(lanes, batch, width)
    dc0 = y.new_empty((lanes, batch, hidden) if row.has_c else (0,), dtype=wide)
    if batch == 0 or hidden == 0:
        return dgates, drecurrent, dprojected, dh0, dc0
    layout = _layout(y, lengths, batch_sizes, batch, lanes, reverse)
    math = configs.CELLS[cell]
    h0, c0, y, c, gates = _state(h0, dtype), _state(c0, wide), y.contiguous(), c.contiguous(), gates.contiguous()
    dy, dc = _state(dy, dtype), _state(dc, wide)
    out_recurrent = drecurrent if row.recurrent_bias else None
    common = {"G": gates_count, "S": saved, "HAS_C": row.has_c, "ACC": configs.accumulator(wide)}
    config = configs.of(y.device, dtype, gates_count, hidden, batch, projection is not None)
    if config.whole:
        whole.backward[config.grid(batch, hidden, lanes)](
            dy, _state(dh_n, dtype), _state(dc_n, wide), dc, weight, h0, c0, y, c, gates, dgates, out_recurrent, dh0, dc0,
            layout, hidden, STEP_BACKWARD=math.step_backward, PRECISION=_precision(),
            **common, **config.tiles, **config.options,
        )  # fmt: skip
        return dgates, drecurrent, dprojected, dh0, dc0
    dh = y.new_zeros(lanes, batch, width, dtype=wide) if dh_n is None else dh_n.to(wide, copy=True).contiguous()
    dcells = dc0.zero_() if row.has_c and dc_n is None else dc0.copy_(dc_n) if dc_n is not None else dc0
    through = y.new_zeros(lanes, batch, width, dtype=wide)
    dr = y.new_empty(lanes, batch, weight.shape[1])
    total = y.new_empty((lanes, batch, width) if projection is not None else (0,))
    inner = through if projection is None else y.new_empty(lanes, batch, hidden, dtype=wide)
    for n in range(layout.T):
        if projection is not None:
            tiles = {"BB": config.tiles["BB"], "BP": config.tiles["BH"]}
            stepwise.gather[config.grid(batch, width, lanes)](
                dy, through, dh, total, dprojected, layout, n, width, **tiles, **config.options
            )
            _product(total, projection, inner)
        stepwise.backward[config.grid(batch, hidden, lanes)](
            None if projection is not None else dy, inner, None if projection is not None else dh, dcells, dc, h0, c0, y, c,
            gates, dgates, out_recurrent, dr, layout, n, hidden,
            STEP_BACKWARD=math.step_backward, **common, **config.tiles, **config.options,
        )  # fmt: skip
        _product(dr, weight, through)
    dh0.copy_(dh + through)
    return dgates, drecurrent, dprojected, dh0, dc0


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, accumulated and stored in the dtype of ``out``."""
    if a.dtype == out.dtype:
        torch.bmm(a, b, out=out)
    elif a.is_cuda:
        torch.bmm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.bmm(a.to(out.dtype), b.to(out.dtype), out=out)


def _state(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype).contiguous()
