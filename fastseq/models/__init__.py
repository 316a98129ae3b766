"""The systems that articles on sequence models name: readable, on fastseq's public functions and modules, state in and out.

Of models whose classes have everyday names the modules are exported: ``seq2seq.Encoder``. ``generation`` decodes all that have a
``step`` of tokens.
"""

from . import alignment, blocks, generation, positions, seq2seq, transformer
from .bert import BERT
from .block_recurrent import BlockRecurrent
from .gpt import GPT
from .hybrid import Hybrid
from .linear_recurrent import LinearRecurrent
from .longformer import Longformer, WindowedAttention
from .memory import DNC, NTM
from .reformer import HashedAttention, Reformer
from .reversible import ReversibleBlock
from .t5 import T5
from .tcn import TCN
from .transformer_xl import TransformerXL
from .vit import ViT

__all__ = [
    "BERT",
    "DNC",
    "GPT",
    "NTM",
    "T5",
    "TCN",
    "BlockRecurrent",
    "HashedAttention",
    "Hybrid",
    "LinearRecurrent",
    "Longformer",
    "Reformer",
    "ReversibleBlock",
    "TransformerXL",
    "ViT",
    "WindowedAttention",
    "alignment",
    "blocks",
    "generation",
    "positions",
    "seq2seq",
    "transformer",
]
