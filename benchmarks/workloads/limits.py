"""Workloads that one limit of the machine binds and nothing else, and the programs that come closest to it.

read     one buffer again and again, each thread its share, as recurrent weights are read at every step
copy     one buffer into another
product  a square matrix product of random numbers: the arithmetic within reach of a torch program
fma      multiply-adds of numbers that stay in a CPU's registers: the arithmetic beyond every program's reach (csrc/limits)
launch   the shortest operator
grid barrier, cluster barrier, grid hand-off, cluster hand-off
         CTAs of one kernel that wait for each other, or pass a state on, in every one of T steps: through flags in global
         memory, or in a cluster (csrc/limits)

Letters: T times in a row, B threads that share a buffer or have numbers of their own, H KiB of a buffer, order of the matrices,
or numbers of a thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .base import Workload, results_of

AMOUNTS = {"read": "B", "copy": "B", "product": "FLOP", "fma": "FLOP", "launch": "launch"}  # what a rate counts
# Bytes of one measurement, so that what is around it does not count.
READ_TOTAL = {"cpu": 48 << 20, "cuda": 2 << 30}
COPY_TOTAL = {"cpu": 64 << 20, "cuda": 1 << 30}
LAUNCHES = 100
SAMPLES = 64  # rows of a result that are compared
EXCHANGE_STEPS = 2000
HAND_OFF_VECTORS = 32  # of 16 bytes: the bf16 states of 8 sequences in 32 units, as a CTA of a persistent LSTM passes them on
HAND_OFF_CTAS = 16
TORCH = {"read": "torch.sum", "copy": "Tensor.copy_", "product": "torch.mm", "launch": "Tensor.fill_"}  # programs of torch
FMA_STEPS = 1 << 18  # about a millisecond; fp32 counts them exactly, as it would 2^24
FMA_NUMBERS = 384  # a whole number of times what any instruction set holds in registers (csrc/limits/fma_op.h)
FMA_DTYPES = ("float32", "float64")


@dataclass(frozen=True)
class LimitWorkload(Workload):
    @property
    def kind(self) -> str:
        return self.device.partition(":")[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the operand."""
        if self.function == "product":
            return self.H, self.H
        if self.function == "fma":
            return self.B, self.H
        return ((self.H << 10) // self.torch_dtype.itemsize // self.B,) if self.function in ("read", "copy") else (1,)

    @property
    def amount(self) -> int:
        """Bytes, FLOP or launches of a call."""
        size = math.prod(self.shape)
        each = {
            "read": size * self.torch_dtype.itemsize,
            "copy": 2 * size * self.torch_dtype.itemsize,
            "product": 2 * size * self.H,
            "fma": 2 * size,
        }
        return self.T * each.get(self.function, 1)

    @property
    def launches(self) -> int:
        return self.T if self.function in ("copy", "launch") else 1

    @property
    def growth(self) -> int:
        return 0

    def small(self) -> LimitWorkload:
        return replace(self, T=min(self.T, 7), H=self.H if self.function == "fma" else min(self.H, 24))

    def problem(self) -> LimitProblem:
        a = torch.randn(self.shape, generator=self.generator(), dtype=torch.float64)
        if self.function == "fma":
            a = (8 * a).round()  # whole numbers, that counting from them is exact
        return LimitProblem(self, a.to(self.torch_dtype).double())

    def call(self, built: Program, problem: LimitProblem, layout: str = "", **options: Any) -> LimitCall:
        return LimitCall(built, problem, **options)

    def torch_results(self, problem: LimitProblem, dtype: torch.dtype, device: str, *, in_parts: bool) -> dict[str, Tensor]:
        """In parts: by the definition, and only what is compared."""
        if not in_parts and self.function in TORCH:
            return results_of(LimitCall(PROGRAMS[self.function], problem, dtype=dtype, device=device))
        return {"result": _truth(self, problem.a)}

    def detail(self) -> dict[str, Any]:
        return {"amount": self.amount, "unit": AMOUNTS.get(self.function, ""), "precision": self.precision}


def read(device: str, kib: int, threads: int) -> LimitWorkload:
    w = LimitWorkload("read", 1, 1, kib, kib, threads=threads, device=device)
    B = threads if w.kind == "cpu" else 1
    return replace(w, T=B * max(2, math.ceil(READ_TOTAL[w.kind] / (kib << 10))), B=B)


def copy(device: str, kib: int, threads: int) -> LimitWorkload:
    w = LimitWorkload("copy", 1, 1, kib, kib, threads=threads, device=device)
    return replace(w, T=max(1, COPY_TOTAL[w.kind] // (kib << 10)))


def product(device: str, order: int, threads: int, **precision: Any) -> LimitWorkload:
    return LimitWorkload("product", 1, 1, order, order, threads=threads, device=device, **precision)


def fma(device: str, threads: int, **precision: Any) -> LimitWorkload:
    return LimitWorkload("fma", FMA_STEPS, threads, FMA_NUMBERS, FMA_NUMBERS, threads=threads, device=device, **precision)


def launch(device: str, threads: int) -> LimitWorkload:
    return LimitWorkload("launch", LAUNCHES, 1, 1, 1, threads=threads, device=device)


def exchange(device: str, name: str, threads: int) -> LimitWorkload:
    return LimitWorkload(name, EXCHANGE_STEPS, 1, 1, 1, threads=threads, device=device)


@dataclass
class LimitProblem:
    """The operand in fp64 on the CPU, rounded to the workload's dtype."""

    workload: LimitWorkload
    a: Tensor


Program = Callable[[LimitWorkload, Tensor], Callable[[], Tensor]]


def _read(w: LimitWorkload, a: Tensor) -> Callable[[], Tensor]:
    return lambda: a.expand(w.T, len(a)).sum(1)  # threads share the outputs


def _copy(w: LimitWorkload, a: Tensor) -> Callable[[], Tensor]:
    out = torch.full_like(a, torch.nan)
    return lambda: [out.copy_(a) for _ in range(w.T)][-1]


def _product(w: LimitWorkload, a: Tensor) -> Callable[[], Tensor]:
    out = torch.full_like(a, torch.nan)
    return lambda: torch.mm(a, a, out=out)


def _fma(w: LimitWorkload, a: Tensor) -> Callable[[], Tensor]:
    """One is added to every number, T times, as a product with one and a sum: numbers that cost no more than any others."""
    results = torch.full_like(a, torch.nan)

    def run() -> Tensor:
        torch.ops.fastseq_native.fma(a, 1.0, 1.0, w.T, results)
        return results

    return run


def _launch(w: LimitWorkload, a: Tensor) -> Callable[[], Tensor]:
    out = torch.full_like(a, torch.nan)
    return lambda: [out.fill_(1.0) for _ in range(w.T)][-1]


def _exchange(w: LimitWorkload, a: Tensor) -> Callable[[], Tensor]:
    limits = gpu_limits(a.device)
    ctas = limits.multiprocessors if w.function == "grid barrier" else HAND_OFF_CTAS
    if w.function.startswith("cluster"):
        ctas = min(ctas, limits.cluster)
    flags, results = (torch.zeros(ctas, dtype=torch.int32, device=a.device) for _ in range(2))
    operands = torch.empty(32 * ctas * HAND_OFF_VECTORS, dtype=torch.uint8, device=a.device)

    def run() -> Tensor:
        flags.zero_()
        torch.ops.fastseq_native.exchange(w.function, w.T, ctas, HAND_OFF_VECTORS, flags, operands, results)
        return results

    return run


EXCHANGES = ("grid barrier", "cluster barrier", "grid hand-off", "cluster hand-off")
PROGRAMS: dict[str, Program] = {
    "read": _read,
    "copy": _copy,
    "product": _product,
    "fma": _fma,
    "launch": _launch,
    **dict.fromkeys(EXCHANGES, _exchange),
}


def _truth(w: LimitWorkload, a: Tensor) -> Tensor:
    if w.function == "read":
        return _sample(a.sum().expand(w.T))
    if w.function == "launch":
        return torch.ones_like(a)
    if w.function in EXCHANGES:
        return torch.full_like(a, w.T)  # each CTA counts the steps in what others send it
    if w.function == "fma":
        return a + w.T
    return _sample(a) @ a if w.function == "product" else _sample(a)


def _sample(t: Tensor) -> Tensor:
    return t[:: max(1, len(t) // SAMPLES)]


class LimitCall:
    """A program on its operand: what is timed (`run`), and what is compared (`outputs`)."""

    mode, parameters = "inference", ()

    def __init__(
        self, program: Program, problem: LimitProblem, *, dtype: torch.dtype | None = None, device: str | None = None
    ) -> None:
        w = problem.workload
        self.counts = w.function in EXCHANGES
        self.run = program(w, problem.a.to(device or w.device, dtype or w.torch_dtype))

    def context(self) -> torch.inference_mode:
        return torch.inference_mode()

    def outputs(self) -> dict[str, Tensor]:
        with self.context():
            result = self.run()
            # the CTA that counted least
            return {"result": result.min().float().view(1) if self.counts else _sample(result).clone()}


def gpu_limits(device: torch.device) -> Any:
    from fastseq.backends.cuda import recurrent

    return recurrent.GPU.device(device)
