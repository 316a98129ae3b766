"""Results as a run would leave them, with times and sizes given by formulas."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from fastseq.benchmarks.measure.case import Options
from fastseq.benchmarks.measure.results import Results, Row
from fastseq.benchmarks.providers.attention import EAGER, OWN, REFORMER, SDPA
from fastseq.benchmarks.providers.limits import LIMIT_PROVIDERS
from fastseq.benchmarks.providers.registry import EVERY_PROVIDER
from fastseq.benchmarks.roofline.model import roofline_of
from fastseq.benchmarks.roofline.peaks import Peaks
from fastseq.benchmarks.suites import attention, cells, limits, recurrent, recurrent_gpu, sequential_vs_parallel
from fastseq.benchmarks.workloads.attention import AttentionWorkload
from fastseq.benchmarks.workloads.base import ALL_MODES, MODES, Workload
from fastseq.benchmarks.workloads.cells import CellWorkload
from fastseq.benchmarks.workloads.hashed import HASHED
from fastseq.benchmarks.workloads.limits import LimitWorkload
from fastseq.benchmarks.workloads.recurrent import RecurrentWorkload

LENGTHS = (32, 64, 128, 256, 512)
ENVIRONMENT = {
    "time": "2030-01-01 00:00 UTC",
    "device": "cpu",
    "device name": "A <fast> CPU & more",
    "cpu": {"name": "A <fast> CPU & more", "cpus": 2},
    "load average": 0.1,
    "versions": {"python": "3.12.0", "torch": "2.13.0"},
}


def timed(row: Row, seconds: float, memory: int = 1 << 20, *, over: str | None = None, ratio: float = 1.0) -> Row:
    row.time = {
        "median": seconds,
        "low": seconds * 0.98,
        "high": seconds * 1.02,
        "fastest": seconds * 0.97,
        "rounds": 9,
        "calls": 1,
    }
    row.memory, row.parameters, row.chose = memory, 1000, ["aten::something"]
    row.check = {"ok": True, "error": 1e-7, "bound": 1e-6, "worst": "output", "reason": None}
    row.roofline = {"seconds": seconds / 4, "bound": "weights", "note": "R of 64 KiB at 100 GB/s each step"}
    if over:
        row.ratio = {"baseline": over, "median": ratio, "low": ratio * 0.97, "high": ratio * 1.03}
    return row


def lengths(
    seconds: dict[str, Callable[[int], float]],
    memory: dict[str, Callable[[int], float]] | None = None,
    modes=tuple(MODES),
) -> Results:
    """Rows of the suite sequential-vs-parallel; providers without a formula are unavailable."""
    rows = []
    for mode in modes:
        for T in LENGTHS:
            for name in sequential_vs_parallel.EVERY:
                row = Row.of(
                    sequential_vs_parallel.NAME,
                    "length",
                    name,
                    Workload(EVERY_PROVIDER[name].function, T, 8, 256, 256, mode),
                )
                if name in seconds:
                    size = (memory or {}).get(name, lambda T: 1e4 * T)
                    timed(
                        row,
                        seconds[name](T),
                        int(size(T)),
                        over=sequential_vs_parallel.BASELINE.get(name),
                        ratio=1.5,
                    )
                else:
                    row.status, row.reason = "unavailable", "not here"
                rows.append(row)
    return Results(dict(ENVIRONMENT), {"quick": True}, rows, [_peaks()], 12.0)


def grid(ratio: Callable[[str, str, str, int, int], float]) -> Results:
    """Rows of the suite recurrent; `ratio(group, mode, cell, B, H)`."""
    rows = []
    for group in recurrent.TIMED:
        for mode in MODES:
            for cell in recurrent.CELLS:
                for B in (1, 32):
                    for H in (64, 256):
                        w = Workload(cell.lower(), 128, B, H, H, mode, packed=group == "packed", input_grad=group != "data")
                        value, base = ratio(group, mode, cell, B, H), f"torch.nn.{cell}"
                        rows.append(timed(Row.of(recurrent.NAME, group, base, w), 1e-3))
                        own = Row.of(recurrent.NAME, group, f"fastseq.{cell}", w)
                        rows.append(timed(own, 1e-3 / value, over=base, ratio=value))
    return Results(dict(ENVIRONMENT), {"quick": False}, rows, [_peaks()], 12.0)


def alone(
    seconds: Callable[[str, str, int], float],
    memory: Callable[[str, str, int], float] = lambda kind, provider, T: 1e3 * T,
    device_name: str = ENVIRONMENT["device name"],
) -> Results:
    """Rows of the suite attention; `seconds(group or kind, provider, T)`."""
    rows = []

    def add(group: str, kind: str, w: AttentionWorkload, providers: tuple[str, ...]) -> None:
        base = seconds(kind, SDPA, w.T)
        for name in providers:
            row = Row.of(attention.NAME, group, name, w)
            value = seconds(kind, name, w.T)
            timed(row, value, int(memory(kind, name, w.T)), over=SDPA if name == OWN else None, ratio=base / value)
            rows.append(row)

    for T in (1024, 4096):
        for mode in ALL_MODES:
            add("dense", "dense", AttentionWorkload("dense", T, 4, 256, 256, mode, heads=4, causal=True), attention.CORE)
    for name in ("learned bias", "T5 table"):
        function = {"learned bias": "bias", "T5 table": "t5"}[name]
        add(name, name, AttentionWorkload(function, 512, 2, 256, 256, "training", heads=4), (SDPA, OWN))
    decode = AttentionWorkload("decode", 1, 4, 256, 256, "inference", heads=4, kv_heads=1, keys=8192)
    add("decode", "decode", decode, (SDPA, OWN))
    for T in (128, 256, 512):
        for function, more in (("dense", {}), ("window", {"window": 64}), ("blocks", {"block": 16})):
            w = AttentionWorkload(function, T, 1, 128, 128, "training", heads=2, causal=True, **more)
            kind = attention.FULL if function == "dense" else function
            add("memory", kind, w, (EAGER, SDPA, OWN))
        for kind, block in ((HASHED, 64), (attention.SHARED, T)):
            w = AttentionWorkload(HASHED, T, 1, 128, 128, "training", heads=2, causal=True, block=block)
            add("memory", kind, w, (REFORMER,))
    return Results(ENVIRONMENT | {"device name": device_name}, {"quick": False}, rows, [_peaks()], 12.0)


def gpu(
    ratio: Callable[[str, RecurrentWorkload], float], graph: Callable[[str, RecurrentWorkload], float] | None = None
) -> Results:
    """Rows of the suite recurrent as a GPU leaves them: its default plan; `ratio(group, workload)` and the same in a graph."""
    rows = []
    for case in recurrent.plan(Options("cuda", "float32", (1,), quick=False)):
        for participant in case.participants:
            w, name = participant.workload, participant.provider
            base = dict(case.baseline).get(name)
            own = name == recurrent_gpu.own_name(recurrent_gpu.cell_of(w.function))
            value = ratio(case.group, w) if own else 1.0
            row = timed(Row.of(recurrent.NAME, case.group, name, w), 1e-3 / value, over=base, ratio=value)
            row.graph = {"median": 1e-3 / (graph or ratio)(case.group, w) if own else 1e-3}
            row.chose = ["backend: triton"] if own else ["cuDNN: persistent" if w.persistent else "cuDNN: standard"]
            row.launches = 3 if own else 2 * w.T
            rows.append(row)
    return Results(ENVIRONMENT | {"device": "cuda"}, {"quick": False}, rows, [_peaks()], 12.0)


def single(ratio: Callable[[str, CellWorkload], float], device: str = "cpu") -> Results:
    """Rows of the suite cells; `ratio(group, workload)`."""
    rows = []
    for case in cells.plan(Options(device, "float32", (2,), quick=False)):
        own, base = case.baseline[0]
        w = case.participants[0].workload
        value = ratio(case.group, w)
        rows.append(timed(Row.of(cells.NAME, case.group, base, w), 1e-5))
        rows.append(timed(Row.of(cells.NAME, case.group, own, w), 1e-5 / value, over=base, ratio=value))
    return Results(dict(ENVIRONMENT), {"quick": False}, rows, [_peaks()], 12.0)


def machine(amounts: Callable[[LimitWorkload], float], device: str = "cpu") -> Results:
    """Rows of the suite limits; `amounts(workload)`: bytes, FLOP or launches in a second."""
    rows = []
    for case in limits.plan(Options(device, "float32", (1, 2) if device == "cpu" else (), quick=False)):
        (participant,) = case.participants
        w = participant.workload
        row = Row.of(limits.NAME, case.group, participant.provider, w)
        if case.group == "exchange":
            row.status, row.reason = "unavailable", LIMIT_PROVIDERS[participant.provider].unavailable(w)
        else:
            timed(row, w.amount / amounts(w))
            row.roofline = roofline_of(w, _peaks()).as_dict()
        rows.append(row)
    return Results(ENVIRONMENT | {"device": device}, {"quick": False}, rows, [_peaks()], 12.0)


def _peaks() -> Peaks:
    return Peaks("cpu", 2, "float32", {64: 1e11, 65536: 5e10}, {256: 1e11, 131072: 2e10}, 1e11, {"operator": 1e-6})


@pytest.fixture(scope="session")
def synthetic() -> SimpleNamespace:
    return SimpleNamespace(timed=timed, lengths=lengths, grid=grid, alone=alone, gpu=gpu, single=single, machine=machine)
