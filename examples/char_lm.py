"""A character language model on Jane Austen's Persuasion, trained with torch.nn and with fastseq.

    python examples/char_lm.py                  # an LSTM; some minutes on a CPU
    python examples/char_lm.py --cell gru --quick

Both models start from the same weights and see the same batches. The program checks that their losses agree,
then prints what the converted model writes and how much faster it trained. Text: see data/README.md.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from side_by_side import compare, nudged, print_times, train
from torch import Tensor, nn
from torch.nn import functional as F

import fastseq

TEXT = Path(__file__).parent / "data" / "persuasion.txt"


class CharacterModel(nn.Module):
    """Scores for the next character: [T, B] -> [T, B, characters]."""

    def __init__(self, cell: str, characters: int, hidden: int):
        super().__init__()
        self.embedding = nn.Embedding(characters, 64)
        self.rnn = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[cell](64, hidden)
        self.head = nn.Linear(hidden, characters)

    def forward(self, characters: Tensor, state=None) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
        output, state = self.rnn(self.embedding(characters), state)
        return self.head(output), state


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of the next character, in nats."""
    return F.cross_entropy(model(inputs)[0].flatten(0, 1), targets.flatten())


def batches(text: Tensor, steps: int, length: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces [T, B] from random places, each with the same piece one character later."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(0, len(text) - length - 1, (size,), generator=generator)
        places = (torch.arange(length + 1).unsqueeze(1) + starts).to(text.device)
        piece = text[places]
        yield piece[:-1], piece[1:]


@torch.no_grad()
def test_loss(model: nn.Module, text: Tensor, length: int) -> float:
    """Loss on text that was not trained on, up to 200 pieces of it as a batch [T, B]."""
    model.eval()
    count = min(len(text) // length, 200)
    rows = text[: count * length].view(count, length).t()
    return loss_of(model, rows[:-1], rows[1:]).item()


@torch.no_grad()
def write(model: nn.Module, alphabet: str, start: str, count: int, seed: int) -> str:
    """`count` characters drawn from the model, one by one, each with the state that the last one left."""
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    written, state = list(start), None
    inputs = torch.tensor([[alphabet.index(c)] for c in start], device=device)
    for _ in range(count):
        scores, state = model(inputs, state)
        chances = (scores[-1, 0] / 0.7).softmax(-1).cpu()
        drawn = int(torch.multinomial(chances, 1, generator=generator))
        written.append(alphabet[drawn])
        inputs = torch.tensor([[drawn]], device=device)
    return "".join(written)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", choices=("lstm", "gru", "rnn"), default="lstm")
    parser.add_argument("--steps", type=int, help="training steps (default 300, quick 20)")
    parser.add_argument("--quick", action="store_true", help="a small model and few steps: some seconds")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cudnn.allow_tf32 = False  # fp32 against fp32, on a GPU too
    torch.manual_seed(options.seed)
    hidden, length, size = (64, 48, 8) if options.quick else (128, 64, 32)
    steps = options.steps or (20 if options.quick else 300)

    text = TEXT.read_text(encoding="utf-8")
    alphabet = "".join(sorted(set(text)))
    codes = torch.tensor([alphabet.index(c) for c in text], device=options.device)
    known, unknown = codes[: len(codes) * 9 // 10], codes[len(codes) * 9 // 10 :]

    model = CharacterModel(options.cell, len(alphabet), hidden).to(options.device)
    converted = copy.deepcopy(model)
    print(fastseq.convert(converted))
    untrained = test_loss(model, unknown, length)

    histories = train(
        {"torch.nn": model, "fastseq": converted, "nudged": nudged(model)},
        batches(known, steps, length, size, options.seed),
        loss_of,
        learning_rate=5e-3,
    )
    compare(histories)
    losses = [test_loss(trained, unknown, length) for trained in (model, converted)]
    print(f"test loss: {untrained:.4f} untrained, torch.nn {losses[0]:.4f}, fastseq {losses[1]:.4f} nats")
    assert losses[1] < untrained, "training did not help"
    print_times(histories)
    sample = write(converted, alphabet, "Anne ", 60 if options.quick else 400, options.seed)
    print(f"\nfastseq writes:\n{sample}")


if __name__ == "__main__":
    main()
