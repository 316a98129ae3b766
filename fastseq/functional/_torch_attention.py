"""Attention without its lse: by torch's own functions, by the CPU's kernel without an op around it, or by the op."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..backends.torch import attention as torchs
from ..ops import _attention_eager as eager
from ..ops import attention as ops
from ..ops._dispatch import recorded, transforming
from ..reference.attention import Spec
from ._autocast import without_autocast
from ._recording import recorder, refuse_onnx


def attention_output(q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> Tensor:
    """[B, Hq, Tq, Ev]; differentiable. The seed of a dropout is drawn here, if it is not torch's: ``spec`` has none."""
    way = _way(q, k, v, spec, weights=False)
    if way == "torch":
        with without_autocast(q.device.type):
            return torchs.attention(q, k, v, spec, recorder() is not None)
    if way == "eager":
        return eager.attention(q, k, v, spec)
    return ops.attention(q, k, v, seeded(q, spec))[0]


def attention_and_weights(q: Tensor, k: Tensor, v: Tensor, spec: Spec, average: bool) -> tuple[Tensor, Tensor]:
    """The same, and the weights after dropout, [B, Hq, Tq, Tk], or averaged over the heads, [B, Tq, Tk]."""
    if _way(q, k, v, spec, weights=True) == "torch":
        with without_autocast(q.device.type):
            return torchs.attention_with_weights(q, k, v, spec, average)
    out, _, weights = ops.attention_with_weights(q, k, v, seeded(q, spec), average)
    return out, weights


def seeded(q: Tensor, spec: Spec) -> Spec:
    """The spec with a seed for its dropout, of the device's generator, so that ``torch.manual_seed`` repeats it."""
    if not spec.dropout or spec.seed is not None:
        return spec
    return spec._replace(seed=torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=q.device))


def _way(q: Tensor, k: Tensor, v: Tensor, spec: Spec, weights: bool) -> str:
    """ "torch", "eager" or "op"."""
    record = recorder()
    if record is not None:
        lacks = torchs.lacks(q, k, spec)
        if lacks:
            refuse_onnx(f"attention with {lacks}", "torch.export takes it")
        return "op" if lacks else "torch"
    if recorded() or q.device.type != "cpu":
        return "op"
    forced = backends.forced()
    if forced not in (None, "torch", "cpu") or transforming():
        return "op"
    wants_bias = spec.bias is not None and spec.bias.requires_grad and torch.is_grad_enabled()
    if forced != "cpu":
        why = torchs.why(k, spec, weights, wants_bias)
        if (why or forced) and not torchs.lacks(q, k, spec):
            if backends.torch_runs(lambda: ops._query("forward", q, k, v, spec), why):
                return "torch"
    if weights or wants_bias or not eager.serves(q, k, v, spec):
        return "op"
    if backends.watched():
        backends.select(ops._query("forward", q, k, v, spec))
    return "eager"
