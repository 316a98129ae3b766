"""Programs that come closest to a limit of the machine, and where they can run."""

from __future__ import annotations

import torch

from ..workloads.limits import EXCHANGES, FMA_DTYPES, PROGRAMS, TORCH, LimitWorkload, gpu_limits
from .base import Provider


def no_fma(w: LimitWorkload) -> str:
    """Why the multiply-adds of a CPU cannot be measured; "": they can."""
    from fastseq.backends import library

    if w.device != "cpu" or w.dtype not in FMA_DTYPES:
        return f"it runs on a CPU, in {' and '.join(FMA_DTYPES)}"
    if library.reason():
        return f"it is in the native library: {library.reason()}"
    return "" if hasattr(torch.ops.fastseq_native, "fma") else "the native library is older than this checkout: make library"


def _obstacle(w: LimitWorkload) -> str:
    from fastseq.backends import cuda

    reason = "it runs on a GPU" if w.kind != "cuda" else cuda.available()
    if not reason and w.function.startswith("cluster") and not gpu_limits(torch.device(w.device)).cluster:
        reason = "this GPU has no thread-block clusters"
    return reason or ""


LIMIT_PROVIDERS = {
    p.name: p
    for p in (
        *(Provider(name, function, "", lambda w: PROGRAMS[w.function]) for function, name in TORCH.items()),
        Provider("fastseq fma", "fma", "", lambda w: PROGRAMS[w.function], no_fma),
        *(Provider(f"fastseq {name}", name, "", lambda w: PROGRAMS[w.function], _obstacle) for name in EXCHANGES),
    )
}
