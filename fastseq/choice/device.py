"""Which device and which programs a measurement is of."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from .._version import __version__

LEVELS = ("default", "avx2", "avx512", "avx512_bf16", "amx")  # of a CPU's instructions, as the library names them
WORDS = {"default": "baseline", "avx2": "AVX2", "avx512": "AVX-512", "avx512_bf16": "AVX512-BF16", "amx": "AMX"}


class Device(NamedTuple):
    type: str
    name: str
    level: str  # of a CPU one of LEVELS, or "none" without the library; of a GPU its compute capability
    threads: int  # of torch's pool; 0 on a GPU

    def __str__(self) -> str:
        facts = WORDS.get(self.level, self.level) if self.type == "cpu" else f"sm_{self.level.replace('.', '')}"
        return f"{self.name}, {facts}" + (f", {self.threads} threads" if self.threads > 1 else "")


def device_of(device: torch.device) -> Device:
    """The device that a tensor is on. The library is loaded, or counts as missing."""
    if device.type == "cuda":
        return _gpu(torch.cuda.current_device() if device.index is None else device.index)
    return Device(device.type, cpu_name(), cpu_level(), torch.get_num_threads())


@cache
def _gpu(index: int) -> Device:
    major, minor = torch.cuda.get_device_capability(index)
    return Device("cuda", torch.cuda.get_device_name(index), f"{major}.{minor}", 0)


def cpu_level() -> str:
    native = torch.ops.fastseq_native
    return native.cpu_level() if hasattr(native, "cpu_level") else "none"


@cache
def cpu_name() -> str:
    model = re.search(r"^model name\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    return model[1].strip() if model else platform.processor() or platform.machine()


@cache
def versions() -> dict[str, str]:
    """Of what kernels come from: another one may be another kernel."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {"torch": torch.__version__, "triton": triton, "driver": driver(), "library": __version__}


def driver() -> str:
    """Version of the NVIDIA driver; "none" without."""
    text = _text("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module[^\n]*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else "none" if not text else text.splitlines()[0]


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
