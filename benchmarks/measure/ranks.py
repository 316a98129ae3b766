"""Attention whose sequence lies on several processes of this machine, started here: time, bytes, memory, and what waiting costs.

The processes start once for a number of ranks and a shape, and try every program in turn: checked first, against fp64 and torch's
own error, then timed in rounds, each as long as its slowest rank. A program that raises, or is wrong, has a reason and no figure.
"""

from __future__ import annotations

import datetime
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastseq.testing import FACTOR, ROUNDINGS, relative_error

from ..workloads.base import Metric, Workload
from . import memory

ONE, TORCH = "one process", "torch context_parallel"
METHODS = ("ring", "all_gather", "all_to_all")
DELAY, PAUSE = 0.04, 0.05  # seconds that a message is late, and that a block takes longer, to see whether one hides the other
_SMALL = 1 << 16  # bytes of a message while memory is measured, so that a few of them are no matter


@dataclass(frozen=True)
class RanksWorkload(Workload):
    """Causal attention of B sequences of T steps, H = heads x head dim, I = H, over `ranks` processes with one thread each."""

    ranks: int = 2
    kv_heads: int = 4
    rounds: int = 5
    what: str = "seconds"  # or "bytes", "memory", "hidden"

    @property
    def E(self) -> int:
        return self.H // self.heads

    def problem(self) -> Nothing:
        return Nothing(self)

    def call(self, built: Any, problem: Nothing, layout: str = "", **options: Any) -> Nothing:
        return problem

    def found(self, provider: str) -> Found:
        shape = Shape(self.ranks, self.B, self.T, self.heads, self.kv_heads, self.E, self.rounds)
        return measured(shape)[provider]

    def measure(self, provider: Any) -> Metric | None:
        name, unit = {
            "seconds": ("forward and backward", "s"),
            "bytes": ("sent by a rank", "B"),
            "memory": ("of a rank, for each step more", "B"),
            "hidden": ("of a delay that is hidden", ""),
        }[self.what]
        return Metric.of(name, unit, getattr(self.found(provider.name), self.what))

    def detail(self) -> dict[str, Any]:
        return {"ranks": self.ranks, "heads": self.heads, "kv_heads": self.kv_heads, "E": self.E, "what": self.what}


@dataclass
class Nothing:
    """There is no problem to be drawn here: the processes draw it."""

    workload: RanksWorkload
    parameters: tuple[()] = ()


@dataclass(frozen=True)
class Shape:
    ranks: int
    B: int
    T: int
    heads: int
    kv_heads: int
    E: int
    rounds: int

    def sent(self, method: str) -> float | None:
        """Bytes that all ranks together send, forward and backward, by the formula; None: there is none.

        The sequence lies in 2 n zigzag runs. Forward, K and V of a run go to those who see it; backward once more, and their
        gradients come back.
        """
        n, head = self.ranks, self.B * 4 * self.E  # bytes of a step of a head
        run = self.T // (2 * n) * 2 * self.kv_heads * head
        if method == "ring":  # the last run is seen by none but its own rank, every other makes n - 1 hops
            return 3 * (n - 1) * (2 * n - 1) * run
        if method == "all_gather":  # rank r sees the first 2 n - r runs, two of which are its own
            return 3 * sum(2 * n - rank - 2 for rank in range(n)) * run
        if method == "all_to_all":  # q, k, v, dout there; out, lse, dq, dk, dv back
            q, kv = self.heads // n, max(self.kv_heads // n, 1)
            return n * (n - 1) * self.T // n * (4 * (q + kv) * head + 4 * self.B * q)
        return None


@dataclass
class Found:
    """Of a program: its rounds' seconds, the largest rank's bytes and memory, the share of a delay that was hidden."""

    seconds: list[float] = field(default_factory=list)
    bytes: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    hidden: list[float] = field(default_factory=list)
    reason: str = ""


@functools.lru_cache(maxsize=8)
def measured(shape: Shape) -> dict[str, Found]:
    """By program."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_serve, args=(shape, folder), nprocs=shape.ranks)
        return torch.load(f"{folder}/found", weights_only=False)


def _serve(rank: int, shape: Shape, folder: str) -> None:
    torch.set_num_threads(1)
    patience = datetime.timedelta(minutes=10)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=shape.ranks, timeout=patience)
    try:
        found = {name: _tried(name, shape) for name in (ONE, *METHODS, TORCH)}
        if rank == 0:
            torch.save(found, f"{folder}/found")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _tried(name: str, shape: Shape) -> Found:
    try:
        return _figures(name, shape)
    except Exception as error:  # noqa: BLE001  whatever a program raises is its result
        return Found(reason=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")


def _figures(name: str, shape: Shape) -> Found:
    from fastseq.distributed import _exchange

    found = Found()
    inputs = _inputs(shape)
    found.reason = _wrong(name, shape, inputs)
    if found.reason:
        return found
    run = _program(name, shape, inputs)
    for _ in range(shape.rounds):
        found.seconds.append(_slowest(run.both))
    if name in METHODS:
        with _exchange.counted() as traffic:
            run.both()
        sent = _gathered(traffic.bytes)
        if sum(sent) != shape.sent(name):
            raise AssertionError(f"{sum(sent)} bytes were sent, not {shape.sent(name)}")
        found.bytes = [max(sent)]
    if name == "ring":
        found.hidden = [_hidden(shape)]
    if name in (ONE, *METHODS):
        found.memory = [_growth(name, shape)]
    return found


class _Program:
    """Forward, and forward with backward, of this rank's part; of one process: of the first rank alone."""

    def __init__(self, forward: Callable[[], Tensor | None], gradient: Tensor, leaves: list[Tensor]) -> None:
        self.forward, self.gradient, self.leaves = forward, gradient, leaves

    def both(self) -> list[Tensor] | None:
        out = self.forward()
        return None if out is None else [out, *torch.autograd.grad(out, self.leaves, self.gradient)]


def _inputs(shape: Shape, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v and the gradient of the output, whole."""
    g = torch.Generator().manual_seed(0)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    return [torch.randn(shape.B, h, shape.T, shape.E, generator=g).to(dtype) for h in heads]


def _program(name: str, shape: Shape, inputs: list[Tensor]) -> _Program:
    from fastseq.distributed import context_parallel_attention, shard_sequence
    from fastseq.functional import attention

    group = dist.distributed_c10d._get_default_group()
    if name == ONE:
        q, k, v = (t.clone().requires_grad_() for t in inputs[:3])
        own = dist.get_rank() == 0
        return _Program(lambda: attention(q, k, v, causal=True) if own else None, inputs[3], [q, k, v])
    if name == TORCH:
        return _Torchs(shape, inputs)
    parts = [shard_sequence(t, group, dim=2, sharding="zigzag") for t in inputs]
    q, k, v = (t.requires_grad_() for t in parts[:3])
    options: dict[str, Any] = {"method": name, "sharding": "zigzag", "causal": True}
    return _Program(lambda: context_parallel_attention(q, k, v, group, **options), parts[3], [q, k, v])


class _Torchs(_Program):
    """torch.distributed.tensor.experimental.context_parallel, of this name from torch 2.10 to 2.14. It cuts zigzag, too."""

    def __init__(self, shape: Shape, inputs: list[Tensor]) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        super().__init__(lambda: None, inputs[3], [])
        self.mesh, self.inputs = init_device_mesh("cpu", (shape.ranks,)), inputs

    def both(self) -> list[Tensor]:
        from torch.distributed.tensor.experimental import context_parallel

        buffers = [t.clone() for t in self.inputs]
        with context_parallel(self.mesh, buffers=buffers, buffer_seq_dims=[2] * 4):
            q, k, v = (t.detach().clone().requires_grad_() for t in buffers[:3])
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return [out.detach(), *torch.autograd.grad(out, (q, k, v), buffers[3].clone())]


def _wrong(name: str, shape: Shape, inputs: list[Tensor]) -> str:
    """Why a program is not to be timed, on every rank; "": it is right."""
    from fastseq.distributed import shard_sequence

    truth, plain = (_textbook(shape, dtype) for dtype in (torch.float64, torch.float32))
    own_error = max(relative_error(a, b) for a, b in zip(plain, truth, strict=True))
    results, reason = _program(name, shape, inputs).both(), ""
    if results is not None:
        for found, exact in zip(results, truth, strict=True):
            if name != ONE:
                exact = shard_sequence(exact, dist.distributed_c10d._get_default_group(), dim=2, sharding="zigzag")
            bound = FACTOR * own_error + (ROUNDINGS + 2 * shape.ranks) * torch.finfo(torch.float32).eps
            error = (found.double() - exact).abs().max().item() / exact.abs().max().item()
            if not error <= bound:
                reason = f"off by {error:.1e} of the largest value; {bound:.1e} is allowed"
    return next((text for text in _gathered(reason) if text), "")


@functools.lru_cache(maxsize=2)
def _textbook(shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    q, k, v, gradient = _inputs(shape, dtype)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def _gathered(value: Any) -> list[Any]:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _slowest(run: Callable[[], object]) -> float:
    """Seconds of the slowest rank."""
    dist.barrier()
    start = time.perf_counter()
    run()
    return max(_gathered(time.perf_counter() - start))


def _hidden(shape: Shape) -> float:
    """The share of what messages are late that a forward pass of the ring does not wait for."""
    from fastseq.distributed import attention

    module: Any = attention
    group, attend = dist.distributed_c10d._get_default_group(), module._attend
    q, k, v = (torch.randn(1, 4, 16, 16) for _ in range(3))

    def slowly(*args: Any) -> Any:
        time.sleep(PAUSE)
        return attend(*args)

    module._attend = slowly
    try:
        plain = min(_slowest(lambda: module.context_parallel_attention(q, k, v, group)) for _ in range(5))
        with delayed(DELAY):
            late = min(_slowest(lambda: module.context_parallel_attention(q, k, v, group)) for _ in range(5))
    finally:
        module._attend = attend
    return 1 - (late - plain) / ((shape.ranks - 1) * DELAY)


@contextmanager
def delayed(seconds: float) -> Iterator[None]:
    """Messages of this process arrive so much after they were posted."""
    from fastseq.distributed._exchange import Batch

    post, wait = Batch.post, Batch.wait

    def posted(self: Any) -> Batch:
        self.due = time.perf_counter() + seconds
        return post(self)

    def waited(self: Any) -> None:
        if self._works:
            time.sleep(max(0.0, self.due - time.perf_counter()))
        wait(self)

    Batch.post, Batch.wait = posted, waited  # type: ignore[method-assign]
    try:
        yield
    finally:
        Batch.post, Batch.wait = post, wait  # type: ignore[method-assign]


def _growth(name: str, shape: Shape) -> float:
    """Bytes at the peak for each step of the whole sequence, from T and twice as many steps: what does not grow is not in it."""
    from fastseq.distributed import _exchange

    before = _exchange.MESSAGE, _exchange.FEWEST
    _exchange.MESSAGE, _exchange.FEWEST = _SMALL, 32
    try:
        peaks = [_peak(name, replace(shape, T=T)) for T in (shape.T, 2 * shape.T)]
    finally:
        _exchange.MESSAGE, _exchange.FEWEST = before
    return (peaks[1] - peaks[0]) / shape.T


def _peak(name: str, shape: Shape) -> int:
    """Of the largest rank: its part of the inputs, results and all between."""
    from fastseq.distributed import context_parallel_attention
    from fastseq.functional import attention

    def run() -> None:
        t = shape.T if name == ONE else shape.T // shape.ranks
        heads = shape.heads, shape.kv_heads, shape.kv_heads
        q, k, v = (torch.randn(shape.B, h, t, shape.E, requires_grad=True) for h in heads)
        if name == ONE:
            out = attention(q, k, v, causal=True)
        else:
            group = dist.distributed_c10d._get_default_group()
            options: dict[str, Any] = {"method": name, "sharding": "zigzag", "causal": True}
            out = context_parallel_attention(q, k, v, group, **options)
        out.backward(torch.randn_like(out))

    return max(_gathered(memory.observe(run).peak_bytes))
