"""The weights, and with them the output: blocks of queries whose scores stay in a core's cache.

The weights are a softmax of their own, not made from the lse: torch's fused kernel rounds that to 20 bits, and a block holds all
the keys that its queries see.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...ops.types import Spec, empty_gradients, empty_rows, state_dtype
from ...reference import attention as reference
from ...reference.attention import Group, Tile

_HELD = 1 << 18  # scores held at once: 1 MiB of fp32
_ROWS = 16  # queries of a block at least


def attention_weights(q: Tensor, k: Tensor, lse: Tensor, spec: Spec, average: bool) -> Tensor:
    weights = _empty_weights(q, k, spec, average)
    scores = _Scores(q, k, spec)
    for tile in scores.tiles():
        _put(weights, tile, scores.weights(tile))
    return weights


def attention_with_weights(q: Tensor, k: Tensor, v: Tensor, spec: Spec, average: bool) -> tuple[Tensor, Tensor, Tensor]:
    """out and lse of ``attention_forward``, and the weights, from one pass over the scores."""
    weights = _empty_weights(q, k, spec, average)
    out = empty_rows(q, v.shape[-1])
    lse = q.new_empty(q.shape[:-1], dtype=state_dtype(q.dtype))
    if not _covered(k, spec):
        out, lse = out.zero_(), lse.fill_(-torch.inf)
    scores = _Scores(q, k, spec)
    for tile in scores.tiles():
        w = scores.weights(tile)
        out[tile.q] = (_grouped(w, k.shape[1]) @ _heads(v[tile.k], w.dtype)).view(*w.shape[:3], -1)
        lse[tile.q] = scores.lse(w)
        _put(weights, tile, w)
    return out, lse, weights


def attention_weights_backward(
    dw: Tensor, q: Tensor, k: Tensor, lse: Tensor, spec: Spec, average: bool, wanted: list[bool]
) -> tuple[Tensor, ...]:
    results = empty_gradients(q, k, q, spec, [wanted[0], wanted[1], *[False] * 5])
    dq, dk = (torch.zeros(t.shape, dtype=lse.dtype, device=q.device) for t in (q, k))
    delta = torch.zeros_like(lse)
    scores = _Scores(q, k, spec)
    if average:
        dw = dw[:, None] / q.shape[1]
    for tile in scores.tiles():
        w = scores.weights(tile)
        ds = w * dw[tile.batch, :, tile.rows, tile.keys]
        sums = ds.sum(-1, keepdim=True)
        delta[tile.q] = sums.squeeze(-1)
        ds = _grouped(ds.addcmul_(w, sums, value=-1).mul_(spec.scale), k.shape[1])
        if wanted[0]:
            dq[tile.q] = (ds @ _heads(k[tile.k], ds.dtype)).view(*w.shape[:3], -1)
        if wanted[1]:
            dk[tile.k] += (ds.mT @ _grouped(q[tile.q].to(ds.dtype), k.shape[1])).unflatten(0, (-1, k.shape[1]))
    for place, total, want in zip(results, (dq, dk), wanted, strict=False):
        if want:
            place.copy_(total)
    return *results, delta


class _Scores:
    """Blocks of scores, one after the other in the same memory, and the weights that they become."""

    def __init__(self, q: Tensor, k: Tensor, spec: Spec) -> None:
        self.q, self.k, self.given = q, k, spec
        self.spec = spec._replace(q_lengths=None, k_lengths=None)
        self.dtype = state_dtype(q.dtype)
        self.room = torch.empty(0, dtype=self.dtype)

    def tiles(self) -> Iterator[Tile]:
        heads, tq, tk = self.q.shape[1], self.q.shape[2], self.k.shape[2]
        if 0 in self.q.shape or 0 in self.k.shape:
            return
        for group in self._groups(heads, tq, tk):
            held = (group.batch.stop - group.batch.start) * heads * group.keys
            for tile in reference.cut(group, self.spec, max(_ROWS, _HELD // max(1, held))):
                if tile.keys.stop > tile.keys.start:
                    yield tile

    def _groups(self, heads: int, tq: int, tk: int) -> Iterator[Group]:
        """Sequences with lengths one by one; without, as many as a block holds whole."""
        if self.given.q_lengths is not None or self.given.k_lengths is not None:
            yield from reference.alone(self.given, tq, tk)
            return
        batch, shift = self.q.shape[0], self.spec.offset + (tk - tq if self.spec.bottom_right else 0)
        together = max(1, _HELD // max(1, heads * tq * tk))
        for first in range(0, batch, together):
            yield Group(slice(first, min(first + together, batch)), tq, tk, shift)

    def weights(self, tile: Tile) -> Tensor:
        """[b, Hq, R, C], overwritten by the next."""
        q, k = self.q[tile.q], self.k[tile.k]
        rows, keys = _grouped(q.to(self.dtype), k.shape[1]), _heads(k, self.dtype).mT
        size = rows.shape[0] * rows.shape[1] * keys.shape[2]
        if self.room.numel() < size:
            self.room = q.new_empty(size, dtype=self.dtype)
        room = self.room[:size].view(*rows.shape[:2], keys.shape[2])
        alone = rows.requires_grad or keys.requires_grad  # an exported program: autograd follows what the op does
        s = torch.baddbmm(room, rows, keys, beta=0, alpha=self.spec.scale, out=None if alone else room)
        s = s.view(*q.shape[:3], keys.shape[2])
        own, _ = reference.of_tile(self.spec, tile)
        mask = reference.added(own, tile, q.device, self.dtype)
        if mask is not None:
            s += mask
        self.highest = s.amax(-1)
        dead = None if mask is None else self.highest == -torch.inf
        s = torch.softmax(s, -1, out=None if alone else s)  # each row is read before it is written
        return s if dead is None or not dead.any() else s.masked_fill(dead[..., None], 0)

    def lse(self, w: Tensor) -> Tensor:
        """[b, Hq, R] of the block that ``weights`` gave last: its largest weight is exp(highest - lse)."""
        lse = self.highest - w.amax(-1).log()
        return lse.masked_fill_(self.highest == -torch.inf, -torch.inf)


def _heads(k: Tensor, dtype: torch.dtype) -> Tensor:
    """[b Hkv, C, E] of [b, Hkv, C, E]."""
    return k.to(dtype).flatten(0, 1)


def _grouped(x: Tensor, heads: int) -> Tensor:
    """[b Hkv, g R, n] of [b, Hq, R, n]: the rows of the query heads that share a key head."""
    b, hq, r, n = x.shape
    return x.reshape(b * heads, hq // heads * r, n)


def _empty_weights(q: Tensor, k: Tensor, spec: Spec, average: bool) -> Tensor:
    """[B, Hq, Tq, Tk] or, averaged, [B, Tq, Tk]: zeros, unless each is written."""
    batch, heads, tq, _ = q.shape
    shape = (batch, tq, k.shape[2]) if average else (batch, heads, tq, k.shape[2])
    return q.new_empty(shape) if _covered(k, spec) else q.new_zeros(shape)


def _covered(k: Tensor, spec: Spec) -> bool:
    """Whether every pair of places is in a block."""
    return 0 not in k.shape and spec.left < 0 and spec.right < 0 and spec.q_lengths is None and spec.k_lengths is None


def _put(weights: Tensor, tile: Tile, w: Tensor) -> None:
    if weights.dim() == 3:
        weights[tile.batch, tile.rows, tile.keys] = w.mean(1)
    else:
        weights[tile.batch, :, tile.rows, tile.keys] = w
