"""Launches ``kernels/attention/forward.py`` and ``weights.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.types import Spec, empty_rows, state_dtype
from ..query import AttentionQuery
from . import _launch
from ._attention_backward import attention_backward, attention_weights_backward
from .attention_args import accumulator, pairs, parts_of, power, precision, rows, scalars, sizes

__all__ = ["attention_backward", "attention_forward", "attention_weights", "attention_weights_backward", "why_not"]

_MOST_FEATURES = 256
_SMALLEST_BLOCK = 16  # as kernels/attention/mask.py has it
_FARTHEST = 1 << 29  # places and distances are int32


def why_not(query: AttentionQuery) -> list[str]:
    against = _launch.dtype_obstacles(query)
    if not 1 <= min(query.features) <= max(query.features) <= _MOST_FEATURES:
        against.append(f"features of a head must be 1 to {_MOST_FEATURES}, got {query.features}")
    if "blocks" in query.uses and query.block_size < _SMALLEST_BLOCK:
        against.append(f"the blocks of a layout must be at least {_SMALLEST_BLOCK}, got {query.block_size}")
    if abs(query.offset) + sum(query.lengths) >= _FARTHEST:
        against.append(f"offset and lengths together must be below 2^29, got {query.offset} and {query.lengths}")
    if query.device.type == "cuda" and torch.cuda.get_device_capability(query.device) < (8, 0):
        against.append("needs compute capability 8.0")
    return against


def variant(query: AttentionQuery, family: str) -> str:
    """The widths that a call's kernels are compiled for."""
    widths = [power(features) for features in query.features]
    exact = tuple(widths) == query.features
    return f"widths {widths[0]}:{widths[1]}" + ("" if exact else " with tails")


def attention_forward(q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    from fastseq.kernels.attention import configs
    from fastseq.kernels.attention import forward as kernels

    e, ev = q.shape[-1], v.shape[-1]
    out, lse = empty_rows(q, ev), q.new_empty(q.shape[:-1], dtype=state_dtype(q.dtype))
    batch, tq, tk = sizes(q, k, spec)
    if lse.numel() == 0:
        return out, lse
    if 0 in (tk, k.shape[-2]):
        return out.zero_(), lse.copy_(_lse_without_keys(lse, spec))
    heads = q.shape[-3]
    parts, dropout, seq = parts_of(q, k, spec)
    be, bev = power(e), power(ev)
    kernel = "forward" if spec.relative_bias is None else "forward_relative_bias"
    config = configs.of(q.device, kernel, q.dtype, max(be, bev), relative=spec.relative_q is not None)
    blocks = -(-tq // config.BM)
    with _launch.on(q.device):
        kernels.forward[(blocks * heads * batch,)](
            rows(q), rows(k), rows(v), rows(out), scalars(lse), parts, dropout, seq, tq, tk, heads, heads // k.shape[-3], blocks,
            E=e, EV=ev, BE=be, BEV=bev, ACC=accumulator(q.dtype), PRECISION=precision(q.dtype), **config.arguments(),
        )  # fmt: skip
    return out, lse


def attention_weights(q: Tensor, k: Tensor, lse: Tensor, spec: Spec, average: bool) -> Tensor:
    from fastseq.kernels.attention import configs
    from fastseq.kernels.attention import weights as kernels

    (batch, heads, tq, e), tk = q.shape, k.shape[2]
    out = q.new_empty((batch, tq, tk) if average else (batch, heads, tq, tk))
    if out.numel() == 0:
        return out
    if heads == 0:
        return out.zero_()
    parts, dropout, seq = parts_of(q, k, spec)
    config = configs.of(q.device, "weights", q.dtype, power(e), relative=spec.relative_q is not None)
    row_blocks = -(-tq // config.BM)
    blocks = row_blocks * -(-tk // config.BN)
    own = 1 if average else heads
    with _launch.on(q.device):
        kernels.attention_weights[(blocks * own * batch,)](
            rows(q), rows(k), scalars(lse), pairs(out[:, None] if average else out), parts, dropout, seq,
            tq, tk, heads, heads // k.shape[1], row_blocks, blocks, own, heads // own,
            E=e, BE=power(e), ACC=accumulator(q.dtype), PRECISION=precision(q.dtype), **config.arguments(),
        )  # fmt: skip
    return out


def _lse_without_keys(lse: Tensor, spec: Spec) -> Tensor:
    if spec.sinks is None:
        return lse.new_full((), -torch.inf)
    return spec.sinks.to(lse.dtype)[:, None]
