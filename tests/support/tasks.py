"""Small tasks that a sequence model either learns or cannot: each batch is drawn anew, from a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

PAD, BEGIN, END, SYMBOLS = 0, 1, 2, 20  # of the reversal: symbols are 3 .. 22
WORDS = 3 + SYMBOLS


def reversals(rows: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Sources [B, 10] of 5 to 10 symbols, their lengths [B], targets [B, 11]: the same backwards, an end, padding."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        lengths = torch.randint(5, 11, (rows,), generator=generator)
        inside = torch.arange(10) < lengths[:, None]
        source = torch.randint(3, WORDS, (rows, 10), generator=generator) * inside
        places = lengths[:, None] - 1 - torch.arange(11)
        target = source.gather(1, places.clamp(min=0)).where(places >= 0, PAD)
        yield source, lengths, target.where(places != -1, END)


def said_after(target: Tensor) -> Tensor:
    """What a decoder reads while it says the target: one token earlier, an opening one first."""
    return torch.cat([torch.full_like(target[:, :1], BEGIN), target[:, :-1]], 1)


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD)


def exact(said: Tensor, target: Tensor) -> float:
    """The share of rows that are right up to and with their end."""
    return ((said == target) | (target == PAD)).all(1).double().mean().item()


def recall(rows: int, length: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens [B, 2 length]: one of 16 symbols (1 .. 16) somewhere in the first half, nothing else (0), and a question (17) at the
    very end; and the symbols [B] that it asks for."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        symbol = torch.randint(1, 17, (rows,), generator=generator)
        tokens = torch.zeros(rows, 2 * length, dtype=torch.int64)
        tokens[torch.arange(rows), torch.randint(length, (rows,), generator=generator)] = symbol
        tokens[:, -1] = 17
        yield tokens, symbol


def copies(rows: int, wait: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Ten of 8 symbols (1 .. 8), a wait, a sign (9): inputs one-hot [B, wait + 20, 10], and targets [B, wait + 20], which are
    silent (0) until the sign and then the ten. Silence alone costs 10 ln 8 / (wait + 20)."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        symbols = torch.randint(1, 9, (rows, 10), generator=generator)
        tokens = torch.zeros(rows, wait + 20, dtype=torch.int64)
        tokens[:, :10], tokens[:, wait + 9] = symbols, 9
        yield F.one_hot(tokens, 10).float(), torch.cat([torch.zeros(rows, wait + 10, dtype=torch.int64), symbols], 1)


def mean_loss(loss: Callable[[], Tensor], times: int) -> float:
    with torch.no_grad():
        return sum(loss().item() for _ in range(times)) / times
