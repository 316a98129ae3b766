"""RNN, LSTM, GRU and their cells: torch.nn's constructors, parameters and results, on fastseq's kernels.

The classes derive from nn.RNNBase and nn.RNNCellBase, which give parameters, initialisation, repr and
state_dict, and not from nn.LSTM and its kin, which torch.compile refuses to trace. What stands here is what a
module adds to `fastseq.functional`: its parameters, unbatched input and PackedSequence. Values are checked
there, ranks here.

Letters: T time, B batch, I input_size, H hidden_size, P proj_size if > 0 else H, L num_layers, D directions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastseq import functional

__all__ = ["GRU", "GRUCell", "LSTM", "LSTMCell", "RNN", "RNNCell"]


class _Sequence(nn.RNNBase):
    """All of RNN, LSTM and GRU but the function they call and what they return."""

    # A class attribute, so that a torch.nn module whose __class__ was swapped to ours has it too.
    recompute: bool = False

    def flatten_parameters(self) -> None:
        """Does nothing and need not be called.

        torch.nn gathers the weights in one buffer for cuDNN here. fastseq reads every parameter where it
        lies, so parameters never change their storage behind the back of an optimizer, a tied module or FSDP.
        """

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Raise unless `input` fits the weights: three-dimensional, or [N, I] when `batch_sizes` are given.

        Raises:
            ValueError: another dtype than the weights' outside autocast.
            RuntimeError: another number of dimensions, or another last size than input_size.
        """
        dtype, device = getattr(self, self._flat_weights_names[0]).dtype, input.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if input.dtype != dtype and not autocast:
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({dtype}). "
                f"Convert input: input.to({dtype}), or convert model: model.to({input.dtype})"
            )
        dim = 3 if batch_sizes is None else 2
        if input.dim() != dim:
            raise RuntimeError(f"input must have {dim} dimensions, got {input.dim()}")
        if input.size(-1) != self.input_size:
            raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.size(-1)}")

    def _checked(self, hx: Any, dim: int, kind: str) -> Any:
        """`hx`, if it is what this cell takes and `dim`-dimensional as `kind` input wants it."""
        if not isinstance(hx, Tensor):
            # torch raises the same type, from inside: 'tuple' object has no attribute 'dim'.
            raise AttributeError(f"{_kind(self)}: hx should be one Tensor h_0, got {_describe(hx)}")
        if hx.dim() != dim:
            raise RuntimeError(f"For {kind} input, hx should also be {dim}-D but got {hx.dim()}-D tensor")
        return hx

    def _batched(self, hx: Any) -> Any:
        """`hx` of an unbatched sequence, [L*D, features], as that of a batch of one."""
        return hx.unsqueeze(1)

    def _run(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        input: Tensor | PackedSequence,
        hx: Any,
        lengths: Tensor | None,
        **options: Any,
    ) -> tuple[Any, ...]:
        """(output, h_n), or (output, h_n, c_n), or (output, h_n, c_n, cells), in the layout of `input`."""
        # By attribute, at every call: weight_norm, parametrizations, functional_call and FSDP replace them.
        params = [getattr(self, name) for name in self._flat_weights_names]
        options.update(
            has_biases=self.bias,
            num_layers=self.num_layers,
            dropout=self.dropout,
            training=self.training,
            bidirectional=bool(self.bidirectional),
            recompute=self.recompute,
        )
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError(
                    f"{_kind(self)}: got a PackedSequence and lengths, but a PackedSequence carries its own "
                    "lengths. Give the PackedSequence alone, or a padded tensor and lengths"
                )
            return self._run_packed(function, input, hx, params, options)
        return self._run_padded(function, input, hx, lengths, params, options)

    def _run_packed(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        input: PackedSequence,
        hx: Any,
        params: list[Tensor],
        options: dict[str, Any],
    ) -> tuple[Any, ...]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if hx is None:
            self.check_input(data, batch_sizes)
        else:
            hx = self._checked(hx, 3, "packed")
            # Before the rows are sorted: index_select would take them out of a larger batch without a word.
            self.check_forward_args(data, hx, batch_sizes)
            hx = self.permute_hidden(hx, sorted_indices)
        output, *states = function(data, hx, params, batch_sizes=batch_sizes, **options)
        # Cells [L, N, D*H], if asked for, have packed rows as the output has: nothing to unsort.
        states, cells = states[:2], states[2:]
        if unsorted_indices is not None:
            states = [state.index_select(1, unsorted_indices) for state in states]
        return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), *states, *cells

    def _run_padded(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        input: Tensor,
        hx: Any,
        lengths: Tensor | None,
        params: list[Tensor],
        options: dict[str, Any],
    ) -> tuple[Any, ...]:
        if input.dim() not in (2, 3):
            raise ValueError(f"{_kind(self)}: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        if hx is not None:
            hx = self._checked(hx, input.dim(), "batched 3-D" if batched else "unbatched 2-D")
        if not batched:  # from here on a batch of one
            input = input.unsqueeze(batch_dim)
            hx = None if hx is None else self._batched(hx)
            if isinstance(lengths, Tensor):
                if lengths.dim() != 0:
                    raise RuntimeError(f"For unbatched 2-D input, lengths should be 0-D but got {lengths.dim()}-D tensor")
                lengths = lengths.unsqueeze(0)
        if hx is None:
            self.check_input(input, None)
        else:
            self.check_forward_args(input, hx, None)
        results = function(input, hx, params, lengths=lengths, batch_first=self.batch_first, **options)
        if batched:
            return results
        output, *states = results
        # States are [L*D, 1, n]; cells, if asked for, are laid out as [L, *output].
        states, cells = states[:2], states[2:]
        return (
            output.squeeze(batch_dim),
            *(state.squeeze(1) for state in states),
            *(layers.squeeze(batch_dim + 1) for layers in cells),
        )


class RNN(_Sequence):
    """`torch.nn.RNN`: h_t = act(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh), act being tanh or ReLU.

    Constructor, parameters, initialisation and state_dict are those of `torch.nn.RNN`.

    Args:
        input_size: I, features of a step of the input.
        hidden_size: H, features of the state.
        num_layers: L; layer k reads the output of layer k-1.
        nonlinearity: "tanh" or "relu".
        bias: False leaves out b_ih and b_hh.
        batch_first: input and output are [B, T, ...]; states are not affected, nor is unbatched input.
        dropout: probability of zeroing an output of every layer but the last, in training.
        bidirectional: D = 2, with a second set of weights running from the last step to the first.
        device, dtype: of the parameters.
        recompute: do not keep what the backward needs of every step but compute it again there: less memory,
            more time.

    Raises:
        ValueError: a size that is not positive, dropout outside [0, 1], an unknown nonlinearity, any
            `proj_size`.
        TypeError: input_size or hidden_size no int; bias or batch_first no bool.
    """

    nonlinearity: str

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        recompute: bool = False,
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, recompute: bool = False, **kwargs: Any) -> None:
        _refuse_proj_size(kwargs)
        nonlinearity = args[3] if len(args) > 3 else kwargs.pop("nonlinearity", "tanh")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        # Named, not super(): between this class and RNNBase keep_type has nn.RNN, whose own constructor is
        # not wanted.
        nn.RNNBase.__init__(self, f"RNN_{nonlinearity.upper()}", *args[:3], *args[4:], **kwargs)
        self.nonlinearity = nonlinearity
        self.recompute = recompute

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run every layer over the sequence.

        Args:
            input: [T, B, I], or [B, T, I] with batch_first, or unbatched [T, I], or a PackedSequence.
            hx: h_0 [L*D, B, H] ([L*D, H] unbatched), in the caller's order of rows. None: zeros.
            lengths: int32 or int64 [B] ([] unbatched) on the input's device, 0 <= lengths <= T. Row b then
                ends at step lengths[b]: output is zero from there on, h_n is the state there, and the reverse
                direction starts there.

        Returns:
            output [T, B, D*H] in the layout of the input (a PackedSequence for a PackedSequence), and h_n
            [L*D, B, H].

        Raises:
            ValueError: input neither 2-D nor 3-D, a dtype other than the weights' outside autocast, or
                lengths together with a PackedSequence.
            RuntimeError: sizes, devices or dtypes of states that do not fit, lengths out of range or not of
                an integer dtype, or T = 0.
            TypeError: lengths is no tensor.
            AttributeError: hx is no tensor (torch's type for it).
        """
        nonlinearity = "relu" if self.mode == "RNN_RELU" else "tanh"
        output, h_n = self._run(functional.rnn, input, hx, lengths, nonlinearity=nonlinearity)
        return output, h_n


class LSTM(_Sequence):
    """`torch.nn.LSTM`, with projections, lengths as a tensor, and the cell state of every step on request.

    i, f, g, o = W_ih x_t + b_ih + W_hh h_(t-1) + b_hh;  c_t = sigmoid(f) c_(t-1) + sigmoid(i) tanh(g);
    h_t = sigmoid(o) tanh(c_t), and with proj_size h_t = W_hr (sigmoid(o) tanh(c_t)).
    Constructor, parameters, initialisation and state_dict are those of `torch.nn.LSTM`.

    Args:
        input_size: I, features of a step of the input.
        hidden_size: H, features of the cell state.
        num_layers: L; layer k reads the output of layer k-1.
        bias: False leaves out b_ih and b_hh.
        batch_first: input, output and cells are [B, T, ...]; states are not affected, nor is unbatched input.
        dropout: probability of zeroing an output of every layer but the last, in training.
        bidirectional: D = 2, with a second set of weights running from the last step to the first.
        proj_size: P, features of h when > 0; smaller than hidden_size.
        device, dtype: of the parameters.
        recompute: do not keep the gates of every step for the backward but compute them again there: less
            memory, more time.

    Raises:
        ValueError: a size that is not positive, dropout outside [0, 1], proj_size outside [0, hidden_size).
        TypeError: input_size or hidden_size no int; bias or batch_first no bool.
    """

    @overload
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
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, recompute: bool = False, **kwargs: Any) -> None:
        nn.RNNBase.__init__(self, "LSTM", *args, **kwargs)
        self.recompute = recompute

    def get_expected_cell_size(self, input: Tensor, batch_sizes: Tensor | None) -> tuple[int, int, int]:
        """[L*D, B, H], the size of c_0 and c_n for this input."""
        layers, batch, _ = self.get_expected_hidden_size(input, batch_sizes)
        return layers, batch, self.hidden_size

    def check_forward_args(
        self,
        input: Tensor,
        hidden: tuple[Tensor, Tensor],  # type: ignore[override]
        batch_sizes: Tensor | None,
    ) -> None:
        """Raise unless `input` fits the weights and h_0 and c_0 fit the input."""
        self.check_input(input, batch_sizes)
        hidden_size = self.get_expected_hidden_size(input, batch_sizes)
        cell_size = self.get_expected_cell_size(input, batch_sizes)
        self.check_hidden_size(hidden[0], hidden_size, "Expected hidden[0] size {}, got {}")
        self.check_hidden_size(hidden[1], cell_size, "Expected hidden[1] size {}, got {}")

    def permute_hidden(  # type: ignore[override]
        self, hx: tuple[Tensor, Tensor], permutation: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Both states with their batch rows in the order of `permutation`; None: as they are."""
        if permutation is None:
            return hx
        return hx[0].index_select(1, permutation), hx[1].index_select(1, permutation)

    def _checked(self, hx: Any, dim: int, kind: str) -> tuple[Tensor, Tensor]:
        h_0, c_0 = _pair(self, hx)
        if h_0.dim() != dim or c_0.dim() != dim:
            raise RuntimeError(
                f"For {kind} input, hx and cx should also be {dim}-D but got ({h_0.dim()}-D, {c_0.dim()}-D) tensors"
            )
        return h_0, c_0

    def _batched(self, hx: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return hx[0].unsqueeze(1), hx[1].unsqueeze(1)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        return_cells: bool = False,
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]] | tuple[Tensor | PackedSequence, tuple[Tensor, Tensor], Tensor]:
        """Run every layer over the sequence.

        Args:
            input: [T, B, I], or [B, T, I] with batch_first, or unbatched [T, I], or a PackedSequence.
            hx: (h_0 [L*D, B, P], c_0 [L*D, B, H]) ([L*D, P] and [L*D, H] unbatched), in the caller's order of
                rows. None: zeros.
            lengths: int32 or int64 [B] ([] unbatched) on the input's device, 0 <= lengths <= T. Row b then
                ends at step lengths[b]: output and cells are zero from there on, h_n and c_n are the states
                there, and the reverse direction starts there.
            return_cells: also return c of every step of every layer.

        Returns:
            output [T, B, D*P] in the layout of the input (a PackedSequence for a PackedSequence), and
            (h_n [L*D, B, P], c_n [L*D, B, H]). With return_cells a third value, differentiable: cells [L, T,
            B, D*H] ([L, B, T, D*H] with batch_first, [L, T, D*H] unbatched; for a PackedSequence [L, N, D*H],
            where row n belongs to row n of output.data, so `output._replace(data=cells[k])` is layer k
            packed).

        Raises:
            ValueError: input neither 2-D nor 3-D, a dtype other than the weights' outside autocast, or
                lengths together with a PackedSequence.
            RuntimeError: sizes, devices or dtypes of states that do not fit, lengths out of range or not of
                an integer dtype, or T = 0.
            TypeError: hx is no tuple, or lengths no tensor.
        """
        output, h_n, c_n, *cells = self._run(
            functional.lstm, input, hx, lengths, proj_size=self.proj_size, return_cells=return_cells
        )
        return output, (h_n, c_n), *cells


class GRU(_Sequence):
    """`torch.nn.GRU`, with the reset gate applied after the matmul as there.

    r, z = sigmoid(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh), their first two thirds;
    n = tanh(W_in x_t + b_in + r (W_hn h_(t-1) + b_hn));  h_t = (1 - z) n + z h_(t-1).
    Constructor, parameters, initialisation and state_dict are those of `torch.nn.GRU`.

    Args:
        input_size: I, features of a step of the input.
        hidden_size: H, features of the state.
        num_layers: L; layer k reads the output of layer k-1.
        bias: False leaves out b_ih and b_hh.
        batch_first: input and output are [B, T, ...]; states are not affected, nor is unbatched input.
        dropout: probability of zeroing an output of every layer but the last, in training.
        bidirectional: D = 2, with a second set of weights running from the last step to the first.
        device, dtype: of the parameters.
        recompute: do not keep the gates of every step for the backward but compute them again there: less
            memory, more time.

    Raises:
        ValueError: a size that is not positive, dropout outside [0, 1], any `proj_size`.
        TypeError: input_size or hidden_size no int; bias or batch_first no bool.
    """

    @overload
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
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, recompute: bool = False, **kwargs: Any) -> None:
        _refuse_proj_size(kwargs)
        nn.RNNBase.__init__(self, "GRU", *args, **kwargs)
        self.recompute = recompute

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run every layer over the sequence. Arguments, results and errors are those of
        `fastseq.RNN.forward`.
        """
        output, h_n = self._run(functional.gru, input, hx, lengths)
        return output, h_n


class RNNCell(nn.RNNCellBase):
    """`torch.nn.RNNCell`: one step, h' = act(W_ih x + b_ih + W_hh h + b_hh), act being tanh or ReLU.

    Constructor, parameters, initialisation and state_dict are those of `torch.nn.RNNCell`.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        bias: False leaves out b_ih and b_hh.
        nonlinearity: "tanh" or "relu"; anything else raises RuntimeError at the first call, as in torch.
        device, dtype: of the parameters.
    """

    __constants__ = ["input_size", "hidden_size", "bias", "nonlinearity"]
    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.RNNCellBase.__init__(self, input_size, hidden_size, bias, 1, device, dtype)
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step.

        Args:
            input: [B, I], or unbatched [I].
            hx: h [B, H], or unbatched [H]. None: zeros.

        Returns:
            h' [B, H], or unbatched [H].

        Raises:
            ValueError: input or hx neither 1-D nor 2-D.
            RuntimeError: sizes, dtypes or devices that do not fit each other, or an unknown nonlinearity.
        """
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}. Select from 'tanh' or 'relu'.")
        return _step_one_state(self, functional.rnn_cell, input, hx, nonlinearity=self.nonlinearity)


class LSTMCell(nn.RNNCellBase):
    """`torch.nn.LSTMCell`: one step of `fastseq.LSTM` without projection.

    Constructor, parameters, initialisation and state_dict are those of `torch.nn.LSTMCell`.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of both states.
        bias: False leaves out b_ih and b_hh.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.RNNCellBase.__init__(self, input_size, hidden_size, bias, 4, device, dtype)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            input: [B, I], or unbatched [I].
            hx: (h, c), each [B, H], or unbatched [H]. None: zeros.

        Returns:
            (h', c'), each [B, H], or unbatched [H].

        Raises:
            ValueError: input, h or c neither 1-D nor 2-D.
            RuntimeError: sizes, dtypes or devices that do not fit each other.
            TypeError: hx is no tuple.
        """
        _check_cell_input(self, input)
        if hx is not None:
            hx = _pair(self, hx)
            for index, state in enumerate(hx):
                _check_cell_rank(self, state, f"hx[{index}]")
            for index, state in enumerate(hx):
                _check_cell_state(self, state, input, index)
        parameters = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        if input.dim() == 2:
            return functional.lstm_cell(input, hx, *parameters)
        if hx is not None:
            hx = (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
        h, c = functional.lstm_cell(input.unsqueeze(0), hx, *parameters)
        return h.squeeze(0), c.squeeze(0)


class GRUCell(nn.RNNCellBase):
    """`torch.nn.GRUCell`: one step of `fastseq.GRU`.

    Constructor, parameters, initialisation and state_dict are those of `torch.nn.GRUCell`.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        bias: False leaves out b_ih and b_hh.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.RNNCellBase.__init__(self, input_size, hidden_size, bias, 3, device, dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step. Arguments, result and errors are those of `fastseq.RNNCell.forward`."""
        return _step_one_state(self, functional.gru_cell, input, hx)


def _step_one_state(
    cell: RNNCell | GRUCell, function: Callable[..., Tensor], input: Tensor, hx: Tensor | None, **options: Any
) -> Tensor:
    """`function` of a cell whose only state is h, batched or not."""
    _check_cell_input(cell, input)
    if hx is not None:
        if not isinstance(hx, Tensor):
            raise AttributeError(f"{_kind(cell)}: hx should be one Tensor h, got {_describe(hx)}")
        _check_cell_rank(cell, hx, "hidden")
        _check_cell_state(cell, hx, input, 0)
    parameters = cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh
    if input.dim() == 2:
        return function(input, hx, *parameters, **options)
    if hx is not None:
        hx = hx.unsqueeze(0)
    return function(input.unsqueeze(0), hx, *parameters, **options).squeeze(0)


def _check_cell_input(cell: nn.RNNCellBase, input: Tensor) -> None:
    _check_cell_rank(cell, input, "input")
    if input.size(-1) != cell.input_size:
        raise RuntimeError(f"input has inconsistent input_size: got {input.size(-1)} expected {cell.input_size}")


def _check_cell_rank(cell: nn.RNNCellBase, value: Tensor, name: str) -> None:
    if value.dim() not in (1, 2):
        raise ValueError(f"{_kind(cell)}: Expected {name} to be 1D or 2D, got {value.dim()}D instead")


def _check_cell_state(cell: nn.RNNCellBase, state: Tensor, input: Tensor, index: int) -> None:
    if state.dim() != input.dim():
        raise RuntimeError(
            f"For {input.dim()}-D input, hidden{index} should also be {input.dim()}-D but got {state.dim()}-D tensor"
        )
    if input.dim() == 2 and state.size(0) != input.size(0):
        raise RuntimeError(f"Input batch size {input.size(0)} doesn't match hidden{index} batch size {state.size(0)}")
    if state.size(-1) != cell.hidden_size:
        raise RuntimeError(f"hidden{index} has inconsistent hidden_size: got {state.size(-1)}, expected {cell.hidden_size}")


def _pair(module: nn.Module, hx: Any) -> tuple[Tensor, Tensor]:
    """(h, c) out of `hx`, with an error that says what was given."""
    if not isinstance(hx, (tuple, list)):
        raise TypeError(f"{_kind(module)}: hx must be a tuple of Tensors (h, c), not {_describe(hx)}")
    if len(hx) != 2:
        raise RuntimeError(f"{_kind(module)} expects two hidden states (h, c), got {_describe(hx)}")
    h, c = hx
    if not isinstance(h, Tensor) or not isinstance(c, Tensor):
        raise AttributeError(f"{_kind(module)}: hx must be a tuple of Tensors (h, c), got {_describe(hx)}")
    return h, c


def _refuse_proj_size(options: dict[str, Any]) -> None:
    if "proj_size" in options:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


def _kind(module: nn.Module) -> str:
    """The name torch's messages use, also for a subclass: 'LSTM' or 'LSTMCell'."""
    for kind in (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell):
        if isinstance(module, kind):
            return kind.__name__
    return type(module).__name__


def _describe(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        parts = ", ".join(type(part).__name__ for part in value)
        return f"a {type(value).__name__} of {len(value)} ({parts})"
    return f"a {type(value).__name__}"
