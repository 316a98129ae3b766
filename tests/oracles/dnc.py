"""What the package dnc makes of five steps from a state with something in it, kept in dnc.json.

In an environment of its own, in tests/: pip install --no-deps dnc==1.1.0, then python -m oracles.dnc --write

License of the package: MIT. Step by step: its call over a sequence gives every step the first read vector. Its mask of the links
is made anew in fp64. The state has no two usages alike, among which it would choose as topk does.
"""

from __future__ import annotations

from typing import Any

import torch

from . import frozen

BATCH, STEPS, X, H, CELLS, CELL, HEADS = 2, 5, 3, 6, 4, 3, 2
STATE = ("memory", "usage_vector", "precedence", "link_matrix", "write_weights", "read_weights")


def found() -> dict[str, Any]:
    """Weights, input ``[B, T, X]``, the state before, outputs ``[B, T, X]``, the state after, gradients."""
    from dnc import DNC

    torch.manual_seed(0)
    model = DNC(X, H, "lstm", num_layers=1, num_hidden_layers=1, nr_cells=CELLS, read_heads=HEADS, cell_size=CELL).double()
    memory = model.memories[0]
    memory.I = memory.I.double()
    for parameter in memory.parameters():
        torch.nn.init.normal_(parameter, 0, 0.7)
    x = torch.randn(BATCH, STEPS, X, dtype=torch.float64, requires_grad=True)
    hidden = {name: value.double() for name, value in memory.reset(BATCH).items()}
    hidden["memory"] = torch.randn(BATCH, CELLS, CELL, dtype=torch.float64)
    hidden["usage_vector"] = torch.rand(BATCH, CELLS, dtype=torch.float64)
    for name in ("write_weights", "read_weights", "precedence"):
        hidden[name] = torch.randn_like(hidden[name]).softmax(-1) / 2
    hidden["link_matrix"] = memory.I * torch.rand_like(hidden["link_matrix"]) / CELLS
    h, c, read = (torch.randn(BATCH, n, dtype=torch.float64) for n in (H, H, HEADS * CELL))
    before = {name: hidden[name] for name in STATE} | {"h": h, "c": c, "read": read}
    state, outputs = ([(h[None], c[None])], dict(hidden), read), []
    for t in range(STEPS):
        y, state = model(x[:, t : t + 1], state)
        outputs.append(y[:, 0])
    controller, hidden, read = state
    output = torch.stack(outputs, 1)
    after = {name: hidden[name] for name in STATE} | {"h": controller[0][0][0], "c": controller[0][1][0], "read": read}
    frozen.weighted(output, *after.values()).backward()
    named = dict(model.named_parameters())
    gradients = {name: parameter.grad for name, parameter in named.items()} | {"input": x.grad}
    return {"weights": named, "input": x, "before": before, "output": output, "after": after, "gradients": gradients}


if __name__ == "__main__":
    frozen.main(__file__, __doc__, {"package": "dnc", "version": "1.1.0", "license": "MIT"}, found)
