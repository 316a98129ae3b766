"""Stacks of layers without gradients, each in one call of the CPU library, and with gradients in one call a layer: the way of
plain eager calls.

What a caller records, transforms, lowers or looks at keeps the registered ops, which run the same kernels on the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import dropout as dropped

from .. import backends
from ..backends import library
from ..backends.cpu import recurrent as native
from ..backends.notes import note
from ..backends.torch import recurrent as torchs
from ..cells import CELLS
from ..choice import sources
from ..choice.sources import layers_are_torchs
from ..ops._dispatch import PLAIN
from ..ops._recurrent_step import trained_layer_of_a_step
from ..ops.recurrent import native_layer
from ._packing import Packing

NUMBERS = {name: number for number, name in enumerate(native.CELLS)}
_BATCH_FIRST, _TWO_PARTS, _NO_BIASES = 1 << 8, 1 << 9, 1 << 10  # as in csrc/cpu/recurrent.h
PARTS_FROM = 16  # steps, and sequences, of calls that AMX multiplies in parts (`multiplies_parts` in csrc/cpu/recurrent_plan.h)

# The library's ops, which a call of microseconds would look up each time.
_ops: dict[str, Callable[..., Any]] = {}


def _op(name: str) -> Callable[..., Any]:
    """An op of the library, without the function around it."""
    return _ops.setdefault(name, getattr(torch.ops.fastseq_native, name).default._op)


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


def _plain_states(hx: Any) -> tuple[Tensor | None, Tensor | None] | None:
    """(h0, c0) as a module was given them, both None for zeros. None: they are no plain tensors."""
    if hx is None:
        return None, None
    if type(hx) is tuple:
        return hx if len(hx) == 2 and type(hx[0]) in PLAIN and type(hx[1]) in PLAIN else None
    return (hx, None) if type(hx) in PLAIN else None


class Lane(NamedTuple):
    """What a module of one layer in one direction of an LSTM, GRU or RNN, or a cell of these, says of its calls."""

    cell: str
    how: int  # the number of the cell in the library, and whether the input is batch first
    step: bool  # a cell
    batch_first: bool
    hidden: int
    params: Callable[[Mapping[str, Any]], tuple[Any, ...]]  # w_ih, w_hh and perhaps b_ih and b_hh among a module's
    ours: dict[Any, bool]  # by shape and dtype of the input: whether the library's kernels are the ones
    trainers: dict[Any, str]  # by those of input, weights and states: whose kernel takes a call with gradients


_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_OF_CELL = {True: itemgetter(*_NAMES), False: itemgetter(*_NAMES[:2])}
_OF_LAYER = {True: itemgetter(*[f"{name}_l0" for name in _NAMES]), False: itemgetter(*[f"{name}_l0" for name in _NAMES[:2]])}


def lane_of(cell: str, step: bool, has_biases: bool, batch_first: bool, hidden: int) -> Lane:
    """It is to be kept in a ``memory`` of decisions, which is emptied when they change."""
    params = (_OF_CELL if step else _OF_LAYER)[has_biases]
    return Lane(
        cell,
        NUMBERS[cell] | _BATCH_FIRST * batch_first | _NO_BIASES * (not has_biases),
        step,
        batch_first,
        hidden,
        params,
        {},
        {},
    )


def native_lane(lane: Lane, input: Tensor, hx: Any, own: Mapping[str, Any], packing: Packing | None) -> tuple[Tensor, ...] | None:
    """Output, h_n and c_n, of a cell h and c (None: there is no c), of a plain call without gradients that nobody watches.

    ``input``, of no subclass, is [T, B, I], [B, T, I] or of a cell [B, I]; the parameters are among ``own``.

    None: the call is for another way, which also says what is wrong with it. Nothing is looked up twice, nor any function called
    that does little: this stands before kernels that take a microsecond."""
    _, how, step, _, _, params_of, ours, _ = lane
    if hx is None:
        h0 = c0 = None
    elif type(hx) is tuple:
        if len(hx) != 2:
            return None
        h0, c0 = hx
        if type(h0) not in PLAIN or type(c0) not in PLAIN:
            return None
    elif type(hx) in PLAIN:
        h0, c0 = hx, None
    else:
        return None
    try:
        params = params_of(own)
    except KeyError:  # weight_norm, parametrizations and FSDP take them away
        return None
    kept = None
    if packing is not None:
        kept = packing.kept_lane(params)  # of the very parameters that were packed, what was asked then holds
    if kept is None:
        for param in params:
            if type(param) is not Parameter and type(param) not in PLAIN:
                return None
    if not input.is_cpu:
        return None
    shape = input.shape
    if packing is None:
        known = ours.get((shape, input.dtype))
        if known is None:
            known = _is_ours(lane, input, params[1])
            if known is None:
                return None
        if not (known or backends.forced_eagerly()):
            return None
    elif kept is None:
        packed = None if library.reason() else packing.of(params)
        if not packed:
            return None
        kept = packed[0]
    w_ih, w_hh, b_ih, b_hh = params if len(params) == 4 else (*params, *params)  # in the place of biases, anything
    if step:
        op = _ops.get("recurrent_step") or _op("recurrent_step")
    else:
        op = _ops.get("recurrent_one_layer") or _op("recurrent_one_layer")
        if len(shape) == 3 and shape[0] >= PARTS_FROM and native.two_parts():
            how |= _TWO_PARTS
    if kept is not None:
        results = op(input, w_ih, w_hh, b_ih, b_hh, how, h0, c0, kept)
    elif c0 is not None:
        results = op(input, w_ih, w_hh, b_ih, b_hh, how, h0, c0)
    else:
        results = op(input, w_ih, w_hh, b_ih, b_hh, how, h0)
    if results[0] is None and input.dim() == 3 - step:
        anew = _laid_out(input, h0, c0)
        if anew is not None:
            input, h0, c0 = anew
            results = op(input, w_ih, w_hh, b_ih, b_hh, how, h0, c0, kept)
        if results[0] is None and packing is not None:  # made of other values: of weights that were written through .data
            packed = packing.again(params)
            if packed:
                results = op(input, w_ih, w_hh, b_ih, b_hh, how, h0, c0, packed[0])
    return None if results[0] is None else results


def trained_lane(
    lane: Lane, input: Tensor, hx: Any, own: Mapping[str, Any], input_size: int, training: bool
) -> tuple[Tensor, ...] | None:
    """Output, h_n and of an LSTM c_n of a layer in a plain call with gradients that nobody watches and nothing forces, if it is
    torch's, or a step after a state.

    Arguments are those of ``native_lane``. None: the call is for another way. What is to be asked of sizes and dtypes is asked of
    the first such call: torch's kernels take little longer than what stands before them."""
    if hx is None:
        states: tuple[Tensor, ...] = ()
    elif type(hx) is tuple:
        if len(hx) != 2:
            return None
        states = hx
    else:
        states = (hx,)
    try:
        params = lane.params(own)
    except KeyError:  # weight_norm, parametrizations and FSDP take them away
        return None
    if not params[0].requires_grad:
        return None
    for param in params:
        if type(param) is not Parameter and type(param) not in PLAIN:
            return None
    shape, w_hh = input.shape, params[1]
    key: Any = (shape, input.dtype, input.is_cpu, w_hh.dtype, input_size)
    for state in states:
        if type(state) is not Tensor:
            return None
        key += (state.shape, state.dtype)
    known = lane.trainers.get(key)
    if known is None:
        known = sources.remember(lane.trainers, key, _trainer(lane, input, states, params, input_size))
    if known == "torch":
        cell, batch_first = lane.cell, lane.batch_first
        if not states:
            zeros = input.new_zeros((1, shape[0 if batch_first else 1], lane.hidden))
            hx = (zeros, zeros) if cell == "lstm" else zeros
        done: tuple[Tensor, ...] = torchs.LAYERS[cell](input, hx, params, len(params) == 4, 1, 0.0, training, False, batch_first)
        return done
    if known == "step":
        x, h, c = input.transpose(0, 1) if lane.batch_first else input, states[0], states[1] if len(states) == 2 else None
        anew = _laid_out(x, h, c)
        if anew is not None:
            x, h, c = anew[0], h.contiguous(), anew[2]
        return trained_layer_of_a_step(lane.cell, x, h, c, params, lane.batch_first)
    return None


def _trainer(lane: Lane, input: Tensor, states: tuple[Tensor, ...], params: tuple[Tensor, ...], input_size: int) -> str:
    """Whose kernel takes such calls with gradients: "torch"'s, the library's for a "step", or "" where more is to be asked."""
    cell, dtype, shape, hidden = lane.cell, input.dtype, input.shape, lane.hidden
    if len(shape) != 3 or shape[2] != input_size or not input.is_cpu or dtype not in native.DTYPES or library.reason():
        return ""
    steps, batch = (shape[1], shape[0]) if lane.batch_first else shape[:2]
    if not steps or not batch or any(tensor.dtype != dtype or not tensor.is_cpu for tensor in (*params, *states)):
        return ""
    if states and (len(states) != len(CELLS[cell].states) or any(state.shape != (1, batch, hidden) for state in states)):
        return ""
    if layers_are_torchs(cell, dtype, "padded", 1, batch, steps, hidden, True):
        return "torch"
    return "step" if steps == 1 and states else ""


def _is_ours(lane: Lane, input: Tensor, w_hh: Tensor) -> bool | None:
    """Whether the library's kernels are the ones for such calls; None: it has none, or they are odd."""
    shape, hidden = input.shape, lane.hidden
    if len(shape) != 3 - lane.step or w_hh.dim() != 2 or input.dtype not in native.DTYPES or library.reason():
        return None
    if lane.step:
        torchs_own = backends.step_is_torchs(lane.cell, input.device, input.dtype, shape[0], hidden, False)
    else:
        steps, batch = (shape[1], shape[0]) if lane.batch_first else shape[:2]
        torchs_own = layers_are_torchs(lane.cell, input.dtype, "padded", 1, batch, steps, hidden, False)
    return bool(sources.remember(lane.ours, (shape, input.dtype), not torchs_own))


def packed_layers(
    input: Tensor, hx: Any, own: Mapping[str, Tensor | None], names: Sequence[str], batch_first: bool, packing: Packing
) -> Sequence[Tensor] | None:
    """``native_layers`` of padded input, no subclass, in a plain call without gradients that nobody watches, by the weights that
    were packed, as long as they are those of the parameters ``names`` of ``own``, which were plain then.

    None: the call is for another way."""
    states, found = _plain_states(hx), packing.kept_of(own, names)
    if states is None or found is None or not input.is_cpu or input.dim() != 3 or not packing.states_apart:
        return None
    two = input.size(0) >= PARTS_FROM and native.two_parts()
    return (_ops.get("recurrent_packed") or _op("recurrent_packed"))(input, *states, *found, batch_first, two) or None


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
