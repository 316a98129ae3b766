"""Stacks of layers without gradients, each in one call of the CPU library, and with gradients in one call a layer: the way of
plain eager calls.

What a caller records, transforms, lowers or looks at keeps the registered ops, which run the same kernels on the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout as dropped

from .. import backends
from ..backends import library
from ..backends.cpu import recurrent as native
from ..backends.notes import note
from ..backends.torch import recurrent as torchs
from ..cells import CELLS
from ..choice.sources import layers_are_torchs, may_be_torchs
from ..ops._dispatch import PLAIN
from ..ops._recurrent_step import trained_layer_of_a_step
from ..ops.recurrent import native_layer
from ._packing import Packing

_STATE = PLAIN | {type(None)}


def native_layers(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor] | None,
    params: Sequence[Tensor | None],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    zoneout: tuple[float, float] = (0.0, 0.0),
    packing: Packing | None = None,
    chosen: bool = False,
    resets: Tensor | None = None,
) -> Sequence[Tensor] | None:
    """Output and final states, h_n and of a pair c_n, of a plain call (``plain_call``) without gradients.

    Arguments are those of ``recurrent``; or ``input`` is ``[B, I]`` without ``batch_sizes`` and the states are ``[B, n]``: one
    step, of which the states alone are given back. ``packing`` serves instead of the weights among ``params``; ``chosen``: the
    native kernels are known to be the ones for it.
    None: the call is for another way, which also says what is wrong with it.
    """
    given: list[Any] = [input, *params] if states is None else [input, *params, *states]
    if lengths is not None:
        given.append(lengths)
    if batch_sizes is not None:
        given.append(batch_sizes)
    if resets is not None:
        given.append(resets)
    for tensor in given:
        if type(tensor) not in PLAIN:
            return None
    if torch.is_grad_enabled() and any([tensor.requires_grad for tensor in given]):
        return None
    if not input.is_cpu or input.dim() < 2 or len(params) < 2 or library.reason():
        return None
    weights, weight, kept = given[1 : len(params) + 1], given[2], None
    if cell not in native.CELLS or input.dtype not in native.DTYPES or weight.dim() != 2:
        return None
    if packing is not None:
        kept = packing.of(weights)
    elif backends.watched() and not chosen:
        return None
    elif not (chosen or resets is not None or _ours(cell, input, weight, bidirectional, batch_first, lengths, batch_sizes)):
        return None
    count = len(CELLS[cell].states)
    if states and len(states) != count:
        return None
    h0, c0 = (None, None) if not states else (states[0], None) if count == 1 else (states[0], _joined(states[1:]))
    op = torch.ops.fastseq_native.recurrent_layers.default
    two = native.two_parts()
    options = cell, num_layers, has_biases, bidirectional, batch_first, *zoneout
    arguments = input, h0, c0, weights, lengths, batch_sizes, resets, *options
    results = op(*arguments, kept, two)
    if not results:
        anew = _laid_out(input, h0, c0)
        if anew is not None:
            arguments = *anew, weights, lengths, batch_sizes, resets, *options
            results = op(*arguments, kept, two)
    if packing is not None:
        if not results and kept is not None:  # made of other values: of weights that were written through .data
            results = op(*arguments, packing.again(weights), two)
        if results and backends.watched():
            query = query_of(cell, input, weight, bidirectional, batch_first, lengths, batch_sizes)
            for _ in range(num_layers):
                backends.select(query)
                note(packing)
    if results and count > 2:  # the states beside h come side by side
        *results, c = results
        results += c.chunk(count - 1, -1)
    return results or None


def _laid_out(x: Tensor, h0: Tensor | None, c0: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """The same as the native kernels read them: features side by side, states without gaps. None: so they are already, or
    x is sparse."""
    if x.layout != torch.strided:
        return None
    whole = (h0 is None or h0.is_contiguous()) and (c0 is None or c0.is_contiguous())
    if whole and x.stride(-1) == 1:
        return None
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x, None if h0 is None else h0.contiguous(), None if c0 is None else c0.contiguous()


def _joined(states: Sequence[Tensor]) -> Tensor:
    return states[0] if len(states) == 1 else torch.cat(list(states), -1)


def native_step(
    cell: str, input: Tensor, states: Sequence[Tensor] | None, params: Sequence[Tensor], packing: Packing | None = None
) -> Sequence[Tensor] | None:
    """The states [B, n] after a step of plain tensors in a plain call without gradients. None: the call is for another way."""
    if not input.is_cpu or backends.watched_eagerly() or library.reason():
        return None
    kept = None
    if packing is not None:
        kept = packing.of(params)
    elif may_be_torchs("recurrent_cell", False) and not backends.forced_eagerly():
        if backends.step_is_torchs(cell, input.device, input.dtype, input.shape[0], params[1].shape[1], False):
            return None
    h0, c0 = (None, None) if states is None else states if len(states) == 2 else (states[0], None)
    w_ih, w_hh, b_ih, b_hh = params if len(params) == 4 else (*params, None, None)
    op = torch.ops.fastseq_native.recurrent_step.default
    done = op(input, h0, c0, w_ih, w_hh, b_ih, b_hh, kept[0] if kept else None, cell)
    if not done:
        anew = _laid_out(input, h0, c0)
        if anew is not None:
            input, h0, c0 = anew
            done = op(input, h0, c0, w_ih, w_hh, b_ih, b_hh, kept[0] if kept else None, cell)
    if not done and kept:  # made of other values: of weights that were written through .data
        kept = packing.again(params)  # type: ignore[union-attr]
        done = op(input, h0, c0, w_ih, w_hh, b_ih, b_hh, kept[0] if kept else None, cell)
    return done or None


def _plain_states(hx: Any) -> tuple[Tensor | None, Tensor | None] | None:
    """(h0, c0) as a module was given them, both None for zeros. None: they are no plain tensors."""
    if hx is None:
        return None, None
    h0, c0 = hx if type(hx) is tuple and len(hx) == 2 else (hx, None)
    return (h0, c0) if type(h0) in PLAIN and type(c0) in _STATE else None


def native_layer_alone(
    cell: str, input: Tensor, hx: Any, own: Mapping[str, Tensor | None], has_biases: bool, batch_first: bool
) -> Sequence[Tensor] | None:
    """``native_layers`` of a layer of an LSTM, GRU or RNN in one direction, whose parameters are among ``own``, of ``input``
    [T, B, I] in a plain call, watched by nobody, without gradients.

    None: the call is for another way."""
    w_ih, w_hh, b_ih, b_hh = own.get("weight_ih_l0"), own.get("weight_hh_l0"), None, None
    if type(w_ih) not in PLAIN or type(w_hh) not in PLAIN or w_hh.dim() != 2:  # type: ignore[union-attr]
        return None
    if has_biases:
        b_ih, b_hh = own.get("bias_ih_l0"), own.get("bias_hh_l0")
        if type(b_ih) not in PLAIN or type(b_hh) not in PLAIN:
            return None
    states = _plain_states(hx)
    if states is None:
        return None
    h0, c0 = states
    if not input.is_cpu or input.dtype not in native.DTYPES or library.reason():
        return None
    if not backends.forced_eagerly():
        steps, batch, _ = input.shape
        if batch_first:
            steps, batch = batch, steps
        if layers_are_torchs(cell, input.dtype, "padded", 1, batch, steps, w_hh.shape[1], False):  # type: ignore[union-attr]
            return None
    op, two = torch.ops.fastseq_native.recurrent_one_layer.default, native.two_parts()
    results = op(input, h0, c0, w_ih, w_hh, b_ih, b_hh, cell, batch_first, two)
    if not results:
        anew = _laid_out(input, h0, c0)
        if anew is not None:
            results = op(*anew, w_ih, w_hh, b_ih, b_hh, cell, batch_first, two)
    return results or None


def packed_layers(
    input: Tensor, hx: Any, own: Mapping[str, Tensor | None], names: Sequence[str], batch_first: bool, packing: Packing
) -> Sequence[Tensor] | None:
    """``native_layers`` of padded input where nobody watches and gradients are off, by the weights that were packed, as long as
    they are those of the parameters ``names`` of ``own``, which were plain then. None: the call is for another way."""
    found = packing.kept_of(own, names)
    if found is None or not input.is_cpu or not packing.states_apart:
        return None
    states = _plain_states(hx)
    if states is None:
        return None
    return torch.ops.fastseq_native.recurrent_packed.default(input, *states, *found, batch_first, native.two_parts()) or None


def packed_step(
    cell: str, input: Tensor, hx: Sequence[Any] | None, own: Mapping[str, Tensor | None], names: Sequence[str], packing: Packing
) -> Sequence[Tensor] | None:
    """``native_step`` under the same conditions."""
    found = packing.kept_of(own, names)
    if found is None or not input.is_cpu:
        return None
    states = _plain_states(hx[0] if hx is not None and len(hx) == 1 else hx)
    if states is None:
        return None
    params, kept = found
    w_ih, w_hh, b_ih, b_hh = params if len(params) == 4 else (*params, None, None)
    return torch.ops.fastseq_native.recurrent_step.default(input, *states, w_ih, w_hh, b_ih, b_hh, kept[0], cell) or None


def native_training(
    cell: str,
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor | None],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    dropout: float,
    recompute: bool,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    zoneout: tuple[float, float] = (0.0, 0.0),
    training: bool = True,
    chosen: bool = True,
    resets: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """Output and final states of a plain call with gradients.

    Arguments are those of ``recurrent``; x is ``[T, B, I]``, or packed, ``batch_first`` says how the output lies. ``dropout``:
    that of training; ``training``: whether zoneout draws what it holds. None: the call is for another way. ``chosen``: torch's
    kernels are known not to be the faster ones for it.
    """
    if not torch.is_grad_enabled():
        return None
    given: list[Any] = [x, *params, *states]
    if lengths is not None:
        given.append(lengths)
    if batch_sizes is not None:
        given.append(batch_sizes)
    if resets is not None:
        given.append(resets)
    for tensor in given:
        if type(tensor) not in PLAIN:
            return None
    if not any([tensor.requires_grad for tensor in given]):
        return None
    if not x.is_cpu or x.dtype not in native.DTYPES or backends.watched() or library.reason():
        return None
    weights = given[1 : len(params) + 1]
    chosen |= recompute or resets is not None
    if not chosen and not _ours(cell, x, weights[1], bidirectional, False, lengths, batch_sizes, True):
        return None
    return trained_layers(
        cell,
        x,
        states,
        weights,
        has_biases,
        num_layers,
        bidirectional,
        batch_first,
        dropout,
        recompute,
        lengths,
        batch_sizes,
        zoneout,
        training,
        resets,
    )


def trained_layers(
    cell: str,
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    dropout: float,
    recompute: bool,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    zoneout: tuple[float, float] = (0.0, 0.0),
    training: bool = True,
    resets: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """The same of plain tensors on the CPU in a dtype that the native kernels have."""
    row = CELLS[cell]
    if cell not in native.CELLS or row.normalized or row.wide_states > 1 or len(states) > 2:  # whose gradients the ops know
        return None
    if lengths is not None and lengths.dtype == torch.int32:
        lengths = lengths.to(torch.int64)
    if resets is not None:
        resets = resets.contiguous()
    ragged: tuple[Tensor | None, ...] = lengths, batch_sizes, None, None, resets
    drawn, zoneout = (zoneout, (0.0, 0.0)) if training else ((0.0, 0.0), zoneout)
    lanes = 2 if bidirectional else 1
    for state in states:  # of which each layer is given its rows, and no kernel sees that there are more
        if state.dim() != 3 or state.size(0) != num_layers * lanes:
            return None
    h0, c0 = (None, None) if not states else states if len(states) == 2 else (states[0], None)
    x, h0, c0 = _laid_out(x, h0, c0) or (x, h0, c0)
    # a step after a state: its way shares the weights' gradients with other steps
    one_step = x.shape[0] == 1 and h0 is not None and x.dim() == 3 and lengths is None and resets is None
    one_step = one_step and not (bidirectional or recompute or any(drawn) or any(zoneout))
    one_step = one_step and len(params) == num_layers * (2 + 2 * has_biases)

    def layer(
        x: Tensor, h0: Tensor | None, c0: Tensor | None, own: Sequence[Tensor], private: bool, batch_first: bool
    ) -> tuple[Tensor, ...] | None:
        if one_step:
            assert h0 is not None
            done = trained_layer_of_a_step(cell, x, h0, c0, own, batch_first)
            if done is not None:
                return done
        return native_layer(x, h0, c0, own, cell, has_biases, bidirectional, recompute, private, batch_first, ragged, zoneout)

    finals: Sequence[Tensor]
    if num_layers == 1 and drawn == (0.0, 0.0):
        done = layer(x, h0, c0, params, False, batch_first)
        if done is None:
            return None
        x, *finals = done
    else:
        if not all([tensor.is_contiguous() for tensor in params]):
            return None
        each = len(params) // num_layers
        of_layers: list[Sequence[Tensor]] = []
        before = torch.get_rng_state() if any(drawn) else None  # for whoever runs what is declined
        for index in range(num_layers):
            last, own = index == num_layers - 1, slice(index * lanes, (index + 1) * lanes)
            of_layer = params[index * each : (index + 1) * each]
            of_states = None if h0 is None else h0[own], None if c0 is None else c0[own]
            if any(drawn):
                gates, width = of_layer[1].shape
                sizes = width, gates // len(CELLS[cell].gates)
                holds = [held(x, (*x.shape[:-1], lanes, size), of) for size, of in zip(sizes, drawn, strict=True)]
                ragged = lengths, batch_sizes, *holds, resets
            done = layer(x, *of_states, of_layer, not last, batch_first and last)
            if done is None:
                if before is not None:
                    torch.set_rng_state(before)
                return None
            x, *ends = done
            if dropout and not last:
                x = dropped(x, dropout)
            of_layers.append(ends)
        finals = [torch.cat(of_all) for of_all in zip(*of_layers, strict=True)]
    if x.dtype not in (torch.float32, torch.float64):
        finals = [state.to(x.dtype) for state in finals]
    return x, tuple(finals)


def held(x: Tensor, shape: tuple[int, ...], probability: float) -> Tensor | None:
    """Where zoneout keeps the old value, drawn for every step; None: nowhere."""
    if probability == 0:
        return None
    return torch.empty(shape, dtype=torch.bool, device=x.device).bernoulli_(probability)


def _ours(
    cell: str,
    input: Tensor,
    weight: Tensor,
    bidirectional: bool,
    batch_first: bool,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    gradients: bool = False,
) -> bool:
    """Whether the native kernels are the ones for such a call."""
    if cell not in torchs.GATES or lengths is not None or backends.forced() or (input.dim() == 2 and batch_sizes is None):
        return True
    hidden = weight.shape[0] // torchs.GATES[cell]
    if weight.shape[1] != hidden:  # projected, without oneDNN
        return True
    layout, steps, batch = _extent(input, batch_first, lengths, batch_sizes)
    return not layers_are_torchs(cell, input.dtype, layout, 2 if bidirectional else 1, batch, steps, hidden, gradients)


def _extent(input: Tensor, batch_first: bool, lengths: Tensor | None, batch_sizes: Tensor | None) -> tuple[str, int, int]:
    """Layout, steps and rows of the batch."""
    if batch_sizes is not None:
        return "packed", len(batch_sizes), int(batch_sizes[0]) if len(batch_sizes) else 0
    layout = "padded" if lengths is None else "lengths"
    if input.dim() == 2:
        return layout, 1, input.shape[0]
    batch, steps = input.shape[:2] if batch_first else (input.shape[1], input.shape[0])
    return layout, steps, batch


def query_of(
    cell: str,
    input: Tensor,
    weight: Tensor,
    bidirectional: bool,
    batch_first: bool,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
) -> backends.RecurrentQuery:
    """What is to be known of a call without a look into its tensors; ``weight`` is the first w_hh."""
    layout, steps, batch = _extent(input, batch_first, lengths, batch_sizes)
    hidden = weight.shape[0] // len(CELLS[cell].gates)
    lanes, projected = 2 if bidirectional else 1, weight.shape[1] != hidden
    return backends.RecurrentQuery(
        "recurrent", input.device, input.dtype, cell, steps, lanes, hidden, projected, layout, False, batch
    )
