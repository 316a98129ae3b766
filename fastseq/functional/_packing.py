"""Weights packed for inference, kept beside a module's parameters and never in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import library
from ..backends.torch.recurrent import GATES
from ..cells import CELLS

FORMATS: dict[torch.dtype | None, str] = {None: "", torch.bfloat16: "bfloat16", torch.int8: "int8"}
PLACE = "_packing"  # among the attributes of a module


class Packing:
    """What `fastseq.pack` leaves in a module: a format, and the weights in it as they were when they were last packed.

    A parameter that was replaced, moved or written in place is packed again at the next call. Copies and pickles hold the format
    alone and pack at their first call.
    """

    def __init__(self, weights: torch.dtype | None, cell: str, num_layers: int, has_biases: bool, bidirectional: bool) -> None:
        self.weights = weights
        self._stack = cell, num_layers, has_biases, bidirectional
        self.states_apart = CELLS[cell].wide_states < 2  # in what the kernels give back
        self._made: tuple[list[Tensor], list[int], list[Tensor]] | None = None
        self._lone = cell in GATES and num_layers == 1 and not bidirectional

    def of(self, params: Sequence[Tensor]) -> list[Tensor] | None:
        """The packed weights of these parameters, one tensor a layer; None if they cannot be packed."""
        return self.kept(params) or self.again(params)

    def kept(self, params: Sequence[Tensor | None]) -> list[Tensor] | None:
        """The same, if these are the very parameters that were packed last, and nobody has written them since."""
        made = self._made
        if made is None:
            return None
        for tensor, known, version in zip(params, made[0], made[1], strict=False):
            if tensor is not known or known._version != version:
                return None
        return made[2]

    def kept_of(self, own: Mapping[str, Tensor | None], names: Sequence[str]) -> tuple[list[Tensor], list[Tensor]] | None:
        """The parameters and their packed weights, if those of these names are the very ones that were packed last, and nobody
        has written them since: of calls that take microseconds."""
        made = self._made
        if made is None or len(names) != len(made[0]):
            return None
        params, versions, kept = made
        for name, known, version in zip(names, params, versions, strict=True):
            if own.get(name) is not known or known._version != version:
                return None
        return params, kept

    def kept_lane(self, params: Sequence[Tensor]) -> Tensor | None:
        """``kept`` of one layer in one direction with no parameters beside weights and biases, before kernels that take a
        microsecond."""
        made = self._made
        if made is None or not self._lone:
            return None
        known, versions, kept = made
        if len(params) == 4 == len(known):
            a, b, c, d = params
            w_ih, w_hh, b_ih, b_hh = known
            if a is not w_ih or b is not w_hh or c is not b_ih or d is not b_hh:
                return None
            return kept[0] if [a._version, b._version, c._version, d._version] == versions else None
        found = self.kept(params) if len(params) == len(known) else None
        return None if found is None else found[0]

    def again(self, params: Sequence[Tensor]) -> list[Tensor] | None:
        """The same, packed now."""
        self._made = None
        if library.reason() or any(tensor.is_inference() for tensor in params):  # such a tensor does not count its changes
            return None
        versions = [tensor._version for tensor in params]
        with torch.no_grad():
            kept = torch.ops.fastseq_native.recurrent_pack.default(list(params), *self._stack, FORMATS[self.weights])
        if not kept:
            return None
        self._made = list(params), versions, kept  # at once: another thread sees all of it or nothing
        return kept

    def __str__(self) -> str:
        return f"weights packed in {FORMATS[self.weights] or 'their own dtype'}"

    def bytes(self) -> int:
        """What the packed weights take."""
        return sum(kept.numel() for kept in self._made[2]) if self._made else 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_made": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Packing:
        return Packing(self.weights, *self._stack)


def packing_of(module: nn.Module) -> Packing | None:
    """What `fastseq.pack` left in a module."""
    return module.__dict__.get(PLACE)


def set_packing(module: nn.Module, packing: Packing | None) -> None:
    """Keep it there, or take it away."""
    if packing is None:
        module.__dict__.pop(PLACE, None)
    else:
        module.__dict__[PLACE] = packing
