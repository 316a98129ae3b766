"""What every form of the Triton recurrent kernels is given: a call's tensors as the kernels want them, and room for results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops.types import Backward, Call, Forward
from ..dense import dense
from ..forms import measured_form
from ..precision import fp32_precision


class _Launched:
    """Of both directions: the layout, the config, and the keyword arguments of every kernel."""

    def __init__(self, call: Call) -> None:
        from fastseq.kernels.recurrent import configs

        row = call.row
        self.call, self.math = call, configs.CELLS[call.cell]
        self.config = configs.of(
            call.rows.device, call.dtype, len(row.gates), call.hidden, call.batch, call.projection is not None, row.normalized,
            one_step=call.steps == 1 and call.lengths is None, backward=isinstance(call, Backward),
            exact=call.dtype == torch.float32 and fp32_precision() == "ieee",
            measured=measured_form("triton", call, isinstance(call, Backward)) or None,
        )  # fmt: skip
        self.layout = _layout(call)
        self.zoneout = _zoneout(call)
        self.resets = _resets(call)
        self.weight = call.weight.contiguous()
        self.vectors = dense(call.vectors)
        self.h0, self.c0 = dense(call.h0, call.dtype), dense(call.c0, call.wide)
        self.sizes = {"G": len(row.gates), "S": call.saved, "K": row.wide_states, "V": len(row.vectors)}
        self.options = {
            **self.sizes,
            "OUTPUT_SAVED": call.zoned and not row.saved,
            "KEEP_H": 0.0 if call.hold_h is not None else call.zoneout_h,
            "KEEP_C": 0.0 if call.hold_c is not None else call.zoneout_c,
            "ACC": configs.accumulator(call.wide),
            **self.config.tiles,
            **self.config.options,
        }

    def grid(self, width: int) -> tuple[int, ...]:
        return self.config.grid(self.call.batch, width, self.call.lanes)


class ForwardLaunch(_Launched):
    """``results``: y, h_n, c_n, c, gates, as the op's contract has them; ``c`` and ``gates`` are None where nobody wants them."""

    call: Forward

    def __init__(self, call: Forward) -> None:
        super().__init__(call)
        # the form with one step projects the input itself
        self.x_gates = None if self.config.form == "single" else call.input_gates().contiguous()
        self.results = call.empty_results(zeros=True)
        self.y, self.h_n, self.c_n, c, gates = self.results
        self.c, self.gates = c if c.numel() else None, gates if gates.numel() else None


class BackwardLaunch(_Launched):
    """``results``: dgates, drecurrent, doutput, dh0, dc0, dreset_h, dreset_c, as the op's contract has them; None for the kernels
    where empty."""

    def __init__(self, call: Backward) -> None:
        super().__init__(call)
        self.results = call.empty_results(zeros=True)
        self.dgates, drecurrent, doutput, self.dh0, self.dc0, dreset_h, dreset_c = self.results
        if call.resets is not None:
            wanted = (sums if sums.numel() else None for sums in (dreset_h, dreset_c))
            self.resets = self.resets._replace(**dict(zip(("dh", "dc"), wanted, strict=True)))
        self.drecurrent = drecurrent if call.row.own_recurrent else None
        self.doutput = doutput if call.output_gradient else None
        self.y, self.c, self.gates = call.y.contiguous(), call.c.contiguous(), call.gates.contiguous()
        self.dy, self.dh_n = dense(call.dy, call.dtype), dense(call.dh_n, call.dtype)
        self.dc_n, self.dc = dense(call.dc_n, call.wide), dense(call.dc, call.wide)
        self.options |= {
            "OWN": call.row.own_recurrent,
            "STEP_BACKWARD": self.math.step_backward,
            "CANDIDATE": self.math.candidate,
            "READS": self.math.reads,
        }


def _layout(call: Call) -> Any:
    from fastseq.kernels.recurrent.args import Layout

    starts, ends = call.row_offsets()
    return Layout(starts, ends, call.steps, call.batch, call.lanes, call.reverse_bits)


def _zoneout(call: Call) -> Any:
    from fastseq.kernels.recurrent.args import Zoneout

    return Zoneout(*(None if hold is None else hold.contiguous().view(torch.uint8) for hold in (call.hold_h, call.hold_c)))


def _resets(call: Call) -> Any:
    from fastseq.kernels.recurrent.args import Resets

    if call.resets is None:
        return Resets(None, None, None)
    rows = call.resets.contiguous().view(torch.uint8)
    return Resets(rows, dense(call.reset_h, call.dtype), dense(call.reset_c, call.wide))


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, accumulated and stored in the dtype of ``out``."""
    if a.dtype == out.dtype:
        torch.bmm(a, b, out=out)
    elif a.is_cuda:
        torch.bmm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.bmm(a.to(out.dtype), b.to(out.dtype), out=out)
