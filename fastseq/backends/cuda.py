"""CUDA C++ kernels of the compiled library. No op has one yet."""

from __future__ import annotations

from . import library

name = "cuda"
devices = ("cuda",)
ops: tuple[str, ...] = ()


def available() -> str | None:
    return library.reason()


def why_not(query) -> list[str]:
    return [] if query.op in ops else [f"no CUDA kernel for {query.op} yet"]
