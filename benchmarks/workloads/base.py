"""What is computed: the functions, one workload of them, and the numbers that every provider of a function
starts from.

A *function* is a mathematical object (an LSTM layer, causal attention, ...); a *provider* is a program that
computes it. All providers of one function get the same parameters and the same input, so that their results
can be compared with one fp64 reference. Letters: T time, B batch, I input width, H hidden width, N = number
of (time, batch) positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from .layers import Attention, TransformerBlock, materialized

MODES = {
    "inference": "forward",
    "training": "forward + backward",
}
ALL_MODES = MODES | {"backward": "backward"}  # the backward pass alone: of attention
GATES = {"lstm": 4, "gru": 3, "rnn": 1}


@dataclass(frozen=True)
class Workload:
    """One point of a benchmark: the function, its sizes and how it is called."""

    function: str
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    mode: str = "inference"
    packed: bool = False
    input_grad: bool = True  # in training: whether the input wants a gradient (an inner layer), or is data (a first layer)
    threads: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    heads: int = 4
    seed: int = 0
    tf32: bool = False  # whether a GPU's fp32 products may round their factors to TF32

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def precision(self) -> str:
        return "tf32" if self.tf32 else self.dtype

    @property
    def growth(self) -> int:
        """Power of T that memory grows with at most."""
        return 1 if self.function in GATES else 2

    @property
    def width(self) -> int:
        """Features of the output."""
        return self.H

    @property
    def matrices(self) -> int:
        """Recurrent ones: layers times directions."""
        return 1

    @property
    def inputs(self) -> int:
        """Features that are projected at a step, of all layers and directions."""
        return self.I

    @property
    def options(self) -> dict[str, Any]:
        """What a recurrent module is built with beside I and H."""
        return {}

    @cached_property
    def lengths(self) -> list[int] | None:
        """Valid steps of each row, drawn uniformly from 1..T; None when every row has T of them."""
        if not self.packed:
            return None
        return torch.randint(1, self.T + 1, (self.B,), generator=self.generator()).tolist()

    @property
    def steps(self) -> int:
        """Length of the sequential chain: the longest row."""
        return max(self.lengths) if self.lengths else self.T

    @property
    def tokens(self) -> int:
        """N: positions that are really computed."""
        return sum(self.lengths) if self.lengths else self.T * self.B

    def active(self) -> list[int]:
        """Rows still running at each step: [steps]."""
        if not self.lengths:
            return [self.B] * self.T
        return [sum(length > t for length in self.lengths) for t in range(self.steps)]

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def small(self) -> Workload:
        """The same call at a size where a mistake at an edge (odd T and B, short rows) is most visible."""
        return replace(self, T=min(self.T, 7), B=min(self.B, 3), I=24, H=24)

    def problem(self) -> Any:
        return Problem.of(self)

    def call(self, built: Any, problem: Any, layout: str, **options: Any) -> Any:
        """What is timed and compared: what a provider built, on a problem."""
        return Call(built, problem, layout, **options)

    def torch_results(self, problem: Any, dtype: torch.dtype, device: str, *, in_parts: bool) -> dict[str, Tensor]:
        """Outputs and gradients of torch's own way. In parts: those that the fp64 reference is cut into for its size."""
        return torch_results(self, problem, dtype, device, in_parts and FUNCTIONS[self.function].row_by_row)

    def missing(self) -> str | None:
        """Why nobody can run it here; None: it can be run."""
        return None

    def measure(self, provider: Any) -> Metric | None:
        """What an experiment finds with the modules that a provider builds; None: what counts is the time of a call."""
        return None

    def cost(self) -> tuple[int, float, float] | None:
        """Steps that cannot overlap, and FLOP and bytes of each; None: the roofline has a formula of its own."""
        return None

    def settings(self) -> AbstractContextManager[Any]:
        """Global flags of torch under which every provider is checked and timed."""
        return fp32_products(tf32=self.tf32)

    def detail(self) -> dict[str, Any] | None:
        """What a row says beside the columns that all workloads have."""
        return None


@dataclass(frozen=True)
class Metric:
    """What an experiment found: the median over seeds, and the lowest and highest of them."""

    name: str
    unit: str
    median: float
    low: float
    high: float
    seeds: int

    @classmethod
    def of(cls, name: str, unit: str, values: list[float]) -> Metric:
        return cls(name, unit, median(values), min(values), max(values), len(values))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@contextmanager
def fp32_products(*, tf32: bool) -> Iterator[None]:
    """How a GPU multiplies fp32 within the block. By torch's defaults: cuBLAS by IEEE, cuDNN's recurrent layers in TF32."""
    products = torch.backends.cuda.matmul
    layers: Any = torch.backends.cudnn.rnn  # its attributes are made at import
    before = products.allow_tf32, layers.fp32_precision
    products.allow_tf32, layers.fp32_precision = tf32, "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        products.allow_tf32, layers.fp32_precision = before


@dataclass(frozen=True)
class Function:
    """`module(workload)` is torch's own way: in fp64 the reference, in another dtype the error to beat."""

    name: str
    module: Callable[[Workload], nn.Module]
    layout: str  # of the reference module: "time" [T, B, I] or "batch" [B, T, I]
    row_by_row: bool = False  # the fp64 reference is large: one batch row at a time


def _recurrent(cls: Callable[..., nn.Module]) -> Callable[[Workload], nn.Module]:
    return lambda w: cls(w.I, w.H, **w.options)


def _every_key(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    return materialized(q, k, v, causal=False)


FUNCTIONS = {
    f.name: f
    for f in (
        Function("lstm", _recurrent(nn.LSTM), "time"),
        Function("gru", _recurrent(nn.GRU), "time"),
        Function("rnn", _recurrent(nn.RNN), "time"),
        Function("attention", lambda w: Attention(w.H, w.heads, fused=False), "batch", True),
        Function("block", lambda w: TransformerBlock(w.H, w.heads, fused=False), "batch", True),
        Function("encoder", lambda w: TransformerBlock(w.H, w.heads, fused=_every_key), "batch", True),
    )
}


@dataclass
class Problem:
    """Parameters, input and output gradient in fp64 on the CPU; what a provider gets is cast from them."""

    workload: Workload
    parameters: dict[str, Tensor]
    x: Tensor  # [T, B, I]
    grad: Tensor  # [T, B, width], of the output

    @classmethod
    def of(cls, workload: Workload, build: Callable[[Workload], nn.Module] | None = None) -> Problem:
        w, g = workload, workload.generator()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(w.seed)
            module = (build or FUNCTIONS[w.function].module)(w).double()
        # Rounded to the workload's dtype first: rounding of the inputs is not an error of the provider.
        cast = lambda t: t.detach().to(w.torch_dtype).double()  # noqa: E731
        return cls(
            workload,
            {name: cast(p) for name, p in module.named_parameters()},
            cast(torch.randn(w.T, w.B, w.I, generator=g, dtype=torch.float64)),
            cast(torch.randn(w.T, w.B, w.width, generator=g, dtype=torch.float64)),
        )


def arrange(t: Tensor, layout: str, lengths: list[int] | None) -> Tensor | PackedSequence:
    """[T, B, ...] in the layout of a provider: "time", "batch" ([B, T, ...]) or, where lengths are given,
    packed.
    """
    if lengths is not None:
        return pack_padded_sequence(t, torch.tensor(lengths), enforce_sorted=False)
    return t.transpose(0, 1).contiguous() if layout == "batch" else t


def around(module: Any) -> AbstractContextManager[Any]:
    """The context that a module wants its backward pass in as well: its attribute `around`, if it has one."""
    return getattr(module, "around", nullcontext)()


def load(module: nn.Module, values: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    """Gives a module its parameters; they are returned by the names that the function's own module gives them.

    Of a module that has a method `adopt` they are its own, as it returns them.
    """
    if adopt := getattr(module, "adopt", None):
        return adopt(values)
    name_of: Callable[[str], str] = getattr(module, "canonical_name", lambda name: name)
    learned = {name_of(name): p for name, p in module.named_parameters()}
    with torch.no_grad():
        for name, p in learned.items():
            p.copy_(values[name])
    return learned


class Call:
    """A module on a problem: what is timed (`run`), and what is compared (`outputs`, `gradients`)."""

    def __init__(
        self,
        module: nn.Module,
        problem: Problem,
        layout: str,
        *,
        dtype: torch.dtype | None = None,
        device: str | None = None,
        mode: str | None = None,
    ) -> None:
        w = problem.workload
        self.layout, self.mode = layout, mode or w.mode
        dtype, device = dtype or w.torch_dtype, device or w.device
        self.module = module.to(device=device, dtype=dtype).train(self.mode == "training")
        learned = load(self.module, problem.parameters)
        self.parameters = list(learned.values())
        to = lambda t: t.detach().clone().to(device=device, dtype=dtype)  # noqa: E731
        x, grad = (self._place(to(t), w) for t in (problem.x, problem.grad))
        self.data = (x.data if isinstance(x, PackedSequence) else x).requires_grad_(self.mode == "training" and w.input_grad)
        self.x = x._replace(data=self.data) if isinstance(x, PackedSequence) else self.data
        self.grad = grad.data if isinstance(grad, PackedSequence) else grad
        wanted = {"input": self.data} if w.input_grad else {}
        self.leaves = wanted | learned

    def _place(self, t: Tensor, w: Workload) -> Tensor | PackedSequence:
        """[T, B, ...] as the module takes it."""
        return arrange(t, self.layout, w.lengths)

    @property
    def run(self) -> Callable[[], object]:
        return self._backward if self.mode == "training" else self.forward

    def forward(self) -> object:
        return self.module(self.x)

    def _backward(self) -> tuple[Tensor, ...]:
        with around(self.module):
            return torch.autograd.grad(_first(self.module(self.x)), list(self.leaves.values()), self.grad)

    def context(self) -> torch.inference_mode:
        """Gradient mode that `run` is called in."""
        return torch.inference_mode(self.mode == "inference")

    def outputs(self) -> dict[str, Tensor]:
        """output, h_n, c_n as far as the module returns them; output as [T, B, width] or packed [N, width]."""
        with self.context():
            found = _flatten(self.module(self.x))
        return {"output": self._restore(found[0])} | dict(zip(("h_n", "c_n"), found[1:], strict=False))

    def gradients(self) -> dict[str, Tensor]:
        """Gradient of every parameter, by canonical name, and of the input ([T, B, I] or packed) if it wants one."""
        found = dict(zip(self.leaves, self._backward(), strict=True))
        return {name: self._restore(grad) if name == "input" else grad for name, grad in found.items()}

    def _restore(self, t: Tensor) -> Tensor:
        """An output, or the gradient of the input, as all providers are compared: [T, B, ...] or packed."""
        return t.transpose(0, 1) if self.layout == "batch" else t


def results_of(call: Any) -> dict[str, Tensor]:
    """Outputs and, unless in inference, gradients."""
    if call.mode == "inference":
        return call.outputs()
    return call.outputs() | {f"grad {name}": value for name, value in call.gradients().items()}


def torch_results(w: Workload, whole: Problem, dtype: torch.dtype, device: str, row_by_row: bool) -> dict[str, Tensor]:
    function, problems = FUNCTIONS[w.function], [whole]
    if row_by_row:
        problems = [
            Problem(whole.workload, whole.parameters, x, g)
            for x, g in zip(whole.x.split(1, dim=1), whole.grad.split(1, dim=1), strict=True)
        ]
    parts = [results_of(Call(function.module(w), part, function.layout, dtype=dtype, device=device)) for part in problems]
    if len(parts) == 1:
        return parts[0]
    by_row = ("output", "grad input")  # [T, 1, ...] each; gradients of parameters add up
    every = {name: [part[name] for part in parts] for name in parts[0]}
    return {name: torch.cat(values, dim=1) if name in by_row else torch.stack(values).sum(0) for name, values in every.items()}


def _first(result: object) -> Tensor:
    if isinstance(result, tuple) and not isinstance(result, PackedSequence):
        result = result[0]
    return result.data if isinstance(result, PackedSequence) else result  # type: ignore[return-value]


def _flatten(result: object) -> list[Tensor]:
    if isinstance(result, PackedSequence):
        return [result.data]
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in _flatten(part)]  # type: ignore[attr-defined]
