"""A stack of recurrent layers: checks, defaults, the lanes of every layer, one op a layer.

Nothing here looks at the values in a tensor, so everything can be compiled and exported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import dropout as dropped
from torch.nn.functional import layer_norm, linear, pad

from ..cells import Cell
from ..ops.recurrent import recurrent
from ._autocast import autocast_dtype, lowered, without_autocast

LANES = 62  # of one op: a bit for each in an int64


@dataclass(slots=True)
class Options:
    """What the functions of ``functional.recurrent`` take beside input, states and parameters; documented there.

    Probabilities are 0 and not 0.0 where none is given: torch.compile takes a float for a value that changes.
    """

    has_biases: bool = True
    num_layers: int = 1
    dropout: float = 0
    training: bool = False
    bidirectional: bool = False
    batch_first: bool = False
    proj_size: int = 0
    lengths: Tensor | None = None
    batch_sizes: Tensor | None = None
    return_cells: bool = False
    recompute: bool = False
    zoneout: float | tuple[float, float] = 0
    weight_dropout: float = 0
    heads: int = 1

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1


class Params(NamedTuple):
    """The parameters of one direction of a layer, None where there is none."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None
    extra: tuple[Tensor, ...]  # as `Cell.extra`


def run_layers(
    cell: Cell, input: Tensor, states: Sequence[Tensor | None], params: Sequence[Tensor | None], options: Options
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """Output, final states, and c of every step of every layer if wanted."""
    for name, probability in (("dropout", options.dropout), ("weight_dropout", options.weight_dropout)):
        if not 0 <= probability <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {probability}")
    zoneout = _zoneout(cell, options.zoneout)
    directions, layers = options.directions, _params(cell, params, options)
    _check_input(input, options.batch_sizes)
    lower = autocast_dtype(input.device.type)
    if lower is not None:
        input, states = lowered(input, lower), [lowered(state, lower) for state in states]
        layers = [[_lowered_params(own, lower) for own in layer] for layer in layers]
    _check_params(cell, input, layers, options)
    if options.batch_first and options.batch_sizes is None:
        input = input.transpose(0, 1)
    if options.batch_sizes is None and input.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    hidden = layers[0][0].w_hh.shape[0] // len(cell.gates)
    width = options.proj_size or hidden
    for name, state in zip(cell.states, states, strict=True):
        if state is not None:
            size = (options.num_layers * directions, width if name == "h" else hidden)
            _check_state(f"{name}0", state, input, options.batch_sizes, size)
    lengths = options.lengths
    _check_lengths(input, lengths, options.batch_sizes)

    x = input
    if lengths is not None:
        # What stands beyond a row's length is not the caller's data: 0 * NaN must not reach the weights' gradients.
        valid = torch.arange(x.shape[0], device=x.device)[:, None] < lengths
        x = x.masked_fill(~valid[..., None], 0)
    finals: list[tuple[Tensor, ...]] = []
    cells = []
    for number, layer in enumerate(layers):
        part = slice(number * directions, (number + 1) * directions)
        own = [None if state is None else state[part] for state in states]
        x, last, c = _run_layer(cell, x, own, layer, options, zoneout)
        if options.dropout and options.training and number < options.num_layers - 1:
            x = dropped(x, options.dropout)
        finals.append(last)
        cells.append(c)
    joined = finals[0] if len(finals) == 1 else [torch.cat(of_layers) for of_layers in zip(*finals, strict=True)]
    all_cells = torch.stack([c for c in cells if c is not None]).to(x.dtype) if options.return_cells else None
    if options.batch_first and options.batch_sizes is None:
        x = x.transpose(0, 1)
        all_cells = None if all_cells is None else all_cells.transpose(1, 2)
    return x, tuple(state if state.dtype == x.dtype else state.to(x.dtype) for state in joined), all_cells


def _run_layer(
    cell: Cell,
    x: Tensor,
    states: Sequence[Tensor | None],
    layer: Sequence[Params],
    options: Options,
    zoneout: tuple[float, float],
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """Output [.., D*P], final states [D, B, n], c of every step [.., D*H]."""
    heads, training = options.heads, options.training
    if training and options.weight_dropout:
        layer = [own._replace(w_hh=dropped(own.w_hh, options.weight_dropout)) for own in layer]
    lanes = layer if heads == 1 else [head for own in layer for head in _head_params(cell, own, heads)]
    reverse = [direction for direction in range(options.directions) for _ in range(heads)]
    h0, c0 = _joined_states(cell, states, x, lanes[0], options)

    def run(some: slice) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        own, hold_h, hold_c = lanes[some], None, None
        if training and any(zoneout):
            rows, hidden = (*x.shape[:-1], len(own)), own[0].w_hh.shape[0] // len(cell.gates)
            hold_h, hold_c = _held(x, (*rows, own[0].w_hh.shape[1]), zoneout[0]), _held(x, (*rows, hidden), zoneout[1])
        return recurrent(
            _normalised_input(cell, x, own) if cell.normalised else x,
            None if h0 is None else h0[some],
            None if c0 is None else c0[some],
            [tensor for lane in own for tensor in _op_params(cell, lane)],
            cell=cell.name,
            reverse=reverse[some],
            lengths=options.lengths,
            batch_sizes=options.batch_sizes,
            hold_h=hold_h,
            hold_c=hold_c,
            zoneout_h=0.0 if training else zoneout[0],
            zoneout_c=0.0 if training else zoneout[1],
            return_cells=options.return_cells,
            recompute=options.recompute,
        )

    if len(lanes) <= LANES:
        y, h_n, c_n, c = run(slice(None))
    else:
        results = [run(slice(begin, begin + LANES)) for begin in range(0, len(lanes), LANES)]
        ys, h_ns, c_ns, cs = zip(*results, strict=True)
        y, h_n = torch.cat(ys, -1), torch.cat(h_ns)
        c_n = None if c_ns[0] is None else torch.cat(c_ns)
        c = None if cs[0] is None else torch.cat(cs, -1)
    if c is not None and cell.wide_states > 1:
        c = c.unflatten(-1, (len(lanes), cell.wide_states, -1))[..., 0, :].flatten(-2)
    return y, _separate_states(cell, h_n, c_n, options), c


def _zoneout(cell: Cell, given: float | tuple[float, float]) -> tuple[float, float]:
    """Probabilities for h and for c."""
    if not given:
        return 0.0, 0.0
    zone_h, zone_c = given if isinstance(given, (tuple, list)) else (given, 0.0)
    for probability in (zone_h, zone_c):
        if not 0 <= probability <= 1:
            raise ValueError(f"zoneout must lie in [0, 1], got {given}")
    if zone_c and cell.wide_states != 1:
        raise ValueError(f"zoneout of c needs a cell with one c; {cell.name} has the states {', '.join(cell.states)}")
    return float(zone_h) if zone_h else 0.0, float(zone_c) if zone_c else 0.0


def _held(x: Tensor, shape: tuple[int, ...], probability: float) -> Tensor | None:
    """Where zoneout keeps the old value, drawn for every step; None: nowhere."""
    if probability == 0:
        return None
    return torch.empty(shape, dtype=torch.bool, device=x.device).bernoulli_(probability)


def _op_params(cell: Cell, lane: Params) -> tuple[Tensor | None, ...]:
    """The op's parameters of a lane: w_ih, w_hh, b_ih, b_hh, w_hr, vectors."""
    if not cell.normalised:
        return (*lane[:5], lane.extra[0] if lane.extra else None)
    hidden = lane.w_hh.shape[0] // len(cell.gates)
    zeros = lane.w_hh.new_zeros(hidden)
    scales = list(lane.extra[1:])  # the input's is not the op's affair
    if cell.recurrent_bias is not None:
        scales.append(zeros if lane.b_hh is None else lane.b_hh[-hidden:])
    elif lane.b_hh is None:
        scales.append(zeros)  # of c
    return None, lane.w_hh, None, None, lane.w_hr, torch.cat(scales)


def _normalised_input(cell: Cell, x: Tensor, lanes: Sequence[Params]) -> Tensor:
    """Input gates [.., D*G*H] of cells with layer norm: each lane's projection normalised, scaled, shifted by the biases."""
    size = lanes[0].w_ih.shape[0]
    inside = size // len(cell.gates) if cell.recurrent_bias else 0
    with without_autocast(x.device.type):
        gates = linear(x, torch.cat([lane.w_ih for lane in lanes])).unflatten(-1, (len(lanes), size))
        normal = []
        for number, lane in enumerate(lanes):
            bias = None
            if lane.b_ih is not None and lane.b_hh is not None:
                bias = lane.b_ih + (pad(lane.b_hh[:-inside], (0, inside)) if inside else lane.b_hh)
            normal.append(layer_norm(gates[..., number, :], (size,), lane.extra[0], bias))
    return torch.cat(normal, -1)


def _head_params(cell: Cell, params: Params, heads: int) -> list[Params]:
    """The parameters of each head of a block-diagonal recurrence: rows of its units of every gate."""

    def divided(tensor: Tensor | None) -> Any:
        """[n*H, ..] -> heads of [n*H/heads, ..]"""
        if tensor is None:
            return [None] * heads
        hidden = params.w_hh.shape[0] // len(cell.gates)
        parts = tensor.unflatten(0, (tensor.shape[0] // hidden, heads, hidden // heads)).transpose(0, 1)
        return parts.flatten(1, 2).unbind(0)

    extra = zip(*(divided(tensor) for tensor in params.extra), strict=True) if params.extra else [()] * heads
    own: Any = zip(*(divided(tensor) for tensor in params[:5]), extra, strict=True)
    return [Params(w_ih, w_hh, b_ih, b_hh, w_hr, tuple(more)) for w_ih, w_hh, b_ih, b_hh, w_hr, more in own]


def _joined_states(
    cell: Cell, states: Sequence[Tensor | None], x: Tensor, lane: Params, options: Options
) -> tuple[Tensor | None, Tensor | None]:
    """h0 [lanes, B, P] and the others side by side [lanes, B, K*H], from states [D, B, n]."""
    h0, *others = states
    if h0 is None:
        if cell.name != "slstm":
            return None, None
        # nothing was seen yet: the first step forgets all, whatever its gates say
        batch = x.shape[1] if options.batch_sizes is None else int(options.batch_sizes[0])
        lanes, hidden = options.directions * options.heads, lane.w_hh.shape[0] // len(cell.gates)
        zeros = x.new_zeros(lanes, batch, 2 * hidden, dtype=torch.promote_types(x.dtype, torch.float32))
        return None, torch.cat((zeros, torch.full_like(zeros[..., :hidden], -torch.inf)), -1)
    if options.heads > 1:
        # [D, B, H] -> [D*heads, B, H/heads]
        given = [state for state in states if state is not None]
        h0, *others = (s.unflatten(-1, (options.heads, -1)).permute(0, 2, 1, 3).flatten(0, 1) for s in given)
    if len(others) < 2:
        return h0, others[0] if others else None
    return h0, torch.cat([state for state in others if state is not None], -1)


def _separate_states(cell: Cell, h_n: Tensor, c_n: Tensor | None, options: Options) -> tuple[Tensor, ...]:
    """The states [D, B, n], from those of the lanes."""
    states = (h_n,) if c_n is None else (h_n, c_n) if cell.wide_states == 1 else (h_n, *c_n.chunk(cell.wide_states, -1))
    if options.heads == 1:
        return states
    return tuple(s.unflatten(0, (-1, options.heads)).transpose(1, 2).flatten(-2) for s in states)


def _params(cell: Cell, given: Sequence[Tensor | None], options: Options) -> list[list[Params]]:
    """Per layer, the parameters of every direction."""
    extra = cell.extra(options.has_biases) if cell.parameters else ()
    each = 2 + 2 * options.has_biases + (options.proj_size > 0) + len(extra)
    count = options.num_layers * options.directions
    if len(given) != each * count:
        raise RuntimeError(
            f"expected {each * count} parameters ({each} for each of {options.num_layers} layers x {options.directions} "
            f"directions), got {len(given)}"
        )
    biased, at_extra = options.has_biases, each - len(extra)
    params = []
    for begin in range(0, len(given), each):
        own: Sequence[Any] = given[begin : begin + each]
        b_ih, b_hh = own[2:4] if biased else (None, None)
        w_hr = own[at_extra - 1] if options.proj_size else None
        params.append(Params(own[0], own[1], b_ih, b_hh, w_hr, tuple(own[at_extra:])))
    return [params[begin : begin + options.directions] for begin in range(0, count, options.directions)]


def _lowered_params(params: Params, dtype: torch.dtype) -> Params:
    w_ih, w_hh, b_ih, b_hh, w_hr, extra = params
    return Params(
        lowered(w_ih, dtype),
        lowered(w_hh, dtype),
        lowered(b_ih, dtype),
        lowered(b_hh, dtype),
        lowered(w_hr, dtype),
        tuple(lowered(tensor, dtype) for tensor in extra),
    )


def _check_input(input: Tensor, batch_sizes: Tensor | None) -> None:
    rank = 3 if batch_sizes is None else 2
    if input.dim() != rank:
        raise RuntimeError(f"input must have {rank} dimensions, got {input.dim()}")
    if not input.is_floating_point():
        raise RuntimeError(f"input must be floating point, got {input.dtype}")


def _check_params(cell: Cell, input: Tensor, layers: list[list[Params]], options: Options) -> None:
    w_hh, gates, heads = layers[0][0].w_hh, len(cell.gates), options.heads
    if w_hh.dim() != 2 or w_hh.shape[0] % gates:
        raise RuntimeError(f"weight_hh must be [{gates} * H, P], got {list(w_hh.shape)}")
    hidden = w_hh.shape[0] // gates
    if heads < 1 or hidden % heads:
        raise ValueError(f"heads must divide the hidden size; got {heads} heads and a hidden size of {hidden}")
    if options.proj_size and heads > 1:
        raise ValueError(f"proj_size and heads exclude each other; got proj_size={options.proj_size}, heads={heads}")
    if options.proj_size and cell.wide_states != 1:
        raise ValueError(f"proj_size argument is only supported for LSTM, not {cell.name}")
    width = options.proj_size or hidden
    columns = input.shape[-1]
    extra = cell.extra(options.has_biases) if cell.parameters else ()
    for number, layer in enumerate(layers):
        expected = [
            ("weight_ih", (gates * hidden, columns)), ("weight_hh", (gates * hidden, width // heads)),
            ("bias_ih", (gates * hidden,)), ("bias_hh", (gates * hidden,)), ("weight_hr", (width, hidden)),
            *((name, (size * hidden,)) for name, size in extra),
        ]  # fmt: skip
        for params in layer:
            for (name, shape), param in zip(expected, (*params[:5], *params.extra), strict=True):
                if param is None:
                    continue
                if param.dtype != input.dtype:
                    raise RuntimeError(f"input dtype ({input.dtype}) does not match {name} dtype ({param.dtype})")
                if param.device != input.device:
                    devices = f"input is on {input.device} and {name} on {param.device}"
                    raise RuntimeError(f"Expected all tensors to be on the same device, but {devices}")
                if param.shape != shape:
                    raise RuntimeError(f"{name} of layer {number} must be {list(shape)}, got {list(param.shape)}")
        columns = width * options.directions


def _check_state(name: str, state: Tensor, input: Tensor, batch_sizes: Tensor | None, size: tuple[int, int]) -> None:
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
