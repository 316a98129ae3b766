"""``nn.MultiheadAttention`` on the fused attention op: no tensor of all scores, with any masks, with or without weights.

On a CPU an eager call without gradients is one call of the library, with its projections.

What differs from torch's, on purpose:

* a query that may see no key (a sample that is all padding) gets zeros, in the output and in the weights; torch gives NaN or
  zeros, depending on the path it takes;
* ``is_causal=True`` is believed: the causal mask is applied by place and ``attn_mask`` is not read, with padding and with weights
  too, where torch reads it;
* nested tensors, strided or jagged, are accepted in training, with gradients and for keys of other lengths than the queries';
* the output projection is called as a module: its hooks run.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook

from .._arguments import checked_int
from ..backends import library
from ..functional._recording import recorder
from ..functional._torch_attention import attention_and_weights, attention_output, seeded
from ..ops._attention_eager import projected_attention
from ..ops._dispatch import PLAIN, plain_call, shared_sequence
from ..ops._linear_eager import linear
from ..ops.attention import Spec, attention, attention_weights
from ._checks import describe, public
from ._interop import Interop, as_leaf
from .nested import Packed

__all__ = ["MultiheadAttention"]

_OF_EACH = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


@public
class MultiheadAttention(Interop, nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention``: its constructor, parameters, ``state_dict``, ``forward`` and errors.

    Letters: L queries, S keys, N batch, E ``embed_dim``, H ``num_heads``.

    Inside an ``nn.TransformerEncoderLayer`` that is in eval mode and wants no gradients, torch computes the whole layer from its
    parameters, in one fused call, and calls no submodule: neither torch's attention nor this one.

    Args:
        embed_dim: E, features of queries and results.
        num_heads: H, a divisor of E.
        dropout: probability with which, in training, weights are zeroed.
        bias: whether the projections have one.
        add_bias_kv: a learned key and value behind all others.
        add_zero_attn: a key and value of zeros behind all others.
        kdim, vdim: features of keys and values. None: E.
        batch_first: sequences are [N, L, E].
        device, dtype: of the parameters.
    """

    _quantized_dynamically = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        checked_int("embed_dim", embed_dim)
        checked_int("num_heads", num_heads)
        super().__init__(embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype)

    @overload
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: Literal[True] = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        need_weights: Literal[False],
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]: ...
    @overload
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]: ...

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of ``query`` to ``key`` and ``value``.

        Self-attention is one projection if all three are the same object, two if two of them are.

        Args:
            query: [L, N, E], [N, L, E] if ``batch_first``, [L, E] without a batch, or a nested tensor of N times [L_i, E].
            key: likewise with S and ``kdim``.
            value: likewise with S and ``vdim``.
            key_padding_mask: [N, S] ([S] without a batch). bool: True hides a key; floating: added to the scores.
            need_weights: also return the weights. On the CPU they come with the output, on a GPU from a second pass over the
                scores; averaged over the heads, nothing larger than the result is formed.
            attn_mask: [L, S] or [N * H, L, S]. bool: True hides; floating: added to the scores.
            average_attn_weights: whether the weights are averaged over the heads.
            is_causal: a promise that ``attn_mask``, which must be given, is the causal mask (query i sees keys up to i).

        Returns:
            The output, shaped as ``query``, and the weights, after dropout, [N, L, S] or [N, H, L, S] (for nested tensors padded
            with zeros; S grows by one for each of ``add_bias_kv`` and ``add_zero_attn``), or None.

        Raises:
            AssertionError: numbers of dimensions or features, masks that are neither bool nor floating, or a ``key_padding_mask``
                of another shape, as in torch; nested tensors with masks or appended keys.
            RuntimeError: ``is_causal`` without ``attn_mask``; an ``attn_mask`` of another shape or dtype; batch sizes, dtypes or
                devices that do not go together.
            ValueError: in training, a dropout that is no probability.
        """
        if plain_call(unseen=True):
            if self.batch_first and torch.is_grad_enabled() and (_inferred(query) or _inferred(key) or _inferred(value)):
                # such a tensor cannot be kept for a backward pass; torch keeps copies, which are time-major
                copies = {id(given): given.clone() for given in (query, key, value) if _inferred(given)}
                query, key, value = (copies.get(id(given), given) for given in (query, key, value))
            results = self._in_one_call(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
            if results is not None:
                warn_of_mixed(key_padding_mask, attn_mask)
                return results
        if isinstance(query, Proxy):
            return as_leaf(
                self,
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=None if need_weights else False,
                attn_mask=attn_mask,
                average_attn_weights=None if average_attn_weights else False,
                is_causal=is_causal or None,
            )
        if recorder() is not None:
            return super().forward(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        _check_types(query, key, value, key_padding_mask, attn_mask)
        shared = shared_sequence()
        if shared is not None:
            if query.is_nested or key.is_nested or value.is_nested:
                raise ValueError("nested tensors do not go with context_parallel")
            self._check(query, key, value, key_padding_mask, None, False, need_weights)
            return shared.multihead_attention(self, query, key, value, key_padding_mask, need_weights, attn_mask, is_causal)
        if query.is_nested or key.is_nested or value.is_nested:
            return self._forward_nested(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        self._check(query, key, value, key_padding_mask, attn_mask, is_causal, need_weights)
        batched = query.dim() == 3
        if not batched:
            query, key, value = _of_one(query, key, value)
        batch_dim, time_dim = (0, 1) if batched and self.batch_first else (1, 0)
        batch, sizes = query.shape[batch_dim], (query.shape[time_dim], key.shape[time_dim])
        q, k, v = self._project(query, key, value, batch_dim)
        bias_k, bias_v = self.bias_k, self.bias_v  # once: they may be computed
        if (bias_k is None) != (bias_v is None):
            raise AssertionError("bias_k and bias_v go together, but one of them is None")
        appended = (bias_k is not None) + self.add_zero_attn
        if appended:
            k, v = self._append(k, bias_k), self._append(v, bias_v)
        # A causal window would hide the appended keys, which every query sees.
        causal = is_causal and not appended
        mask = bias = None
        if key_padding_mask is not None or (attn_mask is not None and not causal):
            mask, bias = self._masks(key_padding_mask, None if causal else attn_mask, batch, sizes, appended, q.dtype)
        spec = self._spec(mask, bias, causal)
        if need_weights:
            out, weights = attention_and_weights(q, k, v, spec, average_attn_weights)
        else:
            out, weights = attention_output(q, k, v, spec), None
        out = self.out_proj((out.transpose(1, 2) if batch_dim == 0 else out.permute(2, 0, 1, 3).contiguous()).flatten(-2))
        if batched:
            return out, weights
        return out.squeeze(1), None if weights is None else weights.squeeze(0)

    def _in_one_call(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None] | None:
        """A plain eager call on the CPU: without gradients one call of the library, in training one between the projections.

        None: the call is for another way, which also says what is wrong with it.
        """
        parameters, out = self._parameters, self._modules["out_proj"]
        if type(out) is not NonDynamicallyQuantizableLinear or hooked(out) or self.add_zero_attn or library.reason():
            return None
        of_out = out._parameters
        weight, out_weight = parameters.get("in_proj_weight"), of_out.get("weight")
        weights: list[Any] = [weight] if weight is not None else [parameters.get(name) for name in _OF_EACH]
        if out_weight is None or any([w is None for w in weights]):
            return None
        own = self.__dict__  # where None stands if they were never parameters; what is computed stands in neither
        if own.get("bias_k", parameters.get("bias_k", out_weight)) is not None:
            return None
        if own.get("bias_v", parameters.get("bias_v", out_weight)) is not None:
            return None
        if "in_proj_bias" not in parameters or "bias" not in of_out:  # made anew at every call, as by pruning
            return None
        bias, out_bias = parameters["in_proj_bias"], of_out["bias"]
        tensors = [query, key, value, *weights, out_weight]
        tensors += [t for t in (bias, out_bias, key_padding_mask, attn_mask) if t is not None]
        for tensor in tensors:
            if type(tensor) not in PLAIN or tensor.is_nested:
                return None
        if is_causal and (attn_mask is None or tuple(attn_mask.shape) != (self._steps(query), self._steps(key))):
            return None
        if key_padding_mask is not None and key_padding_mask.dim() != query.dim() - 1:
            return None
        dropout = self.dropout if self.training else 0.0
        gradients = torch.is_grad_enabled() and any([t.requires_grad for t in tensors])
        if weight is not None and not gradients and not dropout:
            native = torch.ops.fastseq_native.multihead_attention.default
            results = native(
                query,
                key,
                value,
                self.num_heads,
                weight,
                bias,
                out_weight,
                out_bias,
                key_padding_mask,
                attn_mask,
                self.batch_first,
                is_causal,
                need_weights,
                average,
            )
            return (results[0], results[1] if need_weights else None) if results else None
        if not query.is_cpu or not 0 <= dropout < 1 or query.dtype != out_weight.dtype or query.numel() == 0:
            return None
        if (key_padding_mask is not None and key_padding_mask.requires_grad) or (
            attn_mask is not None and attn_mask.requires_grad
        ):
            return None
        if query.dim() == 2:
            return self._in_one_call_of_one(query, key, value, key_padding_mask, need_weights, attn_mask, average, is_causal)
        if query.dim() != 3 or query.shape[-1] != self.embed_dim:
            return None
        if not (query is key and key is value and weight is not None) and not self._are_beside(query, key, value):
            return None
        batch, steps, keys = query.shape[0 if self.batch_first else 1], self._steps(query), self._steps(key)

        def meaning() -> Spec:
            masks = self._masks(key_padding_mask, None if is_causal else attn_mask, batch, (steps, keys), 0, query.dtype)
            return self._spec(*masks, is_causal)._replace(dropout=dropout)

        results = projected_attention(
            [linear(x, w, b) for x, _, w, b in self._runs(query, key, value)],
            self.num_heads,
            key_padding_mask,
            attn_mask,
            self.batch_first,
            is_causal,
            float(dropout),
            need_weights,
            average,
            meaning,
        )
        if results is None:
            return None
        return linear(results[0], out_weight, out_bias), results[1] if need_weights else None

    def _in_one_call_of_one(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None] | None:
        """The same without a batch."""
        if key.dim() != 2 or value.dim() != 2 or (key_padding_mask is not None and key_padding_mask.dim() != 1):
            return None
        place = 0 if self.batch_first else 1
        padding = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        batch = _of_one(query, key, value, place)
        results = self._in_one_call(*batch, padding, need_weights, attn_mask, average, is_causal)
        if results is None:
            return None
        out, weights = results
        return out.squeeze(place), None if weights is None else weights.squeeze(0)

    def _are_beside(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether key and value with a batch are what they have to be beside a query that is."""
        if key.dim() != 3 or value.dim() != 3 or not query.dtype == key.dtype == value.dtype:
            return False
        if (key.shape[-1], value.shape[-1]) != (self.kdim, self.vdim) or key.shape[:2] != value.shape[:2]:
            return False
        place = 0 if self.batch_first else 1
        return key.shape[place] == query.shape[place] and key.numel() > 0 and value.numel() > 0

    def _steps(self, x: Tensor) -> int:
        return x.shape[1 if self.batch_first and x.dim() == 3 else 0]

    if TYPE_CHECKING:
        __call__ = forward

    def _forward_nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Sequences back to back, without padding."""
        self._check_nested(query, key, value, key_padding_mask, attn_mask, is_causal)
        queries = Packed.of(query)
        keys = queries if key is query else Packed.of(key)
        values = keys if value is key else queries if value is query else Packed.of(value)
        self._check_features(queries.rows, keys.rows, values.rows)
        if values is not keys and not torch.equal(values.cu, keys.cu):
            raise AssertionError("key and value must hold sequences of the same lengths")
        if len(keys.cu) != len(queries.cu):
            raise RuntimeError(f"query holds {len(queries.cu) - 1} sequences, key {len(keys.cu) - 1}")
        q, k, v = self._project(queries.rows, keys.rows, values.rows)
        spec = seeded(q, self._spec())
        packed = spec._replace(cu_q=queries.cu, cu_k=keys.cu, max_q=queries.longest, max_k=keys.longest)
        out, lse = attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), packed)
        weights = None
        if need_weights:
            padded = spec._replace(q_lengths=queries.cu.diff(), k_lengths=keys.cu.diff())
            q, k, lse = queries.pad(q).transpose(1, 2), keys.pad(k).transpose(1, 2), queries.pad(lse.T).transpose(1, 2)
            weights = attention_weights(q, k, lse, padded, average_attn_weights)
        return queries.nest(self.out_proj(out.transpose(0, 1).flatten(-2)), query), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor, batch_dim: int | None = None) -> list[Tensor]:
        """q, k and v, each [.., H, E / H], or with ``batch_dim`` [N, H, T, E / H]: one product for each run of the same input."""
        heads = self.num_heads, self.head_dim
        projected: list[Tensor] = []
        for x, count, weight, bias in self._runs(query, key, value):
            y = F.linear(x, weight, bias)
            y = y.reshape(*y.shape[:-1], count, *heads)
            if batch_dim is None:
                projected += y.unbind(-3)
            else:
                projected += (y.permute(2, 0, 3, 1, 4) if batch_dim == 0 else y.permute(2, 1, 3, 0, 4)).unbind(0)
        return projected

    def _runs(self, query: Tensor, key: Tensor, value: Tensor) -> list[tuple[Tensor, int, Any, Any]]:
        """The inputs, of each how many of q, k and v it gives, with which weight and bias."""
        in_bias = self.in_proj_bias  # once: it may be computed
        biases: Any
        weights: Any
        if self._qkv_same_embed_dim:
            if query is key and key is value:
                return [(query, 3, self.in_proj_weight, in_bias)]
            counts = [2, 1] if query is key else [1, 2] if key is value else [1, 1, 1]
            rows = [count * self.num_heads * self.head_dim for count in counts]
            inputs = (query, value) if len(counts) == 2 else (query, key, value)
            biases = [None] * len(rows) if in_bias is None else in_bias.split_with_sizes(rows)
            return list(zip(inputs, counts, self.in_proj_weight.split_with_sizes(rows), biases, strict=True))
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = [None] * 3 if in_bias is None else in_bias.split_with_sizes([self.num_heads * self.head_dim] * 3)
        return list(zip((query, key, value), (1, 1, 1), weights, biases, strict=True))

    def _append(self, x: Tensor, row: Tensor | None) -> Tensor:
        """k or v [N, H, S, E / H], then the key that ``add_bias_kv`` learns and the zero of ``add_zero_attn``."""
        shape = (*x.shape[:2], 1, x.shape[3])
        parts = [x]
        if row is not None:
            parts.append(row.to(x.dtype).view(1, self.num_heads, 1, self.head_dim).expand(shape))
        if self.add_zero_attn:
            parts.append(x.new_zeros(shape))
        return torch.cat(parts, 2)

    def _spec(self, mask: Tensor | None = None, bias: Tensor | None = None, causal: bool = False) -> Spec:
        dropout = float(self.dropout) if self.training else 0.0
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {dropout}")
        # softcap: Dynamo takes a default of 0.0 for an input that one autograd.Function cannot hand on to the next.
        return Spec(mask, bias, scale=self.head_dim**-0.5, softcap=0.0, dropout=dropout, right=0 if causal else -1)

    def _masks(
        self,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        batch: int,
        sizes: tuple[int, int],
        appended: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor | None, Tensor | None]:
        """A mask (True: attend) and a bias for [N, H, L, S], with 1 where a dimension is shared.

        So two masks are kept apart, unless both are added.
        """
        mask = bias = None
        if attn_mask is not None:
            attn_mask = _appended(attn_mask, appended)
            full = attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (batch, self.num_heads))
            mask, bias = (full.logical_not(), None) if full.dtype == torch.bool else (None, full)
        if key_padding_mask is not None:
            padding = _appended(key_padding_mask, appended).reshape(batch, 1, 1, -1)
            if padding.dtype != torch.bool:
                bias = padding if bias is None else bias + padding
            elif mask is None:
                mask = padding.logical_not()
            else:
                bias = torch.zeros_like(padding, dtype=dtype).masked_fill(padding, -torch.inf)
        if bias is not None and bias.dtype not in (dtype, torch.float32):
            raise RuntimeError(f"a floating mask must be {dtype}, as the query, or torch.float32, got {bias.dtype}")
        return mask, bias

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        need_weights: bool,
    ) -> None:
        dims = query.dim()
        if dims not in (2, 3):
            raise AssertionError(f"query must be [L, E] or have a batch and be 3-D, got {dims}-D")
        if key.dim() != dims or value.dim() != dims:
            raise AssertionError(f"query is {dims}-D, so key and value must be, got {key.dim()}-D and {value.dim()}-D")
        if key_padding_mask is not None and key_padding_mask.dim() != dims - 1:
            raise AssertionError(f"query is {dims}-D, so key_padding_mask must be {dims - 1}-D, got {key_padding_mask.dim()}-D")
        if attn_mask is not None and attn_mask.dim() not in (2, 3):
            raise AssertionError(f"attn_mask must be [L, S] or [N * num_heads, L, S], got {attn_mask.dim()}-D")
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is not None and mask.device != query.device:
                raise RuntimeError(f"{name} must be on the query's device {query.device}, got {mask.device}")
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask, which must be given with it")
        self._check_features(query, key, value)
        time, batch_dim = (1, 0) if self.batch_first and dims == 3 else (0, 1)
        batch = query.shape[batch_dim] if dims == 3 else 1
        if dims == 3 and key.shape[batch_dim] != batch:
            raise RuntimeError(f"query is a batch of {batch}, key of {key.shape[batch_dim]}")
        length, keys = query.shape[time], key.shape[time]
        if attn_mask is not None and not (is_causal and key_padding_mask is None and not need_weights):
            expected = (length, keys) if attn_mask.dim() == 2 else (batch * self.num_heads, length, keys)
            if attn_mask.shape != expected:
                kind = AssertionError if dims == 2 and attn_mask.dim() == 3 else RuntimeError
                raise kind(f"attn_mask must be {list(expected)} here, got {list(attn_mask.shape)}")
        if key_padding_mask is not None:
            of_keys = (batch, keys) if dims == 3 else (keys,)
            if key_padding_mask.shape != of_keys:
                raise AssertionError(f"key_padding_mask must be {list(of_keys)} here, got {list(key_padding_mask.shape)}")

    def _check_features(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(f"query must have {self.embed_dim} features (embed_dim), got {query.shape[-1]}")
        features, expected = (key.shape[-1], value.shape[-1]), (self.kdim, self.vdim)
        if not self._qkv_same_embed_dim and features != expected:
            raise AssertionError(f"key and value must have {expected} features (kdim, vdim), got {features}")
        if self._qkv_same_embed_dim and key.shape != value.shape:
            raise AssertionError(f"key and value must have the same shape, got {list(key.shape)} and {list(value.shape)}")
        if key.shape[:-1] != value.shape[:-1]:
            raise AssertionError(
                f"key and value must have the same length and batch, got {list(key.shape)} and {list(value.shape)}"
            )

    def _check_nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        if not (query.is_nested and key.is_nested and value.is_nested):
            raise AssertionError("query, key and value must all be nested tensors if one of them is")
        if key_padding_mask is not None or attn_mask is not None:
            raise AssertionError("nested tensors have no padding to mask: key_padding_mask and attn_mask must be None")
        if is_causal:
            raise RuntimeError("is_causal is a hint about attn_mask, which nested tensors do not take")
        if not self.batch_first:
            raise AssertionError("nested tensors are batches of sequences: batch_first must be True")
        if self.bias_k is not None or self.add_zero_attn:
            raise AssertionError("nested tensors do not go with add_bias_kv and add_zero_attn")
        if query.dim() != 3 or key.dim() != 3 or value.dim() != 3:
            raise AssertionError(f"nested tensors must hold [L_i, E], got {query.dim()}-D, {key.dim()}-D and {value.dim()}-D")


def _inferred(given: Any) -> bool:
    """Whether it is a plain tensor that was made in inference mode."""
    return type(given) is Tensor and given.is_inference()


def hooked(module: nn.Module) -> bool:
    """Whether a call of a module is more than the forward of its class: hooks, of its own or of every module, or another forward
    that was put in the place of its own."""
    own = module.__dict__
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(hooks or "forward" in own or _has_any_global_hook())


def _of_one(query: Tensor, key: Tensor, value: Tensor, place: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of one; what was the same object still is."""
    q = query.unsqueeze(place)
    k = q if key is query else key.unsqueeze(place)
    return q, k, q if value is query else k if value is key else value.unsqueeze(place)


def _check_types(query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> None:
    named = {"query": query, "key": key, "value": value, "key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
    for name, given in named.items():
        if not isinstance(given, Tensor) and (given is not None or not name.endswith("mask")):  # torch's type, from inside
            raise AttributeError(f"MultiheadAttention: {name} must be a Tensor, not {describe(given)}")
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            raise AssertionError(f"only bool and floating types of {name} are supported, got {mask.dtype}")
    warn_of_mixed(key_padding_mask, attn_mask)


def warn_of_mixed(padding: Tensor | None, mask: Tensor | None, names: str = "key_padding_mask and attn_mask") -> None:
    """What torch says of masks of two types."""
    if padding is not None and mask is not None and padding.dtype != mask.dtype:
        warnings.warn(f"Support for mismatched {names} is deprecated. Use same type for both instead.", stacklevel=3)


def _appended(mask: Tensor, count: int) -> Tensor:
    """``mask`` with columns for keys that every query sees."""
    return F.pad(mask, (0, count)) if count else mask
