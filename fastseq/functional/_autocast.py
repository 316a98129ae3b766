"""What autocast does to the operands of an op that runs in the lower precision."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from ..ops._dispatch import autocasts

_Operand = TypeVar("_Operand", Tensor, Tensor | None)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast asks for on a type of device; None: autocast is off."""
    return torch.get_autocast_dtype(device_type) if autocasts(device_type) else None


def lowered(tensor: _Operand, dtype: torch.dtype | None) -> _Operand:
    """What autocast does to an operand: floating point, but not fp64, goes to its dtype."""
    if dtype is None or tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def lowered_to(cell: str, input: Tensor, states: Sequence[Tensor | None]) -> torch.dtype | None:
    """The dtype in which autocast has a recurrent cell run; None: autocast is off."""
    lower = autocast_dtype(input.device.type)
    if lower is None or cell != "gru" or input.device.type != "cpu":
        return lower
    # torch's step there, n + z (h - n), has the wider dtype of its products and its state, which is made like the input
    return torch.promote_types(lower, input.dtype if not states or states[0] is None else states[0].dtype)


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    """Products inside are not lowered a second time."""
    return nullcontext() if autocast_dtype(device_type) is None else torch.autocast(device_type, enabled=False)
