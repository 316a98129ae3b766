"""Sequences that lie on several processes of this machine, started here: time, bytes, memory, and what waiting costs.

The processes start once for a number of ranks, and try every program of every shape (`workloads/over_ranks.py`) in turn:
checked first, against fp64 and torch's own error, then timed in rounds, each as long as its slowest rank. A program that raises,
or is wrong, has a reason and no figure.
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

from fastseq.testing import FACTOR, ROUNDINGS, relative_error

from ..workloads.base import Metric, Workload
from ..workloads.over_ranks import ONE, TORCH, Attention, Recurrence, Scan, Shape, this_group, truths
from . import memory

ATTENTION, RECURRENCE, SCAN = "attention over ranks", "recurrence over ranks", "scan over ranks"
DELAY, PAUSE = 0.04, 0.05  # seconds that a message is late, and that a block takes longer, to see whether one hides the other
_SMALL = 1 << 16  # bytes of a message while memory is measured, so that a few of them are no matter


@dataclass(frozen=True)
class RanksWorkload(Workload):
    """B sequences of T steps over `ranks` processes with one thread each, by function: causal attention, H = heads x head dim;
    LSTMs with I = H; a scan of H channels."""

    ranks: int = 2
    kv_heads: int = 4
    layers: int = 2  # of LSTMs
    rounds: int = 5
    what: str = "seconds"  # or "bytes", "memory", "hidden"
    beside: tuple[Shape, ...] = ()  # which the same processes measure

    @property
    def shape(self) -> Shape:
        common = (self.ranks, self.B, self.T, self.rounds)
        if self.function == RECURRENCE:
            return Recurrence(*common, self.H, self.layers)
        if self.function == SCAN:
            return Scan(*common, self.H)
        return Attention(*common, self.heads, self.kv_heads, self.H // self.heads)

    def problem(self) -> Nothing:
        return Nothing(self)

    def call(self, built: Any, problem: Nothing, layout: str = "", **options: Any) -> Nothing:
        return problem

    def found(self, provider: str) -> Found:
        return measured(self.ranks, self.beside or (self.shape,))[self.shape][provider]

    def measure(self, provider: Any) -> Metric | None:
        name, unit = {
            "seconds": ("forward and backward", "s"),
            "bytes": ("sent by a rank", "B"),
            "memory": ("of a rank, for each step more", "B"),
            "hidden": ("of a delay that is hidden", ""),
        }[self.what]
        return Metric.of(name, unit, getattr(self.found(provider.name), self.what))

    def detail(self) -> dict[str, Any]:
        own: dict[str, Any] = {"ranks": self.ranks, "what": self.what}
        if self.function == ATTENTION:
            own |= {"heads": self.heads, "kv_heads": self.kv_heads, "E": self.H // self.heads}
        return own | ({"layers": self.layers} if self.function == RECURRENCE else {})


@dataclass
class Nothing:
    """There is no problem to be drawn here: the processes draw it."""

    workload: RanksWorkload
    parameters: tuple[()] = ()


@dataclass
class Found:
    """Of a program: its rounds' seconds, the largest rank's bytes and memory, the share of a delay that was hidden."""

    seconds: list[float] = field(default_factory=list)
    bytes: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    hidden: list[float] = field(default_factory=list)
    reason: str = ""


@functools.lru_cache(maxsize=8)
def measured(ranks: int, shapes: tuple[Shape, ...]) -> dict[Shape, dict[str, Found]]:
    """By shape and program."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_serve, args=(ranks, shapes, folder), nprocs=ranks)
        return torch.load(f"{folder}/found", weights_only=False)


def _serve(rank: int, ranks: int, shapes: tuple[Shape, ...], folder: str) -> None:
    torch.set_num_threads(1)
    patience = datetime.timedelta(minutes=10)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks, timeout=patience)
    try:
        found = {shape: {name: _tried(name, shape) for name in shape.programs} for shape in shapes}
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
    program = shape.check_program(name, this_group())
    run = program.both if name != ONE or dist.get_rank() == 0 else lambda: None
    found.reason = _wrong(name, shape, run)
    if found.reason:
        return found
    for _ in range(shape.rounds):
        found.seconds.append(_slowest(run))
    if name not in (ONE, TORCH):
        with _exchange.counted() as traffic:
            run()
        sent = _gathered(traffic.bytes)
        if sum(sent) != shape.sent(name):
            raise AssertionError(f"{sum(sent)} bytes were sent, not {shape.sent(name)}")
        found.bytes = [max(sent)]
    if name == "ring":
        found.hidden = [_hidden(shape)]
    if name != TORCH:
        found.memory = [_growth(name, shape)]
    return found


def _wrong(name: str, shape: Shape, run: Callable[[], Any]) -> str:
    """Why a program is not to be timed, on every rank; "": it is right."""
    truth, plain = truths(shape)
    own_error = max(relative_error(a, b) for a, b in zip(plain, truth, strict=True))
    results, reason, of_steps = run(), "", len(shape.sizes(0))  # results that lie along the sequence; parameters follow
    for place, (found, exact) in enumerate(zip(results, truth, strict=True) if results else ()):
        if name != ONE and place < of_steps:
            exact = shape.part(exact, this_group())
        elif name != ONE:
            found = found.clone()
            dist.all_reduce(found)
        bound = FACTOR * own_error + (ROUNDINGS + 2 * shape.ranks) * torch.finfo(torch.float32).eps
        error = (found.double() - exact).abs().max().item() / exact.abs().max().item()
        if not error <= bound:
            reason = f"off by {error:.1e} of the largest value; {bound:.1e} is allowed"
    return next((text for text in _gathered(reason) if text), "")


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
    group, attend = this_group(), module._attend
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

    def run() -> None:
        program = shape.program(name, this_group(), shape.drawn(shape.T if name == ONE else shape.T // shape.ranks))
        program.both()

    alone = name == ONE and dist.get_rank() > 0
    return max(_gathered(0 if alone else memory.observe(run).peak_bytes))
