"""fastseq's attention as an implementation of Hugging Face transformers.

>>> from fastseq.integrations.transformers import register
>>> register()
>>> model = AutoModel.from_pretrained(name, attn_implementation="fastseq")  # or model.set_attn_implementation("fastseq")
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional import attention as fused_attention
from ..functional._attention_call import default_scale
from ..functional._autocast import autocast_dtype
from ..functional._torch_attention import attention_output
from ..ops import _attention_eager as eager
from ..ops._dispatch import plain_call
from ..ops.attention import Spec

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.utils import output_capturing

    from . import transformers_masks as masks
except (ImportError, AttributeError) as error:
    try:
        from transformers import __version__ as found
    except ImportError:
        found = "none"
    raise ImportError(
        "fastseq.integrations.transformers needs transformers 5.23 or newer (pip install 'transformers>=5.23'), "
        f"found {found}: {error}"
    ) from error

__all__ = ["attention", "register"]

_SHORT = eager.SCALED | eager.LAID_OUT
_SHORT_CAUSAL = _SHORT | eager.CAUSAL


def register(name: str = "fastseq") -> None:
    """Make ``attn_implementation=name`` available to every transformers model that takes its attention from the interface.

    Registers the attention and the function that makes its masks (without the latter transformers would leave the mask out, in
    silence). Models need nothing else; those that do not support exchanged attention say so themselves.

    Args:
        name: what models are told, ``attn_implementation=name``.

    Raises:
        TypeError: if ``name`` is not a str.
        ValueError: for the names of transformers' own implementations.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, not {type(name).__name__}")
    own = AttentionInterface().get(name)
    if name == "eager" or not name or own not in (None, attention):
        raise ValueError(f"name must not be that of another implementation, got {name!r}")
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, masks.mask)


def _weights_wanted(asked: bool | None) -> bool:
    """Whether the forward pass that is running collects attention weights; most models tell only their hooks."""
    if asked:
        return True
    collector = output_capturing._active_collector
    collected = collector.global_var if torch.compiler.is_compiling() else collector.get()
    return bool(collected) and any(key.endswith("attentions") for key in collected)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool | None = None,
    cache: Any = None,
    sinks: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What ``transformers.AttentionInterface`` calls.

    Args:
        module: the attention module; asked for ``is_causal`` if that is not given.
        query: ``[B, Hq, Tq, E]``. With a batch of one, shared by all sequences.
        key, value: ``[B, Hkv, Tk, E]``, ``[B, Hkv, Tk, Ev]``; Hq a multiple of Hkv, the heads are not repeated.
        attention_mask: None, what ``register``'s mask function made, or 4-D: bool (True: attend) or floating (added to the
            scores). A mask tells everything; without one, several queries see keys causally if ``is_causal``, and as far back
            as ``sliding_window``.
        dropout: of the weights; 0 outside training is up to the caller.
        scaling: of the scores; None: ``1 / sqrt(E)``.
        is_causal: whether several queries see keys causally where there is no mask; None: what ``module`` says.
        sliding_window: keys that a query sees, itself included.
        softcap: scores become ``softcap tanh(s / softcap)``.
        s_aux: ``[Hq]``, a logit for each head that takes part in the softmax and has no value (attention sinks).
        position_bias: ``[B or 1, Hq or 1, Tq, Tk]``, added to the scores, with a gradient (T5).
        output_attentions: return the weights.
        cache: must be None.
        sinks: ``[B, Hq, Tq, 1]``, the same as ``s_aux`` with a logit for each query.
        indices: integers ``[B, Tq, N]``, the keys that a query sees, of those that the mask shows (DeepSeek's sparse attention).
        block_indices: the same of blocks of keys, which ``module.indexer`` turns into a mask (MiniMax).

    Returns:
        out ``[B, Tq, Hq, Ev]``, and the weights ``[B, Hq, Tq, Tk]``, after dropout, or None if nobody asks for them.
        A query that may see no key gets 0, as in "sdpa" ("eager" averages the values then).

    Raises:
        RuntimeError: for a mask of another shape, and as ``fastseq.functional.attention``.
        NotImplementedError: with the paged cache of continuous batching.
    """
    if cache is not None:
        raise NotImplementedError("fastseq attention does not read the paged cache of continuous batching; choose 'sdpa' for it")
    sunk = s_aux is not None or sinks is not None
    if indices is not None or block_indices is not None:
        attention_mask = _selected(module, query, key, attention_mask, indices, block_indices, kwargs.get("position_ids"))
    if not (output_attentions or softcap or sunk) and plain_call(True) and not _weights_wanted(None):
        causal = attention_mask is None and query.shape[2] > 1 and _causal(module, is_causal)
        # a mask tells everything, and without one a window as wide as the rows hides nothing
        windowed = sliding_window and attention_mask is None and max(query.shape[2], key.shape[2]) > sliding_window
        if attention_mask is None and position_bias is None and not (windowed or dropout or torch.is_grad_enabled()):
            known = None if query.is_nested or key.is_nested or value.is_nested else eager.shortest.get(False)
            if known is not None and type(query) is type(key) is type(value) is Tensor and type(scaling) is float:
                out = known[0](query, key, value, scaling, known[1] | (_SHORT_CAUSAL if causal else _SHORT))
                if out is not None:
                    return out.transpose(1, 2), None
        mask = attention_mask if position_bias is None else position_bias
        alone = position_bias is None or (attention_mask is None and not causal)  # but for a mask there is room for one tensor
        if not alone and query.shape[2] == 1 and not torch.is_grad_enabled() and type(attention_mask) is Tensor:
            assert position_bias is not None
            hides = attention_mask.dtype == torch.bool  # of a single query the sum is small
            mask = torch.where(attention_mask, position_bias, -torch.inf) if hides else attention_mask + position_bias
            alone = True
        if alone and not windowed and (mask is None or (type(mask) is Tensor and mask.dim() == 4)):
            grouped = query.shape[1] != key.shape[1]
            out = eager.scaled_dot_product_attention(query, key, value, mask, dropout, causal, scaling, grouped)
            if out is not None:
                return out.transpose(1, 2).contiguous(), None
    wanted = _weights_wanted(output_attentions)
    if attention_mask is not None and attention_mask.dim() != 4:
        raise RuntimeError(f"attention_mask must be [B, H or 1, Tq, Tk], got {list(attention_mask.shape)}")
    if query.shape[0] == 1:
        query = query.expand(key.shape[0], -1, -1, -1)
    if query.device.type == "cpu" and not (wanted or softcap or sunk or torch.compiler.is_compiling()):
        out = _as_sdpa(module, query, key, value, attention_mask, dropout, scaling, is_causal, sliding_window, position_bias)
        if out is not None:
            return out.transpose(1, 2).contiguous(), None
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap or 0.0, "sinks": s_aux, "dropout_p": dropout}
    bias = position_bias
    if attention_mask is None:
        options |= _without_mask(module, query.shape[2], key.shape[2], is_causal, sliding_window)
    elif isinstance(attention_mask, masks.BandMask) and attention_mask.elements is None:
        options |= {"window_size": attention_mask.band, "offset": attention_mask.offset}
        if attention_mask.cu_seqlens is None:
            options |= {"attn_mask": attention_mask.keys, "seqlens_k": attention_mask.lengths}
        elif bias is None and not wanted and sinks is None:
            return _texts_apart(query, key, value, attention_mask.cu_seqlens, attention_mask.longest, options), None
        else:
            options["attn_mask"] = attention_mask.materialized()
    elif attention_mask.is_floating_point():
        bias = attention_mask if bias is None else bias + attention_mask
    else:
        options["attn_mask"] = attention_mask.materialized() if isinstance(attention_mask, masks.BandMask) else attention_mask
    if sinks is not None:
        return _with_sinks(query, key, value, sinks, wanted, {"attn_bias": bias, **options})
    result = fused_attention(query, key, value, attn_bias=bias, return_weights=wanted, **options)
    out, weights = result if wanted else (result, None)
    return out.transpose(1, 2).contiguous(), weights


def _selected(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    indices: Tensor | None,
    block_indices: Tensor | None,
    position_ids: Tensor | None,
) -> Tensor:
    """The mask of a model that hands over which keys a query sees, and does not put it into the mask itself (but for "eager" and
    "sdpa")."""
    if isinstance(mask, masks.BandMask):
        mask = mask.materialized()
    queries, keys = query.shape[2], key.shape[2]
    if block_indices is not None:
        if position_ids is None:
            position_ids = torch.arange(keys - queries, keys, device=query.device)
        places = position_ids.expand(query.shape[0], -1)
        of_blocks: Tensor = module.indexer.build_block_mask(  # type: ignore[operator, union-attr]
            block_indices, mask, keys, query.dtype, query.device, places
        )
        return of_blocks
    assert indices is not None
    seen = torch.zeros(indices.shape[0], queries, keys, dtype=torch.bool, device=query.device)
    seen = seen.scatter(-1, indices.long(), True).unsqueeze(1)
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def _with_sinks(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, wanted: bool, options: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Attention with a logit for each query that takes part in its softmax and has no value."""
    out, lse, *weights = fused_attention(query, key, value, return_lse=True, return_weights=wanted, **options)
    share = torch.sigmoid(lse.unsqueeze(-1) - sinks)  # what the sink leaves
    out = (out * share).to(out.dtype).transpose(1, 2).contiguous()
    return out, (weights[0] * share).to(out.dtype) if wanted else None


def _causal(module: torch.nn.Module, is_causal: bool | None) -> bool:
    """Whether several queries without a mask see the keys up to their own place."""
    return is_causal if is_causal is not None else getattr(module, "is_causal", True)


def _as_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    sliding_window: int | None,
    position_bias: Tensor | None,
) -> Tensor | None:
    """[B, Hq, Tq, Ev] of a call that "sdpa" would do in the same way, without the detours that other features need.

    None: a mask of long sequences has no elements yet, or something is to be checked.
    """
    (batch, heads, tq, _), tk = query.shape, key.shape[2]
    if autocast_dtype("cpu") is not None or 0 in query.shape or 0 in key.shape:
        return None
    if not query.dtype == key.dtype == value.dtype or not 0 <= dropout <= 1:
        return None
    mask, bias, right = None, position_bias, -1
    if isinstance(attention_mask, masks.BandMask):
        if attention_mask.elements is None and attention_mask.plainly_causal:
            right = 0
        elif attention_mask.elements is None and tq * tk > masks.SHORT:
            return None
        else:
            mask = attention_mask.materialized()
    elif attention_mask is not None:
        if not attention_mask.is_floating_point():
            mask = attention_mask
        else:
            bias = attention_mask if bias is None else bias + attention_mask
    elif sliding_window is not None:
        return None
    elif tq > 1 and _causal(module, is_causal):
        right = 0
    for part in (mask, bias):
        if part is not None and not all(n in (1, size) for n, size in zip(part.shape, (batch, heads, tq, tk), strict=True)):
            return None
    if (mask is not None and mask.dtype != torch.bool) or (bias is not None and bias.dtype != query.dtype):
        return None
    scale = default_scale(query.shape[-1]) if scaling is None else float(scaling)
    return attention_output(query, key, value, Spec(mask, bias, scale=scale, dropout=float(dropout), right=right))


def _texts_apart(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, options: dict[str, Any]) -> Tensor:
    """[B, T, Hq, Ev]: the rows of all sequences as one packed tensor."""
    out = fused_attention(
        *(tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)),
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        **options,
    )
    return out.unflatten(0, (query.shape[0], query.shape[2]))


def _without_mask(
    module: torch.nn.Module, tq: int, tk: int, is_causal: bool | None, sliding_window: int | None
) -> dict[str, Any]:
    """Several queries start where the keys start; a single one stands at the last key."""
    causal = _causal(module, is_causal)
    side = None if sliding_window is None else sliding_window - 1
    if tq == 1:
        return {} if side is None else {"window_size": (side, None), "offset": tk - 1}
    return {"window_size": (side, 0 if causal else side), "alignment": "top_left"}
