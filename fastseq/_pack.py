"""`pack` keeps a model's recurrent weights as the CPU kernels read them, for inference; `unpack` takes them away again.

Parameters stay what and where they are: what is packed stands beside them, is used in eval mode without gradients on a CPU alone,
and is made again when a parameter has been replaced, moved or written. It is in no state_dict; copies and pickles make their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ._arguments import checked_module
from .backends import library
from .backends.cpu import recurrent as native
from .cells import CELLS
from .functional._packing import FORMATS, Packing, packing_of, set_packing
from .modules import recurrent, recurrent_cells, recurrent_variants
from .parity import as_arguments, tensors_of, unchanged

__all__ = ["PackReport", "Packed", "pack", "unpack"]

_OURS = (
    recurrent.Sequence,
    recurrent_cells.LSTMCell,
    recurrent_cells.GRUCell,
    recurrent_cells.RNNCell,
    recurrent_variants.VariantCell,
)


@dataclass(frozen=True)
class Packed:
    """One module.

    Attributes:
        name: its name in the model ("" is the model itself).
        kind: its class.
        weights: the format, empty if it was not packed.
        bytes_before: what a call reads, unpacked, of the weights that were packed.
        bytes_after: what it reads of them packed.
        note: why what is packed is not used as things are; or why it was not packed.
    """

    name: str
    kind: str
    weights: str = ""
    bytes_before: int = 0
    bytes_after: int = 0
    note: str = ""


@dataclass
class PackReport:
    """What `pack` or `unpack` did. Print it. True if it changed anything; `len` counts those modules.

    Attributes:
        title: what was called.
        packed: modules that were packed, or of `unpack` unpacked.
        skipped: recurrent modules that were left alone.
        errors: with `example`, of every tensor of the result: its place, the largest difference from the unpacked model,
            and the root mean square of the difference over that of the result.
    """

    title: str
    packed: list[Packed] = field(default_factory=list)
    skipped: list[Packed] = field(default_factory=list)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.packed)

    @property
    def bytes_saved(self) -> int:
        """By how much a call of every module reads less. The memory in use is more: parameters stay."""
        return sum(row.bytes_before - row.bytes_after for row in self.packed)

    def __str__(self) -> str:
        lines = [f"{self.title}: {len(self.packed)} changed, {len(self.skipped)} left alone"]
        if not (self.packed or self.skipped):
            lines[0] += f"; there is nothing to {self.title.rpartition('.')[2]}"
        for row in self.packed:
            sizes = f", {row.weights}, {row.bytes_before} bytes read as {row.bytes_after}" if row.weights else ""
            lines.append(f"  {row.name or '(the model)'}: {row.kind}{sizes}" + (f" ({row.note})" if row.note else ""))
        lines += [f"  {row.name or '(the model)'}: {row.kind} left alone: {row.note}" for row in self.skipped]
        lines += [
            f"  error of result{place}: at most {most:.2e}, relative rms {rms:.2e}" for place, (most, rms) in self.errors.items()
        ]
        return "\n".join(lines)


def pack(model: nn.Module, weights: torch.dtype | None = None, *, example: Any = None) -> PackReport:
    """Pack the weights of fastseq's recurrent modules and cells in `model` once, for inference on a CPU, and tell what was done.

    A packed module saves the packing at every call. In another dtype it also reads less, which is what a call of few rows spends
    its time on once the weights exceed the caches: input and recurrent weights are rounded, while inputs, states, biases, sums
    and activations stay float32. Calls in training mode, with gradients, under autocast, in torch.compile, of transforms or on
    a GPU use the parameters, as before.

    A parameter that is replaced, moved, loaded or written in place is packed again at the next call. Of writes to
    ``parameter.data``, which PyTorch does not count, samples of the values tell, but not of all: `pack` again after those.
    Another format replaces the first.

    Args:
        model: any module.
        weights: None: as the kernels read them, in their own dtype, no value changes. ``torch.bfloat16``: rounded.
            ``torch.int8``: whole numbers with a float32 scale for every row of a weight. Both are made of float32 parameters.
        example: arguments for the model, as of `convert`: it is run before and after, in eval mode without gradients, and
            the report has the differences.

    Returns:
        The report; `print` it. Modules that cannot be packed stand there with the reason, torch.nn's among them.

    Raises:
        TypeError: model is no nn.Module, or example no arguments.
        ValueError: another dtype.
    """
    checked_module(model)
    if weights is not None and not isinstance(weights, torch.dtype):
        raise TypeError(f"weights must be a torch.dtype or None, got {weights!r}")
    if weights not in FORMATS:
        raise ValueError(f"weights must be None, torch.bfloat16 or torch.int8, got {weights}")
    arguments = None if example is None else as_arguments(example)
    report = PackReport("fastseq.pack")
    _unpack(model)
    before = _results(model, arguments) if arguments else {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, _OURS):
            reason = _why_not(module, weights)
            params: list[Any] = [] if reason else [module._parameters[key] for key in _names(module)]
            own = weights if not params or params[0].dtype != weights else None
            packing = Packing(own, *_stack(module))
            kept = None if reason else packing.again(params)
            if kept is None:
                report.skipped.append(Packed(name, kind, note=reason or "its parameters are of no kind that the kernels take"))
                continue
            set_packing(module, packing)
            # the input weights of a cell with layer norm are read as they are, unless they are rounded
            held = "weight_h" if CELLS[_stack(module)[0]].normalized and own is None else ("weight_i", "weight_h")
            given = zip(_names(module), params, strict=True)
            size = sum(parameter.numel() * parameter.element_size() for key, parameter in given if key.startswith(held))
            taken = FORMATS[own] or str(params[0].dtype).removeprefix("torch.")
            report.packed.append(Packed(name, kind, taken, size, packing.bytes(), _why_idle(module)))
        elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            report.skipped.append(Packed(name, kind, note=_not_ours(module)))
    after = _results(model, arguments) if arguments else {}
    for place, expected in before.items():
        found = (after[place] - expected).abs()
        norm = expected.square().mean().sqrt().item()
        rms = found.square().mean().sqrt().item()
        report.errors[place] = found.max().item() if found.numel() else 0.0, rms / norm if norm else math.inf if rms else 0.0
    return report


def unpack(model: nn.Module) -> PackReport:
    """Take away what `pack` left in `model`; its modules read their parameters again.

    Args:
        model: any module.

    Raises:
        TypeError: model is no nn.Module.
    """
    checked_module(model)
    return PackReport("fastseq.unpack", list(_unpack(model)))


def _unpack(model: nn.Module) -> list[Packed]:
    rows = []
    for name, module in model.named_modules():
        if packing_of(module) is not None:
            set_packing(module, None)
            rows.append(Packed(name, type(module).__name__))
    return rows


def _names(module: nn.Module) -> list[str]:
    if isinstance(module, nn.RNNBase):
        return list(module._flat_weights_names)
    if isinstance(module, recurrent_variants.VariantCell):
        return module.names()
    return ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if module.bias else [])]


def _stack(module: Any) -> tuple[str, int, bool, bool]:
    """Cell, layers, whether there are biases, both directions."""
    if isinstance(module, recurrent.Sequence):
        return module.cell, module.num_layers, module.bias, bool(module.bidirectional)
    if isinstance(module, recurrent_variants.VariantCell):
        return module.CELL, 1, bool(module.bias), False
    cell = {recurrent_cells.LSTMCell: "lstm", recurrent_cells.GRUCell: "gru"}
    kind = next((name for kind, name in cell.items() if isinstance(module, kind)), None)
    return kind or f"rnn_{module.nonlinearity}", 1, bool(module.bias), False


def _why_not(module: Any, weights: torch.dtype | None) -> str:
    """Why a module of ours cannot be packed; empty: it can."""
    missing = library.reason()
    if missing:
        return missing
    if getattr(module, "num_heads", 1) > 1:
        return "no kernel takes packed weights of num_heads > 1"
    for name in _names(module):
        parameter = module._parameters.get(name)
        if parameter is None:
            return f"{name} is no parameter (parametrized, pruned or missing): it is made anew at every call"
        if type(parameter) is not nn.Parameter:
            return f"{name} is a {type(parameter).__name__}"
        if parameter.device.type != "cpu":
            return f"{name} is on {parameter.device}; packed weights are for the CPU"
        if parameter.is_inference():
            return f"{name} was made in inference mode and does not count its changes"
        dtype = str(parameter.dtype).removeprefix("torch.")
        if weights not in (None, parameter.dtype) and parameter.dtype != torch.float32:
            return f"{FORMATS[weights]} weights are made of float32 parameters, and {name} is {dtype}"
        if parameter.dtype not in native.DTYPES:
            return f"{name} is {dtype}, which the packed kernels do not take"
    return ""


def _why_idle(module: nn.Module) -> str:
    """Why what is packed is not used as things are."""
    reasons = ["after model.eval()"] if module.training else []
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
        reasons.append("under torch.no_grad() or torch.inference_mode()")
    return f"used {' and '.join(reasons)}" if reasons else ""


def _not_ours(module: nn.Module) -> str:
    kind = type(module)
    if kind.__module__.startswith("fastseq."):
        return "no kernel takes packed weights of this cell"
    return "torch.nn's: fastseq.convert it first"


def _results(model: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The floating-point tensors of the model's result, in float64, by their place; nothing of the run remains."""
    with unchanged(model), torch.no_grad():
        model.eval()
        results = model(*arguments[0], **arguments[1])
    return dict(_floating(results))


def _floating(results: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for place, tensor in tensors_of(results):
        if tensor.is_floating_point():
            yield place, tensor.double()
