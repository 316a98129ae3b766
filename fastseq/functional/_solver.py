"""Solvers that run a recurrence parallel in time, and which layers they can run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .._arguments import checked_int, checked_number, unknown
from ..cells import CELLS, Cell

_OTHERWISE = ("sequential", "raise")


@dataclass(frozen=True)
class Newton:
    """``solver`` of a layer in which no unit sees another (``num_heads`` equal to the hidden size): all steps at once by Newton's
    method, each of whose iterations is one linear scan.

    The states found are those of the sequential kernels but for the tolerance, in training and evaluation alike; gradients are
    the exact adjoint of the states found, by one scan backwards, not by differentiating the iterations. How many iterations it
    takes depends on weights, inputs and length: a handful while no unit holds on to its state, tens where it learned to. So the
    residual decides, unit by unit, never a count. ``fastseq.explain`` shows iterations, residual and rows that fell back. Whether
    all units are there is asked of the device once an iteration, which CUDA graphs cannot capture. Inside are float32 or
    wider whatever the dtype.

    Args:
        tolerance: of |f(s_(t-1), x_t) - s_t| / (1 + |s_t|), at every step and number of the state s; below about 1e-6 it may be
            out of reach of float32.
        max_iterations: of a unit, in each chunk.
        chunk: steps that are solved at once, one chunk after the other with the state handed on; None: all. Long memory,
            which takes iterations in proportion to the steps, takes far fewer in chunks of 32 to 256.
        otherwise: what happens to a unit that ``max_iterations`` do not suffice for, or that meets a number that is not
            finite: "sequential": the sequential kernel goes on from its last step within the tolerance; "raise": RuntimeError.
        force: also on a CPU, whose sequential kernels are faster, since channels fill its vectors and its cores, and where a call
            is refused otherwise.

    Raises:
        ValueError: tolerance not positive and finite, max_iterations or chunk below 1, an unknown ``otherwise``.
        TypeError: another type than these.
    """

    tolerance: float = 1e-5
    max_iterations: int = 16
    chunk: int | None = None
    otherwise: Literal["sequential", "raise"] = "sequential"
    force: bool = False

    def __post_init__(self) -> None:
        tolerance = checked_number("tolerance", self.tolerance)
        if not 0 < tolerance < math.inf:
            raise ValueError(f"tolerance must be positive and finite, got {tolerance}")
        for name in ("max_iterations", "chunk"):
            value = getattr(self, name)
            if (name, value) != ("chunk", None) and checked_int(name, value) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.otherwise not in _OTHERWISE:
            raise ValueError(unknown("otherwise", self.otherwise, _OTHERWISE))
        if not isinstance(self.force, bool):
            raise TypeError(f"force must be a bool, got {self.force!r}")

    def numbers(self) -> list[float]:
        """As the ops have it."""
        return [float(self.tolerance), float(self.max_iterations), float(self.chunk or 0), float(self.otherwise == "raise")]


def check_solver(cell: Cell, solver: Any, hidden: int, heads: int, proj_size: int, zoned: bool) -> None:
    """
    Raises:
        TypeError: unless ``solver`` is a Newton or None.
        ValueError: if it cannot run such a layer, with the reason.
    """
    if solver is None:
        return
    if not isinstance(solver, Newton):
        raise TypeError(f"solver must be a fastseq.Newton or None, got {solver!r}")
    if not cell.jacobian:
        why = (
            "normalizes over all its units, each of which then depends on all"
            if cell.normalized
            else f"has {len(cell.states)} numbers in the state of a unit, and a scan takes 1 or 2"
        )
        accepted = ", ".join(name for name, row in CELLS.items() if row.jacobian)
        raise ValueError(f"solver needs a cell whose units have a Jacobian of 1 or 2 numbers ({accepted}); {cell.name} {why}")
    if proj_size:
        raise ValueError(f"solver and proj_size exclude each other, got proj_size={proj_size}: a projection mixes all units")
    if heads != hidden:
        raise ValueError(
            f"solver needs num_heads equal to the hidden size ({hidden}), got num_heads={heads}: a unit that sees others has a "
            f"Jacobian of {hidden // heads} x {hidden // heads} blocks, whose products cost the cube of that"
        )
    if zoned:
        raise ValueError("solver and zoneout exclude each other: the sequential kernels alone have zoneout")


def check_device(solver: Newton, device: torch.device) -> None:
    """
    Raises:
        RuntimeError: on a CPU, unless the solver is forced.
    """
    if device.type == "cpu" and not solver.force:
        raise RuntimeError(
            "solver=Newton(..) is refused on a CPU: its vectors and cores are full of channels already, so one pass of the "
            "sequential kernel takes less time than the several passes of Newton's method. Leave the solver out there (None: the "
            "same parameters and, but for the tolerance, results), or force it: Newton(.., force=True)"
        )
