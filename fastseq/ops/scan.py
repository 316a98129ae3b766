"""``fastseq::scan`` and ``fastseq::scan_backward``: first-order linear recurrences, h_t = a_t h_{t-1} + b_t in every channel.

Contract (letters in ``reference/scan.py``; time-major, any strides):

===========  ====================  =====================================================================================
b            [T, B, C]             floating or complex; packed [N, 1, C]. Of blocks [.., C, 2]
a            1 or T, 1 or B,       coefficients in ``state_dtype`` of b; of blocks [.., 2, 2]. Of other cells than ``given`` what
             1 or C                these make them of: real, as many as numbers of b, of ``log`` in either dtype, else in b's
initial      [B, C] or None        in ``state_dtype``, packed [S, C]; None: zeros, and no a is multiplied by them
resets       [T, B] bool, None     no state goes from the step before, t - 1, to step t, nor back in a reverse scan
lengths      [B] int32, None       padded only, taken as if clamped to [0, T]
cu_seqlens   [S + 1] int32, None   packed only: sequence s has the steps cu_seqlens[s] .. cu_seqlens[s + 1]
gate         [T, B, C] or None     of cells that have one, in b's dtype
vector       [C] or None           of cells that have one, in the dtype of states
cell         str                   what a, b, gate and vector are, of ``SCAN_CELLS``: coefficients and addends as they are
                                   (``given``), logarithms of coefficients (``log``), or what a layer makes of its input
reverse      bool                  h_t = a_t h_{t+1} + b_t, from the last step of every row to its first
h            as b                  zero beyond a row's length; the layout of b where a step's channels lie side by side
final        [B, C]                the state after a row's last step of the walk, or ``initial``; in ``state_dtype``; or [S, C]
dh, dfinal   as h, final           or None
db           as b                  b's dtype, zero beyond a row's length; (0,) where not wanted
da           T, B, C               a's dtype, of each row and channel; where a has one step but b has not, [1, B, C], summed over
                                   the steps of a row, packed [1, S, C]; (0,) where not wanted
dgate        as db
dvector      [C]                   in the dtype of states, over all steps and rows; (0,) where not wanted
dinitial     as final              without ``initial`` it means nothing
===========  ====================  =====================================================================================

Saved for the backward pass: a, gate, vector, b of cells that read it, and h as it is returned, nothing else. What a reset cuts
off, and what lies beyond a row's length, may be infinite or NaN. The same call gives the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backends
from ..backends import library
from ..backends.cpu import scan as native
from ..reference import scan as reference
from . import flops
from ._dispatch import (
    PLAIN,
    is_sharded,
    needs_plain_torch,
    outside_dynamo,
    plain_call,
    recorded,
    register_autograd,
    wants_gradient,
)
from .types import SCAN_CELLS, ScanSpec, empty_scan, empty_scan_gradients, scan_kind, state_dtype

_SPEC = "Tensor? resets, Tensor? lengths, Tensor? cu_seqlens, str cell, bool reverse"
Results = tuple[Tensor, Tensor]  # h and the final states
_library = torch.library.Library("fastseq", "FRAGMENT")
_library.define(f"scan(Tensor b, Tensor a, Tensor? gate, Tensor? vector, Tensor? initial, {_SPEC}) -> (Tensor h, Tensor final)")
_library.define(
    "scan_backward(Tensor? dh, Tensor? dfinal, Tensor? b, Tensor a, Tensor? gate, Tensor? vector, Tensor h, Tensor? initial, "
    f"{_SPEC}, bool[] wanted) -> (Tensor db, Tensor da, Tensor dgate, Tensor dvector, Tensor dinitial)"
)


def _query(call: str, states: Tensor, a: Tensor, initial: Tensor | None, spec: ScanSpec) -> backends.ScanQuery:
    used = {"initial": initial, "resets": spec.resets}
    return backends.ScanQuery(
        op="scan",
        call=call,
        device=states.device,
        dtype=states.dtype,
        kind=scan_kind(states, a),
        steps=states.shape[0],
        batch=states.shape[1] if spec.cu_seqlens is None else len(spec.cu_seqlens) - 1,
        channels=states.shape[2],
        layout="packed" if spec.cu_seqlens is not None else "padded" if spec.lengths is None else "lengths",
        uses=(
            *(name for name, tensor in used.items() if tensor is not None),
            *((spec.cell,) if spec.cell != "given" else ()),
            *(("reverse",) if spec.reverse else ()),
        ),
    )


def _forward(b: Tensor, a: Tensor, gate: Tensor | None, vector: Tensor | None, initial: Tensor | None, *fields: Any) -> Results:
    spec = ScanSpec(*fields)
    return backends.select(_query("forward", b, a, initial, spec)).scan_forward(b, a, gate, vector, initial, spec)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    *tensors, wanted = args
    given, spec = tensors[:8], ScanSpec(*tensors[8:])
    a, h, initial = given[3], given[6], given[7]
    return backends.select(_query("backward", h, a, initial, spec)).scan_backward(*given, spec, wanted)


def _fake_forward(b: Tensor, a: Tensor, gate: Any, vector: Any, initial: Any, *fields: Any) -> Results:
    return empty_scan(b, scan_kind(b, a), ScanSpec(*fields))


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    a, h, wanted = args[3], args[6], args[-1]
    return empty_scan_gradients(a, h, scan_kind(h, a), ScanSpec(*args[8:-1]), wanted)


for _name, _run, _fake in (("scan", _forward, _fake_forward), ("scan_backward", _backward, _fake_backward)):
    _library.impl(_name, outside_dynamo(_run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastseq::{_name}", _fake, lib=_library)

_forward_op = torch.ops.fastseq.scan.default
_backward_op = torch.ops.fastseq.scan_backward.default


def _rows_of(tensor: Tensor | None, dim: int | None, place: int, size: int, batch: int) -> Tensor | None:
    """Those of every call of a vmap, one after the other, in dimension ``place``; what all rows share stays one row."""
    if tensor is None or (dim is None and place == 1 and tensor.shape[1] == 1 and batch != 1):
        return tensor
    if dim is None:
        tensor = tensor.unsqueeze(place).expand(*tensor.shape[:place], size, *tensor.shape[place:])
    else:
        tensor = tensor.movedim(dim, place)
    if tensor.shape[place + 1] != batch:
        tensor = tensor.expand(*tensor.shape[: place + 1], batch, *tensor.shape[place + 2 :])
    return tensor.flatten(place, place + 1)


def _batched(info: Any, in_dims: Any, *args: Any) -> Any:
    """vmap: its dimension joins the rows. Where sequences are packed, or vectors differ, there is a call for each."""
    size, packed, vector = info.batch_size, args[7] is not None, in_dims[3] is not None
    if packed or vector:
        given = [[arg] * size if dim is None else arg.unbind(dim) for arg, dim in zip(args, in_dims, strict=True)]
        every = [_forward_op(*one) for one in zip(*given, strict=True)]
        return tuple(torch.stack(results) for results in zip(*every, strict=True)), (0, 0)
    batch = args[0].shape[1] if in_dims[0] is None else args[0].movedim(in_dims[0], 0).shape[2]
    places = (1, 1, 1, None, 0, 1, 0)  # of rows in b, a, gate, vector, initial, resets, lengths
    tensors = [
        arg if place is None else _rows_of(arg, dim, place, size, batch)
        for arg, dim, place in zip(args[:7], in_dims[:7], places, strict=True)
    ]
    h, final = _forward_op(*tensors, *args[7:])
    return (h.unflatten(1, (size, batch)), final.unflatten(0, (size, batch))), (1, 0)


torch.library.register_vmap("fastseq::scan", _batched, lib=_library)


def _mapped() -> bool:
    """Whether the innermost transform is a vmap, which the op follows; those around it meet the op after it."""
    inner = torch._C._functorch.peek_interpreter_stack() if torch._C._are_functorch_transforms_active() else None
    vmap = torch._C._functorch.TransformType.Vmap
    return inner is not None and inner.key() == vmap and forward_ad._current_level < 0 and not torch.compiler.is_compiling()


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, b, a, gate, vector, initial, *fields):
        with torch._C._AutoDispatchBelowAutograd():
            h, final = _forward_op(b, a, gate, vector, initial, *fields)
        ctx.save_for_backward(b if SCAN_CELLS[fields[3]].reads_b else None, a, gate, vector, h, initial, *fields[:3])
        ctx.flags, ctx.dtype = fields[3:], b.dtype
        ctx.set_materialize_grads(False)
        return h, final

    @staticmethod
    def backward(ctx, dh, dfinal):
        b, a, gate, vector, h, initial, resets, lengths, cu_seqlens = ctx.saved_tensors
        given = b, a, gate, vector, h, initial
        needs, nothing = ctx.needs_input_grad, (None,) * 5
        if dh is None and dfinal is None:
            return (*nothing, *nothing)
        spec = ScanSpec(resets, lengths, cu_seqlens, *ctx.flags)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads: Any = reference.backward(dh, dfinal, *given, spec, scan)
        else:
            grads = _backward_op(dh, dfinal, *given, *spec, list(needs[:4]))
        db, da, dgate, dvector, dinitial = grads
        return (
            db.to(ctx.dtype) if needs[0] else None,
            da.sum_to_size(a.shape).to(a.dtype) if needs[1] else None,
            dgate.to(gate.dtype) if needs[2] else None,
            dvector.to(vector.dtype) if needs[3] else None,
            dinitial if needs[4] else None,
            *nothing,
        )


def _through_scan(b: Tensor, a: Tensor, gate: Any, vector: Any, initial: Any, *fields: Any) -> Results:
    if needs_plain_torch([t for t in (b, a, gate, vector, initial) if t is not None]):
        return reference.forward(b, a, gate, vector, initial, ScanSpec(*fields))
    return _Scan.apply(b, a, gate, vector, initial, *fields)


register_autograd(_library, "scan", _through_scan)


def prepared(b: Tensor, a: Tensor, spec: ScanSpec) -> tuple[Tensor, ScanSpec]:
    """Logarithms as coefficients where that is cheaper once than at every step."""
    if spec.cell == "log" and (a.is_complex() or a.shape != b.shape):
        return a.to(state_dtype(a.dtype)).exp(), spec._replace(cell="given")
    return a, spec


def scan(b: Tensor, a: Tensor, gate: Tensor | None, vector: Tensor | None, initial: Tensor | None, spec: ScanSpec) -> Results:
    """h and the final states, differentiable in b, a, gate, vector and the initial states."""
    if type(b) not in PLAIN:
        is_sharded(b)
    a, spec = prepared(b, a, spec)
    tensors = (b, a, gate, vector, initial)
    given = [t for t in tensors if t is not None]
    if plain_call(unseen=True) and not wants_gradient(given) and _native_serves(given, spec):
        with torch._C._AutoDispatchBelowAutograd():  # the library without the op around it
            return native.scan_forward(*tensors, spec)
    if needs_plain_torch(given):
        return _forward_op(*tensors, *spec) if _mapped() else reference.forward(*tensors, spec)
    if recorded():
        if not torch.compiler.is_compiling():
            flops.announce()
        return _forward_op(*tensors, *spec)
    if wants_gradient(given):
        return _Scan.apply(*tensors, *spec)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward_op(*tensors, *spec)


def _native_serves(tensors: list[Tensor], spec: ScanSpec) -> bool:
    """Whether the CPU's library has the kernel."""
    others = [t for t in (spec.resets, spec.lengths, spec.cu_seqlens) if t is not None]
    plain = all([type(t) in PLAIN and t.is_cpu for t in (*tensors, *others)])
    return plain and tensors[0].dtype in native.DTYPES and library.reason() is None


def scan_backward(*args: Any) -> tuple[Tensor, ...]:
    """Gradients of b, a, gate, vector and the initial states, as the op gives them, of what a backend's function takes."""
    *given, spec, wanted = args
    return _backward_op(*given, *spec, wanted)
