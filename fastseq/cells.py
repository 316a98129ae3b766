"""The table of recurrent cells: what a cell is, as facts. The mathematics stands in ``reference/cells/<family>.py``.

Gates are listed in PyTorch's order, so that weights are never reordered. ``saved`` names what a forward pass keeps of every
step and unit for the backward pass (the states but h are kept apart, in fp32 or wider). The GRU applies its reset gate after the
matrix product (cuDNN's ``linear_before_reset``, as ``torch.nn.GRU`` does), so one gate needs its recurrent bias inside.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cell:
    """One row of the table.

    Attributes:
        name: the name that every op, kernel and file uses.
        family: file that holds its mathematics, in each language (``rnn`` serves both nonlinearities).
        mode: ``mode`` of the module that runs it, as ``torch.nn.RNNBase`` has one.
        gates: gates in PyTorch's order.
        states: ``h`` and what else passes from step to step, in fp32 or wider.
        saved: activations kept for the backward pass, in the order of the ``gates`` output of the op.
        vectors: parameters of one value a unit that act inside a step, in the order of the op's ``vectors``.
        recurrent_bias: the gate whose recurrent bias cannot be folded into the input projection but is the last of ``vectors``.
        own_recurrent: how many gates, the last ones, have another gradient of R h than of the input gates.
        parameters: a layer's parameters beside weights and biases: name, size in units of H. Those named ``bias`` go with bias.
        normalized: a step looks at all units of a row together, so a row of units cannot be divided among programs; gradients of
            its vectors need the gradient of the step's output.
        jacobian: numbers in the state of a unit, 1 or 2, whose derivative by that of the step before the mathematics has as
            ``jacobian``, for layers in which no unit sees another; 0: it has none.
        wide_states: how many states there are beside h.
        has_c: whether there is any.
    """

    name: str
    family: str
    mode: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    saved: tuple[str, ...]
    vectors: tuple[str, ...] = ()
    recurrent_bias: str | None = None
    own_recurrent: int = 0
    parameters: tuple[tuple[str, int], ...] = ()
    normalized: bool = False
    jacobian: int = 0
    wide_states: int = field(init=False)
    has_c: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "wide_states", len(self.states) - 1)
        object.__setattr__(self, "has_c", len(self.states) > 1)

    def extra(self, bias: bool) -> tuple[tuple[str, int], ...]:
        """``parameters``, with or without biases."""
        return tuple((name, size) for name, size in self.parameters if bias or not name.startswith("bias"))


CELLS: dict[str, Cell] = {
    cell.name: cell
    for cell in (
        Cell("rnn_tanh", "rnn", "RNN_TANH", ("h",), ("h",), (), jacobian=1),
        Cell("rnn_relu", "rnn", "RNN_RELU", ("h",), ("h",), (), jacobian=1),
        Cell("lstm", "lstm", "LSTM", ("i", "f", "g", "o"), ("h", "c"), ("i", "f", "g", "o"), jacobian=2),
        # q = R_n h + b_n, which the reset gate multiplies
        Cell(
            "gru",
            "gru",
            "GRU",
            ("r", "z", "n"),
            ("h",),
            ("r", "z", "n", "q"),
            ("b_n",),
            recurrent_bias="n",
            own_recurrent=1,
            jacobian=1,
        ),
        # f = 1 - i
        Cell("coupled_lstm", "coupled_lstm", "COUPLED_LSTM", ("i", "g", "o"), ("h", "c"), ("i", "g", "o"), jacobian=2),
        Cell(
            "peephole_lstm",
            "peephole_lstm",
            "PEEPHOLE_LSTM",
            ("i", "f", "g", "o"),
            ("h", "c"),
            ("i", "f", "g", "o"),
            ("p_i", "p_f", "p_o"),
            parameters=(("weight_peephole", 3),),
            jacobian=2,
        ),
        # R h itself is kept, which the backward pass normalizes again
        Cell(
            "layer_norm_lstm",
            "layer_norm_lstm",
            "LAYER_NORM_LSTM",
            ("i", "f", "g", "o"),
            ("h", "c"),
            ("i", "f", "g", "o", "R_i h", "R_f h", "R_g h", "R_o h"),
            ("w_i", "w_f", "w_g", "w_o", "w_c", "b_c"),
            own_recurrent=4,
            parameters=(("weight_ln_ih", 4), ("weight_ln_hh", 4), ("weight_ln_c", 1), ("bias_ln_c", 1)),
            normalized=True,
        ),
        Cell(
            "layer_norm_gru",
            "layer_norm_gru",
            "LAYER_NORM_GRU",
            ("r", "z", "n"),
            ("h",),
            ("r", "z", "n", "R_r h", "R_z h", "R_n h"),
            ("w_r", "w_z", "w_n", "b_n"),
            recurrent_bias="n",
            own_recurrent=3,
            parameters=(("weight_ln_ih", 3), ("weight_ln_hh", 3)),
            normalized=True,
        ),
        # normalizer n and stabilizer m; s = sigmoid(f), while f is kept stabilized
        Cell("slstm", "slstm", "SLSTM", ("i", "f", "z", "o"), ("h", "c", "n", "m"), ("i", "f", "z", "o", "s")),
    )
}
