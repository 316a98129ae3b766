"""The same modules for code that asks `isinstance(m, nn.LSTM)`.

Nothing but the bases differs: constructor, forward and state_dict are those of `fastseq.modules.recurrent`.
The price is torch.compile: Dynamo refuses to trace every subclass of nn.RNN, nn.LSTM and nn.GRU (it breaks
the graph there, and raises under fullgraph=True). The cells compile either way, and `MultiheadAttention` and
`TransformerEncoderLayer` are subclasses of torch's in any case.
"""

from torch import nn

from fastseq.modules import recurrent, recurrent_cells
from fastseq.modules._checks import public
from fastseq.modules.attention import MultiheadAttention
from fastseq.modules.transformer import TransformerEncoderLayer

__all__ = ["GRU", "GRUCell", "LSTM", "LSTMCell", "MultiheadAttention", "RNN", "RNNCell", "TransformerEncoderLayer"]


@public
class RNN(recurrent.RNN, nn.RNN):
    """`fastseq.RNN` that is also an `nn.RNN`."""


@public
class LSTM(recurrent.LSTM, nn.LSTM):
    """`fastseq.LSTM` that is also an `nn.LSTM`."""


@public
class GRU(recurrent.GRU, nn.GRU):
    """`fastseq.GRU` that is also an `nn.GRU`."""


@public
class RNNCell(recurrent_cells.RNNCell, nn.RNNCell):
    """`fastseq.RNNCell` that is also an `nn.RNNCell`."""


@public
class LSTMCell(recurrent_cells.LSTMCell, nn.LSTMCell):
    """`fastseq.LSTMCell` that is also an `nn.LSTMCell`."""


@public
class GRUCell(recurrent_cells.GRUCell, nn.GRUCell):
    """`fastseq.GRUCell` that is also an `nn.GRUCell`."""
