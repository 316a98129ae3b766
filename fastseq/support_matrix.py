"""Which kernels there are, by op, device and dtype, and how far each has been tried: what ``info --json`` says under ``matrix``.

It is about the package, whatever this machine has: ``support`` of ``info`` tells what runs here. A cell is *measured* if a
committed result has a time of it on such a device; ``choice/tables/measured.json`` lists those, and ``python -m
fastseq.benchmarks.tables`` writes it from the results.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

from fastseq.backends.cpu import attention, recurrent, scan
from fastseq.backends.cuda import recurrent as cuda
from fastseq.backends.triton import _launch
from fastseq.cells import CELLS
from fastseq.choice.decision import MODES
from fastseq.choice.shipped import MEASURED

STATES = {
    "measured": "timed beside torch's kernels on such a device, in a committed result, and run by the tests",
    "tested": "run by the tests on such a device",
    "executed on the host only": "run by the tests on a CPU, by Triton's interpreter or an emulator of CUDA's threads, "
    "never yet on such a device",
    "not available": "no kernel: the reference runs it, in PyTorch operations",
}
MEASURED_STATE, TESTED, HOST, NONE = STATES
DEVICES = {"cpu": "CPU (x86-64)", "cuda": "NVIDIA GPU (compute capability 8.0 and later)"}
PLATFORMS = (
    {"platform": "Linux, x86-64", "kernels": "CPU: baseline, AVX2, AVX-512, AMX; GPU: Triton, CUDA", "state": MEASURED_STATE},
    {"platform": "Linux, aarch64", "kernels": "CPU: baseline, compiled from source; recurrence emulated in tests", "state": HOST},
    {"platform": "macOS, Windows", "kernels": "none: torch's kernels and PyTorch operations", "state": NONE},
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}

# op, what of it, calls
ROWS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    *(("recurrent", cell, MODES) for cell in CELLS),
    ("attention", "scores never materialized", MODES),
    ("attention", "returned weights", MODES),
    ("attention_decode", "KV cache", MODES[:1]),
    ("scan", "real", MODES),
    ("scan", "complex", MODES),
    ("scan", "2 x 2 blocks", MODES),
)


def rows() -> list[dict[str, Any]]:
    """A row for each op, call and device; of a dtype the state, the backends that have kernels, the devices of measurements."""
    return [
        {
            "op": op,
            "what": what,
            "call": call,
            "device": device,
            "by_dtype": {_name(dtype): _cell(op, what, call, kind, dtype) for dtype in DTYPES},
        }
        for kind, device in DEVICES.items()
        for op, what, calls in ROWS
        for call in calls
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cell(op: str, what: str, call: str, kind: str, dtype: torch.dtype) -> dict[str, Any]:
    having = [name for name, has in _backends(op, what, kind, dtype) if has]
    on = _measured().get((kind, op, what, call, _name(dtype)), []) if having else []
    state = MEASURED_STATE if on else NONE if not having else TESTED if kind == "cpu" else HOST
    return {"state": state, "backends": having, "measured on": on}


def _backends(op: str, what: str, kind: str, dtype: torch.dtype) -> Iterator[tuple[str, bool]]:
    """Of a kind of device, whether they have a kernel."""
    complex_dtype = COMPLEX.get(dtype)
    if kind == "cpu":
        if op == "recurrent":
            yield "cpu", what in recurrent.CELLS and dtype in recurrent.DTYPES
        elif op == "scan":
            yield "cpu", (complex_dtype if what == "complex" else dtype) in scan.DTYPES
        else:
            yield "cpu", dtype in attention.DTYPES
    else:
        cell = op != "recurrent" or _triton_has(CELLS[what].family)
        yield "triton", cell and dtype in _launch.GPU_DTYPES and (what != "complex" or complex_dtype is not None)
        yield "cuda", op == "recurrent" and what in cuda.CELLS and dtype in cuda.DTYPES


def _triton_has(family: str) -> bool:
    """Triton itself is not needed to know."""
    return importlib.util.find_spec(f"fastseq.kernels.recurrent.cells.{family}") is not None


@cache
def _measured() -> dict[tuple[str, ...], list[str]]:
    """Devices by kind of device, op, what, call and dtype."""
    return {tuple(row[:-1]): row[-1] for row in json.loads(MEASURED.read_text())["calls"]}
