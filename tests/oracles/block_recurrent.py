"""What block-recurrent-transformer-pytorch makes of two segments of four blocks, kept in block_recurrent.json.

In an environment of its own, in tests/: pip install --no-deps block-recurrent-transformer-pytorch==0.4.4
memorizing-transformers-pytorch einops beartype packaging, then python -m oracles.block_recurrent --write

License of the package: MIT. All layers have its cosine scores. Its tables of rotary positions are made anew in fp64.
"""

from __future__ import annotations

from typing import Any

import torch

from . import frozen

TOKENS, WIDTH, HEADS, DEPTH, BLOCK, STATES, BATCH, SEGMENT = 5, 8, 2, 2, 3, 2, 2, 12


def found() -> dict[str, Any]:
    """Weights, ids ``[2, B, SEGMENT]``, and of each segment: logits, states ``[B, S, W]``; gradients of both segments' loss."""
    from block_recurrent_transformer_pytorch import BlockRecurrentTransformer

    torch.manual_seed(0)
    model = BlockRecurrentTransformer(
        num_tokens=TOKENS,
        dim=WIDTH,
        depth=DEPTH,
        dim_head=WIDTH // HEADS,
        heads=HEADS,
        all_layers_qk_rmsnorm=True,
        max_seq_len=SEGMENT,
        block_width=BLOCK,
        recurrent_layers=(2,),
        num_state_vectors=STATES,
    ).double()
    even = torch.arange(0, WIDTH // HEADS, 2, dtype=torch.float64)
    model.rotary_pos_emb.inv_freq = 1.0 / (10000 ** (even * HEADS / WIDTH))
    model.rotary_pos_emb.scale = (even + 0.4 * WIDTH / HEADS) / (1.4 * WIDTH / HEADS)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_scale", "k_scale", "gamma")):  # ones until trained
            torch.nn.init.uniform_(parameter, 0.5, 3.0)
    ids = torch.randint(TOKENS, (2, BATCH, SEGMENT))
    results: dict[str, Any] = {"weights": dict(model.named_parameters()), "ids": ids}
    memories, states, outputs = [], [], []
    for segment in range(2):
        logits, memories, states = model(ids[segment], xl_memories=memories, states=states)
        outputs.append(logits)
        results[f"segment {segment}"] = {"logits": logits, "states": states[0]}
    frozen.weighted(*outputs).backward()
    return results | {"gradients": {name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


if __name__ == "__main__":
    said = {"package": "block-recurrent-transformer-pytorch", "version": "0.4.4", "license": "MIT"}
    frozen.main(__file__, __doc__, said, found)
