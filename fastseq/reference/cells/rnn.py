"""Elman cell: h = f(x + R h), f tanh or relu (``torch.nn.RNN``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Elman:
    activation: Callable[[Tensor], Tensor]
    times_derivative: Callable[[Tensor, Tensor], Tensor]  # d times that of the activation whose value h is

    def step(self, x: Tensor, r: Tensor, vectors: None, h: Tensor, c: None) -> tuple[Tensor, None, None]:
        return self.activation(x + r), None, None

    def step_backward(
        self, dh: Tensor, dc: None, saved: None, vectors: None, h_prev: Tensor, c_prev: None, h: Tensor, c: None
    ) -> tuple[Tensor, None, None, None]:
        return self.times_derivative(dh, h), None, None, None

    def jacobian(self, weight: Tensor, saved: None, vectors: None, h_prev: Tensor, c_prev: None, h: Tensor, c: None) -> Tensor:
        return self.times_derivative(weight, h)


TANH = Elman(torch.tanh, lambda d, h: d * (1 - h * h))
RELU = Elman(torch.relu, lambda d, h: torch.where(h <= 0, 0, d))
