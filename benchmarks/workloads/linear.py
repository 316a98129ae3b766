"""Layers of linear recurrence: gates that read the input alone, one layer in one direction. T steps, B rows, I and H features.

`Loop` is torch's own way, an operator at a time: gates of all steps, then the steps one by one. Its parameters have the names of
fastseq's modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Call, Problem, Workload, results_of

# Rows of the input's weight in units of H; numbers of H features that the recurrence reads at a step.
WEIGHTS = {"min_gru": 2, "min_lstm": 3, "hgrn": 3, "rg_lru": 2, "qrnn": 3, "lru": 5, "min_gru_log": 2}
STREAMS = {"min_gru": 2, "min_lstm": 3, "hgrn": 2, "rg_lru": 3, "qrnn": 2, "lru": 2, "min_gru_log": 2}


@dataclass(frozen=True)
class LinearWorkload(Workload):
    """`function`: of `WEIGHTS`. "min_gru_log" is minGRU in logarithms, held to its own rounding: it breaks the loop's bound."""

    @property
    def growth(self) -> int:
        return 1

    def cost(self) -> tuple[int, float, float]:
        """The products, or every stream once through memory: what the scan reads, h; back these again, dh and the gradients."""
        flops = 2.0 * self.T * self.B * self.I * self.H * WEIGHTS[self.function]
        streams, numbers = STREAMS[self.function], self.T * self.B * self.H * self.torch_dtype.itemsize
        if self.mode == "training":
            return 1, 3 * flops, (streams + 1 + 2 * streams + 2) * numbers
        return 1, flops, (streams + 1) * numbers

    def small(self) -> LinearWorkload:
        return replace(self, T=min(self.T, 7), B=min(self.B, 3), I=24, H=24)

    def problem(self) -> Problem:
        return Problem.of(self, module_of)

    def call(self, built: nn.Module, problem: Problem, layout: str = "time", **options: Any) -> LinearCall:
        return LinearCall(built, problem, layout, **options)

    def torch_results(self, problem: Problem, dtype: torch.dtype, device: str, *, in_parts: bool) -> dict[str, Tensor]:
        return results_of(LinearCall(module_of(self), problem, "time", dtype=dtype, device=device))


class LinearCall(Call):
    def outputs(self) -> dict[str, Tensor]:
        """Complex states as pairs."""
        return {name: torch.view_as_real(t) if t.is_complex() else t for name, t in super().outputs().items()}


def module_of(w: Workload) -> nn.Module:
    """Torch's own way."""
    return (InLogarithms if w.function == "min_gru_log" else Loop)(w.function, w.I, w.H)


def _positive(x: Tensor) -> Tensor:
    return torch.where(x >= 0, x + 0.5, x.sigmoid())


class Loop(nn.Module):
    """[T, B, I] -> [T, B, H] and the last state [1, B, H]."""

    def __init__(self, function: str, input_size: int, hidden_size: int) -> None:
        super().__init__()
        H = hidden_size
        self.function = function
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (WEIGHTS[function] * H, input_size),
            "bias_ih": (WEIGHTS[function] * H,),
        }
        if function == "qrnn":
            shapes["weight_ih"] = (3 * H, 1, input_size)
        if function == "hgrn":
            shapes["weight_norm"] = (H,)
        if function == "rg_lru":
            shapes = {f"weight_{gate}": (1, H, H) for gate in "ri"}
            shapes |= {"bias_r": (H,), "bias_i": (H,), "decay": (H,)}
        if function == "lru":
            shapes = {f"{name}_log": (H,) for name in ("nu", "theta", "gamma")}
            shapes |= {"weight_b": (2 * H, input_size), "weight_c": (H, 2 * H), "weight_d": (H, input_size)}
        for name, shape in shapes.items():
            value = torch.empty(shape).uniform_(-1 / math.sqrt(H), 1 / math.sqrt(H))
            value = value - 3 if name in ("decay", "nu_log") else value + 1 if name == "weight_norm" else value
            setattr(self, f"{name}_l0", nn.Parameter(value))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b, output = getattr(self, f"_{self.function}")(x)
        h = torch.zeros_like(b[0])
        states = []
        for a_t, b_t in zip(a.expand_as(b).unbind(), b.unbind(), strict=True):
            h = torch.addcmul(b_t, a_t, h)
            states.append(h)
        return output(torch.stack(states)), h[None]

    def of(self, name: str) -> Tensor:
        return self.get_parameter(f"{name}_l0")

    def _gates(self, x: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, self.of("weight_ih").flatten(1), self.of("bias_ih")).chunk(WEIGHTS[self.function], -1)

    def _min_gru(self, x: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        z, v = self._gates(x)
        return 1 - z.sigmoid(), z.sigmoid() * _positive(v), lambda h: h

    def _min_lstm(self, x: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        f, i, v = self._gates(x)
        both = f.sigmoid() + i.sigmoid()
        return f.sigmoid() / both, i.sigmoid() / both * _positive(v), lambda h: h

    def _hgrn(self, x: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        f, i, g = self._gates(x)
        return (
            f.sigmoid(),
            (1 - f.sigmoid()) * F.silu(i),
            lambda h: F.rms_norm(h, h.shape[-1:], self.of("weight_norm"), 1e-5) * F.silu(g),
        )

    def _rg_lru(self, x: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        r, i = (F.linear(x, self.of(f"weight_{gate}")[0], self.of(f"bias_{gate}")).sigmoid() for gate in "ri")
        log = -8 * r * F.softplus(self.of("decay"))
        root = torch.cat((torch.ones_like(log[:1]), (-torch.expm1(2 * log[1:])).sqrt()))
        return log.exp(), root * i * x, lambda h: h

    def _qrnn(self, x: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        f, z, o = self._gates(x)
        return f.sigmoid(), (1 - f.sigmoid()) * z.tanh(), lambda h: h * o.sigmoid()

    def _lru(self, x: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        eigenvalues = torch.polar((-self.of("nu_log").exp()).exp(), self.of("theta_log").exp())
        into = torch.view_as_complex(F.linear(x, self.of("weight_b")).unflatten(-1, (-1, 2)))
        C = torch.view_as_complex(self.of("weight_c").unflatten(1, (-1, 2)))
        through = F.linear(x, self.of("weight_d"))
        return eigenvalues, self.of("gamma_log").exp() * into, lambda h: (h @ C.T).real + through


class InLogarithms(nn.Module):
    """minGRU in its closed form: logarithms of the coefficients summed up, their addends by logcumsumexp."""

    def __init__(self, function: str, input_size: int, hidden_size: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(hidden_size)
        self.weight_ih_l0 = nn.Parameter(torch.empty(2 * hidden_size, input_size).uniform_(-bound, bound))
        self.bias_ih_l0 = nn.Parameter(torch.empty(2 * hidden_size).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, v = F.linear(x, self.weight_ih_l0, self.bias_ih_l0).chunk(2, -1)
        decay = F.logsigmoid(-z).cumsum(0)
        candidate = torch.where(v >= 0, (F.relu(v) + 0.5).log(), F.logsigmoid(v))
        h = (decay + (F.logsigmoid(z) + candidate - decay).logcumsumexp(0)).exp()
        return h, h[-1:]
