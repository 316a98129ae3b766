"""``fastseq::recurrent``: one layer of recurrence, all its lanes in one call; ``fastseq::recurrent_forward`` and
``fastseq::recurrent_backward``, what runs of it on a backend; ``fastseq::recurrent_newton`` and
``fastseq::recurrent_parallel_backward``, the same of layers in which no unit sees another, parallel in time.

A lane is a direction, or a head of one where the recurrence is block-diagonal: ``reverse[d]`` is 1 if lane d walks from the last
step to the first, else 0. The input projection belongs to the op, so that a backend may fuse it with the steps (the CPU kernels
do: the projected input of a long sequence is larger than the caches) or do it as one large matrix product; without ``w_ih`` the
input is projected already. The gradients of the weights and of the input are large matrix products after the backward op; they
stand in the autograd function around both. What records programs (torch.compile, export, torch.jit.trace) meets that function as
the op ``recurrent``, which has it as its derivative; a plain call takes it directly, which is faster.

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
resets         rows bool, None     [T, B] or [N]: a new segment begins. In lanes forward the state before step t is replaced where
                                   resets[t] is set, in those backwards where resets[t + 1] is and the row has that step
reset_h, _c    as h0, c0, or None  what replaces it, or B = 1, alike for all rows (a backend is given B); None: zeros
y              rows, P             zero beyond a row's length
h_n, c_n       as h0, c0           state after a row's last step; c_n in ``state_dtype`` (fp32 or wider)
c              rows, K*H           every step's states beside h in ``state_dtype``; zero beyond a row's length; empty unless
                                   ``save_c``
gates          rows, S*H           ``cell.saved``, or with zoneout at least the step's output before it; zero beyond a row's
                                   length; empty unless ``save_gates``
dgates         rows, G*H           gradient of the input gates; zero beyond a row's length
drecurrent     rows, own*H         gradient of R h, of the last ``cell.own_recurrent`` gates, where it is another; else empty
doutput        rows, P             whole gradient of every step's output before zoneout; empty unless projected or normalized
dh0, dc0       as h0, c0           always computed
dreset_h, _c   as reset_h, _c      sums over the resets of a row, in ``state_dtype``; empty without reset_h, reset_c
=============  ==================  =====================================================================================

A reset cuts: y, c and gates of the step before stay what they are, nothing of them reaches the step after it, nor a gradient the
other way, be they infinite or NaN; zoneout keeps of the state that is put in place. So a row with resets is its segments one by
one. Where resets[0] is set, h0 and c0 of a lane forward are replaced, and their gradients are zero; what ``resets`` holds beyond
a row's length does not count.

``c`` and ``gates`` mean the same whichever backend wrote them, so any backend's backward takes any backend's forward.

``recurrent`` takes the parameters kind by kind as ``Weights`` has them, and in ``kinds`` a 1 for each kind that is there, else 0;
it gives y without D, [.., D*P], and c of every step only if it is asked for. Its y belongs to the caller, who may overwrite it
unless he called it ``private``: what the backward pass needs of it is not affected. ``solver`` is empty, or has the numbers of a
``Solver`` (``reference/recurrent_parallel.py``): then both passes are parallel in time, by ops with the contract above, whose
lanes are units, H = P = 1, of a cell with a Jacobian, without zoneout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends import library
from ..backends.cpu import recurrent as native
from ..cells import CELLS
from ..reference import recurrent_parallel as parallel
from . import flops
from ._dispatch import (
    autocasts,
    heeds_forward,
    is_batched,
    needs_plain_torch,
    outside_dynamo,
    plain_call,
    recorded,
    register_autograd,
    traced,
    wants_gradient,
)
from .recurrent_gradients import input_gradients, recomputed_gates, reference_layer
from .scan import scan, scan_backward
from .types import Backward, Call, Forward, States, Walk, Weights

_WALK = (
    "Tensor? lengths, Tensor? batch_sizes, Tensor? hold_h, Tensor? hold_c, str cell, int[] reverse, float zoneout_h, "
    "float zoneout_c"
)
_RESETS = "Tensor? resets=None, Tensor? reset_h=None, Tensor? reset_c=None"
_library = torch.library.Library("fastseq", "FRAGMENT")
_library.define(
    f"recurrent(Tensor x, Tensor? h0, Tensor? c0, Tensor[] params, int[] kinds, {_WALK}, bool return_cells, bool recompute, "
    f"bool private, float[] solver, {_RESETS}) -> "
    "(Tensor y, Tensor h_n, Tensor c_n, Tensor c)"
)
for _name, _more in (("recurrent_forward", _RESETS), ("recurrent_newton", f"float[] solver, {_RESETS}")):
    _library.define(
        f"{_name}(Tensor x, Tensor? w_ih, Tensor? b_ih, Tensor weight, Tensor? vectors, Tensor? projection, Tensor? h0, "
        f"Tensor? c0, {_WALK}, bool save_c, bool save_gates, {_more}) "
        "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor c, Tensor gates)"
    )
for _name in ("recurrent_backward", "recurrent_parallel_backward"):
    _library.define(
        f"{_name}(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc, Tensor weight, Tensor? vectors, Tensor? projection, "
        "Tensor? h0, Tensor? c0, Tensor? lengths, Tensor? batch_sizes, Tensor? hold_h, Tensor? hold_c, Tensor y, Tensor c, "
        f"Tensor gates, str cell, int[] reverse, float zoneout_h, float zoneout_c, {_RESETS}) "
        "-> (Tensor dgates, Tensor drecurrent, Tensor doutput, Tensor dh0, Tensor dc0, Tensor dreset_h, Tensor dreset_c)"
    )


def _query(call: Call, backward: bool) -> backends.RecurrentQuery:
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
        backward=backward,
        saving=not backward and call.save_c,  # type: ignore[attr-defined]
        resets=call.resets is not None,
    )


def check_values(rows: Tensor, lengths: Tensor | None, batch_sizes: Tensor | None) -> None:
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
    if call.lengths is not None or call.batch_sizes is not None:
        check_values(call.x, call.lengths, call.batch_sizes)
    call.spread_reset_states()
    return backends.select(_query(call, False)).recurrent_forward(call)


def _recurrent_backward(*args: Any) -> tuple[Tensor, ...]:
    return _run_backward(Backward(*args))


def _run_backward(call: Backward, run: Callable[[Backward], tuple[Tensor, ...]] | None = None) -> tuple[Tensor, ...]:
    """``run``: instead of a backend."""
    given = call.reset_h, call.reset_c
    call.spread_reset_states()
    results = (run or backends.select(_query(call, True)).recurrent_backward)(call)
    sums = [
        grad if state is None or state.shape == grad.shape else grad.sum(1, keepdim=True)
        for grad, state in zip(results[5:], given, strict=True)
    ]
    return *results[:5], *sums


def _recurrent_newton(*args: Any) -> tuple[Tensor, ...]:
    call, solver = Forward(*_without_solver(args)), solver_of(args[_SOLVER])
    if call.lengths is not None or call.batch_sizes is not None:
        check_values(call.x, call.lengths, call.batch_sizes)
    call.spread_reset_states()

    def sequential(part: Forward) -> tuple[Tensor, ...]:
        return backends.select(_query(part, False)).recurrent_forward(part)

    with torch.no_grad():
        results, report = parallel.newton(call, solver, scan, sequential)
    if backends.watched():
        query = _query(call, False)._replace(solver="Newton")
        backends.solved(query, _scans_of(call, solver), report)
    return results


_SOLVER = 18  # its place among the arguments, behind those of the forward op but for resets


def _without_solver(args: Sequence[Any]) -> tuple[Any, ...]:
    """As the forward op has them."""
    return *args[:_SOLVER], *args[_SOLVER + 1 :]


def _scans_of(call: Forward, solver: parallel.Solver) -> backends.ScanQuery:
    """The first of the scans of a call."""
    backwards = bool(min(call.reverse))
    return backends.ScanQuery(
        op="scan",
        call="forward",
        device=call.x.device,
        dtype=call.wide,
        kind="blocks" if call.row.has_c else "real",
        steps=min(call.steps, solver.chunk or call.steps),
        batch=call.batch,
        channels=sum(bool(of) == backwards for of in call.reverse),
        layout="padded" if call.lengths is None and call.batch_sizes is None else "lengths",
        uses=(*(("resets",) if call.resets is not None else ()), *(("reverse",) if backwards else ())),
    )


def _recurrent_parallel_backward(*args: Any) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return _run_backward(Backward(*args), lambda call: parallel.backward(call, scan_backward))


def solver_of(numbers: Sequence[float]) -> parallel.Solver:
    """From the ops' argument."""
    tolerance, max_iterations, chunk, strict = numbers
    return parallel.Solver(tolerance, int(max_iterations), int(chunk), bool(strict))


def _fake_batch(call: Call, *states: Tensor | None) -> Any:
    """The batch of a call whose ``batch_sizes`` hold no values."""
    if call.batch_sizes is None:
        return call.rows.shape[1]
    given = next((state for state in states if state is not None), None)
    return torch.library.get_ctx().new_dynamic_size() if given is None else given.shape[1]


def _fake_forward(*args: Any) -> tuple[Tensor, ...]:
    call = Forward(*args)
    return call.empty_results(_fake_batch(call, call.h0, call.c0))


def _fake_newton(*args: Any) -> tuple[Tensor, ...]:
    return _fake_forward(*_without_solver(args))


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    call = Backward(*args)
    return call.empty_results(_fake_batch(call, call.h0, call.c0, call.dh_n, call.dc_n))


for _name, _run, _fake in (
    ("recurrent_forward", _recurrent_forward, _fake_forward),
    ("recurrent_backward", _recurrent_backward, _fake_backward),
    ("recurrent_newton", _recurrent_newton, _fake_newton),
    ("recurrent_parallel_backward", _recurrent_parallel_backward, _fake_backward),
):
    _library.impl(_name, outside_dynamo(_run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastseq::{_name}", _fake, lib=_library)

_forward_op = torch.ops.fastseq.recurrent_forward.default
_backward_op = torch.ops.fastseq.recurrent_backward.default
_newton_op = torch.ops.fastseq.recurrent_newton.default
_parallel_backward_op = torch.ops.fastseq.recurrent_parallel_backward.default


class _Layer(NamedTuple):
    """A call of a layer but for x, states and weights."""

    walk: Walk
    return_cells: bool
    recompute: bool
    private: bool  # nobody will overwrite the output
    solver: list[float]  # as the ops have it
    batch_first: bool = False  # of the output alone
    packed: bool = False  # the output alone has the rows [N] of a packed batch, whose sequences are all of one length

    def output(self, y: Tensor) -> Tensor:
        """[.., D, P] -> [.., D*P] in the layout that is wanted, a view."""
        y = y.flatten(-2)
        return y.transpose(0, 1) if self.batch_first else y.flatten(0, 1) if self.packed else y

    def forward(self, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """The results of the forward op."""
        return _newton_op(*arguments[:-3], self.solver, *arguments[-3:]) if self.solver else _forward_op(*arguments)


@heeds_forward
class _Recurrent(torch.autograd.Function):
    """y, h_n, c_n, c; None where the cell has no c, and for c unless it is returned."""

    @staticmethod
    def forward(ctx, layer, kinds, x, h0, c0, reset_h, reset_c, *params):
        """``kinds``: which of ``Weights`` are among ``params``."""
        walk, states = layer.walk, States(h0, c0, reset_h, reset_c)
        has_c, arguments = CELLS[walk.cell].has_c, _grouped(params, kinds).arguments(x, states, walk, True, not layer.recompute)
        plain = plain_call() and not layer.solver
        y, h_n, c_n, c, gates = _recurrent_forward(*arguments) if plain else layer.forward(arguments)
        ctx.save_for_backward(x, *states, *walk.tensors, y, c, gates, *params)
        if _any(walk.tensors):
            layer = layer._replace(walk=walk.with_tensors())
        ctx.layer, ctx.kinds = layer, kinds
        ctx.set_materialize_grads(False)
        # The caller may overwrite its output, which shares its memory with the y saved: a tensor without memory keeps the count
        # of its changes. A recorded program has no such count, so that its output is a copy; not a clone, which Inductor removes
        # although it is returned and y saved, and which like this is fused with what reads it.
        out, ctx.changes = layer.output(y), None
        if recorded() or type(y) is not Tensor:
            out = out if layer.private else out.neg().neg()
        else:
            out = out.data
            if not layer.private:
                ctx.changes = out.detach()
                ctx.changes.data = out.new_empty(0)
        return out, h_n, c_n if has_c else None, c if has_c and layer.return_cells else None

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n, dc):
        if dy is None and dh_n is None and dc_n is None and dc is None:
            return (None,) * len(ctx.needs_input_grad)
        return None, None, *_backward(ctx, ctx.saved_tensors, (dy, dh_n, dc_n, dc))


def _any(tensors: Sequence[Tensor | None]) -> bool:
    return any([tensor is not None for tensor in tensors])


def _grouped(flat: Any, kinds: list[int]) -> Weights:
    """Of each kind a tensor for every lane, or none."""
    each = len(flat) // sum(kinds)
    places = iter(range(0, len(flat), each))
    return Weights(*[flat[(at := next(places)) : at + each] if has else () for has in kinds])


def _backward(ctx, saved, given):
    """Gradients of x, of the states and of every parameter."""
    x, states, tensors, (y, c, gates), params = saved[0], States(*saved[1:5]), saved[5:10], saved[10:13], saved[13:]
    layer, dy = ctx.layer, given[0]
    if _any(tensors):
        layer = layer._replace(walk=layer.walk.with_tensors(*tensors))
    if dy is not None:
        given = (dy.transpose(0, 1) if layer.batch_first else dy).reshape(y.shape), *given[1:]
    if autocasts(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return _gradients(ctx, layer, x, states, y, c, gates, params, given)
    return _gradients(ctx, layer, x, states, y, c, gates, params, given)


def _gradients(ctx, layer, x, states, y, c, gates, params, given):
    """The same, of what is in its place."""
    wanted = ctx.needs_input_grad[2:]
    weights, walk = _grouped(params, ctx.kinds), layer.walk
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _differentiable_backward(wanted, (x, *states, *params), ctx.kinds, walk, given)
    given = tuple(None if grad is None else grad.contiguous() for grad in given)
    # compiled autograd cannot ask for the count
    if ctx.changes is not None and (torch.compiler.is_compiling() or ctx.changes._version):
        y = layer.forward(weights.arguments(x, states, walk, False, False))[0]
    if layer.recompute:
        gates = recomputed_gates(Forward(*weights.arguments(x, states, walk, False, False)), y, c)
    resets = walk.resets, *states[2:]
    arguments = (*given, *weights.recurrent(CELLS[walk.cell]), *states[:2], *walk[:4], y, c, gates, *walk[4:8], *resets)
    call = Backward(*arguments)
    if layer.solver:
        results = _parallel_backward_op(*arguments)
    elif _plain_backward(y, given):
        results = _run_backward(call)
    else:
        results = _backward_op(*arguments)
    dx, dparams = input_gradients(call, results, x, weights, _grouped(wanted[5:], ctx.kinds), wanted[0])
    dstates = [grad.to(state.dtype) if want else None for grad, state, want in zip(results[3:], states, wanted[1:5], strict=True)]
    return dx, *dstates, *dparams


def _plain_backward(y: Tensor, given: tuple[Tensor | None, ...]) -> bool:
    """Whether a backward pass is for the CPU's backend and nothing looks on."""
    if not plain_call() or backends.watched() or type(y) is not Tensor or not y.is_cpu or library.reason():
        return False
    for grad in given:  # those of is_grads_batched=True show it by themselves alone
        if grad is not None and (type(grad) is not Tensor or is_batched(grad)):
            return False
    return True


def _differentiable_backward(wanted, inputs, kinds, walk, given):
    """The gradients with a graph of their own (create_graph=True): through the reference, from the layer's inputs."""
    # views, so that a tensor given twice (tied weights) has two places in the graph
    views = [t.view_as(t) if t is not None and want else t for t, want in zip(inputs, wanted, strict=True)]
    outputs = reference_layer(views[0], States(*views[1:5]), walk, _grouped(views[5:], kinds))
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


def _flat(weights: Weights) -> list[Tensor]:
    return [tensor for kind in weights for tensor in kind]


def _kinds(weights: Weights) -> list[int]:
    return [1 if kind else 0 for kind in weights]


def _applied(layer: _Layer, x: Tensor, states: States, weights: Weights) -> tuple[Any, ...]:
    return _Recurrent.apply(layer, _kinds(weights), x, *states, *_flat(weights))


def _plain(layer: _Layer, x: Tensor, states: States, weights: Weights) -> tuple[Any, ...]:
    y, h_n, c_n, c = reference_layer(x, states, layer.walk, weights)
    has_c = CELLS[layer.walk.cell].has_c
    return layer.output(y), h_n, c_n if has_c else None, c if has_c and layer.return_cells else None


def _arguments(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, params: Sequence[Tensor], kinds: list[int], *rest: Any
) -> tuple[_Layer, Tensor, States, Weights]:
    """The arguments of the op ``recurrent``, without those at its end that are None."""
    walk, options, (resets, *of_resets) = rest[:8], rest[8:12], (*rest[12:], *(None,) * 3)[:3]
    return _Layer(Walk(*walk)._replace(resets=resets), *options), x, States(h0, c0, *of_resets), _grouped(params, kinds)


def _recurrent(*args: Any) -> tuple[Tensor, ...]:
    layer, x, states, weights = _arguments(*args)
    y, h_n, c_n, c, _ = layer.forward(weights.arguments(x, states, layer.walk, layer.return_cells, False))
    return layer.output(y).data, h_n, c_n, c


def _through_recurrent(*args: Any) -> tuple[Tensor, ...]:
    layer, x, states, weights = _arguments(*args)
    given = [t for t in (x, *states, *_flat(weights)) if t is not None]
    results = (_plain if needs_plain_torch(given) else _applied)(layer, x, states, weights)
    return tuple(x.new_empty(0) if result is None else result for result in results)


def _vmapped_recurrent(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    """One call after the other, as vmap does with an op that has no list of tensors."""

    def at(arg: Any, dim: Any, index: int) -> Any:
        if isinstance(dim, (list, tuple)):
            return [at(own, of, index) for own, of in zip(arg, dim, strict=True)]
        return arg if dim is None else arg.select(dim, index)

    each = [_layer_op(*[at(arg, dim, i) for arg, dim in zip(args, in_dims, strict=True)]) for i in range(info.batch_size)]
    return tuple(torch.stack(results) for results in zip(*each, strict=True)), (0, 0, 0, 0)


def _fake_recurrent(*args: Any) -> tuple[Tensor, ...]:
    layer, x, states, weights = _arguments(*args)
    call = Forward(*weights.arguments(x, states, layer.walk, layer.return_cells, False))
    y, h_n, c_n, c, _ = call.empty_results(_fake_batch(call, *states[:2]))
    return y.new_empty((*y.shape[:-2], call.lanes * call.width)), h_n, c_n, c


_library.impl("recurrent", outside_dynamo(_recurrent), "CompositeExplicitAutograd")
register_autograd(_library, "recurrent", _through_recurrent)
torch.library.register_vmap("fastseq::recurrent", _vmapped_recurrent, lib=_library)
torch.library.register_fake("fastseq::recurrent", _fake_recurrent, lib=_library)
_layer_op = torch.ops.fastseq.recurrent.default


def recurrent(
    x: Tensor,
    states: States,
    weights: Weights,
    walk: Walk,
    *,
    return_cells: bool = False,
    recompute: bool = False,
    private: bool = False,
    batch_first: bool = False,
    solver: Sequence[float] = (),
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One layer, differentiable: y [.., D*P], h_n [D, B, P], c_n [D, B, K*H] or None, c of every step [.., D*K*H] or None.

    Args:
        x: ``[T, B, I]``, or ``[N, I]`` with ``batch_sizes``; input gates, I = D*G*H, if the weights hold no w_ih.
        return_cells: without it c is None.
        recompute: save no gate activations for the backward pass, but recompute them there (one large product, parallel over
            the steps): less memory, more time.
        private: y goes nowhere where it could be overwritten, but into another layer.
        batch_first: y is ``[B, T, D*P]``; x is not.
        solver: of lanes that are units, the numbers of a ``Solver``: parallel in time.
    """
    batch_sizes, packed = walk.batch_sizes, False
    if batch_sizes is not None and not torch.compiler.is_compiling() and batch_sizes.numel() and type(batch_sizes) is Tensor:
        steps, batch = batch_sizes.shape[0], int(batch_sizes[0])
        # rows of one length (a single row always) are not ragged: the plain layout serves
        if x.shape[0] == steps * batch and bool((batch_sizes == batch).all()):
            hold_h, hold_c = (None if hold is None else hold.unflatten(0, (steps, batch)) for hold in (walk.hold_h, walk.hold_c))
            resets = None if walk.resets is None else walk.resets.unflatten(0, (steps, batch))
            walk = walk._replace(batch_sizes=None, hold_h=hold_h, hold_c=hold_c, resets=resets)
            x, packed = x.view(steps, batch, x.shape[1]), True
    layer = _Layer(walk, return_cells, recompute, private, list(solver), batch_first, packed)
    w_ih, w_hh, b_ih, b_hh, w_hr, vectors = weights
    params = [*w_ih, *w_hh, *b_ih, *b_hh, *w_hr, *vectors]
    given = [x, *params, *[state for state in states if state is not None]]
    compiling = torch.compiler.is_compiling()
    if needs_plain_torch(given):
        y, h_n, c_n, c = _plain(layer, x, states, weights)
    elif (compiling and (torch.compiler.is_exporting() or wants_gradient(given))) or (not compiling and traced()):
        if not compiling:
            flops.announce()
        options = *walk[:8], *layer[1:5], walk.resets, *states[2:]
        y, h_n, c_n, c = _layer_op(x, *states[:2], params, _kinds(weights), *options)
        y = layer.output(y.unsqueeze(-2))
    elif compiling:
        y, h_n, c_n, c, _ = layer.forward(weights.arguments(x, states, layer.walk, return_cells, False))
        y = layer.output(y)
    elif torch.is_grad_enabled() and wants_gradient(given):
        y, h_n, c_n, c = _applied(layer, x, states, weights)
    else:
        y, h_n, c_n, c, _ = layer.forward(weights.arguments(x, states, layer.walk, return_cells, False))
        y = layer.output(y).data  # of the caller's own, not a view
    has_c = CELLS[walk.cell].has_c
    if not has_c or not return_cells:
        return y, h_n, c_n if has_c else None, None
    return y, h_n, c_n, (c.flatten(0, 1) if packed else c).flatten(-2)


@heeds_forward
class _Native(torch.autograd.Function):
    """``_Recurrent`` of a plain call: y, h_n, c_n or None, made before. A short call pays for each line here."""

    @staticmethod
    def forward(ctx, layer, kinds, x, h0, c0, reset_h, reset_c, *params):
        """``layer``: also what was made of it, the tensors of its walk, and whether its gradients are for one native op."""
        layer, (y, h_n, c_n, c, gates), ragged, ctx.few = layer
        ctx.save_for_backward(x, h0, c0, reset_h, reset_c, *ragged, y, c, gates, *params)
        ctx.layer, ctx.kinds, ctx.changes = layer, kinds, None
        ctx.set_materialize_grads(False)
        out = y.flatten(-2)
        out = (out.transpose(0, 1) if layer.batch_first else out).data
        if not layer.private:
            ctx.changes = out.detach()
            ctx.changes.data = _no_elements(out.dtype)
        return out, h_n, c_n if c_n.numel() else None

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n):
        if dy is None and dh_n is None and dc_n is None:
            return (None,) * len(ctx.needs_input_grad)
        saved, odd = ctx.saved_tensors, not ctx.few or torch.compiler.is_compiling() or torch.is_grad_enabled()
        changed = not odd and ctx.changes is not None and ctx.changes._version  # compiled autograd cannot ask for the count
        if odd or changed or not _plain_backward(saved[10], (dy, dh_n, dc_n)):
            x, lengths = saved[0], saved[5]
            if lengths is not None:
                saved = without_padding(x, lengths), *saved[1:]
            return None, None, *_backward(ctx, saved, (dy, dh_n, dc_n, None))
        if dy is not None and ctx.layer.batch_first:
            dy = dy.transpose(0, 1)
        walk = ctx.layer.walk
        wanted = ctx.needs_input_grad[2:]
        return None, None, *native.layer_backward(dy, dh_n, dc_n, saved, walk.cell, walk.zoneout_h, walk.zoneout_c, wanted)


def without_padding(x: Tensor, lengths: Tensor) -> Tensor:
    """x [T, B, I] with zeros beyond the lengths: what stands there is not the caller's data, and 0 * NaN must not reach the
    weights' gradients."""
    return x.masked_fill((torch.arange(x.shape[0], device=x.device)[:, None] >= lengths)[..., None], 0)


@cache
def _no_elements(dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype)


@cache
def _plain_layer(
    cell: str,
    has_biases: bool,
    bidirectional: bool,
    each: int,
    zoneout: tuple[float, float],
    zoned: bool,
    recompute: bool,
    private: bool,
    batch_first: bool,
) -> tuple[_Layer, list[int], bool]:
    """A layer of ``each`` parameters a lane, their ``kinds``, and whether one native op knows all its gradients."""
    walk = Walk(None, None, None, None, cell, [0, 1] if bidirectional else [0], *zoneout)
    biases, vectors = int(has_biases), int(CELLS[cell].recurrent_bias is None and bool(CELLS[cell].vectors))
    kinds = [1, 1, biases, biases, each - 2 - 2 * biases - vectors, vectors]
    simple = not (recompute or vectors or (kinds[4] and (zoned or any(zoneout))))
    return _Layer(walk, False, recompute, private, [], batch_first), kinds, simple


_FEW = 1 << 22  # elements of the gates' gradients that may be copied


def native_layer(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    params: Sequence[Tensor],
    cell: str,
    has_biases: bool,
    bidirectional: bool,
    recompute: bool,
    private: bool,
    batch_first: bool,
    ragged: Sequence[Tensor | None] = (None,) * 5,
    zoneout: tuple[float, float] = (0.0, 0.0),
) -> tuple[Tensor, ...] | None:
    """A layer with gradients in a plain call (``plain_call``) by the native kernels: y [.., D*P], h_n and of a pair c_n.

    None: they decline it. Arguments are those of ``recurrent``, but for ``params``: w_ih, w_hh and what else a lane has, lane by
    lane; and ``ragged``: lengths (int64), batch_sizes, hold_h, hold_c and resets.
    """
    with torch._C._AutoDispatchBelowAutograd():
        made = torch.ops.fastseq_native.recurrent_layer.default(
            x, h0, c0, params, *ragged, cell, has_biases, bidirectional, *zoneout, not recompute, native.two_parts()
        )
    if not made:
        return None
    gates = params[1].shape[0]
    if bidirectional:
        each = len(params) // 2
        params = [of_lane[i] for i in range(each) for of_lane in (params[:each], params[each:])]
    else:
        each = len(params)
    batch_sizes, zoned = ragged[1], ragged[2] is not None or ragged[3] is not None
    layer, kinds, simple = _plain_layer(cell, has_biases, bidirectional, each, zoneout, zoned, recompute, private, batch_first)
    steps, rows = (x.shape[0], x.shape[0] * x.shape[1]) if batch_sizes is None else (len(batch_sizes), x.shape[0])
    few = simple and rows * gates <= _FEW
    y, h_n, c_n = _Native.apply((layer, made, ragged, few), kinds, x, h0, c0, None, None, *params)
    return (y, h_n) if c_n is None else (y, h_n, c_n)
