"""The modules of a model, which of them a conversion is for, and what speaks against it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import backends
from .report import named
from .subclasses import why_not_subclass
from .table import CONVERSIONS, Conversion, class_name

FilterFn = Callable[[nn.Module, str], bool]


@dataclass
class Found:
    """A module, with every name and every module that holds it."""

    module: nn.Module
    names: list[str] = field(default_factory=list)
    holders: list[nn.Module] = field(default_factory=list)
    ancestors: list[nn.Module] = field(default_factory=list)


def walk(model: nn.Module) -> list[Found]:
    """Every module once, in the order of named_modules(), which knows only the first name of each."""
    found: dict[int, Found] = {}

    def visit(module: nn.Module, name: str, above: tuple[nn.Module, ...]) -> None:
        here = found.setdefault(id(module), Found(module))
        here.names.append(name)
        here.ancestors.extend(above)
        if above and not any(above[-1] is holder for holder in here.holders):
            here.holders.append(above[-1])
        if any(module is ancestor for ancestor in above):
            return
        for child_name, child in module._modules.items():
            if child is not None:
                visit(child, f"{name}.{child_name}" if name else child_name, (*above, module))

    visit(model, "", ())
    return list(found.values())


_QUANTIZED = ("torch.ao.nn.", "torch.nn.quantized.", "torch.nn.quantizable.")


def recognize(found: Found) -> Conversion | None:
    """The row that a module falls under, even if in the end it cannot be converted."""
    module = found.module
    if isinstance(module, torch.jit.ScriptModule):
        return CONVERSIONS.get(getattr(module, "original_name", ""))
    if _is_quantized(module):
        part_of_another = any(_is_quantized(ancestor) for ancestor in found.ancestors)
        return None if part_of_another else CONVERSIONS.get(type(module).__name__)
    for kind in type(module).__mro__:
        conversion = CONVERSIONS.get(kind.__name__)
        if conversion is not None and (kind is conversion.torch_class or kind in conversion.own_classes()):
            return conversion
    return None


def why_not_asked(found: Found, conversion: Conversion, chosen: set[str], filter_fn: FilterFn | None) -> str:
    if conversion.name not in chosen:
        return "not among the modules asked for"
    if filter_fn is not None:
        refused = [name for name in found.names if not filter_fn(found.module, name)]
        if refused:
            return f"filter_fn refused {named(refused)}"
    return ""


def why_not_possible(found: Found, conversion: Conversion, verb: str) -> str:
    """One reason, the first that holds, against a swap of the module's class; empty if there is none."""
    module, kind = found.module, type(found.module)
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by TorchScript, which runs torch's own functions whether converted before or not"
    if _is_quantized(module):
        return "quantized (torch.ao): its weights and kernels are other ones"
    if any(_is_fsdp(holder) for holder in (module, *found.ancestors)):
        return f"managed by FSDP: {verb} before fully_shard"
    if parametrize.is_parametrized(module):
        names = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        return f"parametrized (torch.nn.utils.parametrize: {names}): {verb} before registering parametrizations"
    if kind is not conversion.torch_class and kind not in conversion.own_classes() and "stands_for" not in vars(kind):
        base = next(base for base in kind.__mro__ if base is conversion.torch_class or base in conversion.own_classes())
        against = "" if verb == "revert" else why_not_subclass(kind, base)
        if against or base is not conversion.torch_class:
            return f"subclass of {class_name(base)}{against}"
    if "forward" in vars(module):
        return f"its forward is replaced on the instance: {verb} before that"
    for name, parameter in module.named_parameters(recurse=False):
        if nn.parameter.is_lazy(parameter):
            return f"{name} is not initialized yet: run the model once before"
        if is_traceable_wrapper_subclass(parameter):
            wrapper = type(parameter.data).__name__
            return f"{name} is a {wrapper}: {verb} before parameters are distributed or quantized"
    return ""


def why_not_faster(found: Found, conversion: Conversion) -> str:
    if backends.forced() is not None:
        return ""
    choice = conversion.backend(found.module)
    if choice is None:
        return ""
    if choice.source == "default" and choice.backend == backends.torch.name and isinstance(found.module, nn.RNNBase):
        return choice.about
    if choice.backend == "reference" or (choice.source == "lacking" and not isinstance(found.module, nn.RNNCellBase)):
        weight = next(found.module.parameters())
        dtype, device = str(weight.dtype).removeprefix("torch."), weight.device.type
        return f"no fastseq kernel runs {dtype} on {device} here, so nothing would be gained (python -m fastseq info)"
    return ""


def _is_quantized(module: nn.Module) -> bool:
    return type(module).__module__.startswith(_QUANTIZED)


def _is_fsdp(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule | fsdp.FullyShardedDataParallel)
