"""The recurrent op on the native kernels of ``csrc/cpu``."""

from __future__ import annotations

import torch
from torch import Tensor

from ...reference.recurrent import Backward, Forward, state_dtype
from .. import library
from ..query import RecurrentQuery
from ..rows import state

# Rows of a call (steps times sequences) from which its kernels project the input themselves, chunk by chunk of steps, so that the
# projected input of a long sequence is neither stored nor, in bfloat16, rounded. With fewer, packing the input weights (they are
# transposed) costs more than that saves. A single step is two plain matrix products.
_OWN_PROJECTION_ROWS = {torch.float32: 512, torch.float64: 512, torch.bfloat16: 64}

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru", "coupled_lstm", "peephole_lstm", "slstm")


def why_not(query: RecurrentQuery) -> list[str]:
    missing = library.reason()
    if missing:
        return [missing]
    against = []
    if query.dtype not in _DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        against.append(f"dtype {str(query.dtype).removeprefix('torch.')} is not one of {accepted}")
    if query.cell not in CELLS:
        against.append(f"cell {query.cell} is not one of {', '.join(CELLS)}")
    return against


def recurrent_forward(call: Forward) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    row, x, wide, lanes, hidden = call.row, call.x, call.wide, call.lanes, call.hidden
    leading, batch, states = x.shape[:-1], call.batch, row.wide_states * hidden
    y = x.new_empty(*leading, lanes, call.width)
    h_n = x.new_empty(lanes, batch, call.width)
    c_n = x.new_empty((lanes, batch, states) if row.has_c else (0,), dtype=wide)
    c = x.new_empty((*leading, lanes, states) if row.has_c and call.save_c else (0,), dtype=wide)
    gates = x.new_empty((*leading, lanes, call.saved * hidden) if call.saved and call.save_gates else (0,))
    h0 = state(call.h0, call.dtype)
    h_gates = None
    if call.steps == 1:
        zeros = x.new_zeros(lanes, batch, call.weight.shape[1], dtype=wide)
        h_gates = zeros if h0 is None else _product(h0, call.weight.mT)
    w_ih = call.w_ih
    own = w_ih is not None and call.steps > 1 and x.numel() >= _OWN_PROJECTION_ROWS[call.dtype] * x.shape[-1] > 0
    torch.ops.fastseq_native.recurrent_forward.default(
        x.contiguous() if own else None,
        _dense(w_ih) if own else None,
        _dense(call.b_ih) if own else None,
        None if own else call.input_gates().contiguous(),
        h_gates,
        call.weight.contiguous(),
        _dense(call.vectors),
        _dense(call.projection),
        h0,
        state(call.c0, wide),
        _int64(call.lengths),
        call.batch_sizes,
        _dense(call.hold_h),
        _dense(call.hold_c),
        call.cell,
        call.reverse_bits,
        call.zoneout_h,
        call.zoneout_c,
        y,
        h_n,
        c_n,
        c,
        gates,
    )
    return y, h_n, c_n, c, gates


def recurrent_backward(call: Backward) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    row, y, dtype, wide, lanes, hidden = call.row, call.y, call.dtype, call.wide, call.lanes, call.hidden
    leading, batch = y.shape[:-2], call.batch
    dgates = y.new_empty(*leading, lanes, call.weight.shape[1])
    drecurrent = y.new_empty((*leading, lanes, row.own_recurrent * hidden) if row.own_recurrent else (0,))
    doutput = y.new_empty((*leading, lanes, call.width) if call.output_gradient else (0,))
    dh0 = y.new_empty(lanes, batch, call.width)
    dc0 = y.new_empty((lanes, batch, row.wide_states * hidden) if row.has_c else (0,), dtype=wide)
    once = call.steps == 1
    torch.ops.fastseq_native.recurrent_backward.default(
        state(call.dy, dtype),
        state(call.dh_n, dtype),
        state(call.dc_n, wide),
        state(call.dc, wide),
        call.weight.contiguous(),
        _dense(call.vectors),
        _dense(call.projection),
        state(call.h0, dtype),
        state(call.c0, wide),
        _int64(call.lengths),
        call.batch_sizes,
        _dense(call.hold_h),
        _dense(call.hold_c),
        y.contiguous(),
        call.c.contiguous(),
        call.gates.contiguous(),
        call.cell,
        call.reverse_bits,
        call.zoneout_h,
        call.zoneout_c,
        not once,
        dgates,
        drecurrent,
        doutput,
        dh0,
        dc0,
    )
    if once:
        dr = dgates.view(batch, lanes, -1).transpose(0, 1)
        if row.own_recurrent:
            dr = torch.cat((dr[..., :-hidden], drecurrent.view(batch, lanes, -1).transpose(0, 1)), -1)
        dh0 += _product(dr, call.weight).to(dtype)
    return dgates, drecurrent, doutput, dh0, dc0


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b [D, .., ..] accumulated and returned in the state's dtype."""
    wide = state_dtype(a.dtype)
    a, b = a.to(wide), b.to(wide)
    return torch.mm(a[0], b[0]).unsqueeze(0) if a.shape[0] == 1 else torch.bmm(a, b)


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _int64(lengths: Tensor | None) -> Tensor | None:
    return None if lengths is None else lengths.to(torch.int64).contiguous()
