"""What pytorch-tcn makes of a small temporal convolutional network, kept in tcn.json: with weight norm and without.

In an environment of its own, in tests/: pip install --no-deps pytorch-tcn==1.2.3, then python -m oracles.tcn --write

License of the package: MIT.
"""

from __future__ import annotations

from typing import Any

import torch

from . import frozen

INPUTS, CHANNELS, KERNEL, STEPS = 3, (4, 4, 2), 3, 12


def found() -> dict[str, Any]:
    """The input ``[B, T, I]``; with and without weight norm weights, output ``[B, T, C]``, gradients."""
    from pytorch_tcn import TCN

    torch.manual_seed(0)
    x = torch.randn(2, STEPS, INPUTS, dtype=torch.float64, requires_grad=True)
    results: dict[str, Any] = {"input": x}
    for name, norm in (("weight norm", "weight_norm"), ("plain", None)):
        model = TCN(INPUTS, list(CHANNELS), KERNEL, dropout=0.0, use_norm=norm, input_shape="NLC").double().eval()
        weights = dict(model.named_parameters())
        for weight in weights.values():
            torch.nn.init.normal_(weight, std=0.5)
        output = model(x)
        grads = torch.autograd.grad(frozen.weighted(output), [x, *weights.values()])
        gradients = dict(zip(["input", *weights], grads, strict=True))
        results[name] = {"weights": weights, "output": output, "gradients": gradients}
    return results


if __name__ == "__main__":
    frozen.main(__file__, __doc__, {"package": "pytorch-tcn", "version": "1.2.3", "license": "MIT"}, found)
