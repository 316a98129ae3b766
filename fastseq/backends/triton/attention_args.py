"""Tensors and a ``Spec`` as the arguments of the attention kernels (``kernels/attention/parts.py``)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...ops.types import Spec
from ...reference.attention import dropout_threshold
from . import _launch

_SMALLEST_SCALE = 1e-6  # below, scores in units of it could overflow


def sizes(q: Tensor, k: Tensor, spec: Spec) -> tuple[int, int, int]:
    """Sequences, and the queries and keys of the longest."""
    if spec.cu_q is not None:
        return len(spec.cu_q) - 1, spec.max_q, spec.max_k
    return q.shape[0], q.shape[2], k.shape[2]


def parts_of(q: Tensor, k: Tensor, spec: Spec) -> tuple[Any, Any, Any]:
    """``Parts``, ``Dropout`` or None, and ``Sequences``."""
    from fastseq.kernels.attention.args import DistanceRows, Distances, Dropout, Parts, Scalars, Sequences

    _, tq, tk = sizes(q, k, spec)
    reach = tq + tk + abs(spec.offset)
    shaped = any(tensor is not None for tensor in (spec.bias, spec.relative_bias, spec.slopes, spec.sinks))
    # in fp32, scores times log2 e lose what 16-bit weights do not show
    plain = q.dtype.itemsize == 2 and spec.scale >= _SMALLEST_SCALE and not spec.softcap and not shaped
    relative_bias = relative_k = slopes = None
    if spec.relative_bias is not None:
        table = _last_contiguous(spec.relative_bias)
        relative_bias = Distances(
            table, table.stride(0), table.shape[1], _clamped(spec.relative_bias_zero, reach, table.shape[1])
        )
    if spec.relative_k is not None:
        table = _last_contiguous(spec.relative_k)
        relative_k = DistanceRows(
            table, *table.stride()[:2], table.shape[1], _clamped(spec.relative_k_zero, reach, table.shape[1])
        )
    if spec.slopes is not None:
        slopes = Scalars(spec.slopes, *_strides(spec.slopes))
    parts = Parts(
        scale=number(spec.scale, q.dtype),
        softcap=number(spec.softcap, q.dtype) if spec.softcap else None,
        left=spec.left if 0 <= spec.left < reach else None,
        right=spec.right if 0 <= spec.right < reach else None,
        mask=None if spec.mask is None else pairs(spec.mask),
        bias=None if spec.bias is None else pairs(spec.bias),
        relative_bias=relative_bias,
        relative_q=None if spec.relative_q is None else rows(spec.relative_q),
        relative_k=relative_k,
        slopes=slopes,
        sinks=None if spec.sinks is None else spec.sinks.contiguous(),
        blocks=None if spec.blocks is None else pairs(spec.blocks),
        block_size=None if spec.blocks is None else spec.block_size,
        part=1 if spec.dropout and spec.seed is not None and spec.seed.numel() > 1 else None,
        base2=number(spec.scale * math.log2(math.e), q.dtype) if plain else None,
    )
    dropout = None
    if spec.dropout and spec.seed is not None:
        kept = 1 / (1 - spec.dropout) if spec.dropout < 1 else 0.0
        threshold = min(dropout_threshold(spec.dropout), 2**32 - 1)
        dropout = Dropout(spec.seed, threshold, number(kept, q.dtype))
    ints = [None if t is None else t.contiguous() for t in (spec.cu_q, spec.cu_k, spec.q_lengths, spec.k_lengths)]
    return parts, dropout, Sequences(*ints, offset=spec.offset, bottom_right=1 if spec.bottom_right else None)


def _clamped(zero: int, reach: int, length: int) -> int:
    """An index as far outside a table as any distance needs, within int32."""
    return min(max(zero, -reach), length + reach)


def rows(tensor: Tensor) -> Any:
    """``Rows`` of [B, H, T, n] or [H, N, n]."""
    from fastseq.kernels.attention.args import Rows

    tensor = _last_contiguous(tensor)
    return Rows(tensor, *((0,) if tensor.dim() == 3 else ()), *tensor.stride()[:-1])


def scalars(tensor: Tensor) -> Any:
    """``Scalars`` of [B, H, T] or [H, N], contiguous in T."""
    from fastseq.kernels.attention.args import Scalars

    tensor = _last_contiguous(tensor)
    return Scalars(tensor, *((0,) if tensor.dim() == 2 else ()), *tensor.stride()[:-1])


def pairs(tensor: Tensor) -> Any:
    """``Pairs`` of four dimensions, broadcast where they are 1; of a mask, its bytes."""
    from fastseq.kernels.attention.args import Pairs

    return Pairs(tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor, *_strides(tensor))


def _strides(tensor: Tensor) -> list[int]:
    return [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]


def _last_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def power(features: int) -> int:
    """The width of a tile: a power of two that a matrix instruction takes."""
    return max(16, 1 << (features - 1).bit_length())


def accumulator(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32


def precision(dtype: torch.dtype) -> str:
    """``input_precision`` of the matrix products: fp32 as torch's flag for them says."""
    return _launch.precision(torch.backends.cuda.matmul.fp32_precision) if dtype == torch.float32 else "ieee"


def number(value: float, dtype: torch.dtype) -> Any:
    """A floating argument. Triton makes them fp32, so that fp64, in the interpreter, needs a constant."""
    import triton.language as tl

    return tl.constexpr(value) if dtype == torch.float64 else float(value)
