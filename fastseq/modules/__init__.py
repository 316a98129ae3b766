"""Drop-in modules. `fastseq.modules.keep_type` holds the same modules as subclasses of torch.nn's own
classes.
"""

from fastseq.modules.attention import MultiheadAttention
from fastseq.modules.recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

__all__ = ["GRU", "GRUCell", "LSTM", "LSTMCell", "MultiheadAttention", "RNN", "RNNCell"]
