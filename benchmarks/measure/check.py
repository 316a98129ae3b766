"""The check before every timing: outputs and gradients of a provider against the fp64 reference, on a small
and on the actual shape.

The bound is that of the tests (fastseq.testing): twice the error that torch's own module
makes in the same dtype, plus rounding. torch's own providers are held to it as well, and everyone to a coarse
limit of the root mean square that catches torch going wrong itself: the square root of the dtype's rounding step, of gradients
its cube root, since where a derivative jumps, as relu's at 0, a rounding decides about a term of some gradients, in torch as
well. A provider that fails has no time and no speed-up in the report.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastseq.testing import FACTOR, ROUNDINGS, relative_error

from ..workloads.base import GATES, Workload, results_of

TF32_EPS = 2.0**-10


@dataclass(frozen=True)
class Check:
    """Errors and bounds are relative to the tensor's largest value; None: nothing to compare, or NaN."""

    ok: bool
    error: float | None  # the largest of any tensor
    bound: float | None  # of the tensor that came closest to its bound, or broke it
    worst: str  # that tensor
    reason: str | None = None
    rms: float | None = None  # of the actual shape: the error's root mean square over the truth's, of the worst tensor

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Expected:
    """Per tensor: the fp64 value, and the error of torch's own module relative to the largest value."""

    values: dict[str, Tensor]
    torch_error: dict[str, float]

    def bounds(self, eps: float) -> dict[str, float]:
        """Relative errors allowed at a rounding step; torch's error is that of its worst tensor."""
        own = max(self.torch_error[name] for name in self.values)
        scale = {name: value.abs().max().item() or 1.0 for name, value in self.values.items()}
        return {name: FACTOR * own + ROUNDINGS * eps * max(1.0, s) / s for name, s in scale.items()}


def check_provider(build: Callable[[Workload], tuple[Any, str]], workload: Workload) -> Check:
    """`build(workload) -> (what `workload.call` takes, layout)`. Never raises: an exception of a provider is a failed check."""
    results = []
    for shape in (workload.small(), workload):
        try:
            built, layout = build(shape)
            found = results_of(shape.call(built, problem_of(shape), layout))
        except Exception as error:  # noqa: BLE001  whatever a provider raises is its result
            return Check(False, None, None, "", f"raised {type(error).__name__}: {_first_line(error)}")
        result = compare(found, expected(shape), rounding(shape))
        if not result.ok:
            size = "small shape" if shape != workload else "actual shape"
            return replace(result, reason=f"{size} (T={shape.T}, B={shape.B}, H={shape.H}): {result.reason}")
        results.append(result)
    return replace(max(results, key=lambda r: r.error or 0.0), rms=results[-1].rms)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def compare(found: dict[str, Tensor], want: Expected, eps: float) -> Check:
    """Every tensor of `found` against `want`, the worst in terms of its bound reported."""
    errors, squares, bounds = {}, [], want.bounds(eps)
    for name, value in found.items():
        truth = want.values[name]
        if value.shape != truth.shape:
            return Check(False, None, None, name, f"{name} has shape {tuple(value.shape)}, not {tuple(truth.shape)}")
        scale = truth.abs().max().item() or 1.0
        off = value.double().cpu() - truth
        error, rms = off.abs().max().item() / scale, off.norm().item() / (truth.norm().item() or 1.0)
        bound, limit = bounds[name], eps ** (1 / 3) if name.startswith("grad ") else eps ** (1 / 2)
        if not (error <= bound and rms <= limit):  # also when the error is NaN
            reason = f"{name} is off by {error:.1e} of its largest value; {bound:.1e} is allowed"
            if error <= bound:
                reason = f"{name} is off by {rms:.1e} in the root mean square; {limit:.1e} is allowed"
            return Check(False, error if math.isfinite(error) else None, bound, name, reason)
        errors[name] = error
        squares.append(rms)
    closest = max(errors, key=lambda name: errors[name] / bounds[name])
    return Check(True, max(errors.values()), bounds[closest], closest, rms=max(squares))


def rounding(workload: Workload) -> float:
    """Relative rounding step of the workload's arithmetic, TF32 counted where torch's flags allow it."""
    cudnn: Any = torch.backends.cudnn.rnn  # its attributes are made at import
    layers = workload.function in GATES and cudnn.fp32_precision == "tf32"
    tf32 = torch.backends.cuda.matmul.allow_tf32 or layers
    if workload.device.startswith("cuda") and workload.dtype == "float32" and tf32:
        return TF32_EPS
    return torch.finfo(workload.torch_dtype).eps


def problem_of(workload: Workload) -> Any:
    return replace(_problem(_plain(workload)), workload=workload)


def expected(workload: Workload) -> Expected:
    """What `found` must be, for the workload's mode: outputs, and in training gradients too."""
    everything = _expected(_plain(workload))
    if workload.mode != "inference":
        return everything
    outputs = {name: value for name, value in everything.values.items() if not name.startswith("grad ")}
    return Expected(outputs, everything.torch_error)


def forget_references() -> None:
    """Releases the references kept for the last workloads."""
    _problem.cache_clear()
    _expected.cache_clear()


def _plain(workload: Workload) -> Workload:
    """Workloads that differ only in this have the same reference."""
    return replace(workload, mode="training", threads=0)


@lru_cache(maxsize=4)
def _problem(workload: Workload) -> Any:
    return workload.problem()


@lru_cache(maxsize=4)
def _expected(workload: Workload) -> Expected:
    whole = _problem(workload)
    truth = workload.torch_results(whole, torch.float64, "cpu", in_parts=True)
    # No truth is finer than fp64: torch's error there is that of fp32, at fp64's rounding step.
    dtype = torch.float32 if workload.torch_dtype == torch.float64 else workload.torch_dtype
    finer = torch.finfo(workload.torch_dtype).eps / torch.finfo(dtype).eps
    own = workload.torch_results(whole, dtype, workload.device, in_parts=False)
    return Expected(truth, {name: finer * relative_error(own[name].cpu(), value) for name, value in truth.items()})
