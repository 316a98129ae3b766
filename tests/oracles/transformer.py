"""What joeynmt makes of small Transformers, kept in transformer.json: encoder and decoder, norms before and after, sinusoids.

In an environment of its own, in tests/: pip install --no-deps joeynmt==2.3.0 tensorboard 'importlib_metadata<8.6' zipp torchtext
absl-py, then python -m oracles.transformer --write

License of the package: Apache-2.0. Its sinusoids are fp32 whatever the model is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import frozen

WORDS, WIDTH, HEADS, INNER, LAYERS, SOURCE, TARGET, LENGTHS = 3, 4, 2, 5, 2, 4, 3, (4, 1)


def found() -> dict[str, Any]:
    """Of both norms weights, vectors of source and target, logits ``[B, T, V]``, gradients; the sinusoids ``[T, W]``."""
    from joeynmt.decoders import TransformerDecoder
    from joeynmt.encoders import TransformerEncoder

    torch.manual_seed(0)
    lengths = torch.tensor(LENGTHS)
    mask = (torch.arange(SOURCE) < lengths[:, None])[:, None]
    results: dict[str, Any] = {"lengths": lengths}
    for norm in ("pre", "post"):
        sizes: dict[str, Any] = dict(hidden_size=WIDTH, ff_size=INNER, num_layers=LAYERS, num_heads=HEADS, layer_norm=norm)
        model = nn.ModuleDict({
            "encoder": TransformerEncoder(dropout=0.0, emb_dropout=0.0, **sizes),
            "decoder": TransformerDecoder(dropout=0.0, emb_dropout=0.0, vocab_size=WORDS, **sizes),
        })  # fmt: skip
        model.double().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
        inputs = {
            name: torch.randn(2, steps, WIDTH, dtype=torch.float64, requires_grad=True)
            for name, steps in (("source", SOURCE), ("target", TARGET))
        }
        memory, _ = model["encoder"](inputs["source"], lengths, mask)
        seen = torch.ones(2, 1, TARGET, dtype=torch.bool)
        logits, *_ = model["decoder"](inputs["target"], memory, None, mask, TARGET, None, seen)
        weights = dict(model.named_parameters())
        grads = torch.autograd.grad(frozen.weighted(logits), [*weights.values(), *inputs.values()])
        gradients = dict(zip([*weights, *inputs], grads, strict=True))
        results[norm] = {"weights": weights, **inputs, "memory": memory, "logits": logits, "gradients": gradients}
        results["sinusoids"] = model["encoder"].pe.pe[0, : max(SOURCE, TARGET)]
    return results


if __name__ == "__main__":
    frozen.main(__file__, __doc__, {"package": "joeynmt", "version": "2.3.0", "license": "Apache-2.0"}, found)
