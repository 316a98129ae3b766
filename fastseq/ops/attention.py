"""``fastseq::attention_*``: fused multi-head attention, every feature of ``Spec`` (``types.py``) in combination.

Contract (letters and meaning in ``reference/attention.py``; any strides, but the last dimension of q, k, v is contiguous):

==============  ====================  ===================================================================================
q, k, v         padded or packed      as ``Spec`` says; Hq a multiple of Hkv; q and k have E features, v has Ev
*spec           ``Spec``'s fields     in their order
out             q's shape, Ev         q's dtype; time before heads in memory; 0 for a query without keys
lse             q's shape without E   in ``state_dtype``, contiguous; -inf for a query without keys (and without sinks)
dout, dlse      as out, lse           dlse may be None
wanted          7 bools               which of ``GRADIENTS`` to compute; the others come back empty
dq, dk, dv      as q, k, v            time before heads in memory
dbias           bias' shape           the broadcast dimensions summed, without atomics
drelative_bias  [Hq, L]
drelative_q, k  as theirs
weights         [B, Hq, Tq, Tk]       or, averaged over the heads, [B, Tq, Tk]; after dropout; q's dtype; padded only;
                                      the lse given is that of the same attention
delta           as lse                sum over the keys of weight times its gradient
==============  ====================  ===================================================================================

``lse`` and the dropped weights mean the same whichever backend computed them, so any backend's backward takes any backend's
forward, and a caller may give ``attention_backward`` the ``out`` and ``lse`` of a larger attention that this one is a part of
(ring attention).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..reference import attention as reference
from . import flops
from ._dispatch import (
    PLAIN,
    autocasts,
    heeds_forward,
    is_sharded,
    needs_plain_torch,
    outside_dynamo,
    recorded,
    register_autograd,
    wants_gradient,
)
from .types import GRADIENTS, Spec, empty_gradients, empty_rows, state_dtype

_SPEC = (
    "Tensor? mask, Tensor? bias, Tensor? relative_bias, Tensor? relative_q, Tensor? relative_k, Tensor? slopes, Tensor? sinks, "
    "Tensor? q_lengths, Tensor? k_lengths, Tensor? cu_q, Tensor? cu_k, Tensor? blocks, Tensor? seed, "
    "float scale, float softcap, float dropout, SymInt left, SymInt right, bool bottom_right, SymInt offset, "
    "SymInt relative_bias_zero, SymInt relative_k_zero, SymInt block_size, SymInt max_q, SymInt max_k"
)
_SEVEN = ", ".join(f"Tensor d{name}" for name in GRADIENTS)
_library = torch.library.Library("fastseq", "FRAGMENT")
_library.define(f"attention_forward(Tensor q, Tensor k, Tensor v, {_SPEC}) -> (Tensor out, Tensor lse)")
_library.define(
    f"attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_SPEC}, "
    f"bool[] wanted) -> ({_SEVEN})"
)
_library.define(f"attention_weights(Tensor q, Tensor k, Tensor lse, {_SPEC}, bool average) -> Tensor")
_library.define(
    f"attention_with_weights(Tensor q, Tensor k, Tensor v, {_SPEC}, bool average) -> (Tensor out, Tensor lse, Tensor weights)"
)
_library.define(
    f"attention_weights_backward(Tensor dw, Tensor q, Tensor k, Tensor lse, {_SPEC}, bool average, bool[] wanted) "
    f"-> ({_SEVEN}, Tensor delta)"
)

FIELDS = len(Spec._fields)
TENSORS = Spec._fields.index("scale")  # the fields before are tensors
_NAMED = ["" if name in ("seed", "cu_k", "relative_k") else name for name in Spec._fields[:TENSORS]]  # what a query names


def _query(
    call: str, q: Tensor, k: Tensor, v: Tensor | None, spec: Spec, wanted: list[bool] | None = None
) -> backends.AttentionQuery:
    packed = spec.cu_q is not None
    names = [name for name, tensor in zip(_NAMED, spec, strict=False) if name and tensor is not None]
    names += [name for name in ("softcap", "dropout", "bottom_right") if getattr(spec, name)]
    if spec.seed is not None and spec.seed.numel() > 1:
        names.append("dropout of a part")
    return backends.AttentionQuery(
        op="attention",
        call=call,
        device=q.device,
        dtype=q.dtype,
        batch=len(spec.cu_q) - 1 if spec.cu_q is not None else q.shape[0],
        heads=(q.shape[-3], k.shape[-3]),
        lengths=(spec.max_q, spec.max_k) if packed else (q.shape[-2], k.shape[-2]),
        features=(q.shape[-1], q.shape[-1] if v is None else v.shape[-1]),
        layout="packed" if packed else "padded",
        window=(spec.left, spec.right),
        offset=spec.offset,
        block_size=spec.block_size,
        uses=tuple(names),
        gradients=tuple(name for name, want in zip(GRADIENTS, wanted or [], strict=False) if want),
    )


def _plain_dtypes(q: Tensor) -> Any:
    """Autocast is the business of the caller: plain PyTorch, too, computes in the dtypes of its tensors."""
    kind = q.device.type
    if autocasts(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def _forward(q: Tensor, k: Tensor, v: Tensor, *fields: Any) -> tuple[Tensor, Tensor]:
    spec = Spec(*fields)
    return backends.select(_query("forward", q, k, v, spec)).attention_forward(q, k, v, spec)


def _backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    spec, (wanted,) = Spec(*rest[:FIELDS]), rest[FIELDS:]
    backend = backends.select(_query("backward", q, k, v, spec, wanted))
    return backend.attention_backward(dout, dlse, q, k, v, out, lse, spec, wanted)


def _weights(q: Tensor, k: Tensor, lse: Tensor, *rest: Any) -> Tensor:
    spec, (average,) = Spec(*rest[:FIELDS]), rest[FIELDS:]
    return backends.select(_query("weights", q, k, None, spec)).attention_weights(q, k, lse, spec, average)


def _with_weights(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    spec, (average,) = Spec(*rest[:FIELDS]), rest[FIELDS:]
    forward, weights = backends.select(_query("forward", q, k, v, spec)), backends.select(_query("weights", q, k, None, spec))
    if forward is weights and hasattr(forward, "attention_with_weights"):
        return forward.attention_with_weights(q, k, v, spec, average)
    out, lse = forward.attention_forward(q, k, v, spec)
    return out, lse, weights.attention_weights(q, k, lse, spec, average)


def _weights_backward(dw: Tensor, q: Tensor, k: Tensor, lse: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    spec, (average, wanted) = Spec(*rest[:FIELDS]), rest[FIELDS:]
    backend = backends.select(_query("weights_backward", q, k, None, spec, wanted))
    return backend.attention_weights_backward(dw, q, k, lse, spec, average, wanted)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *fields: Any) -> tuple[Tensor, Tensor]:
    return empty_rows(q, v.shape[-1]), q.new_empty(q.shape[:-1], dtype=state_dtype(q.dtype))


def _fake_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return empty_gradients(q, k, v, Spec(*rest[:FIELDS]), rest[FIELDS])


def _fake_weights(q: Tensor, k: Tensor, lse: Tensor, *rest: Any) -> Tensor:
    rows = q.shape[:3] if not rest[FIELDS] else (q.shape[0], q.shape[2])
    return q.new_empty(*rows, k.shape[2])


def _fake_with_weights(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return *_fake_forward(q, k, v), _fake_weights(q, k, q, *rest)


def _fake_weights_backward(dw: Tensor, q: Tensor, k: Tensor, lse: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    wanted = [want and name != "v" for want, name in zip(rest[FIELDS + 1], GRADIENTS, strict=True)]
    return *empty_gradients(q, k, q, Spec(*rest[:FIELDS]), wanted), torch.empty_like(lse)


for _name, _run, _fake in (
    ("attention_forward", _forward, _fake_forward),
    ("attention_backward", _backward, _fake_backward),
    ("attention_weights", _weights, _fake_weights),
    ("attention_with_weights", _with_weights, _fake_with_weights),
    ("attention_weights_backward", _weights_backward, _fake_weights_backward),
):
    _library.impl(_name, outside_dynamo(_run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastseq::{_name}", _fake, lib=_library)

_forward_op = torch.ops.fastseq.attention_forward.default
_backward_op = torch.ops.fastseq.attention_backward.default
_weights_op = torch.ops.fastseq.attention_weights.default
_with_weights_op = torch.ops.fastseq.attention_with_weights.default
_weights_backward_op = torch.ops.fastseq.attention_weights_backward.default

_SINKS = Spec._fields.index("sinks")
_PLACES = [0, 1, 2, *(3 + Spec._fields.index(name) for name in GRADIENTS[3:])]  # of GRADIENTS among q, k, v and the fields


def _sinks_grad(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """[Hq]: a sink only takes weight away from the keys. ``delta`` and ``lse`` are [B, Hq, Tq] or [Hq, N]."""
    weight = torch.exp(sinks.to(lse.dtype)[:, None] - lse)
    weight = torch.where(lse == -torch.inf, 0, weight)
    total = -(weight * delta).sum(-1)
    return (total if total.dim() == 1 else total.sum(0)).to(sinks.dtype)


@heeds_forward
class _Attention(torch.autograd.Function):
    """out and lse; and the weights, unless ``average`` is None."""

    @staticmethod
    def forward(ctx, q, k, v, average, *fields):
        with torch._C._AutoDispatchBelowAutograd():
            results = _forward_op(q, k, v, *fields) if average is None else _with_weights_op(q, k, v, *fields, average)
        ctx.save_for_backward(q, k, v, *results[:2], *fields[:TENSORS])
        ctx.scalars, ctx.average = fields[TENSORS:], average
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx, dout, dlse, dw=None):
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        fields, needs = (*tensors, *ctx.scalars), (*ctx.needs_input_grad[:3], *ctx.needs_input_grad[4:])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():

            def function(q, k, v, spec):
                results = reference.forward(q, k, v, spec)
                return results if dw is None else (*results, reference.weights(q, k, None, spec, ctx.average))

            grad_outputs = (dout, dlse) if dw is None else (dout, dlse, dw)
            results = _differentiable_backward(needs, q, k, v, fields, grad_outputs, function)
        else:
            results = (None,) * (3 + FIELDS)
            if dout is not None or dlse is not None:
                results = _through_output(needs, dout, dlse, q, k, v, out, lse, fields)
            if dw is not None:
                results = _sums(results, _through_weights(needs, dw, q, k, lse, fields, ctx.average))
        return *results[:3], None, *results[3:]


@heeds_forward
class _AttentionWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, lse, average, *fields):
        ctx.save_for_backward(q, k, lse, *fields[:TENSORS])
        ctx.scalars, ctx.average = fields[TENSORS:], average
        with torch._C._AutoDispatchBelowAutograd():
            return _weights_op(q, k, lse, *fields, average)

    @staticmethod
    def backward(ctx, dw):
        q, k, lse, *tensors = ctx.saved_tensors
        fields, needs = (*tensors, *ctx.scalars), (*ctx.needs_input_grad[:2], False, *ctx.needs_input_grad[4:])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():

            def function(q, k, v, spec):
                return (reference.weights(q, k, None, spec, ctx.average),)

            dq, dk, _, *rest = _differentiable_backward(needs, q, k, None, fields, (dw,), function)
        else:
            dq, dk, _, *rest = _through_weights(needs, dw, q, k, lse, fields, ctx.average)
        return dq, dk, None, None, *rest


def _through_output(needs, dout, dlse, q, k, v, out, lse, fields):
    dout = torch.zeros_like(out) if dout is None else dout.to(out.dtype)
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    wanted = [needs[i] for i in _PLACES]
    grads = _backward_op(dout, dlse, q, k, v, out, lse, *fields, wanted)
    delta = None
    if needs[3 + _SINKS]:
        delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        delta = delta if dlse is None else delta - dlse
    return _results(grads, wanted, lse, delta, fields[_SINKS])


def _through_weights(needs, dw, q, k, lse, fields, average):
    wanted = [needs[i] and i != 2 for i in _PLACES]
    *grads, delta = _weights_backward_op(dw.contiguous(), q, k, lse, *fields, average, wanted)
    return _results(grads, wanted, lse, delta if needs[3 + _SINKS] else None, fields[_SINKS])


def _results(grads, wanted, lse, delta, sinks):
    """One gradient or None for q, k, v and every field."""
    results: list[Tensor | None] = [None] * (3 + FIELDS)
    for place, grad, want in zip(_PLACES, grads, wanted, strict=True):
        results[place] = grad if want else None
    if delta is not None:
        results[3 + _SINKS] = _sinks_grad(sinks, lse, delta)
    return results


def _sums(first, second):
    return [b if a is None else a if b is None else a + b for a, b in zip(first, second, strict=True)]


def _differentiable_backward(needs, q, k, v, fields, grad_outputs, function):
    """The gradients with a graph of their own (create_graph=True): through the reference."""
    inputs = [q, k, v, *fields[:TENSORS]]
    places = [i for i in range(len(inputs)) if needs[i]]
    views = [t.view_as(t) if need else t for t, need in zip(inputs, needs, strict=False)]
    with _plain_dtypes(q):
        outputs = function(*views[:3], Spec(*views[3:], *fields[TENSORS:]))
        used = [(out, grad.to(out.dtype)) for out, grad in zip(outputs, grad_outputs, strict=True) if grad is not None]
        grads = torch.autograd.grad(
            [out for out, _ in used], [views[i] for i in places], [g for _, g in used], create_graph=True, allow_unused=True
        )
    results: list[Tensor | None] = [None] * (3 + FIELDS)
    for i, grad in zip(places, grads, strict=True):
        results[i] = grad
    return results


def _tensors(q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> list[Tensor]:
    of_spec: tuple[Any, ...] = spec[:TENSORS]
    return [t for t in (q, k, v, *of_spec) if t is not None]


def _through_forward(q: Tensor, k: Tensor, v: Tensor, *fields: Any) -> tuple[Tensor, Tensor]:
    spec = Spec(*fields)
    if needs_plain_torch(_tensors(q, k, v, spec)):
        with _plain_dtypes(q):
            return reference.forward(q, k, v, spec)
    return _Attention.apply(q, k, v, None, *fields)


def _through_weights_op(q: Tensor, k: Tensor, lse: Tensor, *rest: Any) -> Tensor:
    spec, (average,) = Spec(*rest[:FIELDS]), rest[FIELDS:]
    if needs_plain_torch(_tensors(q, k, lse, spec)):
        with _plain_dtypes(q):
            return reference.weights(q, k, None, spec, average)
    return _AttentionWeights.apply(q, k, lse.detach(), average, *spec)


def _through_both(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    spec, (average,) = Spec(*rest[:FIELDS]), rest[FIELDS:]
    if needs_plain_torch(_tensors(q, k, v, spec)):
        with _plain_dtypes(q):
            return *reference.forward(q, k, v, spec), reference.weights(q, k, None, spec, average)
    return _Attention.apply(q, k, v, average, *spec)


for _name, _through in (
    ("attention_forward", _through_forward),
    ("attention_weights", _through_weights_op),
    ("attention_with_weights", _through_both),
):
    register_autograd(_library, _name, _through)


def _differentiable(op: Any, through: Any, given: list[Tensor], *arguments: Any) -> Any:
    """An op with its derivative. What records a program is shown the op; a plain call goes its way directly, which is faster."""
    if type(given[0]) not in PLAIN:
        is_sharded(given[0])
    if needs_plain_torch(given):
        return through(*arguments)
    if recorded():
        if not torch.compiler.is_compiling():
            flops.announce()
        return op(*arguments)
    if wants_gradient(given):
        return through(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def attention(q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """out and lse, differentiable in q, k, v, the tensors of ``GRADIENTS`` and the sinks."""
    return _differentiable(_forward_op, _through_forward, _tensors(q, k, v, spec), q, k, v, *spec)


def attention_weights(q: Tensor, k: Tensor, lse: Tensor, spec: Spec, average: bool) -> Tensor:
    """The weights, from the ``lse`` of ``attention``; differentiable as ``attention`` is, but lse itself gets no gradient."""
    return _differentiable(_weights_op, _through_weights_op, _tensors(q, k, lse, spec), q, k, lse, *spec, average)


def attention_with_weights(q: Tensor, k: Tensor, v: Tensor, spec: Spec, average: bool) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and weights: ``attention`` and ``attention_weights``, for which some backends need only one pass."""
    given = _tensors(q, k, v, spec)
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting() and wants_gradient(given):
        out, lse = attention(q, k, v, spec)  # apart, so that the backward of an output that is not used is left out
        return out, lse, attention_weights(q, k, lse, spec, average)
    return _differentiable(_with_weights_op, _through_both, given, q, k, v, *spec, average)


def attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: Spec, wanted: list[bool]
) -> tuple[Tensor, ...]:
    """The backward op itself, for callers that merge attentions: ``out`` and ``lse`` are those of the whole."""
    return _backward_op(dout, dlse, q, k, v, out, lse, *spec, wanted)
