"""CUDA C++ kernels of the compiled library. No op has one yet."""

from __future__ import annotations

from . import library

name = "cuda"
devices = ("cuda",)


def available() -> str | None:
    return library.reason()


def why_not(query) -> list[str]:
    return [f"no CUDA kernel for {query.op} yet"]
