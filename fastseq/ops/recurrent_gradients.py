"""Autograd of a recurrent layer around its ops: gradients of input and parameters, gates recomputed, the layer in plain PyTorch.

Large matrix products and elementwise work, parallel over time. On a CPU with AMX the products are one native op, but for what
records or transforms them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import cpu, library
from ..reference import recurrent as reference
from ..reference.cells import steps as cell_steps
from ._dispatch import is_batched, plain_call, recorded, transforming
from .types import Backward, Call, Forward, States, Walk, Weights


def reference_layer(x: Tensor, states: States, walk: Walk, weights: Weights) -> tuple[Tensor, ...]:
    """A layer in plain, differentiable PyTorch: y, h_n, c_n, c."""
    return reference.forward(Forward(*weights.arguments(x, states, walk, True, False)))[:4]


def input_gradients(
    call: Backward, results: tuple[Tensor, ...], x: Tensor, weights: Weights, wanted: Weights, wanted_x: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of x and of the weights, kind by kind, from what the backward op gave. ``wanted`` holds bools."""
    if call.lanes > 1 and call.hidden == 1 and not call.zoned and not call.output_gradient:
        return _gradients_of_units(call, results, x, weights, wanted, wanted_x)
    cell, lanes = call.row, call.lanes
    dgates, drecurrent, doutput, *_ = results
    flat_x = _flat(x)
    dx, products = None, _native_products(call, results, x, weights, wanted, wanted_x)
    if wanted_x and products and weights.w_ih:
        dx = next(products)
    elif wanted_x:
        flat = dgates.reshape(flat_x.shape[0], lanes * call.gates_width)
        if weights.w_ih:
            flat = flat @ (weights.w_ih[0] if lanes == 1 else torch.cat(list(weights.w_ih)))
        dx = flat.view(x.shape)
    grads: list[list[Tensor | None]] = [[] for _ in weights]
    for lane in range(lanes):
        w_ih, w_hh, b_ih, b_hh, w_hr, vectors = (bool(kind) and kind[lane] for kind in wanted)
        dw_ih = dw_hh = db_ih = db_hh = dw_hr = None
        if products:
            dw_ih, dw_hh, db_ih, db_hh = [next(products) if want else None for want in (w_ih, w_hh, b_ih, b_hh)]
        else:
            d = _lane(dgates, lane)  # [rows, G*H]
            dr = _lane(drecurrent, lane) if cell.own_recurrent else None  # [rows, own*H]
            dw_ih = _outer_sum(d, flat_x) if w_ih else None
            if w_hh:
                h_first, h_prev = _before(call, lane)
                dw_hh = _recurrent_weight_grad(d, dr, h_first, h_prev, call.reverse[lane])
            if b_ih or b_hh:
                db_ih = db_hh = d.sum(0)
                if dr is not None:
                    db_hh = torch.cat((db_ih[: -dr.shape[1]], dr.sum(0)))
                elif b_ih and b_hh:
                    db_hh = db_ih.clone()
        if w_hr:
            saved, _, c = _kept_of(call, lane, slice(None), _before_c(call, lane))
            m = cell_steps(call.cell).output(saved, None if call.vectors is None else call.vectors[lane].to(call.wide), c)
            dw_hr = _outer_sum(_lane(doutput, lane), m.to(doutput.dtype))
        dvectors = _vector_gradients(call, results, lane) if vectors else None
        of_lane = (dw_ih, dw_hh, db_ih if b_ih else None, db_hh if b_hh else None, dw_hr, dvectors)
        for kind, given, grad in zip(grads, weights, of_lane, strict=True):
            if given:
                kind.append(grad)
    return dx, [grad for kind in grads for grad in kind]


def _gradients_of_units(
    call: Backward, results: tuple[Tensor, ...], x: Tensor, weights: Weights, wanted: Weights, wanted_x: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The same of lanes of one unit: one product for all of them, and sums."""
    dgates, drecurrent, *_ = results
    lanes, gates, own, wide = call.lanes, call.gates_width, call.row.own_recurrent, call.wide
    flat_x = _flat(x)
    d = _of_rows(dgates)
    inside = _of_rows(drecurrent) if own else d  # the last gates alone, if they have a gradient of their own
    dr = torch.cat((d[..., :-own], inside), -1) if own else d
    flat = d.reshape(d.shape[0], lanes * gates)
    dx = None
    if wanted_x:
        dx = ((flat @ torch.cat(list(weights.w_ih))) if weights.w_ih else flat).view(x.shape)
    some: list[bool] = [bool(kind) and any(kind) for kind in wanted]
    of_kinds: list[Tensor | None] = [None] * len(weights)  # [lanes, ..]
    if some[0]:
        of_kinds[0] = _outer_sum(flat, flat_x).view(lanes, gates, flat_x.shape[1])
    if some[1]:
        of_kinds[1] = (dr.to(wide) * _all_shifted(call, call.y, call.h0, call.reset_h).to(wide)).sum(0).unsqueeze(-1).to(d.dtype)
    if some[2] or some[3]:
        of_kinds[2], of_kinds[3] = d.sum(0), dr.sum(0)
    if some[5]:
        assert call.vectors is not None
        c, c_prev = (_of_rows(call.c), _all_shifted(call, call.c, call.c0, call.reset_c)) if call.row.has_c else (None, None)
        saved, vectors = _of_rows(call.gates).to(wide), call.vectors.to(wide)
        each = cell_steps(call.cell).vector_gradients(d.to(wide), inside.to(wide), None, saved, vectors, c_prev, c)
        of_kinds[5] = each.sum(0).to(call.vectors.dtype)
    grads: list[Tensor | None] = []
    for kind, given, found in zip(wanted, weights, of_kinds, strict=True):
        if given:
            parts = [None] * lanes if found is None else found.unbind(0)
            grads += [part if want else None for part, want in zip(parts, kind, strict=True)]
    return dx, grads


def _of_rows(rows: Tensor) -> Tensor:
    """[.., D, n] -> [rows, D, n]"""
    return rows.reshape(math.prod(rows.shape[:-2]), *rows.shape[-2:])


def _all_shifted(call: Backward, rows: Tensor, first: Tensor | None, reset: Tensor | None) -> Tensor:
    """The states before every step of all lanes, from those after: [rows, D, n]."""
    lanes, size = rows.shape[-2:]
    own = rows.reshape(*rows.shape[:-2], 1, lanes * size)
    first, reset = (s if s is None else s.transpose(0, 1).reshape(1, s.shape[1], lanes * size) for s in (first, reset))
    found = [
        _of_rows(_shifted(call, own, first, reset, 0, way).unflatten(-1, (lanes, size)))
        for way in sorted({int(bool(of)) for of in call.reverse})
    ]
    if len(found) == 1:
        return found[0]
    backwards = torch.tensor(call.reverse, dtype=torch.bool, device=rows.device)[:, None]
    return torch.where(backwards, found[1], found[0])


def _native_products(
    call: Backward, results: tuple[Tensor, ...], x: Tensor, weights: Weights, wanted: Weights, wanted_x: bool
) -> Iterator[Tensor] | None:
    """What the CPU's native op gives of these gradients, in order; None where plain products serve, or have to be seen."""
    if x.device.type != "cpu" or recorded() or transforming() or backends.forced() not in (None, "cpu"):
        return None
    if any([type(t) not in (Tensor, torch.nn.Parameter) for t in (x, call.y, *results[:2], *weights.w_ih)]):
        return None
    if any([is_batched(t) for t in (x, call.y, *results[:2])]):
        return None
    found = cpu.layer_gradients(call, results, x, weights, wanted, wanted_x and bool(weights.w_ih))
    return iter(found) if found else None


def _flat(rows: Tensor) -> Tensor:
    """[.., n] -> [rows, n]. Here and below ``reshape`` and not ``flatten``, which batched gradients have no rule for."""
    return rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1])


def _before_c(call: Backward, lane: int) -> Tensor | None:
    """The wide states before every step, of all rows of a lane."""
    if not call.row.has_c:
        return None
    return _shifted(call, call.c, call.c0, call.reset_c, lane, call.reverse[lane]).flatten(0, -2)


def _kept_of(call: Backward, lane: int, part: slice, before_c: Tensor | None) -> tuple[Tensor, Any, Any]:
    """Saved activations, and the wide states before and after every step as the step proposed them, of some rows of a lane."""
    saved = _lane(call.gates, lane)[part].to(call.wide)
    if before_c is None:
        return saved, None, None
    c_prev = before_c[part]
    if call.hold_c is None and call.zoneout_c == 0:
        return saved, c_prev, _lane(call.c, lane)[part]
    return saved, c_prev, cell_steps(call.cell).candidate(saved, c_prev)


def _vector_gradients(call: Backward, results: tuple[Tensor, ...], lane: int) -> Tensor:
    """[V*H], summed over the rows block by block."""
    dgates, drecurrent, doutput, *_ = results
    assert call.vectors is not None
    vectors, wide = call.vectors[lane].to(call.wide), call.wide
    if call.row.normalized and _plain(call, dgates, doutput):
        before_c = _before_c(call, lane) if call.zoned else None
        dm = c = None
        if call.row.has_c:
            dm = _lane(doutput, lane).to(wide)
            dm = dm if call.projection is None else dm @ call.projection[lane].to(wide)
            c = _lane(call.c, lane) if before_c is None else _kept_of(call, lane, slice(None), before_c)[2]
        found = torch.ops.fastseq_native.recurrent_norm_gradients.default(
            _lane(dgates, lane), _lane(call.gates, lane), dm, c, vectors, call.cell
        )
        return found.to(call.vectors.dtype)
    total, before_c = torch.zeros_like(vectors), _before_c(call, lane)
    for part in _blocks(_lane(dgates, lane).shape[0]):
        dm = None
        if call.output_gradient:
            dm = _lane(doutput, lane)[part].to(wide)
            dm = dm if call.projection is None else dm @ call.projection[lane].to(wide)
        dx = _lane(dgates, lane)[part].to(wide)
        dr = _lane(drecurrent, lane)[part].to(wide) if call.row.own_recurrent else dx
        saved, c_prev, c = _kept_of(call, lane, part, before_c)
        total = total + cell_steps(call.cell).vector_gradients(dx, dr, dm, saved, vectors, c_prev, c).sum(0)
    return total.to(call.vectors.dtype)


def _plain(call: Backward, *results: Tensor) -> bool:
    """Whether a native op may take these for what they are."""
    if not plain_call() or not call.y.is_cpu or call.dtype not in cpu.recurrent.DTYPES or library.reason():
        return False
    given = (call.y, call.c, call.gates, *results)
    return not any([type(t) is not Tensor or is_batched(t) for t in given])


def _blocks(total: int) -> Iterator[slice]:
    """Rows in blocks, so that the intermediate values of one block are all that is held beside the result."""
    if recorded():
        yield slice(None)  # a loop over blocks would fix the number of rows in the recorded code
        return
    block = max(1, -(-total // 16))
    for begin in range(0, total, block):
        yield slice(begin, begin + block)


def _lane(rows: Tensor, lane: int) -> Tensor:
    """[.., D, n] -> [rows, n] of one lane."""
    if rows.shape[-2] == 1:
        return _flat(rows)
    return rows.reshape(math.prod(rows.shape[:-2]), *rows.shape[-2:]).select(1, lane)


def _outer_sum(a: Tensor, b: Tensor) -> Tensor:
    """a^T b [m, n] from [rows, m] and [rows, n].

    On one thread a large product is faster with fewer rows than columns (MKL: 5 to 10 %), which pays for transposing the result.
    """
    if (
        not recorded()
        and torch.get_num_threads() == 1
        and a.shape[1] > b.shape[1]
        and a.shape[0] * a.shape[1] * b.shape[1] > 1 << 22
    ):
        return (b.t() @ a).t().contiguous()
    return a.t() @ b


def _before(call: Backward, lane: int) -> tuple[Tensor | None, Tensor]:
    """h before every step, as (rows of the first step, rows of the others) or as (None, all rows).

    The pair avoids a copy where the states are a plain shift of the states after every step.
    """
    rows, h0, backwards = call.y, call.h0, call.reverse[lane]
    if call.batch_sizes is not None or call.resets is not None or (backwards and call.lengths is not None and h0 is not None):
        return None, _shifted(call, rows, h0, call.reset_h, lane, backwards).flatten(0, -2)
    own = rows[:, :, lane]  # [T, B, n]
    # zeros count as well: times what is not finite they are NaN
    first = own.new_zeros(own.shape[1:]) if h0 is None else h0[lane].to(rows.dtype)
    if h0 is not None and own.shape[0] == 1:
        return None, first
    return first, (own[1:] if backwards else own[:-1]).flatten(0, 1)


def _shifted(call: Call, rows: Tensor, first: Tensor | None, reset: Tensor | None, lane: int, backwards: int) -> Tensor:
    """The states before every step, from the states after every step: [T, B, n], or [N, n]."""
    lengths, resets = call.lengths, call.resets
    own = rows.select(-2, lane)
    start, anew = (None if state is None else state[lane].to(rows.dtype) for state in (first, reset))
    if call.batch_sizes is None:
        start = own.new_zeros(own.shape[1:]) if start is None else start
        shifted = torch.cat((own[1:], start[None]) if backwards else (start[None], own[:-1]))
        within = None
        if backwards and lengths is not None:
            following = torch.arange(1, own.shape[0] + 1, device=rows.device)
            within = following[:, None] < lengths
            shifted = torch.where(within[..., None], shifted, start)
        if resets is None:
            return shifted
        cuts = torch.cat((resets[1:], torch.zeros_like(resets[:1]))) if backwards else resets
        return _anew(shifted, cuts if within is None else cuts & within, anew)
    steps, sizes = call.batch_sizes.shape[0], call.batch_sizes
    total = rows.shape[0]
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
    shifted = states.index_select(0, source.to(rows.device, non_blocking=True))
    if resets is None:
        return shifted
    if backwards:  # the reset of the step after, which a row that ends has not
        following = torch.where(inside, begin[other] + slot, total).to(rows.device, non_blocking=True)
        resets = torch.cat((resets, resets.new_zeros(1))).index_select(0, following)
    if anew is not None and anew.shape[0] > 1:
        anew = anew.index_select(0, slot.to(rows.device, non_blocking=True))
    return _anew(shifted, resets, anew)


def _anew(states: Tensor, cuts: Tensor, reset: Tensor | None) -> Tensor:
    return torch.where(cuts[..., None], torch.zeros_like(states) if reset is None else reset, states)


def _recurrent_weight_grad(d: Tensor, dr: Tensor | None, h_first: Tensor | None, h_prev: Tensor, backwards: int) -> Tensor:
    """Sum over all steps of (gradient of the recurrent gates)^T (state before the step): [G*H, P]."""
    parts = [d] if dr is None else [d[:, : -dr.shape[1]], dr]
    products = []
    for grad in parts:
        if h_first is None:
            products.append(_outer_sum(grad, h_prev))
            continue
        batch = h_first.shape[0]
        product = _outer_sum(grad[:-batch] if backwards else grad[batch:], h_prev)
        products.append(torch.addmm(product, (grad[-batch:] if backwards else grad[:batch]).t(), h_first))
    return products[0] if len(products) == 1 else torch.cat(products)


def recomputed_gates(call: Forward, y: Tensor, c: Tensor) -> Tensor:
    """The ``gates`` that a forward pass did not save."""
    if not call.saved:
        return y.new_empty(0)
    step, wide, lanes = cell_steps(call.cell).step, call.wide, call.lanes
    flat_x = _flat(call.x)
    gates = y.new_empty(flat_x.shape[0], lanes, call.saved * call.hidden)
    before = []
    for lane, backwards in enumerate(call.reverse):
        h_prev = _flat(_shifted(call, y, call.h0, call.reset_h, lane, backwards))
        c_prev = _flat(_shifted(call, c, call.c0, call.reset_c, lane, backwards)) if call.row.has_c else None
        before.append((h_prev, c_prev))
    for part in _blocks(flat_x.shape[0]):
        call.x = flat_x[part]
        x_gates = call.input_gates()
        for lane, (h_prev, c_prev) in enumerate(before):
            h, _, saved = step(
                x_gates[:, lane].to(wide),
                (h_prev[part] @ call.weight[lane].t()).to(wide),
                None if call.vectors is None else call.vectors[lane].to(wide),
                h_prev[part].to(wide),
                None if c_prev is None else c_prev[part],
            )
            gates[part, lane] = (h if saved is None else saved).to(gates.dtype)
    return gates.view(*y.shape[:-1], gates.shape[-1])
