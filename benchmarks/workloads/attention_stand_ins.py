"""Small attention models as people build them, of torch.nn or of transformers, and as they call them.

A model is a row of ATTENTION_STAND_INS, built from sizes and a seed. In training the gradients are those of the mean
square of what its output is off a target, another at each position. Dropout is timed as the model has it, and compared
without: its bits are nobody else's.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .base import MODES
from .models import ModelCall, ModelProblem, ModelWorkload, missing_package

WAYS = {
    "whole": "one call",
    "steps": "step by step with a cache",
    "greedy": "the prefix once more for each token",
    "pair": "encoder and decoder",
}
WORDS = 24  # that a decoder reads beside a recording
PATCH = 16  # pixels
SMOOTH = "gelu"  # for gradients that can be compared: a relu's jumps where rounding moves a value across zero


class AttentionStandIn(NamedTuple):
    """T: positions that attend (of a recording: of its encoder). `vocabulary` 0: features, pictures or a recording."""

    name: str
    build: Callable[[Any], nn.Module]
    B: int
    T: int
    H: int = 256
    heads: int = 4
    layers: int = 4
    dropout: float = 0.0
    way: str = "whole"
    vocabulary: int = 0
    package: str = ""
    dtype: str = ""  # in place of the run's
    modes: tuple[str, ...] = tuple(MODES)


@dataclass(frozen=True)
class AttentionStandInWorkload(ModelWorkload):
    """`function` is a name of ATTENTION_STAND_INS."""

    dropout: float = 0.0

    @classmethod
    def of(cls, row: AttentionStandIn, mode: str, **common: Any) -> AttentionStandInWorkload:
        common |= {"dtype": row.dtype} if row.dtype else {}
        sizes: dict[str, Any] = {"heads": row.heads, "layers": row.layers, "vocabulary": row.vocabulary, "dropout": row.dropout}
        return cls(row.name, row.T, row.B, row.H, row.H, mode, **sizes, **common)

    @property
    def row(self) -> AttentionStandIn:
        return ATTENTION_STAND_INS[self.function]

    @property
    def unseen(self) -> tuple[str, ...]:
        """Biases of keys: they move every score of a query alike, which softmax does not see."""
        return "key.bias", "k_proj.bias", "k_lin.bias"

    def missing(self) -> str | None:
        return missing_package(self.row.package)

    def build(self) -> nn.Module:
        return self.row.build(self)

    def small(self) -> AttentionStandInWorkload:
        sizes: dict[str, Any] = {"I": 24, "H": 24, "heads": min(self.heads, 4), "layers": min(self.layers, 2)}
        sizes["vocabulary"] = min(self.vocabulary, 50)
        T = 5 if self.row.build is _vision else min(self.T, 7)  # four patches and, of one of the models, a class
        return replace(self, T=T, B=min(self.B, 3), **sizes)

    @property
    def matrices_of_a_token(self) -> int:
        """Elements of the matrices that every token goes through."""
        model = self.build()
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        return sum(p.numel() for p in model.parameters() if p.dim() > 1 and id(p) not in tables)

    def draw(self) -> Tensor:
        """Tokens [B, T], features [B, T, I], pictures [B, 3, side, side] or a recording [B, 80, 2 T]."""
        if self.vocabulary and self.row.build is not _whisper:
            return torch.randint(self.vocabulary, (self.B, self.T), generator=self.generator())
        shapes: dict[Any, tuple[int, ...]] = {_whisper: (80, 2 * self.T), _vision: (3, self.side, self.side)}
        shape = shapes.get(self.row.build, (self.T, self.I))
        return torch.randn(self.B, *shape, generator=self.generator(), dtype=torch.float64)

    @property
    def side(self) -> int:
        """Pixels of a picture of T patches, or of T - 1 and a class."""
        return PATCH * math.isqrt(self.T)

    def loss(self, output: Tensor, input: Tensor) -> Tensor:
        """The squares alone would be constant after a layer norm.

        A target that is the same at every position would give nearly the same gradient to each: torch's layer norm sums those of
        its bias in bfloat16, which stays where it is from the 256th on. That is no measure of what others compute.
        """
        return (output - _target(tuple(output.shape), self.torch_dtype, output.dtype, output.device)).square().mean()

    def call(self, built: nn.Module, problem: ModelProblem, layout: str = "", **options: Any) -> AttentionStandInCall:
        return AttentionStandInCall(built, problem, **options)

    def detail(self) -> dict[str, Any]:
        return {"heads": self.heads, "layers": self.layers, "dropout": self.dropout, "way": WAYS[self.row.way]}


@lru_cache(maxsize=8)
def _target(shape: tuple[int, ...], rounded: torch.dtype, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What an output is drawn to, another at every position: kept, since it is timed with the model."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return drawn.to(rounded).to(device, dtype)


class AttentionStandInCall(ModelCall):
    """Timed as it is, compared without dropout."""

    def outputs(self) -> dict[str, Tensor]:
        self.model.eval()
        found = super().outputs()
        self.model.train(self.mode == "training")
        return found

    def gradients(self) -> dict[str, Tensor]:
        self.model.eval()
        found = super().gradients()
        self.model.train(self.mode == "training")
        return found


def _future(x: Tensor) -> Tensor:
    """[T, T], -inf after the diagonal, of x [B, T, H]."""
    return nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)


class Encoder(nn.Module):
    """nn.TransformerEncoder on features [B, T, H]; on tokens with embedding, learned positions, causal mask, readout."""

    def __init__(self, w: AttentionStandInWorkload) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(w.H, w.heads, 4 * w.H, w.dropout, SMOOTH, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, w.layers)
        if w.vocabulary:
            self.embedding, self.positions = nn.Embedding(w.vocabulary, w.H), nn.Embedding(w.T, w.H)
            self.readout = nn.Linear(w.H, w.vocabulary)
        self.tokens = w.vocabulary > 0

    def forward(self, input: Tensor) -> Tensor:
        if not self.tokens:
            return self.layers(input)
        x = self.embedding(input) + self.positions.weight
        return self.readout(self.layers(x, mask=_future(x), is_causal=True))


class Decoder(nn.Module):
    """nn.TransformerDecoder on features that are its memory as well: [B, T, H] -> [B, T, H]."""

    def __init__(self, w: AttentionStandInWorkload) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(w.H, w.heads, 4 * w.H, w.dropout, SMOOTH, batch_first=True)
        self.layers = nn.TransformerDecoder(layer, w.layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x, x, tgt_mask=_future(x), tgt_is_causal=True)


class Greedy(nn.Module):
    """nn.Transformer that decodes word by word, each time from the whole prefix, as tutorials do: [B, T] -> [B, T, vocabulary].

    The prefixes are those of the input, not the likeliest words: one that is as likely as another would be a result by chance.
    """

    def __init__(self, w: AttentionStandInWorkload) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(w.vocabulary, w.H), nn.Embedding(w.T, w.H)
        self.transformer = nn.Transformer(w.H, w.heads, w.layers, w.layers, 4 * w.H, w.dropout, SMOOTH, batch_first=True)
        self.readout = nn.Linear(w.H, w.vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions.weight
        memory, outputs = self.transformer.encoder(x), []
        for t in range(1, x.shape[1] + 1):
            y = self.transformer.decoder(x[:, :t], memory, tgt_mask=_future(x[:, :t]))
            outputs.append(self.readout(y[:, -1:]))
        return torch.cat(outputs, 1)


class SelfAttention(nn.Module):
    """nn.MultiheadAttention alone: [B, T, H] -> [B, T, H]."""

    def __init__(self, w: AttentionStandInWorkload, weights: bool) -> None:
        super().__init__()
        self.attention, self.weights = nn.MultiheadAttention(w.H, w.heads, w.dropout, batch_first=True), weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=self.weights)[0]


class Gated(nn.Module):
    """norm(x + glu(y)): how a temporal fusion transformer adds what a part of it found."""

    def __init__(self, H: int) -> None:
        super().__init__()
        self.gate, self.norm = nn.Linear(H, 2 * H), nn.LayerNorm(H)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.norm(x + nn.functional.glu(self.gate(y)))


class Fusion(nn.Module):
    """The sequence part of a temporal fusion transformer (Lim et al., 2021): an LSTM, then attention whose averaged weights are
    looked at, each behind a gate: [B, T, H] -> three quantiles [B, T, 3]."""

    def __init__(self, w: AttentionStandInWorkload) -> None:
        super().__init__()
        self.lstm = nn.LSTM(w.H, w.H, batch_first=True)
        self.attention = nn.MultiheadAttention(w.H, w.heads, w.dropout, batch_first=True)
        self.inner = nn.Sequential(nn.Linear(w.H, w.H), nn.ELU(), nn.Linear(w.H, w.H), nn.Dropout(w.dropout))
        self.after_lstm, self.after_attention, self.after_inner = Gated(w.H), Gated(w.H), Gated(w.H)
        self.quantiles = nn.Linear(w.H, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.after_lstm(x, self.lstm(x)[0])
        x = self.after_attention(x, self.attention(x, x, x, attn_mask=_future(x))[0])
        return self.quantiles(self.after_inner(x, self.inner(x)))


class Called(nn.Module):
    """A model of transformers, called as a row says."""

    def __init__(self, model: nn.Module, way: str) -> None:
        super().__init__()
        self.model, self.way = model, way

    def forward(self, input: Tensor) -> Tensor:
        if self.way == "vision":
            return self.model(pixel_values=input).last_hidden_state
        if self.way == "recording":
            words = torch.arange(WORDS, device=input.device).expand(len(input), -1)
            return self.model(input_features=input, decoder_input_ids=words).logits
        every = torch.ones_like(input)  # as a tokenizer gives it
        if self.way == "pair":
            return self.model(input_ids=input, attention_mask=every, decoder_input_ids=input).logits
        if self.way == "whole":
            return self.model(input_ids=input, attention_mask=every, use_cache=False).logits
        cache, outputs = None, []
        for t in range(input.shape[1]):
            found = self.model(
                input_ids=input[:, t : t + 1], attention_mask=every[:, : t + 1], past_key_values=cache, use_cache=True
            )
            cache = found.past_key_values
            outputs.append(found.logits)
        return torch.cat(outputs, 1)


def _config(name: str, **options: Any) -> Any:
    return getattr(importlib.import_module("transformers"), name)(attn_implementation="sdpa", **options)


def _model(name: str, config: Any, way: str, **options: Any) -> Called:
    return Called(getattr(importlib.import_module("transformers"), name)(config, **options), way)


def _bert(w: AttentionStandInWorkload) -> nn.Module:
    config = _config(
        "BertConfig",
        vocab_size=w.vocabulary,
        hidden_size=w.H,
        num_hidden_layers=w.layers,
        num_attention_heads=w.heads,
        intermediate_size=4 * w.H,
        max_position_embeddings=w.T,
        hidden_dropout_prob=w.dropout,
        attention_probs_dropout_prob=w.dropout,
    )
    return _model("BertForMaskedLM", config, "whole")


def _distilbert(w: AttentionStandInWorkload) -> nn.Module:
    config = _config(
        "DistilBertConfig",
        vocab_size=w.vocabulary,
        dim=w.H,
        n_layers=w.layers,
        n_heads=w.heads,
        hidden_dim=4 * w.H,
        max_position_embeddings=w.T,
        dropout=w.dropout,
        attention_dropout=w.dropout,
    )
    return _model("DistilBertForMaskedLM", config, "whole")


def _gpt2(w: AttentionStandInWorkload) -> nn.Module:
    config = _config(
        "GPT2Config",
        vocab_size=w.vocabulary,
        n_embd=w.H,
        n_layer=w.layers,
        n_head=w.heads,
        n_positions=w.T,
        attn_pdrop=w.dropout,
        resid_pdrop=w.dropout,
        embd_pdrop=w.dropout,
        bos_token_id=0,
        eos_token_id=None,
    )
    return _model("GPT2LMHeadModel", config, w.row.way)


def _llama(w: AttentionStandInWorkload) -> nn.Module:
    """Four query heads for a key head."""
    config = _config(
        "LlamaConfig",
        vocab_size=w.vocabulary,
        hidden_size=w.H,
        intermediate_size=4 * w.H,
        num_hidden_layers=w.layers,
        num_attention_heads=w.heads,
        num_key_value_heads=w.heads // 4,
        max_position_embeddings=w.T,
        bos_token_id=0,
        eos_token_id=None,
    )
    return _model("LlamaForCausalLM", config, w.row.way)


def _t5(w: AttentionStandInWorkload) -> nn.Module:
    config = _config(
        "T5Config",
        vocab_size=w.vocabulary,
        d_model=w.H,
        d_kv=w.H // w.heads,
        d_ff=4 * w.H,
        num_layers=w.layers,
        num_heads=w.heads,
        dropout_rate=w.dropout,
        feed_forward_proj=f"gated-{SMOOTH}",
        use_cache=False,
    )
    return _model("T5ForConditionalGeneration", config, "pair")


def _vision(w: AttentionStandInWorkload) -> nn.Module:
    """ViT, or SigLIP's tower, which has no class token."""
    sizes: dict[str, Any] = dict(
        hidden_size=w.H,
        num_hidden_layers=w.layers,
        num_attention_heads=w.heads,
        intermediate_size=4 * w.H,
        image_size=w.side,
        patch_size=PATCH,
    )
    if w.function == "SigLIP":
        return _model("SiglipVisionModel", _config("SiglipVisionConfig", vision_use_head=False, **sizes), "vision")
    return _model("ViTModel", _config("ViTConfig", **sizes), "vision", add_pooling_layer=False)


def _whisper(w: AttentionStandInWorkload) -> nn.Module:
    config = _config(
        "WhisperConfig",
        vocab_size=w.vocabulary,
        d_model=w.H,
        encoder_layers=w.layers,
        decoder_layers=w.layers,
        encoder_attention_heads=w.heads,
        decoder_attention_heads=w.heads,
        encoder_ffn_dim=4 * w.H,
        decoder_ffn_dim=4 * w.H,
        max_source_positions=w.T,
        max_target_positions=WORDS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        use_cache=False,
    )
    built = _model("WhisperForConditionalGeneration", config, "recording")
    built.requires_grad_(True)  # its encoder's positions are fixed otherwise
    return built


def _weighted(w: AttentionStandInWorkload) -> nn.Module:
    return SelfAttention(w, weights=True)


def _unweighted(w: AttentionStandInWorkload) -> nn.Module:
    return SelfAttention(w, weights=False)


INFERENCE, TRAINING = ("inference",), ("training",)
OF_TOKENS: dict[str, Any] = {"vocabulary": 1000, "package": "transformers"}
OF_PIXELS: dict[str, Any] = {"package": "transformers"}
MHA_LENGTHS = (20, 128, 512, 1024)

ATTENTION_STAND_INS = {
    row.name: row
    for row in (
        AttentionStandIn("BERT", _bert, 4, 128, dropout=0.1, **OF_TOKENS),
        # inference alone: torch's gradients of it in bf16 are off by a fifth
        AttentionStandIn("BERT, bf16", _bert, 4, 128, dtype="bfloat16", modes=INFERENCE, **OF_TOKENS),
        AttentionStandIn("BERT, one query", _bert, 1, 12, dropout=0.1, **OF_TOKENS),
        AttentionStandIn("DistilBERT", _distilbert, 4, 64, dropout=0.1, **OF_TOKENS),
        AttentionStandIn("GPT-2", _gpt2, 4, 64, dropout=0.1, **OF_TOKENS),
        AttentionStandIn("GPT-2, generation", _gpt2, 1, 24, way="steps", modes=INFERENCE, **OF_TOKENS),
        AttentionStandIn("Llama, generation", _llama, 1, 24, heads=8, way="steps", modes=INFERENCE, **OF_TOKENS),
        AttentionStandIn("T5", _t5, 4, 48, layers=2, dropout=0.1, way="pair", **OF_TOKENS),
        AttentionStandIn("ViT", _vision, 1, 197, H=192, heads=3, **OF_PIXELS),
        AttentionStandIn("SigLIP", _vision, 1, 196, **OF_PIXELS),
        AttentionStandIn("Whisper-tiny", _whisper, 1, 300, H=384, heads=6, layers=2, way="pair", **OF_TOKENS),
        AttentionStandIn("nn.TransformerEncoder T=16", Encoder, 8, 16, dropout=0.1),
        AttentionStandIn("nn.TransformerEncoder T=64", Encoder, 8, 64, dropout=0.1),
        AttentionStandIn("nn.TransformerEncoder T=512", Encoder, 1, 512, dropout=0.1),
        AttentionStandIn("nn.TransformerDecoder", Decoder, 4, 64, layers=2, dropout=0.1),
        AttentionStandIn("nn.Transformer, greedy", Greedy, 1, 16, layers=2, vocabulary=1000, way="greedy", modes=INFERENCE),
        AttentionStandIn("TransformerModel 64", Encoder, 16, 48, H=64, layers=2, dropout=0.1, vocabulary=100),
        AttentionStandIn("TFT", Fusion, 32, 36, H=32, layers=1, dropout=0.1),
        AttentionStandIn("nn.MultiheadAttention 64, averaged weights", _weighted, 16, 20, H=64, layers=1),
        *(AttentionStandIn(f"nn.MultiheadAttention T={T}", _unweighted, 2, T, layers=1) for T in MHA_LENGTHS),
        *(
            AttentionStandIn(f"nn.MultiheadAttention T={T}, dropout", _unweighted, 2, T, layers=1, dropout=0.1, modes=TRAINING)
            for T in MHA_LENGTHS
        ),
    )
}
