"""Longformer (Beltagy et al. 2020, arXiv 2004.05150): attention in a window, and a few tokens that see and are seen by all.

Letters: B batch, T tokens, W width, H heads, E = W / H features of a head, G global tokens of a row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseq.functional import attention, merge_attention, require_whole_sequence

from ._configuration import check_choice, check_heads, check_input, check_rates, check_sizes

__all__ = ["Longformer", "WindowedAttention"]


class WindowedAttention(nn.Module):
    """A token sees ``window`` / 2 tokens on each side and the global ones, in one softmax; global tokens see all.

    What global tokens see they see by projections of their own, as in the paper: ``query_global`` and ``key_value_global``.

    Args:
        width: W.
        heads: H, a divisor of W.
        window: an even number of neighbors, half on each side.
        attention_dropout: of the weights, in training alone.

    Raises:
        ValueError: if an argument has a value that is not accepted. TypeError: if a size is no int.
    """

    def __init__(self, width: int, heads: int, window: int, *, attention_dropout: float = 0.0) -> None:
        super().__init__()
        check_heads(width, heads)
        check_sizes(window=window)
        check_rates(attention_dropout=attention_dropout)
        if window % 2:
            raise ValueError(f"window must be even, half on each side, got {window}")
        self.width, self.heads, self.window, self.attention_dropout = width, heads, window, attention_dropout
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.query_global, self.key_value_global = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.query_global.load_state_dict(self.query.state_dict())  # begin as copies
        self.key_value_global.load_state_dict(self.key_value.state_dict())

    def forward(self, x: Tensor, places: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """``[B, T, W]`` from x likewise; no tensor of T x T elements is made.

        Args:
            places: int64 ``[B, G]``, the global tokens of each row, each once; -1 where a row has fewer. None: no row has any.
            lengths: int64 ``[B]``: tokens beyond are seen by none and give ``out``'s bias.

        Raises:
            RuntimeError: if sizes or dtypes do not fit, or (on a CPU, not compiled) a place is out of range, beyond its row's
                length, or named twice.
        """
        check_input(x, None, None, self.width)
        rate, half = self.attention_dropout if self.training else 0.0, self.window // 2
        q, (k, v) = self._split(self.query(x), 1)[0], self._split(self.key_value(x), 2)
        near: Any = {"window_size": (half, half), "seqlens_q": lengths, "seqlens_k": lengths, "dropout_p": rate}
        if places is None:
            return self.out(attention(q, k, v, **near).transpose(1, 2).flatten(2))
        require_whole_sequence("attention with global tokens")
        check_places(places, x, lengths)
        B, T, E, seen = len(x), x.shape[1], q.shape[-1], places >= 0
        rows = places.where(seen, T)  # T: a row too many, that takes what belongs nowhere
        local = torch.ones(B, T + 1, dtype=torch.bool, device=x.device).scatter(1, rows, False)[:, None, None, :T]
        at = rows.clamp(max=T - 1)[:, None, :, None].expand(-1, self.heads, -1, E)
        of_local, lse = attention(q, k, v, attn_mask=local, return_lse=True, **near)
        all_see: Any = {"attn_mask": seen[:, None, None], "seqlens_q": lengths, "dropout_p": rate}
        of_global, lse_of_global = attention(q, k.gather(2, at), v.gather(2, at), return_lse=True, **all_see)
        y, _ = merge_attention(of_local, lse, of_global, lse_of_global)
        asking = x.gather(1, rows.clamp(max=T - 1)[..., None].expand(-1, -1, self.width))
        k, v = self._split(self.key_value_global(x), 2)
        told = attention(self._split(self.query_global(asking), 1)[0], k, v, seqlens_k=lengths, dropout_p=rate)
        y = F.pad(y, (0, 0, 0, 1)).scatter(2, rows[:, None, :, None].expand_as(told), told.to(y.dtype))[:, :, :T]
        return self.out(y.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        return tuple(part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in x.chunk(parts, -1))


def check_places(places: Tensor, x: Tensor, lengths: Tensor | None) -> None:
    if places.dtype != torch.int64 or places.dim() != 2 or len(places) != len(x) or places.device != x.device:
        given = f"{places.dtype} {list(places.shape)} on {places.device}"
        raise RuntimeError(f"places must be int64 [{len(x)}, G] on {x.device}, got {given}")
    if places.device.type != "cpu" or torch.compiler.is_compiling():
        return
    ends = torch.full((len(x),), x.shape[1]) if lengths is None else lengths
    ordered = places.sort(1)[0]
    if (places < -1).any() or (places >= ends[:, None]).any() or ((ordered.diff() == 0) & (ordered[:, 1:] >= 0)).any():
        raise RuntimeError(f"places must be -1 or tokens of their row, {ends.tolist()} each, none twice, got {places.tolist()}")


class Block(nn.Module):
    """Attention, then a feed-forward with GELU, each beside a residual and with a norm before it or after it."""

    def __init__(self, attention: WindowedAttention, feedforward: int, norm: str, dropout: float) -> None:
        super().__init__()
        self.attention, self.pre, self.dropout, W = attention, norm == "pre", dropout, attention.width
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(W), nn.LayerNorm(W)
        self.up, self.down = nn.Linear(W, feedforward), nn.Linear(feedforward, W)

    def forward(self, x: Tensor, places: Tensor | None, lengths: Tensor | None) -> Tensor:
        def feedforward(x: Tensor) -> Tensor:
            return F.dropout(self.down(F.gelu(self.up(x))), self.dropout, self.training)

        def attend(x: Tensor) -> Tensor:
            return F.dropout(self.attention(x, places, lengths), self.dropout, self.training)

        if self.pre:
            x = x + attend(self.attention_norm(x))
            return x + feedforward(self.feedforward_norm(x))
        x = self.attention_norm(x + attend(x))
        return self.feedforward_norm(x + feedforward(x))


class Longformer(nn.Module):
    """A stack of blocks with windowed attention and global tokens, on vectors that have their positions in them.

    What differs from the paper: no dilation; norms come before the sub-layers unless ``norm`` is ``"post"``, as there; all global
    tokens are said by their places. Attention looks both ways: nothing is generated, so there is no step.

    Args:
        width, heads, attention_dropout: as of `WindowedAttention`.
        depth: blocks.
        window: of every block, or a tuple of one for each.
        feedforward: its inner width; None: 4 W.
        norm: ``"pre"`` (with one more norm at the end) or ``"post"``.
        dropout: of what each sub-layer adds, in training alone.

    Raises:
        ValueError: if an argument has a value that is not accepted. TypeError: if a size is no int.
    """

    def __init__(
        self, width: int, heads: int, depth: int, *, window: int | tuple[int, ...], feedforward: int | None = None,
        norm: str = "pre", dropout: float = 0.0, attention_dropout: float = 0.0
    ) -> None:  # fmt: skip
        super().__init__()
        feedforward = 4 * width if feedforward is None else feedforward
        check_sizes(depth=depth, feedforward=feedforward)
        check_choice("norm", norm, ("pre", "post"))
        check_rates(dropout=dropout)
        windows = window if isinstance(window, tuple) else (window,) * depth
        if len(windows) != depth:
            raise ValueError(f"window must be an even int, or a tuple of {depth}, one for each block, got {window}")
        each = [WindowedAttention(width, heads, one, attention_dropout=attention_dropout) for one in windows]
        self.blocks = nn.ModuleList([Block(one, feedforward, norm, dropout) for one in each])
        self.norm = nn.LayerNorm(width) if norm == "pre" else nn.Identity()

    def forward(self, x: Tensor, places: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """``[B, T, W]`` from x likewise; places, lengths and errors as of `WindowedAttention`."""
        for block in self.blocks:
            x = block(x, places, lengths)
        return self.norm(x)
