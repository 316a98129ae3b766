"""Single steps with gradients: plain calls of a cell on the CPU, mostly one after the other.

The gradient of the weights is a sum over all steps. Formed step by step, each share is a product of few rows that fills matrices
as large as the weights, which autograd then adds up: with large weights, most of the time of a loop. Here the backward pass of a
step keeps the rows that its share is made of, and all shares are one product, once every step of the graph has run.

Letters: B batch, I input_size, H hidden_size, G gates of the cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..backends.cpu.recurrent import all_dense
from ._dispatch import heeds_forward, is_batched, lean
from .recurrent import _backward, _plain_layer

_ROWS = 256  # that are kept before they are multiplied: as many make a product fast
_SMALL, _FEW = 1 << 20, 16  # elements of weights, rows: else a step that may be the only one forms their gradient at once


class _Rows:
    """What the steps of one backward pass have kept, and the sums of what they had kept before."""

    def __init__(self) -> None:
        self.count = 0
        self.kept: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.sums: list[Tensor | None] | None = None

    def add(self, wanted: Sequence[bool], dgates: Tensor, drecurrent: Tensor, x: Tensor, h: Tensor) -> None:
        """dgates, drecurrent [B, G*H] gradients of W x and of R h, x [B, I], h [B, H] before the step."""
        self.kept.append((dgates, drecurrent, x, h))
        self.count += dgates.shape[0]
        if self.count >= _ROWS:
            self.multiply(wanted)

    def joined(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The rows that are kept, which then are none."""
        of_kinds = list(zip(*self.kept, strict=True))
        dgates, x, h = (_joined(of_kinds[i]) for i in (0, 2, 3))
        drecurrent = dgates if of_kinds[0][0] is of_kinds[1][0] else _joined(of_kinds[1])
        self.kept, self.count = [], 0
        return dgates, drecurrent, x, h

    def multiply(self, wanted: Sequence[bool]) -> None:
        dgates, drecurrent, x, h = self.joined()
        if self.sums is None:
            self.sums = [None] * 4
        for i, (left, right) in enumerate(((dgates, x), (drecurrent, h))):
            if wanted[i]:
                self.sums[i] = _plus_product(self.sums[i], left, right)
            if wanted[2 + i]:
                share = left.sum(0, dtype=_wide(left.dtype))
                before = self.sums[2 + i]
                self.sums[2 + i] = share if before is None else before.add_(share)


def _joined(rows: Sequence[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _plus_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """total + left^T right, in float32 or wider where there is a total."""
    if total is None:
        return left.t() @ right
    if total.dtype == left.dtype == _wide(left.dtype):
        return total.addmm_(left.t(), right)
    return total.to(_wide(left.dtype)).add_(left.t() @ right)


class _Shares:
    """The shares of all steps of a graph, those of each backward pass through it by themselves."""

    def __init__(self, wanted: tuple[bool, ...], dtype: torch.dtype) -> None:
        self.wanted, self.dtype = wanted, dtype
        self.passes: dict[int, _Rows] = {}

    def add(self, *rows: Tensor) -> None:
        passing = torch._C._current_graph_task_id()
        found = self.passes.get(passing)
        if found is None:
            found = self.passes[passing] = _Rows()
        found.add(self.wanted, *rows)

    def gradients(self) -> list[Tensor | None]:
        """Of w_ih, w_hh, b_ih and b_hh; None where none is wanted, or no step kept anything."""
        found = self.passes.pop(torch._C._current_graph_task_id(), None)
        if found is None:
            return [None] * 4
        if found.sums is None:  # all of them at once
            each = iter(torch.ops.fastseq_native.recurrent_steps_gradients.default(*found.joined(), self.wanted))
            return [next(each) if want else None for want in self.wanted]
        if found.kept:
            found.multiply(self.wanted)
        return [total if total is None else total.to(self.dtype) for total in found.sums]


class _Together(torch.autograd.Function):
    """Where all steps of a graph lead to: it hands their shares to the parameters."""

    @staticmethod
    def forward(ctx, shares, has_biases, *params):
        ctx.shares, ctx.count = shares, 4 if has_biases else 2
        ctx.set_materialize_grads(False)
        return params[0].new_empty(())

    @staticmethod
    def backward(ctx, nothing):
        return None, None, *ctx.shares.gradients()[: ctx.count]


_together = lean(_Together)


class _Graph:
    """Steps whose weights' gradients are formed together, as long as one of them lives."""

    def __init__(self, params: tuple[Tensor | None, ...], wanted: tuple[bool, ...]) -> None:
        has_biases = params[2] is not None
        self.params, self.wanted = params, wanted
        self.steps = 0
        self.shares = _Shares(wanted, params[1].dtype)  # type: ignore[union-attr]
        self.token = _together(self.shares, has_biases, *params[: 4 if has_biases else 2])
        self.node = self.token.grad_fn


_graphs: WeakValueDictionary[int, _Graph] = WeakValueDictionary()  # by the identity of w_hh


def _graph_of(h: Tensor, params: tuple[Tensor | None, ...]) -> _Graph | None:
    """That of a step with the state h; None: no parameter wants a gradient, or there would be little to share.

    A step may be the only one if none led to its state: it shares nothing where a share is soon formed, and else begins a graph
    of its own, which tells in the backward pass whether others have followed.
    """
    w_ih, w_hh, b_ih, b_hh = params
    first = h.is_leaf
    if first and (w_ih.numel() + w_hh.numel() <= _SMALL or h.shape[-2] > _FEW):  # type: ignore[union-attr]
        return None
    wanted = (
        w_ih.requires_grad,  # type: ignore[union-attr]
        w_hh.requires_grad,  # type: ignore[union-attr]
        b_ih is not None and b_ih.requires_grad,
        b_hh is not None and b_hh.requires_grad,
    )
    found = None if first else _graphs.get(id(w_hh))
    if found is None or found.wanted != wanted or not all(map(is_, found.params, params)):
        if True not in wanted:
            return None
        found = _graphs[id(w_hh)] = _Graph(params, wanted)
    found.steps += 1
    return found


def _run(
    ctx: Any, cell: str, graph: _Graph | None, x: Tensor, h: Tensor, c: Tensor | None, params: tuple[Tensor | None, ...]
) -> Any:
    """h and, of an LSTM, c [B, H] after a step, of which ``ctx`` keeps what the gradients need; None: the library declines it.

    Given x and states of a layer it keeps these, not parts, which would have no place in the graph of a second backward pass.
    """
    of_step = (x, h, c) if x.dim() == 2 else (x[0], h[0], None if c is None else c[0])
    made = torch.ops.fastseq_native.recurrent_step_trained.default(*of_step, *params, cell)
    if not made:
        return None
    ctx.cell, ctx.graph = cell, graph
    ctx.set_materialize_grads(False)
    if c is not None:
        y, gates, wide, *narrow = made
        ctx.save_for_backward(x, h, c, *params, gates, None, wide)
        return y, narrow[0] if narrow else wide
    y, gates = made
    ctx.save_for_backward(x, h, None, *params, gates, None if gates.numel() else y, None)
    return y, None


def _gradients(ctx: Any, wanted: tuple[bool, ...], dh: Tensor | None, dc: Tensor | None) -> list[Tensor | None]:
    """Of x, h, c as [B, n] and the parameters, as ``wanted`` tells of each."""
    if dh is None and dc is None:
        return [None] * 7
    saved = ctx.saved_tensors
    if saved[0].dim() == 3:
        saved = *[None if given is None else given[0] for given in saved[:3]], *saved[3:]
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or _is_odd(dh) or _is_odd(dc):
        return _long_way(ctx.cell, saved, wanted, dh, dc)
    x, h, c0, w_ih, w_hh, _, b_hh, gates, y, c = saved
    if c is not None:
        c0, dc = c0.to(c.dtype), None if dc is None else dc.to(c.dtype)
    dh, dc, x, h, c0 = all_dense(dh, dc, x, h, c0)
    graph = None if ctx.graph is None or ctx.graph.steps == 1 else ctx.graph
    of_call = wanted if graph is None else (*wanted[:3], False, False, False, False)
    found = torch.ops.fastseq_native.recurrent_step_backward.default(
        dh, dc, x, h, c0, w_ih, w_hh, b_hh, y, c, gates, ctx.cell, of_call
    )
    each = iter(found)
    grads: list[Any] = [next(each) if want else None for want in of_call]
    if graph is not None and torch._C._will_engine_execute_node(graph.node):
        dgates = next(each)
        graph.shares.add(dgates, next(each, dgates), x, h)
    if wanted[2]:
        grads[2] = grads[2].to(saved[2].dtype)
    return grads


@heeds_forward
class _Step(torch.autograd.Function):
    """h [B, H], or h and c; None: the library declines it."""

    @staticmethod
    def forward(ctx, cell, graph, token, x, h, c, *params):
        states = _run(ctx, cell, graph, x, h, c, params)
        return states if states is None or c is not None else states[0]

    @staticmethod
    def backward(ctx, dh, dc=None):
        return None, None, None, *_gradients(ctx, ctx.needs_input_grad[3:], dh, dc)


_step = lean(_Step)


@heeds_forward
class _LayerStep(torch.autograd.Function):
    """y [1, B, H], or [B, 1, H], h_n and c_n [1, B, H] or None, each the caller's own; None: the library declines it."""

    @staticmethod
    def forward(ctx, cell, graph, token, x, h, c, batch_first, *params):
        states = _run(ctx, cell, graph, x, h, c, params)
        if states is None:
            return None
        ctx.batch_first = batch_first
        y, c_n = states
        out = y.clone()[None]
        out = (out.transpose(0, 1) if batch_first else out).data  # no view
        return out, y[None].clone(), None if c_n is None else c_n[None].clone()

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n):
        dh = None if dh_n is None else dh_n.squeeze(0)
        if dy is not None:
            dy = dy.squeeze(int(ctx.batch_first))
            dh = dy if dh is None else dy + dh
        wanted = ctx.needs_input_grad
        grads = _gradients(ctx, (*wanted[3:6], *wanted[7:]), dh, None if dc_n is None else dc_n.squeeze(0))
        return None, None, None, *[None if grad is None else grad.unsqueeze(0) for grad in grads[:3]], None, *grads[3:]


_layer_step = lean(_LayerStep)


def _is_odd(grad: Tensor | None) -> bool:
    """Whether a gradient is none for a native op: of a subclass, or many at once (is_grads_batched=True)."""
    return grad is not None and (type(grad) is not Tensor or is_batched(grad))


def _long_way(cell: str, saved: Sequence[Any], wanted: Sequence[bool], dh: Tensor | None, dc: Tensor | None) -> list[Any]:
    """The gradients of x, h, c and the parameters by the ops, or with a graph of their own (create_graph=True)."""
    x, h, c0, w_ih, w_hh, b_ih, b_hh, gates, _, c = saved
    has_biases = b_ih is not None
    params, count = (w_ih, w_hh, b_ih, b_hh)[: 4 if has_biases else 2], 7 if has_biases else 5
    layer, kinds, _ = _plain_layer(cell, has_biases, False, len(params), (0.0, 0.0), False, False, False, False)
    of_layer = (None, None, *wanted[:3], False, False, *wanted[3:count])
    changed = SimpleNamespace(_version=1)  # h after the step is not at hand
    ctx = SimpleNamespace(layer=layer, kinds=kinds, needs_input_grad=of_layer, changes=changed)
    dh, dc = (None if grad is None else grad.unsqueeze(0) for grad in (dh, dc))
    if dc is not None:
        dc = dc.to(c.dtype)
    c0, c = (None if state is None else state.unsqueeze(0) for state in (c0, c))
    y = h[None, :, None]
    all_saved = (
        x[None],
        h[None],
        c0,
        None,
        None,
        *(None,) * 5,
        y,
        y.new_empty(0, dtype=_wide(y.dtype)) if c is None else c[:, :, None],
        gates,
        *params,
    )
    dx, dh0, dc0, _, _, *dparams = _backward(ctx, all_saved, (None, dh, dc, None))
    grads = [None if grad is None else grad.squeeze(0) for grad in (dx, dh0, dc0)]
    return [*grads, *dparams, *(None,) * (4 - len(params))]


def trained_step(
    cell: str,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, ...] | None:
    """h [B, H], and of an LSTM c, after a step of x [B, I] in a plain call (``plain_call``), differentiable, by native kernels.

    None: the call is for another way, which also says what is wrong with it.
    """
    graph = _graph_of(h, (w_ih, w_hh, b_ih, b_hh))
    token = None if graph is None else graph.token
    done = _step(cell, graph, token, x, h, c, w_ih, w_hh, b_ih, b_hh)
    if (
        done is None
        and x.layout == torch.strided
        and not (h.is_contiguous() and (c is None or c.is_contiguous()) and x.stride(-1) == 1)
    ):
        h, c = h.contiguous(), None if c is None else c.contiguous()
        done = _step(cell, graph, token, x.contiguous(), h, c, w_ih, w_hh, b_ih, b_hh)
    return done if done is None or c is not None else (done,)


def trained_layer_of_a_step(
    cell: str, x: Tensor, h: Tensor, c: Tensor | None, params: Sequence[Tensor], batch_first: bool
) -> tuple[Tensor, ...] | None:
    """The same of a layer of one direction: y, h_n and of an LSTM c_n [1, B, H], y [B, 1, H] with ``batch_first``, from
    x [1, B, I]."""
    w_ih, w_hh, b_ih, b_hh = params if len(params) == 4 else (*params, None, None)
    graph = _graph_of(h, (w_ih, w_hh, b_ih, b_hh))
    token = None if graph is None else graph.token
    done = _layer_step(cell, graph, token, x, h, c, batch_first, w_ih, w_hh, b_ih, b_hh)
    return done if done is None or c is not None else done[:2]
