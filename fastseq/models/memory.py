"""Networks with a memory that they write to and read from: NTM (Graves et al. 2014), DNC (Graves et al. 2016).

Letters: B batch, T time, I input, O output, H controller's units, N cells of memory of E features each, R read heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseq import LSTMCell
from fastseq.functional import require_whole_sequence

from ._configuration import check_input, check_sizes, check_state

__all__ = ["DNC", "NTM"]

State = tuple[Tensor, ...]
CLIP = 20.0  # of the controller's output
TINY = 1e-6  # beside norms and, in a DNC, usage; also what an NTM's memory begins with


def similar(memory: Tensor, keys: Tensor, strengths: Tensor) -> Tensor:
    """softmax over the cells of strength x cosine: ``[B, K, N]`` from ``[B, N, E]``, ``[B, K, E]``, ``[B, K]``."""
    norms = keys.norm(dim=-1)[..., None] * memory.norm(dim=-1)[:, None]
    return (strengths[..., None] * (keys @ memory.mT) / (norms + TINY)).softmax(-1)


class NTM(nn.Module):
    """Neural Turing Machine: an LSTM reads and writes a memory of ``cells`` rows, found by content and by shifting attention.

    In every step the LSTM sees the input and what was read last. Each head finds rows by content, keeps some of its last weights,
    shifts them by -1, 0 or 1 and sharpens them. One head writes (erases, then adds), after it the read heads read.

    What differs from the paper, which leaves all of this open: the write comes before the reads, keys and what is added pass
    through tanh, the controller's output is clipped to +-20, the memory begins constant, at 1e-6 (Collier and Beel 2018), heads
    begin at the first cell, 1e-6 stands beside norms and 1e-12 beside weights that are raised to a power.

    Args:
        input_size, hidden_size, output_size: I, H, O.
        cells: N.
        cell_size: E.
        heads: R, read heads.

    Raises:
        ValueError: if a size is not positive. TypeError: if it is no int.
    """

    def __init__(
        self, input_size: int, hidden_size: int, output_size: int, *, cells: int = 128, cell_size: int = 20, heads: int = 1
    ) -> None:
        super().__init__()
        check_sizes(input_size=input_size, hidden_size=hidden_size, output_size=output_size)
        check_sizes(cells=cells, cell_size=cell_size, heads=heads)
        self.input_size, self.hidden_size, self.cells, self.cell_size, self.heads = (
            input_size,
            hidden_size,
            cells,
            cell_size,
            heads,
        )
        self.controller = LSTMCell(input_size + heads * cell_size, hidden_size)
        # of each head, the writing one first: key, strength, gate, shifts -1 0 1, power; then what is erased and what is added
        self.interface = nn.Linear(hidden_size, (1 + heads) * (cell_size + 6) + 2 * cell_size)
        self.output = nn.Linear(hidden_size + heads * cell_size, output_size)

    def initial_state(self, x: Tensor) -> State:
        """What ``forward`` starts from without a state."""
        h, weights = x.new_zeros(len(x), self.hidden_size), x.new_zeros(len(x), 1 + self.heads, self.cells)
        memory = x.new_full((len(x), self.cells, self.cell_size), TINY)
        return h, h, memory, F.pad(weights[..., 1:], (1, 0), value=1.0), x.new_zeros(len(x), self.heads, self.cell_size)

    def step(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """y ``[B, O]`` from x ``[B, I]``, and the state after it: h, c ``[B, H]``, memory ``[B, N, E]``, weights
        ``[B, 1 + R, N]`` of the writing head and the reading ones, and what these read, ``[B, R, E]``.

        Raises:
            RuntimeError: if the input or the state is not of this model's sizes and one batch.
        """
        check_input(x, None, self.input_size)
        B, N, E, heads = len(x), self.cells, self.cell_size, 1 + self.heads
        state = self.initial_state(x) if state is None else state
        check_state(state, [(B, self.hidden_size)] * 2 + [(B, N, E), (B, heads, N), (B, self.heads, E)], x)
        h, c, memory, weights, read = state
        h, c = self.controller(torch.cat((x, read.flatten(1)), -1), (h, c))
        clipped = h.clamp(-CLIP, CLIP)
        of_heads, erased, added = self.interface(clipped).split((heads * (E + 6), E, E), -1)
        key, strength, gate, shift, power = of_heads.unflatten(-1, (heads, E + 6)).split((E, 1, 1, 3, 1), -1)
        arguments = key.tanh(), F.softplus(strength[..., 0]), gate.sigmoid(), shift.softmax(-1), 1 + F.softplus(power)
        writing = self._weights(memory, weights[:, :1], *(a[:, :1] for a in arguments))
        memory = memory * (1 - writing.mT * erased.sigmoid()[:, None]) + writing.mT * added.tanh()[:, None]
        reading = self._weights(memory, weights[:, 1:], *(a[:, 1:] for a in arguments))
        read = reading @ memory
        return self.output(torch.cat((clipped, read.flatten(1)), -1)), (h, c, memory, torch.cat((writing, reading), 1), read)

    @staticmethod
    def _weights(
        memory: Tensor, last: Tensor, key: Tensor, strength: Tensor, gate: Tensor, shift: Tensor, power: Tensor
    ) -> Tensor:
        """The heads' weights ``[B, K, N]`` from their last ones."""
        kept = gate * similar(memory, key, strength) + (1 - gate) * last
        shifted = sum(shift[..., n, None] * kept.roll(n - 1, -1) for n in range(3))
        sharp = (shifted + 1e-12) ** power
        return sharp / sharp.sum(-1, keepdim=True)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """``(y, state)``: y ``[B, T, O]`` from x ``[B, T, I]``, ``step`` after ``step``; state and errors as there.

        Rows of fewer steps are padded at the end, which their outputs do not see; the state is then that of the padded rows.
        """
        return stepped(self, x, state)


class DNC(nn.Module):
    """Differentiable Neural Computer: an NTM that knows which cells are free and in which order they were written.

    In every step one head writes, to free cells or by content, then R heads read: by content, or what was written before or after
    what they read last.

    What differs from the paper: strengths are softplus, not 1 + softplus; keys and what is written pass through tanh; the
    controller is one LSTM layer, whose output is clipped to +-20; usage is 1e-6 at least where cells are allocated, 1e-6 stands
    beside the product of norms; cells of equal usage are taken in order. All but the last as in the package dnc. Gradients
    pass through the sorted usages, not through their order, as in the paper.

    Args:
        input_size, hidden_size, output_size: I, H, O.
        cells: N.
        cell_size: E.
        heads: R, read heads.

    Raises:
        ValueError: if a size is not positive. TypeError: if it is no int.
    """

    def __init__(
        self, input_size: int, hidden_size: int, output_size: int, *, cells: int = 128, cell_size: int = 20, heads: int = 1
    ) -> None:
        super().__init__()
        check_sizes(input_size=input_size, hidden_size=hidden_size, output_size=output_size)
        check_sizes(cells=cells, cell_size=cell_size, heads=heads)
        self.input_size, self.hidden_size, self.cells, self.cell_size, self.heads = (
            input_size,
            hidden_size,
            cells,
            cell_size,
            heads,
        )
        self.controller = LSTMCell(input_size + heads * cell_size, hidden_size)
        # read keys, their strengths, write key, its strength, erased, added, free gates, allocation gate, write gate, read modes
        E, R = cell_size, heads
        self.parts = (R * E, R, E, 1, E, E, R, 1, 1, 3 * R)
        self.interface = nn.Linear(hidden_size, sum(self.parts))
        self.output = nn.Linear(hidden_size + R * E, output_size)

    def initial_state(self, x: Tensor) -> State:
        """What ``forward`` starts from without a state."""
        return tuple(x.new_zeros(shape) for shape in self._shapes(len(x)))

    def _shapes(self, B: int) -> list[tuple[int, ...]]:
        H, N, E, R = self.hidden_size, self.cells, self.cell_size, self.heads
        return [(B, H), (B, H), (B, N, E), (B, N), (B, N), (B, N, N), (B, N), (B, R, N), (B, R, E)]

    def step(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """y ``[B, O]`` from x ``[B, I]``, and the state after it: h, c ``[B, H]``, memory ``[B, N, E]``, usage and precedence
        ``[B, N]``, links ``[B, N, N]`` (row: written after column), weights of the write ``[B, N]`` and of the reads
        ``[B, R, N]``, and what these read, ``[B, R, E]``.

        Raises:
            RuntimeError: if the input or the state is not of this model's sizes and one batch.
        """
        check_input(x, None, self.input_size)
        state = self.initial_state(x) if state is None else state
        check_state(state, self._shapes(len(x)), x)
        h, c, memory, usage, precedence, links, writing, reading, read = state
        h, c = self.controller(torch.cat((x, read.flatten(1)), -1), (h, c))
        clipped = h.clamp(-CLIP, CLIP)
        keys, strengths, key, strength, erased, added, free, allocated, written, modes = self.interface(clipped).split(
            self.parts, -1
        )

        usage = (usage + writing - usage * writing) * (1 - free.sigmoid()[..., None] * reading).prod(1)
        content = similar(memory, key.tanh()[:, None], F.softplus(strength))[:, 0]
        part = allocated.sigmoid()
        writing = written.sigmoid() * (part * allocation(usage) + (1 - part) * content)
        memory = memory * (1 - writing[..., None] * erased.sigmoid()[:, None]) + writing[..., None] * added.tanh()[:, None]

        after, before = writing[..., None], writing[:, None]
        links = ((1 - after - before) * links + after * precedence[:, None]) * (1 - torch.eye(self.cells).to(x))
        precedence = (1 - writing.sum(-1, keepdim=True)) * precedence + writing
        content = similar(memory, keys.unflatten(-1, (self.heads, -1)).tanh(), F.softplus(strengths))
        backward, forward, by_content = modes.unflatten(-1, (self.heads, 3)).softmax(-1)[..., None].unbind(2)
        reading = backward * (reading @ links) + forward * (reading @ links.mT) + by_content * content
        read = reading @ memory
        state = h, c, memory, usage, precedence, links, writing, reading, read
        return self.output(torch.cat((clipped, read.flatten(1)), -1)), state

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """``(y, state)``: y ``[B, T, O]`` from x ``[B, T, I]``, ``step`` after ``step``; state and errors as there.

        Rows of fewer steps are padded at the end, which their outputs do not see; the state is then that of the padded rows.
        """
        return stepped(self, x, state)


def allocation(usage: Tensor) -> Tensor:
    """Weights ``[B, N]`` of the cells by how free they are: of the i-th freest (1 - its usage) x the usages before it."""
    usage, order = (TINY + (1 - TINY) * usage).sort(dim=-1, stable=True)
    used = F.pad(usage.cumprod(-1)[:, :-1], (1, 0), value=1.0)
    return ((1 - usage) * used).gather(-1, order.argsort(-1))


def stepped(model: NTM | DNC, x: Tensor, state: State | None) -> tuple[Tensor, State]:
    require_whole_sequence("a loop over steps")
    check_input(x, None, None, model.input_size)
    state, outputs = model.initial_state(x) if state is None else state, [x.new_zeros(len(x), 0, model.output.out_features)]
    for t in range(x.shape[1]):
        y, state = model.step(x[:, t], state)
        outputs.append(y[:, None])
    return torch.cat(outputs, 1), state
