"""What a model does in code of its own, where there is no class to convert, and what makes that fastseq's."""

from __future__ import annotations

import dis
import sys
from types import FunctionType, ModuleType
from typing import Any

import torch.nn.functional as F

from .found import Found

# Functions of torch that a model's own attention goes through, and what takes their place.
_INSTEAD = {
    "scaled_dot_product_attention": "fastseq.functional.scaled_dot_product_attention",
    "multi_head_attention_forward": "fastseq.MultiheadAttention",
}
_MODELS = "transformers.modeling_utils"
_TOLD = "ALL_ATTENTION_FUNCTIONS"  # where layers of transformers look for the function that they are told to call


def what_instead(found: Found, chosen: set[str], known: dict[type, str]) -> str:
    """Of a module of no class to convert: which of the ``chosen`` kinds of work it does itself, and what to do about it; empty:
    none.

    ``known``: what was said of classes before.
    """
    if "LSTM" in chosen and _is(found.module, "sb3_contrib.common.recurrent.policies", "RecurrentActorCriticPolicy"):
        return _of_sb3(found.module)
    if "MultiheadAttention" not in chosen:
        return ""
    if _is(found.module, _MODELS, "PreTrainedModel"):
        inner = any(_is(module, _MODELS, "PreTrainedModel") for module in found.ancestors)
        return "" if inner else _of_transformers(found.module)
    kind = type(found.module)
    if kind not in known:
        known[kind] = _of_class(kind)
    return known[kind]


def _is(module: Any, place: str, name: str) -> bool:
    """Whether a module is of a class of a package that need not be there."""
    return place in sys.modules and isinstance(module, getattr(sys.modules[place], name, ()))


def _of_class(kind: type) -> str:
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in ("torch", "fastseq"):
            continue
        for name, method in vars(base).items():
            if isinstance(method, FunctionType):
                for function, instead in _INSTEAD.items():
                    if _names(method, getattr(F, function)):
                        return f"its {name} calls torch's {function} itself: {instead} takes its place"
    return ""


def _names(method: FunctionType, function: Any) -> bool:
    """Whether a function stands in the code of a method, as a global or as that of a module: other things may have its name."""
    names, known = method.__code__.co_names, method.__globals__
    if function.__name__ not in names and not any(known.get(name) is function for name in names):
        return False
    value = None
    for step in dis.get_instructions(method):
        if step.opname == "LOAD_GLOBAL":
            value = known.get(step.argval)
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            value = getattr(value, step.argval, None) if isinstance(value, ModuleType) else None
        if value is function:
            return True
    return False


def _of_sb3(policy: Any) -> str:
    if "_process_sequence" in vars(policy) or not type(policy)._process_sequence.__module__.startswith("sb3_contrib."):
        return ""
    return "it calls its LSTM step by step: fastseq.integrations.sb3.patch makes that one call for a sequence"


def _of_transformers(model: Any) -> str:
    told = getattr(model.config, "_attn_implementation", None)
    function: Any = sys.modules[_MODELS].AttentionInterface().get(told)
    if told is None or getattr(function, "__module__", "").startswith("fastseq."):
        return ""
    if not any(_TOLD in vars(sys.modules.get(type(module).__module__, object)) for module in model.modules()):
        return ""
    return (
        f"its layers call the attention that they are told to, now {told!r}: fastseq.integrations.transformers.register(), "
        'then set_attn_implementation("fastseq")'
    )
