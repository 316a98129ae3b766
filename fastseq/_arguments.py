"""Wrong arguments, alike for every public function: keywords that it does not have, choices that there are not, no numbers."""

from __future__ import annotations

import difflib
import functools
import inspect
import numbers
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Function = TypeVar("Function", bound=Callable[..., Any])

# What torch, flash-attn, xFormers, FLA, TransformerEngine, transformers and the RNN packages call it: the names here, of which
# the first that the function has is meant.
_FOREIGN: dict[str, tuple[str, ...]] = {
    "align": ("alignment",),
    "attention_mask": ("attn_mask", "attn_bias"),
    "attn_bias": ("attn_mask",),
    "bias": ("attn_bias", "has_biases"),
    "cache_lengths": ("cache_seqlens",),
    "cell_type": ("cell",),
    "cu_seq_k": ("cu_seqlens_k",),
    "cu_seq_q": ("cu_seqlens_q",),
    "cu_seqlens": ("cu_seqlens_q",),
    "cu_seqlens_kv": ("cu_seqlens_k",),
    "dropconnect": ("weight_dropout",),
    "dropout": ("dropout_p",),
    "dropout_rate": ("dropout_p", "dropout"),
    "heads": ("num_heads",),
    "is_causal": ("causal",),
    "k_lengths": ("seqlens_k",),
    "key_lengths": ("seqlens_k",),
    "kv_lengths": ("seqlens_k",),
    "lengths": ("cache_seqlens", "seqlens_k"),
    "logits_soft_cap": ("softcap",),
    "mask": ("attn_mask",),
    "max_k": ("max_seqlen_k",),
    "max_q": ("max_seqlen_q",),
    "max_seqlen_kv": ("max_seqlen_k",),
    "n_heads": ("num_heads",),
    "need_weights": ("return_weights",),
    "nhead": ("num_heads",),
    "p": ("dropout_p",),
    "q_lengths": ("seqlens_q",),
    "qkv_format": ("layout",),
    "query_lengths": ("seqlens_q",),
    "return_attn_probs": ("return_lse",),
    "return_aux": ("return_lse",),
    "return_softmax_lse": ("return_lse",),
    "s_aux": ("sinks",),
    "scale": ("softmax_scale",),
    "scaling": ("scale", "softmax_scale"),
    "seqused_k": ("seqlens_k",),
    "seqused_q": ("seqlens_q",),
    "sliding_window": ("window_size",),
    "sm_scale": ("scale",),
    "softmax_scale": ("scale",),
    "splits": ("num_splits",),
    "window": ("window_size",),
}
_NEAR = 0.7  # gpu is not meant for cpu
_NEEDLESS = {
    "deterministic": "the gradients always are",
    "enable_gqa": "k and v may always have fewer heads than q",
}


def own_keywords(function: Function, refused: Mapping[str, str] = MappingProxyType({})) -> Function:
    """``function``; a keyword argument that it does not have raises a TypeError that names the one that is meant.

    Args:
        refused: arguments that it does not have, for which torch raises a ValueError of this text.
    """
    accepted = tuple(
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    )
    names = frozenset(accepted)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if not names.issuperset(kwargs):
            name = next(name for name in kwargs if name not in names)
            if name in refused:
                raise ValueError(refused[name])
            raise TypeError(unexpected(function.__qualname__, name, accepted))
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


def without_unknown(function: Function) -> Function:
    """``function``, whose signature does not show the ``**unknown`` that it refuses itself, by `check_keywords`: of a call that
    takes microseconds, the wrapper of `own_keywords` would be a large part."""
    own = inspect.signature(function)
    shown = [parameter for parameter in own.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    function.__signature__ = own.replace(parameters=shown)  # type: ignore[attr-defined]
    return function


def check_keywords(function: Any, given: Mapping[str, Any]) -> None:
    """
    Raises:
        TypeError: if the function's signature has no keyword argument of a name; it names the one that is meant.
    """
    accepted = inspect.signature(function).parameters
    for name in given:
        if name not in accepted:
            raise TypeError(unexpected(function.__qualname__, name, tuple(accepted)))


def unexpected(function: str, name: str, accepted: tuple[str, ...]) -> str:
    """What to say of a keyword argument that is not accepted."""
    text = f"{function}() got an unexpected keyword argument {name!r}"
    meant = [own for own in _FOREIGN.get(name, ()) if own in accepted]
    if meant:
        return f"{text}; it is called {meant[0]} here"
    if name in _NEEDLESS and "layout" in accepted:
        return f"{text}; leave it out, {_NEEDLESS[name]}"
    near = difflib.get_close_matches(name, accepted, 1, _NEAR)
    if near:
        return f"{text}; did you mean {near[0]!r}?"
    return f"{text}; accepted: {', '.join(own for own in accepted if own != 'self')}"


def unknown(what: str, given: object, accepted: Any) -> str:
    """What to say of a value that is not one of ``accepted``."""
    names = [str(name) for name in accepted]
    near = difflib.get_close_matches(given, names, 1, _NEAR) if isinstance(given, str) else []
    return f"unknown {what} {given!r}; accepted: {', '.join(names)}" + (f" (did you mean {near[0]!r}?)" if near else "")


def is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float, torch.SymInt, torch.SymFloat, numbers.Real))


def is_int(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, torch.SymInt, numbers.Integral))


def checked_number(name: str, value: Any) -> Any:
    """The value, which is a real number.

    Raises:
        TypeError: if it is none.
    """
    if not is_number(value):
        raise TypeError(f"{name} must be a number, {_given(value)}")
    return value


def checked_int(name: str, value: Any) -> Any:
    """The value, which is an int.

    Raises:
        TypeError: if it is none.
    """
    if not is_int(value):
        raise TypeError(f"{name} must be an int, {_given(value)}")
    return value


def checked_tensor(name: str, value: Any) -> Tensor:
    """The value, which is a tensor.

    Raises:
        TypeError: if it is none.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, not {type(value).__name__}")
    return value


def checked_module(model: Any) -> nn.Module:
    """The model, which is an nn.Module.

    Raises:
        TypeError: if it is none.
    """
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got the class {model.__name__} itself, not one that it made")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    return model


def _given(value: Any) -> str:
    return f"got {value!r}" if isinstance(value, (str, bool, float)) else f"not {type(value).__name__}"
