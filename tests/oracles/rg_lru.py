"""What transformers' RecurrentGemmaRglru makes of a small sequence, without and with segments, kept in rg_lru.json.

In tests/: pip install transformers==5.23.0 && python -m oracles.rg_lru --write
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from . import frozen

BATCH, STEPS, WIDTH, HEADS = 2, 7, 6, 3


def found() -> dict[str, Any]:
    """Its parameters by its names, input [B, T, I], where segments begin [B, T], and what follows from them; fp64."""
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

    torch.manual_seed(0)
    layer = RecurrentGemmaRglru(RecurrentGemmaConfig(lru_width=WIDTH, hidden_size=WIDTH, num_attention_heads=HEADS)).double()
    layer._rnn_scan = functools.partial(layer._rnn_scan, acc_dtype=torch.float64)  # its states are fp32 whatever it is given
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    x = torch.randn(BATCH, STEPS, WIDTH, dtype=torch.float64, requires_grad=True)
    resets = torch.zeros(BATCH, STEPS, dtype=torch.bool)
    resets[0, [0, 3]] = resets[1, [4, 5]] = True
    parameters = dict(layer.named_parameters())
    cases = {}
    for name, begins in (("plain", torch.zeros_like(resets)), ("resets", resets)):
        positions = torch.ones(BATCH, STEPS, dtype=torch.int64)
        positions[:, 0] = 0
        positions[begins] = 0
        layer.recurrent_states = None
        output = layer(x, positions)
        grads = torch.autograd.grad(frozen.weighted(output), (x, *parameters.values()))
        cases[name] = {"output": output, "gradient of input": grads[0]}
        cases[name] |= {f"gradient of {weight}": grad for weight, grad in zip(parameters, grads[1:], strict=True)}
    return {"input": x, "resets": resets, **parameters, "cases": cases}


if __name__ == "__main__":
    said = {"package": "transformers", "version": "5.23.0", "license": "Apache-2.0"}
    frozen.main(__file__, __doc__, said, found)
