"""LSTM and GRU variants that torch.nn does not have, with its conventions: constructor, shapes, state_dict, errors.

Coupled gates, peepholes, layer norm, exponential gating; for each a module over sequences and a cell. The equations stand in
`fastseq/reference/cells`. Letters: T time, B batch, I input_size, H hidden_size, L num_layers, D directions, P proj_size or H.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from fastseq import functional
from fastseq.cells import CELLS
from fastseq.functional._native_layers import native_layers
from fastseq.functional._packing import packing_of
from fastseq.functional._solver import Newton
from fastseq.modules._checks import as_plain_tuple, describe, kind_of, public
from fastseq.modules._interop import Interop, as_leaf
from fastseq.modules.recurrent import CHECKS, Input, PairSequence, Sequence, SingleSequence, checks_of
from fastseq.modules.recurrent_cells import check_cell_input, check_cell_rank, check_cell_state
from fastseq.ops._dispatch import plain_call

__all__ = [
    "CoupledLSTM",
    "CoupledLSTMCell",
    "LayerNormGRU",
    "LayerNormGRUCell",
    "LayerNormLSTM",
    "LayerNormLSTMCell",
    "PeepholeLSTM",
    "PeepholeLSTMCell",
    "SLSTM",
    "SLSTMCell",
]

_GATES = 4  # of what torch's constructor makes


class _Variant(Sequence):
    """The constructor of a cell that torch.nn does not have, and its parameters beside weights and biases."""

    CELL: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        recompute: bool = False,
        zoneout: float = 0.0,
        weight_dropout: float = 0.0,
        num_heads: int = 1,
        solver: Newton | None = None,
    ) -> None:
        self._build(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0, device, dtype)
        self._extend(recompute, zoneout, weight_dropout, num_heads, solver)

    def _build(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        proj_size: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        row = CELLS[self.CELL]
        nn.RNNBase.__init__(
            self, "LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype
        )
        self.mode = row.mode
        for names in self._all_weights:
            suffix = names[0].removeprefix("weight_ih")
            like = getattr(self, names[0])
            for name in names if len(row.gates) != _GATES else ():
                given = getattr(self, name)
                if not name.startswith("weight_hr"):
                    setattr(self, name, nn.Parameter(given.new_empty(len(row.gates) * hidden_size, *given.shape[1:])))
            for name, size in row.extra(bias):
                setattr(self, name + suffix, nn.Parameter(like.new_empty(size * hidden_size)))
                names.append(name + suffix)
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        self._init_flat_weights()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(H) as torch.nn's; layer norm scales 1, shifts 0."""
        super().reset_parameters()
        reset_norms(self)


class _Pair(_Variant, PairSequence):
    """A cell whose states are h and c."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        zoneout: float | tuple[float, float] = 0.0,
        weight_dropout: float = 0.0,
        num_heads: int = 1,
        solver: Newton | None = None,
    ) -> None:
        self._build(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype)
        self._extend(recompute, zoneout, weight_dropout, num_heads, solver)


class _Single(_Variant, SingleSequence):
    """A cell whose state is h alone."""


@public
class CoupledLSTM(_Pair):
    """LSTM whose forget gate is one minus its input gate: three gates, a quarter less work (Greff et al. 2017, CIFG).

    i, g, o = W_ih x_t + b_ih + W_hh h_(t-1) + b_hh;  c_t = (1 - sigmoid(i)) c_(t-1) + sigmoid(i) tanh(g);
    h_t = sigmoid(o) tanh(c_t).

    Args, forward and errors are those of `fastseq.LSTM`; weight_ih is [3H, I], weight_hh [3H, P], in the order i, g, o.
    """

    CELL = "coupled_lstm"


@public
class PeepholeLSTM(_Pair):
    """LSTM whose gates see the cell state (Gers and Schmidhuber 2000).

    i, f, o see p_i c_(t-1), p_f c_(t-1) and p_o c_t besides what the gates of `fastseq.LSTM` see.

    Args, forward and errors are those of `fastseq.LSTM`; beside its parameters weight_peephole [3H]: p_i, p_f, p_o.
    """

    CELL = "peephole_lstm"


@public
class LayerNormLSTM(_Pair):
    """LSTM with layer normalization of both products and of c (Ba et al. 2016, equations 20 to 22).

    i, f, g, o = N(W_ih x_t) w_ln_ih + b_ih + N(W_hh h_(t-1)) w_ln_hh + b_hh;  c_t = sigmoid(f) c_(t-1) + sigmoid(i) tanh(g);
    h_t = sigmoid(o) tanh(N(c_t) w_ln_c + b_ln_c), where N takes the mean and the deviation over all gates together, of c over
    its units (with num_heads: of each head by itself), with eps 1e-5.

    Args, forward and errors are those of `fastseq.LSTM`; beside its parameters weight_ln_ih, weight_ln_hh [4H], weight_ln_c
    [H] and, with bias, bias_ln_c [H]. What normalizes cannot be divided among programs: the kernels run it row by row.
    """

    CELL = "layer_norm_lstm"


@public
class SLSTM(_Variant):
    """sLSTM: exponential input gate, normalizer n and stabiliser m (Beck et al. 2024, "xLSTM"), with a sigmoid forget gate.

    i, f, z, o = W_ih x_t + b_ih + W_hh h_(t-1) + b_hh;  c_t = sigmoid(f) c_(t-1) + exp(i) tanh(z);
    n_t = sigmoid(f) n_(t-1) + exp(i);  h_t = sigmoid(o) c_t / n_t, where c and n are kept times exp(-m).

    Args are those of `fastseq.GRU`. `num_heads` gives the paper's block-diagonal recurrence.
    """

    CELL = "slstm"

    def forward(
        self,
        input: Input,
        hx: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | PackedSequence | None = None,
        reset_to: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Input, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Run every layer over the sequence. Arguments and errors are those of `fastseq.LSTM.forward`, but for the states.

        Args:
            hx: (h, c, n, m), each [L*D, B, H] ([L*D, H] unbatched). None: nothing was seen yet.
            reset_to: likewise.

        Returns:
            output [T, B, D*H] in the layout of the input, and (h_n, c_n, n_n, m_n), each [L*D, B, H].
        """
        if isinstance(input, Proxy):
            return as_leaf(self, input, hx, lengths=lengths, resets=resets, reset_to=reset_to, cu_seqlens=cu_seqlens)
        output, (h_n, c_n, n_n, m_n), _ = self._run(input, hx, lengths, False, resets, reset_to, cu_seqlens)
        return output, (h_n, c_n, n_n, m_n)

    if TYPE_CHECKING:
        __call__ = forward

    def check_forward_args(
        self,
        input: Tensor,
        hidden: tuple[Tensor, ...],  # type: ignore[override]
        batch_sizes: Tensor | None,
    ) -> None:
        """Raise unless `input` fits the weights and every state the input."""
        self.check_input(input, batch_sizes)
        size = self.get_expected_hidden_size(input, batch_sizes)
        for index, state in enumerate(hidden):
            self.check_hidden_size(state, size, f"Expected hidden[{index}] size {{}}, got {{}}")

    def permute_hidden(  # type: ignore[override]
        self, hx: tuple[Tensor, ...], permutation: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The states with their batch rows in the order of `permutation`; None: as they are."""
        return hx if permutation is None else tuple(state.index_select(1, permutation) for state in hx)

    def _checked(self, hx: Any, dim: int, kind: str) -> tuple[Tensor, ...]:
        states = several_states(self, hx, CELLS[self.CELL].states)
        dims = [state.dim() for state in states]
        if any(own != dim for own in dims):
            raise RuntimeError(f"For {kind} input, the states should also be {dim}-D but got {dims}-D tensors")
        return states


@public
class LayerNormGRU(_Single):
    """GRU with layer normalization of both products (after Ba et al. 2016), its reset gate after the product as in `fastseq.GRU`.

    r, z = sigmoid(N(W_ih x_t) w_ln_ih + b_ih + N(W_hh h_(t-1)) w_ln_hh + b_hh), their first two thirds; the last thirds give
    n as there. N takes the mean and the deviation over all gates together, with eps 1e-5.

    Args, forward and errors are those of `fastseq.GRU`; beside its parameters weight_ln_ih, weight_ln_hh [3H].
    """

    CELL = "layer_norm_gru"


CHECKS.add(checks_of(SLSTM))


class VariantCell(Interop, nn.RNNCellBase):
    """One step of a variant.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of every state.
        bias: False leaves out the biases.
        device, dtype: of the parameters.
    """

    CELL: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        row = CELLS[self.CELL]
        nn.RNNCellBase.__init__(self, input_size, hidden_size, bias, len(row.gates), device, dtype)
        for name, size in row.extra(bias):
            setattr(self, name, nn.Parameter(self.weight_ih.new_empty(size * hidden_size)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(H) as torch.nn's; layer norm scales 1, shifts 0."""
        super().reset_parameters()
        reset_norms(self)

    def names(self) -> list[str]:
        """Of the parameters, in the order of the ops."""
        biases = ("bias_ih", "bias_hh") if self.bias else ()
        return ["weight_ih", "weight_hh", *biases, *(name for name, _ in CELLS[self.CELL].extra(self.bias))]

    def _step(self, input: Tensor, hx: Any) -> tuple[Tensor, ...]:
        """The states after a step, of input [B, I] or [I] and the states before it."""
        row = CELLS[self.CELL]
        if type(input) is Tensor and input.dim() == 2 and plain_call():
            kept = self._parameters
            plain: list[Any] = [kept.get(name) for name in self.names()]
            states = None if hx is None else (hx,) if type(hx) is Tensor else as_plain_tuple(hx, len(row.states))
            packing = None if self.training else packing_of(self)
            if states is None or type(states) is tuple:
                done = native_layers(self.CELL, input, states, plain, self.bias, 1, False, False, packing=packing)
                if done is not None:
                    return tuple(done)
        check_cell_input(self, input)
        states = None
        if hx is not None:
            states = several_states(self, (hx,) if len(row.states) == 1 else hx, row.states)
            for index, state in enumerate(states):
                check_cell_rank(self, state, f"hx[{index}]")
                check_cell_state(self, state, input, index)
        params = [getattr(self, name) for name in self.names()]
        unbatched = input.dim() == 1
        if unbatched:
            input = input.unsqueeze(0)
            states = None if states is None else tuple(state.unsqueeze(0) for state in states)
        results = functional.recurrent_cell(self.CELL, input, states, params, has_biases=self.bias)
        if unbatched:
            results = tuple(state.squeeze(0) for state in results)
        return results


class _PairCell(VariantCell):
    """A cell whose states are h and c."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """One step. Arguments, result and errors are those of `fastseq.LSTMCell.forward`."""
        if isinstance(input, Proxy):
            return as_leaf(self, input, hx)
        h, c = self._step(input, hx)
        return h, c

    if TYPE_CHECKING:
        __call__ = forward


class _SingleCell(VariantCell):
    """A cell whose state is h alone."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step. Arguments, result and errors are those of `fastseq.RNNCell.forward`."""
        if isinstance(input, Proxy):
            return as_leaf(self, input, hx)
        return self._step(input, hx)[0]

    if TYPE_CHECKING:
        __call__ = forward


@public
class CoupledLSTMCell(_PairCell):
    """One step of `fastseq.CoupledLSTM` without projection: (h, c) from (h, c)."""

    CELL = "coupled_lstm"


@public
class PeepholeLSTMCell(_PairCell):
    """One step of `fastseq.PeepholeLSTM` without projection: (h, c) from (h, c)."""

    CELL = "peephole_lstm"


@public
class LayerNormLSTMCell(_PairCell):
    """One step of `fastseq.LayerNormLSTM` without projection: (h, c) from (h, c)."""

    CELL = "layer_norm_lstm"


@public
class LayerNormGRUCell(_SingleCell):
    """One step of `fastseq.LayerNormGRU`: h from h."""

    CELL = "layer_norm_gru"


@public
class SLSTMCell(VariantCell):
    """One step of `fastseq.SLSTM`: (h, c, n, m) from (h, c, n, m)."""

    CELL = "slstm"

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One step.

        Args:
            input: [B, I], or unbatched [I].
            hx: (h, c, n, m), each [B, H], or unbatched [H]. None: nothing was seen yet.

        Returns:
            The states after the step, as hx has them.

        Raises:
            ValueError: input or a state neither 1-D nor 2-D.
            RuntimeError: sizes, dtypes or devices that do not fit each other.
            TypeError: hx is no tuple.
        """
        if isinstance(input, Proxy):
            return as_leaf(self, input, hx)
        h, c, n, m = self._step(input, hx)
        return h, c, n, m

    if TYPE_CHECKING:
        __call__ = forward


def reset_norms(module: nn.Module) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        if name.startswith("weight_ln"):
            nn.init.ones_(parameter)
        elif name.startswith("bias_ln"):
            nn.init.zeros_(parameter)


def several_states(module: nn.Module, hx: Any, names: tuple[str, ...]) -> tuple[Tensor, ...]:
    """`hx` as the states of these names, with an error that says what was given."""
    wanted = ", ".join(names)
    if not isinstance(hx, (tuple, list)):
        raise TypeError(f"{kind_of(module)}: hx must be a tuple of Tensors ({wanted}), not {describe(hx)}")
    if len(hx) != len(names):
        raise RuntimeError(f"{kind_of(module)} expects {len(names)} hidden states ({wanted}), got {describe(hx)}")
    if not all(isinstance(state, Tensor) for state in hx):
        raise AttributeError(f"{kind_of(module)}: hx must be a tuple of Tensors ({wanted}), got {describe(hx)}")
    return tuple(hx)
