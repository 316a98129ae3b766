"""Workloads of recurrent layers on a GPU: more layers, both directions, any precision; and what is known of cuDNN's choice.

Letters: T time, B batch, I input width, H hidden width, L layers, D directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import Problem, Workload, torch_results

PRECISIONS = ("bfloat16", "float16", "tf32", "float32")  # the last two: fp32, its products in TF32 or in IEEE fp32


@dataclass(frozen=True)
class RecurrentWorkload(Workload):
    """`layers` layers of `function`, in one direction or both."""

    layers: int = 1
    bidirectional: bool = False

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def width(self) -> int:
        return self.directions * self.H

    @property
    def options(self) -> dict[str, Any]:
        return {"num_layers": self.layers, "bidirectional": self.bidirectional}

    @property
    def matrices(self) -> int:
        return self.layers * self.directions

    @property
    def inputs(self) -> int:
        return self.directions * (self.I + (self.layers - 1) * self.width)

    @property
    def elements(self) -> int:
        """Hidden units over time, batch, layers and directions: what every saved activation has."""
        return self.T * self.B * self.H * self.matrices

    @property
    def persistent(self) -> bool:
        """Whether torch lets cuDNN choose its persistent kernel (aten/src/ATen/native/cudnn/RNN.cpp, devices from sm_80 on)."""
        shape = self.H <= 1024 and self.H % 128 == 0 and self.I % 128 == 0 and self.B % 8 == 0 and self.B <= 128
        plain = self.layers == 1 and not self.bidirectional and not self.packed and self.dtype == "float16"
        cell = self.function == "lstm" or (self.function == "rnn" and (self.B < 96 or self.H < 896))
        return shape and plain and cell

    def torch_results(self, problem: Problem, dtype: torch.dtype, device: str, *, in_parts: bool) -> dict[str, Tensor]:
        """On the workload's own device, fp64 as well: a GPU's grid is too large for a host."""
        return {name: t.cpu() for name, t in torch_results(self, problem, dtype, self.device, False).items()}

    def detail(self) -> dict[str, Any]:
        sizes = {"layers": self.layers, "directions": self.directions, "steps": self.steps}
        return {**sizes, "precision": self.precision, "persistent": self.persistent}


def precise(precision: str) -> dict[str, Any]:
    """The fields of a workload that are meant by a name of PRECISIONS."""
    return {"dtype": "float32", "tf32": True} if precision == "tf32" else {"dtype": precision}
