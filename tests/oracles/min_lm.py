"""What minGRU-pytorch's language model makes of two rows, with minGRU and with minLSTM, kept in min_lm.json.

In an environment of its own, in tests/: pip install --no-deps minGRU-pytorch==0.2.1, then python -m oracles.min_lm --write

License of the package: MIT.
"""

from __future__ import annotations

from typing import Any

import torch

from . import frozen

TOKENS, WIDTH, DEPTH, BATCH, STEPS = 4, 4, 2, 2, 7
UNITS, INNER = WIDTH * 3 // 2, WIDTH * 2


def found() -> dict[str, Any]:
    """Of each kind: weights, ids ``[B, T]``, logits, gradients."""
    from minGRU_pytorch.minLM import minLM

    results = {}
    for kind in ("min_gru", "min_lstm"):
        torch.manual_seed(0)
        model = minLM(num_tokens=TOKENS, dim=WIDTH, depth=DEPTH, ff_mult=2, expansion=1.5, use_lstm=kind == "min_lstm").double()
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases, which begin as ones and small
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        ids = torch.randint(TOKENS, (BATCH, STEPS))
        logits = model(ids)
        frozen.weighted(logits).backward()
        named = dict(model.named_parameters())
        gradients = {name: parameter.grad for name, parameter in named.items()}
        results[kind] = {"weights": named, "ids": ids, "logits": logits, "gradients": gradients}
    return results


if __name__ == "__main__":
    frozen.main(__file__, __doc__, {"package": "minGRU-pytorch", "version": "0.2.1", "license": "MIT"}, found)
