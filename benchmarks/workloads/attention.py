"""Workloads of attention alone, without projections around it: the cases, their problems, their cost.

The textbook form (`Attention.eager`, attention_textbook.py) in fp64, one key head of one row at a time, is the truth of the
check; in the workload's dtype it is torch's error to beat; and it is itself a provider.

Letters: B batch, H query heads, G key heads (H a multiple of G), T queries, S keys, E head dim, W = H E width.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import attention_textbook as textbook
from .base import Workload, results_of

FORWARD, BACKWARD = 1.0, 2.5  # products of the backward pass in terms of those of the forward: five against two
FORMULA = (
    "4 B H T S E for the forward pass (two products of 2 T S E per head), halved when causal, 2.5 times that for the backward"
)


@dataclass(frozen=True)
class AttentionWorkload(Workload):
    """T queries, `keys` keys (0: T), H = heads x head dim, I = H. `function` is a name of CASES."""

    kv_heads: int = 0  # 0: as many as heads
    keys: int = 0
    causal: bool = False
    window: int = 0  # keys that a query sees, itself included (of a band: on either side of it); 0: all
    block: int = 0  # side of the blocks of a block-sparse layout; positions of a chunk of hashed attention
    deterministic: bool = False
    tf32: bool = False

    @property
    def E(self) -> int:
        return self.H // self.heads

    @property
    def G(self) -> int:
        return self.kv_heads or self.heads

    @property
    def S(self) -> int:
        return self.keys or self.T

    @property
    def tokens(self) -> int:
        return self.T * self.B

    @property
    def products(self) -> float:
        """Forward passes that the mode's arithmetic is worth."""
        return {"inference": FORWARD, "training": FORWARD + BACKWARD, "backward": BACKWARD}[self.mode]

    @property
    def flops(self) -> float:
        """FORMULA; with windows and blocks, of the pairs that are seen; of a whole module, with its projections."""
        linear = 0.0
        if CASES[self.function].module:
            linear = 2 * self.tokens * 4 * self.H * self.H * {"inference": 1, "training": 3, "backward": 2}[self.mode]
        return 4 * self.B * self.H * self.pairs() * self.products + linear

    def pairs(self) -> float:
        """Pairs of query and key per head; half of all when causal, as is customary."""
        if self.window:
            sides, w = (2, min(self.window + 1, self.T)) if self.function == "band" else (1, min(self.window, self.T))
            return sides * (w * (w + 1) / 2 + (self.T - w) * w) - (sides - 1) * self.T
        if CASES[self.function].hashed:
            return self.T * min(2 * self.block, self.T) / (2 if self.causal else 1)
        if self.block:
            seen = textbook.blocks_seen(self).double().mean().item()
            return seen * self.T * self.S
        return self.T * self.S / (2 if self.causal else 1)

    @property
    def bytes(self) -> float:
        """The least that goes through memory: operands and result once, and in a backward pass their gradients and them again."""
        keys = 1 if CASES[self.function].hashed else 2  # and values; hashed, keys are queries
        rows = self.B * self.E * (2 * self.heads * self.T + keys * self.G * self.S)
        extra = sum(
            t.numel for name, t in CASES[self.function].operands(self).items() if name not in ("q", "k", "v") and t.gradient
        )
        return (rows + extra) * self.torch_dtype.itemsize * {"inference": 1, "training": 3, "backward": 2}[self.mode]

    def small(self) -> AttentionWorkload:
        """Odd T across the edge of a tile, few heads, short windows; groups of query heads stay as they are."""
        G = min(self.G, 2)
        heads = self.heads // self.G * G
        T, block = min(self.T, 67), min(self.block, 16)
        if CASES[self.function].hashed:
            T = T // block * block
            block = T if self.block >= self.T else block
        return replace(
            self,
            T=T,
            B=min(self.B, 2),
            heads=heads,
            kv_heads=G,
            I=heads * self.E,
            H=heads * self.E,
            keys=min(self.keys, 131),
            window=min(self.window, 16),
            block=block,
        )

    def problem(self) -> AttentionProblem:
        return AttentionProblem.of(self)

    def call(self, built: Program, problem: AttentionProblem, layout: str = "", **options: Any) -> AttentionCall:
        return AttentionCall(built, problem, **options)

    def torch_results(self, problem: AttentionProblem, dtype: torch.dtype, device: str, *, in_parts: bool) -> dict[str, Tensor]:
        """Always in parts, which are small enough for any length, and on the workload's own device, fp64 as well."""
        case = CASES[self.function]
        results: dict[str, Tensor] = {}
        for part, place in case.parts(problem):
            call = AttentionCall(case.eager, part, dtype=dtype, device=self.device)
            for name, value in results_of(call).items():
                whole = results.setdefault(name, torch.zeros(case.shape(problem, name), dtype=dtype))
                place(name, whole).add_(value.cpu())
        return results

    @contextmanager
    def settings(self) -> Iterator[None]:
        before = torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.matmul.allow_tf32
        if self.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it before any product on a GPU
        torch.use_deterministic_algorithms(self.deterministic)
        torch.backends.cuda.matmul.allow_tf32 = self.tf32
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0])
            torch.backends.cuda.matmul.allow_tf32 = before[1]

    def detail(self) -> dict[str, Any]:
        sizes = {"heads": self.heads, "kv_heads": self.G, "E": self.E, "S": self.S, "causal": self.causal, "window": self.window}
        flags = {"deterministic": self.deterministic, "tf32": self.tf32}
        return {**sizes, "block": self.block, **flags, "flops": self.flops, "bytes": self.bytes}


@dataclass(frozen=True)
class Operand:
    """One input tensor. `batch` and `head`: its dimensions over B and over heads (H or G), None where it has none."""

    shape: tuple[int, ...]
    batch: int | None = None
    head: int | None = None
    gradient: bool = True
    scale: float = 1.0
    of: Callable[[AttentionWorkload, Tensors], Tensor] | None = None  # those before it; else it is drawn

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


Tensors = dict[str, Tensor]


@dataclass
class Bound:
    """A program on its tensors: `run` is what is timed and returns the outputs, `leaves` want gradients."""

    run: Callable[[], Any]
    leaves: Tensors
    chose: Callable[[], list[str]] = list


Program = Callable[[AttentionWorkload, Tensors], Bound]  # what a provider builds


def plain(function: Callable[..., Any]) -> Program:
    """A program from a function of the workload and the named tensors."""

    def program(w: AttentionWorkload, tensors: Tensors) -> Bound:
        return Bound(partial(function, w, **tensors), leaves_of(w, tensors))

    return program


def leaves_of(w: AttentionWorkload, tensors: Tensors) -> Tensors:
    return {name: t for name, t in tensors.items() if t.requires_grad}


@dataclass
class AttentionProblem:
    """Operands and the output's gradient, in fp64 on the CPU, rounded to the workload's dtype."""

    workload: AttentionWorkload
    tensors: Tensors
    grad: Tensor

    @classmethod
    def of(cls, w: AttentionWorkload) -> AttentionProblem:
        generator = w.generator()

        def draw(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
            drawn = torch.randn(shape, generator=generator, dtype=torch.float32)
            return drawn.mul_(scale).to(w.torch_dtype).double()

        case = CASES[w.function]
        tensors: Tensors = {}
        for name, t in case.operands(w).items():
            tensors[name] = t.of(w, tensors) if t.of else draw(t.shape, t.scale)
        return cls(w, tensors, draw(case.output(w)))


class AttentionCall:
    """A program on a problem: what is timed (`run`) and what is compared (`outputs`, `gradients`)."""

    def __init__(
        self,
        program: Program,
        problem: AttentionProblem,
        *,
        dtype: torch.dtype | None = None,
        device: str | None = None,
        mode: str | None = None,
    ) -> None:
        w = problem.workload
        self.workload, self.mode = w, mode or w.mode
        case = CASES[w.function]
        differentiate = self.mode != "inference"
        dtype, device = dtype or w.torch_dtype, device or w.device
        operands = case.operands(w)
        tensors = {
            name: t.to(device=device, dtype=dtype if t.is_floating_point() else t.dtype, copy=True).requires_grad_(
                differentiate and operands[name].gradient
            )
            for name, t in problem.tensors.items()
        }
        self.grad = problem.grad.to(device=device, dtype=dtype)
        bound = program(w, tensors)
        self.forward, self.leaves, self.chose = bound.run, bound.leaves, bound.chose
        self.parameters = [t for name, t in self.leaves.items() if name in case.learned]
        self._graph: Tensor | None = None

    @property
    def run(self) -> Callable[[], object]:
        if self.mode == "backward":
            self._graph = _output(self.forward())  # kept: every run goes back through the same graph
            return lambda: self._back(self._graph, retain_graph=True)
        return self._both if self.mode == "training" else self.forward

    def _both(self) -> tuple[Tensor, ...]:
        return self._back(_output(self.forward()))

    def _back(self, output: Tensor | None, **options: bool) -> tuple[Tensor, ...]:
        assert output is not None
        return torch.autograd.grad(output, list(self.leaves.values()), self.grad, **options)

    def context(self) -> AbstractContextManager[Any]:
        return torch.inference_mode(self.mode == "inference")

    def outputs(self) -> Tensors:
        with self.context():
            found = self.forward()
        found = found if isinstance(found, tuple) else (found,)
        return {name: t.detach() for name, t in zip(("output", "weights"), found, strict=False) if t is not None}

    def gradients(self) -> Tensors:
        return dict(zip(self.leaves, self._both(), strict=True))


def _output(found: Any) -> Tensor:
    return found[0] if isinstance(found, tuple) else found


@dataclass(frozen=True)
class Attention:
    """A case of attention. `eager` is its textbook form, `learned` are the operands that a model learns."""

    name: str
    title: str
    operands: Callable[[AttentionWorkload], dict[str, Operand]]
    eager: Program
    learned: tuple[str, ...] = ()
    module: bool = False  # a whole nn.MultiheadAttention on x rather than q, k, v
    hashed: bool = False  # queries are keys, and see those of their chunk of `block` and of the one before it

    def output(self, w: AttentionWorkload) -> tuple[int, ...]:
        return (w.B, w.T, w.H) if self.module else (w.B, w.heads, w.T, w.E)

    def shape(self, problem: AttentionProblem, result: str) -> tuple[int, ...]:
        """Shape of a result: "output", "weights" or "grad <operand>"."""
        w = problem.workload
        if result == "weights":
            return (w.B, w.T, w.S)
        return self.output(w) if result == "output" else self.operands(w)[result.removeprefix("grad ")].shape

    def parts(self, problem: AttentionProblem) -> Iterator[tuple[AttentionProblem, Callable[[str, Tensor], Tensor]]]:
        """The problem cut into rows and key heads, and for each the place of its results in the whole."""
        w = problem.workload
        operands = self.operands(w)
        everywhere = {"output": Operand((), 0, None if self.module else 1), "weights": Operand((), 0)}
        everywhere |= {f"grad {name}": operand for name, operand in operands.items()}
        heads = 1 if self.module else w.G

        for b in range(w.B):
            for g in range(heads):

                def cut(t: Tensor, operand: Operand, b: int = b, g: int = g) -> Tensor:
                    if operand.batch is not None:
                        t = t.narrow(operand.batch, b, 1)
                    if operand.head is not None:
                        n = t.shape[operand.head] // heads
                        t = t.narrow(operand.head, g * n, n)
                    return t

                own = (
                    replace(w, B=1)
                    if self.module
                    else replace(w, B=1, heads=w.heads // w.G, kv_heads=1, H=w.H // w.G, I=w.H // w.G)
                )
                tensors = {name: cut(t, operands[name]) for name, t in problem.tensors.items()}
                part = AttentionProblem(own, tensors, cut(problem.grad, everywhere["output"]))

                def place(name: str, whole: Tensor, cut: Callable[[Tensor, Operand], Tensor] = cut) -> Tensor:
                    return cut(whole, everywhere[name])

                yield part, place


def _qkv(w: AttentionWorkload) -> dict[str, Operand]:
    q, k = (w.B, w.heads, w.T, w.E), (w.B, w.G, w.S, w.E)
    return {"q": Operand(q, 0, 1), "k": Operand(k, 0, 1), "v": Operand(k, 0, 1)}


def _plus(**more: Callable[[AttentionWorkload], Operand]) -> Callable[[AttentionWorkload], dict[str, Operand]]:
    return lambda w: _qkv(w) | {name: operand(w) for name, operand in more.items()}


def _mha(w: AttentionWorkload) -> dict[str, Operand]:
    scale = w.H**-0.5
    return {
        "x": Operand((w.B, w.T, w.H), 0),
        "in_proj_weight": Operand((3 * w.H, w.H), scale=scale),
        "in_proj_bias": Operand((3 * w.H,), scale=0.1),
        "out_proj.weight": Operand((w.H, w.H), scale=scale),
        "out_proj.bias": Operand((w.H,), scale=0.1),
        "lengths": Operand((w.B,), 0, gradient=False),
    }


_MHA_PARAMETERS = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
CASES: dict[str, Attention] = {
    case.name: case
    for case in (
        Attention("dense", "no mask, or causal", _qkv, plain(textbook.dense)),
        Attention("window", "sliding window", _qkv, plain(textbook.dense)),
        Attention("band", "sliding window on both sides", _qkv, plain(textbook.dense)),
        Attention("blocks", "block-sparse layout", _qkv, plain(textbook.dense)),
        Attention("softcap", "capped scores", _qkv, plain(textbook.softcap)),
        Attention(
            "alibi",
            "ALiBi's slopes",
            _plus(slopes=lambda w: Operand((w.heads,), None, 0, gradient=False, of=textbook.alibi_slopes)),
            plain(textbook.alibi),
        ),
        Attention("decode", "one query against a cache of keys and values", _qkv, plain(textbook.dense)),
        Attention(
            "bias",
            "learned bias with gradient",
            _plus(bias=lambda w: Operand((1, w.heads, w.T, w.S), None, 1)),
            plain(textbook.biased),
            ("bias",),
        ),
        Attention(
            "t5",
            "T5's relative bias table with gradient",
            _plus(table=lambda w: Operand((textbook.BUCKETS, w.heads), None, 1)),
            plain(textbook.t5),
            ("table",),
        ),
        Attention(
            "transformer-xl",
            "Transformer-XL's relative attention with gradients",
            _plus(
                u=lambda w: Operand((w.heads, w.E), None, 0, scale=0.1),
                p=lambda w: Operand((w.heads, w.E), None, 0, scale=0.1),
                r=lambda w: Operand((w.heads, w.S, w.E), None, 0),
            ),
            plain(textbook.transformer_xl),
            ("u", "p", "r"),
        ),
        Attention("self", "MultiheadAttention without its weights", _mha, plain(textbook.multihead), _MHA_PARAMETERS, True),
        Attention("weights", "averaged attention weights", _mha, plain(textbook.multihead), _MHA_PARAMETERS, True),
        Attention("padding", "padding and causal in MultiheadAttention", _mha, plain(textbook.multihead), _MHA_PARAMETERS, True),
    )
}
