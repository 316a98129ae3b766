"""What the machine can do at best, measured in the same run as what is compared with it.

read     bytes/s at sizes of recurrent weights
copy     bytes/s read and written, inside L2, inside L3 and beyond; on a GPU beyond its L2
gemm     FLOP/s of torch.mm, the best of a few sizes
fma      FLOP/s of multiply-adds in the registers of a CPU, in fp32 and fp64
launch   seconds of the shortest operator: a call, and on a GPU also its kernel within a graph

workloads/limits.py has the programs. Arithmetic is bound by the faster of gemm and fma: torch.mm is a program that others may
beat, and a time that can be beaten is no roofline. Where fma is not measured (bf16, for which a CPU may have other units; a GPU),
gemm stands alone. Not among the peaks: what it costs that the multiprocessors of a GPU wait for each other in a kernel.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch

from ..providers.limits import no_fma
from ..workloads import limits
from ..workloads.clocks import Clock, GraphClock, clock_for
from ..workloads.limits import LimitWorkload

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


def measure_peaks(device: str, threads: int, dtype: str, *, quick: bool = False, known: Peaks | None = None) -> Peaks:
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
            if not no_fma(multiply_adds):
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
