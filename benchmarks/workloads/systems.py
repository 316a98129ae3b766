"""The systems of fastseq.models on tokens, with about as many parameters each: a training step, a generated token, a text.

A system is built of fastseq.models or of the copies on torch's parts (torch_models.py), with the same parameters:

    forward(tokens [B, T])       -> logits [B, T, words]
    context(tokens [B, T + 1])   -> what is kept of all but the last one; a source has them all
    step(token [B], kept)        -> logits [B, words] and what is kept then

The truth of both is `forward` of the copy in fp64, which knows neither states nor caches. An encoder-decoder reads the tokens as
its source and says them as its target. Letters: T tokens of a row, B rows, W = I = H width.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .base import Metric, results_of
from .experiments import TEXT, letters, of_letters, predict
from .models import ModelCall, ModelProblem, ModelWorkload
from .torch_models import copies

STEP, TOKEN = "training step", "token"  # the stages
LAYERS = 2
FEATURES = 8


@dataclass(frozen=True)
class SystemWorkload(ModelWorkload):
    """`function` is a name of SYSTEMS; `span`: tokens of a window, a block, a chunk, a memory."""

    stage: str = STEP
    vocabulary: int = 256
    span: int = 32
    same_length: bool = (
        True  # of Transformer-XL: whether every token sees as many as the memory has, or all of memory and segment
    )

    @property
    def tokens(self) -> int:
        return self.B * (self.T if self.stage == STEP else 1)

    @property
    def unseen(self) -> str:
        return ""

    @property
    def matrices_of_a_token(self) -> int:
        return parameters(self)

    def build(self) -> nn.Module:
        return SYSTEMS[self.function].build(copies(), self)

    def missing(self) -> str | None:
        if self.function == "Reformer" and self.torch_dtype.itemsize < 4:
            return "in 16 bits rounding decides which tokens hash alike: there is no truth to check it against"
        return None

    def small(self) -> SystemWorkload:
        """T is a square (of a picture's patches), and no multiple of the span."""
        return replace(self, T=9, B=min(self.B, 3), I=24, H=24, heads=2, vocabulary=50, span=4)

    def draw(self) -> Tensor:
        """Tokens [B, T] (one more where the last one is generated), or pictures of T patches."""
        if SYSTEMS[self.function].pictures:
            side = PATCH * math.isqrt(self.T)
            return torch.randn(self.B, CHANNELS, side, side, generator=self.generator(), dtype=torch.float64)
        return torch.randint(self.vocabulary, (self.B, self.T + (self.stage == TOKEN)), generator=self.generator())

    def loss(self, output: Tensor, input: Tensor) -> Tensor:
        return output.square().mean() if SYSTEMS[self.function].pictures else super().loss(output, input)

    def cost(self) -> tuple[int, float, float]:
        """Every matrix times every token, without what attention adds."""
        weights = self.matrices_of_a_token
        return 1, 2.0 * (3 if self.stage == STEP else 1) * weights * self.tokens, float(weights * self.torch_dtype.itemsize)

    def call(self, built: nn.Module, problem: ModelProblem, layout: str = "", **options: Any) -> ModelCall:
        return (SystemCall if self.stage == STEP else TokenCall)(built, problem, **options)

    def torch_results(self, problem: ModelProblem, dtype: torch.dtype, device: str, *, in_parts: bool) -> dict[str, Tensor]:
        """Of a token as well the whole sequence, and its last logits."""
        call = SystemCall(self.build(), problem, dtype=dtype, device=self.device)
        if self.stage == STEP:
            return {name: t.cpu() for name, t in results_of(call).items()}
        return {"output": call.outputs()["output"][:, -1].cpu()}

    def detail(self) -> dict[str, Any]:
        return super().detail() | {"stage": self.stage, "span": self.span}


@dataclass(frozen=True)
class TextExperiment(SystemWorkload):
    """What a system has learned of a novel after as much time of computing as the others: the loss of the next letter."""

    mode: str = "training"
    seconds: float = 0.0  # of training
    budget: int = 0  # steps before these
    seeds: int = 3
    samples: int = 1 << 20  # all that is known
    rate: float = 2e-3

    def missing(self) -> str | None:
        return None if TEXT.is_file() else f"needs {TEXT.name} of a checkout's examples/data"

    def measure(self, provider: Any) -> Metric:
        values, record = [], letters()
        for seed in range(self.seeds):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = TimeFirst(provider.build(self)).to(device=self.device, dtype=self.torch_dtype)
                values.append(predict(self, model, record, torch.Generator().manual_seed(seed), of_letters))
        return Metric.of("test loss", "nats per character", values)

    def detail(self) -> dict[str, Any]:
        return super().detail() | {"seconds": self.seconds, "seeds": self.seeds}


class TimeFirst(nn.Module):
    """Tokens [T, B] -> logits [T, B, words]."""

    def __init__(self, system: nn.Module) -> None:
        super().__init__()
        self.system = system

    def forward(self, tokens: Tensor) -> Tensor:
        return self.system(tokens.T.contiguous()).transpose(0, 1)


class SystemCall(ModelCall):
    """A training step without the optimizer: logits, cross entropy of the next token, the gradient of every parameter."""

    def _both(self) -> tuple[Tensor, ...]:
        """Zeros for what has no effect on so few tokens, such as a state that no later block reads."""
        loss = self.workload.loss(self.forward(), self.input)
        return torch.autograd.grad(loss, self.parameters, materialize_grads=True)

    def gradients(self) -> dict[str, Tensor]:
        """By our names also of a model that has others."""
        found, ours = super().gradients(), getattr(self.model, "gradients_of_ours", None)
        return ours(found) if ours else found


class TokenCall(ModelCall):
    """A token after T others."""

    def __init__(self, model: nn.Module, problem: ModelProblem, **options: Any) -> None:
        super().__init__(model, problem, **options)
        with self.context():
            system: Any = self.model
            self.kept = system.context(self.input)
        self.token = self.input[:, -1].contiguous()

    def forward(self) -> Tensor:
        system: Any = self.model
        return system.step(self.token, self.kept)[0]

    @property
    def state_bytes(self) -> int | None:
        """Of what is kept of the T tokens: states, or keys and values; None where an object of another package hides them."""
        return sum(t.numel() * t.element_size() for t in _tensors(self.kept)) or None


def _tensors(kept: Any) -> list[Tensor]:
    if isinstance(kept, Tensor):
        return [kept]
    return [t for part in kept for t in _tensors(part)] if isinstance(kept, tuple) else []


class OnTokens(nn.Module):
    """A model of vectors [B, T, W] between a table of tokens and a readout; `sinusoids` are for what does not know the order."""

    def __init__(self, body: nn.Module, w: SystemWorkload, sinusoids: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.embedding, self.body, self.readout = nn.Embedding(w.vocabulary, w.H), body, nn.Linear(w.H, w.vocabulary)
        self.sinusoids = sinusoids

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.sinusoids is not None:
            x = x + self.sinusoids(torch.arange(tokens.shape[1], device=x.device), x.shape[-1], dtype=x.dtype)
        y = self.body(x)
        return self.readout(y[0] if isinstance(y, tuple) else y)

    def context(self, tokens: Tensor) -> Any:
        return self.body(self.embedding(tokens[:, :-1]))[1]

    def step(self, token: Tensor, kept: Any) -> tuple[Tensor, Any]:
        body: Any = self.body
        y, kept = body.step(self.embedding(token), kept)
        return self.readout(y), kept


class Layers(nn.Module):
    """A recurrent layer, or several, as a model of vectors with a step."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor, state: Any = None) -> Any:
        return self.layers(x, state)

    def step(self, x: Tensor, state: Any) -> Any:
        y, state = self.layers(x[:, None], state)
        return y[:, 0], state


class Chunks(nn.Module):
    """What hashes, by the same rotations in every call, in place of new ones."""

    def __init__(self, reformer: Any) -> None:
        super().__init__()
        self.reformer = reformer
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for number, rotations in enumerate(reformer.rotations()):
                self.register_buffer(f"rotations{number}", rotations)

    def forward(self, x: Tensor) -> Tensor:
        return self.reformer(x, [self.get_buffer(f"rotations{number}") for number in range(len(self.reformer.blocks))])


class Window(nn.Module):
    """Windowed attention, the first token of each row global."""

    def __init__(self, longformer: nn.Module) -> None:
        super().__init__()
        self.longformer = longformer

    def forward(self, x: Tensor) -> Tensor:
        return self.longformer(x, torch.zeros(len(x), 1, dtype=torch.int64, device=x.device))


class Whole(nn.Module):
    """A model of tokens: `say(model, tokens)` gives logits, `read(model, tokens)` what it keeps of all but the last one."""

    def __init__(self, model: nn.Module, say: Callable[..., Tensor], read: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.model, self.say, self.read = model, say, read

    def forward(self, tokens: Tensor) -> Tensor:
        return self.say(self.model, tokens)

    def context(self, tokens: Tensor) -> Any:
        assert self.read
        return self.read(self.model, tokens)

    def step(self, token: Tensor, kept: Any) -> Any:
        model: Any = self.model
        return model.step(token, kept)


def in_segments(model: Any, tokens: Tensor) -> tuple[Tensor, Any]:
    """Transformer-XL on segments of its memory's length, each with the memory that the last one left."""
    state, logits = model.start(len(tokens)), []
    for segment in tokens.split(model.memory, 1):
        y, state = model(segment, state)
        logits.append(y)
    return torch.cat(logits, 1), state


def step_by_step(model: Any, tokens: Tensor) -> Any:
    """What an encoder-decoder without a call for several tokens keeps."""
    state = model.start(tokens, tokens.shape[1])
    for token in tokens[:, :-1].unbind(1):
        _, state = model.step(token, state)
    return state


class Recurrent(nn.Module):
    """A recurrent encoder-decoder from a sequence to itself."""

    def __init__(self, encoder: nn.Module, decoder: Any) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(tokens, self.decoder.start(*self.encoder(tokens)))[0]

    def context(self, tokens: Tensor) -> Any:
        return self.decoder(tokens[:, :-1], self.decoder.start(*self.encoder(tokens)))[1]

    def step(self, token: Tensor, kept: Any) -> Any:
        return self.decoder.step(token, kept)


@dataclass(frozen=True)
class System:
    """`build(models, workload)` from fastseq.models or a copy of it; `color`: of its line in a figure.

    `generates`: it has a step. `longest`: T beyond which a training step takes too long to be measured. `seed`: one with which no
    unit of a ReLU stands so near to zero, at the sizes of the suite, that rounding decides whether a gradient passes it.
    """

    name: str
    color: str
    build: Callable[[Any, SystemWorkload], nn.Module]
    generates: bool = True
    pictures: bool = False
    longest: int = 1 << 20
    own_parts: bool = True  # whether anything of fastseq's is in it
    seed: int = 0


PATCH, CHANNELS = 2, 3
CELLS, CELL = 16, 16  # of a memory
TAPS, LEVELS = 3, 5  # of convolutions: a field of 125 steps


def _seq2seq(m: Any, w: SystemWorkload, cell: str, attention: str) -> nn.Module:
    encoder = m.seq2seq.Encoder(w.vocabulary, w.H, w.H // 2, cell=cell)
    return Recurrent(encoder, m.seq2seq.Decoder(w.vocabulary, w.H, w.H, w.H, cell=cell, attention=attention))


def _memory(m: Any, w: SystemWorkload, kind: str) -> nn.Module:
    return OnTokens(getattr(m, kind)(w.H, w.H, w.H, cells=CELLS, cell_size=CELL), w)


def _vit(m: Any, w: SystemWorkload) -> nn.Module:
    return m.ViT(PATCH * math.isqrt(w.T), PATCH, CHANNELS, w.vocabulary, w.H, w.heads, LAYERS)


def _reformer(m: Any, w: SystemWorkload) -> nn.Module:
    buckets = 2 * -(-w.T // w.span)
    model = m.Reformer(w.H, w.heads, LAYERS, chunk=w.span, buckets=buckets, rounds=2)
    return OnTokens(Chunks(model), w, m.positions.sinusoids)


def _longformer(m: Any, w: SystemWorkload) -> nn.Module:
    return OnTokens(Window(m.Longformer(w.H, w.heads, LAYERS, window=w.span)), w, m.positions.sinusoids)


def _transformer_xl(m: Any, w: SystemWorkload) -> nn.Module:
    model = m.TransformerXL(w.vocabulary, w.H, w.heads, 4 * w.H, LAYERS, w.span, same_length=w.same_length)
    return Whole(model, lambda xl, x: in_segments(xl, x)[0], lambda xl, x: in_segments(xl, x[:, :-1])[1])


def _gpt(m: Any, w: SystemWorkload) -> nn.Module:
    model = m.GPT(w.vocabulary, w.H, w.heads, LAYERS, w.T + 1)
    return Whole(model, lambda gpt, x: gpt(x), lambda gpt, x: gpt.read(x[:, :-1], gpt.start(*x.shape))[1])


def _bert(m: Any, w: SystemWorkload) -> nn.Module:
    model = m.BERT(w.vocabulary, w.H, w.heads, LAYERS, w.T + 1)
    del model.pooler  # of whole rows; this is about their words
    return Whole(model, lambda bert, x: bert.words(bert(x)))


def _transformer(m: Any, w: SystemWorkload) -> nn.Module:
    model = m.transformer.EncoderDecoder(w.vocabulary, w.H, w.heads, 4 * w.H, LAYERS // 2)
    return Whole(model, lambda both, x: both(x, x), lambda both, x: both.read(x[:, :-1], both.start(x, x.shape[1]))[1])


def _t5(m: Any, w: SystemWorkload) -> nn.Module:
    return Whole(m.T5(w.vocabulary, w.H, w.heads, 4 * w.H, LAYERS // 2), lambda t5, x: t5(x, x), step_by_step)


def _lstm(m: Any, w: SystemWorkload) -> nn.Module:
    return OnTokens(Layers(m.hybrid.LSTM(w.H, w.H, LAYERS, batch_first=True)), w)


def _min_gru(m: Any, w: SystemWorkload) -> nn.Module:
    return OnTokens(m.LinearRecurrent(w.H, LAYERS, layer=m.linear_recurrent.MinGRU), w)


def _hybrid(m: Any, w: SystemWorkload, local: int | None = None) -> nn.Module:
    return OnTokens(m.Hybrid(w.H, w.heads, LAYERS, local=local), w)


def _block_recurrent(m: Any, w: SystemWorkload) -> nn.Module:
    return OnTokens(m.BlockRecurrent(w.H, w.heads, LAYERS, block=w.span, states=w.span // 2), w)


def _tcn(m: Any, w: SystemWorkload) -> nn.Module:
    return OnTokens(m.TCN(w.H, [w.H] * LEVELS, TAPS), w)


SYSTEMS = {
    s.name: s
    for s in (
        System("LSTM", "#1e88e5", _lstm),
        System("minGRU", "#0f9a72", _min_gru),
        System("LSTM seq2seq", "#5597d3", lambda m, w: _seq2seq(m, w, "lstm", "none")),
        System("GRU with Luong's attention", "#2a9d8f", lambda m, w: _seq2seq(m, w, "gru", "general")),
        System("GRU with Bahdanau's attention", "#6fa015", lambda m, w: _seq2seq(m, w, "gru", "bahdanau"), longest=512),
        System("NTM", "#8d6e63", lambda m, w: _memory(m, w, "NTM"), longest=64),
        System("DNC", "#bc8034", lambda m, w: _memory(m, w, "DNC"), longest=64),
        System("hybrid", "#d55e00", _hybrid),
        System("R-Transformer", "#cb8117", lambda m, w: _hybrid(m, w, local=7)),
        System("Block-Recurrent Transformer", "#f36628", _block_recurrent),
        System("Transformer", "#c454b8", _transformer),
        System("T5", "#9467d6", _t5),
        System("GPT", "#d1495b", _gpt),
        System("Transformer-XL", "#df64b9", _transformer_xl, seed=1),
        System("BERT", "#ae347d", _bert, generates=False),
        System("ViT", "#7e50a6", _vit, generates=False, pictures=True),
        System("Longformer", "#764eba", _longformer, generates=False),
        System("Reformer", "#4b5dc0", _reformer, generates=False),
        System("TCN", "#7c889e", _tcn, own_parts=False),
    )
}


def parameters(w: SystemWorkload) -> int:
    """Of a system, without tables of places."""
    return _parameters(SystemWorkload(w.function, 16, 1, w.H, w.H, heads=w.heads, vocabulary=w.vocabulary, span=w.span))


@lru_cache(maxsize=1024)
def _parameters(w: SystemWorkload) -> int:
    with torch.device("meta"):
        model = w.build()
    return sum(p.numel() for name, p in model.named_parameters() if not name.endswith(("places", "places.weight")))


def at_budget(w: SystemWorkload, budget: int) -> SystemWorkload:
    """At the width that brings it nearest to a number of parameters; a head has a multiple of eight features.

    Raises:
        ValueError: if the narrowest one has more than twice as many.
    """

    def wide(units: int) -> SystemWorkload:
        return replace(w, I=FEATURES * w.heads * units, H=FEATURES * w.heads * units)

    high = 1
    while parameters(wide(high)) < budget:
        high *= 2
    units = bisect_left(range(1, high), budget, key=lambda units: parameters(wide(units))) + 1
    found = min((wide(n) for n in (units - 1, units) if n), key=lambda wide: abs(parameters(wide) - budget))
    if parameters(found) > 2 * budget:
        raise ValueError(f"{w.function} has {parameters(found)} parameters at width {found.H}; {budget} are too few")
    return found
