"""The roofline of each workload: the shortest time that the measured peaks allow for it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from ..workloads.attention import AttentionWorkload
from ..workloads.base import GATES, Workload
from ..workloads.cells import CellWorkload
from ..workloads.limits import EXCHANGES, LimitWorkload
from .peaks import Peaks


@dataclass(frozen=True)
class Roofline:
    """The shortest time that the peaks allow for a workload, and what binds it."""

    seconds: float
    bound: str
    note: str

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def roofline_of(w: Workload, peaks: Peaks) -> Roofline:
    """Time that no program of this workload goes below with these peaks: for its arithmetic, its bytes or its launches."""
    roofline, launches = _work(w, peaks), _launches(w)
    if roofline.seconds >= launches * peaks.least:
        return roofline
    return Roofline(launches * peaks.least, "launch", f"{launches} × {peaks.least * 1e6:.2g} µs")


def _launches(w: Workload) -> int:
    """Least number of operators or kernels that run one after another: forward and backward, and every call of a cell."""
    if isinstance(w, LimitWorkload):
        return w.launches
    return (w.T if isinstance(w, CellWorkload) else 1) * (2 if w.mode == "training" else 1)


def _work(w: Workload, peaks: Peaks) -> Roofline:
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


def _limit(w: LimitWorkload, peaks: Peaks) -> Roofline:
    """By the same program, measured apart from this one."""
    if w.function == "launch" or w.function in EXCHANGES:
        return Roofline(0.0, "launch", "")
    if w.function in ("product", "fma"):
        rate = peaks.gemm if w.function == "product" else peaks.fma or peaks.gemm
        return Roofline(w.amount / rate, "arithmetic", f"{rate / 1e9:.0f} GFLOP/s")
    bandwidth = peaks.read_bandwidth(w.H << 10) if w.function == "read" else peaks.copy_bandwidth(w.H << 10)
    return Roofline(w.amount / bandwidth, "memory", f"{bandwidth / 1e9:.0f} GB/s")


def _recurrent(w: Workload, peaks: Peaks) -> Roofline:
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
        return Roofline(float(seconds), "weights", f"R of {size} at {bandwidth / 1e9:.0f} GB/s {often}")
    return Roofline(float(seconds), "arithmetic", peaks.arithmetic_note)


def _cell(w: CellWorkload, peaks: Peaks) -> Roofline:
    """Steps in turn, each reading both weights or computing with them; backward as much again for the operands and for dW."""
    elements = GATES[w.layer] * w.H * (w.I + w.H)
    passes = 3 if w.mode == "training" else 1
    return _chain(w.T * passes, 2 * w.B * elements, elements * w.torch_dtype.itemsize, peaks)


def _chain(steps: int, flops: float, size: float, peaks: Peaks) -> Roofline:
    """Steps in turn, each computing, or reading the same bytes from the cache that holds them, whichever is slower."""
    bandwidth = peaks.read_bandwidth(size)
    if size / bandwidth > flops / peaks.arithmetic:
        return Roofline(steps * size / bandwidth, "weights", f"{size / 1024:.0f} KiB at {bandwidth / 1e9:.0f} GB/s each step")
    return Roofline(steps * flops / peaks.arithmetic, "arithmetic", peaks.arithmetic_note)


def _attention(w: Workload, peaks: Peaks) -> Roofline:
    """Matrix products at the peak, the causal half of the scores; or input and output through memory."""
    linear = 4 if w.function == "attention" else 8  # in units of W²
    forward = 2 * w.tokens * linear * w.H * w.H + 2 * w.B * w.T * (w.T + 1) * w.H
    moved = 2 * w.tokens * w.H * w.torch_dtype.itemsize
    passes = 3 if w.mode == "training" else 1
    return _slower(forward * passes, moved * passes, peaks)


def _attention_alone(w: AttentionWorkload, peaks: Peaks) -> Roofline:
    """Matrix products at the peak, or every operand and result once through memory."""
    return _slower(w.flops, w.bytes, peaks)


def _slower(flops: float, moved: float, peaks: Peaks) -> Roofline:
    """Arithmetic or memory, whichever takes longer."""
    bandwidth = peaks.copy[max(peaks.copy)]
    if moved / bandwidth > flops / peaks.arithmetic:
        return Roofline(moved / bandwidth, "memory", f"{bandwidth / 1e9:.0f} GB/s")
    return Roofline(flops / peaks.arithmetic, "arithmetic", peaks.arithmetic_note)
