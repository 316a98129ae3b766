"""Sequences beyond one device, on torch.distributed: a rank holds a part of every sequence.

``import fastseq.distributed``; ``import fastseq`` alone does not load it.
"""

from .sequence import positions, shard_sequence, unshard_sequence

__all__ = [
    "positions",
    "shard_sequence",
    "unshard_sequence",
]
