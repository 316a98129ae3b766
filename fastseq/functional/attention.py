"""Attention with everything that may shape it, its gradient from outside, and the merge of attentions over parts of the keys.

Letters: B batch, Hq query heads, Hkv key heads (Hq a multiple of Hkv, query head h reads key head h // (Hq / Hkv)), Tq queries,
Tk keys, E features of q and k, Ev of v, N rows of all sequences together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import attention as ops
from . import _nested
from ._attention_call import Call, prepared, rows

__all__ = ["attention", "attention_grad", "merge_attention"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: str = "bhte",
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool | str = False,
    window: Sequence[int | None] | None = None,
    align: str = "top_left",
    offset: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    relative_bias: Tensor | None = None,
    relative_bias_zero: int | None = None,
    relative_query: Tensor | None = None,
    relative_key: Tensor | None = None,
    relative_key_zero: int | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    q_lengths: Tensor | None = None,
    k_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    block_layout: Tensor | None = None,
    block_size: int | None = None,
    return_lse: bool = False,
    return_weights: bool | str = False,
) -> Any:
    """softmax(scores) v, where the scores of query i at place p = i + ``offset`` (+ Tk - Tq if aligned ``"bottom_right"``) are

    softcap(scale (q_i . k_j + relative_query_i . relative_key[j - p])) + bias_ij - slope |j - p| + relative_bias[j - p].

    All features combine. A query that sees no key gives zeros, with zero gradients. NaN or infinity in a key or value that a mask
    hides may still reach the result.

    Args:
        q: ``[B, Hq, Tq, E]``, ``[B, Tq, Hq, E]`` with ``layout="bthe"``, or packed ``[N, Hq, E]`` with ``cu_seqlens_q``; fp16,
            bf16, fp32 or fp64. Jagged nested tensors of either layout work likewise, and then give nested results.
        k, v: likewise with Hkv heads; v with Ev features.
        mask: bool, True where a query attends: ``[Tq, Tk]``, ``[Hq, Tq, Tk]`` or ``[B, Hq, Tq, Tk]``, any dimension may be 1.
        bias: added to the scores, shapes as ``mask``; dtype that of q, or fp32 beside a 16-bit q. Its gradient is summed over the
            dimensions that are 1.
        causal: ``True`` or ``"top_left"``: query i sees the keys j <= p; ``"bottom_right"`` also aligns the last query with the
            last key.
        window: ``(left, right)``: query i sees the keys p - left .. p + right; None or -1: unlimited.
        align: where queries stand that are fewer than the keys: ``"top_left"`` or ``"bottom_right"``.
        offset: added to the place of every query.
        scale: of the products; None: 1 / sqrt(E).
        softcap: if not 0, softcap tanh(scores / softcap) takes the place of the scaled products.
        alibi_slopes: ``[Hq]`` or ``[B, Hq]``; no gradient.
        relative_bias: ``[Hq or 1, L]``; entry ``relative_bias_zero`` (None: L // 2, if L is odd) is for distance 0, those after
            it for later keys; beyond the table 0. With gradient; dtype as ``bias``.
        relative_query: as q, with ``relative_key`` ``[Hq or 1, M, E]`` whose row ``relative_key_zero`` is for distance 0.
        sinks: ``[Hq]``, one more score for each query, of a key without a value; with gradient; dtype as ``bias``.
        dropout: probability with which weights are zeroed (whether training or not); ``torch.manual_seed`` repeats it.
        q_lengths, k_lengths: int32 or int64 ``[B]``, valid queries and keys of padded sequences. Values are checked on the CPU
            only: on a GPU that would mean to wait for it. Rows beyond give zeros.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 ``[B + 1]``: sequence b lies in the packed rows cu[b] .. cu[b + 1]. Checked
            likewise.
        max_seqlen_q, max_seqlen_k: length of the longest packed sequence, or more; None: found, if the cu_seqlens are on the CPU.
        block_layout: bool ``[.., Tq / block_size, Tk / block_size]`` (rounded up; packed: of the longest), before it Hq or 1 and
            B or 1; False hides a block, which costs nothing then.
        block_size: power of two, at least 16.
        return_lse: also return the logarithm of the sum of exponentials, ``[B, Hq, Tq]`` or packed ``[Hq, N]``, fp32 (fp64 for
            fp64): -inf where no key is seen. Differentiable.
        return_weights: also return the weights after dropout: True: ``[B, Hq, Tq, Tk]``; ``"average"``: their mean over the heads
            ``[B, Tq, Tk]``, for which no tensor with heads exists. Differentiable. Padded sequences only.

    Returns:
        ``out`` as q, with Ev features; or ``(out, lse)``, ``(out, weights)``, ``(out, lse, weights)``.

    Raises:
        RuntimeError: if ranks, sizes, dtypes, devices, lengths or cu_seqlens do not fit.
        ValueError: if an option has a value that is not accepted, or options contradict each other.
        TypeError: if an argument has a type that is not accepted.
        NotImplementedError: for floating dtypes other than those above.
    """
    if return_weights not in (False, True, "average"):
        raise ValueError(f"return_weights must be False, True or 'average', got {return_weights!r}")
    options: dict[str, Any] = dict(
        layout=layout, mask=mask, bias=bias, causal=causal, window=window, align=align, offset=offset, scale=scale,
        softcap=softcap, alibi_slopes=alibi_slopes, relative_bias=relative_bias, relative_bias_zero=relative_bias_zero,
        relative_query=relative_query, relative_key=relative_key, relative_key_zero=relative_key_zero, sinks=sinks,
        dropout=dropout, q_lengths=q_lengths, k_lengths=k_lengths, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, block_layout=block_layout, block_size=block_size,
    )  # fmt: skip
    if any(isinstance(t, Tensor) and t.is_nested for t in (q, k, v)):
        if return_weights:
            raise ValueError("return_weights goes with padded sequences, not with nested tensors")
        for name in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"):
            if options[name] is not None:
                raise ValueError(f"{name} goes with tensors that are not nested")
        if relative_query is not None:
            options["relative_query"] = _nested.jagged(relative_query, layout).values
        of_q, of_k, of_v = _nested.sequences(q, k, v, layout)
        options |= dict(
            cu_seqlens_q=of_q.offsets, cu_seqlens_k=of_k.offsets, max_seqlen_q=of_q.longest, max_seqlen_k=of_k.longest
        )
        out, lse = ops.attention(*prepared(of_q.values, of_k.values, of_v.values, **options))
        out = of_q.nested(out if layout == "bhte" else out.transpose(0, 1), layout)
        return (out, of_q.nested(lse, "bhte")) if return_lse else out
    call = prepared(q, k, v, **options)
    if return_weights and call.spec.cu_q is not None:
        raise ValueError("return_weights goes with padded sequences, not with cu_seqlens")
    if return_weights:
        out, lse, *weights = ops.attention_with_weights(*call, return_weights == "average")
    else:
        (out, lse), weights = ops.attention(*call), []
    results = [_as_given(out, call, layout), *([lse] if return_lse else []), *weights]
    return results[0] if len(results) == 1 else tuple(results)


def _as_given(tensor: Tensor, call: Call, layout: str) -> Tensor:
    if call.spec.cu_q is not None:
        return tensor.transpose(0, 1)
    return tensor if layout == "bhte" else tensor.transpose(1, 2)


def attention_grad(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, layout: str = "bhte", **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of the share that the keys k and values v have in a larger attention: the backward of ring attention.

    Args:
        dout, out, lse: of the whole attention, shapes as ``attention`` returns them (see :func:`merge_attention`).
        q, k, v, layout, options: as :func:`attention` takes them, but without dropout and nested tensors, and with the ``offset``
            at which this part of the keys lies. Sinks belong into the lse.

    Raises:
        as :func:`attention`.
    """
    if options.get("dropout"):
        raise ValueError("attention_grad cannot know which weights a dropout zeroed")
    call = prepared(q, k, v, layout=layout, **options)
    expected = {
        "dout": (*call.q.shape[:-1], v.shape[-1]),
        "out": (*call.q.shape[:-1], v.shape[-1]),
        "lse": tuple(call.q.shape[:-1]),
    }
    given = {"dout": _as_given(dout, call, layout), "out": _as_given(out, call, layout), "lse": lse}
    for name, tensor in given.items():
        if tuple(tensor.shape) != expected[name]:
            raise RuntimeError(f"{name} must be {list(expected[name])} (heads first), got {list(tensor.shape)}")
        if tensor.device != call.q.device:
            raise RuntimeError(f"{name} must be on the query's device {call.q.device}, got {tensor.device}")
    wide = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    dout, out = (rows(given[name].to(call.q.dtype)) for name in ("dout", "out"))
    lse = lse.to(wide).contiguous()
    dq, dk, dv, *_ = ops.attention_backward(dout, None, call.q, call.k, call.v, out, lse, call.spec, [True] * 3 + [False] * 4)
    return _as_given(dq, call, layout), _as_given(dk, call, layout), _as_given(dv, call, layout)


def merge_attention(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor, *, layout: str = "bhte") -> tuple[Tensor, Tensor]:
    """The attention over two disjoint sets of keys from the attentions over each: ``(out, lse)``.

    Args:
        out1, out2: ``[B, Hq, Tq, Ev]``, ``[B, Tq, Hq, Ev]`` with ``layout="bthe"``, or packed ``[N, Hq, Ev]``; to merge more than
            two without rounding in between, give them in fp32.
        lse1, lse2: ``[B, Hq, Tq]`` or packed ``[Hq, N]``; -inf: no key was seen. Sinks may be in one of them only.

    Everything is differentiable. Results have the dtypes that the arguments promote to.

    Raises:
        RuntimeError: if shapes do not fit.
        ValueError: if ``layout`` is not accepted.
    """
    if layout not in ("bhte", "bthe"):
        raise ValueError(f"layout must be one of bhte, bthe, got {layout!r}")
    swapped = out1.dim() == 3 or layout == "bthe"
    expected = out1.transpose(-3, -2).shape[:-1] if swapped else out1.shape[:-1]
    if out1.shape != out2.shape or lse1.shape != lse2.shape or lse1.shape != expected:
        raise RuntimeError(
            f"out1 and out2 must have one shape, and lse1 and lse2 that shape heads first and without features, got out "
            f"{list(out1.shape)} and {list(out2.shape)}, lse {list(lse1.shape)} and {list(lse2.shape)}"
        )
    highest = torch.maximum(lse1, lse2).detach()
    dead = highest == -torch.inf
    highest = highest.masked_fill(dead, 0)
    first, second = torch.exp(lse1 - highest), torch.exp(lse2 - highest)
    total = (first + second).masked_fill(dead, 1)
    lse = (torch.log(total) + highest).masked_fill(dead, -torch.inf)
    first, second = ((share / total).unsqueeze(-1) for share in (first, second))
    if swapped:
        first, second = first.transpose(-3, -2), second.transpose(-3, -2)
    return (out1 * first + out2 * second).to(torch.promote_types(out1.dtype, out2.dtype)), lse
