"""What ``attention`` accepts: every argument is checked before anything runs, and becomes the op's ``Spec``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..ops.attention import Spec
from ._autocast import autocast_dtype, lowered

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAYOUTS = ("bhte", "bthe")
_ALIGNMENTS = ("top_left", "bottom_right")
_SMALLEST_BLOCK = 16


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


def prepared(
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
) -> Call:
    """The call of the op, or the exception that says what is wrong. Arguments and exceptions: see ``attention``."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    left, right, bottom_right = checked_window(causal, window, align)
    if not isinstance(offset, (int, torch.SymInt)):
        raise TypeError(f"offset must be an int, got {type(offset).__name__}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must lie in [0, 1], got {dropout}")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap must be finite and not negative (0: none), got {softcap}")
    tensors = {
        "mask": mask,
        "bias": bias,
        "alibi_slopes": alibi_slopes,
        "relative_bias": relative_bias,
        "relative_query": relative_query,
        "relative_key": relative_key,
        "sinks": sinks,
        "q_lengths": q_lengths,
        "k_lengths": k_lengths,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "block_layout": block_layout,
    }
    check_tensors(q, k, v, **tensors)
    lower = autocast_dtype(q.device.type)
    q, k, v = lowered(q, lower), lowered(k, lower), lowered(v, lower)
    bias, sinks = lowered(bias, lower), lowered(sinks, lower)
    relative_bias = lowered(relative_bias, lower)
    relative_query, relative_key = lowered(relative_query, lower), lowered(relative_key, lower)
    check_dtypes(q, k, v)

    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    q, k, v = (_heads_first(name, t, layout, packed) for name, t in (("q", q), ("k", k), ("v", v)))
    if relative_query is not None:
        relative_query = _heads_first("relative_query", relative_query, layout, packed)
    if packed:
        for name, tensor in (("mask", mask), ("bias", bias), ("q_lengths", q_lengths), ("k_lengths", k_lengths)):
            if tensor is not None:
                raise ValueError(f"{name} goes with padded sequences, not with cu_seqlens")
        cu_seqlens_q, max_seqlen_q = _cumulated("q", cu_seqlens_q, max_seqlen_q, q.shape[1])
        cu_seqlens_k, max_seqlen_k = _cumulated("k", cu_seqlens_k, max_seqlen_k, k.shape[1])
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            raise RuntimeError(
                f"cu_seqlens_q and cu_seqlens_k must be of one length, got {cu_seqlens_q.shape[0]} and {cu_seqlens_k.shape[0]}"
            )
    elif max_seqlen_q is not None or max_seqlen_k is not None:
        raise ValueError("max_seqlen_q and max_seqlen_k go with cu_seqlens_q and cu_seqlens_k")
    size = _sizes(q, k, v, cu_seqlens_q, max_seqlen_q, max_seqlen_k)
    if scale is None:
        scale = default_scale(size.features)
    elif not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite, got {scale}")

    scores = (size.batch, size.q_heads, size.tq, size.tk)
    if mask is not None:
        if mask.dtype != torch.bool:
            raise RuntimeError(f"mask must be bool (True: attend), got {mask.dtype}; what is added to the scores is the bias")
        mask = onto_scores("mask", mask, scores)
    if bias is not None:
        bias = onto_scores("bias", added("bias", bias, q.dtype), scores)
    if relative_bias is not None:
        relative_bias = added("relative_bias", relative_bias, q.dtype)
        relative_bias, relative_bias_zero = _table("relative_bias", relative_bias, relative_bias_zero, size.q_heads)
    elif relative_bias_zero is not None:
        raise ValueError("relative_bias_zero goes with relative_bias")
    if relative_query is not None or relative_key is not None or relative_key_zero is not None:
        relative_key = _relative_key(q, relative_query, relative_key, relative_key_zero)
    if sinks is not None:
        sinks = added("sinks", sinks, q.dtype).contiguous()
        if sinks.shape != (size.q_heads,):
            raise RuntimeError(f"sinks must be [Hq] = [{size.q_heads}], got {list(sinks.shape)}")
    return Call(
        rows(q),
        rows(k),
        rows(v),
        Spec(
            mask=mask,
            bias=bias,
            relative_bias=relative_bias,
            relative_q=None if relative_query is None else rows(relative_query),
            relative_k=relative_key,
            slopes=None if alibi_slopes is None else checked_slopes(alibi_slopes, size, q.dtype),
            sinks=sinks,
            q_lengths=None if q_lengths is None else checked_lengths("q_lengths", q_lengths, size.batch, size.tq),
            k_lengths=None if k_lengths is None else checked_lengths("k_lengths", k_lengths, size.batch, size.tk),
            cu_q=cu_seqlens_q,
            cu_k=cu_seqlens_k,
            blocks=_blocks(block_layout, block_size, scores),
            seed=seed(q.device) if dropout else None,
            scale=float(scale),
            softcap=float(softcap),
            dropout=float(dropout),
            left=left,
            right=right,
            bottom_right=bottom_right,
            offset=offset,
            relative_bias_zero=relative_bias_zero or 0,
            relative_k_zero=relative_key_zero or 0,
            block_size=block_size or 0,
            max_q=max_seqlen_q or 0,
            max_k=max_seqlen_k or 0,
        ),
    )


def check_tensors(q: Tensor, k: Tensor, v: Tensor, **others: Tensor | None) -> None:
    """Tensors, on one device."""
    for name, tensor in {"query": q, "key": k, "value": v, **others}.items():
        if not isinstance(tensor, Tensor) and (tensor is not None or name not in others):
            raise TypeError(f"{name} must be a Tensor, not {type(tensor).__name__}")
    if not q.device == k.device == v.device:
        raise RuntimeError(f"query, key and value must be on one device, got {q.device}, {k.device} and {v.device}")
    for name, tensor in others.items():
        if tensor is not None and tensor.device != q.device:
            raise RuntimeError(f"{name} must be on the query's device {q.device}, got {tensor.device}")


def check_dtypes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """One dtype, of those that attention is computed in."""
    if not q.dtype == k.dtype == v.dtype:
        raise RuntimeError(f"query, key and value must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if q.dtype not in DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        kind = NotImplementedError if q.is_complex() or q.is_floating_point() else RuntimeError
        raise kind(f"query, key and value must be one of {accepted}, got {q.dtype}")


def default_scale(features: int) -> float:
    """1 / sqrt(E); without features every product is 0, whatever the scale."""
    return 1 / math.sqrt(features) if features else 1.0


def seed(device: torch.device) -> Tensor:
    """int64 [1], of the device's generator, so that ``torch.manual_seed`` repeats the dropout."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)


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


def checked_window(causal: bool | str, window: Sequence[int | None] | None, align: str) -> tuple[int, int, bool]:
    """left, right (-1: unlimited), and whether the last query stands at the last key."""
    if align not in _ALIGNMENTS:
        raise ValueError(f"align must be one of {', '.join(_ALIGNMENTS)}, got {align!r}")
    if not (causal is True or causal is False or causal in _ALIGNMENTS):
        raise ValueError(f"causal must be a bool or one of {', '.join(_ALIGNMENTS)}, got {causal!r}")
    if causal == "top_left" and align == "bottom_right":
        raise ValueError("causal='top_left' contradicts align='bottom_right'")
    sides = []
    if window is not None:
        if len(window) != 2:
            raise ValueError(f"window must be (left, right), got {window!r}")
        for side in window:
            if side is not None and not isinstance(side, (int, torch.SymInt)):
                raise TypeError(f"window must hold ints or None, got {window!r}")
            if side is not None and side < -1:
                raise ValueError(f"window must be (left, right), each at least 0, or None or -1 for unlimited, got {window!r}")
            sides.append(-1 if side is None else side)
    left, right = sides or (-1, -1)
    return left, 0 if causal else right, "bottom_right" in (causal, align)


def _heads_first(name: str, tensor: Tensor, layout: str, packed: bool) -> Tensor:
    """[B, H, T, E], or packed [H, N, E], from the caller's layout."""
    expected = "[N, H, E] (with cu_seqlens)" if packed else "[B, H, T, E]" if layout == "bhte" else "[B, T, H, E]"
    if tensor.dim() != (3 if packed else 4):
        raise RuntimeError(f"{name} must be {expected}, got {list(tensor.shape)}")
    if packed:
        return tensor.transpose(0, 1)
    return tensor if layout == "bhte" else tensor.transpose(1, 2)


def _sizes(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, max_q: int | None, max_k: int | None) -> Sizes:
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
        raise RuntimeError(f"q's heads must be a multiple of those of k and v, got {q_heads} and {k_heads}")
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
        raise RuntimeError("alibi_slopes get no gradient: detach them, or learn a relative_bias or a bias instead")
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


def _integers(name: str, tensor: Tensor, what: str) -> Tensor:
    if tensor.dtype not in (torch.int32, torch.int64) or tensor.dim() != 1:
        raise RuntimeError(f"{name} must be int32 or int64 {what}, got {tensor.dtype} {list(tensor.shape)}")
    return tensor.to(torch.int32).contiguous()


def checked_lengths(name: str, lengths: Tensor, batch: int, longest: int) -> Tensor:
    """int32 [B]."""
    result = _integers(name, lengths, "[B]")
    if lengths.shape[0] != batch:
        raise RuntimeError(f"{name} must be [B] = [{batch}], got {list(lengths.shape)}")
    if readable(lengths) and not ((lengths >= 0) & (lengths <= longest)).all():
        raise RuntimeError(f"{name} must lie in 0..{longest}, got {lengths.tolist()}")
    return result


def _cumulated(name: str, cu: Tensor | None, longest: int | None, total: int) -> tuple[Tensor, int]:
    """int32 [B + 1], and the length of the longest sequence."""
    if cu is None:
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k go together, got no cu_seqlens_{name}")
    result = _integers(f"cu_seqlens_{name}", cu, "[B + 1]")
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
    if not isinstance(size, int) or size < _SMALLEST_BLOCK or size & (size - 1):
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
