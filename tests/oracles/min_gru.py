"""What minGRU-pytorch makes of a small layer, kept in min_gru.json: its log-space form, another program for the same equations.

In tests/: pip install --no-deps minGRU-pytorch==0.2.1 && python -m oracles.min_gru --write
"""

from __future__ import annotations

from typing import Any

import torch

from . import frozen

BATCH, STEPS, WIDTH = 2, 9, 4


def found() -> dict[str, Any]:
    """Weights (rows of the candidate, then of the gate), input [B, T, I], a state before it, and what follows from them; fp64."""
    from minGRU_pytorch import minGRU

    torch.manual_seed(0)
    layer = minGRU(WIDTH).double()
    x = torch.randn(BATCH, STEPS, WIDTH, dtype=torch.float64, requires_grad=True)
    before = torch.rand(BATCH, 1, WIDTH, dtype=torch.float64) + 0.1  # of its logarithms, so positive
    cases = {}
    for name, state in (("plain", None), ("from state", before)):
        output = layer(x, state)
        grads = torch.autograd.grad(frozen.weighted(output), (x, layer.to_hidden_and_gate.weight))
        cases[name] = {"output": output, "gradient of input": grads[0], "gradient of weight": grads[1]}
    return {"weight": layer.to_hidden_and_gate.weight, "input": x, "before": before, "cases": cases}


if __name__ == "__main__":
    said = {"package": "minGRU-pytorch", "version": "0.2.1", "license": "MIT"}
    frozen.main(__file__, __doc__, said, found)
