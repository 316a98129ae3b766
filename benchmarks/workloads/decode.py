"""Decoding with one layer: the context at once (prefill), then token by token with the state or the cache that it left.

A decoder is a module with the parameters of its function's own and two methods, letters as in workloads.py, W = I = H:

    prefill(x [T, B, W], room)  -> (outputs [T, B, W], state)    `room`: tokens that are yet to come
    step(x [B, W], state)       -> (output [B, W], next state)

The truth is one causal pass over context and tokens, in fp64, which knows neither states nor caches.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import FUNCTIONS, GATES, Problem, Workload, load
from .layers import TransformerBlock, materialized

PREFILL, TOKENS = "prefill", "tokens"  # the stages


@dataclass(frozen=True)
class DecodeWorkload(Workload):
    """A context of T tokens, or `new` tokens after it, one by one."""

    stage: str = TOKENS
    new: int = 16

    @property
    def steps(self) -> int:
        return self.T if self.stage == PREFILL else self.new

    @property
    def tokens(self) -> int:
        return self.steps * self.B

    @property
    def growth(self) -> int:
        return 1

    @property
    def weights(self) -> int:
        """Elements of the matrices."""
        return GATES[self.function] * self.H * (self.I + self.H) if self.function in GATES else 8 * self.H * self.H

    @property
    def state_bytes(self) -> int:
        """What a decoder keeps of the context: states of fixed size, or a key and a value for each token."""
        states = {"lstm": 2, "gru": 1, "rnn": 1}.get(self.function, 2 * self.T)
        return states * self.B * self.H * self.torch_dtype.itemsize

    def cost(self) -> tuple[int, float, float]:
        """A recurrence goes token by token in either stage, and attention in the second."""
        weights, moved = self.weights, self.weights * self.torch_dtype.itemsize
        if self.function in GATES:
            if self.stage == PREFILL:  # the input is projected at once, which is the smaller part and left out
                weights, moved = (n * self.H // (self.I + self.H) for n in (weights, moved))
            return self.steps, 2.0 * self.B * weights, moved
        if self.stage == PREFILL:
            return 1, 2.0 * self.B * self.T * (weights + (self.T + 1) * self.H), moved
        return self.new, 2.0 * self.B * (weights + 2 * self.T * self.H), moved + self.state_bytes

    def small(self) -> DecodeWorkload:
        return replace(self, T=min(self.T, 7), B=min(self.B, 3), I=24, H=24, new=min(self.new, 3))

    def problem(self) -> Problem:
        """Its input is context and tokens, [T + new, B, W]."""
        sizes = self.T + self.new, self.B, self.I, self.H
        return Problem.of(Workload(self.function, *sizes, dtype=self.dtype, heads=self.heads, seed=self.seed))

    def call(self, built: nn.Module, problem: Problem, layout: str = "", **options: Any) -> DecodeCall:
        return DecodeCall(built, problem, **options)

    def torch_results(self, problem: Problem, dtype: torch.dtype, device: str, *, in_parts: bool) -> dict[str, Tensor]:
        """On the workload's own device, fp64 as well. Of attention row by row, and only the queries that are asked for."""
        module = FUNCTIONS[self.function].module(self).to(device=self.device, dtype=dtype)
        load(module, problem.parameters)
        end = self.T + (self.new if self.stage == TOKENS else 0)
        rows = problem.x[:end].split(self.B if self.function in GATES else 1, dim=1)
        with torch.inference_mode():
            found = [whole(module, row.to(device=self.device, dtype=dtype), self.steps).cpu() for row in rows]
        return {"output": torch.cat(found, dim=1)}

    def detail(self) -> dict[str, Any]:
        return {"stage": self.stage, "new": self.new, "state bytes": self.state_bytes}


def whole(module: nn.Module, x: Tensor, last: int) -> Tensor:
    """The `last` outputs of a causal pass over x, [S, B, W]: every score of their queries in memory."""
    if not isinstance(module, TransformerBlock):
        return module(x)[0][-last:]
    x = x.transpose(0, 1)
    q, k, v = module.attention.split(module.attention_norm(x))
    y = module.attention.join(materialized(q[:, :, -last:], k, v))
    return module.feed_forward(x[:, -last:] + y).transpose(0, 1)


class DecodeCall:
    """A decoder on a problem: what is timed (`run`) and what is compared (`outputs`)."""

    mode = "inference"

    def __init__(
        self, decoder: nn.Module, problem: Problem, *, dtype: torch.dtype | None = None, device: str | None = None
    ) -> None:
        w: Any = problem.workload
        self.stage, self.room = w.stage, w.new
        place: dict[str, Any] = {"device": device or w.device, "dtype": dtype or w.torch_dtype}
        built: Any = decoder.to(**place).eval()
        self.decoder = built
        self.parameters = list(self.decoder.parameters())
        load(self.decoder, problem.parameters)
        self.context_tokens, new = problem.x.to(**place).split((w.T, w.new))
        self.new = new.unbind(0)
        if self.stage == TOKENS:
            with self.context():
                _, self.state = self.decoder.prefill(self.context_tokens, self.room)

    @property
    def run(self) -> Callable[[], object]:
        return self.forward

    def forward(self) -> tuple[Any, Any]:
        """Outputs, of every token, and the last state."""
        if self.stage == PREFILL:
            return self.decoder.prefill(self.context_tokens, self.room)
        state, outputs = self.state, []
        for x in self.new:
            y, state = self.decoder.step(x, state)
            outputs.append(y)
        return outputs, state

    def context(self) -> AbstractContextManager[Any]:
        return torch.inference_mode()

    def outputs(self) -> dict[str, Tensor]:
        with self.context():
            found, _ = self.forward()
        return {"output": found if self.stage == PREFILL else torch.stack(found)}


class LayerDecoder(nn.Module):
    """A recurrent layer, called with one step."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def canonical_name(self, name: str) -> str:
        return name.removeprefix("layer.")

    def prefill(self, x: Tensor, room: int) -> tuple[Tensor, Any]:
        y, state = self.layer(x)
        return y, state

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.layer(x[None], state)
        return y[0], state


class CellDecoder(nn.Module):
    """A cell; its prefill is a loop."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def canonical_name(self, name: str) -> str:
        return name.removeprefix("cell.") + "_l0"

    def prefill(self, x: Tensor, room: int) -> tuple[Tensor, Any]:
        state, outputs = None, []
        for step in x.unbind(0):
            y, state = self.step(step, state)
            outputs.append(y)
        return torch.stack(outputs), state

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        state = self.cell(x, state)
        return (state[0] if isinstance(state, tuple) else state), state


class Cache(NamedTuple):
    """Keys and values [B, heads, S, E], of which the first `length` are there: an int, or [B] of int32 on the device."""

    k: Tensor
    v: Tensor
    length: Any


class BlockDecoder(TransformerBlock):
    """The attention block with a cache; a subclass says how it grows and who reads it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads, fused=True)

    def prefill(self, x: Tensor, room: int) -> tuple[Tensor, Cache]:
        x = x.transpose(0, 1)
        q, k, v = self.attention.split(self.attention_norm(x))
        y = self.causal(q, k, v)
        return self.feed_forward(x + self.attention.join(y)).transpose(0, 1), self.cached(k, v, room)

    def step(self, x: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        x = x[:, None]
        q, k, v = self.attention.split(self.attention_norm(x))
        y, cache = self.attend(q, k, v, cache)
        return self.feed_forward(x + self.attention.join(y))[:, 0], cache

    def causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def cached(self, k: Tensor, v: Tensor, room: int) -> Cache:
        T = k.shape[2]
        k, v = (F.pad(t, (0, 0, 0, room)) for t in (k, v))
        return Cache(k, v, T)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        raise NotImplementedError


class Growing(BlockDecoder):
    """Each token's key and value are concatenated to the cache, as transformers' DynamicCache does."""

    def cached(self, k: Tensor, v: Tensor, room: int) -> Cache:
        return Cache(k, v, k.shape[2])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        k, v = torch.cat((cache.k, k), dim=2), torch.cat((cache.v, v), dim=2)
        return F.scaled_dot_product_attention(q, k, v), Cache(k, v, cache.length + 1)


class Reserved(BlockDecoder):
    """The cache has room for what is to come; torch's attention reads the part that is filled."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        n = cache.length
        cache.k[:, :, n : n + 1], cache.v[:, :, n : n + 1] = k, v
        y = F.scaled_dot_product_attention(q, cache.k[:, :, : n + 1], cache.v[:, :, : n + 1])
        return y, Cache(cache.k, cache.v, n + 1)


class Own(BlockDecoder):
    """The same cache, written and read by fastseq; the lengths stay on the device, as a server with unequal rows has them."""

    def causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _functional().attention(q, k, v, causal=True)

    def cached(self, k: Tensor, v: Tensor, room: int) -> Cache:
        k, v, T = super().cached(k, v, room)
        return Cache(k, v, torch.full((k.shape[0],), T, dtype=torch.int32, device=k.device))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        y = _functional().attention_with_kv_cache(q, cache.k, cache.v, cache_seqlens=cache.length, k_new=k, v_new=v)
        return y, Cache(cache.k, cache.v, cache.length + 1)


def _functional() -> Any:
    return importlib.import_module("fastseq.functional")
