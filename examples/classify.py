"""Which digit is it? Any model by name, on torch's parts and on fastseq's; recurrent ones read an image pixel by pixel.

    python examples/classify.py                              # a GRU on scikit-learn's digits; about a minute on a CPU
    python examples/classify.py --model vit --quick
    python examples/classify.py --data drawn                 # without scikit-learn: digits that the program draws

Both start from the same weights and see the same batches: images of 8 x 8 pixels from 0 to 16. The program checks that
their losses agree, then prints the share of test images that fastseq's names rightly, and the times.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence

import torch
from bodies import BODIES, JUMPING, Sizes, WithPlaces, blocks, output_of
from side_by_side import compare, parser_of, plot, prepared, print_times, sides, train
from torch import Tensor, nn
from torch.nn import functional as F

from fastseq.models import BERT, Hybrid, Longformer, Reformer, ViT
from fastseq.models.transformer import Encoder

SIDE, CLASSES, SHADES = 8, 10, 17
PIXELS = SIDE * SIDE
# Five rows of three pixels each.
SHAPES = ("111101101101111", "010110010010111", "111001111100111", "111001111001111", "101101111001001",
          "111100111001111", "111100111101111", "111001010010010", "111101111101111", "111101111001111")  # fmt: skip


class Pixels(nn.Module):
    """An image as a row of pixels: a causal body says at its last pixel what it was, one that sees all by the mean."""

    def __init__(self, s: Sizes, body: nn.Module, causal: bool) -> None:
        super().__init__()
        self.into, self.body, self.head, self.causal = nn.Linear(1, s.width), body, nn.Linear(s.width, CLASSES), causal

    def forward(self, images: Tensor) -> Tensor:
        """[B, 8, 8] -> scores [B, 10]."""
        y = output_of(self.body, self.into(images.flatten(1)[..., None] / 8 - 1))
        return self.head(y[:, -1] if self.causal else y.mean(1))


class OnLongformer(nn.Module):
    """Before the pixels stands a token that sees all of them, and they see a window."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.into, self.head = nn.Linear(1, s.width), nn.Linear(s.width, CLASSES)
        self.token = nn.Parameter(torch.zeros(1, 1, s.width))
        self.body = WithPlaces(Longformer(s.width, s.heads, s.layers, window=16, feedforward=2 * s.width))

    def forward(self, images: Tensor) -> Tensor:
        x = self.into(images.flatten(1)[..., None] / 8 - 1)
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1)
        return self.head(self.body(x, places=torch.zeros(len(x), 1, dtype=torch.int64, device=x.device))[:, 0])


class OnBERT(nn.Module):
    """Shades are words."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.bert, self.head = BERT(SHADES, s.width, s.heads, s.layers, PIXELS, inner=2 * s.width), nn.Linear(s.width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.bert(images.flatten(1).long()).mean(1))


class OnViT(nn.Module):
    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.vit = ViT(SIDE, 2, 1, CLASSES, s.width, s.heads, s.layers, inner=2 * s.width)

    def forward(self, images: Tensor) -> Tensor:
        return self.vit(images[:, None] / 8 - 1)


SEEING_ALL: dict[str, Callable[[Sizes], nn.Module]] = {
    "encoder": lambda s: WithPlaces(Encoder(blocks(s), nn.LayerNorm(s.width))),
    "hybrid": lambda s: Hybrid(s.width, s.heads, s.layers, causal=False, feedforward=2 * s.width),
    "reformer": lambda s: WithPlaces(
        Reformer(s.width, s.heads, s.layers, chunk=8, buckets=16, rounds=2, causal=False, feedforward=2 * s.width)
    ),
}
MODELS: dict[str, Callable[[Sizes], nn.Module]] = {
    **{name: lambda s, body=body: Pixels(s, body(s), True) for name, body in BODIES.items()},
    **{name: lambda s, body=body: Pixels(s, body(s), False) for name, body in SEEING_ALL.items()},
    "bert": OnBERT,
    "longformer": OnLongformer,
    "vit": OnViT,
}


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's: 1,797 images [N, 8, 8] of 0 to 16, written by 43 people, and what they are [N]."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32), torch.tensor(found.target, dtype=torch.int64)


def drawn() -> tuple[Tensor, Tensor]:
    """As many, drawn: one of ten shapes of 5 x 3 pixels, anywhere, darker or lighter, under noise."""
    generator = torch.Generator().manual_seed(0)
    count = 1797
    shapes = torch.tensor([[float(pixel) for pixel in shape] for shape in SHAPES]).view(CLASSES, 5, 3)
    target = torch.randint(CLASSES, (count,), generator=generator)
    images = torch.rand(count, SIDE, SIDE, generator=generator) * 4
    places = torch.stack([torch.randint(SIDE - n + 1, (count,), generator=generator) for n in shapes.shape[1:]], 1).tolist()
    shades = torch.rand(count, 1, 1, generator=generator) * 6 + 6
    for image, shape, (y, x) in zip(images, shapes[target] * shades, places, strict=True):
        image[y : y + 5, x : x + 3] += shape
    return images.round().clamp(max=SHADES - 1), target


DATA = {"digits": digits, "drawn": drawn}


def loss_of(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(model(images), target)


def batches(images: Tensor, target: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randint(len(images), (size,), generator=generator).to(images.device)
        yield images[rows], target[rows]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, MODELS, "gru")
    parser.add_argument(
        "--data", choices=tuple(DATA), default="digits", help="scikit-learn's digits (the default), or drawn ones"
    )
    options = prepared(parser, arguments)
    if options.data == "digits" and importlib.util.find_spec("sklearn") is None:
        parser.error("--data digits needs scikit-learn: pip install '.[examples]' (in the clone), or --data drawn")
    s, size = (Sizes(16, 2, 1, PIXELS), 8) if options.quick else (Sizes(64, 4, 2, PIXELS), 32)

    images, target = (t.to(options.device) for t in DATA[options.data]())
    split = len(images) * 4 // 5
    tested = slice(split, split + 64 if options.quick else None)
    models = sides(MODELS[options.model](s).to(options.device))

    @torch.no_grad()
    def tested_on(side: str) -> tuple[float, float]:
        """Loss, and the share of images that are named rightly."""
        scores = models[side](images[tested])
        return F.cross_entropy(scores, target[tested]).item(), (scores.argmax(-1) == target[tested]).double().mean().item()

    untrained, _ = tested_on("fastseq")
    histories = train(models, batches(images[:split], target[:split], size, options.seed), options.steps, loss_of, 2e-3)
    compare(histories, options.model in JUMPING)
    (theirs, _), (ours, right) = tested_on("torch.nn"), tested_on("fastseq")
    print(f"test loss: {untrained:.4f} untrained, torch.nn {theirs:.4f}, fastseq {ours:.4f} nats")
    assert ours < untrained, "training did not help"
    print_times(histories)
    plot(histories, f"{options.model}: {options.data}", "nats", options.plot)
    print(f"\nright: {right:.3f} of the test images")


if __name__ == "__main__":
    main()
