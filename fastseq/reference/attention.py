"""Attention: the specification, in plain PyTorch, and the answer of last resort.

For a query i and a key j of a sequence, with p = i + offset (+ Tk - Tq if bottom_right) the query's place among the keys:

    s_ij = softcap(scale (q_i . k_j + relative_q_i . relative_k[j - p + relative_k_zero]))
           + bias_ij - slope |p - j| + relative_bias[j - p + relative_bias_zero]
    s_ij = -inf                 where mask, window (p - left <= j <= p + right), lengths or blocks hide j from i
    lse_i = log(sum_j exp s_ij + exp sink),     w_ij = exp(s_ij - lse_i),     out_i = sum_j dropout(w_ij) v_j

A query that sees no key has w = 0, out = 0 and lse = log exp sink (-inf without sinks). An index outside a relative table adds 0.
What stands in memory beyond the lengths of a sequence has no influence.

Work is done in tiles, blocks of queries with the keys that their window reaches, so that no [B, H, Tq, Tk] tensor exists, and a
window costs what it shows.

Letters: B batch, Hq query heads, Hkv key heads (Hq = g Hkv, query head h reads key head h // g), Tq, Tk, E head dim, Ev that of
v; in a tile b sequences, R queries, C keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.types import GRADIENTS, Spec, state_dtype

_HELD = 1 << 22  # scores held at once
_ROWS = 128  # a tile has at least as many queries, if there are: its gradients of the keys cost as much as so many rows


class Tile(NamedTuple):
    """Some queries of some sequences and the keys that they may see: R x C pairs, and which part of every tensor is theirs."""

    batch: slice
    rows: slice  # within the sequence
    keys: slice
    shift: Any  # place of query 0 among the keys: an integer, or int64 [b, 1, 1, 1]
    q: tuple[Any, ...]  # index of q, out, lse and relative_q: [b, Hq, R, ..] of padded or packed tensors
    k: tuple[Any, ...]  # of k and v


class Group(NamedTuple):
    """Sequences of one size."""

    batch: slice
    queries: int
    keys: int
    shift: Any  # as in Tile
    first: tuple[int, int] | None = None  # packed: first row of q and of k

    def tile(self, rows: slice, keys: slice) -> Tile:
        heads = slice(None)
        if self.first is None:
            return Tile(self.batch, rows, keys, self.shift, (self.batch, heads, rows), (self.batch, heads, keys))
        q, k = (slice(first + s.start, first + s.stop) for first, s in zip(self.first, (rows, keys), strict=True))
        return Tile(self.batch, rows, keys, self.shift, (None, heads, q), (None, heads, k))


def alone(spec: Spec, queries: int, keys: int) -> Iterator[Group]:
    """Each sequence of packed tensors, or of padded ones with lengths: its valid part."""
    if spec.cu_q is not None and spec.cu_k is not None:
        cu_q, cu_k = spec.cu_q.tolist(), spec.cu_k.tolist()
        sizes = [(cu_q[b + 1] - cu_q[b], cu_k[b + 1] - cu_k[b]) for b in range(len(cu_q) - 1)]
        firsts: list[Any] = list(zip(cu_q, cu_k, strict=True))
    else:
        given = spec.q_lengths if spec.q_lengths is not None else spec.k_lengths
        count = 0 if given is None else len(given)
        all_q = [queries] * count if spec.q_lengths is None else spec.q_lengths.tolist()
        all_k = [keys] * count if spec.k_lengths is None else spec.k_lengths.tolist()
        sizes, firsts = list(zip(all_q, all_k, strict=True)), [None] * count
    for b, (tq, tk) in enumerate(sizes):
        yield Group(slice(b, b + 1), tq, tk, spec.offset + (tk - tq if spec.bottom_right else 0), firsts[b])


def tiles(q: Tensor, k: Tensor, spec: Spec) -> Iterator[Tile]:
    """All pairs of queries and keys, but for those that a window hides: batch by batch, rows in order."""
    heads = q.shape[-3]
    groups: Iterator[Group] | list[Group]
    if spec.cu_q is not None:
        groups = alone(spec, 0, 0)
    else:
        batch, tq, tk = q.shape[0], q.shape[2], k.shape[2]
        held = heads * min(tq, _ROWS) * _reach(tk, spec, not spec.bottom_right)
        together = max(1, min(batch, _HELD // max(1, held)))
        batches = [slice(begin, min(begin + together, batch)) for begin in range(0, batch, together)]
        groups = [Group(part, tq, tk, _shift(tq, tk, spec, part)) for part in batches]
    for group in groups:
        yield from blocks(group, spec, (group.batch.stop - group.batch.start) * heads)


def _shift(tq: int, tk: int, spec: Spec, batch: slice) -> Any:
    if not spec.bottom_right:
        return spec.offset
    queries: Any = tq if spec.q_lengths is None else spec.q_lengths[batch].long()[:, None, None, None]
    keys: Any = tk if spec.k_lengths is None else spec.k_lengths[batch].long()[:, None, None, None]
    return keys - queries + spec.offset


def _reach(tk: int, spec: Spec, bounded: bool) -> int:
    """How many keys a tile of few rows meets."""
    return min(tk, spec.left + spec.right + 1 + _ROWS) if bounded and spec.left >= 0 and spec.right >= 0 else tk


def blocks(group: Group, spec: Spec, held: int) -> Iterator[Tile]:
    """The tiles of a group; each pair of places holds ``held`` values."""
    tq, tk = group.queries, group.keys
    bounded = not isinstance(group.shift, Tensor)
    size = max(_ROWS, _HELD // max(1, held * _reach(tk, spec, bounded)))
    if bounded and spec.left >= 0 and spec.right >= 0:
        size = min(size, max(_ROWS, spec.left + spec.right + 1))
    elif bounded and (spec.left >= 0 or spec.right >= 0):
        size = min(size, max(_ROWS, -(-tq // 4)))
    yield from cut(group, spec, size)


def cut(group: Group, spec: Spec, size: int) -> Iterator[Tile]:
    """The tiles of a group, of ``size`` queries each, with the keys that their window reaches."""
    tq, tk, shift = group.queries, group.keys, group.shift
    bounded = not isinstance(shift, Tensor)
    for begin in range(0, tq, size):
        rows = slice(begin, min(begin + size, tq))
        first, last = 0, tk
        if bounded and spec.left >= 0:
            first = min(max(rows.start + shift - spec.left, 0), tk)
        if bounded and spec.right >= 0:
            last = max(min(rows.stop + shift + spec.right, tk), first)
        yield group.tile(rows, slice(first, last))


def of_tile(spec: Spec, tile: Tile) -> tuple[Spec, dict[str, tuple[Any, ...]]]:
    """The spec of a tile alone, and for every tensor of it the index in the whole."""
    everything = slice(None)
    at: dict[str, tuple[Any, ...]] = {}
    for name in ("mask", "bias"):
        tensor = getattr(spec, name)
        if tensor is not None:
            own = (tile.batch, everything, tile.rows, tile.keys)
            at[name] = tuple(everything if n == 1 else place for n, place in zip(tensor.shape, own, strict=True))
    for name in ("slopes", "blocks"):
        tensor = getattr(spec, name)
        if tensor is not None:
            at[name] = (everything if tensor.shape[0] == 1 else tile.batch,)
    for name in ("q_lengths", "k_lengths"):
        if getattr(spec, name) is not None:
            at[name] = (tile.batch,)
    if spec.relative_q is not None:
        at["relative_q"] = tile.q
    zeros = {}
    for name in ("relative_bias", "relative_k"):
        tensor = getattr(spec, name)
        if tensor is not None:
            zero = getattr(spec, f"{name}_zero")
            reached = _reached(tensor.shape[1], zero, tile)
            at[name], zeros[f"{name}_zero"] = (everything, reached), zero - reached.start
    own_tensors = {name: getattr(spec, name)[index] for name, index in at.items()}
    return spec._replace(cu_q=None, cu_k=None, **own_tensors, **zeros), at


def _reached(length: int, zero: int, tile: Tile) -> slice:
    """The entries of a table of distances that a tile may read."""
    if isinstance(tile.shift, Tensor):
        return slice(0, length)
    first = tile.keys.start - (tile.rows.stop - 1 + tile.shift) + zero
    last = tile.keys.stop - 1 - (tile.rows.start + tile.shift) + zero
    first = min(max(first, 0), length)
    return slice(first, max(min(last + 1, length), first))


class _Places:
    """Where the queries and keys of a tile stand; formed if asked for."""

    def __init__(self, tile: Tile, device: torch.device) -> None:
        self.i = torch.arange(tile.rows.start, tile.rows.stop, device=device)[:, None]  # [R, 1]
        self.j = torch.arange(tile.keys.start, tile.keys.stop, device=device)  # [C]
        self._shift = tile.shift
        self._distance: Tensor | None = None

    @property
    def distance(self) -> Tensor:
        """j - p: [b or 1, 1, R, C]."""
        if self._distance is None:
            distance = self.j - (self.i + self._shift)
            self._distance = distance if distance.dim() == 4 else distance[None, None]
        return self._distance


def _hidden(own: Spec, at: _Places) -> Tensor | None:
    """True where a key is hidden: broadcastable to [b, Hq, R, C]; None: nowhere."""
    layers = []
    if own.mask is not None:
        layers.append(~own.mask)
    if own.left >= 0:
        layers.append(at.distance < -own.left)
    if own.right >= 0:
        layers.append(at.distance > own.right)
    if own.q_lengths is not None:
        layers.append(at.i >= own.q_lengths[:, None, None, None])
    if own.k_lengths is not None:
        layers.append(at.j >= own.k_lengths[:, None, None, None])
    if own.blocks is not None:
        layers.append(~own.blocks[:, :, (at.i[:, 0] // own.block_size)[:, None], at.j // own.block_size])
    hidden = None
    for layer in layers:
        hidden = layer if hidden is None else hidden | layer
    return hidden


def _biases(own: Spec, at: _Places, dtype: torch.dtype) -> Tensor | None:
    """What joins the capped product: broadcastable to [b, Hq, R, C]; None: nothing."""
    terms = []
    if own.bias is not None:
        terms.append(own.bias.to(dtype))
    if own.slopes is not None:
        terms.append(-own.slopes.to(dtype)[:, :, None, None] * at.distance.abs())
    if own.relative_bias is not None:
        terms.append(_along(own.relative_bias.to(dtype)[None, :, None], at.distance + own.relative_bias_zero))
    total = None
    for term in terms:
        total = term if total is None else total + term
    return total


def added(own: Spec, tile: Tile, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """The same, -inf where a key is hidden."""
    at = _Places(tile, device)
    total, hidden = _biases(own, at, dtype), _hidden(own, at)
    if hidden is None:
        return total
    return torch.where(hidden, -torch.inf, torch.zeros((), dtype=dtype, device=device) if total is None else total)


def _along(table: Tensor, index: Tensor) -> Tensor:
    """table[.., index] along the last dimension, 0 where the index is outside: table [.., R or 1, L], index [.., R, C]."""
    inside = (index >= 0) & (index < table.shape[-1])
    shape = torch.broadcast_shapes(table.shape[:-1], index.shape[:-1])
    if table.shape[-1] == 0:
        return table.sum(-1, keepdim=True).expand(*shape, index.shape[-1])
    picked = table.expand(*shape, -1).gather(-1, index.clamp(0, table.shape[-1] - 1).expand(*shape, -1))
    return torch.where(inside, picked, 0)


def _across(x: Tensor, index: Tensor, length: int) -> Tensor:
    """The transpose of ``_along``: [.., R, length] from x [.., R, C]; keys of a row differ in their index, unless outside."""
    x = torch.where((index >= 0) & (index < length), x, 0)
    if length == 0:
        return x.new_zeros(*x.shape[:-1], 0)
    return x.new_zeros(*x.shape[:-1], length).scatter_add_(-1, index.clamp(0, length - 1).expand_as(x), x)


def _grouped(q: Tensor, k: Tensor) -> Tensor:
    """q k^T: [b, Hq, R, C] from [b, Hq, R, E] and [b, Hkv, C, E]."""
    b, hq, r, e = q.shape
    hkv, c = k.shape[1], k.shape[2]
    return (q.reshape(b, hkv, hq // max(hkv, 1) * r, e) @ k.mT).reshape(b, hq, r, c)


def _grouped_sum(w: Tensor, x: Tensor, heads: int) -> Tensor:
    """w^T x, summed over the rows of a group: [b, Hkv, C, n] from [b, Hq, R, C] and [b, Hq, R, n]."""
    b, hq, r, c = w.shape
    rows = hq // max(heads, 1) * r
    return w.reshape(b, heads, rows, c).mT @ x.reshape(b, heads, rows, x.shape[-1])


def _weighted(w: Tensor, v: Tensor) -> Tensor:
    """w v: [b, Hq, R, Ev] from [b, Hq, R, C] and [b, Hkv, C, Ev]."""
    return _grouped(w, v.mT)


def _scores(q: Tensor, k: Tensor, own: Spec, tile: Tile) -> tuple[Tensor, Tensor | None]:
    """s of a tile, [b, Hq, R, C], from its parts, in their dtype, that of accumulation; and the tanh of the softcap."""
    at = _Places(tile, q.device)
    s = _grouped(q, k)
    if own.relative_q is not None and own.relative_k is not None:
        product = own.relative_q.to(s.dtype) @ own.relative_k.to(s.dtype).mT  # [b, Hq, R, M]
        s = s + _along(product, at.distance + own.relative_k_zero)
    s = s * own.scale
    capped = None
    if own.softcap:
        capped = torch.tanh(s / own.softcap)
        s = own.softcap * capped
    biases, hidden = _biases(own, at, s.dtype), _hidden(own, at)
    if biases is not None:
        s = s + biases
    return s if hidden is None else s.masked_fill(hidden, -torch.inf), capped


def _softmax(s: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """w and lse, [b, Hq, R]: 0 and -inf for a row without keys, with gradients of zero rather than NaN."""
    columns = s if sinks is None else torch.cat((s, sinks.to(s.dtype)[None, :, None, None].expand(*s.shape[:-1], 1)), -1)
    if columns.shape[-1] == 0:
        return s, s.new_full(s.shape[:-1], -torch.inf)
    highest = columns.detach().amax(-1, keepdim=True)
    dead = highest == -torch.inf
    base = highest.masked_fill(dead, 0)
    w = torch.exp(columns - base)
    total = torch.where(dead, 1, w.sum(-1, keepdim=True))
    lse = torch.where(dead, -torch.inf, torch.log(total) + base).squeeze(-1)
    return (w / total)[..., : s.shape[-1]], lse


def _weights(s: Tensor, lse: Tensor) -> Tensor:
    return torch.exp(s - torch.where(lse == -torch.inf, 0, lse)[..., None])


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10 (Salmon et al., 2011) as Triton's ``tl.philox(seed, c0, c1, c2, 0)``: four uint32 in int64 tensors."""
    low = 0xFFFFFFFF
    key = seed.reshape(()).to(torch.int64)
    k0, k1 = key & low, (key >> 32) & low
    c0, c1, c2 = torch.broadcast_tensors(c0 & low, c1 & low, c2 & low)
    c3 = torch.zeros_like(c0)

    def product(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """High and low 32 bits of a 64-bit product, by halves: int64 has no room for it."""
        a = constant & 0xFFFF
        b = constant >> 16
        first = a * x  # below 2^48, as is b * x
        upper = (first >> 16) + b * x
        return upper >> 16, ((upper & 0xFFFF) << 16) | (first & 0xFFFF)

    for _ in range(10):
        high_a, low_a = product(0xD2511F53, c0)
        high_b, low_b = product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def dropout_threshold(dropout: float) -> int:
    """A random 32-bit number below this drops a weight."""
    return min(int(dropout * 2**32), 2**32)


def _keep(spec: Spec, tile: Tile, heads: int) -> Tensor | None:
    """Which weights survive the dropout: [b, Hq, R, C]; None: all.

    Weight (b, h, i, j) is kept if philox(seed, j // 4, i, b Hq + h)[j % 4] >= dropout 2^32, so every backend drops the same ones;
    of a part of a larger attention with its places there.
    """
    if not spec.dropout or spec.seed is None:
        return None
    row, key, first_head, between = (0, 0, 0, heads) if spec.seed.numel() == 1 else spec.seed[1:].tolist()
    device, first, last = spec.seed.device, key + tile.keys.start, key + tile.keys.stop
    i = torch.arange(row + tile.rows.start, row + tile.rows.stop, device=device)[:, None]
    sequences = torch.arange(tile.batch.start, tile.batch.stop, device=device).view(-1, 1, 1, 1)
    which = first_head + sequences * between + torch.arange(heads, device=device).view(-1, 1, 1)
    quads = torch.arange(first // 4, -(-last // 4), device=device)
    skipped = first % 4
    random = torch.stack(philox(spec.seed.view(-1)[:1], quads, i, which), -1).flatten(-2)[..., skipped : skipped + last - first]
    return random >= dropout_threshold(spec.dropout)


def _dropped(w: Tensor, keep: Tensor | None, spec: Spec) -> Tensor:
    if keep is None:
        return w
    return torch.where(keep, w * (1 / (1 - spec.dropout) if spec.dropout < 1 else 0.0), 0)


def _valid(tensor: Any, lengths: Tensor | None) -> Any:
    """[B, H, T, ..] with zeros beyond the lengths, which may hold anything: 0 times that would be NaN."""
    if tensor is None or lengths is None:
        return tensor
    inside = torch.arange(tensor.shape[2], device=tensor.device) < lengths[:, None, None]  # [B, 1, T]
    return torch.where(inside if tensor.dim() == 3 else inside[..., None], tensor, 0)


def _clean(q: Tensor, k: Tensor, v: Any, spec: Spec) -> tuple[Tensor, Tensor, Any, Spec]:
    spec = spec._replace(relative_q=_valid(spec.relative_q, spec.q_lengths))
    return _valid(q, spec.q_lengths), _valid(k, spec.k_lengths), _valid(v, spec.k_lengths), spec


def _joined(pieces: list[tuple[Tile, Tensor]], dim: int) -> Tensor:
    """One tensor from those of all tiles, rows at ``dim``; packed ones keep a batch of 1."""
    packed = pieces[0][0].q[0] is None
    batches: dict[int, list[Tensor]] = {}
    for tile, piece in pieces:
        batches.setdefault(0 if packed else tile.batch.start, []).append(piece)
    return torch.cat([torch.cat(rows, dim) for rows in batches.values()])


def forward(q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """out as q with Ev features, in q's dtype; lse ``[B, Hq, Tq]`` or ``[Hq, N]`` in ``state_dtype``. Differentiable."""
    wide = state_dtype(q.dtype)
    q, k, v, spec = _clean(q, k, v, spec)
    outs, lses = [], []
    k_wide, v_wide = k.to(wide), v.to(wide)
    for tile in tiles(q, k, spec):
        own, _ = of_tile(spec, tile)
        s, _ = _scores(q[tile.q].to(wide), k_wide[tile.k], own, tile)
        w, lse = _softmax(s, spec.sinks)
        w = _dropped(w, _keep(spec, tile, s.shape[1]), spec)
        outs.append((tile, _weighted(w, v_wide[tile.k]).to(q.dtype)))
        lses.append((tile, lse))
    if not outs:
        return q.new_zeros(*q.shape[:-1], v.shape[-1]), q.new_zeros(q.shape[:-1], dtype=wide)
    out, lse = _joined(outs, 2), _joined(lses, 2)
    return (out, lse) if spec.cu_q is None else (out[0], lse[0])


def weights(q: Tensor, k: Tensor, lse: Tensor | None, spec: Spec, average: bool) -> Tensor:
    """The weights after dropout, ``[B, Hq, Tq, Tk]``, or averaged over the heads ``[B, Tq, Tk]``, in q's dtype. Padded only.

    Differentiable, but for ``lse``; without ``lse`` it is formed here and the weights have all their gradients.
    """
    wide = state_dtype(q.dtype)
    q, k, _, spec = _clean(q, k, None, spec)
    pieces = []
    k_wide, tk = k.to(wide), k.shape[2]
    for tile in tiles(q, k, spec):
        own, _ = of_tile(spec, tile)
        s, _ = _scores(q[tile.q].to(wide), k_wide[tile.k], own, tile)
        w = _softmax(s, spec.sinks)[0] if lse is None else _weights(s, lse[tile.q])
        w = _dropped(w, _keep(spec, tile, s.shape[1]), spec)
        w = (w.mean(1) if average else w).to(q.dtype)
        pieces.append((tile, torch.nn.functional.pad(w, (tile.keys.start, tk - tile.keys.stop))))
    if not pieces:
        return q.new_zeros((q.shape[0], q.shape[2], tk) if average else (*q.shape[:3], tk))
    return _joined(pieces, 1 if average else 2)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: Spec,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """The gradients of ``GRADIENTS``, each in its tensor's dtype; empty (0,) where not wanted.

    ``out`` and ``lse`` may come from elsewhere (a merge of several attentions over parts of the keys).
    """
    wide = lse.dtype
    q, k, v, spec = _clean(q, k, v, spec)
    dout, out, dlse = (_valid(t, spec.q_lengths) for t in (dout, out, dlse))
    grads = Gradients(q, k, v, spec, wanted)
    k_wide, v_wide = k.to(wide), v.to(wide)
    for tile in tiles(q, k, spec):
        d, v_tile = dout[tile.q].to(wide), v_wide[tile.k]
        delta = (d * out[tile.q].to(wide)).sum(-1)
        if dlse is not None:
            delta = delta - dlse[tile.q]

        def through(
            w: Tensor, keep: Tensor | None, tile: Tile = tile, d: Any = d, v_tile: Any = v_tile, delta: Any = delta
        ) -> Any:
            if wanted[2]:
                grads.add("v", _grouped_sum(_dropped(w, keep, spec), d, v_tile.shape[1]), tile.k)
            return w * (_dropped(_grouped(d, v_tile), keep, spec) - delta[..., None])

        _through_scores(grads, tile, q[tile.q], k_wide[tile.k], lse[tile.q], spec, through)
    return grads.results()


def weights_backward(
    dw: Tensor, q: Tensor, k: Tensor, lse: Tensor, spec: Spec, average: bool, wanted: list[bool]
) -> tuple[Tensor, ...]:
    """The gradients of ``GRADIENTS`` (v's empty), and delta_i = sum_j w_ij dw_ij: ``[B, Hq, Tq]``, whence that of the sinks."""
    wanted = [want and name != "v" for want, name in zip(wanted, GRADIENTS, strict=True)]
    q, k, _, spec = _clean(q, k, None, spec)
    dw = _valid(dw[:, None] / q.shape[1] if average else dw, spec.q_lengths)  # [B, 1 or Hq, Tq, Tk]
    dw = dw if spec.k_lengths is None else _valid(dw.mT, spec.k_lengths).mT
    grads = Gradients(q, k, q, spec, wanted)
    delta_all = torch.zeros_like(lse)
    k_wide = k.to(lse.dtype)
    for tile in tiles(q, k, spec):
        d = dw[tile.batch, :, tile.rows, tile.keys]

        def through(w: Tensor, keep: Tensor | None, tile: Tile = tile, d: Tensor = d) -> Tensor:
            d = _dropped(d.to(w.dtype).expand_as(w), keep, spec)
            delta = (w * d).sum(-1)
            delta_all[tile.q] = delta
            return w * (d - delta[..., None])

        # a softmax of their own: an lse may come of scores that were rounded otherwise
        _through_scores(grads, tile, q[tile.q], k_wide[tile.k], None, spec, through)
    return *grads.results(), delta_all


class Gradients:
    """Gradients in the dtype of accumulation, summed over tiles."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, spec: Spec, wanted: list[bool]) -> None:
        given = {"q": q, "k": k, "v": v, **{name: getattr(spec, name) for name in GRADIENTS[3:]}}
        self.given = {name: given[name] for name, want in zip(GRADIENTS, wanted, strict=True) if want}
        wide = state_dtype(q.dtype)
        self.sums = {name: torch.zeros(t.shape, dtype=wide, device=q.device) for name, t in self.given.items()}
        self.empty = q.new_empty(0)

    def add(self, name: str, grad: Tensor, at: tuple[Any, ...]) -> None:
        self.sums[name][at] += grad

    def results(self) -> tuple[Tensor, ...]:
        return tuple(self.sums[n].to(self.given[n].dtype) if n in self.given else self.empty for n in GRADIENTS)


def _through_scores(
    grads: Gradients,
    tile: Tile,
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    spec: Spec,
    through: Callable[[Tensor, Tensor | None], Tensor],
) -> None:
    """Gradients of a tile: ``through(w, keep)`` gives that of the scores, which goes on to all that shapes them."""
    own, at = of_tile(spec, tile)
    q = q.to(k.dtype)
    s, capped = _scores(q, k, own, tile)
    w = _softmax(s, spec.sinks)[0] if lse is None else _weights(s, lse)
    ds = through(w, _keep(spec, tile, q.shape[1]))
    places = _Places(tile, q.device)
    if own.bias is not None and "bias" in grads.given:
        grads.add("bias", ds.sum_to_size(own.bias.shape), at["bias"])
    if own.relative_bias is not None and "relative_bias" in grads.given:
        each = ds if places.distance.shape[0] > 1 else ds.sum(0, keepdim=True)
        table = _across(each, places.distance + own.relative_bias_zero, own.relative_bias.shape[1])
        grads.add("relative_bias", table.sum((0, 2)), at["relative_bias"])
    ds = ds * own.scale
    if capped is not None:
        ds = ds * (1 - capped * capped)
    if "q" in grads.given:
        grads.add("q", _weighted(ds, k), tile.q)
    if "k" in grads.given:
        grads.add("k", _grouped_sum(ds, q, k.shape[1]), tile.k)
    if own.relative_q is not None and own.relative_k is not None and {"relative_q", "relative_k"} & grads.given.keys():
        table = _across(ds, places.distance + own.relative_k_zero, own.relative_k.shape[1])  # [b, Hq, R, M]
        if "relative_q" in grads.given:
            grads.add("relative_q", table @ own.relative_k.to(ds.dtype), tile.q)
        if "relative_k" in grads.given:
            grads.add("relative_k", (table.mT @ own.relative_q.to(ds.dtype)).sum(0), at["relative_k"])
