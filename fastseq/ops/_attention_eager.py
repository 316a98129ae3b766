"""Attention of plain eager calls on the CPU: the library without the op around it.

The op costs some 80 us of Python, and as much again in training; its kernel, for a short sequence, five. What cannot be called so
(compiled, recorded, transformed or watched calls, and what no kernel has) goes through ``attention.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..backends import library
from ..backends.cpu import attention as native
from ..backends.torch import attention as torchs
from ..choice import sources
from ..choice.sources import least_of_torchs, memory, remember
from ..reference import attention as reference
from . import attention as op
from ._dispatch import PLAIN, heeds_forward, is_batched, lean, wants_gradient
from .attention import TENSORS, _plain_dtypes, _tensors
from .types import GRADIENTS, Spec

_NUMBERS = frozenset((int, float))
# `how` the library's plain_attention takes a call: `Plain` of csrc/cpu/attention_layers.h
CAUSAL, BOTTOM_RIGHT, GROUPED, TIME_FIRST, SCALED, UNAMBIGUOUS, LAID_OUT, _KEYS = (1 << bit for bit in range(8))
_native: Any = None  # the library's ops, once it is loaded, without a frame of Python around each
_native_plain: Any = None
_native_backward: Any = None


def random_seed(device: torch.device | None = None) -> Tensor:
    """int64 [1], of a dropout, from the device's generator, so that ``torch.manual_seed`` repeats it."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    grouped: bool,
) -> Tensor | None:
    """What torch's function of that name gives; None: the call is for another way, which also says what is wrong with it."""
    if type(query) not in PLAIN or type(key) not in PLAIN or type(value) not in PLAIN:
        return None
    if type(causal) is not bool or type(dropout) not in _NUMBERS or (mask is not None and type(mask) not in PLAIN):
        return None
    if scale is not None and type(scale) not in _NUMBERS:
        return None
    if query.is_nested or key.is_nested or value.is_nested:
        return None
    return attended(query, key, value, mask, dropout, causal, scale, grouped, False, False)


def attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    grouped: bool,
    swapped: bool,
    bottom_right: bool,
) -> Tensor | None:
    """The same of plain tensors, none of them nested, and other arguments of their types.

    ``swapped``: query, key, value and result, of four dimensions each, have their time before their heads. ``bottom_right``: of
    a causal call whose numbers of queries and keys differ, the last query stands at the last key.
    """
    if _native is None and not _loaded():
        return None
    gradients = torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad or (mask is not None and mask.requires_grad)
    )
    if gradients and query.dim() != 4:
        return None
    seed = before = None
    if dropout:
        if not 0 < dropout < 1:
            return None
        before, seed = torch.get_rng_state(), random_seed()
    elif (
        not bottom_right
        and _least_keys.get(gradients) != 0
        and key.dim() == 4
        and may_be_torchs(gradients, key.shape[1 if swapped else 2])
        and _torchs_is_faster(query, key, value, mask, causal, scale, gradients, swapped)
    ):
        if swapped:
            query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        y = F.scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=scale, enable_gqa=grouped)
        return y.transpose(1, 2) if swapped else y
    if not gradients and seed is None and mask is None:
        how = CAUSAL if causal else 0
        how |= (BOTTOM_RIGHT if bottom_right else 0) | (GROUPED if grouped else 0) | (TIME_FIRST if swapped else 0)
        return (
            _native_plain(query, key, value, 0.0, how) if scale is None else _native_plain(query, key, value, scale, how | SCALED)
        )
    if gradients:
        out = _plain(query, key, value, mask, grouped, (causal, scale, dropout, seed, bottom_right, swapped))
    else:
        results = _native(query, key, value, mask, causal, scale, grouped, False, dropout, seed, bottom_right, swapped)
        out = results[0] if results else None
    if out is None and before is not None:  # the other way draws its own, which has to be that of a call without gradients
        torch.set_rng_state(before)
    return out


def _loaded() -> bool:
    global _native, _native_plain, _native_backward
    if library.reason():
        return False
    ops = torch.ops.fastseq_native
    _native, _native_plain = ops.scaled_dot_product_attention.default._op, ops.plain_attention.default._op
    _native_backward = ops.scaled_dot_product_attention_backward.default._op
    return True


_faster = memory()
# with and without gradients, from how many keys on a plain call may be torch's, with any number of threads; 0: none is
_least_keys: dict[bool, int] = memory()
# the same, as the library's plain_attention and a part of its `how`, of calls without gradients that `functional.attention` takes
shortest: dict[bool, tuple[Any, int]] = memory()


def may_be_torchs(gradients: bool, keys: int) -> bool:
    """Whether a plain call of so many keys has to be looked at."""
    least = _least_keys.get(gradients)
    if least is None:
        least = least_of_torchs("attention", gradients, "Tk")
        if sources._threads is None:
            remember(_least_keys, gradients, least)
            if _native_plain is not None or _loaded():
                remember(shortest, gradients, (_native_plain, GROUPED | UNAMBIGUOUS | least * _KEYS))
    return 0 < least <= keys


def _torchs_is_faster(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    gradients: bool,
    swapped: bool,
) -> bool:
    """Whether torch's kernel was measured to be the faster one for a plain call, while no backend is forced."""
    masked = None if mask is None else "mask" if mask.dtype == torch.bool else "bias"
    shapes = query.shape, key.shape, query.dtype, masked, causal, gradients, swapped
    known = _faster.get(shapes)
    if known is None:
        q, k, v = (t.transpose(1, 2) if swapped else t for t in (query, key, value))
        known = remember(_faster, shapes, _asked(q, k, v, masked, causal, gradients))
    if not known or backends.forced() or not query.dtype == key.dtype == value.dtype or key.shape[:-1] != value.shape[:-1]:
        return False
    if not torchs.fused_is_right(key.shape[1 if swapped else 2], causal, scale):
        return False
    return mask is None or masked == "mask" or mask.dtype == query.dtype


def _asked(query: Tensor, key: Tensor, value: Tensor, masked: str | None, causal: bool, gradients: bool) -> bool:
    if not query.is_cpu or query.dim() != 4 or key.dim() != 4 or 0 in query.shape or 0 in key.shape:
        return False
    if not query.is_floating_point() or query.shape[::3] != key.shape[::3] or query.shape[1] % key.shape[1]:
        return False  # an error, which is another's to tell
    of_call = backends.AttentionQuery(
        op="attention",
        call="forward",
        device=query.device,
        dtype=query.dtype,
        batch=query.shape[0],
        heads=(query.shape[1], key.shape[1]),
        lengths=(query.shape[2], key.shape[2]),
        features=(query.shape[3], value.shape[-1]),
        layout="padded",
        window=(-1, 0) if causal else (-1, -1),
        offset=0,
        block_size=0,
        uses=(masked,) if masked else (),
        gradients=(),
    )
    return backends.torch_takes(of_call, gradients) is not None


class _Plain(torch.autograd.Function):
    """Attention that is differentiable in q, k, v and a mask that is added; None: the library declines it."""

    @staticmethod
    def forward(ctx, q, k, v, mask, grouped, arguments):
        causal, scale, dropout, seed, bottom_right, swapped = arguments
        results = _native(q, k, v, mask, causal, scale, grouped, True, dropout, seed, bottom_right, swapped)
        if not results:
            return None
        out, lse = results
        ctx.save_for_backward(q, k, v, out, lse, mask, seed)
        ctx.rest = arguments
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse, mask, seed = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:4]
        causal, scale, dropout, _, bottom_right, swapped = ctx.rest
        if torch.is_grad_enabled() or is_batched(dout):
            spec = Spec(scale=q.shape[-1] ** -0.5 if scale is None else scale, dropout=dropout, seed=seed)
            spec = spec._replace(right=0 if causal else -1, bottom_right=bottom_right)
            if torch.is_grad_enabled():
                return *_through_reference(wanted, q, k, v, mask, spec, swapped, dout), None, None
            return *_through_op(wanted, q, k, v, out, lse, mask, spec, swapped, dout), None, None
        grads = _native_backward(dout, q, k, v, out, lse, mask, causal, scale, dropout, seed, bottom_right, swapped, wanted)
        if wanted == _OF_INPUTS:
            return *grads, None, None, None
        found = iter(grads)
        return *[next(found) if want else None for want in wanted], None, None


_OF_INPUTS = (True, True, True, False)
_plain = lean(_Plain)


def _through_reference(
    wanted: Sequence[bool],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    spec: Spec,
    swapped: bool,
    dout: Tensor,
) -> list[Tensor | None]:
    """The gradients of q, k, v and mask with a graph of their own (create_graph=True)."""
    with _plain_dtypes(q):
        given = (q, k, v, mask)
        views = [t.view_as(t) if t is not None and want else t for t, want in zip(given, wanted, strict=True)]
        q, k, v, mask = views  # type: ignore[assignment]
        spec = _masked(spec, mask)
        if swapped:
            q, k, v, dout = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), dout.transpose(1, 2)
        out, _ = reference.forward(q, k, v, spec)
        used = [t for t, want in zip(views, wanted, strict=True) if t is not None and want]
        grads = iter(torch.autograd.grad(out, used, dout, create_graph=True))
    return [next(grads) if want else None for want in wanted]


def _through_op(
    wanted: Sequence[bool],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    spec: Spec,
    swapped: bool,
    dout: Tensor,
) -> list[Tensor | None]:
    """The gradients of q, k, v and mask of many gradients at once (is_grads_batched=True), which the op takes one by one."""
    if swapped:
        q, k, v, out, dout = (t.transpose(1, 2) for t in (q, k, v, out, dout))
    spec, lse = _masked(spec, mask), _rounded(lse)
    grads = op._backward_op(dout.contiguous(), None, q, k, v, out, lse, *spec, [*wanted, *[False] * (len(GRADIENTS) - 4)])
    found: list[Tensor | None] = [grad if want else None for grad, want in zip(grads, wanted, strict=False)]
    if swapped:
        found[:3] = [None if grad is None else grad.transpose(1, 2) for grad in found[:3]]
    if mask is not None and found[3] is not None:
        found[3] = found[3].reshape(mask.shape)
    return found


def _rounded(lse: Tensor) -> Tensor:
    """[B, H, Tq], of a lse that the library may have saved together with what rounding took from it, [2, B, H, Tq]."""
    return lse[0] if lse.dim() == 4 else lse


def _masked(spec: Spec, mask: Tensor | None) -> Spec:
    """With a mask as torch's function takes it."""
    if mask is None:
        return spec
    over_scores = mask[(None,) * (4 - mask.dim())]
    return spec._replace(mask=over_scores) if mask.dtype == torch.bool else spec._replace(bias=over_scores)


def serves(q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> bool:
    """Whether the library has a kernel for a call on the CPU."""
    if not native.DTYPES.issuperset((q.dtype, k.dtype, v.dtype)) or q.shape[-1] == 0:
        return False
    for tensor in _tensors(q, k, v, spec):
        if type(tensor) not in PLAIN or not tensor.is_cpu:
            return False
    return library.reason() is None


def attention(q: Tensor, k: Tensor, v: Tensor, spec: Spec, average: bool | None = None) -> tuple[Tensor, ...]:
    """out and lse, and the weights unless ``average`` is None: what the ops of these names give, with their gradients."""
    saves = wants_gradient(_tensors(q, k, v, spec))
    with torch._C._AutoDispatchBelowAutograd():
        results: tuple[Tensor, ...] = (
            native.attention_forward(q, k, v, spec, saves)
            if average is None
            else native.attention_with_weights(q, k, v, spec, average)
        )
    if saves:
        return _attention(q, k, v, (average, results), *spec)
    return results


@heeds_forward
class _Attention(op._Attention):
    """The op's function, of results that are there already."""

    @staticmethod
    def forward(ctx, q, k, v, found, *fields):
        ctx.average, results = found
        ctx.save_for_backward(q, k, v, *results[:2], *fields[:TENSORS])
        ctx.scalars = fields[TENSORS:]
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx, dout, dlse, dw=None):
        if torch.is_grad_enabled() or any([grad is not None and is_batched(grad) for grad in (dout, dlse, dw)]):
            return op._Attention.backward(ctx, dout, dlse, dw)
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        spec, needs = Spec(*tensors, *ctx.scalars), (*ctx.needs_input_grad[:3], *ctx.needs_input_grad[4:])
        wanted = [needs[i] for i in op._PLACES]
        if dout is None:
            wanted[2] = False
        elif dout.stride(-1) != 1:
            dout = dout.contiguous()
        of_sinks = needs[3 + op._SINKS]
        arguments = dout, dlse, dw, bool(ctx.average), q, k, v, out, lse, spec, [*wanted, of_sinks]
        *grads, delta = native.attention_gradients(*arguments)
        results = op._results(grads, wanted, lse, delta if of_sinks else None, spec.sinks)
        return *results[:3], None, *results[3:]


_attention = lean(_Attention)


def projected_attention(
    projected: Sequence[Tensor],
    heads: int,
    padding: Tensor | None,
    mask: Tensor | None,
    batch_first: bool,
    causal: bool,
    dropout: float,
    weights: bool,
    average: bool,
    meaning: Callable[[], Spec],
) -> Sequence[Tensor] | None:
    """What lies between the projections of ``nn.MultiheadAttention``: the output and, if asked for, the weights.

    Args:
        projected: q, k and v of all heads, one after another in the last dimension of one to three tensors, ``[N, L, ..]`` (batch
            first) or ``[L, N, ..]``.
        padding, mask: as the module takes them.
        meaning: the same as a ``Spec``, for derivatives of a kind that the library has not.

    None: the call is for another way, which also says what is wrong with it.
    """
    global _native_projected
    if _native_projected is None:
        _native_projected = torch.ops.fastseq_native.projected_attention.default._op
    seed = random_seed() if dropout else None
    arguments = heads, padding, mask, batch_first, causal, dropout, seed
    with torch._C._AutoDispatchBelowAutograd():
        results = _native_projected(projected, *arguments, weights, average)
    if not results:
        return None
    if torch.is_grad_enabled() and any([part.requires_grad for part in projected]):
        return _projected(results, arguments, average, meaning, *projected)
    return [results[0], *results[2:]]


_native_projected: Any = None


@heeds_forward
class _Projected(torch.autograd.Function):
    """The same of results that are there already, differentiable in ``projected``."""

    @staticmethod
    def forward(ctx, results, arguments, average, meaning, *projected):
        heads, padding, mask, batch_first, causal, dropout, seed = arguments
        out, lse, *weights = results
        ctx.save_for_backward(out, lse, padding, mask, seed, *projected)
        ctx.rest, ctx.average, ctx.meaning = (heads, batch_first, causal, dropout), average, meaning
        ctx.set_materialize_grads(False)
        return out, *weights

    @staticmethod
    def backward(ctx, dout, dw=None):
        out, lse, padding, mask, seed, *projected = ctx.saved_tensors
        heads, batch_first, causal, dropout = ctx.rest
        if torch.is_grad_enabled():
            return None, None, None, None, *_projected_through_reference(ctx, projected, seed, dout, dw)
        if any([grad is not None and is_batched(grad) for grad in (dout, dw)]):
            return None, None, None, None, *_projected_through_op(ctx, projected, seed, out, lse, dout, dw)
        if dout is None:
            dout = torch.zeros_like(out)
        backward, masks = torch.ops.fastseq_native.projected_attention_backward.default, (padding, mask)
        rest = batch_first, causal, dropout, seed, ctx.average
        return None, None, None, None, *backward(dout, dw, projected, out, lse, heads, *masks, *rest)


_projected = lean(_Projected)


def _heads(ctx, parts):
    """[N, H, T, E / H] of each run of E features, in one to three tensors."""
    heads, batch_first, *_ = ctx.rest
    features = sum(part.shape[-1] for part in parts) // (3 * heads)
    order = (2, 0, 3, 1, 4) if batch_first else (2, 1, 3, 0, 4)
    return [each for part in parts for each in part.reshape(*part.shape[:-1], -1, heads, features).permute(order).unbind(0)]


def _projected_through_op(ctx, projected, seed, out, lse, dout, dw):
    """Of many gradients at once (is_grads_batched=True), which the op takes one by one."""
    heads, batch_first, *_ = ctx.rest
    q, k, v = _heads(ctx, projected)
    lse = _rounded(lse)
    spec, needs = ctx.meaning()._replace(seed=seed), (True, True, True, *[False] * len(Spec._fields))
    order, back = ((0, 2, 1, 3), (0, 2, 1, 3)) if batch_first else ((1, 2, 0, 3), (2, 0, 1, 3))
    found: Any = [None] * len(needs)
    if dout is not None:
        of_heads = [t.reshape(*t.shape[:-1], heads, -1).permute(order) for t in (dout, out)]
        found = op._through_output(needs, of_heads[0].contiguous(), None, q, k, v, of_heads[1], lse, spec)
    if dw is not None:
        found = op._sums(found, op._through_weights(needs, dw, q, k, lse, spec, ctx.average))
    width, results = q.shape[1] * q.shape[3], []
    rows = [None if grad is None else grad.permute(back) for grad in found[:3]]  # and no views that batches have not
    grads = iter([None if grad is None else grad.reshape(*grad.shape[:2], width) for grad in rows])
    for part in projected:
        own = [next(grads) for _ in range(part.shape[-1] // width)]
        none = next((torch.zeros_like(grad) for grad in own if grad is not None), None)
        results.append(None if none is None else torch.cat([none if grad is None else grad for grad in own], -1))
    return results


def _projected_through_reference(ctx, projected, seed, dout, dw):
    """With a graph of its own (create_graph=True)."""
    _, batch_first, *_ = ctx.rest
    with _plain_dtypes(projected[0]):
        projected = [part.view_as(part) for part in projected]
        q, k, v = _heads(ctx, projected)
        spec = ctx.meaning()._replace(seed=seed)
        out, _ = reference.forward(q, k, v, spec)
        out = (out.transpose(1, 2) if batch_first else out.permute(2, 0, 1, 3)).flatten(-2)
        pairs = [(out, dout)]
        if dw is not None:
            pairs.append((reference.weights(q, k, None, spec, ctx.average), dw))
        pairs = [pair for pair in pairs if pair[1] is not None]
        results, grads = [a for a, _ in pairs], [b for _, b in pairs]
        return torch.autograd.grad(results, projected, grads, create_graph=True, allow_unused=True)
