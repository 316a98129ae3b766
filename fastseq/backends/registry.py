"""The backends, by name, and what keeps each from a call."""

from __future__ import annotations

from types import ModuleType

from ..choice import self_check
from . import cpu, cuda, reference, torch, triton
from .query import Query

# The order in which kernels of ours are asked where nothing was measured: the CUDA kernels only after those that take every call.
ORDER = ("triton", "cuda", "cpu", "torch", "reference")
BACKENDS: dict[str, ModuleType] = {module.name: module for module in (triton, cuda, cpu, torch, reference)}

# Backends in order, by the type of device that they may run on; Triton's interpreter, on the CPU, only runs when it is forced.
CANDIDATES: dict[str, tuple[str, ...]] = {
    "cpu": tuple(name for name in ORDER if {"cpu", "any"} & set(BACKENDS[name].devices) and name != "triton"),
    "cuda": tuple(name for name in ORDER if {"cuda", "any"} & set(BACKENDS[name].devices)),
}


def obstacles(name: str, query: Query) -> list[str]:
    """Why a backend cannot run a call, forced or not; empty if it can."""
    backend = BACKENDS[name]
    if query.device.type not in backend.devices and "any" not in backend.devices:
        return [f"runs on {', '.join(backend.devices)} tensors, not on {query.device.type}"]
    missing = backend.available()
    return [missing] if missing else backend.why_not(query)


def able(name: str, query: Query) -> bool:
    """Whether a backend may run a call that nobody forces it to run: it can, and its kernels were right on the device."""
    if obstacles(name, query):
        return False
    return name not in self_check.CHECKED or not self_check.against(BACKENDS[name], query, reference)


def reasons(name: str, query: Query) -> list[str]:
    """Why a backend is not `able`, as far as that is known; empty if it is."""
    with self_check.known_alone():
        return obstacles(name, query) or self_check.against(BACKENDS[name], query, reference)
