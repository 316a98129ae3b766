"""One step of each cell, forward and backward; the loop over time stands in ``reference/recurrent.py``.

Every file defines, for tensors of any leading shape ``[..., n * H]``:

``step(x, r, vectors, h, c) -> (h, c, saved)``
    ``x`` input gates, ``r = h R^T`` recurrent gates (both in PyTorch's gate order), ``vectors`` the parameters that act inside a
    step (or None), ``h`` the previous output, ``c`` the other states side by side. Independent of other rows, it runs one step,
    or all steps at once to recompute ``saved``.
``step_backward(dh, dc, saved, vectors, h_prev, c_prev, h, c) -> (dx, dr, dh_prev, dc_prev)``
    gradients of ``x``, of ``r`` (None: the same as ``dx``), and what reaches the previous state other than through ``r``
    (or None).
``vector_gradients(dx, dr, dh, saved, vectors, c_prev, c) -> [..., V * H]``
    gradients of the vectors, row by row; only where there are vectors.
``candidate(saved, c_prev) -> c``
    the cell state that a step proposed, before zoneout; only of cells whose one wide state is c.
``output(saved, vectors, c) -> h``
    what a projection projects; only of cells that can have one.
``jacobian(weight, saved, vectors, h_prev, c_prev, h, c) -> [..., H] or [..., H, 2, 2]``
    the derivative of each unit's state by its state before, of a layer in which no unit sees another: R is diagonal, and
    ``weight`` [..., G * H] that diagonal of each gate. A block has rows and columns h, c; only where the table says so.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from . import coupled_lstm, gru, layer_norm_gru, layer_norm_lstm, lstm, peephole_lstm, rnn, slstm

__all__ = ["Steps", "steps"]


class Steps(Protocol):
    """What every file (for the Elman cell, every object of it) defines; Any is a Tensor, or None where the cell has none."""

    def step(self, x: Tensor, r: Tensor, vectors: Any, h: Tensor, c: Any) -> tuple[Tensor, Any, Any]: ...

    def step_backward(
        self, dh: Tensor, dc: Any, saved: Any, vectors: Any, h_prev: Tensor, c_prev: Any, h: Tensor, c: Any
    ) -> tuple[Tensor, Any, Any, Any]: ...


# Any: the functions that only some cells have
_STEPS: dict[str, Any] = {
    "lstm": lstm,
    "gru": gru,
    "rnn_tanh": rnn.TANH,
    "rnn_relu": rnn.RELU,
    "coupled_lstm": coupled_lstm,
    "peephole_lstm": peephole_lstm,
    "layer_norm_lstm": layer_norm_lstm,
    "layer_norm_gru": layer_norm_gru,
    "slstm": slstm,
}


def steps(cell: str) -> Any:
    """The object that holds the mathematics of a cell of the table: a :class:`Steps`."""
    return _STEPS[cell]
