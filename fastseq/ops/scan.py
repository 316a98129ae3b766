"""``fastseq::scan`` and ``fastseq::scan_backward``: first-order linear recurrences, h_t = a_t h_{t-1} + b_t in every channel.

Contract (letters in ``reference/scan.py``; time-major, any strides):

===========  ====================  =====================================================================================
b            [T, B, C]             floating or complex; packed [N, 1, C]. Of blocks [.., C, 2]
a            1 or T, 1 or B,       coefficients in ``state_dtype`` of b; of blocks [.., 2, 2]. Of other cells than ``given`` what
             1 or C                these make them of: real, as many as numbers of b, and it may have b's dtype
initial      [B, C] or None        in ``state_dtype``, packed [S, C]; None: zeros, and no a is multiplied by them
resets       [T, B] bool, None     no state goes from the step before, t - 1, to step t, nor back in a reverse scan
lengths      [B] int32, None       padded only, taken as if clamped to [0, T]
cu_seqlens   [S + 1] int32, None   packed only: sequence s has the steps cu_seqlens[s] .. cu_seqlens[s + 1]
cell         str                   what a and b are, of ``SCAN_CELLS``: coefficients and addends as they are (``given``),
                                   logarithms of coefficients (``log``), logits of gate and candidate (``min_gru``)
reverse      bool                  h_t = a_t h_{t+1} + b_t, from the last step of every row to its first
h            as b                  zero beyond a row's length; the layout of b where a step's channels lie side by side
final        [B, C]                the state after a row's last step of the walk, or ``initial``; in ``state_dtype``; or [S, C]
dh, dfinal   as h, final           or None
db           as b                  b's dtype, zero beyond a row's length; (0,) where not wanted
da           T, B, C               a's dtype, of each row and channel; where a has one step but b has not, [1, B, C], summed over
                                   the steps of a row, packed [1, S, C]; (0,) where not wanted
dinitial     as final              without ``initial`` it means nothing
===========  ====================  =====================================================================================

Saved for the backward pass: a, of ``min_gru`` b, and h as it is returned, nothing else. What a reset cuts off, and what lies
beyond a row's length, may be infinite or NaN. The same call gives the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..reference import scan as reference
from . import flops
from ._dispatch import needs_plain_torch, outside_dynamo, recorded, register_autograd, wants_gradient
from .types import ScanSpec, empty_scan, empty_scan_gradients, scan_kind, state_dtype

_SPEC = "Tensor? resets, Tensor? lengths, Tensor? cu_seqlens, str cell, bool reverse"
_library = torch.library.Library("fastseq", "FRAGMENT")
_library.define(f"scan(Tensor b, Tensor a, Tensor? initial, {_SPEC}) -> (Tensor h, Tensor final)")
_library.define(
    f"scan_backward(Tensor? dh, Tensor? dfinal, Tensor? b, Tensor a, Tensor h, Tensor? initial, {_SPEC}, bool[] wanted) "
    "-> (Tensor db, Tensor da, Tensor dinitial)"
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


def _forward(b: Tensor, a: Tensor, initial: Tensor | None, *fields: Any) -> tuple[Tensor, Tensor]:
    spec = ScanSpec(*fields)
    return backends.select(_query("forward", b, a, initial, spec)).scan_forward(b, a, initial, spec)


def _backward(
    dh: Tensor | None, dfinal: Tensor | None, b: Tensor | None, a: Tensor, h: Tensor, initial: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *fields, wanted = rest
    spec = ScanSpec(*fields)
    backend = backends.select(_query("backward", h, a, initial, spec))
    return backend.scan_backward(dh, dfinal, b, a, h, initial, spec, wanted)


def _fake_forward(b: Tensor, a: Tensor, initial: Tensor | None, *fields: Any) -> tuple[Tensor, Tensor]:
    return empty_scan(b, scan_kind(b, a), ScanSpec(*fields))


def _fake_backward(
    dh: Tensor | None, dfinal: Tensor | None, b: Tensor | None, a: Tensor, h: Tensor, initial: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *fields, wanted = rest
    return empty_scan_gradients(a, h, scan_kind(h, a), ScanSpec(*fields), wanted)


for _name, _run, _fake in (("scan", _forward, _fake_forward), ("scan_backward", _backward, _fake_backward)):
    _library.impl(_name, outside_dynamo(_run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastseq::{_name}", _fake, lib=_library)

_forward_op = torch.ops.fastseq.scan.default
_backward_op = torch.ops.fastseq.scan_backward.default


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, b, a, initial, *fields):
        with torch._C._AutoDispatchBelowAutograd():
            h, final = _forward_op(b, a, initial, *fields)
        ctx.save_for_backward(b if fields[3] == "min_gru" else None, a, h, initial, *fields[:3])
        ctx.flags, ctx.dtype = fields[3:], b.dtype
        ctx.set_materialize_grads(False)
        return h, final

    @staticmethod
    def backward(ctx, dh, dfinal):
        b, a, h, initial, *tensors = ctx.saved_tensors
        needs, nothing = ctx.needs_input_grad, (None,) * 5
        if dh is None and dfinal is None:
            return (None, None, None, *nothing)
        spec = ScanSpec(*tensors, *ctx.flags)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            db, da, dinitial = reference.backward(dh, dfinal, b, a, h, initial, spec, scan)
        else:
            db, da, dinitial = _backward_op(dh, dfinal, b, a, h, initial, *spec, list(needs[:2]))
        return (
            db.to(ctx.dtype) if needs[0] else None,
            da.sum_to_size(a.shape).to(a.dtype) if needs[1] else None,
            dinitial if needs[2] else None,
            *nothing,
        )


def _through_scan(b: Tensor, a: Tensor, initial: Tensor | None, *fields: Any) -> tuple[Tensor, Tensor]:
    if needs_plain_torch([t for t in (b, a, initial) if t is not None]):
        return reference.forward(b, a, initial, ScanSpec(*fields))
    return _Scan.apply(b, a, initial, *fields)


register_autograd(_library, "scan", _through_scan)


def scan(b: Tensor, a: Tensor, initial: Tensor | None, spec: ScanSpec) -> tuple[Tensor, Tensor]:
    """h and the final states, differentiable in b, a and the initial states."""
    if spec.cell == "log" and (a.is_complex() or a.shape != b.shape):  # cheaper once than at every step
        a, spec = a.to(state_dtype(a.dtype)).exp(), spec._replace(cell="given")
    given = [t for t in (b, a, initial) if t is not None]
    if needs_plain_torch(given):
        return reference.forward(b, a, initial, spec)
    if recorded():
        if not torch.compiler.is_compiling():
            flops.announce()
        return _forward_op(b, a, initial, *spec)
    if wants_gradient(given):
        return _Scan.apply(b, a, initial, *spec)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward_op(b, a, initial, *spec)


def scan_backward(
    dh: Tensor | None,
    dfinal: Tensor | None,
    b: Tensor | None,
    a: Tensor,
    h: Tensor,
    initial: Tensor | None,
    spec: ScanSpec,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of b, a and the initial states, as the op gives them."""
    return _backward_op(dh, dfinal, b, a, h, initial, *spec, wanted)
