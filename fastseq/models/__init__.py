"""The systems that articles on sequence models name: readable, on fastseq's public functions and modules, state in and out."""

from .block_recurrent import BlockRecurrent
from .hybrid import Hybrid
from .linear_recurrent import LinearRecurrent
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
    "LinearRecurrent",
    "Longformer",
    "Reformer",
    "ReversibleBlock",
    "WindowedAttention",
]
