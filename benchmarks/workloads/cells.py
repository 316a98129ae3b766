"""Workloads of a single cell: one step from given states, or a rollout whose output is the next input, as in decoding.

Letters: T steps, B batch, I input width, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .base import Workload, around, load, results_of

CELLS = ("LSTMCell", "GRUCell", "RNNCell")


@dataclass(frozen=True)
class CellWorkload(Workload):
    """`function` is the name of a cell in small letters. More than one step: I = H, and the output is the next input."""

    @property
    def layer(self) -> str:
        """The function of a layer that steps in the same way."""
        return self.function.removesuffix("cell")

    @property
    def growth(self) -> int:
        return 1

    @property
    def states(self) -> tuple[str, ...]:
        return ("h", "c") if self.layer == "lstm" else ("h",)

    def small(self) -> CellWorkload:
        return replace(self, T=min(self.T, 7), B=min(self.B, 3), I=24, H=24)

    def problem(self) -> CellProblem:
        return CellProblem.of(self)

    def call(self, built: nn.Module, problem: CellProblem, layout: str = "", **options: Any) -> CellCall:
        return CellCall(built, problem, **options)

    def torch_results(self, problem: CellProblem, dtype: torch.dtype, device: str, *, in_parts: bool) -> dict[str, Tensor]:
        return results_of(CellCall(torch_cell(self), problem, dtype=dtype, device=device))


def torch_cell(w: Workload) -> nn.Module:
    return {name.lower(): getattr(nn, name) for name in CELLS}[w.function](w.I, w.H)


@dataclass
class CellProblem:
    """Parameters, input, states and the gradients of the new states, in fp64 on the CPU, rounded to the workload's dtype."""

    workload: CellWorkload
    parameters: dict[str, Tensor]
    x: Tensor  # [B, I]
    states: dict[str, Tensor]  # [B, H] each, as are their gradients
    grads: dict[str, Tensor]

    @classmethod
    def of(cls, w: CellWorkload) -> CellProblem:
        generator = w.generator()

        def cast(t: Tensor) -> Tensor:
            return t.detach().to(w.torch_dtype).double()

        def draw(features: int) -> Tensor:
            return cast(torch.randn(w.B, features, generator=generator, dtype=torch.float64))

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(w.seed)
            parameters = {name: cast(p) for name, p in torch_cell(w).double().named_parameters()}
        return cls(w, parameters, draw(w.I), {s: draw(w.H) for s in w.states}, {s: draw(w.H) for s in w.states})


class CellCall:
    """A cell on a problem: what is timed (`run`), and what is compared (`outputs`, `gradients`)."""

    def __init__(
        self,
        module: nn.Module,
        problem: CellProblem,
        *,
        dtype: torch.dtype | None = None,
        device: str | None = None,
        mode: str | None = None,
    ) -> None:
        w = problem.workload
        self.mode, self.steps, self.names = mode or w.mode, w.T, w.states
        dtype, device = dtype or w.torch_dtype, device or w.device
        self.module = module.to(device=device, dtype=dtype)
        learned = load(self.module, problem.parameters)
        self.parameters = list(learned.values())

        def place(t: Tensor) -> Tensor:
            return t.to(device=device, dtype=dtype, copy=True)

        self.leaves = {"input": place(problem.x)} | {name: place(t) for name, t in problem.states.items()}
        for leaf in self.leaves.values():
            leaf.requires_grad_(self.mode == "training")
        self.x, *states = self.leaves.values()
        self.state = tuple(states) if len(states) > 1 else states[0]
        self.leaves |= learned
        self.grads = [place(t) for t in problem.grads.values()]

    @property
    def run(self) -> Callable[[], object]:
        return self._both if self.mode == "training" else self.forward

    def forward(self) -> tuple[Tensor, ...]:
        """The last states."""
        x, state = self.x, self.state
        for _ in range(self.steps):
            state = self.module(x, state)
            x = state[0] if isinstance(state, tuple) else state
        return state if isinstance(state, tuple) else (state,)

    def _both(self) -> tuple[Tensor, ...]:
        with around(self.module):
            return torch.autograd.grad(self.forward(), list(self.leaves.values()), self.grads)

    def context(self) -> AbstractContextManager[Any]:
        return torch.inference_mode(self.mode == "inference")

    def outputs(self) -> dict[str, Tensor]:
        with self.context():
            return {name: t.detach() for name, t in zip(self.names, self.forward(), strict=True)}

    def gradients(self) -> dict[str, Tensor]:
        return dict(zip(self.leaves, self._both(), strict=True))
