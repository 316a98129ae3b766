"""What the machine can do at best, measured in the same run, and the floor that follows for each workload.

read     bytes/s at sizes of recurrent weights
copy     bytes/s read and written, inside L2, inside L3 and beyond; on a GPU beyond its L2
gemm     FLOP/s of torch.mm, the best of a few sizes
fma      FLOP/s of multiply-adds in the registers of a CPU, in fp32 and fp64
launch   seconds of the shortest operator: a call, and on a GPU also its kernel within a graph

limits.py has the programs. Arithmetic is bound by the faster of gemm and fma: torch.mm is a program that others may beat, and a
time that can be beaten is no floor. Where fma is not measured (bf16, for which a CPU may have other units; a GPU), gemm stands
alone.
Not among the limits yet: what it costs that the multiprocessors of a GPU wait for each other in a kernel.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch

from . import limits
from .attention import AttentionWorkload
from .cells import CellWorkload
from .limits import EXCHANGES, LimitWorkload
from .timing import Clock, GraphClock, clock_for
from .workloads import GATES, Workload

READ_KIB = {
    "cpu": (16, 64, 128, 256, 512, 1024, 2048, 3072, 4096, 16384, 65536),
    "cuda": (1024, 4096, 16384, 32768, 65536, 262144),
}
COPY_KIB = {"cpu": (256, 8192, 131072), "cuda": (131072, 524288)}
GEMM_SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
REGISTER_BYTES = 4 * 65536  # of a multiprocessor, in every CUDA architecture of today


@dataclass
class Peaks:
    """Peaks of one device at one thread count."""

    device: str
    threads: int
    dtype: str
    read: dict[int, float] = field(default_factory=dict)  # KiB -> bytes/s
    copy: dict[int, float] = field(default_factory=dict)  # KiB -> bytes/s
    gemm: float = 0.0  # FLOP/s
    launch: dict[str, float] = field(default_factory=dict)  # how -> seconds
    on_chip: int = 0  # bytes of registers and shared memory, in which a GPU's kernel can keep weights
    fma: float = 0.0  # FLOP/s; 0: not measured

    @property
    def arithmetic(self) -> float:
        """FLOP/s that no program exceeds."""
        return max(self.gemm, self.fma)

    @property
    def arithmetic_note(self) -> str:
        return f"{self.arithmetic / 1e9:.0f} GFLOP/s of {'multiply-adds' if self.fma >= self.gemm else 'torch.mm'}"

    def read_bandwidth(self, size: float) -> float:
        """bytes/s at a buffer of `size` bytes, interpolated over log(size)."""
        return _between(self.read, size)

    def copy_bandwidth(self, size: float) -> float:
        return _between(self.copy, size)

    @property
    def least(self) -> float:
        """Seconds that a call takes at least: one operator, or on a GPU one kernel."""
        return self.launch.get("kernel in a graph", self.launch.get("operator", 0.0))

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_dict(cls, d: dict) -> Peaks:
        numbers = {name: {int(k): v for k, v in d[name].items()} for name in ("read", "copy")}
        return cls(
            d["device"],
            d["threads"],
            d["dtype"],
            numbers["read"],
            numbers["copy"],
            d["gemm"],
            dict(d["launch"]),
            d.get("on_chip", 0),
            d.get("fma", 0.0),
        )


def _between(measured: dict[int, float], size: float) -> float:
    kib = sorted(measured)
    return float(np.interp(math.log(max(size, 1) / 1024), np.log(kib), [measured[k] for k in kib]))


@dataclass(frozen=True)
class Floor:
    """The shortest time that the peaks allow for a workload, and what binds it."""

    seconds: float
    bound: str
    note: str

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def measure(device: str, threads: int, dtype: str, *, quick: bool = False, known: Peaks | None = None) -> Peaks:
    """`known`: peaks at another dtype, of which only the arithmetic is measured anew."""
    kind = device.partition(":")[0]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            peaks = replace(known, dtype=dtype, gemm=0.0, fma=0.0) if known else _anew(device, kind, threads, dtype)
            for n in GEMM_SIZES[kind][: 2 if quick else None]:
                peaks.gemm = max(peaks.gemm, _rate(limits.product(device, n, threads, dtype=dtype)))
            multiply_adds = limits.fma(device, threads, dtype=dtype)
            if not limits.no_fma(multiply_adds):
                peaks.fma = _rate(multiply_adds, rounds=30)  # short ones: all threads must find their cores free at the same time
    finally:
        torch.set_num_threads(before)
    return peaks


def _anew(device: str, kind: str, threads: int, dtype: str) -> Peaks:
    """Everything but the arithmetic."""
    peaks = Peaks(device, threads, dtype)
    peaks.read = {kib: _rate(limits.read(device, kib, threads)) for kib in READ_KIB[kind]}
    peaks.copy = {kib: _rate(limits.copy(device, kib, threads)) for kib in COPY_KIB[kind]}
    launch = limits.launch(device, threads)
    peaks.launch["operator"] = 1 / _rate(launch, rounds=20)
    if kind == "cuda":
        peaks.launch["kernel in a graph"] = 1 / _rate(launch, GraphClock(flush_bytes=0, device=device))
        chip = torch.cuda.get_device_properties(device)
        peaks.on_chip = chip.multi_processor_count * (REGISTER_BYTES + chip.shared_memory_per_multiprocessor)
    return peaks


def _rate(w: LimitWorkload, clock: Clock | None = None, rounds: int = 5) -> float:
    """Bytes, FLOP or launches in a second, at best."""
    clock = clock or clock_for(w.device)
    a = torch.randn(w.shape, device=w.device).to(w.torch_dtype)
    run = clock.prepare(limits.PROGRAMS[w.function](w, a))
    clock.measure(run, 1)
    return w.amount / min(clock.measure(run, 1) for _ in range(rounds))


def floor_of(w: Workload, peaks: Peaks) -> Floor:
    """Time that no program of this workload goes below with these peaks: for its arithmetic, its bytes or its launches."""
    floor, launches = _work(w, peaks), _launches(w)
    if floor.seconds >= launches * peaks.least:
        return floor
    return Floor(launches * peaks.least, "launch", f"{launches} × {peaks.least * 1e6:.2g} µs")


def _launches(w: Workload) -> int:
    """Least number of operators or kernels that run one after another: forward and backward, and every call of a cell."""
    if isinstance(w, LimitWorkload):
        return w.launches
    return (w.T if isinstance(w, CellWorkload) else 1) * (2 if w.mode == "training" else 1)


def _work(w: Workload, peaks: Peaks) -> Floor:
    if isinstance(w, LimitWorkload):
        return _limit(w, peaks)
    if isinstance(w, AttentionWorkload):
        return _attention_alone(w, peaks)
    if isinstance(w, CellWorkload):
        return _cell(w, peaks)
    cost = w.cost()
    if cost is not None:
        return _chain(*cost, peaks)
    return _recurrent(w, peaks) if w.function in GATES else _attention(w, peaks)


def _limit(w: LimitWorkload, peaks: Peaks) -> Floor:
    """By the same program, measured apart from this one."""
    if w.function == "launch" or w.function in EXCHANGES:
        return Floor(0.0, "launch", "")
    if w.function in ("product", "fma"):
        rate = peaks.gemm if w.function == "product" else peaks.fma or peaks.gemm
        return Floor(w.amount / rate, "arithmetic", f"{rate / 1e9:.0f} GFLOP/s")
    bandwidth = peaks.read_bandwidth(w.H << 10) if w.function == "read" else peaks.copy_bandwidth(w.H << 10)
    return Floor(w.amount / bandwidth, "memory", f"{bandwidth / 1e9:.0f} GB/s")


def _recurrent(w: Workload, peaks: Peaks) -> Floor:
    """Steps in turn, each reading R or computing with it, whichever is slower; the rest are GEMMs. Layers and lanes overlap.

    An R that a GPU can keep on chip is read once.
    """
    G, itemsize = GATES[w.function], w.torch_dtype.itemsize
    weights = G * w.H * w.H * w.matrices * itemsize  # bytes of every R
    bandwidth, resident = peaks.read_bandwidth(weights), weights <= peaks.on_chip
    compute = np.array([2 * rows * G * w.H * w.H * w.matrices / peaks.arithmetic for rows in w.active()])
    read = np.full(len(compute), weights / bandwidth)
    if resident:
        read[1:] = 0
    chain = np.maximum(read, compute).sum()
    project = 2 * w.tokens * G * w.H * w.inputs / peaks.arithmetic
    recurrent = 2 * w.tokens * G * w.H * w.H * w.matrices / peaks.arithmetic
    seconds = chain + project
    if w.mode == "training":
        # backward: the chain with R transposed, then dW and, for an inner layer, dx (each like the projection) and dR
        seconds += chain + (1 + w.input_grad) * project + recurrent
    size = f"{weights / 1024:.0f} KiB" if weights < 1 << 20 else f"{weights / (1 << 20):.1f} MiB"
    if read.sum() > compute.sum():
        often = "once" if resident else "each step"
        return Floor(float(seconds), "weights", f"R of {size} at {bandwidth / 1e9:.0f} GB/s {often}")
    return Floor(float(seconds), "arithmetic", peaks.arithmetic_note)


def _cell(w: CellWorkload, peaks: Peaks) -> Floor:
    """Steps in turn, each reading both weights or computing with them; backward as much again for the operands and for dW."""
    elements = GATES[w.layer] * w.H * (w.I + w.H)
    passes = 3 if w.mode == "training" else 1
    return _chain(w.T * passes, 2 * w.B * elements, elements * w.torch_dtype.itemsize, peaks)


def _chain(steps: int, flops: float, size: float, peaks: Peaks) -> Floor:
    """Steps in turn, each computing, or reading the same bytes from the cache that holds them, whichever is slower."""
    bandwidth = peaks.read_bandwidth(size)
    if size / bandwidth > flops / peaks.arithmetic:
        return Floor(steps * size / bandwidth, "weights", f"{size / 1024:.0f} KiB at {bandwidth / 1e9:.0f} GB/s each step")
    return Floor(steps * flops / peaks.arithmetic, "arithmetic", peaks.arithmetic_note)


def _attention(w: Workload, peaks: Peaks) -> Floor:
    """Matrix products at the peak, the causal half of the scores; or input and output through memory."""
    linear = 4 if w.function == "attention" else 8  # in units of W²
    forward = 2 * w.tokens * linear * w.H * w.H + 2 * w.B * w.T * (w.T + 1) * w.H
    moved = 2 * w.tokens * w.H * w.torch_dtype.itemsize
    passes = 3 if w.mode == "training" else 1
    return _slower(forward * passes, moved * passes, peaks)


def _attention_alone(w: AttentionWorkload, peaks: Peaks) -> Floor:
    """Matrix products at the peak, or every operand and result once through memory."""
    return _slower(w.flops, w.bytes, peaks)


def _slower(flops: float, moved: float, peaks: Peaks) -> Floor:
    """Arithmetic or memory, whichever takes longer."""
    bandwidth = peaks.copy[max(peaks.copy)]
    if moved / bandwidth > flops / peaks.arithmetic:
        return Floor(moved / bandwidth, "memory", f"{bandwidth / 1e9:.0f} GB/s")
    return Floor(flops / peaks.arithmetic, "arithmetic", peaks.arithmetic_note)
