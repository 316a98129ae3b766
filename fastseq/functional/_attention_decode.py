"""Attention of new queries against a cache of keys and values, which grows in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypedDict, overload

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from typing_extensions import Unpack

from .._arguments import checked_int, checked_tensor, own_keywords
from ..backends import library
from ..ops import attention_decode as ops
from ..ops._dispatch import PLAIN, plain_call, shared_sequence
from ._attention_call import (
    LAYOUTS,
    Sizes,
    check_dtypes,
    check_tensors,
    checked_lengths,
    checked_scale,
    checked_sinks,
    checked_slopes,
    checked_softcap,
    checked_window,
    default_scale,
    readable,
    rows,
)
from ._autocast import autocast_dtype, without_autocast

__all__ = ["attention_with_kv_cache"]


class CacheOptions(TypedDict, total=False):
    """Keyword arguments of ``attention_with_kv_cache``."""

    k_new: Tensor | None
    v_new: Tensor | None
    block_table: Tensor | None
    layout: Literal["bhsd", "bshd"]
    scale: float | None
    softcap: float
    window_size: Sequence[int | None] | None
    causal: bool
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    num_splits: int


@overload
def attention_with_kv_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    return_lse: Literal[False] = False,
    **options: Unpack[CacheOptions],
) -> Tensor: ...
@overload
def attention_with_kv_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    return_lse: Literal[True],
    **options: Unpack[CacheOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def attention_with_kv_cache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, return_lse: bool, **options: Unpack[CacheOptions]
) -> Any: ...


@own_keywords
def attention_with_kv_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    block_table: Tensor | None = None,
    layout: Literal["bhsd", "bshd"] = "bhsd",
    scale: float | None = None,
    softcap: float = 0.0,
    window_size: Sequence[int | None] | None = None,
    causal: bool = True,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    num_splits: int = 0,
    return_lse: bool = False,
) -> Any:
    """Attention of the latest queries against all keys and values so far; new ones are first written into the cache, in place.

    The last query stands at the last valid key. Inference only. Nothing waits for the device, so a step can be captured in a CUDA
    graph. Entries of the cache that no query sees may hold anything.

    Args:
        q: ``[B, Hq, Tq, E]``, or ``[B, Tq, Hq, E]`` with ``layout="bshd"``; fp16, bf16, fp32 or fp64. Under autocast it takes the
            cache's dtype, as ``k_new`` and ``v_new`` do.
        k_cache: ``[B, Hkv, S, E]`` or ``[B, S, Hkv, E]``; with a block table ``[pages, Hkv, page_size, E]`` or
            ``[pages, page_size, Hkv, E]``. The last dimension is contiguous.
        v_cache: likewise, with Ev features.
        cache_seqlens: int32 or int64 ``[B]``, keys of each sequence in the cache before this call. Without ``k_new`` that
            includes the keys of these queries. Values are checked on the CPU only: on a GPU that would mean to wait for it.
        k_new, v_new: ``[B, Hkv, Tn, E]`` or ``[B, Tn, Hkv, E]`` (v: Ev), written behind the first ``cache_seqlens`` keys.
        block_table: int32 or int64 ``[B, max_pages]``: key j of sequence b lies in page block_table[b, j // page_size], at
            j % page_size. Entries of pages that nothing is read from or written to may hold anything.
        layout: ``"bhsd"`` or ``"bshd"``.
        scale: of the products; None: 1 / sqrt(E).
        softcap: if not 0, softcap tanh(scores / softcap) takes the place of the scaled products.
        window_size: ``(left, right)``: the query at place p sees the keys p - left .. p + right; None or -1: unlimited.
        causal: a query sees no key after its place.
        alibi_slopes: ``[Hq]`` or ``[B, Hq]``.
        sinks: ``[Hq]``, one more score for each query, of a key without a value.
        num_splits: parts that the keys are cut into, to occupy a device with few sequences; 0: chosen.
        return_lse: also return the logarithm of the sum of exponentials, ``[B, Hq, Tq]``, fp32 (fp64 for fp64).

    Returns:
        ``out`` as q, with Ev features, or ``(out, lse)``. A query that sees no key gives zeros and -inf.

    Raises:
        RuntimeError: if ranks, sizes, dtypes, devices, lengths or pages do not fit, or a gradient would be wanted.
        ValueError: if an option has a value that is not accepted, or only one of ``k_new`` and ``v_new`` is given.
        TypeError: if an argument has a type that is not accepted.
        NotImplementedError: for floating dtypes other than those above.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if (k_new is None) != (v_new is None):
        raise ValueError("k_new and v_new go together")
    softcap = 0.0 if type(softcap) is float and not softcap else checked_softcap(softcap)
    scale = None if scale is None else checked_scale(scale)
    if (type(num_splits) is not int or num_splits) and checked_int("num_splits", num_splits) < 0:
        raise ValueError(f"num_splits must not be negative (0: chosen), got {num_splits}")
    left, right = (-1, 0) if causal is True and window_size is None else checked_window(causal, window_size)
    if plain_call(unseen=True):
        given = (q, k_cache, v_cache, cache_seqlens, k_new, v_new, block_table, alibi_slopes, sinks)
        results = _natively(given, layout == "bshd", scale, softcap, left, right, num_splits)
        if results:
            return (results[0], results[1]) if return_lse else results[0]
    if shared_sequence() is not None:
        raise RuntimeError("a cache is not shared among ranks: call attention_with_kv_cache outside of context_parallel")
    checked_tensor("cache_seqlens", cache_seqlens)
    others = {
        "cache_seqlens": cache_seqlens,
        "k_new": k_new,
        "v_new": v_new,
        "block_table": block_table,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
    }
    check_tensors({"q": q, "k_cache": k_cache, "v_cache": v_cache}, **others)
    ops.refuse_gradients(q, k_cache, v_cache, k_new, v_new, alibi_slopes, sinks)
    if autocast_dtype(q.device.type) is not None:
        q = q.to(k_cache.dtype)
        k_new, v_new = (t if t is None else t.to(k_cache.dtype) for t in (k_new, v_new))
    check_dtypes({"q": q, "k_cache": k_cache, "v_cache": v_cache})

    for name, value in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("k_new", k_new), ("v_new", v_new)):
        if value is not None and value.dim() != 4:
            shape = "[B, H, T, E]" if layout == "bhsd" else "[B, T, H, E]"
            raise RuntimeError(f"{name} must be {shape} (a cache in pages: B pages of T keys), got {list(value.shape)}")
    if layout == "bshd":
        q, k_cache, v_cache = q.transpose(1, 2), k_cache.transpose(1, 2), v_cache.transpose(1, 2)
        k_new, v_new = (t if t is None else t.transpose(1, 2) for t in (k_new, v_new))
    batch, heads, queries, features = q.shape
    capacity = _capacity(q, k_cache, v_cache, block_table)
    if k_new is not None and v_new is not None:
        _check_new(q, k_new, k_cache, "k")
        _check_new(q, v_new, v_cache, "v")
        if k_new.shape[2] != v_new.shape[2]:
            raise RuntimeError(f"k_new and v_new must be of one length, got {k_new.shape[2]} and {v_new.shape[2]}")
    more = 0 if k_new is None else k_new.shape[2]
    if capacity < more:
        raise RuntimeError(f"the cache has room for {capacity} keys of each sequence, k_new brings {more}")
    before = checked_lengths("cache_seqlens", cache_seqlens, batch, capacity - more)
    total = before + more
    if block_table is not None:
        block_table = _checked_table(block_table, k_cache, total, queries + left if left >= 0 else None, before)
    if alibi_slopes is not None:
        size = Sizes(batch, heads, k_cache.shape[1], queries, capacity, features)
        alibi_slopes = checked_slopes(alibi_slopes, size, q.dtype)
    if sinks is not None:
        sinks = checked_sinks(sinks, q.dtype, heads)

    if k_new is not None and v_new is not None:
        _append(k_cache, k_new, before, block_table)
        _append(v_cache, v_new, before, block_table)
    spec = ops.DecodeSpec(
        lengths=total,
        block_table=block_table,
        slopes=alibi_slopes,
        sinks=sinks,
        scale=default_scale(features) if scale is None else scale,
        softcap=softcap,
        left=left,
        right=right,
        num_splits=num_splits,
    )
    with without_autocast(q.device.type):
        out, lse = ops.attention_decode(rows(q), k_cache, v_cache, spec)
    out = out if layout == "bhsd" else out.transpose(1, 2)
    return (out, lse) if return_lse else out


_native: Any = None  # the library's op, once it is loaded, without a frame of Python around it


def _natively(given: tuple[Any, ...], *options: Any) -> list[Tensor]:
    """out and lse of a plain call (``plain_call``), in one call of the CPU library, which checks everything before it writes.

    Empty: the call is for the other way, which also says what is wrong with it.
    """
    global _native
    gradients = torch.is_grad_enabled()
    for place, tensor in enumerate(given):
        if tensor is None and place > 3:
            continue
        if type(tensor) not in PLAIN or not tensor.is_cpu or (gradients and tensor.requires_grad):
            return []
    if library.reason():
        return []
    if _native is None:
        _native = torch.ops.fastseq_native.attention_with_kv_cache.default._op
    results = _native(*given, *options)
    if results and given[4] is not None:
        increment_version(given[1:3])
    return results


def _capacity(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor | None) -> int:
    """Keys that a sequence may have. Tensors are heads first."""
    batch, heads, _, features = q.shape
    if k_cache.shape[:-1] != v_cache.shape[:-1]:
        raise RuntimeError(
            f"k_cache and v_cache must agree in all but features, got {list(k_cache.shape)} and {list(v_cache.shape)}"
        )
    if k_cache.shape[3] != features:
        raise RuntimeError(f"q and k_cache must have the same features, got {features} and {k_cache.shape[3]}")
    heads_k = k_cache.shape[1]
    if heads != heads_k and (heads_k == 0 or heads % heads_k):
        raise RuntimeError(f"q's heads must be a multiple of those of the cache, got {heads} and {heads_k}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.stride(-1) != 1 and cache.shape[-1] > 1:
            raise RuntimeError(f"the last dimension of {name} must be contiguous, got strides {cache.stride()} (heads first)")
    if block_table is None:
        if k_cache.shape[0] != batch:
            raise RuntimeError(f"q and k_cache must have one batch size, got {batch} and {k_cache.shape[0]}")
        return k_cache.shape[2]
    if block_table.dtype not in (torch.int32, torch.int64) or block_table.dim() != 2 or block_table.shape[0] != batch:
        raise RuntimeError(
            f"block_table must be int32 or int64 [B, max_pages] with B = {batch}, "
            f"got {block_table.dtype} {list(block_table.shape)}"
        )
    return block_table.shape[1] * k_cache.shape[2]


def _check_new(q: Tensor, new: Tensor, cache: Tensor, name: str) -> None:
    if new.shape[:2] != (q.shape[0], cache.shape[1]) or new.shape[3] != cache.shape[3]:
        raise RuntimeError(
            f"{name}_new must be [B, Hkv, Tn, E] = [{q.shape[0]}, {cache.shape[1]}, Tn, {cache.shape[3]}] (heads first), "
            f"got {list(new.shape)}"
        )
    if new.dtype != cache.dtype:
        raise RuntimeError(f"{name}_new must have the cache's dtype {cache.dtype}, got {new.dtype}")


def _checked_table(table: Tensor, cache: Tensor, total: Tensor, reach: int | None, before: Tensor) -> Tensor:
    """int32, contiguous; the entries in use name pages. `reach`: keys before the end that a query may see; None: all."""
    if readable(table) and readable(total):
        size = cache.shape[2]
        first = torch.arange(table.shape[1]) * size
        used = first < total[:, None]
        if reach is not None:
            used &= first + size > torch.minimum(total - reach, before)[:, None]
        wrong = used & ((table < 0) | (table >= cache.shape[0]))
        if wrong.any():
            b, entry = wrong.nonzero()[0].tolist()
            raise RuntimeError(f"block_table[{b}, {entry}] is {table[b, entry].item()}, but the cache has {cache.shape[0]} pages")
    return table.to(torch.int32).contiguous()


def _append(cache: Tensor, new: Tensor, before: Tensor, block_table: Tensor | None) -> None:
    """Writes ``new`` [B, Hkv, Tn, E] behind the first ``before`` keys."""
    places = before.long()[:, None] + torch.arange(new.shape[2], device=new.device)  # [B, Tn]
    if block_table is None:
        first = torch.arange(new.shape[0], device=new.device)[:, None]
    else:
        first = block_table.gather(1, places // cache.shape[2]).long()
        places = places % cache.shape[2]
    cache.transpose(1, 2).index_put_((first, places), new.transpose(1, 2))
