"""Heads on several ranks: a plan for ``torch.distributed.tensor.parallel.parallelize_module``.

    parallelize_module(model, mesh, {"attention": HeadParallel(), "rnn": HeadParallel()})

Parameters become DTensors, of which a rank holds the rows of its heads; what a module computes is local, by the kernels that it
has on one device: inputs are the same on every rank, and outputs are put together again. Rows that a parameter has several times
over (q, k and v; gates) are a dimension of their own: ``in_proj_weight`` is ``[3, E, E]``, ``weight_ih_l0`` is ``[G, H, I]``,
divided along the second, so that ``full_tensor().flatten(0, 1)`` is the parameter as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn.utils.rnn import PackedSequence

from .. import modules
from ..cells import CELLS
from ..modules.attention import MultiheadAttention
from ..modules.recurrent import RNN, Sequence

__all__ = ["HeadParallel"]


class HeadParallel(ParallelStyle):
    """Divides the heads of a ``fastseq.MultiheadAttention``, or a recurrent module with ``num_heads``, among the ranks of a mesh.

    Inputs and outputs of the module stay plain tensors, the same on every rank, with their whole gradients. What is drawn at
    random (dropout, zoneout) is each rank's own for its heads: seed the ranks differently. Of a stack of recurrent layers each
    gathers its outputs for the next one. Load a ``state_dict`` before; ``full_tensor`` gives parameters back.

    Raises, when ``parallelize_module`` applies it:
        TypeError: for another module, or a class with a ``forward`` of its own.
        ValueError: if the mesh has several dimensions, or its size does not divide the number of heads.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if device_mesh.ndim != 1:
            raise ValueError(f"HeadParallel needs one dimension of the mesh, got a mesh of {list(device_mesh.shape)}")
        kind: Any = type(module)
        own, parallel = False, None
        if isinstance(module, MultiheadAttention):
            own, parallel = kind.forward is MultiheadAttention.forward, _of(kind, _Attention)
        elif isinstance(module, Sequence):
            own, parallel = kind._run is Sequence._run, _of(kind, _Recurrence)
        if not own:
            raise TypeError(
                f"HeadParallel is for MultiheadAttention and recurrent modules of fastseq, got {type(module).__name__}"
            )
        heads: Any = module.num_heads
        if heads % device_mesh.size():
            raise ValueError(f"HeadParallel needs a number of heads that {device_mesh.size()} ranks divide, got {heads}")
        module.__class__ = parallel  # type: ignore[assignment]
        module._divide(device_mesh, self.src_data_rank)  # type: ignore[operator]
        return module


@cache
def _of(kind: Any, parallel: Any) -> type:
    return type(kind.__name__, (parallel, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


class _Divided(nn.Module):
    """What both have: parameters that are DTensors, and modules of this rank's heads that are lent the local ones for a call."""

    _mesh: DeviceMesh

    def _distribute(self, owner: nn.Module, name: str, dim: int | None, source: int | None, times: int = 0) -> None:
        """Divides a parameter along ``dim``; ``times``: that dimension is many times as long, one after the other."""
        parameter = owner._parameters.get(name)
        if parameter is None:
            return
        whole = parameter.detach().unflatten(0, (times, -1)) if times else parameter.detach()
        placement = Replicate() if dim is None else Shard(dim)
        divided = distribute_tensor(whole, self._mesh, [placement], src_data_rank=source)
        setattr(owner, name, nn.Parameter(divided, requires_grad=parameter.requires_grad))

    @contextmanager
    def _lent(self, module: nn.Module, parameters: dict[str, Any]) -> Iterator[None]:
        module._parameters.update(parameters)
        module.train(self.training)
        try:
            yield
        finally:
            module._parameters.update(dict.fromkeys(parameters))


def _local(parameter: Any, flat: bool = True) -> Any:
    if parameter is None:
        return None
    local = parameter.to_local()
    return local.flatten(0, 1) if flat else local


def _entered(tensor: Any, mesh: DeviceMesh) -> Any:
    """A tensor that all ranks have, each for its heads: their gradients are summed."""
    if not isinstance(tensor, Tensor) or not tensor.requires_grad:
        return tensor
    return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def _summed(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    return DTensor.from_local(tensor, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()]).to_local()


def _gathered(tensor: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    own = DTensor.from_local(tensor.contiguous(), mesh, [Shard(dim % tensor.dim())], run_check=False)
    return own.redistribute(placements=[Replicate()]).to_local()


class _Attention(_Divided, MultiheadAttention):
    def _divide(self, mesh: DeviceMesh, source: int | None) -> None:
        self._mesh = mesh
        inner = MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            self.dropout,
            self.in_proj_bias is not None,
            self.bias_k is not None,
            self.add_zero_attn,
            self.kdim,
            self.vdim,
            self.batch_first,
            device="meta",
        )
        inner.num_heads = self.num_heads // mesh.size()
        inner.out_proj = nn.Linear(inner.num_heads * self.head_dim, self.embed_dim, False, device="meta")  # type: ignore[assignment]
        for name in ("in_proj_weight", "in_proj_bias"):
            self._distribute(self, name, 1, source, 3)
        for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            self._distribute(self, name, 0, source)
        for name in ("bias_k", "bias_v"):
            self._distribute(self, name, 2, source)
        self._distribute(self.out_proj, "weight", 1, source)
        self._distribute(self.out_proj, "bias", None, source)
        self.__dict__["_inner"] = inner

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        mesh, inner = self._mesh, self.__dict__["_inner"]
        rank, ranks = mesh.get_local_rank(), mesh.size()
        given = {id(tensor): _entered(tensor, mesh) for tensor in (query, key, value)}  # what was one object still is
        if isinstance(attn_mask, Tensor):
            attn_mask = _entered(attn_mask, mesh)
            if attn_mask.dim() == 3 and attn_mask.shape[0] % self.num_heads == 0:
                attn_mask = attn_mask.unflatten(0, (-1, ranks, inner.num_heads))[:, rank].flatten(0, 1)
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "bias_k", "bias_v")
        lent = {name: _local(getattr(self, name), flat=False) for name in names}
        lent |= {name: _local(getattr(self, name)) for name in ("in_proj_weight", "in_proj_bias")}
        out_weight, out_bias = _local(self.out_proj.weight, flat=False), _local(self.out_proj.bias, flat=False)
        with self._lent(inner, lent), self._lent(inner.out_proj, {"weight": out_weight}):
            out, weights = inner(
                given[id(query)],
                given[id(key)],
                given[id(value)],
                key_padding_mask=_entered(key_padding_mask, mesh),
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
        out = _summed(out, mesh)
        if weights is not None:
            weights = _summed(weights / ranks, mesh) if average_attn_weights else _gathered(weights, mesh, -3)
        return out if out_bias is None else out + out_bias, weights


class _Recurrence(_Divided, Sequence):
    def _divide(self, mesh: DeviceMesh, source: int | None) -> None:
        self._mesh = mesh
        kind: Any = next(base for base in type(self).__mro__[1:] if base.__name__ in modules.__all__)
        directions = 2 if self.bidirectional else 1
        options: dict[str, Any] = {name: getattr(self, name) for name in ("recompute", "zoneout", "weight_dropout", "solver")}
        if isinstance(self, RNN):
            options["nonlinearity"] = self.nonlinearity
        self.__dict__["_inner"] = [
            kind(
                self.input_size if layer == 0 else directions * self.hidden_size,
                self.hidden_size // mesh.size(),
                bias=self.bias,
                batch_first=self.batch_first,
                bidirectional=self.bidirectional,
                num_heads=self.num_heads // mesh.size(),
                device="meta",
                **options,
            )
            for layer in range(self.num_layers)
        ]
        for name in self._flat_weights_names:
            self._distribute(self, name, 1, source, getattr(self, name).shape[0] // self.hidden_size)

    def _run(
        self,
        input: Tensor | PackedSequence,
        hx: Any,
        lengths: Tensor | None,
        return_cells: bool = False,
        resets: Tensor | PackedSequence | None = None,
        reset_to: Any = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Any, tuple[Tensor, ...], Tensor | None]:
        mesh, directions = self._mesh, 2 if self.bidirectional else 1
        units = slice(mesh.get_local_rank() * self.hidden_size // mesh.size(), None)
        finals, cells = [], []
        x: Any = input
        for layer, inner in enumerate(self.__dict__["_inner"]):
            own, anew = (self._of_layer(states, layer, units, inner.hidden_size) for states in (hx, reset_to))
            lent = {}
            for name in inner._flat_weights_names:
                lent[name] = _local(getattr(self, name.replace("_l0", f"_l{layer}")))
            entered = _entered(x.data, mesh) if isinstance(x, PackedSequence) else _entered(x, mesh)
            x = x._replace(data=entered) if isinstance(x, PackedSequence) else entered
            with self._lent(inner, lent):
                y, states, c = inner._run(x, own, lengths, return_cells, resets, anew, cu_seqlens)
            rows = y.data if isinstance(y, PackedSequence) else y
            if self.training and self.dropout and layer < self.num_layers - 1:
                rows = nn.functional.dropout(rows, self.dropout)
            rows = self._whole(rows, directions)
            x = y._replace(data=rows) if isinstance(y, PackedSequence) else rows
            finals.append([_gathered(state, mesh, -1) for state in states])
            if c is not None:
                cells.append(self._whole(c, directions))
        joined = tuple(torch.cat(of_layers) for of_layers in zip(*finals, strict=True))
        return x, joined, torch.cat(cells) if cells else None

    def _of_layer(self, states: Any, layer: int, units: slice, width: int) -> Any:
        """The states of a layer and of this rank's heads; what is none is for the layer to say so."""
        if states is None:
            return None
        names, directions = CELLS[self.cell].states, 2 if self.bidirectional else 1
        several = isinstance(states, (tuple, list))
        each = list(states) if several else [states]
        wanted = self.num_layers * directions, self.hidden_size
        if len(each) != len(names) or not all(isinstance(s, Tensor) and (s.shape[0], s.shape[-1]) == wanted for s in each):
            shapes = [list(s.shape) if isinstance(s, Tensor) else type(s).__name__ for s in each]
            raise RuntimeError(f"Expected {', '.join(names)} of size [{wanted[0]}, B, {wanted[1]}] each, got {shapes}")
        lanes, own = slice(layer * directions, (layer + 1) * directions), slice(units.start, units.start + width)
        parts = [_entered(state, self._mesh)[lanes, ..., own] for state in each]
        return tuple(parts) if several else parts[0]

    def _whole(self, rows: Tensor, directions: int) -> Tensor:
        """[.., D*H], from this rank's units."""
        return _gathered(rows.unflatten(-1, (directions, -1)), self._mesh, -1).flatten(-2)
