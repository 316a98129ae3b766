"""What a run of queries and a run of keys have to do with one another: the calls of the op that they make.

Places are those in the whole: of padded sequences the step, of packed ones the row. A tensor of local rows holds a rank's runs
one after the other.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.types import Spec
from .sequence import Run

Index = tuple[Any, ...]


class Held(NamedTuple):
    """A run, and where it begins in the tensor that holds it."""

    begin: int
    end: int
    at: int

    @property
    def size(self) -> int:
        return self.end - self.begin

    def steps(self, begin: int, end: int) -> slice:
        """Where these of its steps lie in the tensor."""
        return slice(self.at + begin - self.begin, self.at + end - self.begin)


def held(runs: Sequence[Run], longest: int | None = None) -> list[Held]:
    """Runs that lie one after the other, in pieces of at most ``longest`` steps; none is empty."""
    found, at = [], 0
    for begin, end in runs:
        for first in range(begin, end, longest or max(end - begin, 1)):
            last = min(end, first + longest) if longest else end
            found.append(Held(first, last, at + first - begin))
        at += end - begin
    return found


class Part(NamedTuple):
    """One call of the op."""

    q: Index  # of q, out and lse without features
    k: Index  # of k and v
    spec: Spec
    alone: bool  # a packed sequence that is called as a padded one
    bias: Index | None  # of the bias, whose gradient this is
    relative_q: Index | None
    pairs: tuple[Run, Run, int]  # queries, keys, and the place of query 0 among them, for who counts


class Whole:
    """An attention as all ranks know it. ``spec`` is that of the whole, but mask, bias and relative_q hold this rank's rows."""

    def __init__(self, spec: Spec, tq: int, tk: int, batch: int, heads: int) -> None:
        self.spec, self.tq, self.tk, self.batch, self.heads = spec, tq, tk, batch, heads
        self.packed = spec.cu_q is not None and spec.cu_k is not None
        self.cu_q: list[int] = spec.cu_q.tolist() if spec.cu_q is not None else []
        self.cu_k: list[int] = spec.cu_k.tolist() if spec.cu_k is not None else []
        if self.packed:
            self.shifts = [self._shift(self._of(b, self.cu_q), self._of(b, self.cu_k)) for b in range(batch)]
        elif spec.bottom_right and (spec.q_lengths is not None or spec.k_lengths is not None):
            queries = [tq] * batch if spec.q_lengths is None else spec.q_lengths.tolist()
            keys = [tk] * batch if spec.k_lengths is None else spec.k_lengths.tolist()
            self.shifts = [self._shift(q, k) for q, k in zip(queries, keys, strict=True)]
        else:
            self.shifts = [self._shift(tq, tk)] * batch

    def _shift(self, queries: int, keys: int) -> int:
        return self.spec.offset + (keys - queries if self.spec.bottom_right else 0)

    def seed(self, row: int, key: int, sequence: int, head: int = 0) -> Tensor | None:
        """Of the dropout of a part that begins there."""
        seed = self.spec.seed
        if seed is None:
            return None
        return torch.cat((seed, seed.new_tensor([row, key, sequence * self.heads + head, self.heads])))

    @staticmethod
    def _of(b: int, cu: list[int]) -> int:
        return cu[b + 1] - cu[b]

    def reach(self, begin: int, end: int) -> Run:
        """The first and last key, places in the whole, that queries begin .. end may see by their window and sequence."""
        first, last = self.tk, 0
        if begin >= end:
            return 0, 0
        if not self.packed:
            for shift in set(self.shifts):
                low, high = self._seen(begin + shift, end - 1 + shift, self.tk)
                if low < high:
                    first, last = min(first, low), max(last, high)
            return (first, last) if first < last else (0, 0)
        for b in self._met(begin, end):
            shift = self.shifts[b]
            one, other = max(begin, self.cu_q[b]), min(end, self.cu_q[b + 1])
            if one < other:
                places = one - self.cu_q[b] + shift, other - 1 - self.cu_q[b] + shift
                low, high = self._seen(*places, self._of(b, self.cu_k))
                if low < high:
                    first, last = min(first, self.cu_k[b] + low), max(last, self.cu_k[b] + high)
        return (first, last) if first < last else (0, 0)

    def _met(self, begin: int, end: int) -> range:
        """The packed sequences that have some of these rows of the queries."""
        return range(bisect_right(self.cu_q, begin) - 1, bisect_left(self.cu_q, end))

    def _seen(self, first: int, last: int, keys: int) -> Run:
        """Of ``keys`` keys those that queries at places first .. last see."""
        low = 0 if self.spec.left < 0 else first - self.spec.left
        high = keys if self.spec.right < 0 else last + self.spec.right + 1
        return max(low, 0), min(high, keys)

    def parts(self, q: Held, k: Held) -> Iterator[Part]:
        """The calls for these queries and keys; none if no query sees a key."""
        low, high = self.reach(q.begin, q.end)
        if max(low, k.begin) < min(high, k.end):
            yield from self._packed(q, k) if self.packed else self._padded(q, k)

    def _padded(self, q: Held, k: Held) -> Iterator[Part]:
        b = 0
        while b < self.batch:
            same = next((i for i in range(b, self.batch) if self.shifts[i] != self.shifts[b]), self.batch)
            yield self._part(slice(b, same), (q.begin, q.end), (k.begin, k.end), q, k, 0, 0, self.shifts[b])
            b = same

    def _packed(self, q: Held, k: Held) -> Iterator[Part]:
        """Sequences side by side that stand alike in both runs are one call."""
        group: list[int] = []
        key: Any = None
        cut: list[tuple[Run, Run]] = []

        def call() -> Iterator[Part]:
            if group:
                yield self._sequences(group, cut, q, k)

        for b in self._met(q.begin, q.end):
            rows = max(q.begin, self.cu_q[b]), min(q.end, self.cu_q[b + 1])
            keys = max(k.begin, self.cu_k[b]), min(k.end, self.cu_k[b + 1])
            if rows[0] >= rows[1] or keys[0] >= keys[1]:
                continue
            first = rows[0] - self.cu_q[b], keys[0] - self.cu_k[b]
            own: tuple[int, ...] = (*first, self.shifts[b])
            if self.spec.blocks is not None and first != (0, 0):
                own = (*own, b)  # its blocks are cut: a call of its own
            if group and (group[-1] != b - 1 or key != own):
                yield from call()
                group, cut = [], []
            key = own
            group.append(b)
            cut.append((rows, keys))
        yield from call()

    def _sequences(self, group: list[int], cut: list[tuple[Run, Run]], q: Held, k: Held) -> Part:
        first, last = group[0], group[-1] + 1
        rows, keys = (cut[0][0][0], cut[-1][0][1]), (cut[0][1][0], cut[-1][1][1])
        begin_q, begin_k = self.cu_q[first], self.cu_k[first]
        if len(group) == 1:
            return self._part(slice(first, last), rows, keys, q, k, begin_q, begin_k, self.shifts[first])
        spec, row, key = self.spec, rows[0] - begin_q, keys[0] - begin_k
        at_q, at_k = (slice(None), q.steps(*rows)), (slice(None), k.steps(*keys))
        ends = [[run[1] - start for run in runs] for runs, start in zip(zip(*cut, strict=True), (rows[0], keys[0]), strict=True)]
        cu = [torch.tensor([0, *e], dtype=torch.int32, device=spec.cu_q.device) for e in ends]  # type: ignore[union-attr]
        longest = [max(run[1] - run[0] for run in runs) for runs in zip(*cut, strict=True)]
        blocks = spec.blocks
        if blocks is not None:
            blocks = blocks if blocks.shape[0] == 1 else blocks[first:last]
            blocks = blocks[:, :, : -(-longest[0] // spec.block_size), : -(-longest[1] // spec.block_size)]
        own = spec._replace(
            cu_q=cu[0],
            cu_k=cu[1],
            max_q=longest[0],
            max_k=longest[1],
            slopes=spec.slopes if spec.slopes is None or spec.slopes.shape[0] == 1 else spec.slopes[first:last],
            relative_q=None if spec.relative_q is None else spec.relative_q[at_q],
            blocks=blocks,
            sinks=None,
            seed=self.seed(row, key, first),
            bottom_right=False,
            offset=self.shifts[first] + row - key,
        )
        return Part(at_q, at_k, own, False, None, at_q, (rows, keys, own.offset))

    def _part(self, batch: slice, rows: Run, keys: Run, q: Held, k: Held, begin_q: int, begin_k: int, shift: int) -> Part:
        """Padded sequences, or a packed one (which begins at these rows of the whole) by itself."""
        spec = self.spec
        row, key = rows[0] - begin_q, keys[0] - begin_k
        every = slice(None)
        at_rows, at_keys = q.steps(*rows), k.steps(*keys)
        within = slice(key, key + keys[1] - keys[0])  # of a mask's keys
        at_q: Index = (every, at_rows) if self.packed else (batch, every, at_rows)
        at_k: Index = (every, at_keys) if self.packed else (batch, every, at_keys)
        changes: dict[str, Any] = {}
        at_bias = None
        for name in ("mask", "bias"):
            tensor = getattr(spec, name)
            if tensor is not None:
                own = (batch, every, at_rows, within)
                at = tuple(every if n == 1 else index for n, index in zip(tensor.shape, own, strict=True))
                changes[name] = tensor[at]
                if name == "bias":
                    at_bias = at
        for name, first, run in (("q_lengths", rows[0], rows), ("k_lengths", keys[0], keys)):
            tensor = getattr(spec, name)
            if tensor is not None:
                changes[name] = (tensor[batch] - first).clamp(0, run[1] - run[0])
        if spec.slopes is not None and spec.slopes.shape[0] > 1:
            changes["slopes"] = spec.slopes[batch]
        if spec.relative_q is not None:
            relative = spec.relative_q[at_q]
            changes["relative_q"] = relative[None] if self.packed else relative
        if spec.blocks is not None:
            changes |= _blocks_of(spec, batch, (row, key), rows, keys, changes.get("mask"))
        own_spec = spec._replace(
            **changes,
            cu_q=None,
            cu_k=None,
            max_q=0,
            max_k=0,
            sinks=None,
            seed=self.seed(row, key, batch.start),
            bottom_right=False,
            offset=shift + row - key,
        )
        return Part(at_q, at_k, own_spec, self.packed, at_bias, at_q, (rows, keys, own_spec.offset))


def _blocks_of(spec: Spec, batch: slice, place: tuple[int, int], rows: Run, keys: Run, mask: Tensor | None) -> dict[str, Any]:
    """A block layout's own part, as a mask where blocks are cut."""
    assert spec.blocks is not None
    size, (row, key) = spec.block_size, place
    blocks = spec.blocks if spec.blocks.shape[0] == 1 else spec.blocks[batch]
    ends = row + rows[1] - rows[0], key + keys[1] - keys[0]
    if row % size == 0 and key % size == 0:
        return {"blocks": blocks[:, :, row // size : -(-ends[0] // size), key // size : -(-ends[1] // size)]}
    at_rows, at_keys = (torch.arange(a, b, device=blocks.device) // size for a, b in zip(place, ends, strict=True))
    full = blocks[:, :, at_rows[:, None], at_keys]
    return {"blocks": None, "block_size": 0, "mask": full if mask is None else full & mask}
