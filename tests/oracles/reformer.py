"""What transformers' hashed attention makes of two rows in one to three rounds, kept in reformer.json.

In tests/: pip install transformers==5.23.0, then python -m oracles.reformer --write

License of the package: Apache-2.0.
"""

from __future__ import annotations

from typing import Any

import torch

from . import frozen

BATCH, STEPS, WIDTH, HEADS, CHUNK, BUCKETS, SEED = 2, 16, 8, 2, 4, 4, 3
CASES = {"one round": (1, True), "two rounds, both ways": (2, False), "three rounds": (3, True)}


def found() -> dict[str, Any]:
    """Of each case: weights, rotations ``[H, E, R, buckets / 2]``, input ``[B, T, W]``, output before a projection, gradients."""
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    results = {}
    for name, (rounds, causal) in CASES.items():
        torch.manual_seed(0)
        config = ReformerConfig(
            hidden_size=WIDTH,
            num_attention_heads=HEADS,
            attention_head_size=WIDTH // HEADS,
            num_hashes=rounds,
            num_buckets=BUCKETS,
            lsh_attn_chunk_length=CHUNK,
            is_decoder=causal,
            lsh_attention_probs_dropout_prob=0.0,
            hash_seed=SEED,
        )
        model = LSHSelfAttention(config).double()
        x = torch.randn(BATCH, STEPS, WIDTH, dtype=torch.float64, requires_grad=True)
        output = model(x).hidden_states
        frozen.weighted(output).backward()
        torch.manual_seed(SEED)
        rotations = torch.randn(HEADS, WIDTH // HEADS, rounds, BUCKETS // 2, dtype=torch.float64)
        named = dict(model.named_parameters())
        gradients = {name: parameter.grad for name, parameter in named.items()} | {"input": x.grad}
        results[name] = {"weights": named, "rotations": rotations, "input": x, "output": output, "gradients": gradients}
    return results


if __name__ == "__main__":
    frozen.main(__file__, __doc__, {"package": "transformers", "version": "5.23.0", "license": "Apache-2.0"}, found)
