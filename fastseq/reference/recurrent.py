"""The recurrence over time, as a specification: plain PyTorch, differentiable, any floating dtype.

Letters: T time, B batch, D lanes (directions), H hidden, G gates, P output of a lane (H, or the projection's size), S saved
activations, K states beside h, V vectors of a cell, N rows of a packed batch. Time-major. Two layouts hold "one row per step
and sequence":

* padded: ``[T, B, D, n]``, with ``lengths`` [B] when rows end early: state stays, output is zero, beyond a row's length;
* packed: ``[N, D, n]`` with ``batch_sizes`` [T], as ``torch.nn.utils.rnn.PackedSequence`` stores it: step t holds the first
  ``batch_sizes[t]`` sequences, which are sorted by decreasing length.

``forward`` and ``backward`` take the arguments of the registered ops as one object of ``ops/types.py``, as every backend does;
their contract is written in ``ops/recurrent.py``. Sixteen-bit inputs are computed in fp32; the output of a step is rounded before
it is fed back, as it is stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.types import Backward, Call, Forward
from .cells import steps


class Layout:
    """Where the rows of step t lie, and which sequences are active in it."""

    def __init__(self, rows: Tensor, lengths: Tensor | None, batch_sizes: Tensor | None) -> None:
        self.lengths = lengths
        self.sizes: list[int] | None = None if batch_sizes is None else batch_sizes.tolist()
        if self.sizes is None:
            self.steps, self.batch = rows.shape[0], rows.shape[1]
        else:
            self.steps, self.batch = len(self.sizes), self.sizes[0] if self.sizes else 0
            self.starts = [0]
            for size in self.sizes:
                self.starts.append(self.starts[-1] + size)

    def order(self, reverse: int) -> range:
        return range(self.steps - 1, -1, -1) if reverse else range(self.steps)

    def take(self, rows: Tensor, t: int, lane: int) -> Tensor:
        """Rows of step t: [B, n], or [batch_sizes[t], n] of a packed tensor."""
        return rows[t, :, lane] if self.sizes is None else rows[self.starts[t] : self.starts[t + 1], lane]

    def active(self, state: Tensor, t: int) -> Tensor:
        """The part of a state [B, n] that step t works on."""
        return state if self.sizes is None else state[: self.sizes[t]]

    def valid(self, t: int) -> Tensor | None:
        return None if self.lengths is None else (t < self.lengths).unsqueeze(-1)

    def cuts(self, resets: Tensor | None, t: int, backwards: int) -> Tensor | None:
        """Which of the sequences that step t works on start anew before it, [.., 1]; None: none.

        A row ends where it is reset: the lane that walks backwards starts anew at the last step before.
        """
        at = t + 1 if backwards else t
        if resets is None or at >= self.steps:
            return None
        if self.sizes is None:
            valid, cuts = self.valid(at), resets[at].unsqueeze(-1)
            return cuts if valid is None else cuts & valid
        cuts = resets[self.starts[at] : self.starts[at + 1]].unsqueeze(-1)
        return torch.nn.functional.pad(cuts, (0, 0, 0, self.sizes[t] - self.sizes[at]))

    def update(self, state: Tensor, new: Tensor, t: int) -> Tensor:
        """The state after step t: new where the sequence is active, as it was elsewhere."""
        if self.sizes is not None:
            return new if self.sizes[t] == self.batch else torch.cat((new, state[self.sizes[t] :]))
        valid = self.valid(t)
        return new if valid is None else torch.where(valid, new, state)

    def masked(self, value: Tensor, t: int) -> Tensor:
        valid = self.valid(t)
        return value if valid is None else torch.where(valid, value, torch.zeros_like(value))

    def join(self, per_step: list[Tensor], like: Tensor) -> Tensor:
        """The per-step values [.., n] of one lane as rows of a padded or packed tensor, without the lane dimension."""
        if not per_step:
            return like
        return torch.stack(per_step) if self.sizes is None else torch.cat(per_step)


def forward(call: Forward) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    row, math = call.row, steps(call.cell)
    dtype, wide, hidden, out = call.dtype, call.wide, call.hidden, call.width
    x_gates = call.input_gates()
    layout = Layout(x_gates, call.lengths, call.batch_sizes)
    lanes = []
    for lane, backwards in enumerate(call.reverse):
        r = call.weight[lane].to(wide)
        vectors = None if call.vectors is None else call.vectors[lane].to(wide)
        h = x_gates.new_zeros(layout.batch, out, dtype=wide) if call.h0 is None else call.h0[lane].to(wide)
        c = None
        if row.has_c:
            zeros = x_gates.new_zeros(layout.batch, row.wide_states * hidden, dtype=wide)
            c = zeros if call.c0 is None else call.c0[lane].to(wide)
        reset_h, reset_c = (None if state is None else state[lane].to(wide) for state in (call.reset_h, call.reset_c))
        ys, cs, gates = [], [], []
        for t in layout.order(backwards):
            cuts = layout.cuts(call.resets, t, backwards)
            h_prev = restarted(layout, layout.active(h, t), cuts, reset_h, t)
            c_prev = None if c is None else restarted(layout, layout.active(c, t), cuts, reset_c, t)
            x_t = layout.take(x_gates, t, lane).to(wide)
            h_new, c_new, saved = math.step(x_t, h_prev @ r.mT, vectors, h_prev, c_prev)
            if call.projection is not None:
                h_new = h_new @ call.projection[lane].to(wide).mT
            h_new = h_new.to(dtype).to(wide)
            saved = h_new if saved is None else saved
            keep_h, keep_c = kept(call, layout, t, lane)
            h_new = held(keep_h, h_prev, h_new).to(dtype).to(wide)
            h = layout.update(h, h_new, t)
            ys.append(layout.masked(h_new, t).to(dtype))
            if c is not None:
                c_new = held(keep_c, c_prev, c_new)
                c = layout.update(c, c_new, t)
                cs.append(layout.masked(c_new, t))
            gates.append(layout.masked(saved, t).to(dtype))
        if backwards:
            ys, cs, gates = ys[::-1], cs[::-1], gates[::-1]
        leading = x_gates.shape[:-2]
        lanes.append(
            (
                layout.join(ys, x_gates.new_zeros(*leading, out)),
                h.to(dtype),
                c if c is not None else x_gates.new_zeros(0),
                layout.join(cs, x_gates.new_zeros(*leading, row.wide_states * hidden, dtype=wide)),
                layout.join(gates, x_gates.new_zeros(*leading, call.saved * hidden)),
            )
        )
    y, h_n, c_n, cells, gates_all = (list(parts) for parts in zip(*lanes, strict=True))
    return (
        torch.stack(y, -2),
        torch.stack(h_n),
        torch.stack(c_n) if row.has_c else x_gates.new_zeros(0, dtype=wide),
        torch.stack(cells, -2) if row.has_c and call.save_c else x_gates.new_zeros(0, dtype=wide),
        torch.stack(gates_all, -2) if call.saved and call.save_gates else x_gates.new_zeros(0),
    )


def backward(call: Backward) -> tuple[Tensor, ...]:
    row, math = call.row, steps(call.cell)
    y, dtype, wide, hidden, out = call.y, call.dtype, call.wide, call.hidden, call.width
    layout = Layout(y, call.lengths, call.batch_sizes)
    leading = y.shape[:-2]
    lanes = []
    for lane, backwards in enumerate(call.reverse):
        r = call.weight[lane].to(wide)
        vectors = None if call.vectors is None else call.vectors[lane].to(wide)
        p = None if call.projection is None else call.projection[lane].to(wide)
        zeros_h = y.new_zeros(layout.batch, out, dtype=wide)
        dh = zeros_h if call.dh_n is None else call.dh_n[lane].to(wide)
        zeros_c = y.new_zeros(layout.batch, row.wide_states * hidden, dtype=wide)
        dc_state = None
        if row.has_c:
            dc_state = zeros_c if call.dc_n is None else call.dc_n[lane].to(wide)
        first_h = zeros_h if call.h0 is None else call.h0[lane].to(wide)
        first_c = zeros_c if call.c0 is None else call.c0[lane].to(wide)
        reset_h, reset_c = (None if state is None else state[lane].to(wide) for state in (call.reset_h, call.reset_c))
        dreset_h, dreset_c = zeros_h, zeros_c
        dxs, drs, dhs = [], [], []
        for t in reversed(layout.order(backwards)):
            cuts = layout.cuts(call.resets, t, backwards)
            h_prev = restarted(layout, previous(layout, y, first_h, t, lane, backwards), cuts, reset_h, t)
            c_prev = None
            if row.has_c:
                c_prev = restarted(layout, previous(layout, call.c, first_c, t, lane, backwards), cuts, reset_c, t)
            keep_h, keep_c = kept(call, layout, t, lane)
            dh_t = layout.active(dh, t)
            if call.dy is not None:
                dh_t = dh_t + layout.take(call.dy, t, lane).to(wide)
            dh_kept, dh_t = split(keep_h, layout.masked(dh_t, t))
            dc_t = dc_kept = None
            if dc_state is not None:
                dc_t = layout.active(dc_state, t)
                if call.dc is not None:
                    dc_t = dc_t + layout.take(call.dc, t, lane).to(wide)
                dc_kept, dc_t = split(keep_c, layout.masked(dc_t, t))
            dm = dh_t if p is None else dh_t @ p
            saved = layout.take(call.gates, t, lane).to(wide) if call.saved else None
            h_t = layout.take(y, t, lane).to(wide) if row.saved or saved is None else saved
            c_t = layout.take(call.c, t, lane).to(wide) if row.has_c else None
            if keep_c is not None:
                c_t = math.candidate(saved, c_prev)
            dx, dr, dh_direct, dc_prev = math.step_backward(dm, dc_t, saved, vectors, h_prev, c_prev, h_t, c_t)
            dx = layout.masked(dx, t).to(dtype)  # where nothing was kept, a division by it
            dr = dx if dr is None else layout.masked(dr, t).to(dtype)
            dh_prev = dr.to(wide) @ r
            for other in (dh_direct, dh_kept):
                dh_prev = dh_prev if other is None else dh_prev + other
            dh_prev, dreset_h = taken_off(layout, dh_prev, cuts, dreset_h, t)
            dh = layout.update(dh, dh_prev, t)
            if dc_state is not None:
                dc_prev, dreset_c = taken_off(layout, dc_prev if dc_kept is None else dc_prev + dc_kept, cuts, dreset_c, t)
                dc_state = layout.update(dc_state, dc_prev, t)
            dxs.append(dx)
            drs.append(dr[..., dr.shape[-1] - row.own_recurrent * hidden :])
            dhs.append(dh_t.to(dtype))
        if not backwards:
            dxs, drs, dhs = dxs[::-1], drs[::-1], dhs[::-1]
        lanes.append(
            (
                layout.join(dxs, y.new_zeros(*leading, len(row.gates) * hidden)),
                layout.join(drs, y.new_zeros(*leading, row.own_recurrent * hidden)),
                layout.join(dhs, y.new_zeros(*leading, out)),
                dh.to(dtype),
                dc_state if dc_state is not None else y.new_zeros(0),
                dreset_h,
                dreset_c,
            )
        )
    dx_all, dr_all, dh_all, dh0, dc0, dresets_h, dresets_c = (list(parts) for parts in zip(*lanes, strict=True))
    return (
        torch.stack(dx_all, -2),
        torch.stack(dr_all, -2) if row.own_recurrent else y.new_zeros(0),
        torch.stack(dh_all, -2) if call.output_gradient else y.new_zeros(0),
        torch.stack(dh0),
        torch.stack(dc0) if row.has_c else y.new_zeros(0, dtype=wide),
        y.new_zeros(0, dtype=wide) if call.reset_h is None else torch.stack(dresets_h),
        y.new_zeros(0, dtype=wide) if call.reset_c is None else torch.stack(dresets_c),
    )


def restarted(layout: Layout, state: Tensor, cuts: Tensor | None, reset: Tensor | None, t: int) -> Tensor:
    """The state before step t, anew where it is cut; what stood there may be no number."""
    if cuts is None:
        return state
    return torch.where(cuts, torch.zeros_like(state) if reset is None else layout.active(reset, t), state)


def taken_off(layout: Layout, grad: Tensor, cuts: Tensor | None, sums: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """The gradient of the state before step t: what goes on to the step before, and ``sums`` with what reaches the state that it
    starts anew from."""
    if cuts is None:
        return grad, sums
    zeros = torch.zeros_like(grad)
    return torch.where(cuts, zeros, grad), layout.update(sums, layout.active(sums, t) + torch.where(cuts, grad, zeros), t)


def kept(call: Call, layout: Layout, t: int, lane: int) -> tuple[Any, Any]:
    """What zoneout keeps of h and of c in step t: a mask, a proportion, or None."""

    def of(hold: Tensor | None, proportion: float) -> Tensor | float | None:
        return layout.take(hold, t, lane) if hold is not None else proportion if proportion > 0 else None

    return of(call.hold_h, call.zoneout_h), of(call.hold_c, call.zoneout_c)


def held(keep: Tensor | float | None, old: Any, new: Tensor) -> Tensor:
    """What zoneout makes of a state: the old value with probability, or in the proportion, ``keep``."""
    if keep is None:
        return new
    return keep * old + (1 - keep) * new if isinstance(keep, float) else torch.where(keep, old, new)


def split(keep: Tensor | float | None, grad: Tensor) -> tuple[Tensor | None, Tensor]:
    """The gradient of a state after zoneout as gradients of the old value and of the new."""
    if keep is None:
        return None, grad
    return (keep * grad, (1 - keep) * grad) if isinstance(keep, float) else (grad * keep, grad * ~keep)


def previous(layout: Layout, rows: Tensor, first: Tensor, t: int, lane: int, backwards: int) -> Tensor:
    """The state before step t, from the states after every step: [B, n], or [batch_sizes[t], n]."""
    before = t + 1 if backwards else t - 1
    first = layout.active(first, t)
    if not 0 <= before < layout.steps:
        return first
    state = layout.take(rows, before, lane).to(first.dtype)
    if layout.sizes is not None:
        active = layout.sizes[t]
        return state[:active] if state.shape[0] >= active else torch.cat((state, first[state.shape[0] :]))
    valid = layout.valid(before) if backwards else None  # a row whose last step this is starts here
    return state if valid is None else torch.where(valid, state, first)
