"""Attention against a cache on the native kernels of ``csrc/cpu``."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.types import DecodeSpec, state_dtype
from ..dense import dense
from ..query import AttentionQuery
from .recurrent import DTYPES


def why_not(query: AttentionQuery) -> list[str]:
    if query.dtype in DTYPES:
        return []
    accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    return [f"dtype {str(query.dtype).removeprefix('torch.')} is not one of {accepted}"]


def attention_decode_forward(q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: DecodeSpec) -> tuple[Tensor, Tensor]:
    return torch.ops.fastseq_native.attention_decode.default(
        q,
        k_cache,
        v_cache,
        dense(spec.lengths, torch.int32),
        dense(spec.block_table, torch.int32),
        dense(spec.slopes, state_dtype(q.dtype)),
        dense(spec.sinks, state_dtype(q.dtype)),
        *spec[4:],
    )
