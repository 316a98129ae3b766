"""What mypy says of the modules; `test_typing.py` runs it. `# E: ...` is the error of a line, `# R: ...` what it reveals."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import reveal_type

import fastseq
from fastseq.modules import keep_type


def constructors() -> None:
    fastseq.LSTM(8, 16)
    fastseq.LSTM(8, 16, 2, True, False, 0.1, True, 4, "cpu", torch.float32)
    fastseq.LSTM(8, 16, num_layers=2, bidirectional=True, zoneout=(0.1, 0.2), num_heads=4, recompute=True)
    fastseq.RNN(8, 16, 1, "relu", device="cpu")
    fastseq.PeepholeLSTM(8, 16, proj_size=4)
    keep_type.LSTM(8, 16, num_heads=2)
    fastseq.GRU(8, 16, num_heads=16, solver=fastseq.Newton(tolerance=1e-6, max_iterations=30, chunk=64, otherwise="raise"))
    fastseq.GRU(8, 16, num_heads=16, solver="newton")  # E: arg-type
    fastseq.Newton(chunk="64")  # E: arg-type
    fastseq.Newton(otherwise="rise")  # E: arg-type
    fastseq.LSTM("eight", 16)  # E: arg-type
    fastseq.LSTM(8, hidden_size="x")  # E: arg-type
    fastseq.LSTM(8, 16, foo=3)  # E: call-arg
    fastseq.LSTM(8, 16, heads=2)  # E: call-arg
    fastseq.LSTM(8)  # E: call-arg
    fastseq.GRU(8, 16, proj_size=4)  # E: call-arg
    fastseq.GRU(8, 16, zoneout=(0.1, 0.2))  # E: arg-type
    fastseq.SLSTM(8, 16, proj_size=4)  # E: call-arg
    fastseq.LSTMCell(8, "x")  # E: arg-type


def sequences(x: Tensor, packed: PackedSequence, states: tuple[Tensor, Tensor], either: bool) -> None:
    lstm, gru, slstm = fastseq.LSTM(8, 16), fastseq.GRU(8, 16), fastseq.SLSTM(8, 16)
    reveal_type(lstm(x))  # R: tuple[Tensor, tuple[Tensor, Tensor]]
    reveal_type(lstm(packed, states))  # R: tuple[PackedSequence, tuple[Tensor, Tensor]]
    reveal_type(lstm(x, return_cells=True))  # R: tuple[Tensor, tuple[Tensor, Tensor], Tensor]
    reveal_type(lstm(x, return_cells=either))  # R: Any
    reveal_type(lstm.forward(x, return_cells=False))  # R: tuple[Tensor, tuple[Tensor, Tensor]]
    reveal_type(fastseq.LayerNormLSTM(8, 16)(x, lengths=x)[1])  # R: tuple[Tensor, Tensor]
    reveal_type(keep_type.LSTM(8, 16)(x)[0])  # R: Tensor
    reveal_type(gru(packed))  # R: tuple[PackedSequence, Tensor]
    reveal_type(slstm(x)[1])  # R: tuple[Tensor, Tensor, Tensor, Tensor]
    gru(x, states)  # E: arg-type
    gru(x, None, x)  # E: call-arg


def cells(x: Tensor) -> None:
    reveal_type(fastseq.LSTMCell(8, 16)(x))  # R: tuple[Tensor, Tensor]
    reveal_type(fastseq.GRUCell(8, 16)(x))  # R: Tensor
    reveal_type(fastseq.PeepholeLSTMCell(8, 16)(x))  # R: tuple[Tensor, Tensor]
    reveal_type(fastseq.LayerNormGRUCell(8, 16)(x))  # R: Tensor


def attention(x: Tensor) -> None:
    mha = fastseq.MultiheadAttention(16, 4, batch_first=True)
    reveal_type(mha(x, x, x))  # R: tuple[Tensor, Tensor]
    reveal_type(mha(x, x, x, need_weights=False))  # R: tuple[Tensor, None]
    fastseq.MultiheadAttention(16, "four")  # E: arg-type
    mha(x, x, x, mask=x)  # E: call-overload
