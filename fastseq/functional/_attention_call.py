"""What ``attention`` accepts: every argument is checked before anything runs, and becomes the op's ``Spec``."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .._arguments import Function, checked_int, checked_number, checked_tensor, is_int, own_keywords
from ..ops._dispatch import PLAIN
from ..ops.attention import Spec
from ._autocast import autocast_dtype, lowered

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Layout = Literal["bhsd", "bshd", "thd"]
LAYOUTS = ("bhsd", "bshd")  # padded
Alignment = Literal["top_left", "bottom_right"]
ALIGNMENTS = ("top_left", "bottom_right")
_SMALLEST_BLOCK = 16
MOST_HEADS = 128  # beyond what models have
INTEGERS = (torch.int32, torch.int64)

_TENSORS = (
    "attn_mask",
    "attn_bias",
    "alibi_slopes",
    "relative_bias",
    "relative_query",
    "relative_key",
    "sinks",
    "seqlens_q",
    "seqlens_k",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "block_layout",
)


class AttentionOptions(TypedDict, total=False):
    """The keyword arguments of ``attention`` but for what it returns: for annotations, with ``Unpack``."""

    layout: Layout | None
    attn_mask: Tensor | None
    attn_bias: Tensor | None
    causal: bool
    window_size: Sequence[int | None] | None
    alignment: Alignment | None
    offset: int | None
    scale: float | None
    softcap: float
    alibi_slopes: Tensor | None
    relative_bias: Tensor | None
    relative_bias_zero: int | None
    relative_query: Tensor | None
    relative_key: Tensor | None
    relative_key_zero: int | None
    sinks: Tensor | None
    dropout_p: float
    seqlens_q: Tensor | None
    seqlens_k: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    block_layout: Tensor | None
    block_size: int | None


@dataclass(slots=True)
class Options:
    """The same with their defaults, as they were given: ``prepared`` checks them."""

    layout: Layout | None = None
    attn_mask: Tensor | None = None
    attn_bias: Tensor | None = None
    causal: bool = False
    window_size: Sequence[int | None] | None = None
    alignment: Alignment | None = None
    offset: int | None = None
    scale: float | None = None
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    relative_bias: Tensor | None = None
    relative_bias_zero: int | None = None
    relative_query: Tensor | None = None
    relative_key: Tensor | None = None
    relative_key_zero: int | None = None
    sinks: Tensor | None = None
    dropout_p: float = 0.0
    seqlens_q: Tensor | None = None
    seqlens_k: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    block_layout: Tensor | None = None
    block_size: int | None = None


class Call(NamedTuple):
    """q, k and v as the op takes them, and the rest."""

    q: Tensor
    k: Tensor
    v: Tensor
    spec: Spec


class Sizes(NamedTuple):
    batch: int
    q_heads: int
    k_heads: int
    tq: int  # packed: the longest
    tk: int
    features: int


def prepared(q: Tensor, k: Tensor, v: Tensor, given: Options) -> Call:
    """The call of the op, or the exception that says what is wrong. Arguments and exceptions: see ``attention``."""
    packed = given.cu_seqlens_q is not None or given.cu_seqlens_k is not None
    layout = checked_layout(given.layout, packed)
    left, right = checked_window(given.causal, given.window_size)
    if given.alignment not in (None, *ALIGNMENTS):
        raise ValueError(f"alignment must be one of {', '.join(ALIGNMENTS)}, got {given.alignment!r}")
    for name in ("offset", "relative_bias_zero", "relative_key_zero", "max_seqlen_q", "max_seqlen_k", "block_size"):
        if getattr(given, name) is not None:
            checked_int(name, getattr(given, name))
    dropout_p = checked_number("dropout_p", given.dropout_p)
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must lie in [0, 1], got {dropout_p}")
    softcap = checked_softcap(given.softcap)
    tensors = {name: getattr(given, name) for name in _TENSORS}
    check_tensors({"q": q, "k": k, "v": v}, **tensors)
    lower = autocast_dtype(q.device.type)
    q, k, v = lowered(q, lower), lowered(k, lower), lowered(v, lower)
    attn_mask, attn_bias, sinks = given.attn_mask, lowered(given.attn_bias, lower), lowered(given.sinks, lower)
    relative_bias = lowered(given.relative_bias, lower)
    relative_query, relative_key = lowered(given.relative_query, lower), lowered(given.relative_key, lower)
    check_dtypes({"q": q, "k": k, "v": v})

    q, k, v = (heads_first(name, t, layout) for name, t in (("q", q), ("k", k), ("v", v)))
    if relative_query is not None:
        relative_query = heads_first("relative_query", relative_query, layout)
    cu_seqlens_q, cu_seqlens_k = given.cu_seqlens_q, given.cu_seqlens_k
    max_seqlen_q, max_seqlen_k = given.max_seqlen_q, given.max_seqlen_k
    if packed:
        for name in ("attn_mask", "attn_bias", "seqlens_q", "seqlens_k"):
            if tensors[name] is not None:
                raise ValueError(f"{name} goes with padded sequences, not with cu_seqlens")
        cu_seqlens_q, max_seqlen_q = _cumulated("q", cu_seqlens_q, max_seqlen_q, q.shape[1])
        cu_seqlens_k, max_seqlen_k = _cumulated("k", cu_seqlens_k, max_seqlen_k, k.shape[1])
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            raise RuntimeError(
                f"cu_seqlens_q and cu_seqlens_k must be of one length, got {cu_seqlens_q.shape[0]} and {cu_seqlens_k.shape[0]}"
            )
    elif max_seqlen_q is not None or max_seqlen_k is not None:
        raise ValueError("max_seqlen_q and max_seqlen_k go with cu_seqlens_q and cu_seqlens_k")
    size = _sizes(q, k, v, layout, cu_seqlens_q, max_seqlen_q, max_seqlen_k)
    if given.layout is None and not packed:
        _warn_if_time_first(size)
    scale = default_scale(size.features) if given.scale is None else checked_scale(given.scale)

    scores = (size.batch, size.q_heads, size.tq, size.tk)
    if attn_mask is not None:
        if attn_mask.dtype != torch.bool:
            raise RuntimeError(
                f"attn_mask must be bool (True: attend), got {attn_mask.dtype}; what is added to the scores is the attn_bias"
            )
        attn_mask = onto_scores("attn_mask", attn_mask, scores)
    if attn_bias is not None:
        attn_bias = onto_scores("attn_bias", added("attn_bias", attn_bias, q.dtype), scores)
    relative_bias_zero, relative_key_zero = given.relative_bias_zero, given.relative_key_zero
    if relative_bias is not None:
        relative_bias = added("relative_bias", relative_bias, q.dtype)
        relative_bias, relative_bias_zero = _table("relative_bias", relative_bias, relative_bias_zero, size.q_heads)
    elif relative_bias_zero is not None:
        raise ValueError("relative_bias_zero goes with relative_bias")
    if relative_query is not None or relative_key is not None or relative_key_zero is not None:
        relative_key = _relative_key(q, relative_query, relative_key, relative_key_zero)
    if sinks is not None:
        sinks = checked_sinks(sinks, q.dtype, size.q_heads)
    slopes = None if given.alibi_slopes is None else checked_slopes(given.alibi_slopes, size, q.dtype)
    if given.alignment is None and given.offset is None:
        _refuse_ambiguity(given, left, right, size)
    seqlens_q, seqlens_k = given.seqlens_q, given.seqlens_k
    return Call(
        rows(q),
        rows(k),
        rows(v),
        Spec(
            mask=attn_mask,
            bias=attn_bias,
            relative_bias=relative_bias,
            relative_q=None if relative_query is None else rows(relative_query),
            relative_k=relative_key,
            slopes=slopes,
            sinks=sinks,
            q_lengths=None if seqlens_q is None else checked_lengths("seqlens_q", seqlens_q, size.batch, size.tq),
            k_lengths=None if seqlens_k is None else checked_lengths("seqlens_k", seqlens_k, size.batch, size.tk),
            cu_q=cu_seqlens_q,
            cu_k=cu_seqlens_k,
            blocks=_blocks(given.block_layout, given.block_size, scores),
            scale=scale,
            softcap=softcap,
            dropout=float(dropout_p),
            left=left,
            right=right,
            bottom_right=given.alignment == "bottom_right",
            offset=given.offset or 0,
            relative_bias_zero=relative_bias_zero or 0,
            relative_k_zero=relative_key_zero or 0,
            block_size=given.block_size or 0,
            max_q=max_seqlen_q or 0,
            max_k=max_seqlen_k or 0,
        ),
    )


NUMBERS = frozenset((int, float))
_OF_PLAIN = frozenset(
    (
        "layout",
        "attn_mask",
        "attn_bias",
        "causal",
        "window_size",
        "alignment",
        "scale",
        "softcap",
        "alibi_slopes",
        "relative_bias",
        "relative_bias_zero",
        "relative_query",
        "relative_key",
        "relative_key_zero",
        "sinks",
        "dropout_p",
        "seqlens_q",
        "seqlens_k",
    )
)
MAY_BE_NONE = frozenset(field.name for field in fields(Options) if field.default is None)


def prepared_plainly(q: Any, k: Any, v: Any, options: Mapping[str, Any]) -> Call | None:
    """``prepared`` of a plain call (``plain_call``) of padded sequences on the CPU, with fewer questions: those of a short call
    take as long as its kernel.

    None: something is odd, or rare. ``prepared`` takes it, or says what is wrong with it.
    """
    for name, value in options.items():
        if name not in _OF_PLAIN and (value is not None or name not in MAY_BE_NONE):
            return None
    get, batch_first = options.get, options.get("layout") == "bshd"
    relative_q = get("relative_query")
    for tensor in (q, k, v) if relative_q is None else (q, k, v, relative_q):
        if type(tensor) not in PLAIN or tensor.is_nested or tensor.dim() != 4 or tensor.dtype != q.dtype or not tensor.is_cpu:
            return None
    if batch_first:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        relative_q = None if relative_q is None else relative_q.transpose(1, 2)
    elif get("layout") not in (None, "bhsd") or (get("layout") is None and q.shape[1] > MOST_HEADS):
        return None
    dtype, (batch, heads, tq, features), (_, k_heads, tk, _) = q.dtype, q.shape, k.shape
    if k.shape != (batch, k_heads, tk, features) or v.shape[:3] != k.shape[:3] or 0 in q.shape or 0 in k.shape:
        return None
    causal, window, alignment, scale = get("causal", False), get("window_size"), get("alignment"), get("scale")
    dropout, left, right = get("dropout_p", 0.0), -1, -1
    if dtype not in DTYPES or heads % k_heads or type(causal) is not bool or alignment not in (None, *ALIGNMENTS):
        return None
    if scale is None:
        scale = 1 / math.sqrt(features)
    elif type(scale) not in NUMBERS or not math.isfinite(scale):
        return None
    softcap, slopes, sinks = get("softcap", 0.0), get("alibi_slopes"), get("sinks")
    if type(dropout) not in NUMBERS or not 0 <= dropout <= 1 or type(softcap) not in NUMBERS or not 0 <= softcap < math.inf:
        return None
    if slopes is not None:
        if type(slopes) not in PLAIN or not slopes.is_cpu or not slopes.is_floating_point() or slopes.requires_grad:
            return None
        if slopes.shape not in ((heads,), (1, heads), (batch, heads)):
            return None
        slopes = slopes.to(torch.float64 if dtype == torch.float64 else torch.float32).reshape(-1, heads).contiguous()
    if sinks is not None:
        if type(sinks) not in PLAIN or not sinks.is_cpu or sinks.dtype != dtype or sinks.shape != (heads,):
            return None
        sinks = sinks.contiguous()
    if window is not None:
        if type(window) not in (tuple, list) or len(window) != 2:
            return None
        for side in window:
            if side is not None and (type(side) is not int or side < -1):
                return None
        left, right = (-1 if side is None else side for side in window)
    mask, bias, table, relative_k = get("attn_mask"), get("attn_bias"), get("relative_bias"), get("relative_key")
    for name, added in (("mask", mask), ("bias", bias)):
        if added is None:
            continue
        if type(added) not in PLAIN or added.dtype != (torch.bool if name == "mask" else dtype) or not added.is_cpu:
            return None
        if added.dim() < 2 or not _spreads(added.shape, (batch, heads, tq, tk)):
            return None
    zero, key_zero = get("relative_bias_zero"), get("relative_key_zero")
    if table is not None:
        if type(table) not in PLAIN or table.dim() != 2 or table.shape[0] != heads or table.dtype != dtype or not table.is_cpu:
            return None
        if zero is None and table.shape[1] % 2:
            zero = table.shape[1] // 2
        elif type(zero) is not int:
            return None
    elif zero is not None:
        return None
    if relative_k is not None:
        if type(relative_k) not in PLAIN or relative_k.dtype != dtype or not relative_k.is_cpu or relative_k.dim() != 3:
            return None
        if relative_q is None or relative_q.shape != q.shape or type(key_zero) is not int:
            return None
        if relative_k.shape[2] != features or relative_k.shape[0] not in (1, heads):
            return None
        relative_k = rows(relative_k).expand(heads, -1, -1)
    elif relative_q is not None or key_zero is not None:
        return None
    if tq != tk and alignment is None:
        if causal or window is not None or slopes is not None or table is not None or relative_k is not None:
            return None
    lengths = []
    for given, longest in ((get("seqlens_q"), tq), (get("seqlens_k"), tk)):
        if given is not None:
            if type(given) is not Tensor or not given.is_cpu or given.dtype not in INTEGERS or given.shape != (batch,):
                return None
            values = given.tolist()
            if min(values) < 0 or max(values) > longest:
                return None
            given = given.to(torch.int32).contiguous()
        lengths.append(given)
    spec = Spec(
        mask=None if mask is None else mask[(None,) * (4 - mask.dim())],
        bias=None if bias is None else bias[(None,) * (4 - bias.dim())],
        relative_bias=None if table is None else rows(table),
        relative_q=None if relative_q is None else rows(relative_q),
        relative_k=relative_k,
        slopes=slopes,
        sinks=sinks,
        q_lengths=lengths[0],
        k_lengths=lengths[1],
        scale=float(scale),
        softcap=float(softcap),
        dropout=float(dropout),
        left=left,
        right=0 if causal else right,
        bottom_right=alignment == "bottom_right",
        relative_bias_zero=zero or 0,
        relative_k_zero=key_zero or 0,
    )
    return Call(rows(q), rows(k), rows(v), spec)


def _spreads(given: Sequence[int], scores: Sequence[int]) -> bool:
    """Whether a shape is that of scores with 1 in place of any size, from the last one on."""
    if len(given) > len(scores):
        return False
    for size, own in zip(given[::-1], scores[::-1], strict=False):
        if size not in (own, 1):
            return False
    return True


def takes_options(*without: str) -> Callable[[Function], Function]:
    """For a function with ``**options``: its signature shows each of ``Options`` but ``without``, and others raise TypeError."""

    def decorated(function: Function) -> Function:
        return own_keywords(shows_options(*without)(function))

    return decorated


def shows_options(*without: str) -> Callable[[Function], Function]:
    """The same of the signature alone: the function itself refuses others, by `check_keywords`."""

    def decorated(function: Function) -> Function:
        own = inspect.signature(function)
        first = [p for p in own.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        every = Options.__dataclass_fields__
        last = [p for p in own.parameters.values() if p.kind is p.KEYWORD_ONLY and p.name not in every]
        options = [
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
            for field in fields(Options)
            if field.name not in without
        ]
        function.__signature__ = own.replace(parameters=[*first, *options, *last])  # type: ignore[attr-defined]
        return function

    return decorated


def check_tensors(named: Mapping[str, Any], **others: Any) -> None:
    """Tensors, on one device; ``named`` are three, the others may be None."""
    for name, value in {**named, **others}.items():
        if value is not None or name in named:
            checked_tensor(name, value)
    first, *rest = named.values()
    if any(other.device != first.device for other in rest):
        raise RuntimeError(f"{_listed(named)} must be on one device, got {_listed(t.device for t in named.values())}")
    for name, value in others.items():
        if value is not None and value.device != first.device:
            raise RuntimeError(f"{name} must be on the query's device {first.device}, got {value.device}")


def check_dtypes(named: Mapping[str, Tensor]) -> None:
    """One dtype, of those that attention is computed in."""
    first, *rest = named.values()
    if any(other.dtype != first.dtype for other in rest):
        raise RuntimeError(f"{_listed(named)} must have one dtype, got {_listed(t.dtype for t in named.values())}")
    if first.dtype not in DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        kind = NotImplementedError if first.is_complex() or first.is_floating_point() else RuntimeError
        raise kind(f"{_listed(named)} must be one of {accepted}, got {first.dtype}")


def _listed(values: Any) -> str:
    *most, last = (str(value) for value in values)
    return f"{', '.join(most)} and {last}"


def checked_layout(layout: str | None, packed: bool) -> str:
    """The layout, which may be left to the other arguments."""
    if layout is None:
        return "thd" if packed else "bhsd"
    if layout not in (*LAYOUTS, "thd"):
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, thd (packed, with cu_seqlens), got {layout!r}")
    if layout == "thd" and not packed:
        raise ValueError("layout='thd' is [N, H, E] of packed sequences, with cu_seqlens, got padded ones")
    if packed and layout != "thd":
        raise ValueError(f"layout={layout!r} is for padded sequences, got packed ones [N, H, E]: leave it out, or pass 'thd'")
    return layout


def checked_softcap(softcap: Any) -> float:
    if not 0 <= checked_number("softcap", softcap) < math.inf:
        raise ValueError(f"softcap must be finite and not negative (0: none), got {softcap}")
    return float(softcap)


def checked_scale(scale: Any) -> float:
    if not -math.inf < checked_number("scale", scale) < math.inf:
        raise ValueError(f"scale must be finite, got {scale}")
    return float(scale)


def checked_sinks(sinks: Tensor, dtype: torch.dtype, heads: int) -> Tensor:
    sinks = added("sinks", sinks, dtype).contiguous()
    if sinks.shape != (heads,):
        raise RuntimeError(f"sinks must be [Hq] = [{heads}], got {list(sinks.shape)}")
    return sinks


def default_scale(features: int) -> float:
    """1 / sqrt(E); without features every product is 0, whatever the scale."""
    return 1 / math.sqrt(features) if features else 1.0


def rows(tensor: Tensor) -> Tensor:
    """With a contiguous last dimension."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def onto_scores(name: str, tensor: Tensor, scores: Sequence[int]) -> Tensor:
    """``tensor`` with all four dimensions of [B, Hq, Tq, Tk], each as it is or 1."""
    fits = 2 <= tensor.dim() <= 4 and all(
        given in (own, 1) for given, own in zip(reversed(tensor.shape), reversed(scores), strict=False)
    )
    if not fits:
        hint = "; one for each sequence is [B, 1, Tq, Tk]" if tensor.dim() == 3 and tensor.shape[0] == scores[0] else ""
        raise RuntimeError(
            f"{name} must be [Tq, Tk], [Hq, Tq, Tk] or [B, Hq, Tq, Tk] with each dimension as in {list(scores)} or 1, "
            f"got {list(tensor.shape)}{hint}"
        )
    return tensor[(None,) * (4 - tensor.dim())]


def checked_window(causal: Any, window_size: Any) -> tuple[int, int]:
    """left, right; -1: unlimited."""
    if not isinstance(causal, bool):
        hint = "; where the queries stand is the alignment" if causal in ALIGNMENTS else ""
        raise TypeError(f"causal must be a bool, got {causal!r}{hint}")
    sides: list[Any] = []
    if window_size is not None:
        if isinstance(window_size, (int, float)) or is_int(window_size):
            raise TypeError(
                f"window_size must be (left, right), the keys before and after its place that a query sees, got {window_size}: "
                f"({window_size}, 0) or ({window_size}, {window_size})"
            )
        if not isinstance(window_size, Sequence) or isinstance(window_size, str):
            raise TypeError(f"window_size must be (left, right) of ints or None, not {type(window_size).__name__}")
        if len(window_size) != 2:
            raise ValueError(f"window_size must be (left, right), got {window_size!r}")
        for side in window_size:
            if side is not None and not is_int(side):
                raise TypeError(f"window_size must hold ints or None, got {window_size!r}")
            if side is not None and side < -1:
                raise ValueError(
                    f"window_size must be (left, right), each at least 0, or None or -1 for unlimited, got {window_size!r}"
                )
            sides.append(-1 if side is None else side)
    left, right = sides or (-1, -1)
    return left, 0 if causal else right


def _refuse_ambiguity(given: Options, left: int, right: int, size: Sizes) -> None:
    """Where queries and keys differ in number, what counts from a query's place needs that place said."""
    placed = {
        "causal": given.causal,
        "window_size": left >= 0 or (right >= 0 and not given.causal),
        "alibi_slopes": given.alibi_slopes is not None,
        "relative_bias": given.relative_bias is not None,
        "relative_key": given.relative_key is not None,
    }
    names = [name for name, used in placed.items() if used]
    if not names:
        return
    if given.cu_seqlens_q is None or given.cu_seqlens_k is None:
        if not _may_differ(size.tq, size.tk):
            return
        numbers_differ = f"with {size.tq} queries and {size.tk} keys"
    else:
        if _same(given.cu_seqlens_q, given.cu_seqlens_k):
            return
        numbers_differ = "with cu_seqlens_q and cu_seqlens_k that are not seen to be equal"
    raise ValueError(
        f"{' and '.join(names)} {numbers_differ}: ambiguous; pass alignment='bottom_right' (the last query stands at the last "
        "key, as in flash-attn), alignment='top_left' (the first query at the first key, as in "
        "torch's scaled_dot_product_attention), or an offset, the place of the first query"
    )


def _may_differ(tq: int, tk: int) -> bool:
    """Sizes that are not known while tracing may."""
    if torch.compiler.is_compiling() or isinstance(tq, torch.SymInt) or isinstance(tk, torch.SymInt):
        from torch.fx.experimental.symbolic_shapes import guard_or_true

        return guard_or_true(tq != tk)
    return tq != tk


def _same(cu_q: Tensor, cu_k: Tensor) -> bool:
    if cu_q is cu_k:
        return True
    return readable(cu_q) and readable(cu_k) and cu_q.tolist() == cu_k.tolist()


def _warn_if_time_first(size: Sizes) -> None:
    """Nobody has so many heads over so few steps."""
    if torch.compiler.is_compiling() or isinstance(size.tq, torch.SymInt):
        return
    if min(size.q_heads, size.k_heads) > max(MOST_HEADS, size.tq, size.tk):
        warnings.warn(
            f"attention takes q as [B, H, T, E] unless layout says otherwise, which makes {size.q_heads} heads of {size.tq} "
            "steps here; pass layout='bshd' if it is [B, T, H, E], or layout='bhsd' to say that it is not",
            stacklevel=5,  # of the caller of `attention`, by way of `_any_attention`
        )


def heads_first(name: str, tensor: Tensor, layout: str) -> Tensor:
    """[B, H, T, E], or packed [H, N, E], from the caller's layout."""
    expected = {"thd": "[N, H, E] (with cu_seqlens)", "bhsd": "[B, H, T, E]", "bshd": "[B, T, H, E]"}[layout]
    if tensor.dim() != (3 if layout == "thd" else 4):
        raise RuntimeError(f"{name} must be {expected}, got {list(tensor.shape)}")
    if layout == "thd":
        return tensor.transpose(0, 1)
    return tensor if layout == "bhsd" else tensor.transpose(1, 2)


def _sizes(q: Tensor, k: Tensor, v: Tensor, layout: str, cu_q: Tensor | None, max_q: int | None, max_k: int | None) -> Sizes:
    *q_batch, q_heads, tq, features = q.shape
    *k_batch, k_heads, tk, _ = k.shape
    for name, tensor in (("k", k), ("v", v)):
        if [*tensor.shape[:-3]] != q_batch:
            raise RuntimeError(f"q and {name} must have one batch size, got {q_batch[0]} and {tensor.shape[0]}")
    if k.shape[:-1] != v.shape[:-1]:
        raise RuntimeError(
            f"k and v must agree in heads and length, got {k_heads} and {v.shape[-3]} heads, lengths {tk} and {v.shape[-2]}"
        )
    if k.shape[-1] != features:
        raise RuntimeError(f"q and k must have the same features, got {features} and {k.shape[-1]}")
    if q_heads != k_heads and (k_heads == 0 or q_heads % k_heads):
        hint = "; [B, T, H, E] is layout='bshd'" if layout == "bhsd" else ""
        raise RuntimeError(f"q's heads must be a multiple of those of k and v, got {q_heads} and {k_heads}{hint}")
    if cu_q is None:
        return Sizes(q_batch[0], q_heads, k_heads, tq, tk, features)
    return Sizes(cu_q.shape[0] - 1, q_heads, k_heads, max_q or 0, max_k or 0, features)


def added(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor, which is of a dtype that may be added to products of ``dtype``."""
    wide = dtype.itemsize == 2 and tensor.dtype == torch.float32
    if tensor.dtype != dtype and not wide:
        raise RuntimeError(f"{name} must have the query's dtype {dtype} (or float32 beside a 16-bit query), got {tensor.dtype}")
    return tensor


def _table(name: str, table: Tensor, zero: int | None, heads: int) -> tuple[Tensor, int]:
    """[Hq, L] and where distance 0 stands."""
    if table.dim() != 2 or table.shape[0] not in (1, heads):
        raise RuntimeError(f"{name} must be [Hq or 1, L] with Hq = {heads}, got {list(table.shape)}")
    length = table.shape[1]
    if zero is None:
        if length % 2 == 0:
            raise ValueError(f"{name}_zero, the entry of distance 0, is needed for a table of even length, here {length}")
        zero = length // 2
    return rows(table).expand(heads, -1), zero


def _relative_key(q: Tensor, relative_query: Tensor | None, relative_key: Tensor | None, zero: int | None) -> Tensor:
    """[Hq, M, E]; q and relative_query heads first."""
    if relative_query is None or relative_key is None or zero is None:
        raise ValueError("relative_query, relative_key and relative_key_zero (the row of distance 0) go together")
    if relative_query.shape != q.shape:
        raise RuntimeError("relative_query must have the shape of q")
    heads, features = q.shape[-3], q.shape[-1]
    if relative_key.dim() != 3 or relative_key.shape[0] not in (1, heads) or relative_key.shape[2] != features:
        raise RuntimeError(
            f"relative_key must be [Hq or 1, M, E] with Hq = {heads} and E = {features}, got {list(relative_key.shape)}"
        )
    for name, tensor in (("relative_query", relative_query), ("relative_key", relative_key)):
        if tensor.dtype != q.dtype:
            raise RuntimeError(f"{name} must have the query's dtype {q.dtype}, got {tensor.dtype}")
    return rows(relative_key).expand(heads, -1, -1)


def checked_slopes(slopes: Tensor, size: Sizes, dtype: torch.dtype) -> Tensor:
    """[B or 1, Hq] in the dtype of the scores: fp32, or fp64 where q is."""
    if not slopes.is_floating_point():
        raise RuntimeError(f"alibi_slopes must be floating point, got {slopes.dtype}")
    if slopes.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("alibi_slopes get no gradient: detach them, or learn a relative_bias or an attn_bias instead")
    if (
        slopes.dim() not in (1, 2)
        or slopes.shape[-1] != size.q_heads
        or (slopes.dim() == 2 and slopes.shape[0] not in (1, size.batch))
    ):
        raise RuntimeError(
            f"alibi_slopes must be [Hq] or [B or 1, Hq] with Hq = {size.q_heads} and B = {size.batch}, got {list(slopes.shape)}"
        )
    return slopes.to(torch.promote_types(dtype, torch.float32)).reshape(-1, size.q_heads).contiguous()


def readable(tensor: Tensor) -> bool:
    """Whether looking at the values costs nothing: on the CPU, and not while tracing or in a transform."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling() or isinstance(tensor, FakeTensor):
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def integers(name: str, tensor: Tensor, what: str) -> Tensor:
    if tensor.dtype not in (torch.int32, torch.int64) or tensor.dim() != 1:
        raise RuntimeError(f"{name} must be int32 or int64 {what}, got {tensor.dtype} {list(tensor.shape)}")
    return tensor.to(torch.int32).contiguous()


def checked_lengths(name: str, lengths: Tensor, batch: int, longest: int | None) -> Tensor:
    """int32 [B]. ``longest`` None: they may be as long as they like."""
    result = integers(name, lengths, "[B]")
    if lengths.shape[0] != batch:
        raise RuntimeError(f"{name} must be [B] = [{batch}], got {list(lengths.shape)}")
    if longest is not None and readable(lengths) and not ((lengths >= 0) & (lengths <= longest)).all():
        raise RuntimeError(f"{name} must lie in 0..{longest}, got {lengths.tolist()}")
    return result


def _cumulated(name: str, cu: Tensor | None, longest: int | None, total: int) -> tuple[Tensor, int]:
    """int32 [B + 1], and the length of the longest sequence."""
    if cu is None:
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k go together, got no cu_seqlens_{name}")
    result = integers(f"cu_seqlens_{name}", cu, "[B + 1]")
    if cu.shape[0] == 0:
        raise RuntimeError(f"cu_seqlens_{name} must be [B + 1], got [0]")
    if not readable(cu):
        if longest is None:
            raise ValueError(
                f"max_seqlen_{name} is needed where cu_seqlens_{name} cannot be read without waiting: on a device, compiled"
            )
        return result, longest
    values = cu.tolist()
    lengths = [end - begin for begin, end in zip(values, values[1:], strict=False)]
    if values[0] != 0 or values[-1] != total or min(lengths, default=0) < 0:
        raise RuntimeError(f"cu_seqlens_{name} must rise from 0 to the number of rows, {total}, got {values}")
    found = max(lengths, default=0)
    if longest is not None and longest < found:
        raise RuntimeError(f"max_seqlen_{name} is {longest}, but the longest sequence of cu_seqlens_{name} has {found} rows")
    return result, found if longest is None else longest


def _blocks(layout: Tensor | None, size: int | None, scores: tuple[int, int, int, int]) -> Tensor | None:
    """bool [B or 1, Hq or 1, blocks of queries, blocks of keys]."""
    if layout is None or size is None:
        if layout is not None or size is not None:
            raise ValueError("block_layout and block_size go together")
        return None
    if size < _SMALLEST_BLOCK or size & (size - 1):
        raise ValueError(f"block_size must be a power of two and at least {_SMALLEST_BLOCK}, got {size}")
    batch, heads, tq, tk = scores
    blocks = (-(-tq // size), -(-tk // size))
    fits = 2 <= layout.dim() <= 4 and tuple(layout.shape[-2:]) == blocks
    fits = fits and all(given in (own, 1) for given, own in zip(reversed(layout.shape[:-2]), (heads, batch), strict=False))
    if layout.dtype != torch.bool or not fits:
        raise RuntimeError(
            f"block_layout must be bool [.., {blocks[0]}, {blocks[1]}], before it Hq = {heads} or 1, and B = {batch} or 1, "
            f"got {layout.dtype} {list(layout.shape)}"
        )
    return layout[(None,) * (4 - layout.dim())]
