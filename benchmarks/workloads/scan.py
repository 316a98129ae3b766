"""A linear recurrence by itself: h_t = a_t h_{t-1} + b_t, every step's a and b given. B rows of H channels, T steps; I = H.

A program is a function (b [T, B, H], a [T, B, H]) -> h.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .base import Workload, results_of

Program = Callable[[Tensor, Tensor], Tensor]
STREAMS = {"inference": 3, "training": 3 + 5}  # a, b, h; and back a, h, dh, db, da


@dataclass(frozen=True)
class ScanWorkload(Workload):
    @property
    def growth(self) -> int:
        return 1

    def cost(self) -> tuple[int, float, float]:
        """Every stream once through memory."""
        numbers = self.T * self.B * self.H
        return 1, 2.0 * numbers, STREAMS[self.mode] * numbers * self.torch_dtype.itemsize

    def small(self) -> ScanWorkload:
        return replace(self, T=min(self.T, 7), B=min(self.B, 3), I=21, H=21)

    def problem(self) -> ScanProblem:
        return ScanProblem.of(self)

    def call(self, built: Program, problem: ScanProblem, layout: str = "", **options: Any) -> ScanCall:
        return ScanCall(built, problem, **options)

    def torch_results(self, problem: ScanProblem, dtype: torch.dtype, device: str, *, in_parts: bool) -> dict[str, Tensor]:
        return results_of(ScanCall(loop, problem, dtype=dtype, device=device))


def loop(b: Tensor, a: Tensor) -> Tensor:
    """Step by step, one operator each."""
    h = b[0]
    states = [h]
    for b_t, a_t in zip(b[1:].unbind(), a[1:].unbind(), strict=True):
        h = torch.addcmul(b_t, a_t, h)
        states.append(h)
    return torch.stack(states)


@dataclass
class ScanProblem:
    """In fp64 on the CPU, rounded to the workload's dtype."""

    workload: ScanWorkload
    b: Tensor  # [T, B, H], as are the others
    a: Tensor
    grad: Tensor

    @classmethod
    def of(cls, w: ScanWorkload) -> ScanProblem:
        generator = w.generator()

        def draw() -> Tensor:
            return torch.randn(w.T, w.B, w.H, generator=generator, dtype=torch.float64)

        b, a, grad = draw(), draw().sigmoid(), draw()
        return cls(w, *(t.to(w.torch_dtype).double() for t in (b, a, grad)))


class ScanCall:
    """A program on a problem: what is timed (`run`), and what is compared (`outputs`, `gradients`)."""

    def __init__(
        self,
        program: Program,
        problem: ScanProblem,
        *,
        dtype: torch.dtype | None = None,
        device: str | None = None,
        mode: str | None = None,
    ) -> None:
        w = problem.workload
        self.program, self.mode = program, mode or w.mode
        self.parameters: list[nn.Parameter] = []
        place: dict[str, Any] = {"dtype": dtype or w.torch_dtype, "device": device or w.device}
        self.b, self.a = (t.to(**place, copy=True).requires_grad_(self.mode == "training") for t in (problem.b, problem.a))
        self.grad = problem.grad.to(**place)

    @property
    def run(self) -> Callable[[], object]:
        return self._both if self.mode == "training" else self.forward

    def forward(self) -> Tensor:
        return self.program(self.b, self.a)

    def _both(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), (self.b, self.a), self.grad)

    def context(self) -> AbstractContextManager[Any]:
        return torch.inference_mode(self.mode == "inference")

    def outputs(self) -> dict[str, Tensor]:
        with self.context():
            return {"output": self.forward().detach()}

    def gradients(self) -> dict[str, Tensor]:
        return dict(zip(("b", "a"), self._both(), strict=True))
