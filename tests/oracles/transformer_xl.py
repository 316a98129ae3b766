"""What transformers makes of a small Transformer-XL, kept in transformer_xl.json: segments, memories, both masks, both norms.

In an environment of its own, in tests/: pip install --no-deps transformers==4.35.2 'tokenizers<0.19' 'huggingface_hub<0.26'
requests urllib3 idna certifi charset_normalizer, then USE_FLAX=0 python -m oracles.transformer_xl --write

License of the package: Apache-2.0. Later versions fail, and since 5 it is gone. Its scores pass through fp32, whose range cannot
hold the masks of fp64: here they stay in fp64. Memories begin as zeros that are attended to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import frozen

WORDS, WIDTH, HEADS, INNER, LAYERS, MEMORY, SEGMENTS, STEPS, CLAMP = 4, 4, 2, 5, 3, 4, 3, 3, 5


def found() -> dict[str, Any]:
    """Weights, tokens ``[B, all steps]``; of each case hidden states likewise, memories ``[B, M, W]``, gradients."""
    from transformers import TransfoXLConfig, TransfoXLModel

    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    torch.manual_seed(0)
    tokens = torch.randint(WORDS, (2, SEGMENTS * STEPS))
    results: dict[str, Any] = {"tokens": tokens}
    for name, same_length, before in (("same length", True, False), ("all", False, False), ("norm before", True, True)):
        sizes: dict[str, Any] = dict(vocab_size=WORDS, d_model=WIDTH, d_embed=WIDTH, n_head=HEADS, d_head=WIDTH // HEADS)
        sizes |= dict(
            d_inner=INNER,
            n_layer=LAYERS,
            mem_len=MEMORY,
            clamp_len=CLAMP,
            same_length=same_length,
            untie_r=False,
            pre_lnorm=before,
        )
        model = TransfoXLModel(TransfoXLConfig(cutoffs=[], div_val=1, dropout=0.0, dropatt=0.0, **sizes)).double().eval()
        weights = dict(model.named_parameters())
        torch.manual_seed(1)
        for weight in weights.values():
            nn.init.normal_(weight, std=0.5)
        memory, outputs = None, []
        for segment in tokens.split(STEPS, 1):
            out = model(segment, mems=memory)
            memory = out.mems
            outputs.append(out.last_hidden_state)
        output = torch.cat(outputs, 1)
        grads = torch.autograd.grad(frozen.weighted(output), list(weights.values()))
        memories = {str(number): each.transpose(0, 1) for number, each in enumerate(memory)}
        case = {"output": output, "memories": memories, "gradients": dict(zip(weights, grads, strict=True))}
        results |= {"weights": weights, name: case}
    return results


if __name__ == "__main__":
    frozen.main(__file__, __doc__, {"package": "transformers", "version": "4.35.2", "license": "Apache-2.0"}, found)
