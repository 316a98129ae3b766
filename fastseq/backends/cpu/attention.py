"""The attention op on the native kernels of ``csrc/cpu``."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.types import Spec
from ..query import AttentionQuery

DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


def why_not(query: AttentionQuery) -> list[str]:
    against = []
    if query.dtype not in DTYPES:
        against.append(f"dtype {str(query.dtype).removeprefix('torch.')} is not one of float32, float64, bfloat16, float16")
    if query.features[0] == 0:
        against.append("the CPU's kernels have no products without features")
    return against


def attention_forward(q: Tensor, k: Tensor, v: Tensor, spec: Spec, saves: bool = True) -> tuple[Tensor, Tensor]:
    """saves: for a backward pass, which forms the scores again; else float32 may be multiplied in parts."""
    return torch.ops.fastseq_native.attention_forward.default(q, k, v, *_dense(spec, q.dtype), saves)


def attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: Spec, wanted: list[bool]
) -> tuple[Tensor, ...]:
    return attention_gradients(dout, dlse, None, False, q, k, v, out, lse, spec, [*wanted, False])[:-1]


def attention_weights_backward(
    dw: Tensor, q: Tensor, k: Tensor, lse: Tensor, spec: Spec, average: bool, wanted: list[bool]
) -> tuple[Tensor, ...]:
    return attention_gradients(None, None, dw, average, q, k, None, None, lse, spec, [*wanted, True])


def attention_gradients(
    dout: Tensor | None,
    dlse: Tensor | None,
    dw: Tensor | None,
    average: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    out: Tensor | None,
    lse: Tensor,
    spec: Spec,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """Both in one pass: the gradients of ``GRADIENTS``, and delta; wanted: 8 bools. v and out go with dout."""
    if dlse is not None:
        dlse = dlse.to(lse.dtype).contiguous()
    if dw is not None:
        dw = dw.to(q.dtype)
    dense, native = _dense(spec, q.dtype), torch.ops.fastseq_native.attention_backward.default
    results = native(dout, dlse, dw, average, q, k, v, out, lse.contiguous(), *dense, wanted)
    dq, dk, dv, dbias, drelative_bias, *rest = results
    if wanted[3] and spec.bias is not None:
        dbias = dbias.to(spec.bias.dtype)
    if wanted[4] and spec.relative_bias is not None:
        drelative_bias = drelative_bias.to(spec.relative_bias.dtype)
    return dq, dk, dv, dbias, drelative_bias, *rest


def attention_weights(q: Tensor, k: Tensor, lse: Tensor, spec: Spec, average: bool) -> Tensor:
    return torch.ops.fastseq_native.attention_weights.default(q, k, lse, *_dense(spec, q.dtype), average)


def attention_with_weights(q: Tensor, k: Tensor, v: Tensor, spec: Spec, average: bool) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.fastseq_native.attention_with_weights.default(q, k, v, *_dense(spec, q.dtype), average)


def _dense(spec: Spec, dtype: torch.dtype) -> Spec:
    """With what is added as the kernels read it: tables of every head, beside fp64 nothing narrower."""
    if spec.relative_bias is not None and not spec.relative_bias.is_contiguous():
        spec = spec._replace(relative_bias=spec.relative_bias.contiguous())
    if spec.relative_k is not None and not spec.relative_k.is_contiguous():
        spec = spec._replace(relative_k=spec.relative_k.contiguous())
    if dtype == torch.float64:
        added = {name: getattr(spec, name) for name in ("bias", "relative_bias", "sinks")}
        spec = spec._replace(**{name: t.to(dtype) for name, t in added.items() if t is not None})
    return spec
