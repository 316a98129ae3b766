"""Every cell by the equations of its paper, gate by gate, and a loop over steps: the truth for what torch.nn does not have.

Plain, differentiable PyTorch that shares nothing with the package: no table of cells, no layout, no formula, no backward.
Letters: T time, B batch, I input, H hidden, P what a direction puts out (H, or the projection's size).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .cases import RecurrentCase

# What goes from step to step beside h.
STATES: dict[str, tuple[str, ...]] = {
    "lstm": ("c",),
    "coupled_lstm": ("c",),
    "peephole_lstm": ("c",),
    "layer_norm_lstm": ("c",),
    "slstm": ("c", "n", "m"),
}
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "layer_norm_gru": 3, "coupled_lstm": 3}  # the others have four

Weights = Mapping[str, Tensor]  # of a direction of a layer, by the names of its parameters; a missing bias is zero


def normal(x: Tensor) -> Tensor:
    """Layer normalization over the last dimension, without scale and shift."""
    centered = x - x.mean(-1, keepdim=True)
    return centered / torch.sqrt((centered * centered).mean(-1, keepdim=True) + 1e-5)


def step(cell: str, w: Weights, wx: Tensor, rh: Tensor, h: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The output before any projection, and the other states, from W x, R h, h and the states before: each [B, n]."""
    return _STEPS[cell](w, wx, rh, h, *states)


def _rnn(nonlinearity: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, list[Tensor]]]:
    def step(w: Weights, wx: Tensor, rh: Tensor, h: Tensor) -> tuple[Tensor, list[Tensor]]:
        return nonlinearity(wx + w["bias_ih"] + rh + w["bias_hh"]), []

    return step


def _lstm(w: Weights, wx: Tensor, rh: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, list[Tensor]]:
    i, f, g, o = (wx + w["bias_ih"] + rh + w["bias_hh"]).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), [c]


def _gru(w: Weights, wx: Tensor, rh: Tensor, h: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The recurrent bias of n stands inside, where the reset gate multiplies it."""
    x_r, x_z, x_n = (wx + w["bias_ih"]).chunk(3, -1)
    h_r, h_z, h_n = (rh + w["bias_hh"]).chunk(3, -1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return (1 - z) * n + z * h, []


def _coupled_lstm(w: Weights, wx: Tensor, rh: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, list[Tensor]]:
    i, g, o = (wx + w["bias_ih"] + rh + w["bias_hh"]).chunk(3, -1)
    c = (1 - torch.sigmoid(i)) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), [c]


def _peephole_lstm(w: Weights, wx: Tensor, rh: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The input and forget gates see the old c, the output gate the new one."""
    i, f, g, o = (wx + w["bias_ih"] + rh + w["bias_hh"]).chunk(4, -1)
    p_i, p_f, p_o = w["weight_peephole"].chunk(3)
    new = torch.sigmoid(f + p_f * c) * c + torch.sigmoid(i + p_i * c) * torch.tanh(g)
    return torch.sigmoid(o + p_o * new) * torch.tanh(new), [new]


def _layer_norm_lstm(w: Weights, wx: Tensor, rh: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, list[Tensor]]:
    x, r = normal(wx) * w["weight_ln_ih"] + w["bias_ih"], normal(rh) * w["weight_ln_hh"] + w["bias_hh"]
    i, f, g, o = (x + r).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(normal(c) * w["weight_ln_c"] + w["bias_ln_c"]), [c]


def _layer_norm_gru(w: Weights, wx: Tensor, rh: Tensor, h: Tensor) -> tuple[Tensor, list[Tensor]]:
    x_r, x_z, x_n = (normal(wx) * w["weight_ln_ih"] + w["bias_ih"]).chunk(3, -1)
    h_r, h_z, h_n = (normal(rh) * w["weight_ln_hh"] + w["bias_hh"]).chunk(3, -1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return (1 - z) * n + z * h, []


def _slstm(w: Weights, wx: Tensor, rh: Tensor, h: Tensor, c: Tensor, n: Tensor, m: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The true c and n are e^m times these; the stabilizer m is the largest exponent so far."""
    i, f, z, o = (wx + w["bias_ih"] + rh + w["bias_hh"]).chunk(4, -1)
    forget = -torch.nn.functional.softplus(-f) + m  # log sigmoid(f), and the exponent of what was kept
    stabilizer = torch.maximum(forget, i)
    kept, new = torch.exp(forget - stabilizer), torch.exp(i - stabilizer)
    c, n = kept * c + new * torch.tanh(z), kept * n + new
    return torch.sigmoid(o) * c / n, [c, n, stabilizer]


_STEPS: dict[str, Callable[..., tuple[Tensor, list[Tensor]]]] = {
    "rnn_tanh": _rnn(torch.tanh),
    "rnn_relu": _rnn(torch.relu),
    "lstm": _lstm,
    "gru": _gru,
    "coupled_lstm": _coupled_lstm,
    "peephole_lstm": _peephole_lstm,
    "layer_norm_lstm": _layer_norm_lstm,
    "layer_norm_gru": _layer_norm_gru,
    "slstm": _slstm,
}


def layers(inputs: Mapping[str, Any], seed: int) -> tuple[Tensor, ...]:
    """The output and the final states of all layers: a loop over steps, each step for every sequence.

    In 16 bits W x, the output of a step and what is returned are rounded, all else is fp32. Zoneout in training draws, after
    ``seed``, a mask for h and one for c of each layer, of every row, direction and unit.
    """
    case: RecurrentCase = inputs["case"]
    x, states = inputs["x"], STATES.get(case.cell, ())
    lanes, width = 2 if case.bidirectional else 1, case.projection or case.hidden
    wide = torch.promote_types(x.dtype, torch.float32)
    place, lengths = _rows(case, inputs)
    leading, rows = x.shape[:-1], x.reshape(-1, case.input)
    torch.manual_seed(seed)
    finals: list[list[Tensor]] = [[] for _ in ("h", *states)]
    for layer in range(case.layers):
        masks: list[Any] = [None, None]
        for which, (size, zoneout) in enumerate(zip((width, case.hidden), case.zoneout, strict=True)):
            if case.training and zoneout:
                drawn = torch.empty((*leading, lanes, size), dtype=torch.bool, device=x.device).bernoulli_(zoneout)
                masks[which] = drawn.flatten(0, -3)
        outputs = []
        for lane in range(lanes):
            number = layer * lanes + lane

            def of_rows(given: Tensor | None, name: str, number: int = number) -> Tensor:
                if given is not None:
                    return given[number].to(wide).expand(case.batch, -1)
                # where nothing was seen yet the stabilizer of the sLSTM has no exponent
                size, fill = width if name == "h" else case.hidden, -torch.inf if name == "m" else 0.0
                return x.new_full((case.batch, size), fill, dtype=wide)

            start, anew = ([of_rows(inputs.get(f.format(name)), name) for name in ("h", *states)] for f in ("{}0", "reset_{}"))
            order = torch.arange(case.steps, device=x.device)[:, None]
            at = place.gather(0, (lengths - 1 - order if lane else order.expand_as(place)).clamp(min=0))
            held = [None if mask is None else mask[:, lane] for mask in masks]
            weights = _weights(case, inputs, layer, lane, wide)
            # who starts anew before a step of this direction: backwards where the step before it, in time after it, is reset
            cuts = torch.zeros_like(at, dtype=torch.bool)
            if case.resets:
                begins = inputs["resets"].flatten()[at.clamp(max=len(rows) - 1)]
                cuts[lane:] = begins[: case.steps - lane]
            output, ends = _lane(case, rows, at, lengths, start, weights, held, cuts, anew)
            outputs.append(output)
            for final, end in zip(finals, ends, strict=True):
                final.append(end.to(x.dtype))
        rows = torch.cat(outputs, -1)
    return (rows.view(*leading, -1), *(torch.stack(final) for final in finals))


def _rows(case: RecurrentCase, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Which row each step of each sequence is, [T, B], and how many steps a sequence has, [B]."""
    device, batch_sizes, lengths = inputs["x"].device, inputs.get("batch_sizes"), inputs.get("lengths")
    slots = torch.arange(case.batch, device=device)
    if batch_sizes is None:
        place = torch.arange(case.steps, device=device)[:, None] * case.batch + slots
        return place, torch.full_like(slots, case.steps) if lengths is None else lengths
    sizes = batch_sizes.to(device)
    return (sizes.cumsum(0) - sizes)[:, None] + slots, (sizes[:, None] > slots).sum(0)


def _weights(case: RecurrentCase, inputs: Mapping[str, Any], layer: int, lane: int, wide: torch.dtype) -> dict[str, Tensor]:
    suffix = f"_l{layer}" + ("_reverse" if lane else "")
    own = {name.removesuffix(suffix): value for name, value in inputs.items() if name.endswith(suffix)}
    own = {name: value if name == "weight_ih" else value.to(wide) for name, value in own.items()}
    size = own["weight_ih"].shape[0]
    for name, of in (("bias_ih", size), ("bias_hh", size), ("bias_ln_c", case.hidden)):
        own.setdefault(name, own["weight_hh"].new_zeros(of))
    if case.heads > 1:
        # the units of a head see one another alone
        gates = own["weight_hh"].chunk(GATES.get(case.cell, 4))
        own["weight_hh"] = torch.cat([torch.block_diag(*gate.chunk(case.heads)) for gate in gates])
    return own


def _lane(
    case: RecurrentCase, rows: Tensor, at: Tensor, lengths: Tensor, states: list[Tensor], w: dict[str, Tensor], held: list[Any],
    cuts: Tensor, anew: list[Tensor],
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The output of every row, zero where there is no step, and the last states of a direction that takes row at[k] in step k."""
    dtype, wide = rows.dtype, states[0].dtype
    gates, outputs = rows @ w["weight_ih"].T, []
    for k in range(case.steps):
        index = at[k].clamp(max=rows.shape[0] - 1)
        cut = (cuts[k] & (k < lengths))[:, None]
        states = [torch.where(cut, new, old) for new, old in zip(anew, states, strict=True)]
        h, *others = states
        out, new = step(case.cell, w, gates[index].to(wide), h @ w["weight_hh"].T, h, others)
        if case.projection:
            out = out @ w["weight_hr"].T
        proposed = [out.to(dtype).to(wide), *new]
        for i, (mask, zoneout) in enumerate(zip(held, case.zoneout, strict=True)):
            if zoneout:
                keep = zoneout if mask is None else mask[index].to(wide)
                proposed[i] = keep * states[i] + (1 - keep) * proposed[i]
        proposed[0] = proposed[0].to(dtype).to(wide)
        active = (k < lengths)[:, None]
        states = [torch.where(active, after, before) for after, before in zip(proposed, states, strict=True)]
        outputs.append(torch.where(active, proposed[0], 0).to(dtype))
    # each row is written by the one step that it is; the others write to a row behind the last
    steps = torch.arange(case.steps, device=rows.device)[:, None]
    target = torch.where(steps < lengths, at, rows.shape[0]).flatten()
    output = rows.new_zeros(rows.shape[0] + 1, outputs[0].shape[-1])
    return output.index_copy(0, target, torch.cat(outputs))[:-1], states
