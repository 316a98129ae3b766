"""Attention with everything that may shape it, its gradient from outside, and the merge of attentions over parts of the keys.

Letters: B batch, Hq query heads, Hkv key heads (Hq a multiple of Hkv, query head h reads key head h // (Hq / Hkv)), Tq queries,
Tk keys, E features of q and k, Ev of v, N rows of all sequences together. In names of layouts, as elsewhere, s is the sequence, d
the features and t the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any, Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from .._arguments import check_keywords, own_keywords
from ..backends import library
from ..ops import _attention_eager as eager
from ..ops import attention as ops
from ..ops._dispatch import PLAIN, plain_call, shared_sequence
from . import _nested
from ._attention_call import (
    ALIGNMENTS,
    INTEGERS,
    LAYOUTS,
    MAY_BE_NONE,
    MOST_HEADS,
    NUMBERS,
    Alignment,
    AttentionOptions,
    Call,
    Layout,
    Options,
    check_tensors,
    checked_layout,
    prepared,
    prepared_plainly,
    rows,
    shows_options,
    takes_options,
)
from ._torch_attention import attention_and_lse, attention_and_weights, attention_output, seeded

__all__ = ["attention", "attention_grad", "merge_attention"]

# of the shortest way, whose names are looked up once
_CAUSAL, _CAUSAL_LAST = eager.CAUSAL, eager.CAUSAL | eager.BOTTOM_RIGHT
_LAID_OUT, _TIME_FIRST, _SCALED = eager.LAID_OUT, eager.LAID_OUT | eager.TIME_FIRST, eager.SCALED
_shortest = eager.shortest
_grad_enabled = torch.is_grad_enabled


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = False,
    return_weights: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[True],
    return_weights: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = False,
    return_weights: Literal[True, "average"],
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[True],
    return_weights: Literal[True, "average"],
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: bool = False,
    return_weights: bool | Literal["average"] = False,
    **options: Unpack[AttentionOptions],
) -> Any: ...


@shows_options()
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: Layout | None = None,
    attn_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    causal: bool = False,
    alignment: Alignment | None = None,
    scale: float | None = None,
    relative_bias: Tensor | None = None,
    relative_bias_zero: int | None = None,
    dropout_p: float = 0.0,
    seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    return_weights: bool | Literal["average"] = False,
    **options: Any,
) -> Any:
    """softmax(scores) v for q, k and v heads first, ``[B, H, T, E]``, unless ``layout`` says otherwise.

    The scores of query i at place p = i + ``offset`` (+ Tk - Tq if aligned ``"bottom_right"``) are

    softcap(scale (q_i . k_j + relative_query_i . relative_key[j - p])) + attn_bias_ij - slope |j - p| + relative_bias[j - p].

    All features combine. A query that sees no key gives zeros, with zero gradients. NaN or infinity in a key or value that a mask
    hides may still reach the result.

    Args:
        q: ``[B, Hq, Tq, E]``, ``[B, Tq, Hq, E]`` with ``layout="bshd"``, or packed ``[N, Hq, E]`` with ``cu_seqlens_q``; fp16,
            bf16, fp32 or fp64. Jagged nested tensors of either padded layout work likewise, and then give nested results.
        k, v: likewise with Hkv heads; v with Ev features.
        layout: ``"bhsd"``, ``"bshd"`` or ``"thd"`` (packed); None: ``"thd"`` with ``cu_seqlens_q``, else ``"bhsd"``.
        attn_mask: bool, True where a query attends: ``[Tq, Tk]``, ``[Hq, Tq, Tk]`` or ``[B, Hq, Tq, Tk]``, or 1 for any of them.
        attn_bias: added to the scores, shapes as ``attn_mask``; dtype that of q, or fp32 beside a 16-bit q. Its gradient is
            summed over the dimensions that are 1.
        causal: query i sees the keys j <= p.
        window_size: ``(left, right)``: query i sees the keys p - left .. p + right; None or -1: unlimited.
        alignment: where queries stand among keys of another number: ``"top_left"``, the first at the first key, as ``is_causal``
            of torch's scaled_dot_product_attention has it, or ``"bottom_right"``, the last at the last key, as flash-attn has it.
            Of padded sequences with ``seqlens_q`` or ``seqlens_k`` the last valid ones. None: top left, as far as that is no
            guess: where the numbers differ (packed: are not seen to be equal) and a place matters, for ``causal``,
            ``window_size``, ``alibi_slopes``, ``relative_bias`` or ``relative_key``, it must be given, or else ``offset``.
        offset: added to the place of every query; None: 0.
        scale: of the products; None: 1 / sqrt(E).
        softcap: if not 0, softcap tanh(scores / softcap) takes the place of the scaled products.
        alibi_slopes: ``[Hq]`` or ``[B, Hq]``; no gradient.
        relative_bias: ``[Hq or 1, L]``, a bias by distance; beyond the table 0. With gradient; dtype as ``attn_bias``.
        relative_bias_zero: its entry for distance 0, those after it for later keys; None: L // 2, if L is odd.
        relative_query: as q; goes with ``relative_key``.
        relative_key: ``[Hq or 1, M, E]``, a key for each distance.
        relative_key_zero: its row for distance 0.
        sinks: ``[Hq]``, one more score for each query, of a key without a value; with gradient; dtype as ``attn_bias``.
        dropout_p: probability with which weights are zeroed (whether training or not); ``torch.manual_seed`` repeats it.
        seqlens_q, seqlens_k: int32 or int64 ``[B]``, valid queries and keys of padded sequences. Values are checked on the CPU
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
        ValueError: if an option has a value that is not accepted, options contradict each other, or the alignment is ambiguous.
        TypeError: if an argument has a type that is not accepted, or a name that is not.
        NotImplementedError: for floating dtypes other than those above.

    Warns:
        UserWarning: if q and k, without a ``layout``, have more heads than any model, and more heads than steps.
    """
    plain = return_weights is False and plain_call(True)
    # The shortest way. Between other layers nothing of it is in the caches: each line takes several times as long as in a loop.
    if (
        plain
        and attn_mask is None
        and attn_bias is None
        and relative_bias is None
        and relative_bias_zero is None
        and seqlens_k is None
        and not (options or return_lse)
        and type(dropout_p) is float
        and not dropout_p
        and type(q) is Tensor
        and type(k) is Tensor
        and type(v) is Tensor
        and (scale is None or type(scale) is float)
        and (causal is False or causal is True)
        and (alignment is None or alignment in ALIGNMENTS)
        and (layout is None or layout in LAYOUTS)
        and not (_grad_enabled() or q.is_nested or k.is_nested or v.is_nested)
    ):
        known = _shortest.get(False)
        if known is not None:
            native, how = known
            if causal:
                how |= _CAUSAL_LAST if alignment == "bottom_right" else _CAUSAL
            if layout is not None:
                how |= _TIME_FIRST if layout == "bshd" else _LAID_OUT
            out = native(q, k, v, 0.0, how) if scale is None else native(q, k, v, scale, how | _SCALED)
            if out is not None:
                return out
    if plain and not return_lse and (not options or _says_nothing(options)):
        mask = attn_bias if attn_mask is None else attn_mask if attn_bias is None else NotImplemented
        out = _in_one_call(
            q,
            k,
            v,
            layout,
            mask,
            attn_mask is not None,
            causal,
            alignment,
            scale,
            relative_bias,
            relative_bias_zero,
            dropout_p,
            seqlens_k,
        )
        if out is not None:
            return out
    options |= {
        "layout": layout,
        "attn_mask": attn_mask,
        "attn_bias": attn_bias,
        "causal": causal,
        "alignment": alignment,
        "scale": scale,
        "relative_bias": relative_bias,
        "relative_bias_zero": relative_bias_zero,
        "dropout_p": dropout_p,
        "seqlens_k": seqlens_k,
    }
    call = prepared_plainly(q, k, v, options) if plain and not library.reason() else None
    if call is None:
        return _any_attention(q, k, v, options, return_lse, return_weights)
    out, lse = attention_and_lse(*call, True) if return_lse else (attention_output(*call, True), None)
    out = out.transpose(1, 2) if layout == "bshd" else out
    return (out, lse) if return_lse else out


def _says_nothing(options: Mapping[str, Any]) -> bool:
    """Whether all of them are None, as models hand on what they were not given."""
    for name, given in options.items():
        if given is not None or name not in MAY_BE_NONE:
            return False
    return True


def _any_attention(q: Tensor, k: Tensor, v: Tensor, options: Any, return_lse: bool, return_weights: bool | str) -> Any:
    """`attention` of whatever it is given."""
    check_keywords(attention, options)
    shared = shared_sequence()
    if shared is not None:
        return shared.attention(q, k, v, return_lse, return_weights, options)
    if return_weights not in (False, True, "average"):
        raise ValueError(f"return_weights must be False, True or 'average', got {return_weights!r}")
    given = Options(**options)
    if any(isinstance(t, Tensor) and t.is_nested for t in (q, k, v)):
        if return_weights:
            raise ValueError("return_weights goes with padded sequences, not with nested tensors")
        return _nested_attention(q, k, v, given, return_lse)
    call = prepared(q, k, v, given)
    if return_weights and call.spec.cu_q is not None:
        raise ValueError("return_weights goes with padded sequences, not with cu_seqlens")
    average = return_weights == "average"
    more: list[Tensor] | tuple[Tensor, ...]
    if not return_lse:
        if not return_weights:
            return _as_given(attention_output(*call), call, given.layout)
        out, *more = attention_and_weights(*call, average)
    elif return_weights:
        out, *more = ops.attention_with_weights(*call[:3], seeded(call.q, call.spec), average)
    else:
        out, *more = attention_and_lse(*call)
    return _as_given(out, call, given.layout), *more


def _in_one_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: str | None,
    mask: Any,
    hides: bool,
    causal: bool,
    alignment: str | None,
    scale: float | None,
    table: Tensor | None,
    zero: int | None,
    dropout: float,
    lengths: Tensor | None,
) -> Tensor | None:
    """A plain eager call on the CPU of what torch's function has too; None: for the long way, which also has the checks.

    ``mask``: NotImplemented if there are two; ``hides``: it is bool. ``table`` and ``zero``: a bias by distance.
    """
    if not (type(q) is type(k) is type(v) is Tensor) or q.is_nested or k.is_nested or v.is_nested:
        return None
    if not (q.dim() == k.dim() == v.dim() == 4) or (causal is not False and causal is not True) or type(dropout) not in NUMBERS:
        return None
    swapped = layout == "bshd"
    if not swapped and ((layout is not None and layout != "bhsd") or (layout is None and q.shape[1] > MOST_HEADS)):
        return None
    if scale is not None and (type(scale) is not float or not isfinite(scale)):
        return None
    if alignment is not None and alignment not in ALIGNMENTS:
        return None
    if mask is not None:
        if type(mask) not in PLAIN or not (mask.dtype == torch.bool if hides else mask.is_floating_point()):
            return None
    if lengths is not None or table is not None or zero is not None:
        narrowed = _narrowed(q, k, v, lengths, table, zero, mask, causal, alignment, swapped)
        if narrowed is None:
            return None
        k, v, mask = narrowed
    bottom_right = False
    if causal:
        time = 1 if swapped else 2
        queries = q.shape[time]
        if queries != k.shape[time]:
            if alignment != "bottom_right":
                return None
            causal = bottom_right = queries > 1  # the last query sees every key
    return eager.attended(q, k, v, mask, dropout, causal, scale, True, swapped, bottom_right)


def _narrowed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Any,
    table: Any,
    zero: Any,
    mask: Tensor | None,
    causal: bool,
    alignment: str | None,
    swapped: bool,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """k, v and mask of a call without gradients whose rows have one length, and whose bias by distance is that of one query."""
    if mask is not None or torch.is_grad_enabled():
        return None
    time = 1 if swapped else 2
    keys, queries = k.shape[time], q.shape[time]
    if alignment is None and keys != queries and (causal or table is not None):
        return None  # which is ambiguous
    if lengths is not None:
        if type(lengths) is not Tensor or not lengths.is_cpu or lengths.dtype not in INTEGERS or lengths.dim() != 1:
            return None
        each = lengths.tolist()
        if len(each) != q.shape[0] or not each or each.count(each[0]) != len(each) or not 0 < each[0] <= keys:
            return None
        if v.shape[time] != keys:
            return None
        if each[0] < keys:
            keys = each[0]
            k, v = k.narrow(time, 0, keys), v.narrow(time, 0, keys)
    if table is None:
        return None if zero is not None else (k, v, None)
    heads = q.shape[2 if swapped else 1]
    if queries != 1 or type(table) not in PLAIN or table.dim() != 2 or table.dtype != q.dtype or not table.is_cpu:
        return None
    if zero is None and table.shape[1] % 2:
        zero = table.shape[1] // 2
    if type(zero) is not int or table.shape[0] != heads:
        return None
    first = zero - (keys - 1 if alignment == "bottom_right" else 0)  # of key 0
    if first < 0 or first + keys > table.shape[1]:
        return None  # beyond the table there are zeros
    return k, v, table.narrow(1, first, keys).unsqueeze(1)


def _nested_attention(q: Tensor, k: Tensor, v: Tensor, given: Options, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    for name in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"):
        if getattr(given, name) is not None:
            raise ValueError(f"{name} goes with tensors that are not nested")
    layout = checked_layout(given.layout, False)
    if given.relative_query is not None:
        given.relative_query = _nested.jagged(given.relative_query, layout).values
    of_q, of_k, of_v = _nested.sequences(q, k, v, layout)
    given.layout, given.cu_seqlens_q, given.cu_seqlens_k = "thd", of_q.offsets, of_k.offsets
    given.max_seqlen_q, given.max_seqlen_k = of_q.longest, of_k.longest
    call = prepared(of_q.values, of_k.values, of_v.values, given)
    out, lse = attention_and_lse(*call)
    out = of_q.nested(out if layout == "bhsd" else out.transpose(0, 1), layout)
    return (out, of_q.nested(lse, "bhsd")) if return_lse else out


def _as_given(tensor: Tensor, call: Call, layout: str | None) -> Tensor:
    if call.spec.cu_q is not None:
        return tensor.transpose(0, 1)
    return tensor.transpose(1, 2) if layout == "bshd" else tensor


@takes_options()
def attention_grad(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, **options: Unpack[AttentionOptions]
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of the share that the keys k and values v have in a larger attention: the backward of ring attention.

    Args:
        dout, out, lse: of the whole attention, shapes as ``attention`` returns them (see :func:`merge_attention`).
        q, k, v, options: as :func:`attention` takes them, but without dropout and nested tensors, and with the ``offset`` at
            which this part of the keys lies. Sinks belong into the lse.

    Raises:
        as :func:`attention`.
    """
    given = Options(**options)
    if given.dropout_p:
        raise ValueError("attention_grad cannot know which weights a dropout zeroed")
    check_tensors({"dout": dout, "out": out, "lse": lse})
    call, layout = prepared(q, k, v, given), given.layout
    expected = {
        "dout": (*call.q.shape[:-1], v.shape[-1]),
        "out": (*call.q.shape[:-1], v.shape[-1]),
        "lse": tuple(call.q.shape[:-1]),
    }
    whole = {"dout": _as_given(dout, call, layout), "out": _as_given(out, call, layout), "lse": lse}
    for name, tensor in whole.items():
        if tuple(tensor.shape) != expected[name]:
            raise RuntimeError(f"{name} must be {list(expected[name])} (heads first), got {list(tensor.shape)}")
        if tensor.device != call.q.device:
            raise RuntimeError(f"{name} must be on the query's device {call.q.device}, got {tensor.device}")
    wide = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    dout, out = (rows(whole[name].to(call.q.dtype)) for name in ("dout", "out"))
    lse = lse.to(wide).contiguous()
    dq, dk, dv, *_ = ops.attention_backward(dout, None, call.q, call.k, call.v, out, lse, call.spec, [True] * 3 + [False] * 4)
    return _as_given(dq, call, layout), _as_given(dk, call, layout), _as_given(dv, call, layout)


@own_keywords
def merge_attention(
    out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor, *, layout: Layout | None = None
) -> tuple[Tensor, Tensor]:
    """The attention over two disjoint sets of keys from the attentions over each: ``(out, lse)``.

    Args:
        out1, out2: ``[B, Hq, Tq, Ev]``, ``[B, Tq, Hq, Ev]`` with ``layout="bshd"``, or packed ``[N, Hq, Ev]``; to merge more than
            two without rounding in between, give them in fp32.
        lse1, lse2: ``[B, Hq, Tq]`` or packed ``[Hq, N]``; -inf: no key was seen. Sinks may be in one of them only.
        layout: as :func:`attention` takes it.

    Everything is differentiable. Results have the dtypes that the arguments promote to.

    Raises:
        RuntimeError: if shapes do not fit.
        ValueError: if ``layout`` is not accepted.
        TypeError: if an argument is no tensor.
    """
    check_tensors({"out1": out1, "lse1": lse1, "out2": out2, "lse2": lse2})
    swapped = checked_layout(layout, out1.dim() == 3) != "bhsd"
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
