"""What minGRU-pytorch makes of a small minLSTM, kept in min_lstm.json: its log-space form, another program for one function.

In tests/: pip install --no-deps minGRU-pytorch==0.2.1 && python -m oracles.min_lstm --write
"""

from __future__ import annotations

from typing import Any

import torch

from . import frozen

BATCH, STEPS, WIDTH = 2, 9, 4


def found() -> dict[str, Any]:
    """Weights (rows of the candidate, of f, of i), input [B, T, I], a state before it, and what follows from them; fp64."""
    from minGRU_pytorch.minLSTM import minLSTM

    torch.manual_seed(0)
    layer = minLSTM(WIDTH).double()
    weight = layer.to_hidden_and_f_i_gate.weight
    x = torch.randn(BATCH, STEPS, WIDTH, dtype=torch.float64, requires_grad=True)
    before = torch.rand(BATCH, 1, WIDTH, dtype=torch.float64) + 0.6
    cases = {}
    for name, state in (("plain", None), ("from state", before - 0.5)):  # it takes g of a state first
        output = layer(x, state)
        grads = torch.autograd.grad(frozen.weighted(output), (x, weight))
        cases[name] = {"output": output, "gradient of input": grads[0], "gradient of weight": grads[1]}
    return {"weight": weight, "input": x, "before": before, "cases": cases}


if __name__ == "__main__":
    said = {"package": "minGRU-pytorch", "version": "0.2.1", "license": "MIT"}
    frozen.main(__file__, __doc__, said, found)
