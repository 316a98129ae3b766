"""Elman cell: h = f(x + R h), f tanh or relu (``torch.nn.RNN``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Elman:
    activation: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]  # of the activation, from its value

    def step(self, x: Tensor, r: Tensor, vectors: None, h: Tensor, c: None) -> tuple[Tensor, None, None]:
        return self.activation(x + r), None, None

    def step_backward(
        self, dh: Tensor, dc: None, saved: None, vectors: None, h_prev: Tensor, c_prev: None, h: Tensor, c: None
    ) -> tuple[Tensor, None, None, None]:
        return dh * self.derivative(h), None, None, None

    def jacobian(self, weight: Tensor, saved: None, vectors: None, h_prev: Tensor, c_prev: None, h: Tensor, c: None) -> Tensor:
        return weight * self.derivative(h)


TANH = Elman(torch.tanh, lambda h: 1 - h * h)
RELU = Elman(torch.relu, lambda h: (h > 0).to(h.dtype))
