"""Workloads of a recurrent layer that is called again and again, as in streaming, and of one beside a busy program."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .base import Call, Problem, Workload, around

CALLS = 4


@dataclass(frozen=True)
class CarriedWorkload(Workload):
    """CALLS calls over T steps each, every one from the states that the last one left: together a sequence of CALLS * T steps.

    The parameters are numbers that bfloat16 has, so that weights that are kept in it lose nothing.
    """

    @property
    def steps(self) -> int:
        return CALLS * self.T

    @property
    def tokens(self) -> int:
        return self.steps * self.B

    def problem(self) -> Problem:
        whole = Problem.of(Workload(self.function, self.steps, self.B, self.I, self.H, dtype=self.dtype))
        parameters = {name: t.bfloat16().double() for name, t in whole.parameters.items()}
        return replace(whole, workload=self, parameters=parameters)

    def call(self, built: nn.Module, problem: Problem, layout: str, **options: Any) -> CarriedCall:
        return CarriedCall(built, problem, layout, **options)

    def detail(self) -> dict[str, Any]:
        return {"calls": CALLS}


class CarriedCall(Call):
    """A module on the parts of a sequence."""

    def __init__(self, module: nn.Module, problem: Problem, layout: str, **options: Any) -> None:
        super().__init__(module, problem, layout, **options)
        self.parts, self.grads = (list(t.split(problem.workload.T)) for t in (self.data, self.grad))

    def forward(self) -> tuple[list[Tensor], Any]:
        """The outputs of every call, and the last states."""
        return self._through(lambda y: y)

    def _through(self, keep: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], Any]:
        outputs, state = [], None
        for part in self.parts:
            y, state = self.module(part, state)
            outputs.append(keep(y))
        return outputs, state

    def _backward(self) -> tuple[Tensor, ...]:
        with around(self.module):
            return torch.autograd.grad(self.forward()[0], list(self.leaves.values()), self.grads)

    def outputs(self) -> dict[str, Tensor]:
        with self.context():
            outputs, state = self._through(torch.clone)
        states = state if isinstance(state, tuple) else (state,)
        return {"output": torch.cat(outputs)} | dict(zip(("h_n", "c_n"), states, strict=False))


@dataclass(frozen=True)
class BesideWorkload(Workload):
    """A layer while `programs` others compute without end."""

    programs: int = 0

    @contextmanager
    def settings(self) -> Iterator[None]:
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(self.programs)]
        try:
            with super().settings():
                yield
        finally:
            for program in busy:
                program.kill()
                program.wait()

    def detail(self) -> dict[str, Any]:
        return {"programs": self.programs}
