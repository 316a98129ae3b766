"""`convert` and its inverse `revert`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .. import modules as own_modules
from .._arguments import checked_module
from ..functional._packing import set_packing
from ..parity import Probe, as_arguments
from .asking import Asking
from .elsewhere import what_instead
from .found import FilterFn, Found, recognize, walk, why_not_asked, why_not_faster, why_not_possible
from .patching import ModuleKinds, names_of
from .report import Report, Row, named
from .subclasses import own_class
from .table import Conversion, Options, class_name

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
    pruning are fine. Convert before `fully_shard` and parametrizations. Attention of other classes stays as it is; the
    report says what to do where it is transformers', or goes through torch's functions.

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
    chosen = names_of(modules)
    checked_module(model)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be a function (module, name) -> bool, got {type(filter_fn).__name__}")
    if on_unsupported not in _ON_UNSUPPORTED:
        raise ValueError(f"on_unsupported must be one of {', '.join(_ON_UNSUPPORTED)}, got {on_unsupported!r}")
    if example_inputs is not None:
        as_arguments(example_inputs)
    options = Options(keep_type=None if keep_type is None else bool(keep_type), recompute=bool(recompute))

    report = Report("fastseq.convert")
    plan: list[tuple[Found, Conversion]] = []
    ready, classes = False, dict[type, str]()
    for found in walk(model):
        conversion = recognize(found)
        if conversion is None:
            reason = what_instead(found, chosen, classes)
            if reason:
                report.skipped.append(_row(found, reason=reason))
            continue
        reason, unsupported = why_not_asked(found, conversion, chosen, filter_fn), False
        if not reason and isinstance(found.module, conversion.own_classes()):
            reason, ready = "already fastseq's", True
        if not reason:
            reason = why_not_possible(found, conversion, "convert")
            if not reason and not even_if_slower:
                reason = why_not_faster(found, conversion)
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
    before = [class_name(type(found.module)) for found, _ in plan]
    swapped: list[tuple[Found, Conversion]] = []
    asking, askers = Asking(), []
    try:
        for found, conversion in plan:
            askers.append(asking.who(found, conversion.name) if options.keep_type is None else "")
            found.module.__class__ = own_class(type(found.module), conversion, bool(askers[-1] or options.keep_type))
            swapped.append((found, conversion))
            conversion.apply(found.module, options)
        complaint = probe.compare() if probe is not None else None
        if complaint is not None:
            names = ", ".join(named(found.names) for found, _ in plan)
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
        for found in list(walk(model)):
            conversion = recognize(found)
            if conversion is None or isinstance(found.module, conversion.own_classes()):
                continue
            if not why_not_possible(found, conversion, "convert"):
                found.module.__class__ = own_class(type(found.module), conversion, keep=False)
                swapped.append((found, conversion))
        yield
    finally:
        for found, conversion in reversed(swapped):
            _swap_back(found, conversion)


def _note(found: Found, conversion: Conversion, asker: str) -> str:
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
    for found in walk(model):
        conversion = recognize(found)
        if conversion is None or not isinstance(found.module, conversion.own_classes()):
            continue
        reason = why_not_possible(found, conversion, "revert")
        if reason:
            report.skipped.append(_row(found, reason=reason, unsupported=True))
        else:
            old = class_name(type(found.module))
            _swap_back(found, conversion)
            report.converted.append(_row(found, old=old))
    _complain(report, "warn")
    return report


def _swap_back(found: Found, conversion: Conversion) -> None:
    found.module.__class__ = vars(type(found.module)).get("stands_for", conversion.torch_class)
    set_packing(found.module, None)
    conversion.undo(found.module)


def _complain(report: Report, on_unsupported: str) -> None:
    rows = [row for row in report.skipped if row.unsupported]
    if not rows or on_unsupported == "skip":
        return
    reasons = "; ".join(f"{named(row.names)} ({row.old}): {row.reason}" for row in rows)
    if on_unsupported == "raise":
        raise NotImplementedError(f"{report.title}: nothing was changed, because of {reasons}")
    warnings.warn(f"{report.title} leaves alone {reasons}", stacklevel=3)


def _row(found: Found, old: str | None = None, **values: Any) -> Row:
    """`old` is given for a module whose class has changed."""
    current = class_name(type(found.module))
    if old is None:
        return Row(tuple(found.names), current, **values)
    return Row(tuple(found.names), old, current, **values)
