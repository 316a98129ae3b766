"""A recurrent layer on a rollout of environments: episodes end inside its sequences, and the state starts anew there.

B environments, T steps, one layer, I = H. States before the first step are given, as the rollout before left them, and want no
gradient. Every layer is built around the same starts, and takes x [T, B, I].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .base import FUNCTIONS, Call, Problem, Workload, results_of

EPISODE = 32  # steps, in the mean


@dataclass(frozen=True)
class RolloutWorkload(Workload):
    """`episode`: mean steps of one; 0: none starts inside the rollout."""

    episode: int = EPISODE

    @cached_property
    def starts(self) -> Tensor:
        """Bool [T, B]: before which steps the state starts anew."""
        drawn = torch.rand(self.T, self.B, generator=torch.Generator().manual_seed(self.seed + 1), dtype=torch.float64)
        return drawn * self.episode < 1 if self.episode else torch.zeros_like(drawn, dtype=torch.bool)

    @cached_property
    def states(self) -> tuple[Tensor, ...]:
        """h, and c of an LSTM, before the first step: [1, B, H] each."""
        generator, count = torch.Generator().manual_seed(self.seed + 2), 2 if self.function == "lstm" else 1
        drawn = torch.rand(count, 1, self.B, self.H, generator=generator, dtype=torch.float64)
        return tuple((2 * drawn - 1).to(self.torch_dtype).double())

    def small(self) -> RolloutWorkload:
        """Episodes of three steps, unless there are none."""
        return replace(self, T=min(self.T, 7), B=min(self.B, 3), I=24, H=24, episode=min(self.episode, 3))

    def torch_results(self, problem: Problem, dtype: torch.dtype, device: str, *, in_parts: bool) -> dict[str, Tensor]:
        layer: Any = FUNCTIONS[self.function].module(self)
        return results_of(Call(MaskedLoop(layer, self), problem, "time", dtype=dtype, device=device))

    def detail(self) -> dict[str, Any]:
        return {"episode": self.episode}


class Rollout(nn.Module):
    """A layer with what it starts from, and where it starts anew."""

    h: Tensor
    c: Tensor
    starts: Tensor

    def __init__(self, layer: nn.Module, w: RolloutWorkload) -> None:
        super().__init__()
        self.layer, self.ends = layer, w.episode > 0
        self.names = ("h", "c")[: len(w.states)]
        for name, state in zip(self.names, w.states, strict=True):
            self.register_buffer(name, state)
        self.register_buffer("starts", self.told(w.starts))

    def told(self, starts: Tensor) -> Tensor:
        """The starts as the layer wants them."""
        return starts

    def canonical_name(self, name: str) -> str:
        return name.removeprefix("layer.")

    @property
    def states(self) -> Any:
        """As torch.nn takes them: h, or (h, c)."""
        return (self.h, self.c) if len(self.names) == 2 else self.h


class MaskedLoop(Rollout):
    """Step by step from Python, states multiplied by 0 where an episode starts: as sb3-contrib, CleanRL and others do it."""

    def told(self, starts: Tensor) -> Tensor:
        return starts.double()

    def forward(self, x: Tensor) -> Any:
        states, outputs = self.states, []
        for step, start in zip(x, self.starts, strict=True):
            if isinstance(states, tuple):
                states = ((1.0 - start).view(1, -1, 1) * states[0], (1.0 - start).view(1, -1, 1) * states[1])
            else:
                states = (1.0 - start).view(1, -1, 1) * states
            output, states = self.layer(step.unsqueeze(0), states)
            outputs.append(output)
        return torch.cat(outputs), states


class OneCall(Rollout):
    """The whole rollout in a call; without episodes that end, a call as any other."""

    def forward(self, x: Tensor) -> Any:
        return self.layer(x, self.states, resets=self.starts) if self.ends else self.layer(x, self.states)
