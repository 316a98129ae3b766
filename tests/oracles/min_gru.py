"""What minGRU-pytorch makes of a small layer, kept in min_gru.json: its log-space form, another program for the same equations.

pip install --no-deps minGRU-pytorch==0.2.1 && python tests/oracles/min_gru.py --write
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).with_suffix(".json")
BATCH, STEPS, WIDTH = 2, 9, 4


def found() -> dict[str, Any]:
    """Weights (rows of the candidate, then of the gate), input [B, T, I], a state before it, and what follows from them; fp64."""
    from minGRU_pytorch import minGRU

    torch.manual_seed(0)
    layer = minGRU(WIDTH).double()
    x = torch.randn(BATCH, STEPS, WIDTH, dtype=torch.float64, requires_grad=True)
    before = torch.rand(BATCH, 1, WIDTH, dtype=torch.float64) + 0.1  # of its logarithms, so positive
    results: dict[str, Any] = {"weight": layer.to_hidden_and_gate.weight, "input": x, "before": before}
    for name, state in (("plain", None), ("from state", before)):
        output = layer(x, state)
        weights = torch.arange(output.numel(), dtype=torch.float64).view_as(output).cos()
        grads = torch.autograd.grad((output * weights).sum(), (x, layer.to_hidden_and_gate.weight))
        results[name] = {"output": output, "gradient of input": grads[0], "gradient of weight": grads[1]}
    return results


def as_lists(value: Any) -> Any:
    return {name: as_lists(each) for name, each in value.items()} if isinstance(value, dict) else value.tolist()


def as_tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: as_tensors(each) for name, each in value.items()}
    return torch.tensor(value, dtype=torch.float64)


def read() -> dict[str, Any]:
    return as_tensors(json.loads(FILE.read_text())["results"])


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    said = {
        "package": "minGRU-pytorch",
        "version": "0.2.1",
        "licence": "MIT",
        "command": "python tests/oracles/min_gru.py --write",
    }
    FILE.write_text(json.dumps(said | {"results": as_lists(found())}) + "\n")
