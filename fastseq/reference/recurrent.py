"""The recurrence over time, as a specification: plain PyTorch, differentiable, any floating dtype.

Letters: T time, B batch, D lanes (directions), H hidden, G gates, P output of a lane (H, or the projection's size), S saved
activations, N rows of a packed batch. Time-major. Two layouts hold "one row per step and sequence":

* padded: ``[T, B, D, n]``, with ``lengths`` [B] when rows end early: state stays, output is zero, beyond a row's length;
* packed: ``[N, D, n]`` with ``batch_sizes`` [T], as ``torch.nn.utils.rnn.PackedSequence`` stores it: step t holds the first
  ``batch_sizes[t]`` sequences, which are sorted by decreasing length.

``forward`` and ``backward`` have the signatures of the registered ops (``ops/recurrent.py``), where the contract is written.
Sixteen-bit inputs are computed in fp32; the output of a step is rounded before it is fed back, as it is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cells import CELLS
from .cells import steps


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of c and of the accumulators: fp32, or wider if the input is."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


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


def input_gates(x: Tensor, w_ih: Tensor, b_ih: Tensor | None, lanes: int) -> Tensor:
    """The input projection: x [.., I] -> [.., D, G*H]."""
    flat = x.flatten(0, -2)
    gates = flat @ w_ih.t() if b_ih is None else torch.addmm(b_ih, flat, w_ih.t())
    return gates.view(*x.shape[:-1], lanes, w_ih.shape[0] // lanes)


def forward(
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
    row, math = CELLS[cell], steps(cell)
    dtype, wide = x.dtype, state_dtype(x.dtype)
    x_gates = input_gates(x, w_ih, b_ih, weight.shape[0])
    layout = Layout(x_gates, lengths, batch_sizes)
    hidden = x_gates.shape[-1] // len(row.gates)
    lanes = []
    for lane, backwards in enumerate(reverse):
        r = weight[lane].to(wide)
        b = None if bias is None else bias[lane].to(wide)
        out = r.shape[-1]
        h = x_gates.new_zeros(layout.batch, out, dtype=wide) if h0 is None else h0[lane].to(wide)
        c = None
        if row.has_c:
            c = x_gates.new_zeros(layout.batch, hidden, dtype=wide) if c0 is None else c0[lane].to(wide)
        ys, cs, gates = [], [], []
        for t in layout.order(backwards):
            h_prev = layout.active(h, t)
            c_prev = None if c is None else layout.active(c, t)
            x_t = layout.take(x_gates, t, lane).to(wide)
            h_new, c_new, saved = math.step(x_t, h_prev @ r.mT, b, h_prev, c_prev)
            if projection is not None:
                h_new = h_new @ projection[lane].to(wide).mT
            h_new = h_new.to(dtype).to(wide)
            h = layout.update(h, h_new, t)
            ys.append(layout.masked(h_new, t).to(dtype))
            if c is not None:
                c = layout.update(c, c_new, t)
                cs.append(layout.masked(c_new, t))
            gates.append(layout.masked(saved, t) if row.saved else saved)
        if backwards:
            ys, cs, gates = ys[::-1], cs[::-1], gates[::-1]
        leading = x_gates.shape[:-2]
        lanes.append(
            (
                layout.join(ys, x_gates.new_zeros(*leading, out)),
                h.to(dtype),
                c if c is not None else x_gates.new_zeros(0),
                layout.join(cs, x_gates.new_zeros(*leading, hidden, dtype=wide)),
                layout.join(
                    [g.to(dtype) for g in gates] if row.saved else [], x_gates.new_zeros(*leading, len(row.saved) * hidden)
                ),
            )
        )
    y, h_n, c_n, cells, gates_all = (list(parts) for parts in zip(*lanes, strict=True))
    return (
        torch.stack(y, -2),
        torch.stack(h_n),
        torch.stack(c_n) if row.has_c else x_gates.new_zeros(0, dtype=wide),
        torch.stack(cells, -2) if row.has_c and save_c else x_gates.new_zeros(0, dtype=wide),
        torch.stack(gates_all, -2) if row.saved and save_gates else x_gates.new_zeros(0),
    )


def backward(
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
    row, math = CELLS[cell], steps(cell)
    dtype, wide = y.dtype, state_dtype(y.dtype)
    layout = Layout(y, lengths, batch_sizes)
    hidden = weight.shape[-2] // len(row.gates)
    leading = y.shape[:-2]
    lanes = []
    for lane, backwards in enumerate(reverse):
        r = weight[lane].to(wide)
        out = r.shape[-1]
        p = None if projection is None else projection[lane].to(wide)
        zeros_h = y.new_zeros(layout.batch, out, dtype=wide)
        dh = zeros_h if dh_n is None else dh_n[lane].to(wide)
        dc_state = None
        if row.has_c:
            dc_state = y.new_zeros(layout.batch, hidden, dtype=wide) if dc_n is None else dc_n[lane].to(wide)
        first_h = zeros_h if h0 is None else h0[lane].to(wide)
        first_c = y.new_zeros(layout.batch, hidden, dtype=wide) if c0 is None else c0[lane].to(wide)
        dxs, drs, dhs = [], [], []
        for t in reversed(layout.order(backwards)):
            h_prev = previous(layout, y, first_h, t, lane, backwards)
            c_prev = previous(layout, c, first_c, t, lane, backwards) if row.has_c else None
            dh_t = layout.active(dh, t)
            if dy is not None:
                dh_t = dh_t + layout.take(dy, t, lane).to(wide)
            dh_t = layout.masked(dh_t, t)
            dc_t = None
            if dc_state is not None:
                dc_t = layout.active(dc_state, t)
                if dc is not None:
                    dc_t = dc_t + layout.take(dc, t, lane).to(wide)
                dc_t = layout.masked(dc_t, t)
            dm = dh_t if p is None else dh_t @ p
            saved = layout.take(gates, t, lane).to(wide) if row.saved else None
            h_t = layout.take(y, t, lane).to(wide)
            c_t = layout.take(c, t, lane).to(wide) if row.has_c else None
            dx, dr, dh_direct, dc_prev = math.step_backward(dm, dc_t, saved, h_prev, c_prev, h_t, c_t)
            dx = dx.to(dtype)
            dr = dx if dr is None else dr.to(dtype)
            dh_prev = dr.to(wide) @ r
            if dh_direct is not None:
                dh_prev = dh_prev + dh_direct
            dh = layout.update(dh, dh_prev, t)
            if dc_state is not None:
                dc_state = layout.update(dc_state, dc_prev, t)
            dxs.append(dx)
            drs.append(dr[..., -hidden:])
            dhs.append(dh_t.to(dtype))
        if not backwards:
            dxs, drs, dhs = dxs[::-1], drs[::-1], dhs[::-1]
        lanes.append(
            (
                layout.join(dxs, y.new_zeros(*leading, len(row.gates) * hidden)),
                layout.join(drs, y.new_zeros(*leading, hidden)),
                layout.join(dhs, y.new_zeros(*leading, out)),
                dh.to(dtype),
                dc_state if dc_state is not None else y.new_zeros(0),
            )
        )
    dx_all, dr_all, dh_all, dh0, dc0 = (list(parts) for parts in zip(*lanes, strict=True))
    return (
        torch.stack(dx_all, -2),
        torch.stack(dr_all, -2) if row.recurrent_bias else y.new_zeros(0),
        torch.stack(dh_all, -2) if projection is not None else y.new_zeros(0),
        torch.stack(dh0),
        torch.stack(dc0) if row.has_c else y.new_zeros(0, dtype=wide),
    )


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
