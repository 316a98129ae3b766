"""Peak memory of a call, and the operators it ran.

Measured: the highest sum of tensor bytes that torch's allocator handed out *while the call ran*, above what
was live when it began. Parameters, input and output gradient exist before and do not count; outputs, saved
activations, workspaces and temporaries do, and so do the gradients that a training step returns. On CUDA
these are the allocator's own statistics. On the CPU they are the allocation and release events of
torch.profiler, which sees every allocation that goes through torch's CPU allocator, also from C++ inside an
operator. Not seen on the CPU: memory that a library takes from malloc itself (for instance packed GEMM
panels).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .timing import no_garbage_collection

# Operators and kernels whose presence says which implementation a library chose.
_TELLING = re.compile(
    r"fastseq\w*::|mkldnn_rnn_layer|cudnn_rnn|miopen_rnn|_thnn_fused|aten::(lstm|gru|rnn_tanh)_cell|aten::softmax|"
    r"_scaled_dot_product_\w*(flash|efficient|cudnn|math)|^(?!aten).*(persist|elemWiseRNN|elementWise_[fb]p|fmha|flash|xmma)",
    re.IGNORECASE,
)

# cuDNN's algorithms for recurrent layers, by the names of their kernels.
_CUDNN = {
    "persistent": re.compile(r"(?<!block)persist(?!RNN_)", re.IGNORECASE),
    "persist small-H": re.compile(r"blockPersist", re.IGNORECASE),
    "standard": re.compile(r"elemWiseRNN|elementWise_[fb]p"),
}


@dataclass(frozen=True)
class Observation:
    peak_bytes: int
    chose: list[str]  # the telling operators of the forward pass; on CUDA also the telling kernels
    launches: int | None = None  # kernels, on CUDA


class Event(NamedTuple):
    """Of the profiler. `bytes` is 0 but for "[memory]": allocations (+) and releases (-)."""

    name: str
    bytes: int = 0
    kernel: bool = False


def observe(run: Callable[[], object], device: str = "cpu") -> Observation:
    """Runs once for the operators and, on CUDA, again for the peak, which the profiler would disturb."""
    events = _profile(run, device)
    names = {e.name for e in events if _TELLING.search(e.name) and "backward" not in e.name.lower()}
    if device.startswith("cuda"):
        chose = [f"cuDNN: {algorithm}" for algorithm in cudnn_algorithms(names)] + sorted(names)
        return Observation(_cuda_peak(run, device), chose, sum(e.kernel for e in events))
    return Observation(max(_levels(events), default=0), sorted(names))


def cudnn_algorithms(names: Iterable[str]) -> list[str]:
    """Which of cuDNN's algorithms for recurrent layers ran; forward and backward may differ. None if its layers did not run."""
    names = list(names)
    if not any("cudnn_rnn" in name for name in names):
        return []
    kernels = [name for name in names if "cudnn_rnn" not in name]
    found = [algorithm for algorithm, pattern in _CUDNN.items() if any(pattern.search(name) for name in kernels)]
    return found or ["none of the known kernels"]


def kept(forward: Callable[[], object], device: str = "cpu") -> int:
    """Bytes alive after a forward pass whose result is held: the result and what is saved for backward."""
    held: list[object] = []
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated(device)
        held.append(forward())
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device) - before
    return (_levels(_profile(lambda: held.append(forward()), device)) or [0])[-1]


def _profile(run: Callable[[], object], device: str) -> list[Event]:
    """Every event, without garbage collection: a release of something older would be taken for one of the call's own."""
    cuda = device.startswith("cuda")
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with (
        no_garbage_collection(),
        _quiet_stderr(),
        profile(activities=activities, profile_memory=not cuda) as profiler,
    ):
        run()
        if cuda:
            torch.cuda.synchronize(device)
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    return [Event(e.name(), e.nbytes() if e.name() == "[memory]" else 0, _is_kernel(e)) for e in events]


def _is_kernel(event: Any) -> bool:
    return event.device_type() == DeviceType.CUDA and not event.name().startswith(("Memcpy", "Memset", "["))


def _levels(events: list[Event]) -> list[int]:
    """Bytes alive after each allocation or release."""
    return list(accumulate(e.bytes for e in events if e.name == "[memory]"))


def _cuda_peak(run: Callable[[], object], device: str) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler's C++ part writes two lines per run to file descriptor 2, whatever its log level."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
