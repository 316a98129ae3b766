"""The recurrent op on the native kernels of ``csrc/cpu``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops.types import Backward, Forward, Weights, state_dtype
from .. import library
from ..dense import all_dense, dense
from ..query import RecurrentQuery

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PRODUCTS = (torch.bfloat16, torch.float32)  # whose products of whole matrices are ours where there is AMX
CELLS = (
    "rnn_tanh",
    "rnn_relu",
    "lstm",
    "gru",
    "coupled_lstm",
    "peephole_lstm",
    "layer_norm_lstm",
    "layer_norm_gru",
    "slstm",
)


def two_parts() -> bool:
    """Whether products of float32 that AMX computes in parts of bfloat16 have two parts, not three: half the products, and errors
    of 2^-16 of each instead of a rounding. So ``torch.set_float32_matmul_precision`` has it, with "high" or "medium"."""
    return torch._C._get_fp32_precision_getter("mkldnn", "matmul") in ("tf32", "bf16")


def why_not(query: RecurrentQuery) -> list[str]:
    against = []
    if query.dtype not in DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        against.append(f"dtype {str(query.dtype).removeprefix('torch.')} is not one of {accepted}")
    if query.cell not in CELLS:
        against.append(f"cell {query.cell} is not one of {', '.join(CELLS)}")
    return against


def recurrent_forward(call: Forward) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    results, projected = call.empty_results(), call.w_ih is not None and call.x.shape[-1] > 0
    given = call.x if projected else call.input_gates()
    x, w_ih, b_ih, weight, vectors, projection, hold_h, hold_c = all_dense(
        given, call.w_ih, call.b_ih, call.weight, call.vectors, call.projection, call.hold_h, call.hold_c
    )
    torch.ops.fastseq_native.recurrent_forward.default(
        *((x, w_ih, b_ih, None) if projected else (None, None, None, x)),
        weight,
        vectors,
        projection,
        dense(call.h0, call.dtype),
        dense(call.c0, call.wide),
        dense(call.lengths, torch.int64),
        call.batch_sizes,
        hold_h,
        hold_c,
        dense(call.resets),
        dense(call.reset_h, call.dtype),
        dense(call.reset_c, call.wide),
        call.cell,
        call.reverse_bits,
        call.zoneout_h,
        call.zoneout_c,
        two_parts(),
        *results,
    )
    return results


def recurrent_backward(call: Backward) -> tuple[Tensor, ...]:
    y, dtype, wide = call.y, call.dtype, call.wide
    results = dgates, drecurrent, _, dh0, *_ = call.empty_results()
    once = call.steps == 1 and call.resets is None
    torch.ops.fastseq_native.recurrent_backward.default(
        dense(call.dy, dtype),
        dense(call.dh_n, dtype),
        dense(call.dc_n, wide),
        dense(call.dc, wide),
        call.weight.contiguous(),
        dense(call.vectors),
        dense(call.projection),
        dense(call.h0, dtype),
        dense(call.c0, wide),
        dense(call.lengths, torch.int64),
        call.batch_sizes,
        dense(call.hold_h),
        dense(call.hold_c),
        dense(call.resets),
        dense(call.reset_h, dtype),
        dense(call.reset_c, wide),
        y.contiguous(),
        call.c.contiguous(),
        call.gates.contiguous(),
        call.cell,
        call.reverse_bits,
        call.zoneout_h,
        call.zoneout_c,
        not once,
        two_parts(),
        *results,
    )
    if once:
        dr = dgates.view(call.batch, call.lanes, dgates.shape[-1]).transpose(0, 1)
        if call.row.own_recurrent:
            own = drecurrent.view(call.batch, call.lanes, drecurrent.shape[-1]).transpose(0, 1)
            dr = torch.cat((dr[..., : -own.shape[-1]], own), -1)
        dh0 += _product(dr, call.weight).to(dtype)
    return results


def layer_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    saved: Sequence[Any],
    cell: str,
    zoneout_h: float,
    zoneout_c: float,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of x, of the four states, None for the last two, and of the parameters, w_ih and w_hh, with biases b_ih and
    b_hh, and w_hr of a projection without zoneout, of each direction; None for those not ``wanted``: of a layer of few rows, by
    one native op.
    ``saved``: x, the states, lengths (int64), batch_sizes, hold_h, hold_c, resets, y, c, gates, parameters.
    """
    x, h0, c0, _, _, lengths, batch_sizes, hold_h, hold_c, resets, y, c, gates, *params = saved
    wanted = *wanted[:3], *wanted[5:]
    if c0 is not None and c0.dtype != c.dtype:
        c0 = c0.to(c.dtype)
    dy, dh_n, dc_n, x, h0, c0 = all_dense(dy, dh_n, dc_n, x, h0, c0)
    found = torch.ops.fastseq_native.recurrent_layer_backward.default(
        *(dy, dh_n, dc_n, x, h0, c0, params, lengths, batch_sizes, hold_h, hold_c, resets),
        *(y, c, gates, cell, zoneout_h, zoneout_c, wanted, two_parts()),
    )
    each = iter(found)
    grads: list[Any] = [next(each) if want else None for want in wanted]
    if wanted[2]:
        grads[2] = grads[2].to(saved[2].dtype)
    return [*grads[:3], None, None, *grads[3:]]


def layer_gradients(
    call: Backward, results: tuple[Tensor, ...], x: Tensor, weights: Weights, wanted: Weights, wanted_x: bool
) -> list[Tensor] | None:
    """Gradients of x, and lane by lane of w_ih, w_hh, b_ih and b_hh, those that are ``wanted``; None: torch's products serve."""
    if x.dtype not in PRODUCTS or library.reason():
        return None
    call.spread_reset_states()
    dgates, drecurrent, *_ = results
    bits = [sum(bool(kind and kind[lane]) << bit for bit, kind in enumerate(wanted[:4])) for lane in range(call.lanes)]
    bits[0] |= int(wanted_x) << 4
    found = torch.ops.fastseq_native.recurrent_gradients.default(
        x,
        dgates.contiguous(),
        drecurrent.contiguous(),
        call.y.contiguous(),
        dense(call.h0, x.dtype),
        dense(call.lengths, torch.int64),
        call.batch_sizes,
        dense(call.resets),
        dense(call.reset_h, x.dtype),
        list(weights.w_ih) if wanted_x else [],
        call.reverse_bits,
        bits,
        two_parts(),
    )
    return found or None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b [D, .., ..] accumulated and returned in the state's dtype."""
    wide = state_dtype(a.dtype)
    a, b = a.to(wide), b.to(wide)
    return torch.mm(a[0], b[0]).unsqueeze(0) if a.shape[0] == 1 else torch.bmm(a, b)
