"""The functions of the flash-attn package (version 2), by the same names, arguments and meaning, on every device and dtype.

Source of the interface: https://github.com/Dao-AILab/flash-attention, ``flash_attn/flash_attn_interface.py``. Letters as in
``fastseq.functional.attention``; tensors are ``[B, T, H, E]``, packed sequences ``[N, H, E]``. The last query stands at the last
key: ``causal`` and ``window_size`` count from there, and query i of Tq sees the keys i + Tk - Tq - left .. i + Tk - Tq + right.

What differs: head dims are not limited to 256 on the CPU, fp32 and fp64 work, results are always deterministic, the logarithm
of the sum of exponentials of a query that sees no key is -inf (there +inf), and the third result of ``return_attn_probs``, the
dropped weights meant for flash-attn's own tests, is None.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._arguments import checked_tensor, own_keywords
from ..functional import attention, attention_with_kv_cache

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Window = tuple[int, int]
_UNLIMITED = (-1, -1)


@own_keywords
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = _UNLIMITED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of padded sequences.

    Args:
        q: ``[B, Tq, Hq, E]``.
        k, v: ``[B, Tk, Hkv, E]``, Hq a multiple of Hkv.
        dropout_p: probability with which weights are zeroed, whether training or not.
        softmax_scale: None: 1 / sqrt(E).
        causal: query i sees keys up to its own place, counted from the last query and the last key.
        window_size: (left, right), -1: unlimited.
        softcap: 0: none.
        alibi_slopes: fp32 ``[Hq]`` or ``[B, Hq]``.
        deterministic: accepted; the gradients always are.
        return_attn_probs: return ``(out, lse [B, Hq, Tq], None)``.

    Returns:
        out, ``[B, Tq, Hq, E]``.

    Raises:
        as ``fastseq.functional.attention``.
    """
    return _results(
        attention(
            q,
            k,
            v,
            layout="bshd",
            **_options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes),
            return_lse=True,
        ),
        return_attn_probs,
    )


@own_keywords
def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = _UNLIMITED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """``flash_attn_func`` with k and v in one tensor ``[B, Tk, 2, Hkv, E]``.

    Other arguments, results and errors are those of :func:`flash_attn_func`.

    Args:
        q: ``[B, Tq, Hq, E]``.
        kv: ``[B, Tk, 2, Hkv, E]``.
    """
    k, v = _unpacked("kv", kv, 5, 2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


@own_keywords
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = _UNLIMITED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """``flash_attn_func`` with q, k and v in one tensor ``[B, T, 3, H, E]``.

    Other arguments, results and errors are those of :func:`flash_attn_func`.

    Args:
        qkv: ``[B, T, 3, H, E]``.
    """
    q, k, v = _unpacked("qkv", qkv, 5, 3)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


@own_keywords
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = _UNLIMITED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Attention of packed sequences: sequence b lies in the rows cu_seqlens[b] .. cu_seqlens[b + 1].

    Args:
        q: ``[Nq, Hq, E]``.
        k, v: ``[Nk, Hkv, E]``; with ``block_table`` ``[pages, page_size, Hkv, E]``.
        cu_seqlens_q, cu_seqlens_k: int32 ``[B + 1]``.
        max_seqlen_q, max_seqlen_k: length of the longest sequence, or more.
        block_table: int32 ``[B, max_pages]``: key j of sequence b lies in page block_table[b, j // page_size]; they are gathered
            first.

    Other arguments are those of :func:`flash_attn_func`; lse is ``[Hq, Nq]``.
    """
    checked_tensor("cu_seqlens_q", cu_seqlens_q)
    checked_tensor("cu_seqlens_k", cu_seqlens_k)
    if block_table is not None:
        k, v = _gathered(k, v, cu_seqlens_k, max_seqlen_k, block_table)
    return _results(
        attention(
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            **_options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes),
            return_lse=True,
        ),
        return_attn_probs,
    )


@own_keywords
def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = _UNLIMITED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """``flash_attn_varlen_func`` with k and v in one tensor ``[Nk, 2, Hkv, E]``.

    Other arguments, results and errors are those of :func:`flash_attn_varlen_func`.

    Args:
        q: ``[Nq, Hq, E]``.
        kv: ``[Nk, 2, Hkv, E]``.
    """
    k, v = _unpacked("kv", kv, 4, 2)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


@own_keywords
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = _UNLIMITED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """``flash_attn_varlen_func`` with q, k and v in one tensor ``[N, 3, H, E]``.

    Other arguments, results and errors are those of :func:`flash_attn_varlen_func`.

    Args:
        qkv: ``[N, 3, H, E]``.
        cu_seqlens, max_seqlen: of queries and keys alike.
    """
    q, k, v = _unpacked("qkv", qkv, 4, 3)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


@own_keywords
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = _UNLIMITED,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention against a cache, to which k and v are first appended in place. Inference only.

    Args:
        q: ``[B, Tq, Hq, E]``.
        k_cache, v_cache: ``[rows, S, Hkv, E]``, row b of a sequence or row cache_batch_idx[b]; with ``block_table``
            ``[pages, page_size, Hkv, E]``.
        k, v: ``[B, Tn, Hkv, E]``, written behind the first ``cache_seqlens`` keys.
        rotary_cos, rotary_sin: ``[places, R / 2]``, R <= E: the first R features of k are rotated by the place at which they are
            written, those of q likewise if ``causal`` or within a window, else by the place of the first new key. Only with k.
        cache_seqlens: int or int32 ``[B]``, keys in the cache before this call; None: all S.
        cache_batch_idx: int32 ``[B]``, without repetition if k is given.
        cache_leftpad: int32 ``[B]``, where the keys of a sequence begin; ``cache_seqlens`` counts from the start of its row. Rows
            and keys of the cache must then lie one behind the other in memory.
        block_table: int32 ``[B, max_pages]``.
        rotary_interleaved: features 0 and 1, 2 and 3, .. are rotated together; else features f and f + R / 2.
        num_splits: parts that the keys are cut into; 0: chosen.
        return_softmax_lse: return ``(out, lse [B, Hq, Tq])``.

    Other arguments are those of :func:`flash_attn_func`.

    Raises:
        ValueError: if arguments contradict each other or one that is needed is missing.
        as ``fastseq.functional.attention_with_kv_cache``.
    """
    _together("k", k, "v", v)
    _together("rotary_cos", rotary_cos, "rotary_sin", rotary_sin)
    if rotary_cos is not None and k is None:
        raise ValueError("rotary_cos and rotary_sin go with new keys, k and v")
    if k is not None and cache_seqlens is None:
        raise ValueError("cache_seqlens is needed with k and v: it says where they are written")
    if block_table is not None and (cache_batch_idx is not None or cache_leftpad is not None):
        raise ValueError("block_table goes without cache_batch_idx and cache_leftpad")
    for name, given in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if checked_tensor(name, given).dim() != 4:
            raise RuntimeError(
                f"{name} must be [B, T, H, E] (a cache in pages: [pages, page_size, H, E]), got {list(given.shape)}"
            )
    for name, maybe in (("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad), ("block_table", block_table)):
        if maybe is not None:
            checked_tensor(name, maybe)
    if not isinstance(cache_seqlens, (int, Tensor, type(None))):
        raise TypeError(f"cache_seqlens must be an int or a Tensor [B], not {type(cache_seqlens).__name__}")
    batch = q.shape[0]
    if cache_seqlens is None:
        cache_seqlens = k_cache.shape[1] if block_table is None else block_table.shape[1] * k_cache.shape[1]
    if not isinstance(cache_seqlens, Tensor):
        cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    if rotary_cos is not None and rotary_sin is not None and k is not None:
        fixed = not causal and tuple(window_size) == _UNLIMITED
        q = _rotated(q, rotary_cos, rotary_sin, cache_seqlens, rotary_interleaved, fixed)
        k = _rotated(k, rotary_cos, rotary_sin, cache_seqlens, rotary_interleaved, False)
    if cache_leftpad is not None:
        k_cache, v_cache, block_table = _behind_padding(k_cache, v_cache, cache_leftpad, cache_batch_idx, batch)
        cache_seqlens = cache_seqlens - cache_leftpad
    elif cache_batch_idx is not None:
        block_table = cache_batch_idx[:, None]  # each row of the cache is a page
    return attention_with_kv_cache(
        q,
        k_cache,
        v_cache,
        cache_seqlens=cache_seqlens,
        k_new=k,
        v_new=v,
        block_table=block_table,
        layout="bshd",
        scale=softmax_scale,
        softcap=softcap,
        window_size=window_size,
        causal=causal,
        alibi_slopes=alibi_slopes,
        num_splits=num_splits,
        return_lse=return_softmax_lse,
    )


def _options(
    dropout_p: float, softmax_scale: float | None, causal: bool, window_size: Window, softcap: float, alibi_slopes: Tensor | None
) -> dict[str, Any]:
    """What the functions without a cache share, as ``attention`` calls it."""
    return dict(
        dropout_p=dropout_p,
        scale=softmax_scale,
        causal=causal,
        alignment="bottom_right",
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
    )


def _results(results: tuple[Tensor, Tensor], with_lse: bool) -> Tensor | tuple[Tensor, Tensor, None]:
    out, lse = results
    return (out, lse, None) if with_lse else out


def _unpacked(name: str, packed: Tensor, rank: int, count: int) -> tuple[Tensor, ...]:
    if checked_tensor(name, packed).dim() != rank or packed.shape[-3] != count:
        leading = "B, T" if rank == 5 else "N"
        raise RuntimeError(f"{name} must be [{leading}, {count}, H, E], got {list(packed.shape)}")
    return packed.unbind(-3)


def _together(name: str, given: Tensor | None, other_name: str, other: Tensor | None) -> None:
    if (given is None) != (other is None):
        raise ValueError(f"{name} and {other_name} go together")


def _gathered(k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, block_table: Tensor) -> tuple[Tensor, Tensor]:
    """Packed k and v from their pages."""
    batch, size = block_table.shape[0], k.shape[1]
    if longest > block_table.shape[1] * size:
        raise RuntimeError(f"max_seqlen_k is {longest}, but block_table has room for {block_table.shape[1]} pages of {size} keys")
    cu = cu_seqlens.long()
    # a GPU knows alone how many keys there are: room for as many as there may be
    total = int(cu[-1]) if cu.device.type == "cpu" else batch * longest
    row = torch.arange(total, device=k.device)
    b = (torch.searchsorted(cu, row, right=True) - 1).clamp(0, batch - 1)
    place = (row - cu[b]).clamp(0, longest - 1)
    page = block_table[b, place // size].long().clamp(0, k.shape[0] - 1)
    return k[page, place % size], v[page, place % size]


def _behind_padding(
    k_cache: Tensor, v_cache: Tensor, leftpad: Tensor, batch_idx: Tensor | None, batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A cache whose sequences begin at ``leftpad`` as one in pages of one key: [rows S, 1, Hkv, E] and the table int64 [B, S]."""
    rows, keys = k_cache.shape[:2]
    first = torch.arange(batch, device=k_cache.device) if batch_idx is None else batch_idx.long()
    place = leftpad.long()[:, None] + torch.arange(keys, device=k_cache.device)
    pages = [cache.view(rows * keys, 1, *cache.shape[2:]) for cache in (k_cache, v_cache)]
    beyond = rows * keys  # no page: what does not fit into its own row must not go on in the next
    return pages[0], pages[1], (first[:, None] * keys + place).where(place < keys, beyond)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, begin: Tensor, interleaved: bool, fixed: bool) -> Tensor:
    """x [B, T, H, E], its first features rotated by the places from ``begin`` on, or by that place itself (``fixed``)."""
    width = 2 * cos.shape[-1]
    if cos.dim() != 2 or cos.shape != sin.shape or width > x.shape[-1]:
        raise RuntimeError(
            f"rotary_cos and rotary_sin must be [places, R / 2] with R at most {x.shape[-1]}, "
            f"got {list(cos.shape)} and {list(sin.shape)}"
        )
    place = begin.long()[:, None] + (0 if fixed else torch.arange(x.shape[1], device=x.device))  # [B, T or 1]
    rotary, rest = x[..., :width].to(torch.promote_types(x.dtype, torch.float32)), x[..., width:]
    cos, sin = (table[place][:, :, None].to(rotary.dtype) for table in (cos, sin))  # [B, T or 1, 1, R / 2]
    first, second = (rotary[..., ::2], rotary[..., 1::2]) if interleaved else rotary.chunk(2, -1)
    turned = (first * cos - second * sin, first * sin + second * cos)
    rotary = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat((rotary.to(x.dtype), rest), -1)
