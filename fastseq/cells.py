"""The table of recurrent cells: what a cell is, as facts. The mathematics stands in ``reference/cells/<name>.py``.

Gates are listed in PyTorch's order, so that weights are never reordered. ``saved`` names what a forward pass keeps of every
step and unit for the backward pass (``c`` is kept apart, in fp32 or wider). The GRU applies its reset gate after the
matrix product (cuDNN's ``linear_before_reset``, as ``torch.nn.GRU`` does), so one gate needs its recurrent bias inside.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """One row of the table.

    Attributes:
        name: the name that every op, kernel and file uses.
        family: file that holds its mathematics, in each language (``rnn`` serves both nonlinearities).
        mode: ``torch.nn.RNNBase.mode`` of the module that runs it.
        gates: gates in PyTorch's order.
        states: ``("h",)`` or ``("h", "c")``.
        saved: activations kept for the backward pass, in the order of the ``gates`` output of the op.
        recurrent_bias: the gate whose recurrent bias cannot be folded into the input projection, or ``None``.
    """

    name: str
    family: str
    mode: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    saved: tuple[str, ...]
    recurrent_bias: str | None = None

    @property
    def has_c(self) -> bool:
        return "c" in self.states


CELLS: dict[str, Cell] = {
    cell.name: cell
    for cell in (
        Cell("rnn_tanh", "rnn", "RNN_TANH", ("h",), ("h",), ()),
        Cell("rnn_relu", "rnn", "RNN_RELU", ("h",), ("h",), ()),
        Cell("lstm", "lstm", "LSTM", ("i", "f", "g", "o"), ("h", "c"), ("i", "f", "g", "o")),
        # q = R_n h + b_n, which the reset gate multiplies
        Cell("gru", "gru", "GRU", ("r", "z", "n"), ("h",), ("r", "z", "n", "q"), recurrent_bias="n"),
    )
}
