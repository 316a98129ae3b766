"""Recurrent layers and steps as functions: check, default, lay out the layers, call one op a layer.

``recurrent`` runs whole stacks of any cell from a flat list of parameters, as ``torch.nn.RNNBase`` stores them (per layer, per
direction: w_ih, w_hh, then b_ih, b_hh if biased, then w_hr if projected, then what the cell has beside); ``lstm``, ``gru`` and
``rnn`` are it with torch's arguments; the ``*_cell`` functions run one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from .. import backends
from .._arguments import checked_tensor, own_keywords, unknown
from ..backends.torch import recurrent as torchs
from ..cells import CELLS, Cell
from ..ops._dispatch import needs_plain_torch, shared_sequence, unshared, wants_gradient
from ._documents import documents
from ._recording import recorder
from ._recurrent_layers import Options, check_states, run_layers
from ._solver import Newton

__all__ = ["gru", "gru_cell", "lstm", "lstm_cell", "recurrent", "recurrent_cell", "rnn", "rnn_cell"]

_NONLINEARITIES = ("tanh", "relu")
COMPILED = "what is compiled fuses torch's own step with its neighbors"


@own_keywords
def recurrent(
    cell: str,
    input: Tensor,
    hx: Sequence[Tensor] | None,
    params: Sequence[Tensor | None],
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
    num_heads: int = 1,
    solver: Newton | None = None,
    resets: Tensor | None = None,
    reset_to: Sequence[Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """Any cell of ``fastseq.cells`` over a sequence: ``(output, final states, c of every step or None)``.

    T time, B batch, I input, H hidden, G gates of the cell, L layers, D directions, P = ``proj_size`` or H, N rows of a packed
    batch, S documents.

    Args:
        cell: a name of ``fastseq.cells.CELLS``: ``"lstm"``, ``"gru"``, ``"rnn_tanh"``, ``"rnn_relu"``, ``"coupled_lstm"``, ...
        input: ``[T, B, I]``, ``[B, T, I]`` with ``batch_first``, or ``[N, I]`` with ``batch_sizes``; floating point.
        hx: None (zeros), or the cell's states, h ``[L*D, B, P]`` and the others ``[L*D, B, H]`` (sLSTM: c, n, m).
        params: per layer, per direction: w_ih ``[G*H, I or D*P]``, w_hh ``[G*H, P]`` (``[G*H, H/num_heads]``), b_ih and b_hh
            ``[G*H]`` with ``has_biases`` (None: zeros), w_hr ``[P, H]`` with ``proj_size``, then what the cell has beside:
            w_peephole ``[3H]`` (i, f, o); w_ln_ih, w_ln_hh ``[G*H]``, for the LSTM also w_ln_c ``[H]`` and with ``has_biases``
            b_ln_c ``[H]``.
        has_biases: whether ``params`` has b_ih and b_hh.
        num_layers: L; each layer after the first reads the output of the one before.
        dropout: probability with which, in training, elements of every layer's output but the last's are zeroed.
        training: whether ``dropout``, ``zoneout`` and ``weight_dropout`` are drawn.
        bidirectional: D = 2: a second lane of every layer runs from the last step to the first.
        batch_first: input, output and cells are ``[B, T, ..]``; states are not affected.
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
        num_heads: number of equal blocks of units without connections between them; a block reads its own rows of w_hh. Layer
            norm is of each block by itself.
        solver: None: one step after the other. A ``fastseq.Newton``, for ``num_heads`` equal to H: all steps at once, by
            iterations. Under transforms of ``torch.func``, and for second derivatives, steps run one after the other.
        resets: bool ``[T, B]``, ``[B, T]`` with ``batch_first``, ``[N]`` with ``batch_sizes`` or ``cu_seqlens``, on the input's
            device: where it is set a new segment of the row begins, and the state before that step is replaced, in every layer;
            nothing goes from the steps before to it, nor a gradient back, be they NaN or infinite. So a row is its segments run
            one by one, in both directions: the one from the last step to the first starts anew at the last step before a reset.
            A reset at the first step replaces hx. Beyond a row's length it does not count.
        reset_to: what replaces the state at a reset, of the form of hx, whose B may be 1 (a learned state, alike for all rows),
            with its gradient. None: what hx=None starts from.
        cu_seqlens: int32 or int64 ``[S + 1]``, rising from 0 to N: input ``[N, I]`` holds S documents end to end, which are run
            as the rows of a packed batch. States are ``[L*D, S, ..]``; output and cells lie as the input does. A document may be
            empty and keeps its state. The lengths are read on the host: a GPU is waited for, and what torch.compile records
            breaks there (torch.export refuses it).

    Precision: where a CPU has AMX, products of float32 are as exact as multiply-adds; after
    ``torch.set_float32_matmul_precision("high")`` (or ``"medium"``) large ones have half the work and errors of about 5e-6 of the
    results' size, forward and backward, each as is set when it runs.

    Raises:
        ValueError: if there is no such cell, a probability is outside [0, 1], ``num_heads`` does not divide H, the cell cannot
            have what is asked, or options exclude one another.
        RuntimeError: if ranks, sizes, dtypes, devices, ``lengths``, ``resets`` or ``cu_seqlens`` do not fit; if a solver is given
            on a CPU and not forced, or fails and is not to go on sequentially.
        TypeError: if an argument is not of the type that is accepted.
    """
    row = CELLS.get(cell) or _cell(cell)
    if return_cells and not row.has_c:
        raise ValueError(f"return_cells needs a cell with a state c; {cell} has h alone")
    if hx is not None:
        check_states(row, hx)
    if reset_to is not None:
        check_states(row, reset_to, resets=True)
        if resets is None:
            raise ValueError("reset_to says what a reset puts in place of the state: give resets too")
    options = Options(
        has_biases=has_biases,
        num_layers=num_layers,
        dropout=dropout,
        training=training,
        bidirectional=bidirectional,
        batch_first=batch_first,
        proj_size=proj_size,
        lengths=lengths,
        batch_sizes=batch_sizes,
        return_cells=return_cells,
        recompute=recompute,
        zoneout=zoneout,
        weight_dropout=weight_dropout,
        num_heads=num_heads,
        solver=solver,
        resets=resets,
        reset_to=reset_to,
    )
    states = [None] * len(row.states) if hx is None else hx
    shared = shared_sequence()
    if shared is not None:
        return shared.recurrent(row, input, states, params, options, cu_seqlens)
    if cu_seqlens is not None:
        return documents(row, input, states, params, options, cu_seqlens)
    return run_layers(row, input, states, params, options)


@own_keywords
def recurrent_cell(
    cell: str,
    input: Tensor,
    hx: Sequence[Tensor] | None,
    params: Sequence[Tensor | None],
    *,
    has_biases: bool = True,
    training: bool = False,
    zoneout: float | tuple[float, float] = 0,
) -> tuple[Tensor, ...]:
    """One step of any cell: its states, each ``[B, H]``, from input ``[B, I]`` and the states before it (None: zeros).

    Arguments and errors are those of :func:`recurrent`, for one layer and direction.
    """
    row = _cell(cell)
    if checked_tensor("input", input).dim() != 2:
        raise RuntimeError(f"input must be [B, I], got {list(input.shape)}")
    if hx is not None:
        check_states(row, hx)
    for name, state in zip(row.states, hx or (), strict=False):
        if state.dim() != 2:
            raise RuntimeError(f"{name} must be [B, H], got {list(state.shape)}")
    states = None if hx is None else [state.unsqueeze(0) for state in hx]
    with unshared():
        _, finals, _ = recurrent(
            cell, input.unsqueeze(0), states, params, has_biases=has_biases, training=training, zoneout=zoneout
        )
    return tuple(state[0] for state in finals)


@own_keywords
def rnn(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor | None],
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
    resets: Tensor | None = None,
    reset_to: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Elman RNN over a sequence, as ``torch.nn.RNN``: ``(output, h_n)``.

    Other arguments, shapes and errors are those of :func:`recurrent`; ``hx`` is ``h0 [L*D, B, H]`` or None, ``reset_to``
    likewise.

    Args:
        nonlinearity: ``"tanh"`` or ``"relu"``.

    Raises:
        ValueError: if ``nonlinearity`` is neither ``"tanh"`` nor ``"relu"``.
    """
    output, (h_n,), _ = recurrent(
        _elman(nonlinearity),
        input,
        None if hx is None else (hx,),
        params,
        has_biases=has_biases,
        num_layers=num_layers,
        dropout=dropout,
        training=training,
        bidirectional=bidirectional,
        batch_first=batch_first,
        lengths=lengths,
        batch_sizes=batch_sizes,
        recompute=recompute,
        resets=resets,
        reset_to=None if reset_to is None else (reset_to,),
        cu_seqlens=cu_seqlens,
    )
    return output, h_n


@own_keywords
def gru(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor | None],
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
    resets: Tensor | None = None,
    reset_to: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """GRU over a sequence, as ``torch.nn.GRU`` (reset after the matrix product): ``(output, h_n)``.

    Arguments, shapes and errors are those of :func:`recurrent`; ``hx`` is ``h0 [L*D, B, H]`` or None, ``reset_to`` likewise.
    """
    output, (h_n,), _ = recurrent(
        "gru",
        input,
        None if hx is None else (hx,),
        params,
        has_biases=has_biases,
        num_layers=num_layers,
        dropout=dropout,
        training=training,
        bidirectional=bidirectional,
        batch_first=batch_first,
        lengths=lengths,
        batch_sizes=batch_sizes,
        recompute=recompute,
        resets=resets,
        reset_to=None if reset_to is None else (reset_to,),
        cu_seqlens=cu_seqlens,
    )
    return output, h_n


class LSTMOptions(TypedDict, total=False):
    """Keyword arguments of ``lstm``."""

    has_biases: bool
    num_layers: int
    dropout: float
    training: bool
    bidirectional: bool
    batch_first: bool
    proj_size: int
    lengths: Tensor | None
    batch_sizes: Tensor | None
    recompute: bool
    resets: Tensor | None
    reset_to: tuple[Tensor, Tensor] | None
    cu_seqlens: Tensor | None


@overload
def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    params: Sequence[Tensor | None],
    *,
    return_cells: Literal[False] = False,
    **options: Unpack[LSTMOptions],
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    params: Sequence[Tensor | None],
    *,
    return_cells: Literal[True],
    **options: Unpack[LSTMOptions],
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
@overload
def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    params: Sequence[Tensor | None],
    *,
    return_cells: bool,
    **options: Unpack[LSTMOptions],
) -> Any: ...


@own_keywords
def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    params: Sequence[Tensor | None],
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
    resets: Tensor | None = None,
    reset_to: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """LSTM over a sequence, as ``torch.nn.LSTM``: ``(output, h_n, c_n)``, and every step's c with ``return_cells``.

    Arguments, shapes and errors are those of :func:`recurrent`; ``hx`` is None (zeros) or ``(h0 [L*D, B, P], c0 [L*D, B, H])``,
    gates are in the order i, f, g, o.
    """
    output, states, cells = recurrent(
        "lstm",
        input,
        hx,
        params,
        has_biases=has_biases,
        num_layers=num_layers,
        dropout=dropout,
        training=training,
        bidirectional=bidirectional,
        batch_first=batch_first,
        proj_size=proj_size,
        lengths=lengths,
        batch_sizes=batch_sizes,
        return_cells=return_cells,
        recompute=recompute,
        resets=resets,
        reset_to=reset_to,
        cu_seqlens=cu_seqlens,
    )
    return (output, *states) if cells is None else (output, *states, cells)


@own_keywords
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
    """One step of an Elman RNN, as ``torch.nn.RNNCell``: h ``[B, H]``.

    Args:
        input: ``[B, I]``.
        hx: h before the step, ``[B, H]``. None: zeros.
        w_ih, w_hh: ``[H, I]`` and ``[H, H]``.
        b_ih, b_hh: ``[H]``; None: zeros.
        nonlinearity: ``"tanh"`` or ``"relu"``.

    Raises as :func:`rnn`.
    """
    return _one_step(_elman(nonlinearity), input, None if hx is None else (hx,), w_ih, w_hh, b_ih, b_hh)[0]


@own_keywords
def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One step of a GRU, as ``torch.nn.GRUCell``: h ``[B, H]``.

    Args:
        input: ``[B, I]``.
        hx: h before the step, ``[B, H]``. None: zeros.
        w_ih, w_hh: ``[3H, I]`` and ``[3H, H]``, gates in the order r, z, n.
        b_ih, b_hh: ``[3H]``; None: zeros.
    """
    return _one_step("gru", input, None if hx is None else (hx,), w_ih, w_hh, b_ih, b_hh)[0]


@own_keywords
def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM, as ``torch.nn.LSTMCell``: (h, c), each ``[B, H]``.

    Args:
        input: ``[B, I]``.
        hx: (h, c) before the step. None: zeros.
        w_ih, w_hh: ``[4H, I]`` and ``[4H, H]``, gates in the order i, f, g, o.
        b_ih, b_hh: ``[4H]``; None: zeros.
    """
    h, c = _one_step("lstm", input, hx, w_ih, w_hh, b_ih, b_hh)
    return h, c


def _cell(name: str) -> Cell:
    if name not in CELLS:
        raise ValueError(unknown("cell", name, CELLS))
    return CELLS[name]


def _elman(nonlinearity: str) -> str:
    if nonlinearity not in _NONLINEARITIES:
        raise ValueError(unknown("nonlinearity", nonlinearity, _NONLINEARITIES))
    return f"rnn_{nonlinearity}"


def _one_step(
    cell: str,
    input: Tensor,
    hx: Sequence[Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, ...]:
    for name, value in (("input", input), ("w_ih", w_ih), ("w_hh", w_hh)):
        checked_tensor(name, value)
    if hx is not None:
        check_states(CELLS[cell], hx)

    def query() -> backends.RecurrentQuery:
        steps, hidden, batch = backends.steps_with(hx[0] if hx else None, wants_gradient(every)), w_hh.shape[-1], input.shape[0]
        return backends.RecurrentQuery(
            "recurrent_cell", input.device, input.dtype, cell, steps, 1, hidden, False, "padded", batch=batch
        )

    given = (input, *(hx or ()))
    # vmap has no rule for torch's cells; of other dtypes autocast makes one, or an error says what was given
    every = [t for t in (*given, w_ih, w_hh, b_ih, b_hh) if t is not None]
    if not needs_plain_torch(every) and all([t.dtype == w_ih.dtype for t in given]):
        if recorder():
            return torchs.step(cell, input, hx, w_ih, w_hh, b_ih, b_hh)
        why, gradients = None, wants_gradient(every)
        if torch.compiler.is_compiling():
            why = COMPILED if gradients or input.device.type != "cpu" else None
        elif backends.forced() is None and input.dim() == 2:
            why = backends.torch_takes(query(), gradients)
        if backends.torch_runs(query, why):
            return torchs.step(cell, input, hx, w_ih, w_hh, b_ih, b_hh)
    return recurrent_cell(cell, input, hx, [w_ih, w_hh, b_ih, b_hh])
