"""Dates as people write them into those of ISO 8601, by character: encoder-decoders on torch's parts and on fastseq's.

    python examples/translate.py                             # GRUs with Luong's attention; a minute on a CPU
    python examples/translate.py --model seq2seq --attention bahdanau --cell lstm
    python examples/translate.py --model t5 --quick

Both start from the same weights and see the same batches: dates of 1950 to 2049 in five forms, drawn anew. The program
checks that their losses agree, then prints how many dates fastseq's says exactly, some of them, and the times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import dates
import torch
from side_by_side import compare, parser_of, plot, prepared, print_times, sides, train
from torch import Tensor, nn
from torch.nn import functional as F

from fastseq.models import T5
from fastseq.models.generation import greedy
from fastseq.models.seq2seq import CELLS, SCORES, Decoder, Encoder
from fastseq.models.transformer import EncoderDecoder

OF_SEQ2SEQ = {"attention": "general", "cell": "gru", "feeding": False}  # options, and what they are unless named


class Seq2Seq(nn.Module):
    """A recurrent encoder, both ways, and a decoder, with the calls that the others have."""

    def __init__(self, width: int, attention: str, cell: str, feeding: bool) -> None:
        super().__init__()
        self.encoder = Encoder(dates.WORDS, width // 2, width // 2, cell=cell)
        self.decoder = Decoder(dates.WORDS, width // 2, width, width, cell=cell, attention=attention, feeding=feeding)

    def start(self, source: Tensor, room: int, lengths: Tensor) -> Any:
        return self.decoder.start(*self.encoder(source, lengths), lengths)

    def forward(self, source: Tensor, target: Tensor, lengths: Tensor) -> Tensor:
        return self.decoder(target, self.start(source, target.shape[1], lengths))[0]

    def step(self, token: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.decoder.step(token, state)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "seq2seq": Seq2Seq,
    "transformer": lambda width: EncoderDecoder(dates.WORDS, width, 4, 2 * width, 2),
    "t5": lambda width: T5(dates.WORDS, width, 4, 2 * width, 2),
}


def loss_of(model: nn.Module, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy of the characters of the target and its end, in nats."""
    logits = model(source, dates.said_before(target), lengths)
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


@torch.no_grad()
def said(model: Any, source: Tensor, lengths: Tensor) -> Tensor:
    """What the model says without help, [B, 11]."""
    begin = torch.full_like(lengths, dates.BEGIN)
    return greedy(model.step, model.start(source, dates.SAID, lengths), begin, dates.SAID, end=dates.END)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, MODELS, "seq2seq")
    parser.add_argument("--attention", choices=tuple(SCORES), help="of seq2seq (default general)")
    parser.add_argument("--cell", choices=tuple(CELLS), help="of seq2seq (default gru)")
    parser.add_argument("--feeding", action="store_true", default=None, help="of seq2seq: what was said enters the next step")
    options = prepared(parser, arguments)
    own = {name: getattr(options, name) for name in OF_SEQ2SEQ}
    for name, value in own.items():
        if options.model != "seq2seq" and value is not None:
            parser.error(f"argument --{name}: goes with --model seq2seq, got --model {options.model}")
        own[name] = OF_SEQ2SEQ[name] if value is None else value
    if own["feeding"] and own["attention"] in ("none", "bahdanau"):
        parser.error(f"argument --feeding: goes with --attention dot, general or concat, got {own['attention']}")
    width, size = (32, 16) if options.quick else (64, 64)

    def given() -> Iterator[tuple[Tensor, ...]]:
        for batch in dates.batches(size, options.seed):
            yield tuple(t.to(options.device) for t in batch)

    model = MODELS[options.model](width, **(own if options.model == "seq2seq" else {})).to(options.device)
    models = sides(model)
    source, lengths, target = (t.to(options.device) for t in next(dates.batches(100 if options.quick else 500, -1)))

    @torch.no_grad()
    def test_loss(side: str) -> float:
        return loss_of(models[side], source, lengths, target).item()

    untrained = test_loss("fastseq")
    histories = train(models, given(), options.steps, loss_of, 2e-3 if options.model == "seq2seq" else 1e-3)
    compare(histories)
    losses = {side: test_loss(side) for side in ("torch.nn", "fastseq")}
    print(f"test loss: {untrained:.4f} untrained, torch.nn {losses['torch.nn']:.4f}, fastseq {losses['fastseq']:.4f} nats")
    assert losses["fastseq"] < untrained, "training did not help"
    print_times(histories)
    plot(histories, f"{options.model}: dates", "nats a character", options.plot)
    found = said(models["fastseq"], source, lengths)
    print(f"\nexact dates: {(found == target).all(1).double().mean().item():.3f} of {len(target)}")
    for row in range(5):
        print(f"  {dates.text_of(source[row, : lengths[row]]):24} {dates.text_of(found[row])}")


if __name__ == "__main__":
    main()
