"""Masks of Hugging Face transformers without their [B, 1, Tq, Tk] elements, where a band and padding say the same."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel, masking_utils

from ..ops._dispatch import plain_call


class Band(NamedTuple):
    """The keys before and after its place that a query sees; -1: all."""

    left: int
    right: int


SHORT = 256 * 256  # pairs of queries and keys up to which a CPU takes the mask's elements, as they are

TENSORS = ("keys", "lengths", "cu_seqlens", "elements")


class BandMask(Tensor):
    """A bool mask [B, 1, Tq, Tk], True: attend, that is computed only if something other than fastseq's attention reads it.

    Query i stands at key ``i + offset`` and sees the keys of ``band`` around it, of those the ones of its sequence: ``keys``
    (bool [B, 1, 1, Tk]) or the first ``lengths`` (int32 [B]); or the ones of its text, if sequences hold several: ``cu_seqlens``
    (int32, where each begins in the rows of all sequences) and ``longest``. Once its elements have been asked for they may
    have been changed, and from then on they are the mask: ``elements``, None until then.
    """

    band: Band
    offset: int
    keys: Tensor | None
    lengths: Tensor | None
    cu_seqlens: Tensor | None
    longest: int
    elements: Tensor | None
    origin: Tensor  # no elements: there is a tensor within, for torch.compile, whatever the mask

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], origin: Tensor, band: Band, offset: int = 0, longest: int = 0, **tensors: Tensor | None
    ) -> BandMask:
        mask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=origin.device)
        mask.origin, mask.band, mask.offset, mask.longest = origin, band, offset, longest
        for name in TENSORS:
            setattr(mask, name, tensors.get(name))
        return mask

    def __tensor_flatten__(self):
        """For torch.compile, where a mask comes into a compiled region from outside: the names of the tensors, and all else."""
        names = ["origin", *(name for name in TENSORS if getattr(self, name) is not None)]
        return names, (tuple(self.shape), self.band, self.offset, self.longest)

    @staticmethod
    def __tensor_unflatten__(tensors, facts, size, stride):
        shape, band, offset, longest = facts
        return BandMask(shape, band=band, offset=offset, longest=longest, **tensors)

    @property
    def plainly_causal(self) -> bool:
        """Whether each query sees all keys up to its own, and nothing else is hidden."""
        alone = self.keys is None and self.lengths is None and self.cu_seqlens is None
        return alone and self.band == (-1, 0) and self.offset == 0

    def materialized(self) -> Tensor:
        """The elements, [B, 1, Tq, Tk]."""
        if self.elements is None:
            batch, _, tq, tk = self.shape
            j = torch.arange(tk, device=self.device)
            distance = j - (torch.arange(tq, device=self.device)[:, None] + self.offset)
            seen = torch.ones(batch, 1, tq, tk, dtype=torch.bool, device=self.device)
            if self.band.left >= 0:
                seen &= distance >= -self.band.left
            if self.band.right >= 0:
                seen &= distance <= self.band.right
            if self.keys is not None:
                seen &= self.keys
            if self.lengths is not None:
                seen &= j < self.lengths[:, None, None, None]
            if self.cu_seqlens is not None:
                rows = torch.arange(batch * tq, device=self.device)
                text = torch.bucketize(rows, self.cu_seqlens, right=True).view(batch, 1, tq)
                seen &= text[..., :, None] == text[..., None, :]
            self.elements = seen
        return self.elements

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        args, kwargs = tree_map_only(cls, cls.materialized, (args, kwargs or {}))
        return func(*args, **kwargs)


def _cells(function: Callable[..., Any]) -> dict[str, Any]:
    """The variables of a closure, by name."""
    cells = getattr(function, "__closure__", None) or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))


_AND = masking_utils.and_masks().__code__
_SLIDING = masking_utils.sliding_window_overlay(1).__code__
_SLIDING_BOTH_WAYS = masking_utils.sliding_window_bidirectional_overlay(1).__code__
_SAME_TEXT = masking_utils.packed_sequence_mask_function(torch.empty(0)).__code__
_WITHIN_TEXT = masking_utils.remap_positions_for_packed_sequence(masking_utils.causal_mask_function, torch.empty(0)).__code__


def _narrower(a: int, b: int) -> int:
    return max(a, b) if min(a, b) < 0 else min(a, b)


def band(mask_function: Callable[..., Any]) -> Band | None:
    """The band that one of transformers' mask functions describes; None: it describes something else."""
    if mask_function is masking_utils.causal_mask_function:
        return Band(-1, 0)
    if mask_function is masking_utils.bidirectional_mask_function:
        return Band(-1, -1)
    code = getattr(mask_function, "__code__", None)
    if code is _SLIDING:
        return Band(_cells(mask_function)["sliding_window"] - 1, -1)
    if code is _SLIDING_BOTH_WAYS:
        return Band(*2 * (_cells(mask_function)["sliding_window"],))
    if code is not _AND:
        return None
    whole = Band(-1, -1)
    for function in _cells(mask_function)["mask_functions"]:
        part = band(function)
        if part is None:
            return None
        whole = Band(*map(_narrower, whole, part))
    return whole


def _texts(mask_function: Callable[..., Any]) -> tuple[Tensor, Callable[..., Any]] | None:
    """For a mask within texts: the text of each row, [B, T], and the mask function within them, which counts from their begin."""
    if getattr(mask_function, "__code__", None) is not _AND:
        return None
    functions = _cells(mask_function)["mask_functions"]
    if [function.__code__ for function in functions] != [_SAME_TEXT, _WITHIN_TEXT]:
        return None
    return _cells(functions[0])["packed_sequence_mask"], _cells(functions[1])["mask_function"]


def _begins(text: Tensor) -> Tensor:
    """int32: where each text begins in the rows of all sequences, and their number; from the text of each row, [B, T]."""
    first = torch.ones_like(text[:, :1], dtype=torch.bool)
    begins = torch.cat((first, text[:, 1:] != text[:, :-1]), 1).flatten().nonzero()[:, 0]
    return torch.cat((begins, begins.new_tensor([text.numel()]))).to(torch.int32)


def _padding(seen: Tensor | None, kv_length: int, kv_offset: int) -> tuple[Tensor | None, Tensor | None]:
    """``keys`` and ``lengths`` of a ``BandMask`` from a bool [B, ..]: at most one of them, none if nothing is padding."""
    seen = masking_utils.prepare_padding_mask(seen, kv_length, kv_offset)
    if seen is None:
        return None, None
    seen = seen[:, kv_offset : kv_offset + kv_length]
    lengths = seen.sum(-1, dtype=torch.int32)
    first = torch.arange(kv_length, device=seen.device) < lengths[:, None]
    none_padded, right_padded = torch.stack((seen.all(), (seen == first).all())).tolist()  # one wait for the device
    if none_padded:
        return None, None
    return (None, lengths) if right_padded else (seen[:, None, None], None)


_KINDS = ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend")
ASKS = "asks whether it runs sdpa"  # of models whose code does something else where it does not


def kinds_of(config: type) -> tuple[str, ...] | None:
    """Which of ``_KINDS`` the models say of themselves that have configurations of a class, and `ASKS`; None: there are none."""
    place = sys.modules.get(config.__module__.replace("configuration_", "modeling_"))
    own = [
        kind for kind in vars(place).values() if isinstance(kind, type) and kind.__module__ == place.__name__
    ] if place else []  # fmt: skip
    models = [kind for kind in own if issubclass(kind, PreTrainedModel)]
    if not models:
        return None
    known = tuple(name for name in _KINDS if any(getattr(kind, name, False) for kind in models))
    return (*known, ASKS) if any(_asks(function) for kind in own for function in vars(kind).values()) else known


def _asks(function: Any) -> bool:
    """Whether a function compares the name of the implementation with "sdpa"."""
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    if code is None or "_attn_implementation" not in code.co_names:
        return False
    return any(constant == "sdpa" or (type(constant) is tuple and "sdpa" in constant) for constant in code.co_consts)


# Dynamo calls it as it comes there: what torch.compiler.assume_constant_result says, which would import all of Dynamo
kinds_of._dynamo_marked_constant = True  # type: ignore[attr-defined]
_known_kinds: dict[type, tuple[str, ...] | None] = {}


_causal, _bidirectional = masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function


def _plain_mask(
    batch: int, queries: int, keys: int, q_offset: int | Tensor, kv_offset: int, causal: bool, padding: Tensor | None
) -> Any:
    """The mask of what is causal, or sees all, and padded at most, from as few operations as it takes: between a model's layers
    each costs more than the attention of a token. NotImplemented: another kind of call."""
    if kv_offset != 0 or not plain_call():
        return NotImplemented
    last = queries == 1 and type(q_offset) is int and q_offset >= keys - 1  # one query, which stands at the last key
    if causal and not last and not (queries == keys and type(q_offset) is int and q_offset == 0):
        return NotImplemented
    if padding is None:
        return None
    if type(padding) is not Tensor or not padding.is_cpu or padding.dtype != torch.bool or queries * keys > SHORT:
        return NotImplemented
    if padding.shape != (batch, keys):
        return NotImplemented
    if padding.all():
        return None
    of_keys = padding.clone()[:, None, None]  # which a model may change
    if causal and not last:
        return torch.ones(queries, keys, dtype=torch.bool).tril_() & of_keys
    return of_keys.expand(batch, 1, queries, keys)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask that ``attention`` of the same name is to be given: None, a ``BandMask``, or the elements, as "sdpa" has them.

    None stands for what "sdpa" takes it for: all keys, or plain causality where the module is causal. Elements are made for any
    other pattern (chunks, blocks of images, a user's function), where the caller asks for them, for short sequences on a CPU, and
    in compiled code.

    A model that does not know "sdpa" need not have its modules say whether they are causal (Pegasus-X), so that its causal masks
    are never None. Nor are they where a model cuts queries off if it does not run "sdpa" (Gemma 4), whose places only a mask
    tells. One that knows "eager" alone may have layers that add the mask to scores of their own (Informer): it gets the
    elements of "eager".
    """
    config = type(kwargs.get("config"))
    if config not in _known_kinds:
        _known_kinds[config] = kinds_of(config)
    kinds = _known_kinds[config]
    if kinds == ():
        return masking_utils.eager_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,
            attention_mask,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            device=device,
            **kwargs,
        )
    skips = allow_is_causal_skip and (kinds is None or ("_supports_sdpa" in kinds and ASKS not in kinds))
    if (skips and mask_function is _causal) or (allow_is_bidirectional_skip and mask_function is _bidirectional):
        seen = _plain_mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function is _causal, attention_mask)
        if seen is not NotImplemented:
            return seen
    short = q_length * kv_length <= SHORT and torch.device(device).type == "cpu"
    whole = short or masking_utils.is_tracing(attention_mask)
    texts = _texts(mask_function) if not whole and attention_mask is None else None
    shape = (batch_size, 1, q_length, kv_length)
    if texts is not None and texts[0].shape == (batch_size, q_length) == (batch_size, kv_length):
        within = band(texts[1])
        if within is not None:
            cu_seqlens = _begins(texts[0])
            origin = torch.empty(0, dtype=torch.bool, device=device)
            return BandMask(shape, origin, within, longest=int(cu_seqlens.diff().max()), cu_seqlens=cu_seqlens)
    found = band(mask_function) if not whole and (allow_is_causal_skip or allow_is_bidirectional_skip) else None
    if found is None:
        return masking_utils.sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,
            attention_mask,
            allow_is_causal_skip=skips,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            device=device,
            **kwargs,
        )
    offset = int(q_offset) - kv_offset
    keys, lengths = _padding(attention_mask, kv_length, kv_offset)
    left = found.left if offset + q_length - 1 > found.left else -1
    right = found.right if kv_length - 1 - offset > found.right else -1
    if keys is None and lengths is None:
        causal = left < 0 and found.right == 0 and offset == 0
        if (causal and skips) if q_length > 1 and allow_is_causal_skip else left < 0 and right < 0:
            return None
    origin = torch.empty(0, dtype=torch.bool, device=device)
    return BandMask(shape, origin, Band(left, right), offset, keys=keys, lengths=lengths)
