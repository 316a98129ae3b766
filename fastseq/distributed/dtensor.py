"""Which DTensors the ops take as they are: sharded along the batch, or along heads, channels: no step or key of a rank's rows is
elsewhere. What is sharded otherwise is redistributed to that by DTensor, or replicated.

The rules stand here in the terms of one dimension of a mesh; DTensor combines them for several. ``register`` gives them to
``torch.distributed.tensor.experimental.register_sharding``, the first time that an op meets a DTensor. Ops without a rule
(decoding, single calls of the recurrent ops) refuse DTensors. Layers run as a whole on their shards: ``layers`` and
``linear_layers``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding  # 2.10 to 2.14; it says of itself that it may change

from ..cells import Cell
from ..functional._recurrent_layers import Options
from ..ops._dispatch import shared_sequence
from ..ops.attention import FIELDS
from ..ops.types import GRADIENTS, SCAN_CELLS, Spec

__all__: list[str] = []  # what the modules of this package share

Placement = Replicate | Shard | Partial | None
Rule = tuple[list[Placement], list[Placement]]  # of outputs, of inputs
_ops = torch.ops.fastseq


@cache
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


class _Shards:
    """How layers run on the shards of their input, each rank with its own: of each dimension of the mesh the name of what is
    divided along it, or None where all ranks have the same. ``dims``: where the input has what may be divided; along what else it
    is sharded it is put together first."""

    def __init__(self, input: DTensor, dims: dict[str, int]) -> None:
        self.mesh, self.sizes = input.device_mesh, {name: input.shape[dim] for name, dim in dims.items()}
        shared = shared_sequence()
        if shared is not None:
            shared.ranks.require_another(input, "input")
        self.divided = [
            next((name for name, dim in dims.items() if placement == Shard(dim)), None) for placement in input.placements
        ]

    def local(self, tensor: Any, name: str, **dims: int) -> Any:
        """This rank's part of a tensor, by where that has what is divided. What it has not is the same for all, and has a part of
        its gradient on each.

        Raises:
            RuntimeError: if it is no DTensor, or one of another mesh.
        """
        if tensor is None:
            return None
        if not isinstance(tensor, DTensor) or tensor.device_mesh != self.mesh:
            raise RuntimeError(f"input is a DTensor, so {name} must be one of the same mesh, got a {type(tensor).__name__}")
        placed = self._placed(dims)
        of_gradient = [
            Partial() if own is not None and own not in dims else placement
            for own, placement in zip(self.divided, placed, strict=True)
        ]
        return tensor.redistribute(placements=placed).to_local(grad_placements=of_gradient)

    def whole(self, tensor: Any, **dims: int) -> Any:
        """The DTensor of which this is a rank's part."""
        if tensor is None:
            return None
        shape = list(tensor.shape)
        for own in self.divided:
            if own is not None:
                shape[dims[own]] = self.sizes[own]
        return DTensor.from_local(
            tensor.contiguous(),
            self.mesh,
            self._placed(dims),
            run_check=False,
            shape=torch.Size(shape),
            stride=torch.empty(shape, device="meta").stride(),
        )

    def _placed(self, dims: dict[str, int]) -> list[Replicate | Shard]:
        return [Replicate() if own is None or own not in dims else Shard(dims[own]) for own in self.divided]


def layers(
    run: Callable[..., Any], cell: Cell, input: DTensor, states: Sequence[Any], params: Sequence[Any], options: Options
) -> tuple[Any, tuple[Any, ...], Any]:
    """``functional._recurrent_layers.run_layers`` on the shards of a batch: each rank runs its rows, with whole weights, whose
    gradients are summed.

    Raises:
        RuntimeError: if another tensor of the call is no DTensor, or one of another mesh.
    """
    batch = 0 if options.batch_first else 1
    rows = {} if options.batch_sizes is not None else {"rows": batch}  # packed ones have no dimension of their own
    shards = _Shards(input, rows)
    reset_to = options.reset_to
    if reset_to is not None:
        of_row = [{"rows": 1} if state is not None and state.shape[1] > 1 else {} for state in reset_to]
        reset_to = [shards.local(state, "reset_to", **dims) for state, dims in zip(reset_to, of_row, strict=True)]
    own = replace(
        options,
        lengths=shards.local(options.lengths, "lengths", rows=0),
        resets=shards.local(options.resets, "resets", **rows),
        reset_to=reset_to,
    )
    output, finals, cells = run(
        cell,
        shards.local(input, "input", **rows),
        [shards.local(state, "hx", rows=1) for state in states],
        [shards.local(param, "a parameter") for param in params],
        own,
    )
    finals = tuple(shards.whole(state, rows=1) for state in finals)
    return shards.whole(output, rows=batch), finals, shards.whole(cells, rows=batch + 1)


def linear_layers(
    run: Callable[..., Any],
    cell: str,
    parts: int,
    input: DTensor,
    hx: Any,
    params: Sequence[Mapping[str, Any]],
    lengths: Any,
    resets: Any,
    batch_first: bool,
    **options: Any,
) -> tuple[Any, Any]:
    """``functional.linear_recurrent`` on the shards of a batch, as ``layers``; and on those of the channels, if they fall into
    ``parts`` that the ranks divide: equal ones with nothing to do with one another, each with its rows of every parameter.

    Raises:
        RuntimeError: as ``layers``.
    """
    alone, batch = input.dim() == 2, 0 if batch_first else 1
    dims = {} if alone else {"rows": batch}
    last = input.dim() - 1
    mesh = input.device_mesh
    if parts % math.prod([mesh.size(dim) for dim, placed in enumerate(input.placements) if placed == Shard(last)]) == 0:
        dims["channels"] = last
    shards = _Shards(input, dims)
    of_states = {"channels": 1} if alone else {"rows": 1, "channels": 2}
    pair = isinstance(hx, (tuple, list))
    states = [shards.local(state, "hx", **of_states) for state in (hx if pair else [hx])]
    output, h_n = run(
        cell,
        shards.local(input, "input", **dims),
        tuple(states) if pair else states[0],
        [{name: shards.local(param, name, channels=0) for name, param in lane.items()} for lane in params],
        lengths=shards.local(lengths, "lengths", rows=0),
        resets=shards.local(resets, "resets", **({} if alone else {"rows": batch})),
        batch_first=batch_first,
        **options,
    )
    of_output = {"rows": batch, "channels": last}
    finals = [shards.whole(state, **of_states) for state in (h_n if isinstance(h_n, tuple) else [h_n])]
    return shards.whole(output, **of_output), tuple(finals) if isinstance(h_n, tuple) else finals[0]
