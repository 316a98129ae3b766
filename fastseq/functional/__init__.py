"""Functional forms: check, default, lay out, call one op."""

from ._attention import attention, attention_grad, merge_attention
from ._attention_decode import attention_with_kv_cache
from ._linear_recurrent import linear_recurrent
from ._recurrent import gru, gru_cell, lstm, lstm_cell, recurrent, recurrent_cell, rnn, rnn_cell
from ._relative_position import t5_relative_bias, transformer_xl_attention
from ._scaled_dot_product import scaled_dot_product_attention
from ._scan import scan
from ._shared_sequence import require_whole_sequence, sequence_places

__all__ = [
    "attention",
    "attention_grad",
    "attention_with_kv_cache",
    "gru",
    "gru_cell",
    "linear_recurrent",
    "lstm",
    "lstm_cell",
    "merge_attention",
    "recurrent",
    "recurrent_cell",
    "require_whole_sequence",
    "rnn",
    "rnn_cell",
    "scaled_dot_product_attention",
    "scan",
    "sequence_places",
    "t5_relative_bias",
    "transformer_xl_attention",
]
