"""Which DTensors the ops take as they are: sharded along the batch, or along heads, channels: no step or key of a rank's rows is
elsewhere. What is sharded otherwise is redistributed to that by DTensor, or replicated.

The rules stand here in the terms of one dimension of a mesh; DTensor combines them for several. ``register`` gives them to
``torch.distributed.tensor.experimental.register_sharding``, the first time that an op meets a DTensor. Ops without a rule
(decoding, single calls of the recurrent ops) refuse DTensors; recurrent layers run as a whole on their shards: ``layers``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding  # 2.10 to 2.14; it says of itself that it may change

from ..cells import Cell
from ..functional._recurrent_layers import Options
from ..ops.attention import FIELDS
from ..ops.types import GRADIENTS, SCAN_CELLS, Spec

__all__: list[str] = []  # what the modules of this package share

Placement = Replicate | Shard | Partial | None
Rule = tuple[list[Placement], list[Placement]]  # of outputs, of inputs
_ops = torch.ops.fastseq


def register() -> None:
    """Once for a process."""
    for op, rule in (
        (_ops.attention_forward, _attention),
        (_ops.attention_backward, _attention_backward),
        (_ops.attention_weights, _attention_weights),
        (_ops.attention_with_weights, _attention_with_weights),
        (_ops.attention_weights_backward, _attention_weights_backward),
        (_ops.scan, _scan),
        (_ops.scan_backward, _scan_backward),
    ):
        register_sharding(op.default)(rule)
        # DTensor remembers its decisions, and the other arguments with them, by tensors and by what comes from the first int on:
        # here every argument counts. Not a public name; so it is called from 2.10 to 2.14.
        DTensor._op_dispatcher.sharding_propagator.op_to_schema_info[op.default].static_argnum = 0


def _is_tensor(arg: Any) -> bool:
    return hasattr(arg, "placements")


def _everywhere(outputs: int, arguments: Sequence[Any]) -> Rule:
    return [Replicate()] * outputs, [_whole(arg) for arg in arguments]


def _whole(arg: Any) -> Placement:
    return Replicate() if _is_tensor(arg) else None


def _at(arg: Any, dim: int, size: int | None = None) -> Placement:
    """Sharded along ``dim``, if the tensor has one of its own there: ``size`` long."""
    if not _is_tensor(arg):
        return None
    return Shard(dim) if size is None or (arg.shape[dim] == size and size > 1) else Replicate()


class _Attention:
    """A call of an attention op, whose tensors may be sharded along the batch, or along the heads."""

    def __init__(self, q: Any, k: Any, fields: Sequence[Any]) -> None:
        self.spec = Spec(*fields[:FIELDS])
        self.packed = self.spec.cu_q is not None
        self.heads_dim = 0 if self.packed else 1
        self.heads, self.key_heads, self.batch = q.shape[self.heads_dim], k.shape[self.heads_dim], q.shape[0]
        self.ranks = q.mesh.size()

    def ways(self) -> list[str]:
        """Dropout is of a place in the whole call, which a shard does not know."""
        if self.spec.dropout:
            return []
        by_heads = self.heads % self.ranks == 0 and self.key_heads % self.ranks == 0
        return ["batch"] * (not self.packed) + ["heads"] * by_heads

    def rows(self, way: str) -> Placement:
        """Of q, k, v, out, lse and what is like them."""
        return Shard(0 if way == "batch" else self.heads_dim)

    def fields(self, way: str) -> list[Placement]:
        spec, batch, heads = self.spec, self.batch, self.heads
        found: dict[str, Placement] = {}
        if way == "batch":
            for name in ("mask", "bias", "slopes", "blocks"):
                found[name] = _at(getattr(spec, name), 0, batch)
            for name in ("relative_q", "q_lengths", "k_lengths"):
                found[name] = _at(getattr(spec, name), 0)
        else:
            for name in ("mask", "bias", "slopes", "blocks"):
                found[name] = _at(getattr(spec, name), 1, heads)
            for name in ("relative_bias", "relative_k", "sinks"):
                found[name] = _at(getattr(spec, name), 0)
            found["relative_q"] = _at(spec.relative_q, self.heads_dim)
        named = zip(Spec._fields, spec, strict=True)
        return [found.get(name, Replicate()) if _is_tensor(value) else None for name, value in named]

    def gradients(self, way: str, wanted: Sequence[bool]) -> list[Placement]:
        """What all ranks share, each has a part of the gradient of."""
        own = dict(zip(Spec._fields, self.fields(way), strict=True))
        placed: list[Placement] = []
        for name, want in zip(GRADIENTS, wanted, strict=True):
            if not want:
                placed.append(Replicate())
            elif name in ("q", "k", "v"):
                placed.append(self.rows(way))
            else:
                placed.append(Partial() if own[name] == Replicate() else own[name])
        return placed


def _attention(q: Any, k: Any, v: Any, *fields: Any) -> list[Rule]:
    call = _Attention(q, k, fields)
    found = [_everywhere(2, (q, k, v, *fields))]
    return found + [([call.rows(way)] * 2, [call.rows(way)] * 3 + call.fields(way)) for way in call.ways()]


def _attention_backward(dout: Any, dlse: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *rest: Any) -> list[Rule]:
    call, tensors, wanted = _Attention(q, k, rest), (dout, dlse, q, k, v, out, lse), rest[FIELDS]
    found = [_everywhere(len(GRADIENTS), (*tensors, *rest))]
    for way in call.ways():
        given = [call.rows(way) if _is_tensor(tensor) else None for tensor in tensors]
        found.append((call.gradients(way, wanted), [*given, *call.fields(way), None]))
    return found


def _attention_weights(q: Any, k: Any, lse: Any, *rest: Any) -> list[Rule]:
    call, average = _Attention(q, k, rest), rest[FIELDS]
    found = [_everywhere(1, (q, k, lse, *rest))]
    return found + [
        ([call.rows(way)], [call.rows(way)] * 3 + [*call.fields(way), None])
        for way in call.ways()
        if way == "batch" or not average
    ]


def _attention_with_weights(q: Any, k: Any, v: Any, *rest: Any) -> list[Rule]:
    call, average = _Attention(q, k, rest), rest[FIELDS]
    found = [_everywhere(3, (q, k, v, *rest))]
    return found + [
        ([call.rows(way)] * 3, [call.rows(way)] * 3 + [*call.fields(way), None])
        for way in call.ways()
        if way == "batch" or not average
    ]


def _attention_weights_backward(dw: Any, q: Any, k: Any, lse: Any, *rest: Any) -> list[Rule]:
    call, average, wanted = _Attention(q, k, rest), rest[FIELDS], rest[FIELDS + 1]
    found = [_everywhere(len(GRADIENTS) + 1, (dw, q, k, lse, *rest))]
    wanted = [want and name != "v" for want, name in zip(wanted, GRADIENTS, strict=True)]
    return found + [
        ([*call.gradients(way, wanted), call.rows(way)], [call.rows(way)] * 4 + [*call.fields(way), None, None])
        for way in call.ways()
        if way == "batch" or not average
    ]


def _of_scan(b: Any, a: Any, gate: Any, vector: Any, initial: Any, spec: Sequence[Any], way: str) -> list[Placement]:
    """Of a, gate, vector, initial, and of resets, lengths, cu_seqlens, cell, reverse."""
    resets, lengths, cu_seqlens = spec[:3]
    batch, channels = b.shape[1], b.shape[2]
    if way == "batch":
        tensors = [_at(a, 1, batch), _at(gate, 1), _whole(vector), _at(initial, 0)]
        return [*tensors, _at(resets, 1), _at(lengths, 0), None, None, None]
    tensors = [_at(a, 2, channels), _at(gate, 2), _at(vector, 0), _at(initial, 1)]
    return [*tensors, _whole(resets), _whole(lengths), _whole(cu_seqlens), None, None]


def _scan(b: Any, a: Any, gate: Any, vector: Any, initial: Any, *spec: Any) -> list[Rule]:
    found = [_everywhere(2, (b, a, gate, vector, initial, *spec))]
    for way, dim in (("batch", 1), ("channels", 2)):
        if way == "channels" or spec[2] is None:
            found.append(([Shard(dim), Shard(dim - 1)], [Shard(dim), *_of_scan(b, a, gate, vector, initial, spec, way)]))
    return found


def _scan_backward(dh: Any, dfinal: Any, b: Any, a: Any, gate: Any, vector: Any, h: Any, initial: Any, *rest: Any) -> list[Rule]:
    spec, wanted = rest[:-1], rest[-1]
    found = [_everywhere(5, (dh, dfinal, b, a, gate, vector, h, initial, *rest))]
    cell = SCAN_CELLS[spec[3]]
    for way, dim in (("batch", 1), ("channels", 2)):
        if way == "batch" and spec[2] is not None:
            continue
        of_a, of_gate, of_vector, of_initial, *of_spec = _of_scan(h, a, gate, vector, initial, spec, way)
        inputs = [
            _at(dh, dim),
            _at(dfinal, dim - 1),
            _at(b, dim),
            of_a,
            of_gate,
            of_vector,
            Shard(dim),
            of_initial,
            *of_spec,
            None,
        ]
        outputs: list[Placement] = [Shard(dim) if want else Replicate() for want in (*wanted[:2], wanted[2] and cell.gate)]
        of_all = Partial() if way == "batch" else Shard(0)
        outputs += [of_all if wanted[3] and cell.vector else Replicate(), Shard(dim - 1)]
        found.append((outputs, inputs))
    return found


def linear(x: DTensor, weight: Any, bias: Any) -> Any:
    """``torch.nn.functional.linear`` of x [T, B, I], on its shards of steps or of rows, with whole weights, whose gradients are
    summed. What is sharded otherwise is put together first.

    The function makes one dimension of T and B. The DTensor of torch 2.10 raises an error, in either pass, where that is sharded
    along B, or unevenly; that of 2.13 takes it.
    """
    mesh, given = x.device_mesh, [tensor for tensor in (weight, bias) if tensor is not None]
    if not all(isinstance(tensor, DTensor) and tensor.device_mesh == mesh for tensor in given):
        return F.linear(x, weight, bias)  # which says what is wrong
    sharded = [placement in (Shard(0), Shard(1)) for placement in x.placements]
    placed = [placement if own else Replicate() for own, placement in zip(sharded, x.placements, strict=True)]
    of_gradient = [Partial() if own else Replicate() for own in sharded]
    wholes = [t.redistribute(placements=[Replicate()] * mesh.ndim).to_local(grad_placements=of_gradient) for t in given]
    y = F.linear(x.redistribute(placements=placed).to_local(), *wholes).contiguous()
    shape = torch.Size((*x.shape[:-1], weight.shape[0]))
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(y, mesh, placed, run_check=False, shape=shape, stride=strides)


def layers(
    run: Callable[..., Any], cell: Cell, input: DTensor, states: Sequence[Any], params: Sequence[Any], options: Options
) -> tuple[Any, tuple[Any, ...], Any]:
    """``functional._recurrent_layers.run_layers`` on the shards of a batch: each rank runs its rows, with whole weights, whose
    gradients are summed. Along what else the input is sharded it is put together first.

    Raises:
        RuntimeError: if another tensor of the call is no DTensor, or one of another mesh.
    """
    mesh, packed = input.device_mesh, options.batch_sizes is not None
    batch_dim = 0 if options.batch_first else 1
    sharded = [not packed and placement == Shard(batch_dim) for placement in input.placements]

    def local(tensor: Any, name: str, dim: int | None) -> Any:
        """``dim``: of the batch; None: there is none."""
        if tensor is None:
            return None
        if not isinstance(tensor, DTensor) or tensor.device_mesh != mesh:
            raise RuntimeError(f"input is a DTensor, so {name} must be one of the same mesh, got a {type(tensor).__name__}")
        placed = [Shard(dim) if own and dim is not None else Replicate() for own in sharded]
        of_gradient = [Partial() if own and dim is None else placement for own, placement in zip(sharded, placed, strict=True)]
        return tensor.redistribute(placements=placed).to_local(grad_placements=of_gradient)

    reset_to = options.reset_to
    if reset_to is not None:
        reset_to = [local(state, "reset_to", 1 if state is not None and state.shape[1] > 1 else None) for state in reset_to]
    own = replace(
        options,
        lengths=local(options.lengths, "lengths", 0),
        resets=local(options.resets, "resets", None if packed else batch_dim),
        reset_to=reset_to,
    )
    results = run(
        cell,
        local(input, "input", None if packed else batch_dim),
        [local(state, "hx", 1) for state in states],
        [local(param, "a parameter", None) for param in params],
        own,
    )

    def whole(tensor: Any, dim: int) -> Any:
        if tensor is None:
            return None
        shape = list(tensor.shape)
        if any(sharded):
            shape[dim] = input.shape[batch_dim]
        strides = torch.empty(shape, device="meta").stride()
        placed = [Shard(dim) if own else Replicate() for own in sharded]
        return DTensor.from_local(tensor.contiguous(), mesh, placed, run_check=False, shape=torch.Size(shape), stride=strides)

    output, finals, cells = results
    return whole(output, batch_dim), tuple(whole(state, 1) for state in finals), whole(cells, batch_dim + 1)
