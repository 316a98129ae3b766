"""``fastseq::recurrent_forward`` and ``fastseq::recurrent_backward``: one layer of recurrence, all its lanes in one call.

A lane is a direction, or a head of one where the recurrence is block-diagonal: ``reverse[d]`` is 1 if lane d walks from the last
step to the first, else 0. The input projection belongs to the op, so that a backend may fuse it with the steps (the CPU kernels
do: the projected input of a long sequence is larger than the caches) or do it as one large matrix product; without ``w_ih`` the
input is projected already. The gradients of the weights and of the input are large matrix products after the backward op; they
stand here, in the autograd function around both.

Contract (letters in ``reference/recurrent.py``; rows are padded ``[T, B, D, n]`` or packed ``[N, D, n]``; time-major,
contiguous):

=============  ==================  =====================================================================================
x              rows without D, I   input, shared by the lanes: [T, B, I] or [N, I]; without w_ih I = D*G*H, input gates
w_ih           [D*G*H, I] or None  input weights of all lanes, gates in PyTorch's order
b_ih           [D*G*H] or None     every bias that can be folded into the input projection
weight         [D, G*H, P]         recurrent weights
vectors        [D, V*H] or None    ``cell.vectors``; None where a cell has none, or its only one is a bias and is zero
projection     [D, P, H] or None   h = m projection^T (LSTM only)
h0, c0         [D,B,P], [D,B,K*H]  or None: zeros; c0 holds the states beside h side by side
lengths        [B] integer, None   padded only, on the input's device, 0 <= length <= T
batch_sizes    [T] int64, None     packed only, on the CPU, as PackedSequence has it
hold_h         rows, P bool, None  zoneout in training: where h keeps its value in a step
hold_c         rows, H bool, None  the same for c, of cells with one state beside h
zoneout_h, _c  float               without hold_h, hold_c: the proportion of the old value, as at inference; 0: no zoneout
y              rows, P             zero beyond a row's length
h_n, c_n       as h0, c0           state after a row's last step; c_n in ``state_dtype`` (fp32 or wider)
c              rows, K*H           every step's states beside h in ``state_dtype``; zero beyond a row's length; empty unless
                                   ``save_c``
gates          rows, S*H           ``cell.saved``, or with zoneout at least the step's output before it; zero beyond a row's
                                   length; empty unless ``save_gates``
dgates         rows, G*H           gradient of the input gates; zero beyond a row's length
drecurrent     rows, own*H         gradient of R h, of the last ``cell.own_recurrent`` gates, where it is another; else empty
doutput        rows, P             whole gradient of every step's output before zoneout; empty unless projected or normalised
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
from ..reference.recurrent import Backward, Call, Forward
from ._dispatch import needs_plain_torch, outside_dynamo
from .recurrent_gradients import Walk, Weights, input_gradients, recomputed_gates, reference_layer

_library = torch.library.Library("fastseq", "FRAGMENT")
_library.define(
    "recurrent_forward(Tensor x, Tensor? w_ih, Tensor? b_ih, Tensor weight, Tensor? vectors, Tensor? projection, Tensor? h0, "
    "Tensor? c0, Tensor? lengths, Tensor? batch_sizes, Tensor? hold_h, Tensor? hold_c, str cell, int[] reverse, "
    "float zoneout_h, float zoneout_c, bool save_c, bool save_gates) "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor c, Tensor gates)"
)
_library.define(
    "recurrent_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc, Tensor weight, Tensor? vectors, Tensor? projection, "
    "Tensor? h0, Tensor? c0, Tensor? lengths, Tensor? batch_sizes, Tensor? hold_h, Tensor? hold_c, Tensor y, Tensor c, "
    "Tensor gates, str cell, int[] reverse, float zoneout_h, float zoneout_c) "
    "-> (Tensor dgates, Tensor drecurrent, Tensor doutput, Tensor dh0, Tensor dc0)"
)


def _query(call: Call) -> backends.RecurrentQuery:
    return backends.RecurrentQuery(
        op="recurrent",
        device=call.rows.device,
        dtype=call.dtype,
        cell=call.cell,
        steps=call.steps,
        lanes=call.lanes,
        hidden=call.hidden,
        projected=call.projection is not None,
        layout="packed" if call.batch_sizes is not None else "padded" if call.lengths is None else "lengths",
        zoned=call.zoned,
        batch=call.batch,
        backward=isinstance(call, Backward),
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


def _recurrent_forward(*args: Any) -> tuple[Tensor, ...]:
    call = Forward(*args)
    _check_layout(call.x, call.lengths, call.batch_sizes)
    return backends.select(_query(call)).recurrent_forward(call)


def _recurrent_backward(*args: Any) -> tuple[Tensor, ...]:
    call = Backward(*args)
    return backends.select(_query(call)).recurrent_backward(call)


def _fake_forward(*args: Any) -> tuple[Tensor, ...]:
    call = Forward(*args)
    row, lanes, hidden, leading = call.row, call.lanes, call.hidden, call.x.shape[:-1]
    batch: int | torch.SymInt
    if call.batch_sizes is None:
        batch = call.x.shape[1]
    elif call.h0 is not None:
        batch = call.h0.shape[1]
    else:
        batch = torch.library.get_ctx().new_dynamic_size()
    empty, states = call.x.new_empty, row.wide_states * hidden
    return (
        empty(*leading, lanes, call.width),
        empty(lanes, batch, call.width),
        empty((lanes, batch, states) if row.has_c else (0,), dtype=call.wide),
        empty((*leading, lanes, states) if row.has_c and call.save_c else (0,), dtype=call.wide),
        empty((*leading, lanes, call.saved * hidden) if call.saved and call.save_gates else (0,)),
    )


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    call = Backward(*args)
    row, lanes, hidden, leading = call.row, call.lanes, call.hidden, call.y.shape[:-2]
    batch: int | torch.SymInt
    if call.batch_sizes is None:
        batch = call.y.shape[1]
    else:
        given = next((state for state in (call.h0, call.c0, call.dh_n, call.dc_n) if state is not None), None)
        batch = torch.library.get_ctx().new_dynamic_size() if given is None else given.shape[1]
    empty = call.y.new_empty
    return (
        empty(*leading, lanes, call.weight.shape[1]),
        empty((*leading, lanes, row.own_recurrent * hidden) if row.own_recurrent else (0,)),
        empty((*leading, lanes, call.width) if call.output_gradient else (0,)),
        empty(lanes, batch, call.width),
        empty((lanes, batch, row.wide_states * hidden) if row.has_c else (0,), dtype=call.wide),
    )


for _name, _run, _fake in (
    ("recurrent_forward", _recurrent_forward, _fake_forward),
    ("recurrent_backward", _recurrent_backward, _fake_backward),
):
    _library.impl(_name, outside_dynamo(_run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastseq::{_name}", _fake, lib=_library)

_forward_op = torch.ops.fastseq.recurrent_forward.default
_backward_op = torch.ops.fastseq.recurrent_backward.default


class _Recurrent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, h0, c0, recompute, *rest):
        walk, params = Walk(*rest[: len(Walk._fields)]), rest[len(Walk._fields) :]
        weights = Weights(walk.cell, params)
        y, h_n, c_n, c, gates = _forward_op(*weights.forward(x, h0, c0, walk, True, not recompute))
        tensors, ctx.constants = walk[:4], walk[4:]
        ctx.save_for_backward(x, h0, c0, *tensors, y, c, gates, *params)
        ctx.recompute = recompute
        ctx.set_materialize_grads(False)
        if not CELLS[walk.cell].has_c:
            ctx.mark_non_differentiable(c_n, c)
        return y, h_n, c_n, c

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n, dc):
        x, h0, c0, *rest = ctx.saved_tensors
        tensors, (y, c, gates), params = rest[:4], rest[4:7], rest[7:]
        walk = Walk(*tensors, *ctx.constants)
        if not CELLS[walk.cell].has_c:
            dc_n = dc = None
        given = (dy, dh_n, dc_n, dc)
        if all(grad is None for grad in given):
            return (None,) * len(ctx.needs_input_grad)
        if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                grads = _backward(ctx, x, h0, c0, walk, y, c, gates, params, given)
        else:
            grads = _backward(ctx, x, h0, c0, walk, y, c, gates, params, given)
        return *grads[:3], None, *(None for _ in walk), *grads[3:]


def _backward(ctx, x, h0, c0, walk, y, c, gates, params, given):
    """Gradients of x, h0, c0 and of every parameter."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _differentiable_backward(ctx, (x, h0, c0, *params), walk, given)
    weights = Weights(walk.cell, params)
    if ctx.recompute:
        gates = recomputed_gates(weights, x, h0, c0, walk, y, c)
    arguments = (
        *(None if grad is None else grad.contiguous() for grad in given), weights.recurrent_weight(), weights.vectors(),
        weights.projection(), h0, c0, *walk[:4], y, c, gates, *walk[4:],
    )  # fmt: skip
    results = _backward_op(*arguments)
    wanted = ctx.needs_input_grad
    dx, dparams = input_gradients(Backward(*arguments), results, x, params, wanted[4 + len(walk) :], wanted[0])
    dh0 = results[3].to(h0.dtype) if wanted[1] else None
    dc0 = results[4].to(c0.dtype) if wanted[2] else None
    return dx, dh0, dc0, *dparams


def _differentiable_backward(ctx, inputs, walk, given):
    """The gradients with a graph of their own (create_graph=True): through the reference, from the layer's inputs."""
    wanted = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[4 + len(walk) :]]
    # views, so that a tensor given twice (tied weights) has two places in the graph
    views = [t.view_as(t) if t is not None and want else t for t, want in zip(inputs, wanted, strict=True)]
    outputs = reference_layer(views[0], views[1], views[2], walk, views[3:])
    used = [(out, grad) for out, grad in zip(outputs, given, strict=True) if grad is not None]
    results: list[Tensor | None] = [None] * len(inputs)
    places = [i for i, want in enumerate(wanted) if want]
    if places:
        grads = torch.autograd.grad(
            [out for out, _ in used],
            [views[i] for i in places],
            [grad.to(out.dtype) for out, grad in used],
            create_graph=True,
            allow_unused=True,
        )
        for i, grad in zip(places, grads, strict=True):
            results[i] = grad
    return results


def recurrent(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    params: Sequence[Tensor | None],
    *,
    cell: str,
    reverse: list[int],
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    hold_h: Tensor | None = None,
    hold_c: Tensor | None = None,
    zoneout_h: float = 0.0,
    zoneout_c: float = 0.0,
    return_cells: bool = False,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One layer, differentiable: y [.., D*P], h_n [D, B, P], c_n [D, B, K*H] or None, c of every step [.., D*K*H] or None.

    Args:
        x: ``[T, B, I]``, or ``[N, I]`` with ``batch_sizes``; input gates, I = D*G*H, if the parameters hold no w_ih.
        params: ``PARAMS`` per lane: w_ih, w_hh, b_ih, b_hh, w_hr, vectors, None where there is none.
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
                hold_h=None if hold_h is None else hold_h.unflatten(0, (steps, batch)),
                hold_c=None if hold_c is None else hold_c.unflatten(0, (steps, batch)),
                zoneout_h=zoneout_h,
                zoneout_c=zoneout_c,
                return_cells=return_cells,
                recompute=recompute,
            )
            return y.flatten(0, 1), h_n, c_n, None if c is None else c.flatten(0, 1)
    walk = Walk(lengths, batch_sizes, hold_h, hold_c, cell, reverse, zoneout_h, zoneout_c)
    given = [t for t in (x, h0, c0, *params) if t is not None]
    if needs_plain_torch(given):
        y, h_n, c_n, c = reference_layer(x, h0, c0, walk, params)
    elif torch.is_grad_enabled() and any(t.requires_grad for t in given):
        y, h_n, c_n, c = _Recurrent.apply(x, h0, c0, recompute, *walk, *params)
    else:
        y, h_n, c_n, c, _ = _forward_op(*Weights(cell, params).forward(x, h0, c0, walk, return_cells, False))
    has_c = CELLS[cell].has_c
    return y.flatten(-2), h_n, c_n if has_c else None, c.flatten(-2) if has_c and return_cells else None
