"""What the ops count in ``torch.utils.flop_counter``, by torch's rules: products alone, a multiplication and an addition each.

The counter's module imports Triton, so the formulas are registered when a counter is first met and not before.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .types import Spec


def announce() -> None:
    """Tell torch's counters, if there are any, those that count already among them."""
    counting = sys.modules.get("torch.utils.flop_counter")
    if counting is None:
        return
    ops = [getattr(torch.ops.fastseq, name) for name in (*_OF_SHAPES, *_OF_TENSORS) if hasattr(torch.ops.fastseq, name)]
    for op in ops:
        if op not in counting.flop_registry:
            name = op._qualified_op_name.split("::")[1]
            of_tensors = name in _OF_TENSORS
            counting.register_flop_formula(op, get_raw=of_tensors)((_OF_TENSORS if of_tensors else _OF_SHAPES)[name])
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, counting._FlopCounterMode):
            mode.counter.flop_registry.update({op: counting.flop_registry[op] for op in ops})


def _recurrent_forward(
    x: Any, w_ih: Any, b_ih: Any, weight: Any, vectors: Any, projection: Any, *args: Any, **kwargs: Any
) -> int:
    return sum([2 * math.prod(x[:-1]) * math.prod(of) for of in (w_ih, weight, projection) if of is not None])


def _recurrent_backward(
    dy: Any, dh_n: Any, dc_n: Any, dc: Any, weight: Any, vectors: Any, projection: Any, *args: Any, **kwargs: Any
) -> int:
    h0, batch_sizes, y = args[0], args[3], args[6]  # y: rows, D, P
    first = y[1] if h0 is None and batch_sizes is None else 0  # rows of the first step, behind which no gradient is wanted
    rows = math.prod(y[:-2])
    return 2 * (rows - first) * math.prod(weight) + (0 if projection is None else 2 * rows * math.prod(projection))


def _recurrent(x: Any, h0: Any, c0: Any, params: Any, *args: Any, **kwargs: Any) -> int:
    return sum([2 * math.prod(x[:-1]) * math.prod(weight) for weight in params if len(weight) == 2])


def _pairs(q: Tensor, k: Tensor, fields: tuple[Any, ...]) -> int:
    """Of a query and a key, over all heads; those that a mask hides count as well."""
    spec = Spec(*fields[: len(Spec._fields)])
    if spec.cu_q is None or spec.cu_k is None:
        return math.prod(q.shape[:3]) * k.shape[2]
    if type(spec.cu_q) is Tensor and not spec.cu_q.is_meta:
        return q.shape[0] * int((spec.cu_q.long().diff() * spec.cu_k.long().diff()).sum())
    return q.shape[0] * (len(spec.cu_q) - 1) * spec.max_q * spec.max_k


def _attention_forward(q: Tensor, k: Tensor, v: Tensor, *fields: Any, **kwargs: Any) -> int:
    return 2 * _pairs(q, k, fields) * (q.shape[-1] + v.shape[-1])


def _attention_backward(
    dout: Any, dlse: Any, q: Tensor, k: Tensor, v: Tensor, out: Any, lse: Any, *fields: Any, **kwargs: Any
) -> int:
    # the scores once more, gradients of the weights, of v, q and k
    return 2 * _pairs(q, k, fields) * (3 * q.shape[-1] + 2 * v.shape[-1])


def _attention_weights(q: Tensor, k: Tensor, lse: Any, *fields: Any, **kwargs: Any) -> int:
    return 2 * _pairs(q, k, fields) * q.shape[-1]


def _attention_weights_backward(dw: Any, q: Tensor, k: Tensor, lse: Any, *fields: Any, **kwargs: Any) -> int:
    return 3 * _attention_weights(q, k, lse, *fields)


def _attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Any, block_table: Tensor | None, *args: Any, **kwargs: Any
) -> int:
    keys = k_cache.shape[2] * (1 if block_table is None else block_table.shape[1])
    return 2 * math.prod(q.shape[:3]) * keys * (q.shape[3] + v_cache.shape[3])


_OF_SHAPES = {
    "recurrent": _recurrent,
    "recurrent_forward": _recurrent_forward,
    "recurrent_backward": _recurrent_backward,
    "recurrent_newton": _recurrent_forward,
    "recurrent_parallel_backward": _recurrent_backward,
}
_OF_TENSORS = {
    "attention_forward": _attention_forward,
    "attention_backward": _attention_backward,
    "attention_weights": _attention_weights,
    "attention_with_weights": _attention_forward,
    "attention_weights_backward": _attention_weights_backward,
    "attention_decode": _attention_decode,
}
