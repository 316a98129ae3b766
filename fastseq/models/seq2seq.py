"""Recurrent encoder-decoders: without attention, with Luong's, with Bahdanau's.

Letters: B batch, S source and T target tokens, V words, H hidden units of the decoder, M features of the memory: those of the D
directions of the encoder.

What differs from the papers (Sutskever et al., 2014; Bahdanau et al., 2015; Luong et al., 2015): "bahdanau" asks with the state
before the step, and its context enters the step, as published; its output is tanh of [s; c], not a maxout of them and the last
word. "concat" is the same score asked with the state after the step, Luong's order, which many programs call Bahdanau's. [s; c]
stand in this order, Luong's in the other. Without attention and bridge this is Sutskever's model; the caller reverses the source.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastseq
from fastseq.functional import require_whole_sequence

from ._configuration import check_choice, check_sizes, check_state
from .alignment import Alignment

__all__ = ["Decoder", "Encoder", "State"]

CELLS: dict[str, Callable[..., nn.Module]] = {"gru": fastseq.GRU, "lstm": fastseq.LSTM, "rnn": fastseq.RNN}
SCORES = {"none": None, "dot": "dot", "general": "general", "concat": "additive", "bahdanau": "additive"}


class State(NamedTuple):
    """What a step leaves to the next one."""

    hidden: tuple[Tensor, ...]  # h, of an LSTM also c, each [B, layers, H]
    fed: Tensor  # [B, H]: the vector that feeding gives to the next step; [B, 0] without feeding
    memory: Tensor  # [B, S, M]
    keys: Tensor  # [B, S, H]: what the scores see of the memory; [B, S, 0] without attention
    lengths: Tensor | None  # [B]


class Encoder(nn.Module):
    """Embeds the source and reads it; rows of different lengths need neither sorting nor packing.

    Args:
        words: V, size of the vocabulary.
        width: of the embedding.
        hidden: units of a direction; the memory has M = D * hidden features.
        cell: "gru", "lstm" or "rnn".
        layers: of the recurrence.
        bidirectional: whether it reads both ways.
        input_dropout: of the embedding, in training alone.
        layer_dropout: between layers, in training alone.
    """

    def __init__(
        self, words: int, width: int, hidden: int, *, cell: str = "gru", layers: int = 1, bidirectional: bool = True,
        input_dropout: float = 0.0, layer_dropout: float = 0.0
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(words=words, width=width, hidden=hidden, layers=layers)
        check_choice("cell", cell, tuple(CELLS))
        self.embedding, self.input_dropout = nn.Embedding(words, width), nn.Dropout(input_dropout)
        self.rnn = CELLS[cell](width, hidden, layers, batch_first=True, dropout=layer_dropout, bidirectional=bidirectional)

    def forward(self, source: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """source int [B, S], lengths [B]: memory [B, S, M], and the states at the rows' ends, [B, layers * D, hidden] each."""
        memory, last = self.rnn(self.input_dropout(self.embedding(source)), lengths=lengths)
        return memory, tuple(state.transpose(0, 1) for state in (last if isinstance(last, tuple) else (last,)))


class Decoder(nn.Module):
    """Says the target word by word. Unless something is fed back, all T steps are one call of the RNN and one of attention.

    Args:
        words: V, size of the vocabulary.
        width: of the embedding.
        hidden: units.
        memory: M, features of the encoder's output.
        cell: "gru", "lstm" or "rnn".
        layers: of the recurrence.
        attention: "none"; Luong's "dot" (s.h), "general" (s.W h) or "concat" (v.tanh(W s + U h)); or "bahdanau".
        feeding: the attentional vector enters the next step (Luong's input feeding).
        bridge: the state begins as tanh of a projection of the encoder's last h, in every layer, for h and c. False: with the
            encoder's states as they are, which then has one direction and this cell, layers and hidden units.
        input_dropout: of the embedding, in training alone.
        layer_dropout: between layers, in training alone.
        output_dropout: of the RNN's output and the context, before they are combined, in training alone.
    """

    def __init__(
        self, words: int, width: int, hidden: int, memory: int, *, cell: str = "gru", layers: int = 1, attention: str = "general",
        feeding: bool = False, bridge: bool = True,
        input_dropout: float = 0.0, layer_dropout: float = 0.0, output_dropout: float = 0.0
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(words=words, width=width, hidden=hidden, memory=memory, layers=layers)
        check_choice("cell", cell, tuple(CELLS))
        check_choice("attention", attention, tuple(SCORES))
        score = SCORES[attention]
        if feeding and attention in ("none", "bahdanau"):
            raise ValueError(f"feeding goes with attention='dot', 'general' or 'concat', got attention={attention!r}")
        self.asks_before, self.feeding, self.sizes = attention == "bahdanau", feeding, (layers, hidden, memory)
        self.states = 2 if cell == "lstm" else 1
        self.embedding = nn.Embedding(words, width)
        width += memory if self.asks_before else hidden if feeding else 0
        self.rnn = CELLS[cell](width, hidden, layers, batch_first=True, dropout=layer_dropout)
        self.bridge = nn.Linear(memory, hidden) if bridge else None
        self.alignment = Alignment(hidden, memory, score) if score else None
        self.combine = nn.Linear(hidden + memory, hidden) if score else None
        self.output = nn.Linear(hidden, words, bias=False)
        self.input_dropout, self.output_dropout = nn.Dropout(input_dropout), nn.Dropout(output_dropout)

    def start(self, memory: Tensor, states: tuple[Tensor, ...], lengths: Tensor | None = None) -> State:
        """The state before the first word, of what the encoder returned and the lengths that it was given."""
        layers, hidden, width = self.sizes
        check_state(memory, (None, None, width), self.output.weight, "memory")
        if self.bridge is not None:
            last = states[0][:, -(width // states[0].shape[2]) :].flatten(1)  # [B, M]: of the last layer, every direction
            states = (torch.tanh(self.bridge(last))[:, None].expand(-1, layers, -1),) * self.states
        keys = memory[..., :0] if self.alignment is None else self.alignment.keys(memory)
        state = State(tuple(states), memory.new_zeros(len(memory), hidden if self.feeding else 0), memory, keys, lengths)
        self._check(state, len(memory))
        return state

    def forward(self, target: Tensor, state: State) -> tuple[Tensor, State]:
        """target int [B, T], each the word before the one to be said: logits [B, T, V], and the state after the last."""
        if self.feeding or self.asks_before:
            require_whole_sequence("a loop over steps")
        self._check(state, target.shape[0])
        x, vectors = self.embedding(target), []
        for part in x.split(1, 1) if self.feeding or self.asks_before else (x,):
            vector, state = self._run(part, state)
            vectors.append(vector)
        return self.output(torch.cat(vectors, 1)), state

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """token int [B]: logits [B, V] of the one after it, and the state then."""
        require_whole_sequence("a step from a state")
        logits, state = self(token[:, None], state)
        return logits[:, 0], state

    def _run(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x [B, T, width]: vectors [B, T, H] that the output is of; T is 1 where something is fed back."""
        source, context = (state.keys, state.memory, state.lengths), None
        if self.alignment is not None and self.asks_before:
            context = self.alignment(state.hidden[0][:, -1:], *source)
            x = torch.cat([x, context], -1)
        elif self.feeding:
            x = torch.cat([x, state.fed[:, None]], -1)
        before = tuple(each.transpose(0, 1) for each in state.hidden)
        vector, after = self.rnn(self.input_dropout(x), before if self.states == 2 else before[0])
        if self.alignment is not None and self.combine is not None:
            context = self.alignment(vector, *source) if context is None else context
            vector = torch.tanh(self.combine(self.output_dropout(torch.cat([vector, context], -1))))
        hidden = tuple(each.transpose(0, 1) for each in (after if self.states == 2 else (after,)))
        return vector, state._replace(hidden=hidden, fed=vector[:, -1] if self.feeding else state.fed)

    def _check(self, state: State, batch: int) -> None:
        (layers, hidden, width), like, steps = self.sizes, self.output.weight, state.memory.shape[1]
        check_state(state.hidden, [(batch, layers, hidden)] * self.states, like, "state.hidden")
        check_state(state.fed, (batch, hidden if self.feeding else 0), like, "state.fed")
        check_state(state.memory, (batch, steps, width), like, "state.memory")
        check_state(state.keys, (batch, steps, hidden if self.alignment is not None else 0), like, "state.keys")
