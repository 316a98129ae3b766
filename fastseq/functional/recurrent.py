"""Recurrent layers and steps as functions: check, default, lay out the layers, call one op a layer.

``recurrent`` runs whole stacks of any cell from a flat list of parameters, as ``torch.nn.RNNBase`` stores them (per layer, per
direction: w_ih, w_hh, then b_ih, b_hh if biased, then w_hr if projected, then what the cell has beside); ``lstm``, ``gru`` and
``rnn`` are it with torch's arguments; the ``*_cell`` functions run one step.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import backends
from ..cells import CELLS, Cell
from ._recurrent_layers import Options, run_layers

__all__ = ["gru", "gru_cell", "lstm", "lstm_cell", "recurrent", "recurrent_cell", "rnn", "rnn_cell"]

_NONLINEARITIES = ("tanh", "relu")


def recurrent(
    cell: str,
    input: Tensor,
    hx: Sequence[Tensor] | None,
    params: Sequence[Tensor],
    *,
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    proj_size: int = 0,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    return_cells: bool = False,
    recompute: bool = False,
    zoneout: float | tuple[float, float] = 0,
    weight_dropout: float = 0,
    heads: int = 1,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """Any cell of ``fastseq.cells`` over a sequence: ``(output, final states, c of every step or None)``.

    T time, B batch, I input, H hidden, G gates of the cell, L layers, D directions, P = ``proj_size`` or H, N rows of a packed
    batch.

    Args:
        cell: ``"lstm"``, ``"gru"``, ``"rnn_tanh"``, ``"rnn_relu"``, ``"coupled_lstm"``, ``"peephole_lstm"``,
            ``"layer_norm_lstm"``, ``"layer_norm_gru"`` or ``"slstm"``.
        input: ``[T, B, I]``, ``[B, T, I]`` with ``batch_first``, or ``[N, I]`` with ``batch_sizes``; floating point.
        hx: None (zeros), or the cell's states, h ``[L*D, B, P]`` and the others ``[L*D, B, H]`` (sLSTM: c, n, m).
        params: per layer, per direction: w_ih ``[G*H, I or D*P]``, w_hh ``[G*H, P]`` (``[G*H, H/heads]``), b_ih and b_hh
            ``[G*H]`` with ``has_biases``, w_hr ``[P, H]`` with ``proj_size``, then what the cell has beside: w_peephole ``[3H]``
            (i, f, o); w_ln_ih, w_ln_hh ``[G*H]``, for the LSTM also w_ln_c ``[H]`` and with ``has_biases`` b_ln_c ``[H]``.
        dropout: probability with which, in training, elements of every layer's output but the last's are zeroed.
        proj_size: P of cells whose states are h and c.
        lengths: integer ``[B]`` on the input's device, each in 0..T. Beyond a row's length the output is zero; final states are
            those after a row's last step, where its backward direction starts.
        batch_sizes: ``PackedSequence.batch_sizes`` (int64 ``[T]`` on the CPU); the output is packed likewise, states are in
            packed order.
        return_cells: also return c of every step, ``[L, T, B, D*H]`` (``[L, B, T, D*H]`` with ``batch_first``,
            ``[L, N, D*H]`` packed).
        recompute: in training, do not save the gate activations for the backward pass but recompute them there: memory for time.
        zoneout: probability with which, in training, a unit keeps its h (or, of a pair, its h and its c) in a step; otherwise the
            states are mixed in that proportion (Krueger et al. 2017, "Zoneout").
        weight_dropout: probability with which, in training, elements of w_hh are zeroed, once for the whole sequence (Merity et
            al. 2018, "Regularizing and Optimizing LSTM Language Models").
        heads: number of equal blocks of units without connections between them; a block reads its own rows of w_hh. Layer norm is
            of each block by itself.

    Raises:
        ValueError: if there is no such cell, a probability is outside [0, 1], ``heads`` does not divide H, or the cell cannot
            have what is asked.
        RuntimeError: if ranks, sizes, dtypes, devices or ``lengths`` do not fit.
    """
    if cell not in CELLS:
        raise ValueError(f"unknown cell {cell!r}; accepted: {', '.join(CELLS)}")
    options = Options(
        has_biases, num_layers, dropout, training, bidirectional, batch_first, proj_size, lengths, batch_sizes, return_cells,
        recompute, zoneout, weight_dropout, heads,
    )  # fmt: skip
    row = CELLS[cell]
    if return_cells and not row.has_c:
        raise ValueError(f"return_cells needs a cell with a state c; {cell} has h alone")
    if hx is not None and len(hx) != len(row.states):
        raise RuntimeError(f"{cell} has {len(row.states)} states ({', '.join(row.states)}), got {len(hx)}")
    return run_layers(row, input, [None] * len(row.states) if hx is None else hx, params, options)


def recurrent_cell(
    cell: str,
    input: Tensor,
    hx: Sequence[Tensor] | None,
    params: Sequence[Tensor],
    *,
    has_biases: bool = True,
    training: bool = False,
    zoneout: float | tuple[float, float] = 0,
) -> tuple[Tensor, ...]:
    """One step of any cell: its states, each ``[B, H]``, from input ``[B, I]`` and the states before it (None: zeros).

    Arguments and errors are those of :func:`recurrent`, for one layer and direction.
    """
    if input.dim() != 2:
        raise RuntimeError(f"input must be [B, I], got {list(input.shape)}")
    row = CELLS[cell]
    for name, state in zip(row.states, hx or (), strict=False):
        if state.dim() != 2:
            raise RuntimeError(f"{name} must be [B, H], got {list(state.shape)}")
    states = None if hx is None else [state.unsqueeze(0) for state in hx]
    _, finals, _ = recurrent(cell, input.unsqueeze(0), states, params, has_biases=has_biases, training=training, zoneout=zoneout)
    return tuple(state[0] for state in finals)


def rnn(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0,
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
    options = Options(
        has_biases, num_layers, dropout, training, bidirectional, batch_first, 0, lengths, batch_sizes, False, recompute
    )
    output, (h_n,), _ = run_layers(_elman(nonlinearity), input, [hx], params, options)
    return output, h_n


def gru(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0,
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
    options = Options(
        has_biases, num_layers, dropout, training, bidirectional, batch_first, 0, lengths, batch_sizes, False, recompute
    )
    output, (h_n,), _ = run_layers(CELLS["gru"], input, [hx], params, options)
    return output, h_n


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    params: Sequence[Tensor],
    *,
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0,
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

    Arguments, shapes and errors are those of :func:`recurrent`; ``hx`` is None (zeros) or ``(h0 [L*D, B, P], c0 [L*D, B, H])``,
    gates are in the order i, f, g, o.
    """
    options = Options(
        has_biases, num_layers, dropout, training, bidirectional, batch_first, proj_size, lengths, batch_sizes, return_cells,
        recompute,
    )  # fmt: skip
    output, states, cells = run_layers(CELLS["lstm"], input, (None, None) if hx is None else hx, params, options)
    return (output, *states) if cells is None else (output, *states, cells)


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
    return _one_step(_elman(nonlinearity).name, input, None if hx is None else (hx,), w_ih, w_hh, b_ih, b_hh)[0]


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One step of a GRU, as ``torch.nn.GRUCell``: h ``[B, H]`` from input ``[B, I]`` and hx ``[B, H]`` (None: zeros)."""
    return _one_step("gru", input, None if hx is None else (hx,), w_ih, w_hh, b_ih, b_hh)[0]


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM, as ``torch.nn.LSTMCell``: (h, c) ``[B, H]`` from input ``[B, I]`` and hx (h, c) (None: zeros)."""
    h, c = _one_step("lstm", input, hx, w_ih, w_hh, b_ih, b_hh)
    return h, c


def _elman(nonlinearity: str) -> Cell:
    if nonlinearity not in _NONLINEARITIES:
        raise ValueError(f"unknown nonlinearity {nonlinearity!r}; accepted: {', '.join(_NONLINEARITIES)}")
    return CELLS[f"rnn_{nonlinearity}"]


def _one_step(
    cell: str,
    input: Tensor,
    hx: Sequence[Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, ...]:
    def query() -> backends.RecurrentQuery:
        hidden = w_hh.shape[-1]
        return backends.RecurrentQuery("recurrent_cell", input.device, input.dtype, cell, 1, 1, hidden, False, "padded")

    # of other dtypes autocast makes one, or an error says what was given
    if all(t.dtype == w_ih.dtype for t in (input, *(hx or ()))) and backends.torch_runs(query):
        return backends.vendor.recurrent_cell(cell, input, hx, w_ih, w_hh, b_ih, b_hh)
    params = [w_ih, w_hh] if b_ih is None or b_hh is None else [w_ih, w_hh, b_ih, b_hh]
    return recurrent_cell(cell, input, hx, params, has_biases=b_ih is not None)
