"""The attention op on torch's own fused CPU kernel, in tiles that leave out what a window hides.

The kernel knows a scale, top-left causality and an additive mask. Windows, lengths, packed sequences, blocks and position biases
become masks of one tile at a time; sinks are added to what it returns. Weights: ``attention_scores.py``. Other features go to
the reference.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ops.types import Spec, empty_gradients, empty_rows, state_dtype
from ...reference import attention as reference
from ...reference.attention import Tile
from ..query import AttentionQuery

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_PARTS = ("softcap", "dropout", "relative_q")
_PARTS_OF_WEIGHTS = (*_PARTS, "sinks")
_DIFFERENTIABLE = ("q", "k", "v")

# Earlier kernels read key heads beyond the last.
_GROUPED = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 13)

_forward = torch._scaled_dot_product_flash_attention_for_cpu  # called so, it starts sooner than through torch.ops
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def why_not(query: AttentionQuery) -> list[str]:
    weights = query.call.startswith("weights")
    has, parts = ("the CPU's weights have", _PARTS_OF_WEIGHTS) if weights else ("torch's CPU kernel has", _PARTS)
    against = []
    if query.dtype not in DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        against.append(f"dtype {str(query.dtype).removeprefix('torch.')} is not one of {accepted}")
    if query.features[0] == 0:
        against.append(f"{has} no products without features")
    against += [f"{has} no {part}" for part in parts if part in query.uses]
    against += [f"{has} no gradient of {name}" for name in query.gradients if name not in _DIFFERENTIABLE]
    return against


def attention_forward(q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    plan = _plan(q, k, v, spec)
    if plan.covering is not None and plan.tiles[0][1] != "masked":
        out, lse = whole(q, k, v, plan.tiles[0][1] == "causal", None, spec.scale)
        out, lse = out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()
        return (out, lse) if spec.sinks is None else _with_sinks(out, lse, spec.sinks)
    out = empty_rows(q, v.shape[-1]).zero_()
    lse = q.new_full(q.shape[:-1], -torch.inf, dtype=state_dtype(q.dtype))
    for tile, way in plan.tiles:
        mask = _mask(q, plan.spec, tile) if way == "masked" else None
        out[tile.q], lse[tile.q] = whole(q[tile.q], k[tile.k], v[tile.k], way == "causal", mask, spec.scale)
    return (out, lse) if spec.sinks is None else _with_sinks(out, lse, spec.sinks)


def whole(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """out [b, Hq, R, Ev], time before heads in memory, and lse [b, Hq, R], of one call of the kernel.

    Args:
        causal: top left, with no more queries than keys and a positive scale; not together with ``mask``.
        mask: what is added to the scores, in ``state_dtype``, 4-D, each dimension as theirs or 1.

    The kernel takes a row whose highest score is NaN for one without keys (pytorch#141128), and gives it 0 and an lse of 0; with
    a mask it does not. So where an lse is 0, which an honest row has by chance only, all is done once more with a mask.
    """
    out, lse = _run_forward(q, k, v, causal, mask, scale)
    if mask is None and not bool(lse.all()):
        rows, keys = q.shape[-2], k.shape[-2]
        mask = torch.zeros(1, 1, rows, keys, dtype=state_dtype(q.dtype), device=q.device)
        if causal:
            mask.masked_fill_(torch.ones(rows, keys, dtype=torch.bool, device=q.device).triu(1), -torch.inf)
        out, lse = _run_forward(q, k, v, False, mask, scale)
    elif mask is not None:
        dead = mask.amax(-1) == -torch.inf  # [b or 1, Hq or 1, R or 1]
        if bool(dead.any()):
            out, lse = out.masked_fill(dead[..., None], 0), lse.masked_fill(dead, -torch.inf)
    return out if out.dtype == q.dtype else out.to(q.dtype), lse


def whole_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, mask: Tensor | None, scale: float
) -> tuple[Tensor, ...]:
    """dq, dk, dv of ``whole``."""
    if mask is not None:
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # a row without keys: exp(-inf - inf) = 0
    return _run_backward([dout, None, q, out, lse], k, v, causal, mask, scale)


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    out *= torch.where(total == -torch.inf, 0, torch.exp(lse - total))[..., None]
    return out, total


def attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: Spec, wanted: list[bool]
) -> tuple[Tensor, ...]:
    results = empty_gradients(q, k, v, spec, wanted)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # a row without keys: exp(-inf - inf) = 0
    plan = _plan(q, k, v, spec)
    if plan.covering is not None:
        mask = _mask(q, plan.spec, plan.covering) if plan.tiles[0][1] == "masked" else None
        grads = _run_backward([dout, dlse, q, out, lse], k, v, plan.tiles[0][1] == "causal", mask, spec.scale)
        return *(_placed(place, grad) for place, grad in zip(results, grads, strict=False)), *results[3:]
    sums = [torch.zeros_like(grad, dtype=lse.dtype) for grad in results[:3]]
    for tile, way in plan.tiles:
        mask = _mask(q, plan.spec, tile) if way == "masked" else None
        rows: list[Any] = [None if t is None else t[tile.q] for t in (dout, dlse, q, out, lse)]
        grads = _run_backward(rows, k[tile.k], v[tile.k], way == "causal", mask, spec.scale)
        for total, grad, at in zip(sums, grads, (tile.q, tile.k, tile.k), strict=True):
            if total.numel():
                total[at] += grad
    return *(place.copy_(total) for place, total in zip(results, sums, strict=False)), *results[3:]


def _placed(place: Tensor, grad: Tensor) -> Tensor:
    """The result where its contract wants it: in most calls it is there already."""
    if place.numel() == 0 or (grad.stride() == place.stride() and grad.dtype == place.dtype):
        return grad if place.numel() else place
    return place.copy_(grad)


class _Plan(NamedTuple):
    spec: Spec  # that of the tiles
    tiles: list[tuple[Tile, str]]  # "plain", "causal" (top-left) or "masked"
    covering: Tile | None  # the only tile, if it holds all queries and keys


def _plan(q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> _Plan:
    ragged = spec.cu_q is not None or spec.q_lengths is not None or spec.k_lengths is not None
    if 0 in q.shape or 0 in k.shape or v.shape[-1] == 0:
        return _Plan(spec, [], None)
    tq, tk = q.shape[-2], k.shape[-2]
    if ragged:
        groups = list(reference.alone(spec, tq, tk))
        spec = spec._replace(q_lengths=None, k_lengths=None)
    else:
        groups = [reference.Group(slice(0, q.shape[0]), tq, tk, spec.offset + (tk - tq if spec.bottom_right else 0))]
    pairs = [part for part in (spec.mask, spec.bias, spec.slopes, spec.blocks, spec.relative_bias) if part is not None]
    held = max([1, *(_held(part, q.shape[-3]) for part in pairs)])
    tiles: list[tuple[Tile, str]] = []
    for group in groups:
        tiles += _tiles(group, spec, len(pairs), held)
    first = tiles[0][0] if len(tiles) == 1 else None
    covers = first is not None and not ragged and first.rows == slice(0, tq) and first.keys == slice(0, tk)
    return _Plan(spec, tiles, first if covers else None)


def _tiles(group: reference.Group, spec: Spec, pairs: int, held: int) -> list[tuple[Tile, str]]:
    tq, tk, shift = group.queries, group.keys, group.shift
    if tq == 0 or tk == 0:
        return []
    everything = group.tile(slice(0, tq), slice(0, tk))
    left, right = spec.left >= 0 and tq - 1 + shift > spec.left, spec.right >= 0 and shift + spec.right < tk - 1
    if not pairs and not left:
        if not right:
            return [(everything, "plain")]
        # earlier kernels want no more queries than keys; what they hide is -inf times the scale: NaN with 0, +inf below
        if shift + spec.right == 0 and tq <= tk and spec.scale > 0:
            return [(everything, "causal")]
    if pairs == 1 and spec.bias is not None and not left and not right:
        return [(everything, "masked")]
    return [(tile, "masked") for tile in reference.blocks(group, spec, held) if tile.keys.stop > tile.keys.start]


def _held(part: Tensor, heads: int) -> int:
    """Masks of one tile that a part of the spec asks for: sequences times heads."""
    if part.dim() == 4:
        return part.shape[0] * part.shape[1]
    return part.shape[0] * heads


def _mask(q: Tensor, spec: Spec, tile: Tile) -> Tensor | None:
    own, _ = reference.of_tile(spec, tile)
    return reference.added(own, tile, q.device, state_dtype(q.dtype))


def _run_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """[b, Hq, R, Ev] and [b, Hq, R]."""
    features = v.shape[-1]
    if features == q.shape[-1] and k.shape[1] == q.shape[1] and q.dtype != torch.float16:
        return _forward(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    q, k, v = _even(*_kernel_inputs(q, k, v))
    out, lse = _forward(q, _spread(k, q), _spread(v, q), 0.0, causal, attn_mask=mask, scale=scale)
    return out[..., :features], lse


def _run_backward(
    rows: list[Any], k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv. The gradient of the scores is w (dout v - sum dout out + dlse): one more feature, dout 1, out -dlse, v 0."""
    dout, dlse, q, out, lse = rows
    if dlse is None and q.dtype != torch.float16 and k.shape[1] == q.shape[1] and k.shape[-1] == v.shape[-1]:
        return _backward(dout, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale)
    e, ev, heads = q.shape[-1], v.shape[-1], k.shape[1]
    if dlse is not None:
        q, k, v, dout, out = (t.to(lse.dtype) for t in (q, k, v, dout, out))
        dout, v = F.pad(dout, (0, 1), value=1), F.pad(v, (0, 1))
        out = torch.cat((out, -dlse[..., None].to(lse.dtype)), -1)
    q, k, v, dout, out = _even(*_kernel_inputs(q, k, v, dout, out))
    dq, dk, dv = _backward(dout, q, _spread(k, q), _spread(v, q), out, lse, 0.0, causal, attn_mask=mask, scale=scale)
    if dk.shape[1] != heads:
        dk, dv = (grad.unflatten(1, (heads, -1)).sum(2) for grad in (dk, dv))
    return dq[..., :e], dk[..., :e], dv[..., :ev]


def _kernel_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """fp16 in fp32: the kernel's own fp16 is 2 times slower forward and 10 times backward on CPUs without fp16 arithmetic."""
    return tuple(t.float() for t in tensors) if tensors[0].dtype == torch.float16 else tensors


def _even(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The kernel wants as many features of v as of q and k: zeros change nothing."""
    features = max(t.shape[-1] for t in tensors)
    return tuple(t if t.shape[-1] == features else F.pad(t, (0, features - t.shape[-1])) for t in tensors)


def _spread(k: Tensor, q: Tensor) -> Tensor:
    return k if _GROUPED or k.shape[1] == q.shape[1] else k.repeat_interleave(q.shape[1] // k.shape[1], 1)
