"""Triton kernels (the ``kernels/`` folder, installed as ``fastseq.kernels``). No op has one yet."""

from __future__ import annotations

name = "triton"
devices = ("cuda",)
ops: tuple[str, ...] = ()


def available() -> str | None:
    return None


def why_not(query) -> list[str]:
    return [] if query.op in ops else [f"no Triton kernel for {query.op} yet"]
