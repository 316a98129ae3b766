"""A stack of recurrent layers: checks, defaults, the lanes of every layer, one op a layer.

Nothing here looks at the values in a tensor, so everything can be compiled and exported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import dropout as dropped
from torch.nn.functional import layer_norm, linear, pad

from .._arguments import checked_int, checked_number, checked_tensor, is_number
from ..backends.torch import recurrent as torchs
from ..cells import Cell
from ..ops._dispatch import PLAIN, is_sharded, plain_call, sharding
from ..ops.recurrent import recurrent, without_padding
from ..ops.types import States, Walk, Weights
from ._autocast import lowered, lowered_to, without_autocast
from ._native_layers import held, native_layers, native_training
from ._recording import refuse_onnx
from ._scan import checked_resets
from ._solver import Newton, check_device, check_solver
from ._torch_layers import torch_layers

LANES = 62  # of one op: a bit for each in an int64

# The parameters of a layer, or of some lanes of it: of each name a tensor for every lane; biases may be missing.
Layer = dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Options:
    """What ``functional.recurrent`` takes beside cell, input, states and parameters; documented there."""

    has_biases: bool
    num_layers: int
    dropout: float
    training: bool
    bidirectional: bool
    batch_first: bool
    proj_size: int
    lengths: Tensor | None
    batch_sizes: Tensor | None
    return_cells: bool
    recompute: bool
    zoneout: float | tuple[float, float]
    weight_dropout: float
    num_heads: int
    solver: Newton | None
    resets: Tensor | None
    reset_to: Sequence[Tensor | None] | None


class Checked(NamedTuple):
    """A call in which everything fits, in the dtype in which it runs."""

    input: Tensor
    x: Tensor  # [T, B, I] or [N, I]
    states: Sequence[Tensor | None]
    reset_to: Sequence[Tensor | None] | None
    layers: list[Layer]
    options: Options
    zoneout: tuple[float, float]
    hidden: int


def checked(
    cell: Cell, input: Tensor, states: Sequence[Tensor | None], params: Sequence[Tensor | None], options: Options
) -> Checked:
    """The checks of ``run_layers``, but for what is in ``lengths`` and for sequences without a step."""
    # here and below a check is a call only where what is given is not what most calls give: a short sequence takes no longer
    if options.dropout != 0 and not 0 <= checked_number("dropout", options.dropout) <= 1:
        raise ValueError(f"dropout must lie in [0, 1], got {options.dropout}")
    if options.weight_dropout != 0 and not 0 <= checked_number("weight_dropout", options.weight_dropout) <= 1:
        raise ValueError(f"weight_dropout must lie in [0, 1], got {options.weight_dropout}")
    zoneout = (0.0, 0.0) if options.zoneout == 0 else zoneout_of(cell, options.zoneout)
    resets, reset_to = options.resets, options.reset_to
    lengths, batch_sizes, directions = options.lengths, options.batch_sizes, 2 if options.bidirectional else 1
    layers = _layers(cell, params, options, directions)
    if not isinstance(input, Tensor):
        checked_tensor("input", input)
    rank = 3 if batch_sizes is None else 2
    if input.dim() != rank:
        raise RuntimeError(f"input must have {rank} dimensions, got {input.dim()}")
    if not input.is_floating_point():
        raise RuntimeError(f"input must be floating point, got {input.dtype}")
    lower = lowered_to(cell.name, input, states)
    if lower is not None:
        input, states = lowered(input, lower), [lowered(state, lower) for state in states]
        reset_to = None if reset_to is None else [lowered(state, lower) for state in reset_to]
        layers = [{name: [lowered(tensor, lower) for tensor in of] for name, of in layer.items()} for layer in layers]
    hidden = _check_params(cell, input, layers, options, directions)
    if options.solver is not None:
        check_solver(cell, options.solver, hidden, options.num_heads, options.proj_size, any(zoneout))
        check_device(options.solver, input.device)
    batch_first = options.batch_first and batch_sizes is None
    x = input.transpose(0, 1) if batch_first else input
    for name, state in zip(cell.states, states, strict=True):
        if state is not None:
            width = (options.proj_size or hidden) if name == "h" else hidden
            _check_state(f"{name}0", state, x, batch_sizes, (options.num_layers * directions, width))
    states = _all_or_none(cell, states, options.proj_size or hidden, hidden)
    if lengths is not None or batch_sizes is not None:
        check_layout(x, lengths, batch_sizes)
    if resets is not None:
        packed = batch_sizes is not None
        resets = checked_resets(resets, x, packed, batch_first)
        options = replace(options, resets=resets.squeeze(1) if packed else resets)
    for name, state in zip(cell.states, reset_to or (), strict=reset_to is not None):
        if state is not None:
            width = (options.proj_size or hidden) if name == "h" else hidden
            _check_state(f"reset_to's {name}", state, x, batch_sizes, (options.num_layers * directions, width), or_one=True)
    return Checked(input, x, states, reset_to, layers, options, zoneout, hidden)


def run_layers(
    cell: Cell, input: Tensor, states: Sequence[Tensor | None], params: Sequence[Tensor | None], options: Options
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """Output, final states, and c of every step of every layer if wanted."""
    if type(input) not in PLAIN and is_sharded(input):
        return sharding().layers(run_layers, cell, input, states, params, options)
    input, x, states, reset_to, layers, options, zoneout, _ = checked(cell, input, states, params, options)
    lengths, batch_sizes, directions = options.lengths, options.batch_sizes, 2 if options.bidirectional else 1
    batch_first = options.batch_first and batch_sizes is None
    if batch_sizes is None and x.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    ours_alone = options.num_heads > 1 or options.solver is not None or options.return_cells or reset_to is not None
    if plain_call() and not _trains(options) and not ours_alone:
        given = [state for state in states if state is not None]
        results = native_layers(
            cell.name,
            input,
            given,
            params,
            options.has_biases,
            options.num_layers,
            options.bidirectional,
            batch_first,
            lengths,
            batch_sizes,
            zoneout,
            resets=options.resets,
        )
        if results is not None:
            return results[0], tuple(results[1:]), None
    lacking = _torch_lacks(cell, options)
    if not lacking:
        with without_autocast(x.device.type):
            done = torch_layers(
                cell.name,
                x,
                None if states[0] is None else [state for state in states if state is not None],
                [tensor for layer in layers for tensor in _flat(layer, options)],
                has_biases=options.has_biases,
                num_layers=options.num_layers,
                dropout=options.dropout,
                training=options.training,
                bidirectional=options.bidirectional,
                batch_sizes=batch_sizes,
                recompute=options.recompute,
            )
        if done is not None:
            return done[0].transpose(0, 1) if batch_first else done[0], done[1], None
    if plain_call() and not _beyond_native(options):
        given = [state for state in states if state is not None]
        with_gradients = native_training(
            cell.name,
            x,
            given,
            params,
            options.has_biases,
            options.num_layers,
            options.bidirectional,
            batch_first,
            options.dropout if options.training else 0,
            options.recompute,
            lengths,
            batch_sizes,
            zoneout,
            options.training,
            resets=options.resets,
        )
        if with_gradients is not None:
            return *with_gradients, None
    refuse_onnx(lacking, "torch.export takes it")
    if lengths is not None:
        x = without_padding(x, lengths)
    finals: list[tuple[Tensor, ...]] = []
    cells = []
    for index, layer in enumerate(layers):
        part, last = slice(index * directions, (index + 1) * directions), index == options.num_layers - 1
        own, anew = (
            of_all if len(layers) == 1 else [None if state is None else state[part] for state in of_all]
            for of_all in (states, reset_to or [None] * len(states))
        )
        x, of_layer, c = run_layer(cell, x, own, anew, layer, options, zoneout, last, batch_first and last)
        if options.training and options.dropout and not last:
            x = dropped(x, options.dropout)
        finals.append(of_layer)
        cells.append(c)
    joined = finals[0] if len(finals) == 1 else [torch.cat(of_layers) for of_layers in zip(*finals, strict=True)]
    all_cells = None
    if options.return_cells:
        all_cells = torch.stack([c.transpose(0, 1) if batch_first else c for c in cells if c is not None]).to(x.dtype)
    return x, tuple(joined) if x.dtype in (torch.float32, torch.float64) else tuple([s.to(x.dtype) for s in joined]), all_cells


def unseen(state: str) -> float:
    """What a state is before anything was seen, by its name: zero, but of an sLSTM's m, which is the logarithm of it."""
    return -math.inf if state == "m" else 0.0


def _all_or_none(cell: Cell, states: Sequence[Tensor | None], width: int, hidden: int) -> Sequence[Tensor | None]:
    """The states, where some are given those of nothing seen in place of the others."""
    given = next((state for state in states if state is not None), None)
    if given is None or all(state is not None for state in states):
        return states
    sizes = given.shape[:-1]
    return [
        given.new_full((*sizes, width if name == "h" else hidden), unseen(name)) if state is None else state
        for name, state in zip(cell.states, states, strict=True)
    ]


def _trains(options: Options) -> bool:
    """Whether something is drawn at random."""
    return options.training and bool(options.dropout or options.weight_dropout or options.zoneout)


def _beyond_native(options: Options) -> bool:
    """Whether a call has what one native op a layer does not take in training."""
    dropped_weights = options.training and options.weight_dropout
    by_steps = options.return_cells or options.num_heads > 1 or options.solver or options.reset_to is not None
    return bool(by_steps or dropped_weights)


def _torch_lacks(cell: Cell, options: Options) -> str:
    """What of a call torch's LSTM, GRU and RNN do not have, in words; empty: nothing."""
    if cell.name not in torchs.GATES:
        return f"a layer of {cell.name}"
    more = {
        "lengths": options.lengths is not None,
        "zoneout": bool(options.zoneout),
        "weight_dropout": options.weight_dropout and options.training,
        "num_heads": options.num_heads > 1,
        "solver": options.solver is not None,
        "return_cells": options.return_cells,
        "resets": options.resets is not None,
    }
    names = [name for name, given in more.items() if given]
    return f"{cell.name} with {', '.join(names)}" if names else ""


def _flat(layer: Layer, options: Options) -> list[Tensor | None]:
    """The parameters of a layer as torch's functions take them, direction by direction; None for a bias that is missing."""
    names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if options.has_biases else [])]
    names += ["weight_hr"] if options.proj_size else []
    return [layer[name][lane] if name in layer else None for lane in range(len(layer["weight_hh"])) for name in names]


def run_layer(
    cell: Cell,
    x: Tensor,
    states: Sequence[Tensor | None],
    reset_to: Sequence[Tensor | None],
    layer: Layer,
    options: Options,
    zoneout: tuple[float, float],
    last: bool,
    batch_first: bool,
    reverse: Sequence[int] | None = None,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """Output [.., D*P], [B, T, D*P] with ``batch_first``; final states [D, B, n]; c of every step [.., D*H].

    ``reverse``: which of the directions go backwards. None: of two the second.
    """
    heads, training = options.num_heads, options.training
    if training and options.weight_dropout:
        layer = layer | {"weight_hh": [dropped(w_hh, options.weight_dropout) for w_hh in layer["weight_hh"]]}
    ways = list(reverse) if reverse is not None else [0, 1] if options.bidirectional else [0]
    if heads > 1:
        layer, ways = _of_heads(cell, layer, heads), [way for way in ways for _ in range(heads)]
    lanes, (gates, width) = len(ways), layer["weight_hh"][0].shape
    hidden = gates // len(cell.gates)
    batch = None if states[0] is not None or cell.name != "slstm" else _batch_of(x, options)
    joined = States(
        *_joined_states(cell, states, batch, x, lanes, hidden, options),
        *_joined_states(cell, reset_to, None if options.resets is None else 1, x, lanes, hidden, options),
    )

    def run(lanes: int, layer: Layer, states: States, ways: list[int]) -> tuple[Any, ...]:
        walk = Walk(options.lengths, options.batch_sizes, None, None, cell.name, ways, *zoneout, options.resets)
        if training and any(zoneout):
            hold_h = held(x, (*x.shape[:-1], lanes, width), zoneout[0])
            hold_c = held(x, (*x.shape[:-1], lanes, hidden), zoneout[1])
            walk = walk._replace(hold_h=hold_h, hold_c=hold_c, zoneout_h=0.0, zoneout_c=0.0)
        return recurrent(
            _normalized_input(cell, x, layer) if cell.normalized else x,
            states,
            _weights(cell, layer, hidden),
            walk,
            return_cells=options.return_cells,
            recompute=options.recompute,
            private=not last,
            batch_first=batch_first,
            solver=() if options.solver is None else options.solver.numbers(),
        )

    if lanes <= LANES or options.solver is not None:
        y, h_n, c_n, c = run(lanes, layer, joined, ways)
    else:
        results = []
        for begin in range(0, lanes, LANES):
            some = slice(begin, begin + LANES)
            of_some = {name: of[some] for name, of in layer.items()}
            own = States(*[None if state is None else state[some] for state in joined])
            results.append(run(len(ways[some]), of_some, own, ways[some]))
        ys, h_ns, c_ns, cs = zip(*results, strict=True)
        y, h_n = torch.cat(ys, -1), torch.cat(h_ns)
        c_n = None if c_ns[0] is None else torch.cat(c_ns)
        c = None if cs[0] is None else torch.cat(cs, -1)
    if c is not None and cell.wide_states > 1:
        c = c.unflatten(-1, (lanes, cell.wide_states, -1))[..., 0, :].flatten(-2)
    if heads == 1 and cell.wide_states < 2:
        return y, (h_n,) if c_n is None else (h_n, c_n), c
    return y, _separate_states(cell, h_n, c_n, options), c


def zoneout_of(cell: Cell, given: float | tuple[float, float]) -> tuple[float, float]:
    """Probabilities for h and for c."""
    check_zoneout(cell, given)
    zone_h, *rest = given if isinstance(given, (tuple, list)) else (given,)
    zone_c = rest[0] if rest else 0
    return float(zone_h) if zone_h else 0.0, float(zone_c) if zone_c else 0.0


def check_zoneout(cell: Cell, zoneout: Any) -> None:
    """
    Raises:
        TypeError: unless ``zoneout`` is a number, or a pair of them.
        ValueError: if one is no probability, or there are two for a cell that has not h and one c.
    """
    pair = zoneout if isinstance(zoneout, (tuple, list)) else (zoneout,)
    most = 2 if cell.wide_states == 1 else 1
    accepted = "a number in [0, 1], or one for h and one for c" if most == 2 else "a number in [0, 1]"
    for probability in pair:
        if not is_number(probability):
            raise TypeError(f"zoneout must be {accepted}, got {zoneout!r}")
    if len(pair) not in (1, most) or not all(0 <= probability <= 1 for probability in pair):
        raise ValueError(f"zoneout must be {accepted}, got {zoneout}")


def _weights(cell: Cell, layer: Layer, hidden: int) -> Weights:
    """What the op takes of a layer."""
    w_ih, w_hh, w_hr = layer["weight_ih"], layer["weight_hh"], layer.get("weight_hr", ())
    if not cell.normalized:
        vectors = layer[cell.parameters[0][0]] if cell.parameters else ()
        return Weights(w_ih, w_hh, layer.get("bias_ih", ()), layer.get("bias_hh", ()), w_hr, vectors)
    # the input gates come with their biases; what acts inside a step ends with a bias, zero where there is none
    zeros = [w.new_zeros(hidden) for w in w_hh]
    if cell.recurrent_bias is not None:
        inside = [[b[-hidden:] for b in layer.get("bias_hh", zeros)]]
    else:
        inside = [layer["weight_ln_c"], layer.get("bias_ln_c", zeros)]
    vectors = [torch.cat(of_lane) for of_lane in zip(layer["weight_ln_hh"], *inside, strict=True)]
    return Weights((), w_hh, (), (), w_hr, vectors)


def _normalized_input(cell: Cell, x: Tensor, layer: Layer) -> Tensor:
    """Input gates [.., D*G*H] of cells with layer norm: each lane's projection normalized, scaled, shifted by the biases."""
    w_ih, b_ih, b_hh = layer["weight_ih"], layer.get("bias_ih"), layer.get("bias_hh")
    size = w_ih[0].shape[0]
    if b_hh is not None and cell.recurrent_bias is not None:
        inside = size // len(cell.gates)
        b_hh = [pad(b[:-inside], (0, inside)) for b in b_hh]
    biases = [a + b for a, b in zip(b_ih, b_hh, strict=True)] if b_ih and b_hh else b_ih or b_hh or [None] * len(w_ih)
    with without_autocast(x.device.type):
        gates = linear(x, torch.cat(w_ih)).unflatten(-1, (len(w_ih), size)).unbind(-2)
        scaled = zip(gates, layer["weight_ln_ih"], biases, strict=True)
        return torch.cat([layer_norm(of_lane, (size,), scale, bias) for of_lane, scale, bias in scaled], -1)


def _of_heads(cell: Cell, layer: Layer, heads: int) -> Layer:
    """The parameters of each head of a block-diagonal recurrence: rows of its units of every gate."""
    hidden = layer["weight_hh"][0].shape[0] // len(cell.gates)

    def divided(tensor: Tensor) -> Sequence[Tensor]:
        """[n*H, ..] -> heads of [n*H/heads, ..]"""
        parts = tensor.unflatten(0, (tensor.shape[0] // hidden, heads, hidden // heads)).transpose(0, 1)
        return parts.flatten(1, 2).unbind(0)

    return {name: [head for tensor in of for head in divided(tensor)] for name, of in layer.items()}


def _batch_of(x: Tensor, options: Options) -> int:
    return x.shape[1] if options.batch_sizes is None else int(options.batch_sizes[0])


def _joined_states(
    cell: Cell, states: Sequence[Tensor | None], batch: int | None, x: Tensor, lanes: int, hidden: int, options: Options
) -> tuple[Tensor | None, Tensor | None]:
    """h0 [lanes, B, P] and the others side by side [lanes, B, K*H], from states [D, B, n]; None where zeros serve.

    ``batch``: of an sLSTM's states that are not given; None: they are not wanted.
    """
    h0, *others = states
    if h0 is None:
        if cell.name != "slstm" or batch is None:
            return None, None
        # nothing was seen yet: the first step forgets all, whatever its gates say
        zeros = x.new_zeros(lanes, batch, 2 * hidden, dtype=torch.promote_types(x.dtype, torch.float32))
        return None, torch.cat((zeros, torch.full_like(zeros[..., :hidden], -torch.inf)), -1)
    if options.num_heads > 1:
        # [D, B, H] -> [D*heads, B, H/heads]
        given = [state for state in states if state is not None]
        h0, *others = (s.unflatten(-1, (options.num_heads, -1)).permute(0, 2, 1, 3).flatten(0, 1) for s in given)
    if len(others) < 2:
        return h0, others[0] if others else None
    return h0, torch.cat([state for state in others if state is not None], -1)


def _separate_states(cell: Cell, h_n: Tensor, c_n: Tensor | None, options: Options) -> tuple[Tensor, ...]:
    """The states [D, B, n], from those of the lanes."""
    states = (h_n,) if c_n is None else (h_n, c_n) if cell.wide_states == 1 else (h_n, *c_n.chunk(cell.wide_states, -1))
    if options.num_heads == 1:
        return states
    return tuple(s.unflatten(0, (-1, options.num_heads)).transpose(1, 2).flatten(-2) for s in states)


def _layers(cell: Cell, given: Sequence[Tensor | None], options: Options, directions: int) -> list[Layer]:
    """The parameters of every layer; of a bias that only some directions lack, zeros."""
    if type(options.num_layers) is not int or type(options.proj_size) is not int:
        checked_int("num_layers", options.num_layers)
        checked_int("proj_size", options.proj_size)
    if options.num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {options.num_layers}")
    if options.proj_size < 0:
        raise ValueError(f"proj_size must not be negative (0: no projection), got {options.proj_size}")
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"params must be a list or tuple of Tensors, not {type(given).__name__}")
    names = ["weight_ih", "weight_hh"]
    if options.has_biases:
        names += ["bias_ih", "bias_hh"]
    if options.proj_size:
        names.append("weight_hr")
    if cell.parameters:
        names += [name for name, _ in cell.extra(options.has_biases)]
    each, count = len(names), options.num_layers * directions
    if len(given) != each * count:
        raise RuntimeError(
            f"expected {each * count} parameters ({each} for each of {options.num_layers} layers x {directions} "
            f"directions), got {len(given)}"
        )
    layers = []
    for index in range(options.num_layers):
        own = list(given[index * each * directions : (index + 1) * each * directions])
        layer: Layer = {}
        missing = False
        for place, name in enumerate(names):
            layer[name] = own[place::each]
            for tensor in layer[name]:
                missing |= tensor is None
        layers.append(_without_missing(layer, index) if missing else layer)
    return layers


def _without_missing(layer: Layer, index: int) -> Layer:
    """A layer some of whose parameters are None."""
    given: Layer = {}
    for name, of in layer.items():
        there = [tensor for tensor in of if tensor is not None]
        if len(there) < len(of) and not name.startswith("bias"):
            raise TypeError(f"{name} of layer {index} must be a Tensor, not NoneType")
        if there:
            given[name] = [torch.zeros_like(there[0], requires_grad=False) if tensor is None else tensor for tensor in of]
    return given


def check_states(cell: Cell, hx: Any, resets: bool = False) -> None:
    """Raise unless ``hx`` is a tuple with a tensor, or None, for each state of the cell; ``resets``: ``reset_to``, never None."""
    names = ", ".join(cell.states)
    if not isinstance(hx, (tuple, list)):
        raise TypeError(f"{'reset_to' if resets else 'hx'} must be a tuple of Tensors ({names}), not {type(hx).__name__}")
    if len(hx) != len(cell.states):
        raise RuntimeError(f"{cell.name} has {len(cell.states)} states ({names}), got {len(hx)}")
    for name, state in zip(cell.states, hx, strict=True):
        if state is not None or resets:
            checked_tensor(f"reset_to's {name}" if resets else f"{name}0", state)


def _check_params(cell: Cell, input: Tensor, layers: list[Layer], options: Options, directions: int) -> int:
    """H."""
    w_hh, gates, heads = layers[0]["weight_hh"][0], len(cell.gates), options.num_heads
    if not isinstance(w_hh, Tensor):
        checked_tensor("weight_hh", w_hh)
    if type(heads) is not int:
        checked_int("num_heads", heads)
    if w_hh.dim() != 2 or w_hh.shape[0] % gates:
        raise RuntimeError(f"weight_hh must be [{gates} * H, P], got {list(w_hh.shape)}")
    hidden = w_hh.shape[0] // gates
    if heads < 1 or hidden % heads:
        raise ValueError(f"num_heads must divide the hidden size; got {heads} heads and a hidden size of {hidden}")
    if options.proj_size and heads > 1:
        raise ValueError(f"proj_size and num_heads exclude each other; got proj_size={options.proj_size}, num_heads={heads}")
    if options.proj_size and cell.wide_states != 1:
        raise ValueError(f"proj_size argument is only supported for LSTM, not {cell.name}")
    width, columns = options.proj_size or hidden, input.shape[-1]
    shapes = {
        "weight_ih": (gates * hidden, columns),
        "weight_hh": (gates * hidden, width // heads),
        "bias_ih": (gates * hidden,),
        "bias_hh": (gates * hidden,),
        "weight_hr": (width, hidden),
    }
    for name, size in cell.parameters:
        shapes[name] = (size * hidden,)
    for index, layer in enumerate(layers):
        for name, of in layer.items():
            for param in of:
                if not isinstance(param, Tensor):
                    checked_tensor(name, param)
                if param.dtype != input.dtype:
                    raise RuntimeError(f"input dtype ({input.dtype}) does not match {name} dtype ({param.dtype})")
                if param.device != input.device:
                    devices = f"input is on {input.device} and {name} on {param.device}"
                    raise RuntimeError(f"Expected all tensors to be on the same device, but {devices}")
                if param.shape != shapes[name]:
                    raise RuntimeError(f"{name} of layer {index} must be {list(shapes[name])}, got {list(param.shape)}")
        shapes["weight_ih"] = (gates * hidden, width * directions)
    return hidden


def _check_state(
    name: str, state: Tensor, input: Tensor, batch_sizes: Tensor | None, size: tuple[int, int], or_one: bool = False
) -> None:
    """``or_one``: its batch may also be 1."""
    if state.dim() != 3 or (state.shape[0], state.shape[2]) != size:
        raise RuntimeError(f"Expected {name} of size [{size[0]}, B, {size[1]}], got {list(state.shape)}")
    if batch_sizes is None and state.shape[1] != input.shape[1] and not (or_one and state.shape[1] == 1):
        raise RuntimeError(f"Expected {name} for a batch of {input.shape[1]}{' or 1' if or_one else ''}, got {list(state.shape)}")
    if state.dtype != input.dtype:
        raise RuntimeError(f"input dtype ({input.dtype}) does not match {name} dtype ({state.dtype})")
    if state.device != input.device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but input is on {input.device} and {name} on {state.device}"
        )


def check_layout(input: Tensor, lengths: Tensor | None, batch_sizes: Tensor | None) -> None:
    if lengths is not None:
        if batch_sizes is not None:
            raise RuntimeError("give either lengths (padded input) or batch_sizes (packed input), not both")
        checked_tensor("lengths", lengths)
        if lengths.dtype not in (torch.int64, torch.int32):
            raise RuntimeError(f"lengths must be int64 or int32, got {lengths.dtype}")
        if lengths.shape != (input.shape[1],):
            swapped = lengths.shape == (input.shape[0],)  # [T, B, I], however it was given
            hint = "; the batch is the input's first dimension with batch_first, else the second" if swapped else ""
            rows = f"[{input.shape[1]}], one for each row of the batch"
            raise RuntimeError(f"lengths must be {rows}, got {list(lengths.shape)}{hint}")
        if lengths.device != input.device:
            raise RuntimeError(f"lengths must be on the input's device ({input.device}), got {lengths.device}")
    if batch_sizes is None:
        return
    checked_tensor("batch_sizes", batch_sizes)
    if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu":
        raise RuntimeError(
            "batch_sizes must be a 1-D int64 tensor on the CPU, "
            f"got {batch_sizes.dim()}-D {batch_sizes.dtype} on {batch_sizes.device}"
        )
