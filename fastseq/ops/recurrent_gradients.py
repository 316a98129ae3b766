"""What surrounds the recurrent ops in autograd: a layer's parameters as the ops want them, the gradients of those parameters, the
gates recomputed. Large matrix products and elementwise work, parallel over time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cells import CELLS
from ..reference import recurrent as reference
from ..reference.cells import steps as cell_steps
from ..reference.recurrent import Backward, Forward

# of one lane: w_ih [G*H, I], w_hh [G*H, P], b_ih [G*H], b_hh [G*H], w_hr [P, H], vectors [V*H]; all but w_hh may be None
PARAMS = 6


class Walk(NamedTuple):
    """How a layer is walked: what the ops take beside states and weights."""

    lengths: Tensor | None
    batch_sizes: Tensor | None
    hold_h: Tensor | None
    hold_c: Tensor | None
    cell: str
    reverse: list[int]
    zoneout_h: float
    zoneout_c: float


class Weights:
    """The parameters of a layer's lanes, as the op wants them."""

    w_hh: list[Tensor]
    # a Tensor in every lane, or None in every lane
    w_ih: list[Any]
    b_ih: list[Any]
    b_hh: list[Any]
    w_hr: list[Any]
    vector: list[Any]

    def __init__(self, cell: str, params: Sequence[Any]) -> None:
        self.cell = CELLS[cell]
        self.w_ih, self.w_hh, self.b_ih, self.b_hh, self.w_hr, self.vector = (list(params[i::PARAMS]) for i in range(PARAMS))
        self.lanes = len(self.w_hh)

    def input_weight(self) -> Tensor | None:
        """[D*G*H, I]"""
        return None if self.w_ih[0] is None else _join(self.w_ih)

    def input_bias(self) -> Tensor | None:
        """[D*G*H]"""
        return None if self.b_ih[0] is None else _join([self._folded_bias(lane) for lane in range(self.lanes)])

    def recurrent_weight(self) -> Tensor:
        return _stack(self.w_hh)

    def vectors(self) -> Tensor | None:
        if self.vector[0] is not None:
            return _stack(self.vector)
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

    def forward(
        self, x: Tensor, h0: Tensor | None, c0: Tensor | None, walk: Walk, save_c: bool, save_gates: bool
    ) -> tuple[Any, ...]:
        """Arguments of the forward op."""
        return (
            x, self.input_weight(), self.input_bias(), self.recurrent_weight(), self.vectors(), self.projection(), h0, c0, *walk,
            save_c, save_gates,
        )  # fmt: skip


def _join(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _stack(tensors: list[Tensor]) -> Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def reference_layer(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, walk: Walk, params: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """A layer in plain, differentiable PyTorch: y, h_n, c_n, c."""
    weights = Weights(walk.cell, params)
    return reference.forward(Forward(*weights.forward(x, h0, c0, walk, True, False)))[:4]


def input_gradients(
    call: Backward,
    results: tuple[Tensor, ...],
    x: Tensor,
    params: Sequence[Any],
    wanted: Sequence[bool],
    wanted_x: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of x and of the parameters, from what the backward op gave."""
    weights, cell = Weights(call.cell, params), call.row
    dgates, drecurrent, doutput, _, _ = results
    flat_x = x.flatten(0, -2)
    dx = None
    if wanted_x:
        w_ih = weights.input_weight()
        flat = dgates.view(flat_x.shape[0], weights.lanes * dgates.shape[-1])  # [rows, D*G*H]
        dx = (flat if w_ih is None else flat @ w_ih).view(x.shape)
    dparams: list[Tensor | None] = []
    for lane in range(weights.lanes):
        w_ih_wanted, w_hh_wanted, b_ih_wanted, b_hh_wanted, w_hr_wanted, vectors_wanted = wanted[lane * PARAMS :][:PARAMS]
        d = _lane(dgates, lane)  # [rows, G*H]
        dr = _lane(drecurrent, lane) if cell.own_recurrent else None  # [rows, own*H]
        dw_ih = _outer_sum(d, flat_x) if w_ih_wanted else None
        dw_hh = db_ih = db_hh = dw_hr = None
        if w_hh_wanted:
            h_first, h_prev = _before(call.y, call.h0, call.lengths, call.batch_sizes, lane, call.reverse[lane])
            dw_hh = _recurrent_weight_grad(d, dr, h_first, h_prev, dgates.shape, call.reverse[lane])
        if b_ih_wanted or b_hh_wanted:
            db_ih = db_hh = d.sum(0)
            if dr is not None:
                db_hh = torch.cat((db_ih[: -dr.shape[1]], dr.sum(0)))
            elif b_ih_wanted and b_hh_wanted:
                db_hh = db_ih.clone()
        if w_hr_wanted:
            saved, _, c = _kept_of(call, lane, slice(None))
            m = cell_steps(call.cell).output(saved, None if call.vectors is None else call.vectors[lane].to(call.wide), c)
            dw_hr = _outer_sum(_lane(doutput, lane), m.to(doutput.dtype))
        dvectors = _vector_gradients(call, results, lane) if vectors_wanted else None
        dparams += [dw_ih, dw_hh, db_ih if b_ih_wanted else None, db_hh if b_hh_wanted else None, dw_hr, dvectors]
    return dx, dparams


def _kept_of(call: Backward, lane: int, part: slice) -> tuple[Tensor, Any, Any]:
    """Saved activations, and the wide states before and after every step as the step proposed them, of some rows of a lane."""
    saved = _lane(call.gates, lane)[part].to(call.wide)
    if not call.row.has_c:
        return saved, None, None
    c_prev = _shifted(call.c, call.c0, call.lengths, call.batch_sizes, lane, call.reverse[lane]).flatten(0, -2)[part]
    if call.hold_c is None and call.zoneout_c == 0:
        return saved, c_prev, _lane(call.c, lane)[part]
    return saved, c_prev, cell_steps(call.cell).candidate(saved, c_prev)


def _vector_gradients(call: Backward, results: tuple[Tensor, ...], lane: int) -> Tensor:
    """[V*H], summed over the rows block by block."""
    dgates, drecurrent, doutput, _, _ = results
    assert call.vectors is not None
    vectors, wide = call.vectors[lane].to(call.wide), call.wide
    total = torch.zeros_like(vectors)
    for part in _blocks(_lane(dgates, lane).shape[0]):
        dm = None
        if call.output_gradient:
            dm = _lane(doutput, lane)[part].to(wide)
            dm = dm if call.projection is None else dm @ call.projection[lane].to(wide)
        dx = _lane(dgates, lane)[part].to(wide)
        dr = _lane(drecurrent, lane)[part].to(wide) if call.row.own_recurrent else dx
        saved, c_prev, c = _kept_of(call, lane, part)
        total += cell_steps(call.cell).vector_gradients(dx, dr, dm, saved, vectors, c_prev, c).sum(0)
    return total.to(call.vectors.dtype)


def _blocks(total: int) -> Iterator[slice]:
    """Rows in blocks, so that the intermediate values of one block are all that is held beside the result."""
    if torch.compiler.is_compiling():
        yield slice(None)  # a loop over blocks would fix the number of rows in the compiled code
        return
    block = max(1, -(-total // 16))
    for begin in range(0, total, block):
        yield slice(begin, begin + block)


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
    return states.index_select(0, source.to(rows.device, non_blocking=True))


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


def recomputed_gates(
    weights: Weights, x: Tensor, h0: Tensor | None, c0: Tensor | None, walk: Walk, y: Tensor, c: Tensor
) -> Tensor:
    """The ``gates`` that the forward pass did not save."""
    call = Forward(*weights.forward(x, h0, c0, walk, False, False))
    if not call.saved:
        return y.new_empty(0)
    step, wide, lanes = cell_steps(call.cell).step, call.wide, call.lanes
    flat_x = x.flatten(0, -2)
    gates = y.new_empty(flat_x.shape[0], lanes, call.saved * call.hidden)
    before = []
    for lane, backwards in enumerate(walk.reverse):
        h_prev = _shifted(y, h0, walk.lengths, walk.batch_sizes, lane, backwards).flatten(0, -2)
        c_prev = _shifted(c, c0, walk.lengths, walk.batch_sizes, lane, backwards).flatten(0, -2) if call.row.has_c else None
        before.append((h_prev, c_prev))
    for part in _blocks(flat_x.shape[0]):
        call.x = flat_x[part]
        x_gates = call.input_gates()
        for lane, (h_prev, c_prev) in enumerate(before):
            h, _, saved = step(
                x_gates[:, lane].to(wide),
                (h_prev[part] @ weights.w_hh[lane].t()).to(wide),
                None if call.vectors is None else call.vectors[lane].to(wide),
                h_prev[part].to(wide),
                None if c_prev is None else c_prev[part],
            )
            gates[part, lane] = (h if saved is None else saved).to(gates.dtype)
    return gates.view(*y.shape[:-1], gates.shape[-1])
