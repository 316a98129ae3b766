"""In which order ranks run layers on micro-batches of their parts, when each part starts from what its neighbor's ended with."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple


class Job(NamedTuple):
    """A layer in one direction on one micro-batch of a rank's part."""

    layer: int
    micro_batch: int
    direction: int  # 1: from the last rank to the first


Round = tuple[Job | None, ...]  # of every rank


@cache
def rounds(ranks: int, layers: int, micro_batches: int, directions: int) -> tuple[Round, ...]:
    """What every rank does round by round; all ranks form the same table, so none has to ask.

    A job starts when, in rounds before, the neighbor upstream has done the same job and this rank the layer below on the
    micro-batch, in all directions. Those of a direction have the same order on all ranks, layer by layer, so a table is
    layers * micro_batches + ranks - 1 rounds long if all goes one way; a rank with a choice of two ways takes what is further
    behind, then what others wait for longer.
    """
    order = [(layer, micro) for layer in range(layers) for micro in range(micro_batches)]
    done: list[set[Job]] = [set() for _ in range(ranks)]
    following = [[0] * directions for _ in range(ranks)]
    table: list[Round] = []
    while any(place < len(order) for of_rank in following for place in of_rank):
        row: list[Job | None] = []
        for rank in range(ranks):
            ready = []
            for direction in range(directions):
                if following[rank][direction] == len(order):
                    continue
                layer, micro = order[following[rank][direction]]
                upstream = rank + 1 if direction else rank - 1
                from_there = not 0 <= upstream < ranks or Job(layer, micro, direction) in done[upstream]
                from_below = layer == 0 or all(Job(layer - 1, micro, way) in done[rank] for way in range(directions))
                if from_there and from_below:
                    still_to_go = rank if direction else ranks - 1 - rank
                    ready.append((layer, micro, -still_to_go, direction))
            layer, micro, _, direction = min(ready, default=(0, 0, 0, -1))
            row.append(Job(layer, micro, direction) if direction >= 0 else None)
        for rank, job in enumerate(row):
            if job is not None:
                done[rank].add(job)
                following[rank][job.direction] += 1
        table.append(tuple(row))
    return tuple(table)
