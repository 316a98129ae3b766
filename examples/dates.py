"""Dates as people write them and as machines do, character by character: "3 May 1997" and "1997-05-03"."""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
FIRST, LAST = datetime.date(1950, 1, 1).toordinal(), datetime.date(2049, 12, 31).toordinal()
FORMS: tuple[Callable[[datetime.date], str], ...] = (
    lambda d: f"{d.day} {MONTHS[d.month - 1]} {d.year}",
    lambda d: f"{MONTHS[d.month - 1]} {d.day}, {d.year}",
    lambda d: f"{DAYS[d.weekday()][:3]} {d.day} {MONTHS[d.month - 1][:3]} {d.year}",
    lambda d: f"{d.day:02}/{d.month:02}/{d.year}",
    lambda d: f"{d.day}.{d.month}.{d.year % 100:02}",  # of two digits those from 50 on are of the 20th century
)
PAD, BEGIN, END = 0, 1, 2
CHARACTERS = "".join(sorted(set(" ,./-0123456789" + "".join(MONTHS + DAYS))))  # 3 and on
WORDS = 3 + len(CHARACTERS)
SAID = 11  # characters of a target and its end


def coded(text: str) -> list[int]:
    return [3 + CHARACTERS.index(c) for c in text]


def text_of(tokens: Tensor) -> str:
    """What one row says before its end."""
    said = tokens.tolist()
    said = said[: said.index(END)] if END in said else said
    return "".join(CHARACTERS[token - 3] if token > END else "?" for token in said)


def tensors(sources: list[str]) -> tuple[Tensor, Tensor]:
    """int64 [B, S], padded, and their lengths [B]."""
    rows = [torch.tensor(coded(text)) for text in sources]
    return torch.nn.utils.rnn.pad_sequence(rows, True, PAD), torch.tensor([len(row) for row in rows])


def batches(rows: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Sources int64 [B, S] in any of the forms, their lengths [B], targets [B, 11]: the date by ISO 8601, and an end."""
    generator = random.Random(seed)
    while True:
        dates = [datetime.date.fromordinal(generator.randint(FIRST, LAST)) for _ in range(rows)]
        targets = torch.tensor([[*coded(date.isoformat()), END] for date in dates])
        yield *tensors([generator.choice(FORMS)(date) for date in dates]), targets


def said_before(target: Tensor) -> Tensor:
    """What a decoder reads while it says the target: one token earlier, an opening one first."""
    return torch.cat([torch.full_like(target[:, :1], BEGIN), target[:, :-1]], 1)
