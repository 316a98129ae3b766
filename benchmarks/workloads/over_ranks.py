"""What several processes compute together, each on its part of a sequence: attention, an LSTM, a scan.

A `Shape` has its inputs, its truth by textbook code, its programs and the bytes that they send. `measure/ranks.py` starts the
processes and measures. A program of one process runs on the first rank alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

ONE, TORCH = "one process", "torch context_parallel"
METHODS = ("ring", "all_gather", "all_to_all")
WAVES = {"wavefront of 1 micro-batch": 1, "wavefront of 4 micro-batches": 4}
PAIRS = "scan over ranks"
Forward = tuple[Callable[[], Tensor], list[Tensor]]  # and the parameters that want a gradient


class Program:
    """Forward with backward, of this rank's part."""

    def __init__(self, forward: Callable[[], Tensor], gradient: Tensor, leaves: list[Tensor]) -> None:
        self.forward, self.gradient, self.leaves = forward, gradient, leaves

    def both(self) -> list[Tensor]:
        """The output and the gradients."""
        out = self.forward()
        return [out, *torch.autograd.grad(out, self.leaves, self.gradient)]


@dataclass(frozen=True)
class Shape:
    ranks: int
    B: int
    T: int
    rounds: int

    dim: ClassVar[int] = 0  # of steps
    sharding: ClassVar[Any] = "contiguous"
    programs: ClassVar[tuple[str, ...]] = ()

    def sizes(self, steps: int) -> list[tuple[int, ...]]:
        """Of the inputs and, last, of the gradient of the output."""
        raise NotImplementedError

    def forward(self, name: str, group: Any, inputs: list[Tensor]) -> Forward:
        """Of the program ``name``."""
        raise NotImplementedError

    def textbook(self, dtype: torch.dtype) -> list[Tensor]:
        """Output and gradients of the whole."""
        raise NotImplementedError

    def sent(self, name: str) -> float | None:
        """Bytes that all ranks together send, forward and backward, by the formula; None: there is none."""
        raise NotImplementedError

    def drawn(self, steps: int, generator: torch.Generator | None = None) -> list[Tensor]:
        return [torch.randn(size, generator=generator) for size in self.sizes(steps)]

    def whole(self) -> list[Tensor]:
        """The inputs and the gradient of the output, alike on every rank."""
        return self.drawn(self.T, torch.Generator().manual_seed(0))

    def part(self, tensor: Tensor, group: Any) -> Tensor:
        from fastseq.distributed import shard_sequence

        return shard_sequence(tensor, group, dim=self.dim, sharding=self.sharding)

    def program(self, name: str, group: Any, given: list[Tensor]) -> Any:
        """On these inputs, with this gradient of the output: a rank's own."""
        inputs = [t.requires_grad_() for t in given[:-1]]
        forward, parameters = self.forward(name, group, inputs)
        return Program(forward, given[-1], [*inputs, *parameters])

    def check_program(self, name: str, group: Any) -> Any:
        """On this rank's part of ``whole``."""
        given = self.whole()
        return self.program(name, group, given if name == ONE else [self.part(t, group) for t in given])


@dataclass(frozen=True)
class Attention(Shape):
    """Causal, in zigzag parts."""

    heads: int = 4
    kv_heads: int = 4
    E: int = 64

    dim: ClassVar[int] = 2
    sharding: ClassVar[Any] = "zigzag"
    programs: ClassVar[tuple[str, ...]] = (ONE, *METHODS, TORCH)

    def sizes(self, steps: int) -> list[tuple[int, ...]]:
        return [(self.B, heads, steps, self.E) for heads in (self.heads, self.kv_heads, self.kv_heads, self.heads)]

    def forward(self, name: str, group: Any, inputs: list[Tensor]) -> Forward:
        from fastseq.distributed import context_parallel_attention
        from fastseq.functional import attention

        q, k, v = inputs
        if name == ONE:
            return lambda: attention(q, k, v, causal=True), []
        options: dict[str, Any] = {"method": name, "sharding": self.sharding, "causal": True}
        return lambda: context_parallel_attention(q, k, v, group, **options), []

    def check_program(self, name: str, group: Any) -> Any:
        return Torchs(self) if name == TORCH else super().check_program(name, group)

    def textbook(self, dtype: torch.dtype) -> list[Tensor]:
        q, k, v, gradient = (t.to(dtype) for t in self.whole())
        leaves = [t.requires_grad_() for t in (q, k, v)]
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]

    def sent(self, name: str) -> float | None:
        """The sequence lies in 2 n zigzag runs. Forward, K and V of a run go to those who see it; backward once more, and their
        gradients come back."""
        n, head = self.ranks, self.B * 4 * self.E  # bytes of a step of a head
        run = self.T // (2 * n) * 2 * self.kv_heads * head
        if name == "ring":  # the last run is seen by none but its own rank, every other makes n - 1 hops
            return 3 * (n - 1) * (2 * n - 1) * run
        if name == "all_gather":  # rank r sees the first 2 n - r runs, two of which are its own
            return 3 * sum(2 * n - rank - 2 for rank in range(n)) * run
        if name == "all_to_all":  # q, k, v, dout there; out, lse, dq, dk, dv back
            q, kv = self.heads // n, max(self.kv_heads // n, 1)
            return n * (n - 1) * self.T // n * (4 * (q + kv) * head + 4 * self.B * q)
        return None


class Torchs:
    """torch.distributed.tensor.experimental.context_parallel, of this name from torch 2.10 to 2.14. It cuts zigzag, too."""

    def __init__(self, shape: Shape) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.mesh, self.inputs = init_device_mesh("cpu", (shape.ranks,)), shape.whole()

    def both(self) -> list[Tensor]:
        from torch.distributed.tensor.experimental import context_parallel

        buffers = [t.clone() for t in self.inputs]
        with context_parallel(self.mesh, buffers=buffers, buffer_seq_dims=[2] * 4):
            q, k, v = (t.detach().clone().requires_grad_() for t in buffers[:3])
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return [out.detach(), *torch.autograd.grad(out, (q, k, v), buffers[3].clone())]


@dataclass(frozen=True)
class Recurrence(Shape):
    """A stack of LSTMs, as wide inside as its input."""

    H: int = 128
    layers: int = 2

    programs: ClassVar[tuple[str, ...]] = (ONE, *WAVES)

    def sizes(self, steps: int) -> list[tuple[int, ...]]:
        return [(steps, self.B, self.H)] * 2

    def forward(self, name: str, group: Any, inputs: list[Tensor]) -> Forward:
        from fastseq.distributed import context_parallel

        module, (x,) = self.module(), inputs

        def across() -> Tensor:
            with context_parallel(group, micro_batches=WAVES[name]):
                return module(x)[0]

        return (lambda: module(x)[0]) if name == ONE else across, list(module.parameters())

    def module(self) -> nn.Module:
        import fastseq

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return fastseq.LSTM(self.H, self.H, self.layers)

    def textbook(self, dtype: torch.dtype) -> list[Tensor]:
        x, gradient = (t.to(dtype) for t in self.whole())
        lstm = nn.LSTM(self.H, self.H, self.layers, dtype=dtype)
        lstm.load_state_dict(self.module().state_dict())
        out, _ = lstm(x.requires_grad_())
        return [out.detach(), *torch.autograd.grad(out, (x, *lstm.parameters()), gradient)]

    def sent(self, name: str) -> float | None:
        """h and c of every layer and row: to the next rank and back, and from the last one to all and back."""
        return 4 * (self.ranks - 1) * self.layers * self.B * 2 * self.H * 4 if name in WAVES else None


@dataclass(frozen=True)
class Scan(Shape):
    """h = a h + b, with a in (0, 1)."""

    C: int = 512

    programs: ClassVar[tuple[str, ...]] = (ONE, PAIRS)

    def sizes(self, steps: int) -> list[tuple[int, ...]]:
        return [(steps, self.B, self.C)] * 3

    def drawn(self, steps: int, generator: torch.Generator | None = None) -> list[Tensor]:
        b, a, gradient = super().drawn(steps, generator)
        return [b, a.sigmoid_(), gradient]

    def forward(self, name: str, group: Any, inputs: list[Tensor]) -> Forward:
        from fastseq.distributed import context_parallel
        from fastseq.functional import scan

        def across() -> Tensor:
            with context_parallel(group):
                return scan(*inputs)[0]

        return (lambda: scan(*inputs)[0]) if name == ONE else across, []

    def textbook(self, dtype: torch.dtype) -> list[Tensor]:
        b, a, gradient = (t.to(dtype) for t in self.whole())
        leaves = [t.requires_grad_() for t in (b, a)]
        h, steps = torch.zeros_like(b[0]), []
        for b_t, a_t in zip(b, a, strict=True):
            h = a_t * h + b_t
            steps.append(h)
        out = torch.stack(steps)
        return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]

    def sent(self, name: str) -> float | None:
        """From each rank to all others: a, b and two marks of a row forward, two gradients of a state backward."""
        return self.ranks * (self.ranks - 1) * self.B * (4 * self.C + 2) * 4 if name == PAIRS else None


@functools.lru_cache(maxsize=4)
def truths(shape: Shape) -> tuple[list[Tensor], list[Tensor]]:
    """In fp64, and in fp32."""
    return shape.textbook(torch.float64), shape.textbook(torch.float32)


def this_group() -> Any:
    return dist.distributed_c10d._get_default_group()
