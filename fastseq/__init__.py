"""Fast kernels for sequence models: drop-in recurrent modules, and what sequential recurrence costs against parallel attention.

``import fastseq`` needs neither a GPU, nor Triton, nor the compiled library; ``python -m fastseq info`` tells what is there.
"""

from . import functional
from ._version import __version__
from .backends import explain, use_backend
from .convert import convert, patched, revert
from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, MultiheadAttention, RNNCell

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "MultiheadAttention",
    "RNNCell",
    "__version__",
    "convert",
    "explain",
    "functional",
    "patched",
    "revert",
    "use_backend",
]
