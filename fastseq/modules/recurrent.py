"""RNN, LSTM and GRU: torch.nn's constructors, parameters and results, on fastseq's kernels.

The classes derive from nn.RNNBase and nn.RNNCellBase, which give parameters, initialization, repr and
state_dict, and not from nn.LSTM and its kin, which torch.compile refuses to trace. What stands here is what a
module adds to `fastseq.functional`: its parameters, unbatched input and PackedSequence. Values are checked
there, ranks here.

Precision: sums, activations and c are float32 or wider whatever the dtype. Where a CPU has AMX, float32 is
multiplied in three parts of bfloat16, which is as exact as multiply-adds; after
`torch.set_float32_matmul_precision("high")` (or "medium") in two, forward and backward: 1.3 to 1.5 times as
fast, with errors of about 5e-6 of the results' size. "highest", the default, never does that.

Letters: T time, B batch, I input_size, H hidden_size, P proj_size if > 0 else H, L num_layers, D directions.
"""

from __future__ import annotations

from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from fastseq import backends, functional
from fastseq._arguments import checked_number
from fastseq.backends import library
from fastseq.backends.cpu.recurrent import DTYPES
from fastseq.backends.torch.recurrent import GATES, LAYERS
from fastseq.cells import CELLS
from fastseq.choice import sources
from fastseq.choice.device import cpu_level
from fastseq.choice.sources import layers_are_torchs, memory
from fastseq.functional._attention_call import readable
from fastseq.functional._autocast import lowered, lowered_to
from fastseq.functional._native_layers import (
    Lane,
    lane_of,
    native_lane,
    native_layers,
    native_training,
    packed_layers,
    trained_lane,
    trained_layers,
)
from fastseq.functional._packing import PLACE, packing_of
from fastseq.functional._recurrent_layers import check_zoneout, zoneout_of
from fastseq.functional._solver import Newton, check_solver
from fastseq.modules._checks import as_plain_tuple, describe, kind_of, pair_of, public
from fastseq.modules._interop import Interop, as_leaf
from fastseq.modules._subclasses import as_subclass, subclass_of
from fastseq.ops._dispatch import PLAIN, autocasts, plain_call, recorded, shared_sequence, transforming

__all__ = ["GRU", "LSTM", "RNN"]

Input = TypeVar("Input", Tensor, PackedSequence)


class Sequence(Interop, nn.RNNBase):
    """All of RNN, LSTM, GRU and their variants but what they return.

    A subclass names its cell.
    """

    # Class attributes, so that a torch.nn module whose __class__ was swapped to ours has them too.
    recompute: bool = False
    zoneout: float | tuple[float, float] = 0.0
    weight_dropout: float = 0.0
    num_heads: int = 1
    solver: Newton | None = None
    _REFUSED = {"proj_size": "proj_size argument is only supported for LSTM, not RNN or GRU"}

    @property
    def cell(self) -> str:
        """The name of the cell in `fastseq.cells`."""
        return self.mode.lower()

    def _extend(
        self,
        recompute: bool,
        zoneout: float | tuple[float, float],
        weight_dropout: float,
        num_heads: int,
        solver: Newton | None,
    ) -> None:
        """What torch.nn's constructors do not know, after them: checked, kept, and `weight_hh` of the heads' width."""
        row = CELLS[self.cell]
        check_zoneout(row, zoneout)
        if not 0 <= checked_number("weight_dropout", weight_dropout) <= 1:
            raise ValueError(f"weight_dropout must lie in [0, 1], got {weight_dropout}")
        if not isinstance(recompute, bool):
            raise TypeError(f"recompute must be a bool, got {recompute!r}")
        if not isinstance(num_heads, int) or num_heads < 1 or self.hidden_size % num_heads:
            kind = ValueError if isinstance(num_heads, (int, float)) else TypeError
            raise kind(f"num_heads must be a positive integer that divides hidden_size ({self.hidden_size}), got {num_heads!r}")
        if num_heads > 1 and self.proj_size:
            raise ValueError(
                f"proj_size and num_heads exclude each other, got proj_size={self.proj_size} and num_heads={num_heads}"
            )
        check_solver(row, solver, self.hidden_size, num_heads, self.proj_size, any(zoneout_of(row, zoneout)))
        self.recompute, self.zoneout, self.weight_dropout, self.num_heads = recompute, zoneout, weight_dropout, num_heads
        self.solver = solver
        if num_heads > 1:
            for name in self._flat_weights_names:
                if name.startswith("weight_hh"):
                    whole = getattr(self, name)
                    setattr(self, name, nn.Parameter(whole.new_empty(whole.shape[0], self.hidden_size // num_heads)))
            self.reset_parameters()

    def extra_repr(self) -> str:
        given = [
            f"{name}={getattr(self, name)}"
            for name in ("recompute", "zoneout", "weight_dropout", "num_heads", "solver")
            if getattr(self, name) != getattr(Sequence, name)
        ]
        return ", ".join([super().extra_repr(), *given])

    def flatten_parameters(self) -> None:
        """On a GPU, gather the weights of an LSTM, GRU or RNN in one buffer, which cuDNN reads without copying them at each call.

        As torch.nn does, by itself too whenever a module moves. Variants and block-diagonal weights, which cuDNN does not have,
        stay where they are, as does everything on a CPU.
        """
        if self.cell in GATES and self.num_heads == 1:
            super().flatten_parameters()

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Raise unless `input` fits the weights: three-dimensional, or [N, I] when `batch_sizes` are given.

        Raises:
            ValueError: another dtype than the weights' outside autocast.
            RuntimeError: another number of dimensions, or another last size than input_size.
        """
        dtype, device = getattr(self, self._flat_weights_names[0]).dtype, input.device.type
        if input.dtype != dtype and not autocasts(device):
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({dtype}). "
                f"Convert input: input.to({dtype}), or convert model: model.to({input.dtype})"
            )
        dim = 3 if batch_sizes is None else 2
        if input.dim() != dim:
            raise RuntimeError(f"input must have {dim} dimensions, got {input.dim()}")
        if input.size(-1) != self.input_size:
            raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.size(-1)}")

    def _checked(self, hx: Any, dim: int, kind: str) -> Any:
        """`hx`, if it is what this cell takes and `dim`-dimensional as `kind` input wants it."""
        if not isinstance(hx, Tensor):
            # torch raises the same type, from inside: 'tuple' object has no attribute 'dim'.
            raise AttributeError(f"{kind_of(self)}: hx should be one Tensor h_0, got {describe(hx)}")
        if hx.dim() != dim:
            raise RuntimeError(f"For {kind} input, hx should also be {dim}-D but got {hx.dim()}-D tensor")
        return hx

    def _reset_states(self, reset_to: Any, dim: int) -> tuple[Tensor, ...]:
        """`reset_to` as a tuple, if it is of the form of hx with states of `dim` dimensions."""
        names = CELLS[self.cell].states
        states = reset_to if isinstance(reset_to, (tuple, list)) and len(names) > 1 else (reset_to,)
        if len(states) != len(names) or not all(isinstance(state, Tensor) for state in states):
            wanted = f"a tuple of Tensors ({', '.join(names)})" if len(names) > 1 else "one Tensor h"
            raise TypeError(f"{kind_of(self)}: reset_to must be {wanted}, as hx is, got {describe(reset_to)}")
        if any(state.dim() != dim for state in states):
            dims = ", ".join(f"{state.dim()}-D" for state in states)
            raise RuntimeError(f"{kind_of(self)}: states of reset_to should be {dim}-D here, got {dims}")
        return tuple(states)

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
        """(output, states, c of every step or None) in the layout of `input`."""
        params: list[Any] | None = None
        if hx is not None and type(hx) is not tuple and type(hx) is not Tensor:
            hx = as_plain_tuple(hx, len(CELLS[self.cell].states))
        plain = not return_cells and reset_to is None and cu_seqlens is None
        alone = plain and lengths is None and resets is None
        first = hx[0] if type(hx) is tuple and hx else hx
        kind = None
        if alone and (type(input) is not Tensor or (first is not None and type(first) not in PLAIN)):
            kind = subclass_of(input, hx)
        if kind is not None:
            found: tuple[Any, tuple[Tensor, ...], Tensor | None] = as_subclass(kind, self._run_plain, input, hx)
            return found
        if plain and checks_of(type(self)) in CHECKS and plain_call():
            if self.batch_first and type(input) is Tensor and input.is_inference() and torch.is_grad_enabled():
                input = input.clone()  # such a tensor cannot be kept for a backward pass; torch keeps one that is time-major
            kept = self._parameters  # faster than by attribute; weight_norm, parametrizations and FSDP take them away from there
            params = [kept[name] if name in kept else getattr(self, name) for name in self._flat_weights_names]
            if type(input) is Tensor and input.dim() == 3 and lengths is None and resets is None:
                done = self._padded(input, hx, params)
            else:
                done = self._native(input, hx, lengths, params, resets)
            if done is not None:
                return *done, None
        elif plain and type(input) in (Tensor, PackedSequence):
            done = self._lowered(input, hx, lengths, resets)
            if done is not None:
                return *done, None
        if params is None:
            # By attribute, at every call: weight_norm, parametrizations, functional_call and FSDP replace them.
            params = [getattr(self, name) for name in self._flat_weights_names]
        options: dict[str, Any] = dict(
            has_biases=self.bias,
            num_layers=self.num_layers,
            dropout=self.dropout,
            training=self.training,
            bidirectional=bool(self.bidirectional),
            proj_size=self.proj_size,
            return_cells=return_cells,
            recompute=self.recompute,
            zoneout=self.zoneout,
            weight_dropout=self.weight_dropout,
            num_heads=self.num_heads,
            solver=self.solver,
            resets=resets,
            reset_to=reset_to,
        )
        if isinstance(input, PackedSequence):
            for name, given in (("lengths", lengths), ("cu_seqlens", cu_seqlens)):
                if given is not None:
                    raise ValueError(
                        f"{kind_of(self)}: got a PackedSequence and {name}, but a PackedSequence carries its own "
                        f"lengths. Give the PackedSequence alone, or a {'padded ' * (name == 'lengths')}tensor and {name}"
                    )
            return self._run_packed(input, hx, params, options)
        if isinstance(resets, PackedSequence):
            raise TypeError(f"{kind_of(self)}: resets must be a Tensor as the input is, got a PackedSequence")
        if cu_seqlens is not None:
            if lengths is not None:
                raise ValueError(f"{kind_of(self)}: got lengths and cu_seqlens, of which either says where sequences end")
            return self._run_documents(input, hx, cu_seqlens, params, options)
        return self._run_padded(input, hx, lengths, params, options)

    def _short(self, input: Tensor, hx: Any) -> Any:
        """Output and final states of a call without gradients on padded input, by packed weights or of one layer in one
        direction, if it is beyond question; else None.

        Nothing here is a check of its own: what is odd goes the long way. Time matters: the kernel of a step takes a microsecond.
        """
        if torch.is_grad_enabled() or not plain_call(unseen=True):
            return None
        kind, own = type(self), self.__dict__  # by attribute, of a module, takes twice as long
        lane = _lane_in(kind, own)
        if lane is None:
            return None
        packing = own.get(PLACE)
        if lane:
            if hx is not None and type(hx) is not tuple and type(hx) is not Tensor:
                hx = as_plain_tuple(hx, len(CELLS[self.cell].states))
            return native_lane(lane, input, hx, own["_parameters"], None if own["training"] else packing)
        if packing is None or own["training"] or own.get("zoneout", kind.zoneout) or own.get("num_heads", kind.num_heads) != 1:
            return None
        hx = as_plain_tuple(hx, len(CELLS[self.cell].states))
        return packed_layers(input, hx, own["_parameters"], own["_flat_weights_names"], own["batch_first"], packing)

    def _trained(self, input: Tensor, hx: Any) -> Any:
        """The same of a call with gradients, of one layer in one direction, whose kernel is torch's or that of a step after a
        state."""
        if not plain_call(unseen=True) or backends.forced_eagerly():
            return None
        kind, own = type(self), self.__dict__
        lane = _lane_in(kind, own)
        if not lane or own.get("recompute", kind.recompute) or (own["batch_first"] and input.is_inference()):
            return None
        return trained_lane(lane, input, hx, own["_parameters"], own["input_size"], own["training"])

    def _run_plain(self, input: Any, hx: Any) -> tuple[Any, tuple[Tensor, ...], Tensor | None]:
        """`_run` without what it may be given beside, and what stands before it."""
        done = self._short(input, hx)
        return (
            self._run(input, hx, None)
            if done is None
            else (done[0], tuple([state for state in done[1:] if state is not None]), None)
        )

    def _lowered(self, input: Any, hx: Any, lengths: Tensor | None, resets: Any) -> tuple[Any, tuple[Tensor, ...]] | None:
        """Output and final states of a call under autocast on a CPU, by whichever kernels are the faster ones, if it is beyond
        question; else None.

        A step is torch's: autocast keeps what it has made of the weights, where a kernel of ours has them made at every call.
        """
        packed = type(input) is PackedSequence
        data = input.data if packed else input
        if not data.is_cpu or not autocasts("cpu"):
            return None
        if recorded() or transforming() or backends.forced() or backends.watched() or shared_sequence() is not None:
            return None
        cell, training = self.cell, self.training
        if cell not in GATES or self.proj_size or self.zoneout or self.num_heads > 1 or self.solver is not None:
            return None
        if training and (self.weight_dropout or self.recompute):
            return None
        states: tuple[Any, ...] = () if hx is None else hx if type(hx) is tuple else (hx,)
        if hx is not None and len(states) != (2 if cell == "lstm" else 1 if type(hx) is Tensor else 0):
            return None
        params: list[Any] = [getattr(self, name) for name in self._flat_weights_names]
        given = (data, *params, *states)
        for tensor in given:
            if type(tensor) not in PLAIN:
                return None
        lower = lowered_to(cell, data, states)
        if lower is None or lower not in DTYPES or library.reason():
            return None
        padded = not packed and input.dim() == 3 and lengths is None and resets is None
        if padded:
            batch, steps = input.shape[:2] if self.batch_first else (input.shape[1], input.shape[0])
            if steps == 1 or (lower.itemsize > 2 and batch * self.hidden_size > _WIDE and cpu_level() in _MULTIPLY_SHORT):
                return self._by_torch(input, None, states, params, batch, lowered=True)
        gradients = torch.is_grad_enabled() and any([tensor.requires_grad for tensor in given])
        if padded:
            lanes = 2 if self.bidirectional else 1
            if layers_are_torchs(cell, lower, "padded", lanes, batch, steps, self.hidden_size, gradients):
                return self._by_torch(input, None, states, params, batch, lowered=True) if steps else None
        data, params, states = (
            lowered(data, lower),
            [lowered(p, lower) for p in params],
            tuple([lowered(s, lower) for s in states]),
        )
        if not padded:
            given_hx = None if hx is None else states if cell == "lstm" else states[0]
            return self._native(input._replace(data=data) if packed else data, given_hx, lengths, params, resets, packs=False)
        options = self.bias, self.num_layers, self.bidirectional, self.batch_first
        if gradients:
            x = data.transpose(0, 1) if self.batch_first else data
            return trained_layers(cell, x, states, params, *options, self.dropout if training else 0.0, self.recompute)
        if training and self.dropout:
            return None
        results = native_layers(cell, data, states, params, *options, chosen=True)
        return None if results is None else (results[0], tuple(results[1:]))

    def _native(
        self, input: Any, hx: Any, lengths: Tensor | None, params: list[Any], resets: Any = None, packs: bool = True
    ) -> tuple[Any, tuple[Tensor, ...]] | None:
        """Output and final states of a plain call, if the native kernels take it and it is beyond question; `packs`: by packed
        weights, if there are any.

        Nothing here is a check of its own: what is odd goes the long way, which says what is wrong with it.
        """
        training = self.training
        if self.num_heads > 1 or self.solver is not None or (training and self.weight_dropout):
            return None
        states: Any = (
            None if hx is None else (hx,) if type(hx) is Tensor else hx if type(hx) is tuple and len(hx) in (2, 4) else (None,)
        )
        zoneout, batch_sizes, data, batched = (0.0, 0.0), None, input, True
        if type(input) is PackedSequence:
            if lengths is not None:
                return None
            data, batch_sizes, sorted_indices, unsorted_indices = input
            if states is not None and sorted_indices is not None:
                if any(
                    type(state) is not Tensor or state.dim() != 3 or state.shape[1] != len(sorted_indices) for state in states
                ):
                    return None
                states = [state.index_select(1, sorted_indices) for state in states]
        elif type(input) is not Tensor or input.dim() != 3:
            if type(input) is not Tensor or input.dim() != 2 or lengths is not None:
                return None
            batched, data = False, input.unsqueeze(0 if self.batch_first else 1)
            if states is not None:
                if any(type(state) is not Tensor or state.dim() != 2 for state in states):
                    return None
                states = [state.unsqueeze(1) for state in states]
        if resets is not None:
            rows = (data if batch_sizes is not None else input).shape[:-1]
            if type(resets) is not Tensor or resets.dtype != torch.bool or resets.shape != rows:
                return None
            if not batched:
                resets = resets.unsqueeze(1)
            elif self.batch_first and batch_sizes is None:
                resets = resets.mT
        if self.zoneout:
            zoneout = zoneout_of(CELLS[self.cell], self.zoneout)
        batch_first = self.batch_first and batch_sizes is None
        finals: Any
        taken = None
        if batch_sizes is not None and resets is None:
            taken = self._packed_of_torch(data, batch_sizes, states, params)
        if taken is None:
            taken = native_training(
                self.cell,
                data.transpose(0, 1) if batch_first else data,
                states or (),
                params,
                self.bias,
                self.num_layers,
                self.bidirectional,
                batch_first,
                self.dropout if training else 0.0,
                self.recompute,
                lengths,
                batch_sizes,
                zoneout,
                training,
                chosen=False,
                resets=resets,
            )
        if taken is not None:
            output, finals = taken
        elif training and (self.dropout or self.zoneout):
            return None
        else:
            results = native_layers(
                self.cell,
                data,
                states,
                params,
                self.bias,
                self.num_layers,
                self.bidirectional,
                batch_first,
                lengths,
                batch_sizes,
                zoneout,
                packing_of(self) if packs and not training else None,
                resets=resets,
            )
            if results is None:
                return None
            output, *finals = results
        if batch_sizes is not None:
            if unsorted_indices is not None:
                finals = [state.index_select(1, unsorted_indices) for state in finals]
            return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), tuple(finals)
        if batched:
            return output, tuple(finals)
        return output.squeeze(0 if self.batch_first else 1), tuple([state.squeeze(1) for state in finals])

    def _padded(self, input: Tensor, hx: Any, params: list[Any]) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Output and final states of a plain call with padded input, by whichever kernels are the faster ones, if it is beyond
        question; else None.

        Nothing here is a check of its own: what is odd goes the long way, which says what is wrong with it. Time matters: the
        kernel of one step takes 20 us.
        """
        training, zoneout = self.training, self.zoneout
        if self.num_heads > 1 or self.solver is not None or (training and (self.weight_dropout or zoneout)):
            return None
        states: tuple[Any, ...] = ()
        if hx is not None:
            if type(hx) is Tensor:
                states = (hx,)
            elif type(hx) is tuple and len(hx) in (2, 4):
                states = hx
            else:
                return None
        given = [input, *params, *states]
        for tensor in given:
            if type(tensor) not in PLAIN:
                return None
        gradients = torch.is_grad_enabled() and any([tensor.requires_grad for tensor in given])
        packing = None if gradients or training else packing_of(self)
        if packing is not None:
            results = native_layers(
                self.cell,
                input,
                states,
                params,
                self.bias,
                self.num_layers,
                self.bidirectional,
                self.batch_first,
                zoneout=zoneout_of(CELLS[self.cell], zoneout) if zoneout else (0.0, 0.0),
                packing=packing,
            )
            return None if results is None else (results[0], tuple(results[1:]))
        dtype, steps, batch = input.dtype, *input.shape[:2]
        if self.batch_first:
            steps, batch = batch, steps
        if backends.watched() or dtype not in DTYPES or not input.is_cpu or library.reason():
            return None
        cell, num_layers, bidirectional, batch_first = self.cell, self.num_layers, self.bidirectional, self.batch_first
        # torch's kernels keep what their backward needs, and without oneDNN it has none for a projected LSTM
        if cell in GATES and not (self.proj_size or zoneout or (self.recompute and gradients) or backends.forced()):
            lanes = 2 if bidirectional else 1
            if layers_are_torchs(cell, dtype, "padded", lanes, batch, steps, self.hidden_size, gradients):
                return self._by_torch(input, None, states, params, batch) if steps else None
        if gradients:
            if zoneout:
                return None
            return trained_layers(
                cell,
                input.transpose(0, 1) if batch_first else input,
                states,
                params,
                self.bias,
                num_layers,
                bidirectional,
                batch_first,
                self.dropout if training else 0.0,
                self.recompute,
            )
        if training and self.dropout:
            return None
        results = native_layers(
            cell,
            input,
            states,
            params,
            self.bias,
            num_layers,
            bidirectional,
            batch_first,
            zoneout=zoneout_of(CELLS[cell], zoneout) if zoneout else (0.0, 0.0),
            chosen=True,
        )
        return None if results is None else (results[0], tuple(results[1:]))

    def _packed_of_torch(
        self, data: Tensor, batch_sizes: Tensor, states: Any, params: list[Any]
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Output and final states of packed input, if torch's kernel is the faster one and the call beyond question."""
        states, training = tuple(states or ()), self.training
        if self.cell not in GATES or self.proj_size or self.zoneout or backends.forced() or backends.watched():
            return None
        for tensor in (data, batch_sizes, *params, *states):
            if type(tensor) not in PLAIN:
                return None
        if not data.is_cpu or data.dtype not in DTYPES or data.dim() != 2 or library.reason():
            return None
        if batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1 or not len(batch_sizes):
            return None
        gradients = torch.is_grad_enabled() and any([tensor.requires_grad for tensor in (data, *params, *states)])
        if self.recompute if gradients else not training and packing_of(self) is not None:
            return None
        lanes, batch = 2 if self.bidirectional else 1, int(batch_sizes[0])
        steps = len(batch_sizes)
        if not layers_are_torchs(self.cell, data.dtype, "packed", lanes, batch, steps, self.hidden_size, gradients):
            return None
        return self._by_torch(data, batch_sizes, states, params, batch)

    def _by_torch(
        self,
        data: Tensor,
        batch_sizes: Tensor | None,
        states: tuple[Any, ...],
        params: list[Any],
        batch: int,
        lowered: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Output and final states by torch's kernel, if the call is beyond question; `lowered`: autocast sees to dtypes."""
        cell, dtype, lanes = self.cell, data.dtype, self.num_layers * (2 if self.bidirectional else 1)
        if data.shape[-1] != self.input_size or not (lowered or params[0].dtype == dtype) or not params[0].is_cpu:
            return None
        size, pair = (lanes, batch, self.hidden_size), cell == "lstm"
        for state in states:
            if state.shape != size or state.dtype != dtype or not state.is_cpu:
                return None
        if not states:
            zeros = data.new_zeros(size)
            states = (zeros, zeros) if pair else (zeros,)
        elif len(states) != 1 + pair:
            return None
        hx: Any = states if pair else states[0]
        options = self.bias, self.num_layers, self.dropout, self.training, self.bidirectional
        if batch_sizes is None:
            output, *finals = LAYERS[cell](data, hx, params, *options, self.batch_first)
        else:
            output, *finals = LAYERS[cell](data, batch_sizes, hx, params, *options)
        return output, tuple(finals)

    def _run_packed(
        self, input: PackedSequence, hx: Any, params: list[Tensor], options: dict[str, Any]
    ) -> tuple[PackedSequence, tuple[Tensor, ...], Tensor | None]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        counts: Tensor | None = batch_sizes  # the first says how many sequences there are
        if shared_sequence() is not None:  # a rank has some of their steps, and those that have ended before are not counted
            counts = None if sorted_indices is None else batch_sizes.new_tensor([len(sorted_indices)])
        if hx is None or counts is None:
            self.check_input(data, batch_sizes)
        if hx is not None:
            hx = self._checked(hx, 3, "packed")
            # Before the rows are sorted: index_select would take them out of a larger batch without a word.
            if counts is not None:
                self.check_forward_args(data, hx, counts)
            hx = _states(self.permute_hidden(hx, sorted_indices))
        if isinstance(options["resets"], PackedSequence):
            options["resets"] = _rows_of(self, options["resets"], input)
        if options["reset_to"] is not None:
            anew = self._reset_states(options["reset_to"], 3)
            batch = None if counts is None else int(counts[0])
            if batch is not None and any(state.shape[1] not in (1, batch) for state in anew):
                shapes = ", ".join(str(list(state.shape)) for state in anew)
                raise RuntimeError(f"{kind_of(self)}: reset_to must be for a batch of {batch} or 1, got {shapes}")
            if sorted_indices is not None:
                anew = tuple(state if state.shape[1] == 1 else state.index_select(1, sorted_indices) for state in anew)
            options["reset_to"] = anew
        output, states, cells = functional.recurrent(self.cell, data, hx, params, batch_sizes=batch_sizes, **options)
        # Cells [L, N, D*H], if asked for, have packed rows as the output has: nothing to unsort.
        if unsorted_indices is not None:
            states = tuple(state.index_select(1, unsorted_indices) for state in states)
        return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), states, cells

    def _run_documents(
        self, input: Tensor, hx: Any, cu_seqlens: Tensor, params: list[Tensor], options: dict[str, Any]
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        if not isinstance(input, Tensor):
            raise AttributeError(f"{kind_of(self)}: input must be a Tensor or a PackedSequence, not {describe(input)}")
        if input.dim() != 2:
            raise ValueError(f"{kind_of(self)}: Expected input to be 2D with cu_seqlens, [N, I], got {input.dim()}D instead")
        self.check_input(input, cu_seqlens)
        if hx is not None:
            hx = _states(self._checked(hx, 3, "packed"))
        if options["reset_to"] is not None:
            options["reset_to"] = self._reset_states(options["reset_to"], 3)
        return functional.recurrent(self.cell, input, hx, params, cu_seqlens=cu_seqlens, **options)

    def _run_padded(
        self, input: Tensor, hx: Any, lengths: Tensor | None, params: list[Tensor], options: dict[str, Any]
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        if not isinstance(input, Tensor):  # torch raises the same type, from inside
            raise AttributeError(f"{kind_of(self)}: input must be a Tensor or a PackedSequence, not {describe(input)}")
        if input.dim() not in (2, 3):
            raise ValueError(f"{kind_of(self)}: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        if hx is not None:
            hx = self._checked(hx, input.dim(), "batched 3-D" if batched else "unbatched 2-D")
        if not batched:  # from here on a batch of one
            input = input.unsqueeze(batch_dim)
            if hx is not None:
                hx = hx.unsqueeze(1) if isinstance(hx, Tensor) else tuple(state.unsqueeze(1) for state in hx)
            if isinstance(lengths, Tensor):
                if lengths.dim() != 0:
                    raise RuntimeError(f"For unbatched 2-D input, lengths should be 0-D but got {lengths.dim()}-D tensor")
                lengths = lengths.unsqueeze(0)
            if isinstance(options["resets"], Tensor):
                if options["resets"].dim() != 1:
                    given = f"got {options['resets'].dim()}-D tensor"
                    raise RuntimeError(f"For unbatched 2-D input, resets should be 1-D but {given}")
                options["resets"] = options["resets"].unsqueeze(batch_dim)
        if options["reset_to"] is not None:
            anew = self._reset_states(options["reset_to"], 3 if batched else 2)
            options["reset_to"] = anew if batched else tuple(state.unsqueeze(1) for state in anew)
        if hx is None:
            self.check_input(input, None)
        else:
            self.check_forward_args(input, hx, None)
            hx = _states(hx)
        output, states, cells = functional.recurrent(
            self.cell, input, hx, params, lengths=lengths, batch_first=self.batch_first, **options
        )
        if batched:
            return output, states, cells
        # States are [L*D, 1, n]; cells, if asked for, are laid out as [L, *output].
        states = tuple(state.squeeze(1) for state in states)
        return output.squeeze(batch_dim), states, None if cells is None else cells.squeeze(batch_dim + 1)


class SingleSequence(Sequence):
    """All of the sequence modules whose state is h alone."""

    def forward(
        self,
        input: Input,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | PackedSequence | None = None,
        reset_to: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Input, Tensor]:
        """Run every layer over the sequence.

        Args:
            input: [T, B, I], or [B, T, I] with batch_first, or unbatched [T, I], or a PackedSequence.
            hx: h_0 [L*D, B, H] ([L*D, H] unbatched), in the caller's order of rows. None: zeros.
            lengths: int32 or int64 [B] ([] unbatched) on the input's device, 0 <= lengths <= T. Row b then
                ends at step lengths[b]: output is zero from there on, h_n is the state there, and the reverse
                direction starts there.
            resets: bool [T, B] ([B, T] with batch_first, [T] unbatched; [N] in the order of the rows, or a
                PackedSequence packed alike, for a PackedSequence) on the input's device. Where it is set a new
                segment begins: the state before that step is replaced in every layer, nothing that was before
                reaches it, nor a gradient the steps before, and the reverse direction starts anew at the step
                before. A row is then as its segments one by one, hx before the first, in the reverse direction
                the last of them; resets at the first step replace hx. Beyond a row's length they do not count.
            reset_to: the state that replaces it, as hx, where B may be 1: the same (learned) state for every row.
                None: that of hx = None.
            cu_seqlens: int32 or int64 [S+1], rising from 0 to N: input [N, I] are S sequences end to end, whose
                states are [L*D, S, ..]; resets are [N]. They run as a packed batch. Their lengths are read on the
                host: a GPU is waited for, and torch.compile breaks its graph there (torch.export refuses it).

        Returns:
            output [T, B, D*H] in the layout of the input (a PackedSequence for a PackedSequence), and h_n
            [L*D, B, H].

        Raises:
            ValueError: input neither 2-D nor 3-D, a dtype other than the weights' outside autocast, or
                lengths together with a PackedSequence.
            RuntimeError: sizes, devices or dtypes of states that do not fit, lengths out of range or not of
                an integer dtype, resets or cu_seqlens that do not fit, or T = 0.
            TypeError: lengths or resets is no tensor, or reset_to not of the form of hx.
            AttributeError: hx is no tensor (torch's type for it).
        """
        if type(input) is Tensor and lengths is None and resets is None and reset_to is None and cu_seqlens is None:
            done = self._trained(input, hx) if torch.is_grad_enabled() else self._short(input, hx)
            if done is not None:
                return done[0], done[1]
        if isinstance(input, Proxy):
            return as_leaf(self, input, hx, lengths=lengths, resets=resets, reset_to=reset_to, cu_seqlens=cu_seqlens)
        output, (h_n,), _ = self._run(input, hx, lengths, False, resets, reset_to, cu_seqlens)
        return output, h_n

    if TYPE_CHECKING:
        __call__ = forward


@public
class RNN(SingleSequence):
    """`torch.nn.RNN`: h_t = act(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh), act being tanh or ReLU.

    Constructor, parameters, initialization and state_dict are those of `torch.nn.RNN`.

    Args:
        input_size: I, features of a step of the input.
        hidden_size: H, features of the state.
        num_layers: L; layer k reads the output of layer k-1.
        nonlinearity: "tanh" or "relu".
        bias: False leaves out b_ih and b_hh.
        batch_first: input and output are [B, T, ...]; states are not affected, nor is unbatched input.
        dropout: probability of zeroing an output of every layer but the last, in training.
        bidirectional: D = 2, with a second set of weights running from the last step to the first.
        device, dtype: of the parameters.
        recompute: do not keep what the backward needs of every step but compute it again there: less memory,
            more time.
        zoneout: probability with which a unit keeps its state in a step of training; at inference old and new
            states are mixed in that proportion (Krueger et al. 2017).
        weight_dropout: probability of zeroing an element of weight_hh, once for a forward pass of training
            (DropConnect; Merity et al. 2018).
        num_heads: blocks of units without connections between them; weight_hh is then [G*H, H / num_heads].
        solver: with num_heads equal to hidden_size, how the steps are run. None: one after the other; a `fastseq.Newton`: all
            at once, by iterations, with the same parameters. May be set on the module later.

    Raises:
        ValueError: a size that is not positive, a probability outside [0, 1], an unknown nonlinearity, any
            `proj_size`, num_heads that does not divide hidden_size, a solver that cannot run such a layer.
        TypeError: input_size or hidden_size no int; bias or batch_first no bool.
    """

    nonlinearity: str
    _quantized_dynamically = False

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        recompute: bool = False,
        zoneout: float = 0.0,
        weight_dropout: float = 0.0,
        num_heads: int = 1,
        solver: Newton | None = None,
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        # Named, not super(): between this class and RNNBase keep_type has nn.RNN, whose own constructor is
        # not wanted.
        nn.RNNBase.__init__(
            self, f"RNN_{nonlinearity.upper()}", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.nonlinearity = nonlinearity
        self._extend(recompute, zoneout, weight_dropout, num_heads, solver)


class PairSequence(Sequence):
    """All of the sequence modules whose states are h and c."""

    def get_expected_cell_size(self, input: Tensor, batch_sizes: Tensor | None) -> tuple[int, int, int]:
        """[L*D, B, H], the size of c_0 and c_n for this input."""
        layers, batch, _ = self.get_expected_hidden_size(input, batch_sizes)
        return layers, batch, self.hidden_size

    def check_forward_args(
        self,
        input: Tensor,
        hidden: tuple[Tensor, Tensor],  # type: ignore[override]
        batch_sizes: Tensor | None,
    ) -> None:
        """Raise unless `input` fits the weights and h_0 and c_0 fit the input."""
        self.check_input(input, batch_sizes)
        hidden_size = self.get_expected_hidden_size(input, batch_sizes)
        cell_size = self.get_expected_cell_size(input, batch_sizes)
        self.check_hidden_size(hidden[0], hidden_size, "Expected hidden[0] size {}, got {}")
        self.check_hidden_size(hidden[1], cell_size, "Expected hidden[1] size {}, got {}")

    def permute_hidden(  # type: ignore[override]
        self, hx: tuple[Tensor, Tensor], permutation: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Both states with their batch rows in the order of `permutation`; None: as they are."""
        if permutation is None:
            return hx
        return hx[0].index_select(1, permutation), hx[1].index_select(1, permutation)

    def _checked(self, hx: Any, dim: int, kind: str) -> tuple[Tensor, Tensor]:
        h_0, c_0 = pair_of(self, hx)
        if h_0.dim() != dim or c_0.dim() != dim:
            raise RuntimeError(
                f"For {kind} input, hx and cx should also be {dim}-D but got ({h_0.dim()}-D, {c_0.dim()}-D) tensors"
            )
        return h_0, c_0

    @overload
    def forward(
        self,
        input: Input,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        return_cells: Literal[False] = False,
        resets: Tensor | PackedSequence | None = None,
        reset_to: tuple[Tensor, Tensor] | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Input, tuple[Tensor, Tensor]]: ...
    @overload
    def forward(
        self,
        input: Input,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        return_cells: Literal[True],
        resets: Tensor | PackedSequence | None = None,
        reset_to: tuple[Tensor, Tensor] | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Input, tuple[Tensor, Tensor], Tensor]: ...
    @overload
    def forward(
        self,
        input: Input,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        return_cells: bool,
        resets: Tensor | PackedSequence | None = None,
        reset_to: tuple[Tensor, Tensor] | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Any: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        return_cells: bool = False,
        resets: Tensor | PackedSequence | None = None,
        reset_to: tuple[Tensor, Tensor] | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Any:
        """Run every layer over the sequence.

        Args:
            input: [T, B, I], or [B, T, I] with batch_first, or unbatched [T, I], or a PackedSequence.
            hx: (h_0 [L*D, B, P], c_0 [L*D, B, H]) ([L*D, P] and [L*D, H] unbatched), in the caller's order of
                rows. None: zeros.
            lengths: int32 or int64 [B] ([] unbatched) on the input's device, 0 <= lengths <= T. Row b then
                ends at step lengths[b]: output and cells are zero from there on, h_n and c_n are the states
                there, and the reverse direction starts there.
            return_cells: also return c of every step of every layer.
            resets: bool [T, B] ([B, T] with batch_first, [T] unbatched; [N] in the order of the rows, or a
                PackedSequence packed alike, for a PackedSequence) on the input's device. Where it is set a new
                segment begins: the state before that step is replaced in every layer, nothing that was before
                reaches it, nor a gradient the steps before, and the reverse direction starts anew at the step
                before. A row is then as its segments one by one, hx before the first, in the reverse direction
                the last of them; resets at the first step replace hx. Beyond a row's length they do not count.
            reset_to: the state that replaces it, as hx, where B may be 1: the same (learned) state for every row.
                None: that of hx = None.
            cu_seqlens: int32 or int64 [S+1], rising from 0 to N: input [N, I] are S sequences end to end, whose
                states are [L*D, S, ..]; resets are [N]. They run as a packed batch. Their lengths are read on the
                host: a GPU is waited for, and torch.compile breaks its graph there (torch.export refuses it).

        Returns:
            output [T, B, D*P] in the layout of the input (a PackedSequence for a PackedSequence), and
            (h_n [L*D, B, P], c_n [L*D, B, H]). With return_cells a third value, differentiable: cells [L, T,
            B, D*H] ([L, B, T, D*H] with batch_first, [L, T, D*H] unbatched; for a PackedSequence [L, N, D*H],
            where row n belongs to row n of output.data, so `output._replace(data=cells[k])` is layer k
            packed).

        Raises:
            ValueError: input neither 2-D nor 3-D, a dtype other than the weights' outside autocast, or
                lengths together with a PackedSequence.
            RuntimeError: sizes, devices or dtypes of states that do not fit, lengths out of range or not of
                an integer dtype, resets or cu_seqlens that do not fit, or T = 0.
            TypeError: hx is no tuple, lengths or resets no tensor, or reset_to not of the form of hx.
        """
        if type(input) is Tensor and lengths is None and resets is None and reset_to is None and cu_seqlens is None:
            done = None if return_cells else self._trained(input, hx) if torch.is_grad_enabled() else self._short(input, hx)
            if done is not None:
                output, h_n, c_n = done
                return output, (h_n, c_n)
        if isinstance(input, Proxy):
            options = dict(lengths=lengths, return_cells=return_cells or None)
            return as_leaf(self, input, hx, **options, resets=resets, reset_to=reset_to, cu_seqlens=cu_seqlens)
        output, (h_n, c_n), cells = self._run(input, hx, lengths, return_cells, resets, reset_to, cu_seqlens)
        return (output, (h_n, c_n)) if cells is None else (output, (h_n, c_n), cells)

    if TYPE_CHECKING:
        __call__ = forward


@public
class LSTM(PairSequence):
    """`torch.nn.LSTM`, with projections, lengths as a tensor, and the cell state of every step on request.

    i, f, g, o = W_ih x_t + b_ih + W_hh h_(t-1) + b_hh;  c_t = sigmoid(f) c_(t-1) + sigmoid(i) tanh(g);
    h_t = sigmoid(o) tanh(c_t), and with proj_size h_t = W_hr (sigmoid(o) tanh(c_t)).
    Constructor, parameters, initialization and state_dict are those of `torch.nn.LSTM`.

    Args:
        input_size: I, features of a step of the input.
        hidden_size: H, features of the cell state.
        num_layers: L; layer k reads the output of layer k-1.
        bias: False leaves out b_ih and b_hh.
        batch_first: input, output and cells are [B, T, ...]; states are not affected, nor is unbatched input.
        dropout: probability of zeroing an output of every layer but the last, in training.
        bidirectional: D = 2, with a second set of weights running from the last step to the first.
        proj_size: P, features of h when > 0; smaller than hidden_size.
        device, dtype: of the parameters.
        recompute: do not keep the gates of every step for the backward but compute them again there: less
            memory, more time.
        zoneout: probability with which a unit keeps its h, or of a pair its h and its c, in a step of training;
            at inference old and new states are mixed in that proportion (Krueger et al. 2017).
        weight_dropout: probability of zeroing an element of weight_hh, once for a forward pass of training
            (DropConnect; Merity et al. 2018).
        num_heads: blocks of units without connections between them; weight_hh is then [G*H, H / num_heads].
        solver: with num_heads equal to hidden_size, how the steps are run. None: one after the other; a `fastseq.Newton`: all
            at once, by iterations, with the same parameters. May be set on the module later.

    Raises:
        ValueError: a size that is not positive, a probability outside [0, 1], proj_size outside [0, hidden_size),
            num_heads that does not divide hidden_size or is given with a proj_size, a solver that cannot run such a layer.
        TypeError: input_size or hidden_size no int; bias or batch_first no bool.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        zoneout: float | tuple[float, float] = 0.0,
        weight_dropout: float = 0.0,
        num_heads: int = 1,
        solver: Newton | None = None,
    ) -> None:
        nn.RNNBase.__init__(
            self, "LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype
        )
        self._extend(recompute, zoneout, weight_dropout, num_heads, solver)


@public
class GRU(SingleSequence):
    """`torch.nn.GRU`, with the reset gate applied after the matmul as there.

    r, z = sigmoid(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh), their first two thirds;
    n = tanh(W_in x_t + b_in + r (W_hn h_(t-1) + b_hn));  h_t = (1 - z) n + z h_(t-1).
    Constructor, parameters, initialization and state_dict are those of `torch.nn.GRU`.

    Args:
        input_size: I, features of a step of the input.
        hidden_size: H, features of the state.
        num_layers: L; layer k reads the output of layer k-1.
        bias: False leaves out b_ih and b_hh.
        batch_first: input and output are [B, T, ...]; states are not affected, nor is unbatched input.
        dropout: probability of zeroing an output of every layer but the last, in training.
        bidirectional: D = 2, with a second set of weights running from the last step to the first.
        device, dtype: of the parameters.
        recompute: do not keep the gates of every step for the backward but compute them again there: less
            memory, more time.
        zoneout: probability with which a unit keeps its state in a step of training; at inference old and new
            states are mixed in that proportion (Krueger et al. 2017).
        weight_dropout: probability of zeroing an element of weight_hh, once for a forward pass of training
            (DropConnect; Merity et al. 2018).
        num_heads: blocks of units without connections between them; weight_hh is then [G*H, H / num_heads].
        solver: with num_heads equal to hidden_size, how the steps are run. None: one after the other; a `fastseq.Newton`: all
            at once, by iterations, with the same parameters. May be set on the module later.

    Raises:
        ValueError: a size that is not positive, a probability outside [0, 1], any `proj_size`, num_heads that does not
            divide hidden_size, a solver that cannot run such a layer.
        TypeError: input_size or hidden_size no int; bias or batch_first no bool.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        recompute: bool = False,
        zoneout: float = 0.0,
        weight_dropout: float = 0.0,
        num_heads: int = 1,
        solver: Newton | None = None,
    ) -> None:
        nn.RNNBase.__init__(
            self,
            "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        self._extend(recompute, zoneout, weight_dropout, num_heads, solver)


def _rows_of(module: Sequence, resets: PackedSequence, input: PackedSequence) -> Tensor:
    """The rows of `resets`, if they are packed as those of `input` are."""
    of_resets, of_input = ((packed.batch_sizes, packed.sorted_indices) for packed in (resets, input))
    same = (of_resets[1] is None) == (of_input[1] is None)
    for own, other in zip(of_resets, of_input, strict=True):
        if same and own is not other and own is not None and other is not None and readable(own) and readable(other):
            same = torch.equal(own, other)
    if not same:
        raise ValueError(f"{kind_of(module)}: resets must be packed as the input is, with the same lengths in the same order")
    return resets.data


def checks_of(kind: type[nn.RNNBase]) -> tuple[Any, ...]:
    """The methods that check what a module is given. Those of a subclass of the user's own are called."""
    return kind.check_forward_args, kind.check_input, kind.check_hidden_size


# what tells of a module whether the library takes its plain calls at once
_OF_TORCH = itemgetter("mode", "num_layers", "bias", "batch_first", "bidirectional", "proj_size", "training", "hidden_size")
_OPTIONS = itemgetter(
    "mode", "num_layers", "bias", "batch_first", "bidirectional", "proj_size", "training", "hidden_size", "zoneout",
    "weight_dropout", "num_heads",
)  # fmt: skip
_lanes: dict[Any, Any] = memory()

# A GRU's state stays in float32 under autocast: our kernels run all of it in float32, torch's multiply in bfloat16. From more
# elements of the state on that is faster where there are instructions for it (Zen 4, B = 32, H = 512: 1.3 times).
_WIDE, _MULTIPLY_SHORT = 8192, ("avx512_bf16", "amx")


def _lane_in(kind: type[Sequence], own: dict[str, Any]) -> Any:
    """What `_lane_of` says of a module with these attributes; None: more is to be asked of it."""
    if checks_of(kind) not in CHECKS or own.get("solver", kind.solver) is not None:
        return None
    if "zoneout" in own and "weight_dropout" in own and "num_heads" in own:
        key = _OPTIONS(own)
    else:  # torch.nn's, whose class was swapped to ours
        given = own.get
        options = (
            given("zoneout", kind.zoneout),
            given("weight_dropout", kind.weight_dropout),
            given("num_heads", kind.num_heads),
        )
        key = (*_OF_TORCH(own), *options)
    if sources._threads is not None:
        sources.heed_threads()
    try:
        lane = _lanes.get(key)
    except TypeError:  # a list
        return None
    return sources.remember(_lanes, key, _lane_of(*key)) if lane is None else lane


def _lane_of(
    mode: str,
    num_layers: int,
    bias: bool,
    batch_first: bool,
    bidirectional: bool,
    proj_size: int,
    training: bool,
    hidden_size: int,
    zoneout: Any,
    weight_dropout: float,
    num_heads: int,
) -> Lane | bool:
    """Of one layer in one direction of an LSTM, GRU or RNN; False: it is of another kind."""
    cell = mode.lower()
    if cell not in GATES or num_layers != 1 or bidirectional or proj_size or zoneout or num_heads != 1:
        return False
    return False if training and weight_dropout else lane_of(cell, False, bool(bias), bool(batch_first), hidden_size)


CHECKS = {checks_of(SingleSequence), checks_of(PairSequence)}  # what the short way checks as well


def _states(hx: Any) -> tuple[Tensor, ...]:
    return (hx,) if isinstance(hx, Tensor) else tuple(hx)
