"""What reformer-pytorch makes of two reversible blocks, kept in reversible.json.

In an environment of its own, in tests/: pip install --no-deps reformer-pytorch==1.4.4 local-attention axial-positional-embedding
product-key-memory CoLT5-attention einops, then python -m oracles.reversible --write

License of the package: MIT.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import frozen

BATCH, STEPS, WIDTH, BLOCKS = 2, 3, 4, 2


def part() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def found() -> dict[str, Any]:
    """Weights of f and g of each block, input ``[B, T, 2 W]`` and output, both halves side by side, gradients."""
    from reformer_pytorch.reversible import ReversibleSequence

    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.ModuleList([part(), part()]) for _ in range(BLOCKS)).double()
    model = ReversibleSequence(blocks)
    x = torch.randn(BATCH, STEPS, 2 * WIDTH, dtype=torch.float64, requires_grad=True)
    output = model(x)
    frozen.weighted(output).backward()
    named = dict(blocks.named_parameters())
    gradients = {name: parameter.grad for name, parameter in named.items()} | {"input": x.grad}
    return {"weights": named, "input": x, "output": output, "gradients": gradients}


if __name__ == "__main__":
    frozen.main(__file__, __doc__, {"package": "reformer-pytorch", "version": "1.4.4", "license": "MIT"}, found)
