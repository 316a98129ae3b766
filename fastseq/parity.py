"""Does a converted model still compute what it computed? `Probe` answers for `convert(example_inputs=...)`.

The bound is measured, not chosen. Two correct programs differ by rounding, and how far rounding travels
depends on the model: on its depth, its length in time, what cancels. So the old model runs once more with
every weight of the modules in question moved by one unit of rounding, up or down at random. How far that
moves a result is its noise; the new model may be off by 16 times that (a kernel rounds at every step and in
another order, the moved weights only once), plus 16 units of rounding of the result's largest value. Of the
16, correct kernels were seen to need 4; wrong ones are off by orders of magnitude.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import backends

__all__ = ["Probe", "as_arguments"]

ALLOWANCE = 16


def as_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments from what a caller gave.

    A tensor (or PackedSequence) is the one argument; a tuple or list holds the positional ones, and if it
    ends in a dict with string keys, that dict holds the keyword ones (as in torch.onnx.export); a dict alone
    holds keyword arguments.

    Raises:
        TypeError: anything else.
    """
    if isinstance(example_inputs, Tensor | PackedSequence):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        *first, last = example_inputs or [None]
        if isinstance(last, dict) and all(isinstance(key, str) for key in last):
            return tuple(first), dict(last)
        return tuple(example_inputs), {}
    raise TypeError(
        "example_inputs must be a tensor, a PackedSequence, a tuple or list of positional arguments (a dict "
        "at its end holds keyword arguments) or a dict of keyword arguments, "
        f"got {type(example_inputs).__name__}"
    )


class Probe:
    """Runs a model on the same inputs from the same random state, before and after a change, and compares.

    Nothing of it remains: training flags, attributes, buffers, .grad and every random generator are as
    before.

    Args:
        model: the model, not yet changed. DistributedDataParallel, DataParallel and torch.compile's wrapper
            are looked through, so that their own bookkeeping stays out of this.
        example_inputs: see `as_arguments`.
        modules: the modules that are going to change; their weights are moved to measure the noise.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, modules: Iterable[nn.Module]):
        self._model = _unwrap(model)
        self._args, self._kwargs = as_arguments(example_inputs)
        self._modules = list(modules)
        self.ran: dict[int, dict[str, str]] = {}
        self._differentiate = torch.is_grad_enabled()
        tensors = [*self._model.parameters(), *(tensor for _, tensor in tensors_of((self._args, self._kwargs)))]
        if any(tensor.is_meta for tensor in tensors):
            raise ValueError("example_inputs: no values to compare, the model or the inputs are on the meta device")
        self._random = _Random({tensor.device for tensor in tensors})
        self._coarsest = 0.0
        with self._watching():
            self._before = self._results()
        self._noisy = self._results(self._moved_weights())
        if not self._before:
            raise ValueError("example_inputs: the model returned no tensor to compare")

    def compare(self) -> str | None:
        """One sentence about the output furthest outside its bound, else the gradient, or None if none is.

        `ran` then says which backends ran each of the modules, by its id, and where each choice comes from; a module without
        entry was not called.
        """
        with self._listening():
            after = self._results()
        if after.keys() != self._before.keys():
            changed = sorted(after.keys() ^ self._before.keys())
            return f"the outputs are other ones: {', '.join(changed)} came or went"
        worst, sentence = (False, 1.0), None
        for name, before in self._before.items():
            excess, complaint = _excess(before, after[name], self._noisy.get(name), max(self._unit(before), self._coarsest))
            rank = (name.startswith("output"), excess)
            if excess > 1 and rank > worst:
                worst, sentence = rank, f"{name} {complaint}"
        return sentence

    def _results(self, weights: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Outputs in eval and in train mode and, where autograd is on, the gradients in train mode."""
        results = self._run(training=False, weights=weights)
        results.update(self._run(training=True, weights=weights))
        return results

    def _run(self, training: bool, weights: dict[str, Tensor] | None) -> dict[str, Tensor]:
        differentiate = training and self._differentiate
        with unchanged(self._model), self._random, torch.set_grad_enabled(differentiate), contextlib.ExitStack() as hooks:
            self._model.train(training)
            for module in self._modules:
                # cuDNN draws its dropout between layers from another stream than F.dropout, and so does fused attention.
                attention = isinstance(module, nn.MultiheadAttention)
                if training and hasattr(module, "dropout") and (_device(module).type != "cpu" or attention):
                    vars(module)["dropout"] = 0.0
                if training and attention:
                    hooks.enter_context(module.register_forward_hook(_dense))
            args, kwargs = _copy(self._args), _copy(self._kwargs)
            if weights is None:
                outputs = self._model(*args, **kwargs)
            else:
                outputs = torch.func.functional_call(self._model, weights, args, kwargs)
            mode = "training" if training else "eval"
            results = {f"output{path} in {mode}": _real(tensor) for path, tensor in tensors_of(outputs)}
            if differentiate:
                parameters = dict(self._model.named_parameters()) | (weights or {})
                leaves = {f"gradient of {name}": parameter for name, parameter in parameters.items()}
                leaves |= {f"gradient of input{path}": tensor for path, tensor in tensors_of((args, kwargs))}
                results |= _gradients(list(results.values()), leaves)
        return {name: tensor.detach() for name, tensor in results.items()}

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        """Takes the coarsest unit of rounding in what the modules return: they may run under autocast."""

        def watch(module: nn.Module, inputs: Any, outputs: Any) -> None:
            units = [self._unit(tensor) for _, tensor in tensors_of(outputs)]
            self._coarsest = max([self._coarsest, *units])

        handles = [module.register_forward_hook(watch) for module in self._modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Takes down whose forward is called, and which backends run within it."""
        inside: list[int] = []

        def enter(module: nn.Module, inputs: Any) -> None:
            self.ran.setdefault(id(module), {})
            inside.append(id(module))

        def leave(module: nn.Module, inputs: Any, outputs: Any) -> None:
            inside.pop()

        def chosen(query: backends.Query, name: str) -> None:
            if inside:
                decided = backends.decision(query, False)
                about = decided.about if decided.backend == name else ""
                self.ran[inside[-1]][name] = "forced" if backends.forced() else about

        with contextlib.ExitStack() as stack:
            for module in self._modules:
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave).remove)
            stack.enter_context(backends.watching(chosen))
            yield

    def _moved_weights(self) -> dict[str, Tensor]:
        """The weights of the modules in question, each one unit of rounding away, by name in the model."""
        generator = torch.Generator().manual_seed(0)
        own = {id(parameter) for module in self._modules for parameter in module.parameters()}
        moved = {}
        for name, parameter in self._model.named_parameters():
            if id(parameter) in own:
                sign = torch.randint(0, 2, parameter.shape, generator=generator).to(parameter) * 2 - 1
                unit = max(self._unit(parameter), self._coarsest)
                value = parameter.detach() * (1 + sign * unit)
                moved[name] = value.requires_grad_(parameter.requires_grad)
        return moved

    def _unit(self, tensor: Tensor) -> float:
        """Unit of rounding of the arithmetic that makes `tensor`: of its dtype, or of TF32 and its like."""
        if not tensor.is_floating_point():
            return 0.0
        unit = torch.finfo(tensor.dtype).eps
        if tensor.dtype == torch.float32:
            kind = tensor.device.type
            if kind == "cuda" and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32):
                unit = 2.0**-10
            if kind == "cpu" and torch.get_float32_matmul_precision() == "medium":
                unit = torch.finfo(torch.bfloat16).eps
        return unit


def _excess(before: Tensor, after: Tensor, noisy: Tensor | None, unit: float) -> tuple[float, str]:
    """How many times its bound `after` is off, and that in words."""
    if before.shape != after.shape or before.dtype != after.dtype:
        return math.inf, f"was {before.dtype} {list(before.shape)} and is {after.dtype} {list(after.shape)}"
    if noisy is None or noisy.shape != before.shape:
        noisy = before
    if not before.is_floating_point():
        if torch.equal(before, after) or not torch.equal(before, noisy):
            return 0.0, ""
        return math.inf, "differs in values that rounding does not change"
    old, new = before.double(), after.double()
    finite = old.isfinite()
    same = torch.where(finite, new.isfinite(), (new == old) | (new.isnan() & old.isnan()))
    if not same.all():
        return math.inf, "is infinite or NaN at other places than it was"
    largest = _largest(old[finite])
    noise = _largest((noisy.double() - old)[finite].nan_to_num())
    error, bound = _largest((new - old)[finite]), ALLOWANCE * (noise + unit * largest)
    if error <= bound:
        return 0.0, ""
    complaint = f"is off by up to {error:.3g}, and rounding explains {bound:.3g} (its largest value is {largest:.3g})"
    return error / bound if bound else math.inf, complaint


def _real(tensor: Tensor) -> Tensor:
    """Dense, and with real and imaginary part side by side if complex."""
    dense = tensor if tensor.layout == torch.strided else tensor.to_dense()
    return torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def _gradients(outputs: list[Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradient of a fixed weighted sum of the outputs for each leaf (zero where it has none)."""
    generator = torch.Generator().manual_seed(0)
    total: Tensor | None = None
    for output in outputs:
        if output.requires_grad:
            weights = torch.randn(output.shape, generator=generator).to(output)
            total = (output * weights).sum() + (0 if total is None else total)
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if total is None or not leaves:
        return {}
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient.to_dense()
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }


def _unwrap(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
            continue
        inside = model._modules.get("_orig_mod")  # of torch.compile's wrapper
        if inside is None:
            return model
        model = inside


def _dense(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    """A dropout after a module draws in the order of memory, which torch and fastseq may choose differently."""
    return tuple(output if output is None else output.contiguous() for output in outputs)


def _device(module: nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Attributes, tables and buffers of every module in `model` are put back on the way out.

    A model may keep its state on itself (self.hidden), count its calls, update running statistics. What it
    changes inside its own lists and dicts is not undone.
    """
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    tables = ("_parameters", "_buffers", "_modules")
    attributes = [dict(module.__dict__) for module in modules]
    entries = [[dict(module.__dict__[table]) for table in tables] for module in modules]
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if not buffer.is_inference()]
    try:
        yield
    finally:
        for module, attribute, entry in zip(modules, attributes, entries, strict=True):
            module.__dict__.clear()
            module.__dict__.update(attribute)
            for table, items in zip(tables, entry, strict=True):
                module.__dict__[table].clear()
                module.__dict__[table].update(items)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)


class _Random:
    """Puts the random state of torch, its devices, Python and NumPy back at exit: every run starts alike."""

    def __init__(self, devices: set[torch.device]):
        self._devices = [device for device in devices if device.type != "cpu"]

    def __enter__(self) -> None:
        self._states = [read() for read, _ in self._generators()]

    def __exit__(self, *exception: object) -> None:
        # Not strict: NumPy comes last, and the run may be what imported it.
        for (_, write), state in zip(self._generators(), self._states, strict=False):
            write(state)

    def _generators(self) -> Iterator[tuple[Callable[[], Any], Callable[[Any], None]]]:
        yield torch.get_rng_state, torch.set_rng_state
        yield random.getstate, random.setstate
        for device in self._devices:
            backend = torch.get_device_module(device)
            yield partial(backend.get_rng_state, device), partial(backend.set_rng_state, device=device)
        if numpy := sys.modules.get("numpy"):
            yield numpy.random.get_state, numpy.random.set_state


def _copy(value: Any) -> Any:
    """`value` with every tensor in its tuples, lists and dicts copied: a model may write into its inputs."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_copy(item) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_copy(item) for item in value)
    if type(value) is dict:
        return {key: _copy(item) for key, item in value.items()}
    return value


def tensors_of(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in `value` with its place: "", "[0]", "['logits']", ".state"."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, PackedSequence):
        yield f"{path}.data", value.data
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_of(item, f"{path}[{key!r}]")
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from tensors_of(item, f"{path}[{index}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_of(getattr(value, field.name), f"{path}.{field.name}")
