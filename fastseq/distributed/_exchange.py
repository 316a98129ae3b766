"""What ranks send one another: chunks that go round a ring while they are used, and pieces between any two.

All of it is point to point, posted in the same order by both sides, so that no message needs a tag (which NCCL has not).
Every byte is counted, also of the few collectives of other modules here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ._ranks import Ranks

MESSAGE = 1 << 22  # bytes; more at once is no faster, and a rank holds three of them
FEWEST = 512  # steps of a message, for the sake of kernels


@dataclass
class Traffic:
    """What this rank sent."""

    bytes: int = 0
    messages: int = 0


_traffic: ContextVar[Traffic | None] = ContextVar("fastseq_traffic", default=None)


@contextmanager
def counted() -> Iterator[Traffic]:
    """Counts what this rank sends within the block, forward and, in this thread, backward."""
    traffic = Traffic()
    token = _traffic.set(traffic)
    try:
        yield traffic
    finally:
        _traffic.reset(token)


def account(tensor: Tensor, receivers: int = 1) -> None:
    """Of a message, or of what a rank gives to a collective, which so many others get."""
    traffic = _traffic.get()
    if traffic is not None:
        traffic.bytes += receivers * tensor.numel() * tensor.element_size()
        traffic.messages += receivers


class Batch:
    """Messages that are posted together; empty ones are left out, by both sides."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._ops: list[dist.P2POp] = []
        self._works: list[Any] = []
        self._held: list[Tensor] = []

    def send(self, tensor: Tensor, to: int) -> None:
        if tensor.numel():
            tensor = tensor.contiguous()
            self._held.append(tensor)  # until it is sent
            self._ops.append(dist.P2POp(dist.isend, tensor, group=self.ranks.group, group_peer=to))
            account(tensor)

    def receive(self, into: Tensor, source: int) -> None:
        """``into`` is contiguous."""
        if into.numel():
            self._ops.append(dist.P2POp(dist.irecv, into, group=self.ranks.group, group_peer=source))

    def post(self) -> Batch:
        if self._ops:
            self._works = dist.batch_isend_irecv(self._ops)
        return self

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        self._ops, self._works, self._held = [], [], []


def swap(ranks: Ranks, outgoing: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """``outgoing[d]`` goes to rank d; what comes from rank s has ``shapes[s]``. A rank's own is given back as it is."""
    incoming = [
        out if rank == ranks.rank else out.new_empty(tuple(shape))
        for rank, (out, shape) in enumerate(zip(outgoing, shapes, strict=True))
    ]
    batch = Batch(ranks)
    for step in range(1, ranks.size):  # so that not all send to the same rank at once
        to, source = (ranks.rank + step) % ranks.size, (ranks.rank - step) % ranks.size
        batch.send(outgoing[to], to)
        batch.receive(incoming[source], source)
    batch.post().wait()
    return incoming


def trade(ranks: Ranks, outgoing: Tensor, to: int, shape: Sequence[int], source: int) -> Tensor:
    """``outgoing`` goes to one rank; what comes from another has ``shape``. A rank's own is given back as it is."""
    if to == source == ranks.rank:
        return outgoing
    incoming = outgoing.new_empty(tuple(shape))
    batch = Batch(ranks)
    batch.send(outgoing, to)
    batch.receive(incoming, source)
    batch.post().wait()
    return incoming


class Pair:
    """K and V of a chunk in one tensor, so that they travel as one message."""

    def __init__(self, flat: Tensor, k: Sequence[int], v: Sequence[int]) -> None:
        self.flat = flat
        size = torch.Size(k).numel()
        self.k, self.v = flat[:size].view(tuple(k)), flat[size:].view(tuple(v))

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> Pair:
        return cls(torch.cat((k.reshape(-1), v.reshape(-1))), k.shape, v.shape)


def once_round(
    ranks: Ranks,
    own: Pair,
    shapes: Callable[[int], tuple[Sequence[int], Sequence[int]]],
    last: Sequence[int],
    use: Callable[[int, Pair], Pair | None],
    returns: torch.dtype | None = None,
) -> Tensor | None:
    """One chunk of every rank goes round: hop h brings a rank that of rank - h, while it uses that of hop h - 1.

    Args:
        own: this rank's chunk.
        shapes: of the k and v of a rank's chunk.
        last: for each rank how many hops its chunk makes.
        use: called with the rank that a chunk is of and the chunk, hop by hop; what it gives back, if ``returns`` is a dtype,
            is added up from rank to rank, behind the chunk, and sent home from its last hop.

    Returns:
        what came home, in ``returns``; None: the chunk made no hop.
    """
    n, rank = ranks.size, ranks.rank
    before, after = (rank - 1) % n, (rank + 1) % n
    held: Pair | None = own
    returning = Batch(ranks)  # posted behind the last chunk that was used
    arriving: Tensor | None = None  # sums of the chunk that is used next, from the rank before
    home: Tensor | None = None
    for hop in range(max(last) + 1):
        source, coming = (rank - hop) % n, (rank - hop - 1) % n
        moving, incoming = Batch(ranks), None
        if held is not None and hop < last[source]:
            moving.send(held.flat, after)
        if hop < last[coming]:
            k, v = shapes(coming)
            incoming = Pair(own.flat.new_empty(torch.Size(k).numel() + torch.Size(v).numel()), k, v)
            moving.receive(incoming.flat, before)
        moving.post()
        result = use(source, held) if held is not None else None
        returning.wait()
        if returns is not None and hop:
            returning = Batch(ranks)
            if held is not None:
                sums = torch.zeros_like(held.flat, dtype=returns) if result is None else result.flat
                if arriving is not None:
                    sums += arriving
                returning.send(sums, after if hop < last[source] else source)
            arriving = None
            if incoming is not None:
                arriving = incoming.flat.new_empty(incoming.flat.shape, dtype=returns)
                returning.receive(arriving, before)
            if hop == last[rank]:
                home = own.flat.new_empty(own.flat.shape, dtype=returns)
                returning.receive(home, (rank + hop) % n)
            returning.post()
        moving.wait()
        held = incoming
    returning.wait()
    return home
