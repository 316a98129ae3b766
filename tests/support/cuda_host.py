"""Backend "cuda-host": the CUDA kernels executed on the host, in a model of a GPU: slowly, and only when forced.

`tests/conftest.py` adds it to fastseq's backends.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastseq.backends import Query, RecurrentQuery, library
from fastseq.backends.cuda import recurrent
from fastseq.backends.cuda.plan import Device, Plan
from fastseq.backends.cuda.recurrent import Machine
from fastseq.ops.types import Backward, Forward

name = "cuda-host"
devices = ("cpu",)
ops = ("recurrent",)

# a small GPU with clusters: every form of exchange, several teams, sizes that do not fit
device = Device(16, 100 << 10, 8, True)
precision = "ieee"  # of fp32: CPU tensors know no other; tests may say "tf32"
_FILE = Path(__file__).resolve().parents[2] / "build" / "host" / "fastseq_host.so"


def available() -> str | None:
    if library.reason():
        return library.reason()
    return None if _FILE.is_file() else "the CUDA kernels are not built for the host (in a checkout: `make host-kernels`)"


def why_not(query: Query) -> list[str]:
    return recurrent.obstacles(query, MACHINE) if isinstance(query, RecurrentQuery) else [f"no CUDA kernel for {query.op} yet"]


def variant(query: RecurrentQuery, family: str) -> str:
    return recurrent.variant_on(query, family, MACHINE)


def recurrent_forward(call: Forward) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return recurrent.forward(call, MACHINE)


def recurrent_backward(call: Backward) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return recurrent.backward(call, MACHINE)


@lru_cache(1)
def kernels() -> ModuleType:
    """The module of ``tests/csrc/emulator/bindings.cpp``: the kernels, the seed of their schedule, counters.

    Raises:
        ImportError: if it is not built.
    """
    obstacle = available()
    if obstacle:
        raise ImportError(obstacle)
    loader = ExtensionFileLoader("fastseq_host", str(_FILE))
    spec = importlib.util.spec_from_file_location("fastseq_host", _FILE, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _run(direction: str, cell: str, precision: str, chosen: Plan, arguments: dict[str, Any]) -> None:
    addresses = {
        key: (value.data_ptr() if value.numel() else None) if isinstance(value, torch.Tensor) else value
        for key, value in arguments.items()
    }
    getattr(kernels(), direction)(cell, precision, chosen.native, addresses)


MACHINE = Machine(lambda _: device, lambda: precision, _run)
