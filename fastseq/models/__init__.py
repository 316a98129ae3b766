"""The systems that articles on sequence models name: readable, on fastseq's public functions and modules, state in and out."""

from .block_recurrent import BlockRecurrent
from .memory import DNC, NTM

__all__ = ["DNC", "NTM", "BlockRecurrent"]
