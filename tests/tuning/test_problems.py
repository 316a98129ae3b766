"""The programs that a tuning measures."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastseq.choice.decision import MODES, Call
from fastseq.tuning.problems import problem


class Ran(TorchDispatchMode):
    """Keeps the names of the functions that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cell", ("lstm", "gru", "rnn_tanh"))
@pytest.mark.parametrize("hidden", (5, 40))
@pytest.mark.parametrize("steps", (1, 3))
def test_a_cells_training_steps_stand_among_other_functions(cell, hidden, steps):
    """As in a model, where they share the caches with these; a step without gradients is measured alone."""

    def ran(mode):
        own = problem(Call("recurrent_cell", mode, cell, "float32", "", "padded", 1, (2, steps, hidden)), torch.device("cpu"))
        with Ran() as names:
            results = own.torchs()
        return names.names, results

    names, results = ran(MODES[True])
    others = ("exp", "relu", "cat", "sigmoid", "mul", "sub", "abs", "mean")
    assert all(names.count(name) >= steps for name in others)
    assert all(result.isfinite().all() and result.any() for result in results)
    alone, _ = ran(MODES[False])
    assert not set(alone) & {"exp", "cat", "mean"}
