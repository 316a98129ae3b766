"""What transformers makes of a small GPT-2, BERT, ViT and T5, kept in transformers_models.json.

With transformers 5.23.0, in tests/: python -m oracles.transformers_models --write

License of the package: Apache-2.0. What it computes in fp32 whatever the model is, norms and softmax, is computed in fp64 here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import frozen

WORDS, WIDTH, HEADS, INNER, LAYERS, LONGEST, BUCKETS, FARTHEST = 4, 4, 2, 5, 2, 6, 8, 5
SIZE, PATCH, CHANNELS, CLASSES = 4, 2, 2, 3


def results_of(model: nn.Module, inputs: dict[str, Tensor], *outputs: str) -> dict[str, Any]:
    """Weights, results of those names, gradients of a sum of them."""
    torch.manual_seed(1)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.5)
    found = model(**inputs)
    weights = dict(model.named_parameters())
    grads = torch.autograd.grad(frozen.weighted(*(found[name] for name in outputs)), list(weights.values()))
    kept = {name: found[name] for name in outputs}
    return {"weights": weights, **kept, "gradients": dict(zip(weights, grads, strict=True))}


def found() -> dict[str, Any]:
    import transformers as hf

    torch.set_default_dtype(torch.float64)
    torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double  # type: ignore[misc, method-assign]
    torch.manual_seed(0)
    source, target, lengths = torch.randint(WORDS, (2, 6)), torch.randint(WORDS, (2, 6)), torch.tensor([6, 2])
    images, mask = torch.randn(2, CHANNELS, SIZE, SIZE), (torch.arange(6) < lengths[:, None]).long()
    segments = (torch.arange(6) > 2).long().expand(2, 6)
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    gpt = hf.GPT2Config(vocab_size=WORDS, n_positions=LONGEST, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_inner=INNER, **none)
    sizes = dict(hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=INNER)
    none = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    bert = hf.BertConfig(vocab_size=WORDS, max_position_embeddings=LONGEST, pad_token_id=None, **sizes, **none)
    vit = hf.ViTConfig(image_size=SIZE, patch_size=PATCH, num_channels=CHANNELS, num_labels=CLASSES, **sizes, **none)
    t5 = hf.T5Config(vocab_size=WORDS, d_model=WIDTH, d_kv=WIDTH // HEADS, d_ff=INNER, num_layers=LAYERS, num_heads=HEADS,
                     relative_attention_num_buckets=BUCKETS, relative_attention_max_distance=FARTHEST,
                     dropout_rate=0.0)  # fmt: skip
    for config in (gpt, bert, vit, t5):
        config._attn_implementation = "eager"
    of_bert = {"input_ids": source, "attention_mask": mask, "token_type_ids": segments}
    of_t5 = {"input_ids": source, "attention_mask": mask, "decoder_input_ids": target}
    return {
        "source": source, "target": target, "lengths": lengths, "images": images, "segments": segments,
        "gpt": results_of(hf.GPT2LMHeadModel(gpt).eval(), {"input_ids": source}, "logits"),
        "bert": results_of(hf.BertForPreTraining(bert).eval(), of_bert, "prediction_logits", "seq_relationship_logits"),
        "vit": results_of(hf.ViTForImageClassification(vit).eval(), {"pixel_values": images}, "logits"),
        "t5": results_of(hf.T5ForConditionalGeneration(t5).eval(), of_t5, "logits"),
    }  # fmt: skip


if __name__ == "__main__":
    frozen.main(__file__, __doc__, {"package": "transformers", "version": "5.23.0", "license": "Apache-2.0"}, found)
