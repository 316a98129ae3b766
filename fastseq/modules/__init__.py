"""Drop-in modules. `fastseq.modules.keep_type` holds the same modules as subclasses of torch.nn's own
classes.
"""

from fastseq.modules.attention import MultiheadAttention
from fastseq.modules.linear_recurrent import HGRN, LRU, QRNN, RGLRU, MinGRU, MinGRUCell, MinLSTM
from fastseq.modules.recurrent import GRU, LSTM, RNN
from fastseq.modules.recurrent_cells import GRUCell, LSTMCell, RNNCell
from fastseq.modules.recurrent_variants import (
    SLSTM,
    CoupledLSTM,
    CoupledLSTMCell,
    LayerNormGRU,
    LayerNormGRUCell,
    LayerNormLSTM,
    LayerNormLSTMCell,
    PeepholeLSTM,
    PeepholeLSTMCell,
    SLSTMCell,
)
from fastseq.modules.transformer import TransformerEncoderLayer

__all__ = [
    "GRU",
    "HGRN",
    "LRU",
    "LSTM",
    "QRNN",
    "RGLRU",
    "RNN",
    "SLSTM",
    "CoupledLSTM",
    "CoupledLSTMCell",
    "GRUCell",
    "LSTMCell",
    "LayerNormGRU",
    "LayerNormGRUCell",
    "LayerNormLSTM",
    "LayerNormLSTMCell",
    "MinGRU",
    "MinGRUCell",
    "MinLSTM",
    "MultiheadAttention",
    "PeepholeLSTM",
    "PeepholeLSTMCell",
    "RNNCell",
    "SLSTMCell",
    "TransformerEncoderLayer",
]
