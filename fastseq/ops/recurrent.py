"""``fastseq::recurrent_forward`` and ``fastseq::recurrent_backward``: one layer of recurrence, all its lanes in one call.

A lane is a direction: ``reverse[d]`` is 1 if lane d walks from the last step to the first, else 0. The input projection belongs
to the op, so that a backend may fuse it with the steps (the CPU kernels do: the projected input of a long sequence is larger than
the caches) or do it as one large matrix product. The gradients of the weights and of the input are large matrix products after
the backward op; they stand here, in the autograd function around both.

Contract (letters in ``reference/recurrent.py``; rows are padded ``[T, B, D, n]`` or packed ``[N, D, n]``; time-major,
contiguous):

=============  ==================  =====================================================================================
x              rows without D, I   input, shared by the lanes: [T, B, I] or [N, I]
w_ih           [D*G*H, I]          input weights of all lanes, gates in PyTorch's order
b_ih           [D*G*H] or None     every bias that can be folded into the input projection
weight         [D, G*H, P]         recurrent weights
bias           [D, H] or None      the recurrent bias of ``cell.recurrent_bias`` (GRU: of n)
projection     [D, P, H] or None   h = m projection^T (LSTM only)
h0, c0         [D, B, P], [D,B,H]  or None: zeros
lengths        [B] integer, None   padded only, on the input's device, 0 <= length <= T
batch_sizes    [T] int64, None     packed only, on the CPU, as PackedSequence has it
y              rows, P             zero beyond a row's length
h_n, c_n       [D, B, P], [D,B,H]  state after a row's last step; c_n in ``state_dtype`` (fp32 or wider)
c              rows, H             every step's c in ``state_dtype``; zero beyond a row's length; empty unless ``save_c``
gates          rows, S*H           ``cell.saved``; zero beyond a row's length; empty unless ``save_gates``
dgates         rows, G*H           gradient of x w_ih^T + b_ih; zero beyond a row's length
drecurrent     rows, H             gradient of the recurrent part of ``cell.recurrent_bias``'s gate (GRU: of q), else empty
dprojected     rows, P             whole gradient of every projected output; empty without projection
dh0, dc0       as h0, c0           always computed
=============  ==================  =====================================================================================

``c`` and ``gates`` mean the same whichever backend wrote them, so any backend's backward takes any backend's forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..cells import CELLS
from ..reference import recurrent as reference
from ..reference.cells import steps as cell_steps
from ..reference.recurrent import state_dtype
from ._dispatch import needs_plain_torch, outside_dynamo

_library = torch.library.Library("fastseq", "FRAGMENT")
_library.define(
    "recurrent_forward(Tensor x, Tensor w_ih, Tensor? b_ih, Tensor weight, Tensor? bias, Tensor? projection, Tensor? h0, "
    "Tensor? c0, Tensor? lengths, Tensor? batch_sizes, str cell, int[] reverse, bool save_c, bool save_gates) "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor c, Tensor gates)"
)
_library.define(
    "recurrent_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc, Tensor weight, Tensor? projection, Tensor? h0, "
    "Tensor? c0, Tensor? lengths, Tensor? batch_sizes, Tensor y, Tensor c, Tensor gates, str cell, int[] reverse) "
    "-> (Tensor dgates, Tensor drecurrent, Tensor dprojected, Tensor dh0, Tensor dc0)"
)


def _query(
    rows: Tensor, weight: Tensor, projection: Tensor | None, lengths: Tensor | None, batch_sizes: Tensor | None, cell: str
) -> backends.RecurrentQuery:
    return backends.RecurrentQuery(
        op="recurrent",
        device=rows.device,
        dtype=rows.dtype,
        cell=cell,
        steps=rows.shape[0] if batch_sizes is None else batch_sizes.shape[0],
        lanes=weight.shape[0],
        hidden=weight.shape[1] // len(CELLS[cell].gates),
        projected=projection is not None,
        layout="packed" if batch_sizes is not None else "padded" if lengths is None else "lengths",
    )


def _check_layout(rows: Tensor, lengths: Tensor | None, batch_sizes: Tensor | None) -> None:
    """Values that only exist at run time, hence checked by the op and not by the functional layer."""
    if lengths is not None:
        longest = rows.shape[0]
        if lengths.device.type == "cpu":
            if lengths.numel():
                low, high = lengths.aminmax()
                if low < 0 or high > longest:
                    raise RuntimeError(
                        f"lengths must lie in [0, {longest}], the number of steps; got values from {int(low)} to {int(high)}"
                    )
        else:
            in_range = ((lengths >= 0) & (lengths <= longest)).all()
            torch._assert_async(in_range, f"lengths must lie in [0, {longest}], the number of steps")
    if batch_sizes is not None:
        sizes = batch_sizes.tolist()
        total = sum(sizes)
        if not sizes or sizes[-1] < 1 or any(a < b for a, b in zip(sizes, sizes[1:], strict=False)):
            raise RuntimeError("batch_sizes must be positive and must not increase, as in a PackedSequence")
        if total != rows.shape[0]:
            raise RuntimeError(f"batch_sizes add up to {total} rows, but the packed data has {rows.shape[0]}")


def _recurrent_forward(
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
) -> tuple[Tensor, ...]:
    _check_layout(x, lengths, batch_sizes)
    backend = backends.select(_query(x, weight, projection, lengths, batch_sizes, cell))
    return backend.recurrent_forward(
        x, w_ih, b_ih, weight, bias, projection, h0, c0, lengths, batch_sizes, cell, reverse, save_c, save_gates
    )


def _recurrent_backward(
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
) -> tuple[Tensor, ...]:
    backend = backends.select(_query(y, weight, projection, lengths, batch_sizes, cell))
    return backend.recurrent_backward(
        dy, dh_n, dc_n, dc, weight, projection, h0, c0, lengths, batch_sizes, y, c, gates, cell, reverse
    )


def _fake_forward(
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
) -> tuple[Tensor, ...]:
    row, wide = CELLS[cell], state_dtype(x.dtype)
    lanes, width = weight.shape[0], weight.shape[2]
    hidden = weight.shape[1] // len(row.gates)
    leading = x.shape[:-1]
    batch: int | torch.SymInt
    if batch_sizes is None:
        batch = x.shape[1]
    elif h0 is not None:
        batch = h0.shape[1]
    else:
        batch = torch.library.get_ctx().new_dynamic_size()
    empty = x.new_empty
    return (
        empty(*leading, lanes, width),
        empty(lanes, batch, width),
        empty((lanes, batch, hidden) if row.has_c else (0,), dtype=wide),
        empty((*leading, lanes, hidden) if row.has_c and save_c else (0,), dtype=wide),
        empty((*leading, lanes, len(row.saved) * hidden) if row.saved and save_gates else (0,)),
    )


def _fake_backward(
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
) -> tuple[Tensor, ...]:
    row = CELLS[cell]
    lanes, width = weight.shape[0], weight.shape[2]
    hidden = weight.shape[1] // len(row.gates)
    leading = y.shape[:-2]
    batch: int | torch.SymInt
    if batch_sizes is None:
        batch = y.shape[1]
    else:
        given = next((state for state in (h0, c0, dh_n, dc_n) if state is not None), None)
        batch = torch.library.get_ctx().new_dynamic_size() if given is None else given.shape[1]
    empty = y.new_empty
    return (
        empty(*leading, lanes, weight.shape[1]),
        empty((*leading, lanes, hidden) if row.recurrent_bias else (0,)),
        empty((*leading, lanes, width) if projection is not None else (0,)),
        empty(lanes, batch, width),
        empty((lanes, batch, hidden) if row.has_c else (0,), dtype=state_dtype(y.dtype)),
    )


for _name, _run, _fake in (
    ("recurrent_forward", _recurrent_forward, _fake_forward),
    ("recurrent_backward", _recurrent_backward, _fake_backward),
):
    _library.impl(_name, outside_dynamo(_run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastseq::{_name}", _fake, lib=_library)

_forward_op = torch.ops.fastseq.recurrent_forward.default
_backward_op = torch.ops.fastseq.recurrent_backward.default

PARAMS = 5  # of one lane: w_ih [G*H, I], w_hh [G*H, P], b_ih [G*H] or None, b_hh [G*H] or None, w_hr [P, H] or None


class _Weights:
    """The parameters of a layer's lanes, as the op wants them."""

    w_ih: list[Tensor]
    w_hh: list[Tensor]
    # a Tensor in every lane, or None in every lane
    b_ih: list[Any]
    b_hh: list[Any]
    w_hr: list[Any]

    def __init__(self, cell: str, params: Sequence[Any]) -> None:
        self.cell = CELLS[cell]
        self.w_ih, self.w_hh, self.b_ih, self.b_hh, self.w_hr = (list(params[i::PARAMS]) for i in range(PARAMS))
        self.lanes = len(self.w_ih)

    def input_weight(self) -> Tensor:
        """[D*G*H, I]"""
        return _join(self.w_ih)

    def input_bias(self) -> Tensor | None:
        """[D*G*H]"""
        return None if self.b_ih[0] is None else _join([self._folded_bias(lane) for lane in range(self.lanes)])

    def recurrent_weight(self) -> Tensor:
        return _stack(self.w_hh)

    def recurrent_bias(self) -> Tensor | None:
        if self.cell.recurrent_bias is None or self.b_hh[0] is None:
            return None
        return _stack([b[-b.shape[0] // len(self.cell.gates) :] for b in self.b_hh])

    def projection(self) -> Tensor | None:
        return None if self.w_hr[0] is None else _stack(self.w_hr)

    def _folded_bias(self, lane: int) -> Tensor:
        b_ih, b_hh = self.b_ih[lane], self.b_hh[lane]
        if self.cell.recurrent_bias is None:
            return b_ih + b_hh
        inside = b_hh.shape[0] // len(self.cell.gates)
        return b_ih + torch.nn.functional.pad(b_hh[:-inside], (0, inside))


def _join(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _stack(tensors: list[Tensor]) -> Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def _reference_layer(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    cell: str,
    reverse: list[int],
    params: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """A layer in plain, differentiable PyTorch: y, h_n, c_n, c."""
    weights = _Weights(cell, params)
    y, h_n, c_n, c, _ = reference.forward(
        x,
        weights.input_weight(),
        weights.input_bias(),
        weights.recurrent_weight(),
        weights.recurrent_bias(),
        weights.projection(),
        h0,
        c0,
        lengths,
        batch_sizes,
        cell,
        reverse,
        True,
        False,
    )
    return y, h_n, c_n, c


class _Recurrent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, h0, c0, lengths, batch_sizes, cell, reverse, recompute, *params):
        weights = _Weights(cell, params)
        y, h_n, c_n, c, gates = _forward_op(
            x,
            weights.input_weight(),
            weights.input_bias(),
            weights.recurrent_weight(),
            weights.recurrent_bias(),
            weights.projection(),
            h0,
            c0,
            lengths,
            batch_sizes,
            cell,
            reverse,
            True,
            not recompute,
        )
        ctx.save_for_backward(x, h0, c0, lengths, batch_sizes, y, c, gates, *params)
        ctx.cell, ctx.reverse, ctx.recompute = cell, reverse, recompute
        ctx.set_materialize_grads(False)
        if not CELLS[cell].has_c:
            ctx.mark_non_differentiable(c_n, c)
        return y, h_n, c_n, c

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n, dc):
        x, h0, c0, lengths, batch_sizes, y, c, gates, *params = ctx.saved_tensors
        if not CELLS[ctx.cell].has_c:
            dc_n = dc = None
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _differentiable_backward(ctx, x, h0, c0, lengths, batch_sizes, params, (dy, dh_n, dc_n, dc))
        elif torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                grads = _backward(ctx, x, h0, c0, lengths, batch_sizes, y, c, gates, params, (dy, dh_n, dc_n, dc))
        else:
            grads = _backward(ctx, x, h0, c0, lengths, batch_sizes, y, c, gates, params, (dy, dh_n, dc_n, dc))
        dx, dh0, dc0, dparams = grads
        return dx, dh0, dc0, None, None, None, None, None, *dparams


def _differentiable_backward(ctx, x, h0, c0, lengths, batch_sizes, params, grad_outputs):
    """The gradients with a graph of their own (create_graph=True): through the reference, from the layer's inputs."""
    inputs = (x, h0, c0, *params)
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 2)] + list(ctx.needs_input_grad[8:])
    # views, so that a tensor given twice (tied weights) has two places in the graph
    views = [t.view_as(t) if t is not None and want else t for t, want in zip(inputs, wanted, strict=True)]
    outputs = _reference_layer(views[0], views[1], views[2], lengths, batch_sizes, ctx.cell, ctx.reverse, tuple(views[3:]))
    used = [(out, grad) for out, grad in zip(outputs, grad_outputs, strict=True) if grad is not None]
    results: list[Tensor | None] = [None] * len(inputs)
    if used and any(wanted):
        places = [i for i, want in enumerate(wanted) if want]
        grads = torch.autograd.grad(
            [out for out, _ in used],
            [views[i] for i in places],
            [grad.to(out.dtype) for out, grad in used],
            create_graph=True,
            allow_unused=True,
        )
        for i, grad in zip(places, grads, strict=True):
            results[i] = grad
    return results[0], results[1], results[2], results[3:]


def _backward(ctx, x, h0, c0, lengths, batch_sizes, y, c, gates, params, grad_outputs):
    weights = _Weights(ctx.cell, tuple(params))
    cell, reverse = weights.cell, ctx.reverse
    dy, dh_n, dc_n, dc = grad_outputs
    if all(grad is None for grad in grad_outputs):
        return None, None, None, [None] * len(params)
    w_hh, w_hr = weights.recurrent_weight(), weights.projection()
    if ctx.recompute and cell.saved:
        gates = _recomputed_gates(weights, x, h0, c0, lengths, batch_sizes, y, c, reverse)
    dgates, drecurrent, dprojected, dh0, dc0 = _backward_op(
        _contiguous(dy),
        _contiguous(dh_n),
        _contiguous(dc_n),
        _contiguous(dc),
        w_hh,
        w_hr,
        h0,
        c0,
        lengths,
        batch_sizes,
        y,
        c,
        gates,
        ctx.cell,
        reverse,
    )
    wanted = ctx.needs_input_grad
    flat_x = x.flatten(0, -2)
    flat = dgates.view(flat_x.shape[0], weights.lanes * dgates.shape[-1])  # [rows, D*G*H]
    dx = (flat @ weights.input_weight()).view(x.shape) if wanted[0] else None
    dparams: list[Tensor | None] = [None] * len(params)
    for lane in range(weights.lanes):
        want = wanted[8 + lane * PARAMS : 8 + (lane + 1) * PARAMS]
        place = lane * PARAMS
        d = _lane(dgates, lane)  # [rows, G*H]
        dr = _lane(drecurrent, lane) if cell.recurrent_bias else None  # [rows, H]
        if want[0]:
            dparams[place] = _outer_sum(d, flat_x)
        if want[1]:
            h_first, h_prev = _before(y, h0, lengths, batch_sizes, lane, reverse[lane])
            dparams[place + 1] = _recurrent_weight_grad(d, dr, h_first, h_prev, dgates.shape, reverse[lane])
        if want[2] or want[3]:
            db = d.sum(0)
            dparams[place + 2] = db if want[2] else None
            if want[3]:
                dparams[place + 3] = db.clone() if dr is None else torch.cat((db[: -dr.shape[1]], dr.sum(0)))
        if want[4]:
            # m = o tanh(c), which the projection saw
            o = _lane(gates, lane)[:, -c.shape[-1] :]
            m = o * _lane(c, lane).tanh().to(o.dtype)
            dparams[place + 4] = _outer_sum(_lane(dprojected, lane), m)
    dh0 = dh0.to(h0.dtype) if wanted[1] else None
    dc0 = dc0.to(c0.dtype) if wanted[2] else None
    return dx, dh0, dc0, dparams


def _lane(rows: Tensor, lane: int) -> Tensor:
    """[.., D, n] -> [rows, n] of one lane."""
    return rows.flatten(0, -2) if rows.shape[-2] == 1 else rows.flatten(0, -3)[:, lane]


def _outer_sum(a: Tensor, b: Tensor) -> Tensor:
    """a^T b [m, n] from [rows, m] and [rows, n].

    On one thread a large product is faster with fewer rows than columns (MKL: 5 to 10 %), which pays for transposing the result.
    """
    if (
        not torch.compiler.is_compiling()
        and torch.get_num_threads() == 1
        and a.shape[1] > b.shape[1]
        and a.shape[0] * a.shape[1] * b.shape[1] > 1 << 22
    ):
        return (b.t() @ a).t().contiguous()
    return a.t() @ b


def _contiguous(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.contiguous()


def _before(
    rows: Tensor, first: Tensor | None, lengths: Tensor | None, batch_sizes: Tensor | None, lane: int, backwards: int
) -> tuple[Tensor | None, Tensor]:
    """The states before every step, as (rows of the first step, rows of the others) or as (None, all rows).

    The pair avoids a copy where the states are a plain shift of the states after every step.
    """
    if batch_sizes is not None or (backwards and lengths is not None and first is not None):
        return None, _shifted(rows, first, lengths, batch_sizes, lane, backwards).flatten(0, -2)
    own = rows[:, :, lane]  # [T, B, n]
    others = (own[1:] if backwards else own[:-1]).flatten(0, 1)
    return (None if first is None else first[lane].to(rows.dtype)), others


def _shifted(
    rows: Tensor, first: Tensor | None, lengths: Tensor | None, batch_sizes: Tensor | None, lane: int, backwards: int
) -> Tensor:
    """The states before every step, from the states after every step: [T, B, n], or [N, n]."""
    own = rows.select(-2, lane)
    start = None if first is None else first[lane].to(rows.dtype)
    steps = rows.shape[0] if batch_sizes is None else batch_sizes.shape[0]
    if batch_sizes is None:
        start = torch.zeros_like(own[0]) if start is None else start
        shifted = torch.cat((own[1:], start[None]) if backwards else (start[None], own[:-1]))
        if backwards and lengths is not None:
            following = torch.arange(1, steps + 1, device=rows.device)
            shifted = torch.where((following[:, None] < lengths)[..., None], shifted, start)
        return shifted
    total, sizes = rows.shape[0], batch_sizes
    begin = sizes.cumsum(0) - sizes  # first row of every step
    step = torch.repeat_interleave(torch.arange(steps), sizes, output_size=total)
    slot = torch.arange(total) - begin[step]  # which sequence a row belongs to
    outside = total + slot if start is not None else torch.full_like(slot, total)
    if backwards:
        other = (step + 1).clamp(max=steps - 1)
        inside = (step + 1 < steps) & (slot < sizes[other])
    else:
        other = (step - 1).clamp(min=0)
        inside = step > 0
    source = torch.where(inside, begin[other] + slot, outside)
    states = torch.cat((own, own.new_zeros(1, own.shape[-1]) if start is None else start))
    return states.index_select(0, source.to(rows.device))


def _recurrent_weight_grad(
    d: Tensor, dr: Tensor | None, h_first: Tensor | None, h_prev: Tensor, shape: torch.Size, backwards: int
) -> Tensor:
    """Sum over all steps of (gradient of the recurrent gates)^T (state before the step): [G*H, P]."""
    shifted = h_prev.shape[0] != d.shape[0]  # h_prev then has no rows for the first step
    parts = [d] if dr is None else [d[:, : -dr.shape[1]], dr]
    products = []
    for grad in parts:
        if not shifted:
            products.append(_outer_sum(grad, h_prev))
            continue
        batch = shape[1]
        product = _outer_sum(grad[:-batch] if backwards else grad[batch:], h_prev)
        if h_first is not None:
            product = torch.addmm(product, (grad[-batch:] if backwards else grad[:batch]).t(), h_first)
        products.append(product)
    return _join(products)


def _recomputed_gates(
    weights: _Weights,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    y: Tensor,
    c: Tensor,
    reverse: list[int],
) -> Tensor:
    """The ``gates`` that the forward pass did not save: matrix products and elementwise work, parallel over time.

    Done in blocks of rows, so that the intermediate values of one block are all that is held beside the result.
    """
    row = weights.cell
    step = cell_steps(row.name).step
    hidden = weights.w_hh[0].shape[0] // len(row.gates)
    lanes = weights.lanes
    wide = state_dtype(y.dtype)
    flat_x = x.flatten(0, -2)
    total = flat_x.shape[0]
    gates = y.new_empty(total, lanes, len(row.saved) * hidden)
    w_ih, b_ih, bias = weights.input_weight(), weights.input_bias(), weights.recurrent_bias()
    before = []
    for lane in range(lanes):
        h_prev = _shifted(y, h0, lengths, batch_sizes, lane, reverse[lane]).flatten(0, -2)
        c_prev = _shifted(c, c0, lengths, batch_sizes, lane, reverse[lane]).flatten(0, -2) if row.has_c else None
        before.append((h_prev, c_prev))
    if torch.compiler.is_compiling():
        parts = [slice(None)]  # a loop over blocks would fix the number of rows in the compiled code
    else:
        block = max(1, -(-total // 16))
        parts = [slice(begin, begin + block) for begin in range(0, total, block)]
    for part in parts:
        x_gates = reference.input_gates(flat_x[part], w_ih, b_ih, lanes)
        for lane, (h_prev, c_prev) in enumerate(before):
            r = h_prev[part] @ weights.w_hh[lane].t()
            saved = step(
                x_gates[:, lane].to(wide),
                r.to(wide),
                None if bias is None else bias[lane].to(wide),
                h_prev[part].to(wide),
                None if c_prev is None else c_prev[part],
            )[2]
            gates[part, lane] = saved.to(gates.dtype)
    return gates.view(*y.shape[:-1], gates.shape[-1])


def recurrent(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    params: list[Tensor | None],
    *,
    cell: str,
    reverse: list[int],
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    return_cells: bool = False,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One layer, differentiable: y [.., D*P], h_n [D, B, P], c_n [D, B, H] or None, c of every step [.., D*H] or None.

    Args:
        x: ``[T, B, I]``, or ``[N, I]`` with ``batch_sizes``.
        params: ``PARAMS`` per lane: w_ih, w_hh, b_ih, b_hh, w_hr, None where there is none.
        recompute: save no gate activations for the backward pass, but recompute them there (one large product, parallel over
            time).
    """
    if batch_sizes is not None and len(batch_sizes) and not torch.compiler.is_compiling():
        steps, batch = batch_sizes.shape[0], int(batch_sizes[0])
        # rows of one length (a single row always) are not ragged: the plain layout serves
        if x.shape[0] == steps * batch and bool((batch_sizes == batch).all()):
            y, h_n, c_n, c = recurrent(
                x.view(steps, batch, x.shape[1]),
                h0,
                c0,
                params,
                cell=cell,
                reverse=reverse,
                return_cells=return_cells,
                recompute=recompute,
            )
            return y.flatten(0, 1), h_n, c_n, None if c is None else c.flatten(0, 1)
    given = [t for t in (x, h0, c0, *params) if t is not None]
    if needs_plain_torch(given):
        y, h_n, c_n, c = _reference_layer(x, h0, c0, lengths, batch_sizes, cell, reverse, tuple(params))
    elif torch.is_grad_enabled() and any(t.requires_grad for t in given):
        y, h_n, c_n, c = _Recurrent.apply(x, h0, c0, lengths, batch_sizes, cell, reverse, recompute, *params)
    else:
        weights = _Weights(cell, tuple(params))
        y, h_n, c_n, c, _ = _forward_op(
            x,
            weights.input_weight(),
            weights.input_bias(),
            weights.recurrent_weight(),
            weights.recurrent_bias(),
            weights.projection(),
            h0,
            c0,
            lengths,
            batch_sizes,
            cell,
            reverse,
            return_cells,
            False,
        )
    has_c = CELLS[cell].has_c
    return y.flatten(-2), h_n, c_n if has_c else None, c.flatten(-2) if has_c and return_cells else None
