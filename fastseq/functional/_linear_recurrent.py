"""Layers of linear recurrence: gates that read the input alone, so that nothing but a scan goes from step to step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._arguments import check_keywords, checked_number, checked_tensor, without_unknown
from ..backends import library
from ..ops._dispatch import PLAIN, autocasts, is_sharded, plain_call, sharding, shared_sequence, wants_gradient
from ..ops.types import ScanSpec, state_dtype
from ._autocast import without_autocast
from ._native_layers import held
from ._recording import refuse_onnx
from ._scan import checked_resets, own_lengths, scanned

__all__ = ["linear_recurrent"]

Lane = Mapping[str, Tensor]  # parameters of a layer in one direction


@without_unknown
def linear_recurrent(
    cell: str,
    input: Tensor,
    hx: Tensor | tuple[Tensor, Tensor] | None,
    params: Sequence[Mapping[str, Tensor]],
    *,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    zoneout: float = 0.0,
    **unknown: Any,
) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
    """Layers whose gates read the input alone over a sequence: ``(output, h_n)``. The modules' docstrings have the equations.

    T time, B batch, I input, H hidden, L layers, D directions.

    Args:
        cell: ``"min_gru"``, ``"min_lstm"``, ``"hgrn"``, ``"rg_lru"``, ``"qrnn_f"``, ``"qrnn_fo"``, ``"qrnn_ifo"`` or ``"lru"``.
        input: ``[T, B, I]``, ``[B, T, I]`` with ``batch_first``, or unbatched ``[T, I]``; floating point.
        hx: ``[L*D, B, H]``, unbatched ``[L*D, H]``; in the input's dtype or that of states, of the LRU (``[L*D, B, N]``)
            complex. None: a sequence begins. Of a QRNN of two steps a pair: the states, and the inputs of all layers before the
            first step (backwards: behind the last), ``[D, B, I + (L-1)*D*H]``, unbatched ``[D, I + (L-1)*D*H]``, in the input's
            dtype.
        params: per layer, per direction, by the names that the module's have but for their ending ``_l<layer>``, ``_reverse``;
            of the HGRN also ``lower_bound`` ``[H]``, what the forget gate is never below, or none.
        num_layers: L; each layer after the first reads the output of the one before.
        dropout: probability with which, in training, elements of every layer's output but the last's are zeroed.
        training: whether that is drawn.
        bidirectional: D = 2: a second lane of every layer goes from the last step to the first.
        batch_first: input, output and resets have the batch before the time.
        lengths: int32 or int64 ``[B]``, each in 0..T. Beyond a row's length the output is zero; final states are those after a
            row's last step, where its backward direction starts.
        resets: bool ``[T, B]``, ``[B, T]`` with ``batch_first``, unbatched ``[T]``: where a new segment begins. Every layer and
            direction is as if the segments of a row were run one by one, hx before the first (backwards: the last) of them.
        zoneout: of a QRNN, probability with which, in training, a forget gate is one in a step; otherwise it is mixed with one in
            that proportion.

    Returns:
        ``output`` ``[T, B, D*H]`` as the input, and ``h_n`` as hx, in the dtype of states: fp32 (fp64 for fp64), complex64.

    Raises:
        ValueError: if there is no such cell, or ``zoneout`` is outside [0, 1] or of another cell than a QRNN.
        TypeError: if an argument is no Tensor, or ``zoneout`` no number.
        RuntimeError: if ranks, sizes, dtypes, devices, ``lengths`` or ``resets`` do not fit.
        NotImplementedError: during ONNX export.
    """
    if unknown:
        check_keywords(linear_recurrent, unknown)
    if lengths is None and resets is None and not (bidirectional or zoneout) and plain_call(unseen=True):
        done = None if dropout and training else _natively(cell, input, hx, params, num_layers, batch_first)
        if done is not None:
            return done[0], done[1]
    refuse_onnx("a linear recurrence", "a loop over its steps has one")
    layer_of = _layer(cell)
    check_zoneout(zoneout)
    if zoneout and not layer_of.zoned:
        raise ValueError(f"zoneout is of QRNNs, got {zoneout} with {cell}")
    checked_tensor("input", input)
    if input.dim() not in (2, 3):
        raise RuntimeError(f"{cell}: Expected input to be 2D or 3D, got {input.dim()}D instead")
    alone, directions = input.dim() == 2, 2 if bidirectional else 1
    lanes = num_layers * directions
    if len(params) != lanes:
        raise RuntimeError(f"{cell} expects the parameters of {lanes} lanes, got {len(params)}")
    if input.shape[-1] != layer_of.width(params[0]):
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {layer_of.width(params[0])}, got {input.shape[-1]}"
        )
    weight = next(params[0][name] for name in ("weight_ih", "weight_r", "weight_d") if name in params[0])
    if input.dtype != weight.dtype and not autocasts(input.device.type):
        raise RuntimeError(f"input dtype ({input.dtype}) does not match weight dtype ({weight.dtype})")
    if type(input) not in PLAIN and is_sharded(input):
        return sharding().linear_layers(
            linear_recurrent,
            cell,
            1 if bidirectional else math.gcd(*[layer_of.parts(lane) for lane in params]),
            input,
            hx,
            params,
            lengths,
            resets,
            batch_first,
            num_layers=num_layers,
            dropout=dropout,
            training=training,
            bidirectional=bidirectional,
            zoneout=zoneout,
        )
    x = input.unsqueeze(1) if alone else input.transpose(0, 1) if batch_first else input
    if resets is not None:
        resets = checked_resets(resets, x, alone, batch_first)
    beyond = None
    if lengths is not None:
        checked_tensor("lengths", lengths)
        if alone:
            raise RuntimeError("lengths are of the rows of a batch, but the input is unbatched")
        lengths = own_lengths(lengths, x)
        beyond = (torch.arange(x.shape[0], device=x.device)[:, None] >= lengths)[..., None]
        x = x.masked_fill(beyond, 0)  # gradients of weights are sums over all steps
    hx, inputs = _parted(cell, hx, layer_of.windowed(params[0]))
    hidden = layer_of.hidden(params[0])
    hx = _checked_state(hx, input, layer_of, (lanes, hidden) if alone else (lanes, x.shape[1], hidden))
    states = [None] * lanes if hx is None else (hx.unsqueeze(1) if alone else hx).unbind(0)
    before = _Before(inputs, input, x, alone, directions, num_layers, hidden) if layer_of.windowed(params[0]) else None
    finals: list[Tensor] = []
    more: dict[str, Any] = {"zoneout": zoneout, "training": training} if zoneout else {}
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            lane = layer * directions + direction
            spec = ScanSpec(resets, lengths, None, layer_of.scan, direction == 1)
            seen = x if before is None else before.beside(x, layer, direction, spec)
            output, final = layer_of.run(seen, params[lane], states[lane], spec, **more)
            if beyond is not None and "bias_out" in params[lane]:
                output = output.masked_fill(beyond, 0)
            outputs.append(output)
            finals.append(final)
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if dropout and layer < num_layers - 1:
            x = F.dropout(x, dropout, training)
    h_n = torch.stack(finals) if lanes > 1 else finals[0].unsqueeze(0)
    h_n = h_n.squeeze(1) if alone else h_n
    output = x.squeeze(1) if alone else x.transpose(0, 1) if batch_first else x
    return output, h_n if before is None else (h_n, before.last())


_GATES = {"min_gru": 2, "min_lstm": 3}  # of layers that are a projection and a scan
_native: Any = None  # the library's op, once it is loaded, without a frame of Python around it


def _natively(
    cell: Any, input: Any, hx: Any, params: Sequence[Mapping[str, Any]], num_layers: int, batch_first: bool
) -> Sequence[Tensor] | None:
    """`projected_scans` of what a caller gave."""
    if not isinstance(cell, str) or cell not in _GATES or len(params) != num_layers:
        return None
    given: list[Any] = []
    has_biases = num_layers > 0 and "bias_ih" in params[0]
    for lane in params:
        if len(lane) != 1 + has_biases:
            return None
        given.append(lane.get("weight_ih"))
        if has_biases:
            given.append(lane.get("bias_ih"))
    return projected_scans(cell, input, hx, given, has_biases, batch_first)


def projected_scans(
    cell: str, input: Any, hx: Any, params: list[Any], has_biases: bool, batch_first: bool
) -> Sequence[Tensor] | None:
    """Output and final states of a plain call (``plain_call``) of a batch on the CPU without gradients, of layers that are a
    projection and a scan, in one call of the library: of a single step all else takes longer than these.

    ``params``: of each layer the weight and, if there are any, the bias. None: it is for the other way, which also says what is
    wrong with it.
    """
    gradients = torch.is_grad_enabled()
    for tensor in (input, *params) if hx is None else (input, hx, *params):
        if type(tensor) not in PLAIN or tensor.is_nested or (gradients and tensor.requires_grad):
            return None
    global _native
    if _native is None:
        if library.reason():
            return None
        _native = torch.ops.fastseq_native.scan_layers.default._op
    return _native(input, hx, params, cell, _GATES[cell], has_biases, batch_first) or None


class _Layer(NamedTuple):
    """A layer as a value: what it makes of x [T, B, I] and the state before it [B, H], and its sizes by its parameters."""

    run: Callable[..., tuple[Tensor, Tensor]]  # (x, lane, state, spec), if zoned also zoneout and training
    scan: str  # of SCAN_CELLS
    width: Callable[[Lane], int]
    hidden: Callable[[Lane], int]  # of the states
    complex: bool = False  # states
    zoned: bool = False  # has zoneout
    windowed: Callable[[Lane], bool] = lambda lane: False  # reads the step before as well: x is [T, B, 2 I], that beside it
    parts: Callable[[Lane], int] = lambda lane: 1  # equal ones of input and states, each with its rows of every parameter


def _projections(x: Tensor, lane: Lane, gates: int) -> list[Tensor]:
    """With gradients rows of the weight are parted, not what is projected, whose gradient would have to be put together again."""
    if not wants_gradient([x, *lane.values()]):
        return list(F.linear(x, lane["weight_ih"].flatten(1), lane.get("bias_ih")).chunk(gates, -1))
    biases = lane["bias_ih"].chunk(gates) if "bias_ih" in lane else [None] * gates
    return [F.linear(x, w.flatten(1), b) for w, b in zip(lane["weight_ih"].chunk(gates), biases, strict=True)]


def _scanned(b: Tensor, a: Tensor, gate: Any, vector: Any, state: Any, spec: ScanSpec) -> tuple[Tensor, Tensor]:
    with without_autocast(b.device.type):
        return scanned(b, a, gate, vector, state, spec)


def _gated(scan: str, gates: int) -> _Layer:
    """Of cells whose output is the state and whose gates are rows of a weight: that of a, of another gate, of b."""

    def run(x: Tensor, lane: Lane, state: Tensor | None, spec: ScanSpec) -> tuple[Tensor, Tensor]:
        a, *others, b = _projections(x, lane, gates)
        return _scanned(b, a, others[0] if others else None, None, state, spec)

    return _Layer(run, scan, lambda lane: lane["weight_ih"].shape[1], lambda lane: lane["weight_ih"].shape[0] // gates)


def _hgrn(x: Tensor, lane: Lane, state: Tensor | None, spec: ScanSpec) -> tuple[Tensor, Tensor]:
    """Rows of the weight: f, i, and with a norm its gate."""
    a, b, *gate = _projections(x, lane, 3 if "weight_norm" in lane else 2)
    wide = state_dtype(x.dtype)
    bound = lane["lower_bound"].to(wide) if "lower_bound" in lane else torch.zeros(b.shape[-1], dtype=wide, device=x.device)
    h, final = _scanned(b, a, None, bound, state, spec)
    if gate:
        h = F.rms_norm(h, h.shape[-1:], lane["weight_norm"].to(h.dtype), 1e-5) * F.silu(gate[0])
    return h, final


_SHARPNESS = 8  # c of the RG-LRU


def _rg_lru(x: Tensor, lane: Lane, state: Tensor | None, spec: ScanSpec) -> tuple[Tensor, Tensor]:
    if "weight_ih" in lane:
        x = F.linear(x, lane["weight_ih"], lane.get("bias_ih"))

    def gate(name: str) -> Tensor:
        weight, bias = lane[f"weight_{name}"], lane.get(f"bias_{name}")
        if weight.shape[0] == 1:
            return F.linear(x, weight[0], bias)
        logits = torch.einsum("tbhi,hoi->tbho", x.unflatten(-1, weight.shape[::2]), weight).flatten(-2)
        return logits if bias is None else logits + bias.to(logits.dtype)

    r, i = gate("r"), gate("i")
    rate = -_SHARPNESS * F.logsigmoid(-lane["decay"].to(state_dtype(x.dtype)))
    return _scanned(x.to(r.dtype), r, i, rate, state, spec)


def _qrnn(pooling: str) -> _Layer:
    """Rows of the weight: f, of ifo i, z, and of fo and ifo o; columns: this step's input, and of two steps the one before."""
    gates = 1 + len(pooling)
    scan = "qrnn_ifo" if pooling == "ifo" else "qrnn"

    def run(
        x: Tensor, lane: Lane, state: Tensor | None, spec: ScanSpec, zoneout: float = 0.0, training: bool = False
    ) -> tuple[Tensor, Tensor]:
        a, *others = _projections(x, lane, gates)
        a = _zoned(a, zoneout, training) if zoneout else a
        gate, (z, *out) = (others[0], others[1:]) if pooling == "ifo" else (None, others)
        c, final = _scanned(z, a, gate, None, state, spec)
        return c * out[0].sigmoid() if out else c, final

    return _Layer(
        run,
        scan,
        lambda lane: lane["weight_ih"].shape[2],
        lambda lane: lane["weight_ih"].shape[0] // gates,
        zoned=True,
        windowed=lambda lane: lane["weight_ih"].shape[1] == 2,
    )


def _zoned(a: Tensor, zoneout: float, training: bool) -> Tensor:
    """Logits of a gate that is 1 where zoneout says so, or of p + (1 - p) sigmoid(a)."""
    if training or zoneout == 1:
        hold = held(a, a.shape, zoneout)
        return a if hold is None else a.masked_fill(hold, math.inf)
    wide = a.to(state_dtype(a.dtype))
    return (torch.logaddexp(wide, wide.new_full((), math.log(zoneout))) - math.log1p(-zoneout)).to(a.dtype)


def _lru(x: Tensor, lane: Lane, state: Tensor | None, spec: ScanSpec) -> tuple[Tensor, Tensor]:
    """Weights of complex numbers have their real and imaginary part in turn."""
    wide = state_dtype(x.dtype)
    nu, theta, gamma = (lane[name].to(wide).exp() for name in ("nu_log", "theta_log", "gamma_log"))
    into = (lane["weight_b"].to(wide).unflatten(0, (-1, 2)) * gamma[:, None, None]).flatten(0, 1).to(lane["weight_b"].dtype)
    b = torch.view_as_complex(F.linear(x, into).to(wide).unflatten(-1, (-1, 2)))
    h, final = _scanned(b, torch.polar((-nu).exp(), theta)[None, None], None, None, state, spec)
    real, imaginary = lane["weight_c"].unflatten(1, (-1, 2)).unbind(-1)
    out = torch.stack((real, -imaginary), -1).flatten(1)  # Re(C h)
    through = F.linear(torch.view_as_real(h).flatten(-2).to(x.dtype), out, lane.get("bias_out"))
    return through + F.linear(x, lane["weight_d"]), final


_LAYERS = {
    "min_gru": _gated("min_gru", 2),
    "min_lstm": _gated("min_lstm", 3),
    "hgrn": _Layer(
        _hgrn,
        "hgrn",
        lambda lane: lane["weight_ih"].shape[1],
        lambda lane: lane["weight_ih"].shape[0] // (3 if "weight_norm" in lane else 2),
    ),
    "rg_lru": _Layer(
        _rg_lru,
        "rg_lru",
        lambda lane: lane["weight_ih"].shape[1] if "weight_ih" in lane else lane["decay"].shape[0],
        lambda lane: lane["decay"].shape[0],
        parts=lambda lane: 1 if "weight_ih" in lane else lane["weight_r"].shape[0],
    ),
    "qrnn_f": _qrnn("f"),
    "qrnn_fo": _qrnn("fo"),
    "qrnn_ifo": _qrnn("ifo"),
    "lru": _Layer(_lru, "given", lambda lane: lane["weight_d"].shape[1], lambda lane: lane["nu_log"].shape[0], complex=True),
}


def _parted(cell: str, hx: Any, windowed: bool) -> tuple[Tensor | None, Tensor | None]:
    """The states, and the inputs before the first step."""
    if not windowed or hx is None:
        return hx, None
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        given = f"{len(hx)} of them" if isinstance(hx, (tuple, list)) else type(hx).__name__
        raise TypeError(f"{cell}: hx of a window of two steps must be a pair (states, inputs before), got {given}")
    return checked_tensor("hx[0]", hx[0]), checked_tensor("hx[1]", hx[1])


class _Before:
    """The inputs of the step before, layer by layer: None, zeros, or those given; and the last ones, for the call after this."""

    def __init__(
        self, given: Tensor | None, input: Tensor, x: Tensor, alone: bool, directions: int, num_layers: int, hidden: int
    ) -> None:
        self.alone, self.widths = alone, [x.shape[-1], *[directions * hidden] * (num_layers - 1)]
        shape = (directions, *([] if alone else [x.shape[1]]), sum(self.widths))
        if given is not None:
            if given.shape != shape:
                raise RuntimeError(f"Expected inputs before of size {shape}, got {list(given.shape)}")
            if given.dtype != input.dtype or given.device != input.device:
                raise RuntimeError(
                    f"inputs before must be {input.dtype} on {input.device}, as the input, got {given.dtype} on {given.device}"
                )
            given = given.unsqueeze(1) if alone else given
        self.given = None if given is None else [lane.split(self.widths, -1) for lane in given.unbind(0)]
        self.kept: list[list[Tensor]] = [[] for _ in range(directions)]

    def beside(self, x: Tensor, layer: int, direction: int, spec: ScanSpec) -> Tensor:
        """[T, B, 2 I]: x of every step, then of the one before it in the walk, zeros where a segment begins."""
        first = x.new_zeros(x.shape[1:]) if self.given is None else self.given[direction][layer].to(x.dtype)
        shared, last = shared_sequence(), None
        if shared is not None:
            first, last = shared.inputs_before(x, first, spec)
        steps, reset = x.shape[0], spec.resets
        ends = None if spec.lengths is None else spec.lengths.long()
        if spec.reverse:
            before = torch.cat((x[1:], first[None]))[:steps]
            if ends is not None:  # what stands behind a row's last step is none of it
                end = torch.arange(steps, device=x.device)[:, None] == ends - 1
                before = torch.where(end[..., None], first, before)
            if reset is not None:
                cut = torch.cat((reset[1:], torch.zeros_like(reset[:1])))
                before = before.masked_fill((cut if ends is None else cut & ~end)[..., None], 0)
            final = x[0] if steps else first
            some = None if ends is None else ends > 0
        else:
            before = torch.cat((first[None], x))[:steps]
            if reset is not None:
                before = before.masked_fill(reset[..., None], 0)
            final, some = x[-1] if steps else first, None
            if ends is not None and steps:
                final = x.gather(0, (ends - 1).clamp(min=0)[None, :, None].expand(1, *x.shape[1:]))[0]
                some = ends > 0
        if last is None:
            last = final if some is None else torch.where(some[:, None], final, first)
        self.kept[direction].append(last)
        return torch.cat((x, before), -1)

    def last(self) -> Tensor:
        inputs = torch.stack([torch.cat(layers, -1) for layers in self.kept])
        return inputs.squeeze(1) if self.alone else inputs


def check_zoneout(zoneout: Any) -> None:
    if not 0 <= checked_number("zoneout", zoneout) <= 1:
        raise ValueError(f"zoneout must be a number in [0, 1], got {zoneout}")


def _layer(cell: str) -> _Layer:
    if cell not in _LAYERS:
        raise ValueError(f"cell must be one of {', '.join(_LAYERS)}, got {cell!r}")
    return _LAYERS[cell]


def _checked_state(hx: Tensor | None, input: Tensor, layer: _Layer, shape: tuple[int, ...]) -> Tensor | None:
    """In the dtype of states."""
    if hx is None:
        return None
    checked_tensor("hx", hx)
    if hx.shape != shape:
        raise RuntimeError(f"Expected hidden size {shape}, got {list(hx.shape)}")
    wide = state_dtype(input.dtype)
    wide, accepted = (wide.to_complex(), (wide.to_complex(),)) if layer.complex else (wide, (wide, input.dtype))
    if hx.dtype not in accepted or hx.device != input.device:
        names = " or ".join(str(dtype) for dtype in dict.fromkeys(reversed(accepted)))
        raise RuntimeError(f"hx must be {names} on {input.device}, as the input, got {hx.dtype} on {hx.device}")
    return hx.to(wide)
