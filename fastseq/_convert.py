"""`convert` makes a model's torch.nn modules fastseq's, in place; `revert` undoes it; `patched` builds them.

A conversion is a swap of `module.__class__`: parameters, buffers, hooks, names and state_dict are the same
objects before and after, so optimizers, tied weights and averaged copies go on working. `CONVERSIONS` is the
table of what becomes what; a new module is a row there. What cannot be converted right is left alone and
stands in the report with its reason.
"""

from __future__ import annotations

import dis
import functools
import html
import sys
import threading
import warnings
from abc import ABCMeta
from collections.abc import Callable, Iterable, Iterator
from contextlib import ContextDecorator, contextmanager
from dataclasses import dataclass, field
from types import CodeType, FunctionType, UnionType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import backends
from . import modules as own_modules
from ._arguments import checked_module
from .cells import CELLS
from .choice import self_check
from .functional._packing import set_packing
from .modules import keep_type as keep_type_modules
from .parity import Probe, as_arguments

__all__ = ["Report", "Row", "convert", "patched", "revert"]

ModuleKinds = type[nn.Module] | str | Iterable[type[nn.Module] | str]
FilterFn = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class Row:
    """One module of the model, tied or not.

    Attributes:
        names: every name that reaches it from the model ("" is the model itself).
        old: its class before.
        new: its class after, or None if it was left alone.
        backend: the backend that runs a long call of it where its parameters lie now, or, with example_inputs,
            those that ran it; None if left alone, on the meta device, or not called.
        choice: where it is known from that this backend is the one ("tuned here, 1.83x torch, 2026-11-29").
        note: what a conversion does not change in it; empty if there is nothing to say.
        reason: why it was left alone; empty if it was converted.
        unsupported: whether it was left alone because it cannot be converted, not because nobody asked for
            it.
    """

    names: tuple[str, ...]
    old: str
    new: str | None = None
    backend: str | None = None
    choice: str = ""
    note: str = ""
    reason: str = ""
    unsupported: bool = False


@dataclass
class Report:
    """What `convert` or `revert` did. Print it. True if it changed anything; `len` counts those modules.

    Attributes:
        title: what was called.
        converted: a row for each module that was changed: names, classes, backend.
        skipped: a row for each that was left alone, with the reason.
    """

    title: str
    converted: list[Row] = field(default_factory=list)
    skipped: list[Row] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.converted)

    def __str__(self) -> str:
        lines = [self._summary()]
        for head, rows in self._tables():
            widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
            for row in [head, *rows]:
                cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
                lines.append(("  " + "  ".join(cells)).rstrip())
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        parts = [f"<p>{html.escape(self._summary())}</p>"]
        for head, rows in self._tables():
            parts.append("<table>")
            for tag, row in [("th", head), *(("td", row) for row in rows)]:
                cells = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
                parts.append(f"<tr>{cells}</tr>")
            parts.append("</table>")
        return "".join(parts)

    def _summary(self) -> str:
        return f"{self.title}: {len(self.converted)} changed, {len(self.skipped)} left alone"

    def _tables(self) -> Iterator[tuple[list[str], list[list[str]]]]:
        if self.converted:
            rows = [[_named(r.names), r.old, r.new or "", r.backend or "-", r.choice, r.note] for r in self.converted]
            yield ["name", "was", "is", "backend", "choice", "note"], rows
        if self.skipped:
            rows = [[_named(r.names), r.old, r.reason] for r in self.skipped]
            yield ["name", "is", "left alone because"], rows


@dataclass(frozen=True)
class Conversion:
    """One row of the table.

    Attributes:
        torch_class: what is converted, and subclasses that leave its forward alone.
        backend: who runs a converted module, or None where that cannot be told.
        apply: what else must change in the module once its class is ours.
        undo: takes `apply` back, once its class is torch's again.
    """

    torch_class: type[nn.Module]
    backend: Callable[[nn.Module], backends.Choice | None]
    apply: Callable[[nn.Module, Options], None] = lambda module, options: None
    undo: Callable[[nn.Module], None] = lambda module: None

    @property
    def name(self) -> str:
        return self.torch_class.__name__

    def own_class(self, keep_type: bool) -> type[nn.Module]:
        return getattr(keep_type_modules if keep_type else own_modules, self.name)

    def own_classes(self) -> tuple[type[nn.Module], type[nn.Module]]:
        return self.own_class(keep_type=False), self.own_class(keep_type=True)


@dataclass(frozen=True)
class Options:
    """What the caller of `convert` asked of every module."""

    keep_type: bool | None = None  # None: where the model's code asks for it
    recompute: bool = False


def _recurrent_backend(module: Any) -> backends.Choice | None:
    weight = next(module.parameters())
    if weight.is_meta:
        return None
    cells = {cell.mode: cell.name for cell in CELLS.values()}
    names = [kind.__name__.removesuffix("Cell") for kind in type(module).__mro__]  # a subclass may be called as it likes
    mode = getattr(module, "mode", None) or next((name for name in names if name in cells), "")
    query = backends.RecurrentQuery(
        op="recurrent" if isinstance(module, nn.RNNBase) else "recurrent_cell",
        device=weight.device,
        dtype=weight.dtype,
        cell=cells.get(mode) or f"rnn_{module.nonlinearity}",
        steps=128 if isinstance(module, nn.RNNBase) else 1,
        lanes=2 if getattr(module, "bidirectional", False) else 1,
        hidden=module.hidden_size,
        projected=getattr(module, "proj_size", 0) > 0,
        layout="padded",
    )
    return _selected(query)


def _attention_backend(module: Any) -> backends.Choice | None:
    weight = module.out_proj.weight
    if weight.is_meta:
        return None
    query = backends.AttentionQuery(
        op="attention",
        call="forward",
        device=weight.device,
        dtype=weight.dtype,
        batch=1,
        heads=(module.num_heads, module.num_heads),
        lengths=(128, 128),
        features=(module.head_dim, module.head_dim),
        layout="padded",
        window=(-1, -1),
        offset=0,
        block_size=0,
        uses=(),
        gradients=(),
    )
    return _selected(query)


def _selected(query: backends.Query) -> backends.Choice:
    """The backend of a call without gradients."""
    try:
        with self_check.known_alone():
            return backends.chosen(query)
    except RuntimeError:
        return backends.Choice("none (the one forced cannot run it)", "forced", "forced")


def _set_recompute(module: nn.Module, options: Options) -> None:
    if options.recompute:
        module.recompute = True  # type: ignore[assignment]


def _restore_flat_weights(module: Any) -> None:
    """torch.nn's forward reads a list of its weights and, on a GPU, wants them in one buffer again."""
    vars(module).pop("recompute", None)
    module._init_flat_weights()


# The classes as torch has them, whatever patched() puts in their place later.
CONVERSIONS: dict[str, Conversion] = {
    conversion.name: conversion
    for conversion in (
        Conversion(nn.RNN, _recurrent_backend, apply=_set_recompute, undo=_restore_flat_weights),
        Conversion(nn.LSTM, _recurrent_backend, apply=_set_recompute, undo=_restore_flat_weights),
        Conversion(nn.GRU, _recurrent_backend, apply=_set_recompute, undo=_restore_flat_weights),
        Conversion(nn.RNNCell, _recurrent_backend),
        Conversion(nn.LSTMCell, _recurrent_backend),
        Conversion(nn.GRUCell, _recurrent_backend),
        Conversion(nn.MultiheadAttention, _attention_backend),
        Conversion(nn.TransformerEncoderLayer, lambda layer: _attention_backend(layer.self_attn)),
    )
}

_ON_UNSUPPORTED = ("skip", "warn", "raise")


def convert(
    model: nn.Module,
    modules: ModuleKinds | None = None,
    *,
    filter_fn: FilterFn | None = None,
    on_unsupported: str = "skip",
    example_inputs: Any = None,
    keep_type: bool | None = None,
    recompute: bool = False,
    even_if_slower: bool = False,
) -> Report:
    """Make the nn.RNN, nn.LSTM, nn.GRU, their cells, the nn.MultiheadAttention and the nn.TransformerEncoderLayer
    in `model` fastseq's, in place, and tell what was done.

    Every parameter, buffer, hook and name stays the same object, so an optimizer made before goes on working,
    and state_dict, deepcopy and DistributedDataParallel do not notice. A module with several names is
    converted once. The model itself may be such a module. Converting again changes nothing.

    What changes is what a module's forward runs, call by call: a fastseq kernel, or torch's own where that is
    the faster one (short sequences of recurrent modules on a CPU; `fastseq.explain` tells). Code that takes a
    module's weights and calls functions with them goes on as before, and so does torch's fused path for
    nn.TransformerEncoderLayer in eval mode without gradients where it is still taken: of nested tensors, on a GPU.

    Subclasses are converted as well, if they have no forward of their own or one that calls ``super().forward``: a
    module's class is then a subclass of its own class and ours, so isinstance, methods and attributes stay, and it can
    be copied and pickled.

    Left alone, with the reason in the report: subclasses with another forward of their own, a forward replaced on the
    instance, modules under torch.nn.utils.parametrize, quantized, scripted, FSDP-managed and not yet
    initialized ones, and those that torch's own kernel runs in any case. Old-style weight_norm, spectral_norm and
    pruning are fine. Convert before `fully_shard` and parametrizations.

    Other tools meet a converted model thus. torch.fx: each module is a leaf, as torch's are. torch.jit.trace and
    torch.onnx.export, by either exporter: torch's functions run, and are recorded. torch.jit.script: compiles
    torch's classes, and leaves them in the model. Quantization of torch.ao (quantize_dynamic, prepare): looks for
    torch's classes by type and passes ours by, with a warning: `revert` first. torch.export: programs hold
    fastseq's ops, so that `import fastseq` comes before torch.export.load, torch.jit.load of a variant, or
    loading an AOTInductor package; without it they say "could not find schema".

    Args:
        model: any module; wrappers (DistributedDataParallel, torch.compile's) are looked through.
        modules: which classes, as `nn.LSTM`, `"LSTM"` or several of them. None: all that can be converted.
        filter_fn: called with (module, name) for each of them; converted if true, for every name if it has
            several.
        on_unsupported: what to do about a module that was asked for and cannot be converted: "skip" (it is in
            the report), "warn", or "raise" before anything is changed.
        example_inputs: arguments for the model: a tensor, a tuple of positional ones (a dict at its end holds
            keyword ones), or a dict of keyword ones. The model is run before and after, in eval and in train
            mode, in the latter with gradients if autograd is on; nothing of these runs remains. If a result
            differs by more than rounding explains, everything is taken back.
        keep_type: use classes that are subclasses of torch's too, for code that asks `isinstance(m,
            nn.LSTM)`. The price: torch.compile(fullgraph=True) refuses RNN, LSTM and GRU, as it refuses
            torch's own. fastseq.MultiheadAttention always is a subclass of torch's. None: where a method of the
            modules that hold one asks so, or a function that such a method calls.
        even_if_slower: convert also what no fastseq kernel runs, or none that is known to be faster (RNN, LSTM
            and GRU on a CPU without the compiled library, or on a GPU).
        recompute: compute gate activations again in the backward pass of nn.RNN, nn.LSTM and nn.GRU rather
            than keep them: less memory, more time.

    Returns:
        The report; `print` it.

    Raises:
        TypeError, ValueError: an argument that is not what it has to be.
        NotImplementedError: a module cannot be converted, with on_unsupported="raise". The model is as it
            was.
        RuntimeError: results differ on example_inputs. The model is as it was.

    Warns:
        UserWarning: if nothing was converted, unless all was already.
    """
    chosen = _chosen(modules)
    checked_module(model)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be a function (module, name) -> bool, got {type(filter_fn).__name__}")
    if on_unsupported not in _ON_UNSUPPORTED:
        raise ValueError(f"on_unsupported must be one of {', '.join(_ON_UNSUPPORTED)}, got {on_unsupported!r}")
    if example_inputs is not None:
        as_arguments(example_inputs)
    options = Options(keep_type=None if keep_type is None else bool(keep_type), recompute=bool(recompute))

    report = Report("fastseq.convert")
    plan: list[tuple[_Found, Conversion]] = []
    ready = False
    for found in _walk(model):
        conversion = _recognize(found)
        if conversion is None:
            continue
        reason, unsupported = _why_not_asked(found, conversion, chosen, filter_fn), False
        if not reason and isinstance(found.module, conversion.own_classes()):
            reason, ready = "already fastseq's", True
        if not reason:
            reason = _why_not_possible(found, conversion, "convert")
            if not reason and not even_if_slower:
                reason = _why_not_faster(found, conversion)
            unsupported = bool(reason)
        if reason:
            report.skipped.append(_row(found, reason=reason, unsupported=unsupported))
        else:
            plan.append((found, conversion))
    _complain(report, on_unsupported)
    if not plan and not ready:
        warnings.warn(
            f"fastseq.convert: nothing to convert in {type(model).__name__} (looked for "
            f"{', '.join(sorted(chosen))}; {len(report.skipped)} left alone, see the report)",
            stacklevel=2,
        )

    probe = None
    if plan and example_inputs is not None:
        probe = Probe(model, example_inputs, [found.module for found, _ in plan])
    before = [_class_name(type(found.module)) for found, _ in plan]
    swapped: list[tuple[_Found, Conversion]] = []
    asking, askers = _Asking(), []
    try:
        for found, conversion in plan:
            askers.append(asking.who(found, conversion.name) if options.keep_type is None else "")
            found.module.__class__ = _own_class(type(found.module), conversion, bool(askers[-1] or options.keep_type))
            swapped.append((found, conversion))
            conversion.apply(found.module, options)
        complaint = probe.compare() if probe is not None else None
        if complaint is not None:
            names = ", ".join(_named(found.names) for found, _ in plan)
            raise RuntimeError(
                f"fastseq.convert: on example_inputs the converted model disagrees: {complaint}. "
                f"The model was put back; converted were {names}"
            )
    except BaseException:
        for found, conversion in reversed(swapped):
            _swap_back(found, conversion)
        raise
    for (found, conversion), old, asker in zip(plan, before, askers, strict=True):
        note = _note(found, conversion, asker)
        if probe is None:
            of_call = conversion.backend(found.module)
            backend, choice = (None, "") if of_call is None else (of_call.backend, of_call.about)
        else:
            ran = probe.ran.get(id(found.module))
            backend = ", ".join(sorted(ran)) if ran else None
            choice = "; ".join(sorted(set(ran.values()) - {""})) if ran else ""
            note = note if ran is not None else "its forward is not called on example_inputs: nothing changes there"
        report.converted.append(_row(found, old=old, backend=backend, choice=choice, note=note))
    return report


@contextmanager
def all_ours(model: nn.Module) -> Iterator[None]:
    """Within a ``with`` block every module of the model that can be is fastseq's, even if slower."""
    swapped = []
    try:
        for found in list(_walk(model)):
            conversion = _recognize(found)
            if conversion is None or isinstance(found.module, conversion.own_classes()):
                continue
            if not _why_not_possible(found, conversion, "convert"):
                found.module.__class__ = _own_class(type(found.module), conversion, keep=False)
                swapped.append((found, conversion))
        yield
    finally:
        for found, conversion in reversed(swapped):
            _swap_back(found, conversion)


def _note(found: _Found, conversion: Conversion, asker: str) -> str:
    if asker:
        return f"an nn.{conversion.name} as well, since {asker} asks for it: torch.compile(fullgraph=True) refuses it"
    fused = isinstance(found.module, nn.MultiheadAttention) and any(
        isinstance(holder, nn.TransformerEncoderLayer)
        and holder.self_attn is found.module
        and not (isinstance(holder, own_modules.TransformerEncoderLayer) and found.module.out_proj.weight.device.type == "cpu")
        for holder in found.holders
    )
    return "in eval mode without gradients torch's fused path runs the whole layer" if fused else ""


def revert(model: nn.Module) -> Report:
    """Make every fastseq module in `model` the torch.nn module that it stands for: the inverse of `convert`.

    This holds for modules that `convert` made as well as for those built as fastseq's, by name or under
    `patched`. Parameters keep their identity. Reverting again changes nothing.

    Args:
        model: any module, as `convert` takes it.

    Returns:
        The report; what could not be reverted (subclasses, modules wrapped by FSDP or a parametrization
        since) stands in `skipped` with its reason.

    Raises:
        TypeError: if `model` is no nn.Module.

    Warns:
        UserWarning: if something could not be reverted.
    """
    checked_module(model)
    report = Report("fastseq.revert")
    for found in _walk(model):
        conversion = _recognize(found)
        if conversion is None or not isinstance(found.module, conversion.own_classes()):
            continue
        reason = _why_not_possible(found, conversion, "revert")
        if reason:
            report.skipped.append(_row(found, reason=reason, unsupported=True))
        else:
            old = _class_name(type(found.module))
            _swap_back(found, conversion)
            report.converted.append(_row(found, old=old))
    _complain(report, "warn")
    return report


class patched(ContextDecorator):
    """Within `with fastseq.patched():` the constructors nn.RNN, nn.LSTM, nn.GRU, their cells,
    nn.MultiheadAttention and nn.TransformerEncoderLayer build fastseq's modules.

    For code that builds models out of your reach. The names are replaced in torch.nn, torch.nn.modules and
    the modules below that, so `from torch.nn import LSTM` inside the block gets ours too, and so do torch's
    own nn.Transformer and its layers; a name that a file imported before is out of reach (use `convert` on the
    result). Only calls change: `class Mine(nn.LSTM)` derives from torch's class, inside as outside, and
    `isinstance(m, nn.LSTM)` is true for fastseq's modules and torch's. On the way out, also by an error, torch's
    classes stand there again; modules built inside stay fastseq's (`revert` makes them torch's). Blocks nest.
    Also a decorator.

    The replacement holds for the whole process: other threads see it as well while any thread is inside, and
    it is taken back when the last leaves. Keep the block to building models.

    Args:
        modules: which classes, as for `convert`.
        keep_type: as for `convert`.

    Raises:
        TypeError, ValueError: an argument that is not what it has to be.
    """

    _lock = threading.RLock()
    _entries: list[dict[str, type[nn.Module]]] = []  # of all threads, the latest last

    def __init__(self, modules: ModuleKinds | None = None, *, keep_type: bool = False):
        self._classes: dict[str, type[nn.Module]] = {name: _STAND_INS[name, bool(keep_type)] for name in _chosen(modules)}
        self._mine: list[dict[str, type[nn.Module]]] = []

    def __enter__(self) -> None:
        entry = dict(self._classes)
        with self._lock:
            self._entries.append(entry)
            self._mine.append(entry)
            self._install()

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            entry = self._mine.pop()
            del self._entries[next(i for i, other in enumerate(self._entries) if other is entry)]
            self._install()

    @classmethod
    def _install(cls) -> None:
        """Put the latest entry's classes, else torch's, in every place that has one of ours or torch's."""
        for name, conversion in CONVERSIONS.items():
            wanted = next((entry[name] for entry in reversed(cls._entries) if name in entry), conversion.torch_class)
            known = (conversion.torch_class, _STAND_INS[name, False], _STAND_INS[name, True])
            for place in (nn, nn.modules, nn.modules.transformer, sys.modules[conversion.torch_class.__module__]):
                if getattr(place, name, None) in known:
                    setattr(place, name, wanted)


class _StandIn(ABCMeta):
    """What stands in a class's place within `patched`: called, it builds ours; as a base class it is torch's."""

    torch_class: type[nn.Module]
    own_class: type[nn.Module]

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> Any:
        bases = tuple(base.torch_class if isinstance(base, _StandIn) else base for base in bases)
        kind: type = functools.reduce(lambda a, b: b if issubclass(b, a) else a, map(type, bases), type)
        return kind(name, bases, namespace, **options)

    @classmethod
    def of(mcs, torch_class: type[nn.Module], own_class: type[nn.Module]) -> _StandIn:
        names = {"__module__": torch_class.__module__, "__qualname__": torch_class.__qualname__, "__doc__": torch_class.__doc__}
        stand_in = super().__new__(mcs, torch_class.__name__, (torch_class,), names)
        stand_in.torch_class, stand_in.own_class = torch_class, own_class
        return stand_in

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.own_class(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, (cls.torch_class, cls.own_class))

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, (cls.torch_class, cls.own_class))


_STAND_INS: dict[tuple[str, bool], Any] = {
    (name, keep): _StandIn.of(conversion.torch_class, conversion.own_class(keep))
    for name, conversion in CONVERSIONS.items()
    for keep in (False, True)
}


@dataclass
class _Found:
    """A module, with every name and every module that holds it."""

    module: nn.Module
    names: list[str] = field(default_factory=list)
    holders: list[nn.Module] = field(default_factory=list)
    ancestors: list[nn.Module] = field(default_factory=list)


def _walk(model: nn.Module) -> list[_Found]:
    """Every module once, in the order of named_modules(), which knows only the first name of each."""
    found: dict[int, _Found] = {}

    def visit(module: nn.Module, name: str, above: tuple[nn.Module, ...]) -> None:
        here = found.setdefault(id(module), _Found(module))
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


def _chosen(modules: ModuleKinds | None) -> set[str]:
    """Names in `CONVERSIONS` for what the caller gave."""
    if modules is None:
        return set(CONVERSIONS)
    accepted = f"accepted: {', '.join(f'nn.{name} or {name!r}' for name in CONVERSIONS)}, or several of these"
    if isinstance(modules, type | str):
        modules = (modules,)
    if not isinstance(modules, Iterable) or isinstance(modules, nn.Module):
        raise TypeError(f"modules must be classes or their names, got {type(modules).__name__}; {accepted}")
    chosen = set()
    for kind in modules:
        if isinstance(kind, str):
            name = kind.removeprefix("torch.").removeprefix("nn.")
            known = name in CONVERSIONS
        elif isinstance(kind, type):
            name = kind.__name__
            known = name in CONVERSIONS and any(
                kind is one
                for one in (
                    CONVERSIONS[name].torch_class,
                    *CONVERSIONS[name].own_classes(),
                    _STAND_INS[name, False],
                    _STAND_INS[name, True],
                )
            )
        else:
            raise TypeError(f"modules must be classes or their names, got {kind!r} among them; {accepted}")
        if not known:
            raise ValueError(f"modules: {kind!r} is nothing that can be converted; {accepted}")
        chosen.add(name)
    if not chosen:
        raise ValueError(f"modules is empty, so there is nothing to convert; {accepted}")
    return chosen


_QUANTIZED = ("torch.ao.nn.", "torch.nn.quantized.", "torch.nn.quantizable.")


def _recognize(found: _Found) -> Conversion | None:
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


def _why_not_asked(found: _Found, conversion: Conversion, chosen: set[str], filter_fn: FilterFn | None) -> str:
    if conversion.name not in chosen:
        return "not among the modules asked for"
    if filter_fn is not None:
        refused = [name for name in found.names if not filter_fn(found.module, name)]
        if refused:
            return f"filter_fn refused {_named(refused)}"
    return ""


def _why_not_possible(found: _Found, conversion: Conversion, verb: str) -> str:
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
        against = "" if verb == "revert" else _why_not_subclass(kind, base)
        if against or base is not conversion.torch_class:
            return f"subclass of {_class_name(base)}{against}"
    if "forward" in vars(module):
        return f"its forward is replaced on the instance: {verb} before that"
    for name, parameter in module.named_parameters(recurse=False):
        if nn.parameter.is_lazy(parameter):
            return f"{name} is not initialized yet: run the model once before"
        if is_traceable_wrapper_subclass(parameter):
            wrapper = type(parameter.data).__name__
            return f"{name} is a {wrapper}: {verb} before parameters are distributed or quantized"
    return ""


def _why_not_subclass(kind: type, base: type) -> str:
    """What in a subclass of torch's class keeps it from a common subclass with ours; empty: nothing."""
    if type(kind) not in (type, ABCMeta):
        return f" with a metaclass of its own ({type(kind).__name__})"
    for own in kind.__mro__[: kind.__mro__.index(base)]:
        for name in ("forward", "merge_masks", "permute_hidden", "__call__", "__init_subclass__", "__reduce__", "__reduce_ex__"):
            if name in vars(own) and not (name == "forward" and _calls_super(vars(own)[name])):
                return f" with its own {name}"
    return ""


def _calls_super(forward: Any) -> bool:
    """Whether a forward does its work by that of the class above, and sets no weights in a way that only torch's reads."""
    if not isinstance(forward, FunctionType):
        return False
    code = forward.__code__
    above = "forward" in code.co_names and ("__class__" in code.co_freevars or "super" in code.co_names)
    return above and "_flat_weights" not in code.co_names


class _Asking:
    """Which code of a model asks whether something is torch's LSTM, GRU, ..: given another class, it would go another way."""

    _OTHERS = ("torch", "fastseq")  # packages whose functions are not looked into
    _BUILDING = ("__init__", "_init_weights", "init_weights", "reset_parameters")  # which run before

    def __init__(self) -> None:
        self._of_class: dict[type, dict[str, str]] = {}

    def who(self, found: _Found, name: str) -> str:
        """The qualified name of a method of the modules above one, or of a function that it calls, that asks for ``nn.name``."""
        if issubclass(getattr(own_modules, name), CONVERSIONS[name].torch_class):  # ours is torch's in any case
            return ""
        for module in found.ancestors:
            for kind in type(module).__mro__:
                if kind not in self._of_class:
                    self._of_class[kind] = self._asked_by(kind)
                if name in self._of_class[kind]:
                    return self._of_class[kind][name]
        return ""

    def _asked_by(self, kind: type) -> dict[str, str]:
        """The askers, by what they ask for."""
        methods = [value for name, value in vars(kind).items() if name not in self._BUILDING]
        methods = [value.fget if isinstance(value, property) else getattr(value, "__func__", value) for value in methods]
        waiting = [value for value in methods if self._is_looked_into(value)]
        known, asked, of_methods = set(waiting), dict[str, str](), len(waiting)
        for place, function in enumerate(waiting):
            for code in _codes_in(function.__code__):
                names = frozenset(code.co_names)
                called = [value for value in map(function.__globals__.get, names) if self._is_looked_into(value)]
                for value in called:  # and what is called by those within their file
                    if value not in known and (place < of_methods or value.__module__ == function.__module__):
                        known.add(value)
                        waiting.append(value)
                if names.isdisjoint(("isinstance", "issubclass")) and not _matches_classes(code):
                    continue
                wanted = set(names & CONVERSIONS.keys())
                for name in names:  # a tuple of classes, say, of the file or of the class
                    wanted |= _torch_names(function.__globals__.get(name, getattr(kind, name, None)))
                for name in wanted:
                    asked.setdefault(name, f"{function.__module__}.{function.__qualname__}")
        return asked

    def _is_looked_into(self, value: Any) -> bool:
        return isinstance(value, FunctionType) and (value.__module__ or "").partition(".")[0] not in self._OTHERS


def _codes_in(code: CodeType) -> Iterator[CodeType]:
    """That of a function, and of each that is defined within it."""
    yield code
    for value in code.co_consts:
        if isinstance(value, CodeType):
            yield from _codes_in(value)


def _matches_classes(code: CodeType) -> bool:
    """Whether there is a ``case nn.LSTM():`` in it."""
    return dis.opmap["MATCH_CLASS"] in code.co_code[::2]


def _torch_names(value: Any) -> set[str]:
    """Those of torch's classes that a value is or holds."""
    if isinstance(value, UnionType):
        value = value.__args__
    held = value if isinstance(value, (tuple, list, set, frozenset, dict)) else (value,)
    return {name for name, conversion in CONVERSIONS.items() if any(one is conversion.torch_class for one in held)}


def _own_class(kind: type, conversion: Conversion, keep: bool) -> type:
    """The class that makes a module of class `kind` ours; ``keep``: it is torch's as well."""
    if kind is conversion.torch_class:
        return conversion.own_class(keep)
    return _common_class(kind, conversion.name)


def _common_class(kind: type, name: str) -> type:
    """The subclass of a user's class `kind` and of ours: what `kind` says comes first, then ours, then torch's."""
    known: type
    for known in kind.__subclasses__():
        if vars(known).get("stands_for") is kind:
            return known
    namespace = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__reduce_ex__": _reduce_common,
        "stands_for": kind,
    }
    return type(kind)(kind.__name__, (kind, CONVERSIONS[name].own_class(keep_type=True)), namespace)


def _reduce_common(module: Any, protocol: Any) -> Any:
    """For pickle and copy, which would look for the class by its name, and find the user's."""
    kind = type(module)
    name = next(name for name, conversion in CONVERSIONS.items() if issubclass(kind, conversion.torch_class))
    return _common_instance, (vars(kind)["stands_for"], name), *object.__reduce_ex__(module, max(protocol, 2))[2:]


def _common_instance(kind: type, name: str) -> Any:
    common: Any = _common_class(kind, name)
    return common.__new__(common)


def _why_not_faster(found: _Found, conversion: Conversion) -> str:
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


def _swap_back(found: _Found, conversion: Conversion) -> None:
    found.module.__class__ = vars(type(found.module)).get("stands_for", conversion.torch_class)
    set_packing(found.module, None)
    conversion.undo(found.module)


def _complain(report: Report, on_unsupported: str) -> None:
    rows = [row for row in report.skipped if row.unsupported]
    if not rows or on_unsupported == "skip":
        return
    reasons = "; ".join(f"{_named(row.names)} ({row.old}): {row.reason}" for row in rows)
    if on_unsupported == "raise":
        raise NotImplementedError(f"{report.title}: nothing was changed, because of {reasons}")
    warnings.warn(f"{report.title} leaves alone {reasons}", stacklevel=3)


def _row(found: _Found, old: str | None = None, **values: Any) -> Row:
    """`old` is given for a module whose class has changed."""
    current = _class_name(type(found.module))
    if old is None:
        return Row(tuple(found.names), current, **values)
    return Row(tuple(found.names), old, current, **values)


def _named(names: Iterable[str]) -> str:
    return ", ".join(name or "(model)" for name in names)


def _class_name(kind: type) -> str:
    if "stands_for" in vars(kind):
        return f"{kind.__module__}.{kind.__qualname__} on fastseq's kernels"
    for name, conversion in CONVERSIONS.items():
        for prefix, own in zip(("torch.nn", "fastseq", "fastseq.modules.keep_type"),
                               (conversion.torch_class, *conversion.own_classes()), strict=True):  # fmt: skip
            if kind is own:
                return f"{prefix}.{name}"
    return f"{kind.__module__}.{kind.__qualname__}"
