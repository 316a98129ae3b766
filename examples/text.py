"""A character language model on Jane Austen's Persuasion: any causal model by name, on torch's parts and on fastseq's.

    python examples/text.py                              # an LSTM; some minutes on a CPU
    python examples/text.py --model transformer_xl --quick

Both start from the same weights and see the same batches. The program checks that their losses agree, then prints
what fastseq's writes, character by character from the state that the last one left, and how much faster it trained.
Text: see data/README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from bodies import BODIES, JUMPING, Sizes, output_of
from side_by_side import compare, parser_of, plot, prepared, print_times, sides, train
from torch import Tensor, nn
from torch.nn import functional as F

from fastseq.models import DNC, GPT, NTM, TransformerXL

TEXT = Path(__file__).parent / "data" / "persuasion.txt"
State = Any


class OnVectors(nn.Module):
    """A body between an embedding and a head."""

    def __init__(self, characters: int, s: Sizes, body: nn.Module) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(characters, s.width), nn.Linear(s.width, characters)
        self.body = body

    def forward(self, characters: Tensor) -> Tensor:
        """[B, T] -> scores of the next character [B, T, V]."""
        return self.head(output_of(self.body, self.embedding(characters)))

    def begin(self, room: int) -> State:
        """The state of one row before its first character."""
        return None

    def read(self, characters: Tensor, state: State) -> tuple[Tensor, State]:
        """The next characters [1, T]: scores [1, T, V], and the state after them."""
        y, state = self.body(self.embedding(characters), state)
        return self.head(y), state


class Stateless(OnVectors):
    """A body that reads all again for each character: its state is what was written."""

    def read(self, characters: Tensor, state: State) -> tuple[Tensor, State]:
        written = characters if state is None else torch.cat((state, characters), 1)
        return self(written)[:, -characters.shape[1] :], written


class OnGPT(nn.Module):
    def __init__(self, characters: int, s: Sizes) -> None:
        super().__init__()
        self.gpt = GPT(characters, s.width, s.heads, s.layers, 1024, inner=2 * s.width)

    def forward(self, characters: Tensor) -> Tensor:
        return self.gpt(characters)

    def begin(self, room: int) -> State:
        return self.gpt.start(1, room)

    def read(self, characters: Tensor, state: State) -> tuple[Tensor, State]:
        return self.gpt.read(characters, state)


class OnTransformerXL(nn.Module):
    """In training a piece is two segments, of which the second sees the first as memory."""

    def __init__(self, characters: int, s: Sizes) -> None:
        super().__init__()
        self.xl = TransformerXL(characters, s.width, s.heads, 2 * s.width, s.layers, s.length // 2)

    def forward(self, characters: Tensor) -> Tensor:
        state, scores = self.xl.start(len(characters)), []
        for segment in characters.split(self.xl.memory, 1):
            of_segment, state = self.xl(segment, state)
            scores.append(of_segment)
        return torch.cat(scores, 1)

    def begin(self, room: int) -> State:
        return self.xl.start(1)

    def read(self, characters: Tensor, state: State) -> tuple[Tensor, State]:
        return self.xl(characters, state)


MODELS: dict[str, Callable[[int, Sizes], nn.Module]] = {
    **{name: lambda v, s, body=body: OnVectors(v, s, body(s)) for name, body in BODIES.items()},
    **{name: lambda v, s, body=BODIES[name]: Stateless(v, s, body(s)) for name in ("transformer", "reformer")},
    "ntm": lambda v, s: OnVectors(v, s, NTM(s.width, s.width, s.width, cells=s.width // 2)),
    "dnc": lambda v, s: OnVectors(v, s, DNC(s.width, s.width, s.width, cells=s.width // 2)),
    "gpt": OnGPT,
    "transformer_xl": OnTransformerXL,
}


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of the next character, in nats."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def batches(text: Tensor, length: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces [B, T] from random places, each with the same piece one character later."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(text) - length - 1, (size, 1), generator=generator)
        piece = text[(starts + torch.arange(length + 1)).to(text.device)]
        yield piece[:, :-1], piece[:, 1:]


@torch.no_grad()
def test_loss(model: nn.Module, text: Tensor, length: int, pieces: int) -> float:
    """Loss on text that was not trained on, up to so many pieces of it as a batch [B, T]."""
    count = min(len(text) // length, pieces)
    rows = text[: count * length].view(count, length)
    return loss_of(model, rows[:, :-1], rows[:, 1:]).item()


@torch.no_grad()
def write(model: Any, alphabet: str, start: str, count: int, seed: int) -> str:
    """`count` characters drawn from the model, one by one, each with the state that the last one left."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    written, state = list(start), model.begin(len(start) + count)
    inputs = torch.tensor([[alphabet.index(c) for c in start]], device=device)
    for _ in range(count):
        scores, state = model.read(inputs, state)
        chances = (scores[0, -1] / 0.7).softmax(-1).cpu()
        drawn = int(torch.multinomial(chances, 1, generator=generator))
        written.append(alphabet[drawn])
        inputs = torch.tensor([[drawn]], device=device)
    return "".join(written)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, MODELS, "lstm")
    options = prepared(parser, arguments)
    s, size = (Sizes(32, 2, 1, 32), 8) if options.quick else (Sizes(128, 4, 2, 64), 32)

    text = TEXT.read_text(encoding="utf-8")
    alphabet = "".join(sorted(set(text)))
    codes = torch.tensor([alphabet.index(c) for c in text], device=options.device)
    known, unknown = codes[: len(codes) * 9 // 10], codes[len(codes) * 9 // 10 :]

    models = sides(MODELS[options.model](len(alphabet), s).to(options.device))
    pieces = 40 if options.quick else 200
    untrained = test_loss(models["fastseq"], unknown, s.length, pieces)
    rate = 5e-3 if options.model in ("lstm", "gru", "rnn") else 2e-3
    histories = train(models, batches(known, s.length, size, options.seed), options.steps, loss_of, rate)
    compare(histories, options.model in JUMPING)
    losses = {side: test_loss(models[side], unknown, s.length, pieces) for side in ("torch.nn", "fastseq")}
    print(f"test loss: {untrained:.4f} untrained, torch.nn {losses['torch.nn']:.4f}, fastseq {losses['fastseq']:.4f} nats")
    assert losses["fastseq"] < untrained, "training did not help"
    print_times(histories)
    plot(histories, f"{options.model}: the next character", "nats", options.plot)
    sample = write(models["fastseq"].eval(), alphabet, "Anne ", 60 if options.quick else 400, options.seed)
    print(f"\nfastseq writes:\n{sample}")


if __name__ == "__main__":
    main()
