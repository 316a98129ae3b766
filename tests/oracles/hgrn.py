"""What flash-linear-attention's naive recurrence makes of two small HGRN layers, kept in hgrn.json. Around it, in plain PyTorch,
what its layer and model do: projections, lower bounds by a cumulated softmax, swiglu, gated norm. (Its kernels need a GPU.)

In tests/: pip install --no-deps fla-core==0.6.0 && python -m oracles.hgrn --write
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from . import frozen

BATCH, STEPS, WIDTH, LAYERS = 2, 7, 4, 2


def found() -> dict[str, Any]:
    """Weights of both layers alike, logits of the lower bounds [L, H], input [B, T, I], and what follows from them; fp64."""
    package = importlib.util.find_spec("fla")
    assert package is not None and package.submodule_search_locations
    file = Path(package.submodule_search_locations[0]) / "ops/hgrn/naive.py"  # by itself: the package imports its kernels
    spec = importlib.util.spec_from_file_location("naive_hgrn", file)
    assert spec is not None and spec.loader is not None
    naive = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(naive)
    torch.manual_seed(0)
    weights = {name: torch.randn(WIDTH, WIDTH, dtype=torch.float64) / 2 for name in ("f", "i", "g")}
    weights |= {"norm": torch.rand(WIDTH, dtype=torch.float64), "lower_bounds": torch.randn(LAYERS, WIDTH, dtype=torch.float64)}
    x = torch.randn(BATCH, STEPS, WIDTH, dtype=torch.float64, requires_grad=True)
    for weight in weights.values():
        weight.requires_grad_()
    shares = weights["lower_bounds"].softmax(0)
    bounds, h = shares.cumsum(0) - shares[0], x
    single, torch.Tensor.float = torch.Tensor.float, torch.Tensor.double  # it computes in fp32 whatever it is given
    try:
        for bound in bounds:
            f, i, g = (F.linear(h, weights[name]) for name in ("f", "i", "g"))
            f = bound + (1 - bound) * f.sigmoid()
            o, _ = naive.naive_recurrent_hgrn(F.silu(i) * (1 - f), f.log())
            h = F.rms_norm(o, (WIDTH,), weights["norm"], 1e-5) * F.silu(g)
    finally:
        torch.Tensor.float = single
    grads = torch.autograd.grad(frozen.weighted(h), (x, *weights.values()))
    case = {"output": h, "gradient of input": grads[0]}
    case |= {f"gradient of {name}": grad for name, grad in zip(weights, grads[1:], strict=True)}
    return {"input": x, **weights, "cases": {"two layers": case}}


if __name__ == "__main__":
    said = {"package": "fla-core", "version": "0.6.0", "license": "MIT"}
    frozen.main(__file__, __doc__, said, found)
