"""Sequences beyond one device, on torch.distributed: a rank holds a part of every sequence.

``import fastseq.distributed``; ``import fastseq`` alone does not load it.
"""

from .attention import context_parallel_attention
from .context import context_parallel
from .recurrent import sum_gradients
from .sequence import positions, shard_sequence, unshard_sequence

__all__ = [
    "context_parallel",
    "context_parallel_attention",
    "positions",
    "shard_sequence",
    "sum_gradients",
    "unshard_sequence",
]
