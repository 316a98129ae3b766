"""What transformers' Longformer makes of ragged rows with two global tokens each, kept in longformer.json.

In tests/: pip install transformers==5.23.0, then python -m oracles.longformer --write

License of the package: Apache-2.0. Its softmax is in fp32, whatever the dtype: results are good to about 1e-7.
Every row has as many global tokens as the others: where one has fewer, its gradients are NaN.
"""

from __future__ import annotations

from typing import Any

import torch

from . import frozen

BATCH, STEPS, WIDTH, HEADS, DEPTH, WINDOW, INNER = 2, 12, 8, 2, 2, 4, 10
LENGTHS, PLACES = [12, 9], [[0, 7], [3, 5]]


def found() -> dict[str, Any]:
    """Weights, input ``[B, T, W]``, output (zero beyond a row's length), gradients."""
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerEncoder

    torch.manual_seed(0)
    config = LongformerConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_hidden_layers=DEPTH,
        intermediate_size=INNER,
        attention_window=[WINDOW] * DEPTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=1e-5,
    )
    model = LongformerEncoder(config).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.5)
    x = torch.randn(BATCH, STEPS, WIDTH, dtype=torch.float64, requires_grad=True)
    valid = torch.arange(STEPS) < torch.tensor(LENGTHS)[:, None]
    mask = torch.where(valid, 0.0, -10000.0)
    for row, places in enumerate(PLACES):
        for place in places:
            mask[row, place] = 10000.0
    output = model(x, attention_mask=mask).last_hidden_state * valid[..., None]
    frozen.weighted(output).backward()
    named = dict(model.named_parameters())
    gradients = {name: parameter.grad for name, parameter in named.items()} | {"input": x.grad}
    return {"weights": named, "input": x, "output": output, "gradients": gradients}


if __name__ == "__main__":
    frozen.main(__file__, __doc__, {"package": "transformers", "version": "5.23.0", "license": "Apache-2.0"}, found)
