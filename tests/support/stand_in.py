"""A backend for tests of what chooses among backends: the reference under another name, which counts, and can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from fastseq.backends import RecurrentQuery, reference

DIRECTIONS = ("recurrent_forward", "recurrent_backward", "attention_forward", "attention_backward")


class StandIn(SimpleNamespace):
    """``calls`` are those that it ran; the functions named in ``wrong`` are off by a hundredth in one number."""

    def __init__(self, *wrong: str) -> None:
        super().__init__(name="stand-in", devices=("cpu",), ops=("recurrent", "attention"), available=lambda: None, calls=[])
        self.why_not = lambda query: []
        for direction in DIRECTIONS:
            setattr(self, direction, self._counted(direction, direction in wrong))

    def _counted(self, direction: str, wrong: bool) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            self.calls.append(direction)
            first, *rest = getattr(reference, direction)(*arguments)
            if wrong and first.numel():
                first = first.clone()
                first.flatten()[-1:] += 0.01
            return first, *rest

        return run


def recurrent(cell: str = "lstm", dtype: torch.dtype = torch.float32, **changes: Any) -> RecurrentQuery:
    """A small call on a CPU."""
    given = dict(steps=9, lanes=2, hidden=20, projected=False, layout="padded", zoned=False, batch=3, backward=False) | changes
    return RecurrentQuery("recurrent", torch.device("cpu"), dtype, cell, **given)
