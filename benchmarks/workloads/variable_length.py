"""Rows of unequal length in one batch: padded, packed, with lengths, concatenated; for recurrence and for attention.

Every provider gets the input in its own layout and gives its output in it, as an input pipeline would hand it over; masks and
offsets are there before the clock starts. What is compared are the valid rows alone, one sequence after the other: [N, width].

    time    [T, B, I], zeros beyond a row's length     packed  a PackedSequence
    batch   [B, T, I], likewise                        rows    [N, I], one sequence after the other
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from .base import FUNCTIONS, GATES, Call, Problem, Workload, results_of
from .layers import TransformerBlock

SPREADS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda u: u,  # of 0..T, half of it padding
    "skewed": lambda u: u**3,  # many short ones and few long ones, three quarters padding
}


@dataclass(frozen=True)
class VariableWorkload(Workload):
    """B rows whose lengths are spread over 1..T; one of them has T steps."""

    spread: str = "skewed"

    @cached_property
    def lengths(self) -> list[int]:
        drawn = SPREADS[self.spread](torch.rand(self.B - 1, generator=self.generator(), dtype=torch.float64))
        return [self.T, *(drawn * self.T).ceil().clamp(min=1).long().tolist()]

    @property
    def offsets(self) -> list[int]:
        """Where each sequence begins among the rows, and where the last one ends: [B + 1]."""
        return [0, *accumulate(self.lengths)]

    @property
    def waste(self) -> float:
        """Share of a padded batch that is padding."""
        return 1 - self.tokens / (self.T * self.B)

    def cost(self) -> tuple[int, float, float] | None:
        """Of attention: its products over the valid rows."""
        if self.function in GATES:
            return None
        pairs = sum(n * n for n in self.lengths)
        flops = 2.0 * self.tokens * 8 * self.H * self.H + 4.0 * pairs * self.H
        return 1, flops * (3 if self.mode == "training" else 1), 2.0 * self.tokens * self.H * self.torch_dtype.itemsize

    def small(self) -> VariableWorkload:
        return replace(self, T=min(self.T, 7), B=min(self.B, 3), I=24, H=24)

    def call(self, built: nn.Module, problem: Problem, layout: str, **options: Any) -> VariableCall:
        return VariableCall(built, problem, layout, **options)

    def torch_results(self, problem: Problem, dtype: torch.dtype, device: str, *, in_parts: bool) -> dict[str, Tensor]:
        """Each sequence alone, which needs no padding and no mask."""
        function = FUNCTIONS[self.function]
        parts = []
        for b, n in enumerate(self.lengths):
            plain = Workload(self.function, n, 1, self.I, self.H, self.mode, heads=self.heads)
            part = Problem(plain, problem.parameters, problem.x[:n, b : b + 1], problem.grad[:n, b : b + 1])
            parts.append(results_of(Call(function.module(self), part, function.layout, dtype=dtype, device=device)))
        found = {name: torch.cat([part[name][:, 0] for part in parts]) for name in ("output", "grad input") if name in parts[0]}
        learned = [name for name in parts[0] if name.startswith("grad ") and name != "grad input"]
        return found | {name: torch.stack([part[name] for part in parts]).sum(0) for name in learned}

    def detail(self) -> dict[str, Any]:
        return {"spread": self.spread, "padding": self.waste}


class VariableCall(Call):
    """A module on rows of unequal length, in its own layout."""

    def __init__(self, module: nn.Module, problem: Problem, layout: str, **options: Any) -> None:
        self.workload: Any = problem.workload
        super().__init__(module, problem, layout, **options)

    def _place(self, t: Tensor, w: Any) -> Tensor | PackedSequence:
        lengths = torch.tensor(w.lengths)
        if self.layout == "packed":
            return pack_padded_sequence(t, lengths, enforce_sorted=False)
        if self.layout == "rows":
            return torch.cat([t[:n, b] for b, n in enumerate(w.lengths)])
        valid = torch.arange(w.T)[:, None] < lengths
        t = t * valid[..., None].to(t)
        return t.transpose(0, 1).contiguous() if self.layout == "batch" else t

    def _restore(self, t: Tensor) -> Tensor:
        """The valid rows, [N, ...]."""
        w = self.workload
        if self.layout == "rows":
            return t
        if self.layout == "packed":
            places = pack_padded_sequence(
                torch.arange(w.T * w.B).view(w.T, w.B), torch.tensor(w.lengths), enforce_sorted=False
            ).data
            padded = t.new_zeros(w.T * w.B, *t.shape[1:])
            padded[places.to(t.device)] = t
            t = padded.view(w.T, w.B, *t.shape[1:])
        elif self.layout == "batch":
            t = t.transpose(0, 1)
        return torch.cat([t[:n, b] for b, n in enumerate(w.lengths)])

    def outputs(self) -> dict[str, Tensor]:
        """Outputs alone: the last states of a padded batch are those of padding."""
        return {"output": super().outputs()["output"]}


class WithLengths(nn.Module):
    """A recurrent layer that is told the lengths of a padded batch."""

    def __init__(self, layer: nn.Module, lengths: list[int]) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("lengths", torch.tensor(lengths))

    def canonical_name(self, name: str) -> str:
        return name.removeprefix("layer.")

    def forward(self, x: Tensor) -> Any:
        return self.layer(x, lengths=self.lengths)


class EncoderBlock(TransformerBlock):
    """A block in which every valid position of a row sees every other; a subclass says how they find each other."""

    lengths: Tensor
    offsets: Tensor

    def __init__(self, w: VariableWorkload) -> None:
        super().__init__(w.H, w.heads, fused=True)
        self.longest, self.shortest = w.T, min(w.lengths)
        self.register_buffer("lengths", torch.tensor(w.lengths, dtype=torch.int32))
        self.register_buffer("offsets", torch.tensor(w.offsets, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, W], or the rows alone: [N, W]."""
        batch = x if x.dim() == 3 else x[None]
        y = self.attention.join(self.attend(*self.attention.split(self.attention_norm(batch))))
        return self.feed_forward(batch + y).view_as(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, heads, T, E] each; of rows [1, heads, N, E]."""
        raise NotImplementedError


class Masked(EncoderBlock):
    """torch's attention with a mask over padding, [B, 1, 1, T]."""

    visible: Tensor

    def __init__(self, w: VariableWorkload) -> None:
        super().__init__(w)
        self.register_buffer("visible", (torch.arange(w.T) < torch.tensor(w.lengths)[:, None])[:, None, None])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, self.visible)


class Nested(EncoderBlock):
    """torch's attention on jagged tensors."""

    def __init__(self, w: VariableWorkload) -> None:
        super().__init__(w)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says once, at the first attention, that these tensors are a prototype
            one = torch.nested.nested_tensor_from_jagged(torch.zeros(1, 1, 1), torch.tensor([0, 1])).transpose(1, 2)
            F.scaled_dot_product_attention(one, one, one)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with ExitStack() as stack:
            for manager in _differentiable_views():
                stack.enter_context(manager)
            rows = [_rows(t).contiguous() for t in (q, k, v)]  # which this way asks for
            q, k, v = (
                torch.nested.nested_tensor_from_jagged(
                    t, self.offsets, min_seqlen=self.shortest, max_seqlen=self.longest
                ).transpose(1, 2)
                for t in rows
            )
            return _heads_first(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).values())


def _differentiable_views() -> list[AbstractContextManager[Any]]:
    """torch makes no jagged view in inference mode; without gradients it does."""
    return [torch.inference_mode(False), torch.no_grad()] if torch.is_inference_mode_enabled() else []


class Lengths(EncoderBlock):
    """fastseq's attention, told the lengths of a padded batch."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attention = importlib.import_module("fastseq.functional").attention
        return attention(q, k, v, seqlens_q=self.lengths, seqlens_k=self.lengths)


class Rows(EncoderBlock):
    """fastseq's attention on concatenated rows."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attention = importlib.import_module("fastseq.functional").attention
        where = {"cu_seqlens_q": self.offsets, "cu_seqlens_k": self.offsets}
        most = {"max_seqlen_q": self.longest, "max_seqlen_k": self.longest}
        return _heads_first(attention(*(_rows(t) for t in (q, k, v)), **where, **most))


class FlashRows(EncoderBlock):
    """flash-attn's function for concatenated rows."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attention = importlib.import_module("flash_attn").flash_attn_varlen_func
        return _heads_first(attention(*(_rows(t) for t in (q, k, v)), *2 * (self.offsets,), *2 * (self.longest,)))


def _rows(t: Tensor) -> Tensor:
    """[1, heads, N, E] -> [N, heads, E]."""
    return t[0].transpose(0, 1)


def _heads_first(t: Tensor) -> Tensor:
    return t.transpose(0, 1)[None]


def flash_missing(w: Workload) -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    if not w.device.startswith("cuda") or w.dtype not in ("float16", "bfloat16"):
        return "flash-attn takes fp16 and bf16 on a GPU"
    return None
