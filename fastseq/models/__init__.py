"""The systems that articles on sequence models name: readable, on fastseq's public functions and modules, state in and out."""

from .block_recurrent import BlockRecurrent
from .hybrid import Hybrid
from .longformer import Longformer, WindowedAttention
from .memory import DNC, NTM
from .reformer import HashedAttention, Reformer
from .reversible import ReversibleBlock

__all__ = [
    "DNC",
    "NTM",
    "BlockRecurrent",
    "HashedAttention",
    "Hybrid",
    "Longformer",
    "Reformer",
    "ReversibleBlock",
    "WindowedAttention",
]
