"""``fastseq::attention_decode``: a few new queries against a cache of keys and values. Inference only.

Contract (letters in ``reference/attention_decode.py``; any strides, but the last dimension of q and of the caches is contiguous):

===========  ========================  ===================================================================================
q            [B, Hq, Tq, E]            Hq = g Hkv; the g heads of a key head and the Tq queries share one pass over the cache
k_cache      [B, Hkv, S, E]            or, with a block table, [pages, Hkv, page_size, E]
v_cache      as k_cache, Ev
lengths      int32 [B]                 valid keys, with those of these queries; taken as if clamped to [0, S]
block_table  int32 [B, max_pages]      page of keys p page_size .. of a sequence; S is max_pages page_size
slopes       wide [B or 1, Hq]         ALiBi, in fp32 or, with fp64, fp64
sinks        [Hq] floating
left, right  ints                      keys seen before and after a query's place, lengths[b] - Tq + i; -1: all
num_splits   int                       parts that the keys are cut into; 0: the backend chooses
out          [B, Hq, Tq, Ev]           q's dtype; time before heads in memory; 0 for a query without keys
lse          [B, Hq, Tq]               in ``state_dtype``, contiguous; -inf for a query without keys (and without sinks)
===========  ========================  ===================================================================================

Keys that no query sees are not read, nor are their entries of the block table: they may hold anything. Nothing waits for the
device. The result depends on ``num_splits`` by rounding only; for the same shapes on the same device it is the same, bit by bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..reference import attention_decode as reference
from . import flops
from ._dispatch import needs_plain_torch, outside_dynamo, recorded, register_autograd
from .types import DecodeSpec, empty_rows, state_dtype

_library = torch.library.Library("fastseq", "FRAGMENT")
_library.define(
    "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? block_table, "
    "Tensor? slopes, Tensor? sinks, float scale, float softcap, SymInt left, SymInt right, SymInt num_splits) "
    "-> (Tensor out, Tensor lse)"
)


def _query(q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: DecodeSpec) -> backends.AttentionQuery:
    table = spec.block_table
    used = {"slopes": spec.slopes is not None, "sinks": spec.sinks is not None, "softcap": bool(spec.softcap)}
    return backends.AttentionQuery(
        op="attention_decode",
        call="decode",
        device=q.device,
        dtype=q.dtype,
        batch=q.shape[0],
        heads=(q.shape[1], k_cache.shape[1]),
        lengths=(q.shape[2], reference.capacity(k_cache, table)),
        features=(q.shape[3], v_cache.shape[3]),
        layout="contiguous" if table is None else "paged",
        window=(spec.left, spec.right),
        offset=0,
        block_size=0 if table is None else k_cache.shape[2],
        uses=tuple(name for name, use in used.items() if use),
        gradients=(),
    )


def _decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, *fields: Any) -> tuple[Tensor, Tensor]:
    spec = DecodeSpec(*fields)
    return backends.select(_query(q, k_cache, v_cache, spec)).attention_decode_forward(q, k_cache, v_cache, spec)


def _fake_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return empty_rows(q, v_cache.shape[-1]), q.new_empty(q.shape[:-1], dtype=state_dtype(q.dtype))


_library.impl("attention_decode", outside_dynamo(_decode), "CompositeExplicitAutograd")
torch.library.register_fake("fastseq::attention_decode", _fake_decode, lib=_library)

_decode_op = torch.ops.fastseq.attention_decode.default


class _WithoutBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        return _decode_op(*args)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(_NO_BACKWARD)


_NO_BACKWARD = (
    "attention against a cache has no backward, but an argument requires grad: call it under torch.no_grad(), "
    "or use fastseq.functional.attention(causal=True, alignment='bottom_right', seqlens_k=...), which is differentiable"
)


def _through_decode(*args: Any) -> tuple[Tensor, Tensor]:
    """In a recorded program, which may run with gradients enabled as long as none is taken through here."""
    if needs_plain_torch([t for t in args if isinstance(t, Tensor)]):
        q, k_cache, v_cache, *fields = args
        return reference.forward(q, k_cache, v_cache, DecodeSpec(*fields))
    return _WithoutBackward.apply(*args)


register_autograd(_library, "attention_decode", _through_decode)


def refuse_gradients(*tensors: Tensor | None) -> None:
    """
    Raises:
        RuntimeError: if a gradient would be wanted: a tensor requires grad and gradients are enabled.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(_NO_BACKWARD)


def attention_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: DecodeSpec) -> tuple[Tensor, Tensor]:
    """out and lse.

    Raises:
        RuntimeError: if a gradient would be wanted.
    """
    refuse_gradients(q, k_cache, v_cache, spec.slopes, spec.sinks)
    if recorded() and not torch.compiler.is_compiling():
        flops.announce()
    if needs_plain_torch([t for t in (q, k_cache, v_cache, spec.slopes, spec.sinks) if t is not None]):
        return reference.forward(q, k_cache, v_cache, spec)
    return _decode_op(q, k_cache, v_cache, *spec)
