"""Functional forms: check, default, lay out the layers, call one op.

``lstm``, ``gru`` and ``rnn`` run whole stacks from a flat list of parameters, as ``torch.nn.RNNBase`` stores them
(per layer, per direction: w_ih, w_hh, then b_ih, b_hh if biased, then w_hr if projected); the ``*_cell`` functions run one step.
Nothing here looks at the values in a tensor, so everything can be compiled and exported.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cells import CELLS, Cell
from ..ops.recurrent import recurrent
from ._autocast import autocast_dtype, lowered

__all__ = ["gru", "gru_cell", "lstm", "lstm_cell", "rnn", "rnn_cell"]

_NONLINEARITIES = ("tanh", "relu")


def rnn(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """Elman RNN over a sequence, as ``torch.nn.RNN``: ``(output, h_n)``.

    Arguments, shapes and errors are those of :func:`lstm`; ``hx`` is ``h0 [L*D, B, H]`` or None.

    Raises:
        ValueError: if ``nonlinearity`` is neither ``"tanh"`` nor ``"relu"``.
    """
    output, h_n, _, _ = _stack(
        _elman(nonlinearity), input, hx, None, params, has_biases, num_layers, dropout, training, bidirectional, batch_first, 0,
        lengths, batch_sizes, False, recompute,
    )  # fmt: skip
    return output, h_n


def gru(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """GRU over a sequence, as ``torch.nn.GRU`` (reset after the matrix product): ``(output, h_n)``.

    Arguments, shapes and errors are those of :func:`lstm`; ``hx`` is ``h0 [L*D, B, H]`` or None.
    """
    output, h_n, _, _ = _stack(
        CELLS["gru"], input, hx, None, params, has_biases, num_layers, dropout, training, bidirectional, batch_first, 0,
        lengths, batch_sizes, False, recompute,
    )  # fmt: skip
    return output, h_n


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    params: Sequence[Tensor],
    *,
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    proj_size: int = 0,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    return_cells: bool = False,
    recompute: bool = False,
) -> tuple[Tensor, ...]:
    """LSTM over a sequence, as ``torch.nn.LSTM``: ``(output, h_n, c_n)``, and every step's c with ``return_cells``.

    T time, B batch, I input, H hidden, L layers, D directions, P = ``proj_size`` or H, N rows of a packed batch.

    Args:
        input: ``[T, B, I]``, ``[B, T, I]`` with ``batch_first``, or ``[N, I]`` with ``batch_sizes``; floating point.
        hx: None (zeros), or ``(h0 [L*D, B, P], c0 [L*D, B, H])``.
        params: per layer, per direction: w_ih ``[4H, I or D*P]``, w_hh ``[4H, P]``, b_ih and b_hh ``[4H]`` with ``has_biases``,
            w_hr ``[P, H]`` with ``proj_size``; gates in the order i, f, g, o.
        dropout: probability with which, in training, elements of every layer's output but the last's are zeroed.
        lengths: integer ``[B]`` on the input's device, each in 0..T. Beyond a row's length the output is zero; final states are
            those after a row's last step, where its backward direction starts.
        batch_sizes: ``PackedSequence.batch_sizes`` (int64 ``[T]`` on the CPU); the output is packed likewise, states are in
            packed order.
        return_cells: also return c of every step, ``[L, T, B, D*H]`` (``[L, B, T, D*H]`` with ``batch_first``,
            ``[L, N, D*H]`` packed).
        recompute: in training, do not save the gate activations for the backward pass but recompute them there: memory for time.

    Raises:
        RuntimeError: if ranks, sizes, dtypes, devices or ``lengths`` do not fit.
    """
    h0, c0 = (None, None) if hx is None else hx
    output, h_n, c_n, cells = _stack(
        CELLS["lstm"], input, h0, c0, params, has_biases, num_layers, dropout, training, bidirectional, batch_first, proj_size,
        lengths, batch_sizes, return_cells, recompute,
    )  # fmt: skip
    assert c_n is not None
    return (output, h_n, c_n) if cells is None else (output, h_n, c_n, cells)


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
) -> Tensor:
    """One step of an Elman RNN, as ``torch.nn.RNNCell``: h ``[B, H]`` from input ``[B, I]`` and hx ``[B, H]`` (None: zeros).

    Raises as :func:`rnn`.
    """
    return _single(_elman(nonlinearity), input, hx, None, w_ih, w_hh, b_ih, b_hh)[0]


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One step of a GRU, as ``torch.nn.GRUCell``: h ``[B, H]`` from input ``[B, I]`` and hx ``[B, H]`` (None: zeros)."""
    return _single(CELLS["gru"], input, hx, None, w_ih, w_hh, b_ih, b_hh)[0]


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM, as ``torch.nn.LSTMCell``: (h, c) ``[B, H]`` from input ``[B, I]`` and hx (h, c) (None: zeros)."""
    h, c = (None, None) if hx is None else hx
    h, c = _single(CELLS["lstm"], input, h, c, w_ih, w_hh, b_ih, b_hh)
    assert c is not None
    return h, c


def _elman(nonlinearity: str) -> Cell:
    if nonlinearity not in _NONLINEARITIES:
        raise ValueError(f"unknown nonlinearity {nonlinearity!r}; accepted: {', '.join(_NONLINEARITIES)}")
    return CELLS[f"rnn_{nonlinearity}"]


def _single(
    cell: Cell,
    input: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    params = [w_ih, w_hh] if b_ih is None else [w_ih, w_hh, b_ih, b_hh]
    if input.dim() != 2:
        raise RuntimeError(f"input must be [B, I], got {list(input.shape)}")
    for name, state in (("h", h), ("c", c)):
        if state is not None and state.dim() != 2:
            raise RuntimeError(f"{name} must be [B, H], got {list(state.shape)}")
    _, h_n, c_n, _ = _stack(
        cell, input.unsqueeze(0), _unsqueezed(h), _unsqueezed(c), params, b_ih is not None, 1, 0.0, False, False, False, 0,
        None, None, False, False,
    )  # fmt: skip
    return h_n[0], None if c_n is None else c_n[0]


def _unsqueezed(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.unsqueeze(0)


def _stack(
    cell: Cell,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    params: Sequence[Tensor | None],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
    proj_size: int,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    return_cells: bool,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    lanes = 2 if bidirectional else 1
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must lie in [0, 1], got {dropout}")
    layers = _lane_params(params, has_biases, num_layers, lanes, proj_size)
    _check_input(input, batch_sizes)
    lower = autocast_dtype(input.device.type)
    if lower is not None:
        input, h0, c0 = lowered(input, lower), lowered(h0, lower), lowered(c0, lower)
        layers = [[lowered(p, lower) for p in layer] for layer in layers]
    _check_params(cell, input, layers, lanes, proj_size)
    if batch_first and batch_sizes is None:
        input = input.transpose(0, 1)
    if batch_sizes is None and input.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    w_hh = layers[0][1]
    assert w_hh is not None
    hidden, width = w_hh.shape[0] // len(cell.gates), w_hh.shape[1]
    _check_state("h0", h0, input, batch_sizes, (num_layers * lanes, width))
    _check_state("c0", c0, input, batch_sizes, (num_layers * lanes, hidden))
    _check_lengths(input, lengths, batch_sizes)

    reverse = [0, 1][:lanes]
    x = input
    if lengths is not None:
        # What stands beyond a row's length is not the caller's data: 0 * NaN must not reach the weights' gradients.
        valid = torch.arange(x.shape[0], device=x.device)[:, None] < lengths
        x = x.masked_fill(~valid[..., None], 0)
    h_ns, c_ns, cells = [], [], []
    for layer, lane_params in enumerate(layers):
        part = slice(layer * lanes, (layer + 1) * lanes)
        x, h_n, c_n, c = recurrent(
            x,
            None if h0 is None else h0[part],
            None if c0 is None else c0[part],
            lane_params,
            cell=cell.name,
            reverse=reverse,
            lengths=lengths,
            batch_sizes=batch_sizes,
            return_cells=return_cells,
            recompute=recompute,
        )
        if dropout and training and layer < num_layers - 1:
            x = torch.nn.functional.dropout(x, dropout)
        h_ns.append(h_n)
        if c_n is not None:
            c_ns.append(c_n)
        if c is not None:
            cells.append(c)
    h_n = h_ns[0] if num_layers == 1 else torch.cat(h_ns)
    c_n = all_cells = None
    if cell.has_c:
        c_n = (c_ns[0] if num_layers == 1 else torch.cat(c_ns)).to(x.dtype)
    if return_cells:
        all_cells = torch.stack(cells).to(x.dtype)
    if batch_first and batch_sizes is None:
        x = x.transpose(0, 1)
        all_cells = None if all_cells is None else all_cells.transpose(1, 2)
    return x, h_n, c_n, all_cells


def _lane_params(
    params: Sequence[Tensor | None], has_biases: bool, num_layers: int, lanes: int, proj_size: int
) -> list[list[Tensor | None]]:
    """Per layer, the op's five parameters of every lane in one flat list, None where there is none."""
    each = 2 + 2 * has_biases + (proj_size > 0)
    if len(params) != each * num_layers * lanes:
        raise RuntimeError(
            f"expected {each * num_layers * lanes} parameters ({each} for each of {num_layers} layers x {lanes} directions), "
            f"got {len(params)}"
        )
    layers = []
    for layer in range(num_layers):
        flat: list[Tensor | None] = []
        for lane in range(lanes):
            begin = (layer * lanes + lane) * each
            given = list(params[begin : begin + each])
            w_hr = given.pop() if proj_size else None
            flat += [*given[:2], *(given[2:] if has_biases else (None, None)), w_hr, None]
        layers.append(flat)
    return layers


def _check_input(input: Tensor, batch_sizes: Tensor | None) -> None:
    rank = 3 if batch_sizes is None else 2
    if input.dim() != rank:
        raise RuntimeError(f"input must have {rank} dimensions, got {input.dim()}")
    if not input.is_floating_point():
        raise RuntimeError(f"input must be floating point, got {input.dtype}")


def _check_params(cell: Cell, input: Tensor, layers: list[list[Tensor | None]], lanes: int, proj_size: int) -> None:
    w_hh = layers[0][1]
    assert w_hh is not None
    gates = len(cell.gates)
    if w_hh.dim() != 2 or w_hh.shape[0] % gates:
        raise RuntimeError(f"weight_hh must be [{gates} * H, P], got {list(w_hh.shape)}")
    hidden = w_hh.shape[0] // gates
    width = proj_size or hidden
    columns = input.shape[-1]
    for layer, params in enumerate(layers):
        expected = (
            (gates * hidden, columns), (gates * hidden, width), (gates * hidden,), (gates * hidden,), (width, hidden),
            (len(cell.vectors) * hidden,),
        )  # fmt: skip
        for place, param in enumerate(params):
            if param is None:
                continue
            name = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "vectors")[place % len(expected)]
            if param.dtype != input.dtype:
                raise RuntimeError(f"input dtype ({input.dtype}) does not match {name} dtype ({param.dtype})")
            if param.device != input.device:
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but input is on {input.device} and {name} on {param.device}"
                )
            if param.shape != expected[place % len(expected)]:
                raise RuntimeError(
                    f"{name} of layer {layer} must be {list(expected[place % len(expected)])}, got {list(param.shape)}"
                )
        columns = width * lanes


def _check_state(name: str, state: Tensor | None, input: Tensor, batch_sizes: Tensor | None, size: tuple[int, int]) -> None:
    if state is None:
        return
    if state.dim() != 3 or (state.shape[0], state.shape[2]) != size:
        raise RuntimeError(f"Expected {name} of size [{size[0]}, B, {size[1]}], got {list(state.shape)}")
    if batch_sizes is None and state.shape[1] != input.shape[1]:
        raise RuntimeError(f"Expected {name} for a batch of {input.shape[1]}, got {list(state.shape)}")
    if state.dtype != input.dtype:
        raise RuntimeError(f"input dtype ({input.dtype}) does not match {name} dtype ({state.dtype})")
    if state.device != input.device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but input is on {input.device} and {name} on {state.device}"
        )


def _check_lengths(input: Tensor, lengths: Tensor | None, batch_sizes: Tensor | None) -> None:
    if lengths is not None:
        if batch_sizes is not None:
            raise RuntimeError("give either lengths (padded input) or batch_sizes (packed input), not both")
        if not isinstance(lengths, Tensor):
            raise TypeError(f"lengths must be a Tensor, got {type(lengths).__name__}")
        if lengths.dtype not in (torch.int64, torch.int32):
            raise RuntimeError(f"lengths must be int64 or int32, got {lengths.dtype}")
        if lengths.shape != (input.shape[1],):
            raise RuntimeError(f"lengths must be [{input.shape[1]}], one for each row of the batch, got {list(lengths.shape)}")
        if lengths.device != input.device:
            raise RuntimeError(f"lengths must be on the input's device ({input.device}), got {lengths.device}")
    if batch_sizes is not None and (
        batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu"
    ):
        raise RuntimeError(
            "batch_sizes must be a 1-D int64 tensor on the CPU, "
            f"got {batch_sizes.dim()}-D {batch_sizes.dtype} on {batch_sizes.device}"
        )
