"""What ``context_parallel`` hands the functions of recurrence and scans to."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..cells import Cell
from ..functional._recurrent_layers import Options
from ..ops._dispatch import PLAIN, is_sharded, sharding
from ..ops.types import ScanSpec
from ._ranks import Own, Ranks
from .recurrent import run_across
from .scan import inputs_before, own_lengths, scan_across
from .sequence import ZIGZAG, Sharding, held_runs, places_of, size_of


class Recurrences:
    """Runs what goes from step to step, of sequences whose steps lie on ``ranks``."""

    def __init__(self, ranks: Ranks, sharding: Sharding, micro_batches: int) -> None:
        self.ranks, self.sharding, self.micro_batches = ranks, sharding, micro_batches

    def recurrent(
        self,
        cell: Cell,
        input: Tensor,
        states: Sequence[Tensor | None],
        params: Sequence[Tensor | None],
        options: Options,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        self._check_sharding()
        if type(input) not in PLAIN and is_sharded(input):  # its rows, along another dimension of the mesh
            run = partial(self.recurrent, cu_seqlens=cu_seqlens)
            return sharding().layers(run, cell, input, states, params, options)
        return run_across(cell, input, states, params, options, cu_seqlens, self.ranks, self.micro_batches)

    def scan(self, b: Tensor, a: Tensor, gate: Any, vector: Any, initial: Any, spec: ScanSpec) -> tuple[Tensor, Tensor]:
        self._check_sharding()
        return scan_across(b, a, gate, vector, initial, spec, self.ranks)

    def inputs_before(self, x: Tensor, given: Tensor, spec: ScanSpec) -> tuple[Tensor, Tensor]:
        return inputs_before(x, given, spec, self.ranks)

    def lengths(self, lengths: Tensor, steps: int) -> Tensor:
        self._check_sharding()
        return own_lengths(lengths, steps, self.ranks)

    def places(self, steps: int, device: torch.device | str | None) -> tuple[Tensor, int]:
        told = Own().settle(self.ranks, {"call": "sequence_places", "sharding": self.sharding}, [steps])
        runs = held_runs([numbers[0] for numbers in told], self.sharding)
        return places_of(runs[self.ranks.rank], device), sum(map(size_of, runs))

    def _check_sharding(self) -> None:
        if self.sharding != "contiguous":
            raise ValueError(ZIGZAG)
