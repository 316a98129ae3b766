"""Models of transformers that compute what systems of fastseq.models do, with the same parameters under other names."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .models import missing_package
from .systems import CHANNELS, LAYERS, PATCH, SystemWorkload


class Theirs(nn.Module):
    """A model of transformers; `names` make ours of its parameters' names, what `turned` says is stored the other way around."""

    def __init__(self, model: nn.Module, names: tuple[tuple[str, str], ...], turned: str) -> None:
        super().__init__()
        self.model, self.names, self.turned = model, names, turned

    def table(self) -> dict[str, list[tuple[str, bool]]]:
        """Of ours the parts that they have, in order: names, and whether these are turned."""
        found: dict[str, list[tuple[str, bool]]] = {}
        for theirs, parameter in self.named_parameters():
            name = theirs.removeprefix("model.")
            turned = bool(self.turned) and parameter.dim() == 2 and re.search(self.turned, name) is not None
            for pattern, other in self.names:
                name = re.sub(pattern, other, name)
            found.setdefault(name, []).append((theirs, turned))
        return found

    def adopt(self, values: dict[str, Tensor]) -> dict[str, nn.Parameter]:
        """Takes parameters of ours; its own by their names."""
        own = dict(self.named_parameters())
        with torch.no_grad():
            for name, parts in self.table().items():
                for (theirs, turned), value in zip(parts, values[name].chunk(len(parts)), strict=True):
                    own[theirs].copy_(value.T if turned else value)
        return own

    def gradients_of_ours(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: torch.cat([found[theirs].T if turned else found[theirs] for theirs, turned in parts])
            for name, parts in self.table().items()
        }

    def forward(self, input: Tensor) -> Tensor:
        model: Any = self.model
        return model(input).logits


class Generates(Theirs):
    """With a cache of keys and values, which grows by a token and is cut again: a call leaves it as it was."""

    def forward(self, input: Tensor) -> Tensor:
        return self._call(input, None, self._source(input)).logits

    def _source(self, tokens: Tensor) -> dict[str, Any]:
        return {}

    def _call(self, tokens: Tensor, cache: Any, source: dict[str, Any]) -> Any:
        model: Any = self.model
        return model(input_ids=tokens, past_key_values=cache, use_cache=cache is not None, **source)

    def context(self, tokens: Tensor) -> Any:
        model: Any = self.model
        source = self._source(tokens)
        found = model(**self._given(tokens[:, :-1]), use_cache=True, **source)
        return found.past_key_values, source

    def _given(self, tokens: Tensor) -> dict[str, Tensor]:
        return {"input_ids": tokens}

    def step(self, token: Tensor, kept: Any) -> tuple[Tensor, Any]:
        cache, source = kept
        logits = self._call(token[:, None], cache, source).logits[:, 0]
        cache.crop(-1)
        return logits, kept


class Translates(Generates):
    """From a sequence to itself."""

    def _source(self, tokens: Tensor) -> dict[str, Any]:
        model: Any = self.model
        return {"encoder_outputs": (model.encoder(tokens)[0],)}

    def _given(self, tokens: Tensor) -> dict[str, Tensor]:
        return {"decoder_input_ids": tokens}

    def _call(self, tokens: Tensor, cache: Any, source: dict[str, Any]) -> Any:
        model: Any = self.model
        return model(decoder_input_ids=tokens, past_key_values=cache, use_cache=cache is not None, **source)


@dataclass(frozen=True)
class Oracle:
    """`config` and `model`: names of transformers' classes; `sizes`: from a workload to the arguments of the former."""

    config: str
    model: str
    sizes: Callable[[SystemWorkload], dict[str, Any]]
    names: tuple[tuple[str, str], ...]
    turned: str = ""
    kind: type[Theirs] = Theirs

    def build(self, w: Any) -> Theirs:
        transformers = importlib.import_module("transformers")
        model = getattr(transformers, self.model)(getattr(transformers, self.config)(**self.sizes(w)))
        model.set_attn_implementation("sdpa")
        return self.kind(model, self.names, self.turned)

    def missing(self, w: Any) -> str | None:
        return missing_package("transformers")


def _bert(w: SystemWorkload) -> dict[str, Any]:
    return {
        "hidden_size": w.H, "num_hidden_layers": LAYERS, "num_attention_heads": w.heads, "intermediate_size": 4 * w.H,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0
    }  # fmt: skip


ORACLES = {
    "GPT": Oracle(
        "GPT2Config", "GPT2LMHeadModel",
        lambda w: {
            "vocab_size": w.vocabulary, "n_embd": w.H, "n_layer": LAYERS, "n_head": w.heads, "n_positions": w.T + 1,
            "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": None
        },
        (
            ("transformer.wte", "embedding.tokens"), ("transformer.wpe", "embedding.places"), ("transformer.h", "decoder.blocks"),
            ("transformer.ln_f", "decoder.final"), ("ln_1", "norms.0"), ("ln_2", "norms.1"),
            ("attn.c_attn", "attention.projection"), ("attn.c_proj", "attention.out"), ("mlp.c_fc", "inner.0"),
            ("mlp.c_proj", "inner.3"), ("^", "model.")
        ),
        r"\.c_(attn|proj|fc)\.", Generates,
    ),
    "BERT": Oracle(
        "BertConfig", "BertForMaskedLM",
        lambda w: {"vocab_size": w.vocabulary, "max_position_embeddings": w.T + 1, "pad_token_id": None} | _bert(w),
        (
            ("bert.embeddings.word_embeddings", "embedding.tokens"), ("bert.embeddings.position_embeddings", "embedding.places"),
            ("bert.embeddings.token_type_embeddings", "segments"), ("bert.embeddings.LayerNorm", "norm"),
            ("bert.encoder.layer", "encoder.blocks"), ("attention.output.dense", "attention.out"),
            ("attention.output.LayerNorm", "norms.0"), ("output.LayerNorm", "norms.1"),
            (r"attention.self.(query|key|value)", "attention.projection"), ("intermediate.dense", "inner.0"),
            (r"(\d).output.dense", r"\1.inner.3"), ("cls.predictions.bias", "output.bias"),
            ("cls.predictions.transform.dense", "transform"), ("cls.predictions.transform.LayerNorm", "transform_norm"),
            ("^", "model.")
        ),
    ),
    "ViT": Oracle(
        "ViTConfig", "ViTForImageClassification",
        lambda w: {
            "image_size": PATCH * math.isqrt(w.T), "patch_size": PATCH, "num_channels": CHANNELS, "num_labels": w.vocabulary,
            "layer_norm_eps": 1e-6
        } | _bert(w),
        (
            ("vit.embeddings.cls_token", "token"), ("vit.embeddings.position_embeddings", "places"),
            ("vit.embeddings.patch_embeddings.projection", "patches"), ("vit.layers", "encoder.blocks"),
            (r"attention.[qkv]_proj", "attention.projection"), ("attention.o_proj", "attention.out"),
            ("layernorm_before", "norms.0"), ("layernorm_after", "norms.1"), ("mlp.fc1", "inner.0"), ("mlp.fc2", "inner.3"),
            ("vit.layernorm", "encoder.final"), ("classifier", "head")
        ),
    ),
    "T5": Oracle(
        "T5Config", "T5ForConditionalGeneration",
        lambda w: {
            "vocab_size": w.vocabulary, "d_model": w.H, "d_kv": w.H // w.heads, "d_ff": 4 * w.H, "num_layers": 1,
            "num_heads": w.heads, "dropout_rate": 0.0
        },
        (
            ("shared", "embedding.tokens"), (r"encoder.block.0.+relative_attention_bias", "encoder_bias"),
            (r"decoder.block.0.+relative_attention_bias", "decoder_bias"), ("block", "blocks"),
            (r"SelfAttention.o\b", "attention.out"), (r"EncDecAttention.o\b", "cross.out"),
            (r"SelfAttention.[qkv]\b", "attention.projection"), (r"EncDecAttention.[qkv]\b", "cross.projection"),
            ("DenseReluDense.wi", "inner.0"), ("DenseReluDense.wo", "inner.3"), (r"layer\.(\d).layer_norm", r"norms.\1"),
            (r"layer\.\d\.", ""), ("final_layer_norm", "final"), ("^", "model.")
        ),
        kind=Translates,
    ),
}  # fmt: skip
