"""What is set beside torch.nn and fastseq's choice on a GPU: fastseq forced on one backend, and torch.compile."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..workloads.base import Workload, arrange
from .base import RECURRENT, Provider, fastseq_layer, fastseq_missing

FORCED = {"triton": "form", "cuda": "plan"}  # backends, and what each calls the way that it takes


class Wrapped(nn.Module):
    """A layer that is called in another way; its parameters keep their names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def canonical_name(self, name: str) -> str:
        return name.removeprefix("module.")


class Forced(Wrapped):
    """fastseq on one backend, or an error."""

    def __init__(self, module: nn.Module, backend: str) -> None:
        super().__init__(module)
        self.backend = backend

    def around(self) -> AbstractContextManager[None]:
        return importlib.import_module("fastseq").use_backend(self.backend)

    def forward(self, *inputs: Any) -> Any:
        with self.around():
            return self.module(*inputs)


class Compiled(Wrapped):
    """torch.compile with its defaults."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        torch._dynamo.reset()  # each shape a program of its own, as in a model that has one
        self.compiled = (torch.compile(module),)  # in a tuple: as a module of its own it would list the parameters again

    def forward(self, x: Tensor | PackedSequence) -> Any:
        return self.compiled[0](x)


def _sequence(w: Workload, steps: int | None = None) -> tuple[Any, ...]:
    """A layer's input, or that of its first steps."""
    x = torch.zeros(w.T, w.B, w.I, device=w.device, dtype=w.torch_dtype)
    return (x[:steps],) if steps else (arrange(x, "time", w.lengths),)


def _refuses(cell: str, backend: str, inputs: Callable[..., tuple[Any, ...]] = _sequence) -> Callable[[Workload], str | None]:
    """Why the forced backend has no row of its own: fastseq's words from a call of this width, or that it is the free choice."""
    build, missing = fastseq_layer(cell), fastseq_missing(cell)

    def reason(w: Workload) -> str | None:
        if missing(w):
            return missing(w)
        fastseq, backends = importlib.import_module("fastseq"), importlib.import_module("fastseq.backends")
        layer = build(w).to(w.device, w.torch_dtype)
        try:
            calls = fastseq.explain(Forced(layer, backend), *inputs(w, steps=1)).calls
        except backends.Refused as error:
            return "; ".join(error.reasons)
        except RuntimeError:
            return None  # a failure, not a refusal: the check reports it
        if w.mode == "training":
            against = [reason for query, *_ in calls for reason in backends.obstacles(backend, query._replace(backward=True))]
            if against:
                return f"backward: {'; '.join(dict.fromkeys(against))}"
        chosen = fastseq.explain(layer, *inputs(w)).backends
        return "it is what fastseq chooses by itself here" if set(chosen) == {backend} else None

    return reason


def _way(word: str) -> Callable[[Any], list[str]]:
    """The backend that ran a call, and how, in both directions if there are two. The call runs once."""

    def chose(call: Any) -> list[str]:
        def run() -> None:
            with torch.set_grad_enabled(call.mode == "training"):  # fastseq.explain itself wants none
                call.run()

        explained = importlib.import_module("fastseq").explain(run)
        found = [f"backend: {name}" for name in sorted(set(explained.backends))]
        for (query, *_), notes in zip(explained.calls, explained.notes, strict=True):
            found += [f"{word}, {'backward' if query.backward else 'forward'}: {note}" for note in notes]
        return list(dict.fromkeys(found))

    return chose


def forced_name(cell: str, backend: str) -> str:
    return f"fastseq.{cell} ({backend})"


def forced(
    cell: str, backend: str, word: str, color: str, layout: str = "time", inputs: Callable[..., tuple[Any, ...]] = _sequence
) -> Provider:
    """fastseq's layer or cell on a backend whose way of taking a call goes by this word; `inputs`: of a call of a workload."""
    own = fastseq_layer(cell)
    return Provider(
        forced_name(cell, backend),
        cell.lower(),
        layout,
        lambda w: Forced(own(w), backend),
        _refuses(cell, backend, inputs),
        _way(word),
        color,
    )


def _graphs(call: Any) -> list[str]:
    """How many graphs torch.compile makes of a call: none where Dynamo leaves torch's layer as it is."""
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    call.forward()
    return [f"compiled graphs: {counters['stats']['unique_graphs']}"]


def _providers(cell: str, color: str) -> list[Provider]:
    layer = getattr(nn, cell)
    return [
        *(forced(cell, backend, word, color) for backend, word in FORCED.items()),
        Provider(
            f"torch.compile {cell}",
            cell.lower(),
            "time",
            lambda w: Compiled(layer(w.I, w.H, **w.options)),
            chose=_graphs,
            color=color,
            dashed=True,
        ),
    ]


RECURRENT_PROVIDERS = {p.name: p for cell, color in RECURRENT.items() for p in _providers(cell, color)}
