"""Attention and the block that the Transformers are made of.

Letters: B batch, T tokens, S keys, W width, H heads, E = W / H features of a head, N room in a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastseq.functional import attention, attention_with_kv_cache

from ._configuration import check_choice, check_heads, check_rates, check_sizes

__all__ = ["Attention", "Block"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
}
NORMS: dict[str, Callable[..., nn.Module]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


class Attention(nn.Module):
    """Heads over this sequence or another. Rows of `projection`: those of queries, keys and values, as in torch's in_proj.

    Args:
        width: W.
        heads: H, a divisor of W.
        bias: whether the projections have one.
        scale: of the products; None: 1 / sqrt(W / H).
        dropout: of the weights, in training alone.
    """

    def __init__(self, width: int, heads: int, *, bias: bool = True, scale: float | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        check_heads(width, heads)
        check_rates(dropout=dropout)
        self.heads, self.scale, self.dropout = heads, scale, dropout
        self.projection, self.out = nn.Linear(width, 3 * width, bias), nn.Linear(width, width, bias)

    def project(self, x: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        """x [B, T, W]: of its queries, keys, values (0, 1, 2) those from `first` to before `last`, each [B, T, H, E]."""
        width = x.shape[-1]
        weight: Tensor = self.projection.weight
        bias: Tensor | None = self.projection.bias
        if last - first < 3:  # a part of the rows, whose gradient has to be put beside that of the others
            rows = slice(first * width, last * width)
            weight, bias = weight[rows], None if bias is None else bias[rows]
        y = F.linear(x, weight, bias)
        return y.unflatten(-1, (last - first, self.heads, width // self.heads)).unbind(2)

    def forward(
        self,
        x: Tensor,
        source: tuple[Tensor, ...] | None = None,
        lengths: Tensor | None = None,
        *,
        causal: bool = False,
        relative: tuple[Tensor, int] | None = None,
    ) -> Tensor:
        """x [B, T, W] asks itself, or keys and values of a source [B, S, H, E] with these lengths [B]: [B, T, W].

        `causal`: a token sees none that come later. `relative` is a bias by distance [H, L] and where distance 0 stands.
        """
        q, k, v = self.project(x, 0, 3) if source is None else (*self.project(x, 0, 1), *source)
        out = attention(
            *(q, k, v),
            layout="bshd",
            scale=self.scale,
            seqlens_k=lengths,
            causal=causal,
            relative_bias=None if relative is None else relative[0],
            relative_bias_zero=None if relative is None else relative[1],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out(out.flatten(2))

    def read(self, x: Tensor, keys: Tensor, values: Tensor, past: Tensor, relative: tuple[Tensor, int] | None = None) -> Tensor:
        """x [B, T, W], causal, behind `past` [B] tokens of a cache [B, N, H, E] that it joins: [B, T, W]. Without gradients.

        With a bias by distance, `relative`, T is 1.
        """
        q, k, v = self.project(x, 0, 3)
        if relative is None:
            new: Any = {"cache_seqlens": past, "k_new": k, "v_new": v}
            out = attention_with_kv_cache(q, keys, values, **new, layout="bshd", scale=self.scale)
            return self.out(out.flatten(2))
        place = past[:, None, None, None].expand_as(k)
        keys.scatter_(1, place, k)
        values.scatter_(1, place, v)
        by_distance: Any = {"relative_bias": relative[0], "relative_bias_zero": relative[1], "alignment": "bottom_right"}
        out = attention(q, keys, values, layout="bshd", scale=self.scale, seqlens_k=past + 1, **by_distance)
        return self.out(out.flatten(2))


class Block(nn.Module):
    """Attention, attention to a source if `cross`, two linear layers: each with a way around it, and a norm before or after.

    Args:
        width: W.
        heads: H, a divisor of W.
        inner: width between the two linear layers.
        cross: whether it attends to a source.
        norm: "pre" or "post": before or after each of the three.
        kind: of norm, "layer" or "rms".
        eps: of the norms.
        activation: "relu", "gelu" or "gelu_tanh".
        bias: whether linear layers and norms have one.
        scale: of attention's products; None: 1 / sqrt(W / H).
        dropout: of what each of the three adds, in training alone.
        attention_dropout: of attention's weights, in training alone.
        inner_dropout: between the two linear layers, in training alone.
    """

    def __init__(
        self, width: int, heads: int, inner: int, *, cross: bool = False, norm: str = "pre", kind: str = "layer",
        eps: float = 1e-5, activation: str = "relu", bias: bool = True, scale: float | None = None,
        dropout: float = 0.0, attention_dropout: float = 0.0, inner_dropout: float = 0.0
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(inner=inner)
        check_choice("norm", norm, ("pre", "post"))
        check_choice("kind", kind, tuple(NORMS))
        check_choice("activation", activation, tuple(ACTIVATIONS))
        check_rates(dropout=dropout, inner_dropout=inner_dropout)
        self.post, self.dropout = norm == "post", nn.Dropout(dropout)
        self.attention = Attention(width, heads, bias=bias, scale=scale, dropout=attention_dropout)
        self.cross = Attention(width, heads, bias=bias, scale=scale, dropout=attention_dropout) if cross else None
        first, second, act = nn.Linear(width, inner, bias), nn.Linear(inner, width, bias), ACTIVATIONS[activation]()
        self.inner = nn.Sequential(first, act, nn.Dropout(inner_dropout), second)
        self.norms = nn.ModuleList(NORMS[kind](width, eps=eps) for _ in range(3 if cross else 2))

    def forward(self, x: Tensor, attend: Callable[[Tensor], Tensor], answer: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """x [B, T, W]: `attend` is how `attention` is called on it here, `answer` how `cross` is."""
        x = self._around(0, x, attend)
        x = x if answer is None else self._around(1, x, answer)
        return self._around(-1, x, self.inner)

    def _around(self, number: int, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        norm = self.norms[number]
        return norm(x + self.dropout(sublayer(x))) if self.post else x + self.dropout(sublayer(norm(x)))
