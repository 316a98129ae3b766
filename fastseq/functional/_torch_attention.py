"""Attention: by the CPU's library without an op around it, by torch's own functions, or by the op."""

from __future__ import annotations

from torch import Tensor

from .. import backends
from ..backends import library
from ..backends.torch import attention as torchs
from ..ops import _attention_eager as eager
from ..ops import attention as ops
from ..ops._dispatch import plain_call, recorded, transforming, wants_gradient
from ..reference.attention import Spec
from ._autocast import without_autocast
from ._recording import recorder, refuse_onnx


def attention_output(q: Tensor, k: Tensor, v: Tensor, spec: Spec, served: bool = False) -> Tensor:
    """[B, Hq, Tq, Ev]; differentiable. The seed of a dropout is drawn here, if it is not torch's: ``spec`` has none.

    ``served``: it is known of a plain call that ``eager`` serves it.
    """
    if (served or _served(q, k, v, spec)) and not _torchs_is_faster(q, k, v, spec):
        return eager.attention(q, k, v, seeded(q, spec))[0]
    if _is_torchs(q, k, v, spec):
        with without_autocast(q.device.type):
            return torchs.attention(q, k, v, spec, recorder() is not None, _is_chosen(q))
    return ops.attention(q, k, v, seeded(q, spec))[0]


def _served(q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> bool:
    return plain_call() and not backends.watched() and eager.serves(q, k, v, spec)


def attention_and_lse(q: Tensor, k: Tensor, v: Tensor, spec: Spec, served: bool = False) -> tuple[Tensor, Tensor]:
    """The same, and the lse [B, Hq, Tq]."""
    if served or _served(q, k, v, spec):
        return eager.attention(q, k, v, seeded(q, spec))  # type: ignore[return-value]
    return ops.attention(q, k, v, seeded(q, spec))


def attention_and_weights(q: Tensor, k: Tensor, v: Tensor, spec: Spec, average: bool) -> tuple[Tensor, Tensor]:
    """The same, and the weights after dropout, [B, Hq, Tq, Tk], or averaged over the heads, [B, Tq, Tk]."""
    if _served(q, k, v, spec):
        out, _, weights = eager.attention(q, k, v, seeded(q, spec), average)
        return out, weights
    if _is_torchs(q, k, v, spec, ("weights",)):
        with without_autocast(q.device.type):
            return torchs.attention_with_weights(q, k, v, spec, average)
    out, _, weights = ops.attention_with_weights(q, k, v, seeded(q, spec), average)
    return out, weights


def seeded(q: Tensor, spec: Spec) -> Spec:
    """The spec with a seed for its dropout, of the device's generator, so that ``torch.manual_seed`` repeats it."""
    if not spec.dropout or spec.seed is not None:
        return spec
    return spec._replace(seed=eager.random_seed(q.device))


def _is_chosen(q: Tensor) -> bool:
    """Whether torch's kernel was chosen for its speed, and not for want of another."""
    return backends.forced() is None and (q.device.type != "cpu" or not library.reason())


def _torchs_is_faster(q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> bool:
    """Of a plain call on the CPU that the library has a kernel for."""
    gradients = wants_gradient(ops._tensors(q, k, v, spec))
    if not eager.may_be_torchs(gradients, k.shape[2]) or backends.forced() or torchs.lacks(q, k, spec):
        return False
    if not torchs.fused_is_right(k.shape[2], spec.right == 0, spec.scale):
        return False
    return backends.torch_takes(ops._query("forward", q, k, v, spec), gradients) is not None


def _is_torchs(q: Tensor, k: Tensor, v: Tensor, spec: Spec, more: tuple[str, ...] = ()) -> bool:
    """Whether torch's own functions take a call: it is recorded, they are forced, or chosen. ``more``: what is wanted of it."""
    record = recorder()
    if record is not None:
        lacks = torchs.lacks(q, k, spec)
        if lacks:
            refuse_onnx(f"attention with {lacks}", "torch.export takes it")
        return not lacks
    if recorded() or transforming() or backends.forced() not in (None, "torch") or torchs.lacks(q, k, spec):
        return False
    query = ops._query("forward", q, k, v, spec)
    query = query._replace(uses=(*query.uses, *more))
    why = None if backends.forced() else backends.torch_takes(query, wants_gradient(ops._tensors(q, k, v, spec)))
    return backends.torch_runs(lambda: query, why)
