"""Fast kernels for sequence models: drop-in recurrent modules, and what sequential recurrence costs against parallel attention.

``import fastseq`` needs neither a GPU, nor Triton, nor the compiled library; ``python -m fastseq info`` tells what is there.
"""

from . import _log, functional
from ._convert import Report, convert, patched, revert
from ._pack import PackReport, pack, unpack
from ._version import __version__
from .backends import Explanation, explain, set_backend, use_backend
from .functional._solver import Newton
from .modules import (
    GRU,
    HGRN,
    LRU,
    LSTM,
    QRNN,
    RGLRU,
    RNN,
    SLSTM,
    CoupledLSTM,
    CoupledLSTMCell,
    GRUCell,
    LayerNormGRU,
    LayerNormGRUCell,
    LayerNormLSTM,
    LayerNormLSTMCell,
    LSTMCell,
    MinGRU,
    MinGRUCell,
    MinLSTM,
    MultiheadAttention,
    PeepholeLSTM,
    PeepholeLSTMCell,
    RNNCell,
    SLSTMCell,
    TransformerEncoderLayer,
)
from .tuning import TuneReport, first_meeting, tune

_log.show()
first_meeting.heed_environment()
del first_meeting

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
    "Explanation",
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
    "Newton",
    "PackReport",
    "PeepholeLSTM",
    "PeepholeLSTMCell",
    "RNNCell",
    "Report",
    "SLSTMCell",
    "TransformerEncoderLayer",
    "TuneReport",
    "__version__",
    "convert",
    "explain",
    "functional",
    "pack",
    "patched",
    "revert",
    "set_backend",
    "tune",
    "unpack",
    "use_backend",
]
