"""What the ops count in ``torch.utils.flop_counter``, by torch's rules: products alone, a multiplication and an addition each.

The counter's module imports Triton, so the formulas are registered when a counter is first met and not before.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def announce() -> None:
    """Tell torch's counters, if there are any, those that count already among them."""
    counting = sys.modules.get("torch.utils.flop_counter")
    if counting is None:
        return
    ops = {getattr(torch.ops.fastseq, name): formula for name, formula in _FORMULAS.items()}
    if not ops.keys() <= counting.flop_registry.keys():
        for op, formula in ops.items():
            counting.register_flop_formula(op)(formula)
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
    y = args[6]  # rows, D, P
    return sum([2 * math.prod(y[:-2]) * math.prod(of) for of in (weight, projection) if of is not None])


def _recurrent(x: Any, h0: Any, c0: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any, w_hr: Any, *args: Any, **kwargs: Any) -> int:
    return sum(2 * math.prod(x[:-1]) * math.prod(weight) for kind in (w_ih, w_hh, w_hr) for weight in kind)


_FORMULAS = {
    "recurrent": _recurrent,
    "recurrent_forward": _recurrent_forward,
    "recurrent_backward": _recurrent_backward,
}
