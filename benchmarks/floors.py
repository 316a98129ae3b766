"""What the machine can do at best, measured in the same run, and the floor that follows for each workload.

read    bytes/s of reading one buffer again and again, each thread its share, at sizes of recurrent weights
copy    bytes/s read and written by a copy, at sizes inside L2, inside L3 and beyond
gemm    FLOP/s of torch.mm, best of a few square shapes: the arithmetic peak within reach of a torch program
launch  seconds of the shortest operator: a call, and on a GPU also its kernel within a graph
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np
import torch

from .attention import AttentionWorkload
from .cells import CellWorkload
from .timing import GraphClock, HostClock, clock_for
from .workloads import GATES, Workload

READ_KIB = (16, 64, 128, 256, 512, 1024, 2048, 3072, 4096, 16384, 65536)
COPY_KIB = (256, 8192, 131072)
GEMM_SIZES = (512, 1024, 2048)


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

    def read_bandwidth(self, size: float) -> float:
        """bytes/s at a buffer of `size` bytes, interpolated over log(size)."""
        kib = sorted(self.read)
        return float(np.interp(math.log(max(size, 1) / 1024), np.log(kib), [self.read[k] for k in kib]))

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
        )


@dataclass(frozen=True)
class Floor:
    """The shortest time that the peaks allow for a workload, and what binds it."""

    seconds: float
    bound: str
    note: str

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def measure(device: str, threads: int, dtype: str, *, quick: bool = False) -> Peaks:
    peaks = Peaks(device, threads, dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            for kib in READ_KIB:
                peaks.read[kib] = _read(device, kib << 10, threads)
            for kib in COPY_KIB:
                peaks.copy[kib] = _copy(device, kib << 10)
            cuda = device.startswith("cuda")
            for n in GEMM_SIZES[: 2 if quick else None] if not cuda else (4096, 8192):
                peaks.gemm = max(peaks.gemm, _gemm(device, n, getattr(torch, dtype)))
            one = torch.zeros(1, device=device)
            peaks.launch["operator"] = _per_call(device, lambda: one.add_(1))
            if cuda:
                clock = GraphClock(flush_bytes=0, device=device)
                graph = clock.prepare(lambda: [one.add_(1) for _ in range(100)])
                peaks.launch["kernel in a graph"] = min(clock.measure(graph, 5) for _ in range(5)) / 100
    finally:
        torch.set_num_threads(before)
    return peaks


def _read(device: str, size: int, threads: int) -> float:
    """Every output element sums the same `size / threads` bytes; threads share the outputs."""
    share = max(64, size // 4 // threads)
    repeats = max(2, math.ceil((48 << 20) / (share * 4) / threads)) * threads
    buffer = torch.randn(share, device=device)
    return repeats * share * 4 / _best(device, lambda: buffer.expand(repeats, share).sum(1))


def _copy(device: str, size: int) -> float:
    a, b = (torch.zeros(size // 4, device=device) for _ in range(2))
    repeats = max(1, (64 << 20) // size)
    return 2 * size * repeats / _best(device, lambda: [b.copy_(a) for _ in range(repeats)])


def _gemm(device: str, n: int, dtype: torch.dtype) -> float:
    a = torch.randn(n, n, device=device).to(dtype)
    out = torch.empty_like(a)
    return 2 * n**3 / _best(device, lambda: torch.mm(a, a, out=out))


def _best(device: str, run: Callable[[], object], rounds: int = 5) -> float:
    clock = clock_for(device)
    clock.measure(run, 1)
    return min(clock.measure(run, 1) for _ in range(rounds))


def _per_call(device: str, run: Callable[[], object]) -> float:
    if device.startswith("cuda"):
        return _best(device, run, 20)
    clock = HostClock(time.perf_counter)
    clock.measure(run, 100)
    return min(clock.measure(run, 100) for _ in range(5))


def floor_of(w: Workload, peaks: Peaks) -> Floor:
    """Time that no program of this workload goes below with these peaks, for its arithmetic and weights."""
    if isinstance(w, AttentionWorkload):
        return _attention_alone(w, peaks)
    if isinstance(w, CellWorkload):
        return _cell(w, peaks)
    return _recurrent(w, peaks) if w.function in GATES else _attention(w, peaks)


def _recurrent(w: Workload, peaks: Peaks) -> Floor:
    """Steps in turn, each reading R or computing with it, whichever is slower; the rest are GEMMs. Layers and lanes overlap."""
    G, itemsize = GATES[w.function], w.torch_dtype.itemsize
    weights = G * w.H * w.H * w.matrices * itemsize  # bytes of every R
    read = weights / peaks.read_bandwidth(weights)
    compute = np.array([2 * rows * G * w.H * w.H * w.matrices / peaks.gemm for rows in w.active()])
    chain = np.maximum(read, compute).sum()
    project = 2 * w.tokens * G * w.H * w.inputs / peaks.gemm
    recurrent = 2 * w.tokens * G * w.H * w.H * w.matrices / peaks.gemm
    seconds = chain + project
    if w.mode == "training":
        # backward: the chain with R transposed, then dW and, for an inner layer, dx (each like the projection) and dR
        seconds += chain + (1 + w.input_grad) * project + recurrent
    size = f"{weights / 1024:.0f} KiB" if weights < 1 << 20 else f"{weights / (1 << 20):.1f} MiB"
    if read * len(compute) > compute.sum():
        return Floor(
            float(seconds),
            "weights",
            f"R of {size} at {peaks.read_bandwidth(weights) / 1e9:.0f} GB/s each step",
        )
    return Floor(float(seconds), "arithmetic", f"{peaks.gemm / 1e9:.0f} GFLOP/s")


def _cell(w: CellWorkload, peaks: Peaks) -> Floor:
    """Steps in turn, each reading both weights or computing with them; backward as much again for the operands and for dW."""
    elements = GATES[w.layer] * w.H * (w.I + w.H)
    size = elements * w.torch_dtype.itemsize
    read, compute = size / peaks.read_bandwidth(size), 2 * w.B * elements / peaks.gemm
    seconds = w.T * max(read, compute) * (3 if w.mode == "training" else 1)
    if read > compute:
        return Floor(seconds, "weights", f"{size >> 10} KiB at {peaks.read_bandwidth(size) / 1e9:.0f} GB/s each step")
    return Floor(seconds, "arithmetic", f"{peaks.gemm / 1e9:.0f} GFLOP/s")


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
    if moved / bandwidth > flops / peaks.gemm:
        return Floor(moved / bandwidth, "memory", f"{bandwidth / 1e9:.0f} GB/s")
    return Floor(flops / peaks.gemm, "arithmetic", f"{peaks.gemm / 1e9:.0f} GFLOP/s")
