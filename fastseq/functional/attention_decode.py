"""Attention of new queries against a cache of keys and values, which grows in place."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import attention_decode as ops
from ._attention_call import (
    LAYOUTS,
    Sizes,
    added,
    check_dtypes,
    check_tensors,
    checked_lengths,
    checked_slopes,
    checked_window,
    default_scale,
    readable,
    rows,
)
from ._autocast import autocast_dtype, without_autocast

__all__ = ["attention_with_kv_cache"]


def attention_with_kv_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    lengths: Tensor,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    block_table: Tensor | None = None,
    layout: str = "bhte",
    scale: float | None = None,
    softcap: float = 0.0,
    window: Sequence[int | None] | None = None,
    causal: bool = True,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    splits: int = 0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the latest queries against all keys and values so far; new ones are first written into the cache, in place.

    The last query stands at the last valid key. Inference only. Nothing waits for the device, so a step can be captured in a CUDA
    graph. Entries of the cache that no query sees may hold anything.

    Args:
        q: ``[B, Hq, Tq, E]``, or ``[B, Tq, Hq, E]`` with ``layout="bthe"``; fp16, bf16, fp32 or fp64. Under autocast it takes the
            cache's dtype, as ``k_new`` and ``v_new`` do.
        k_cache: ``[B, Hkv, S, E]`` or ``[B, S, Hkv, E]``; with a block table ``[pages, Hkv, page_size, E]`` or
            ``[pages, page_size, Hkv, E]``. The last dimension is contiguous.
        v_cache: likewise, with Ev features.
        lengths: int32 or int64 ``[B]``, keys of each sequence in the cache before this call. Without ``k_new`` that includes the
            keys of these queries. Values are checked on the CPU only: on a GPU that would mean to wait for it.
        k_new, v_new: ``[B, Hkv, Tn, E]`` or ``[B, Tn, Hkv, E]`` (v: Ev), written at the places lengths .. lengths + Tn - 1.
        block_table: int32 or int64 ``[B, max_pages]``: key j of sequence b lies in page block_table[b, j // page_size], at
            j % page_size. Entries of pages that nothing is read from or written to may hold anything.
        layout: ``"bhte"`` or ``"bthe"``.
        scale: of the products; None: 1 / sqrt(E).
        softcap: if not 0, softcap tanh(scores / softcap) takes the place of the scaled products.
        window: ``(left, right)``: the query at place p sees the keys p - left .. p + right; None or -1: unlimited.
        causal: a query sees no key after its place.
        alibi_slopes: ``[Hq]`` or ``[B, Hq]``.
        sinks: ``[Hq]``, one more score for each query, of a key without a value.
        splits: parts that the keys are cut into, to occupy a device with few sequences; 0: chosen.
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
    if not isinstance(causal, bool):
        raise ValueError(f"causal must be a bool, got {causal!r}: the last query always stands at the last key")
    if (k_new is None) != (v_new is None):
        raise ValueError("k_new and v_new go together")
    if not (softcap >= 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap must be finite and not negative (0: none), got {softcap}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if not isinstance(splits, int) or splits < 0:
        raise ValueError(f"splits must be an int and not negative (0: chosen), got {splits!r}")
    left, right, _ = checked_window(causal, window, "bottom_right")
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be a Tensor, not {type(lengths).__name__}")
    others = {
        "lengths": lengths,
        "k_new": k_new,
        "v_new": v_new,
        "block_table": block_table,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
    }
    check_tensors(q, k_cache, v_cache, **others)
    ops.refuse_gradients(q, k_cache, v_cache, k_new, v_new, alibi_slopes, sinks)
    if autocast_dtype(q.device.type) is not None:
        q = q.to(k_cache.dtype)
        k_new, v_new = (t if t is None else t.to(k_cache.dtype) for t in (k_new, v_new))
    check_dtypes(q, k_cache, v_cache)

    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("k_new", k_new), ("v_new", v_new)):
        if tensor is not None and tensor.dim() != 4:
            shape = "[B, H, T, E]" if layout == "bhte" else "[B, T, H, E]"
            raise RuntimeError(f"{name} must be {shape} (a cache in pages: B pages of T keys), got {list(tensor.shape)}")
    if layout == "bthe":
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
    lengths = checked_lengths("lengths", lengths, batch, capacity - more)
    total = lengths + more
    if block_table is not None:
        block_table = _checked_table(block_table, k_cache, total, queries + left if left >= 0 else None, lengths)
    if alibi_slopes is not None:
        size = Sizes(batch, heads, k_cache.shape[1], queries, capacity, features)
        alibi_slopes = checked_slopes(alibi_slopes, size, q.dtype)
    if sinks is not None:
        sinks = added("sinks", sinks, q.dtype).contiguous()
        if sinks.shape != (heads,):
            raise RuntimeError(f"sinks must be [Hq] = [{heads}], got {list(sinks.shape)}")

    if k_new is not None and v_new is not None:
        _append(k_cache, k_new, lengths, block_table)
        _append(v_cache, v_new, lengths, block_table)
    scale = default_scale(features) if scale is None else float(scale)
    with without_autocast(q.device.type):
        out, lse = ops.attention_decode(
            rows(q), k_cache, v_cache, total, block_table, alibi_slopes, sinks, scale, float(softcap), left, right, splits
        )
    out = out if layout == "bhte" else out.transpose(1, 2)
    return (out, lse) if return_lse else out


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


def _checked_table(table: Tensor, cache: Tensor, total: Tensor, reach: int | None, lengths: Tensor) -> Tensor:
    """int32, contiguous; the entries in use name pages. `reach`: keys before the end that a query may see; None: all."""
    if readable(table) and readable(total):
        size = cache.shape[2]
        first = torch.arange(table.shape[1]) * size
        used = first < total[:, None]
        if reach is not None:
            used &= first + size > torch.minimum(total - reach, lengths)[:, None]
        wrong = used & ((table < 0) | (table >= cache.shape[0]))
        if wrong.any():
            b, entry = wrong.nonzero()[0].tolist()
            raise RuntimeError(f"block_table[{b}, {entry}] is {table[b, entry].item()}, but the cache has {cache.shape[0]} pages")
    return table.to(torch.int32).contiguous()


def _append(cache: Tensor, new: Tensor, lengths: Tensor, block_table: Tensor | None) -> None:
    """Writes ``new`` [B, Hkv, Tn, E] behind the first ``lengths`` keys."""
    places = lengths.long()[:, None] + torch.arange(new.shape[2], device=new.device)  # [B, Tn]
    if block_table is None:
        first = torch.arange(new.shape[0], device=new.device)[:, None]
    else:
        first = block_table.gather(1, places // cache.shape[2]).long()
        places = places % cache.shape[2]
    cache.transpose(1, 2).index_put_((first, places), new.transpose(1, 2))
