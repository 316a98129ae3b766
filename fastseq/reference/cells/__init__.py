"""One step of each cell, forward and backward, elementwise; the loop over time stands in ``reference/recurrent.py``.

Every file defines, for tensors of any leading shape ``[..., n * H]``:

``step(x, r, bias, h, c) -> (h, c, saved)``
    ``x`` input gates, ``r = h R^T`` recurrent gates (both in PyTorch's gate order), ``bias`` the recurrent bias that stays
    inside (or None), ``h`` and ``c`` the previous state. Being elementwise it runs one step, or all steps at once to recompute
    ``saved``.
``step_backward(dh, dc, saved, h_prev, c_prev, h, c) -> (dx, dr, dh_prev, dc_prev)``
    gradients of ``x``, of ``r`` (None: the same as ``dx``), and what reaches the previous state other than through ``r``
    (or None).
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from . import gru, lstm, rnn

__all__ = ["Steps", "steps"]


class Steps(Protocol):
    """What every file (for the Elman cell, every object of it) defines; Any is a Tensor, or None where the cell has none."""

    def step(self, x: Tensor, r: Tensor, bias: Any, h: Tensor, c: Any) -> tuple[Tensor, Any, Any]: ...

    def step_backward(
        self, dh: Tensor, dc: Any, saved: Any, h_prev: Tensor, c_prev: Any, h: Tensor, c: Any
    ) -> tuple[Tensor, Any, Any, Any]: ...


_STEPS: dict[str, Steps] = {"lstm": lstm, "gru": gru, "rnn_tanh": rnn.TANH, "rnn_relu": rnn.RELU}


def steps(cell: str) -> Steps:
    """The object that holds ``step`` and ``step_backward`` of a cell of the table."""
    return _STEPS[cell]
