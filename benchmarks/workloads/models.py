"""Whole models on tokens: logits, and in training the gradients of the cross entropy of the next token.

Every model is built by torch.nn or by transformers from sizes and a seed, without weights from elsewhere, and changed afterwards,
as a user changes a model of his own. Letters: T tokens of a row, B rows, H width.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Workload, load, results_of


@dataclass(frozen=True)
class ModelWorkload(Workload):
    """`function` is a name of MODELS."""

    layers: int = 2
    vocabulary: int = 1000

    @property
    def growth(self) -> int:
        return 2

    @property
    def unseen(self) -> str | tuple[str, ...]:
        """The ending, or the endings, of parameters without effect."""
        return MODELS[self.function].unseen

    @property
    def matrices_of_a_token(self) -> int:
        """Elements of the matrices that every token goes through."""
        return MODELS[self.function].weights(self)

    def build(self) -> nn.Module:
        return MODELS[self.function].build(self)

    def draw(self) -> Tensor:
        """The input, [B, T]."""
        return torch.randint(self.vocabulary, (self.B, self.T), generator=self.generator())

    def loss(self, output: Tensor, input: Tensor) -> Tensor:
        """Cross entropy of the next token."""
        return F.cross_entropy(output[:, :-1].flatten(0, 1), input[:, 1:].flatten())

    def missing(self) -> str | None:
        return missing_package(MODELS[self.function].package)

    def cost(self) -> tuple[int, float, float]:
        """Every matrix times every token, without what attention adds."""
        weights = self.matrices_of_a_token
        passes = 3 if self.mode == "training" else 1
        return 1, 2.0 * passes * weights * self.tokens, float(weights * self.torch_dtype.itemsize)

    def small(self) -> ModelWorkload:
        return replace(self, T=min(self.T, 7), B=min(self.B, 3), I=24, H=24, heads=min(self.heads, 4), vocabulary=50)

    def problem(self) -> ModelProblem:
        return ModelProblem.of(self)

    def call(self, built: nn.Module, problem: ModelProblem, layout: str = "", **options: Any) -> ModelCall:
        return ModelCall(built, problem, **options)

    def torch_results(self, problem: ModelProblem, dtype: torch.dtype, device: str, *, in_parts: bool) -> dict[str, Tensor]:
        """On the workload's own device, fp64 as well."""
        call = self.call(self.build(), problem, dtype=dtype, device=self.device)
        return {name: t.cpu() for name, t in results_of(call).items()}

    def detail(self) -> dict[str, Any]:
        return {"layers": self.layers, "vocabulary": self.vocabulary, "heads": self.heads}


def missing_package(package: str) -> str | None:
    """Why what needs this package ("": none) cannot be built."""
    if not package or importlib.util.find_spec(package):
        return None
    return f"{package} is not installed: pip install {package}"


@dataclass
class ModelProblem:
    """Parameters in fp64 on the CPU, rounded to the workload's dtype, and the input: tokens [B, T] or features [B, T, I]."""

    workload: ModelWorkload
    parameters: dict[str, Tensor]
    input: Tensor

    @classmethod
    def of(cls, w: ModelWorkload) -> ModelProblem:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(w.seed)
            built = w.build()
        parameters = {name: p.detach().to(w.torch_dtype).double() for name, p in built.named_parameters()}
        input = w.draw()
        return cls(w, parameters, input.to(w.torch_dtype).double() if input.is_floating_point() else input)


class ModelCall:
    """A model on a problem: what is timed (`run`) and what is compared (`outputs`, `gradients`)."""

    def __init__(
        self, model: nn.Module, problem: ModelProblem, *, dtype: torch.dtype | None = None, device: str | None = None
    ) -> None:
        w = problem.workload
        self.workload, self.mode = w, w.mode
        device, dtype = device or w.device, dtype or w.torch_dtype
        self.model = model.to(device=device, dtype=dtype).train(w.mode == "training")
        self.leaves = load(self.model, problem.parameters)
        self.parameters = list(self.leaves.values())
        self.input = problem.input.to(device, dtype if problem.input.is_floating_point() else None)

    @property
    def run(self) -> Callable[[], object]:
        return self._both if self.mode == "training" else self.forward

    def forward(self) -> Tensor:
        """Logits [B, T, vocabulary], or what else the model gives."""
        return self.model(self.input)

    def _both(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.workload.loss(self.forward(), self.input), self.parameters)

    def context(self) -> AbstractContextManager[Any]:
        return torch.inference_mode(self.mode == "inference")

    def outputs(self) -> dict[str, Tensor]:
        with self.context():
            return {"output": self.forward().detach()}

    def gradients(self) -> dict[str, Tensor]:
        found = dict(zip(self.leaves, self._both(), strict=True))
        unseen = self.workload.unseen
        return {name: grad for name, grad in found.items() if not (unseen and name.endswith(unseen))}


class LanguageModel(nn.Module):
    """Embedding, layers of an LSTM, readout: [B, T] of tokens -> [B, T, vocabulary]."""

    def __init__(self, w: ModelWorkload) -> None:
        super().__init__()
        self.embedding = nn.Embedding(w.vocabulary, w.H)
        self.layers = nn.LSTM(w.H, w.H, w.layers, batch_first=True)
        self.readout = nn.Linear(w.H, w.vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.readout(self.layers(self.embedding(tokens))[0])


class Translator(nn.Module):
    """nn.Transformer on one sequence as source and as target, with learned positions: [B, T] -> [B, T, vocabulary]."""

    def __init__(self, w: ModelWorkload) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(w.vocabulary, w.H), nn.Embedding(w.T, w.H)
        self.transformer = nn.Transformer(w.H, w.heads, w.layers, w.layers, 4 * w.H, dropout=0.0, batch_first=True)
        self.readout = nn.Linear(w.H, w.vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        T = tokens.shape[1]
        x = self.embedding(tokens) + self.positions.weight[:T]
        future = nn.Transformer.generate_square_subsequent_mask(T, device=x.device, dtype=x.dtype)
        return self.readout(self.transformer(x, x, tgt_mask=future, tgt_is_causal=True))


class Logits(nn.Module):
    """A model of transformers, of whose output only the logits are wanted."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).logits


def _bert(w: ModelWorkload) -> nn.Module:
    transformers = importlib.import_module("transformers")
    config = transformers.BertConfig(
        vocab_size=w.vocabulary,
        hidden_size=w.H,
        num_hidden_layers=w.layers,
        num_attention_heads=w.heads,
        intermediate_size=4 * w.H,
        max_position_embeddings=w.T,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    return Logits(transformers.BertForMaskedLM(config))


def _gpt2(w: ModelWorkload) -> nn.Module:
    transformers = importlib.import_module("transformers")
    config = transformers.GPT2Config(
        vocab_size=w.vocabulary,
        n_embd=w.H,
        n_layer=w.layers,
        n_head=w.heads,
        n_positions=w.T,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=None,
        use_cache=False,
        attn_implementation="eager",
    )
    return Logits(transformers.GPT2LMHeadModel(config))


@dataclass(frozen=True)
class Model:
    """`weights`: elements of the matrices that every token goes through. `unseen`: the ending of parameters without effect."""

    name: str
    title: str
    build: Callable[[Any], nn.Module]
    weights: Callable[[Any], int]
    package: str = ""
    unseen: str = ""


MODELS = {
    m.name: m
    for m in (
        Model("lstm-lm", "LSTM language model", LanguageModel, lambda w: w.H * (8 * w.H * w.layers + w.vocabulary)),
        Model("transformer", "nn.Transformer", Translator, lambda w: w.H * (28 * w.H * w.layers + w.vocabulary)),
        Model(
            "bert",
            "BERT",
            _bert,
            lambda w: w.H * (12 * w.H * w.layers + w.H + w.vocabulary),
            "transformers",
            "key.bias",  # moves every score of a query alike, which softmax does not see: its gradient is rounding alone
        ),
        Model("gpt2", "GPT-2", _gpt2, lambda w: w.H * (12 * w.H * w.layers + w.vocabulary), "transformers"),
    )
}
