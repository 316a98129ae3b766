"""``with context_parallel(mesh): model(x)`` with the models of fastseq.models: what one process computes, or a refusal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq.distributed import context_parallel, shard_sequence, sum_gradients
from fastseq.functional import require_whole_sequence, sequence_places
from fastseq.models import (
    BERT,
    DNC,
    GPT,
    NTM,
    T5,
    TCN,
    BlockRecurrent,
    Hybrid,
    LinearRecurrent,
    Longformer,
    Reformer,
    TransformerXL,
    ViT,
    positions,
    seq2seq,
    transformer,
)

V, W, H, B = 7, 8, 2, 3  # words, width, heads, rows


def tokens(steps: int) -> Tensor:
    return torch.randint(V, (B, steps), generator=torch.Generator().manual_seed(steps))


def vectors(steps: int) -> Tensor:
    return torch.randn(B, steps, W, generator=torch.Generator().manual_seed(steps), dtype=torch.float64)


def lengths(steps: int) -> Tensor:
    return torch.tensor([steps, max(steps - 3, 1), max(steps // 2, 1)])


def translated(model: torch.nn.ModuleDict, source: Tensor, target: Tensor, of_source: Tensor) -> Tensor:
    state = model["decoder"].start(*model["encoder"](source, of_source), of_source)
    return model["decoder"](target, state)[0]


def pair(**options: Any) -> torch.nn.ModuleDict:
    encoder, decoder = seq2seq.Encoder(V, W, W), seq2seq.Decoder(V, W, W, 2 * W, **options)
    return torch.nn.ModuleDict({"encoder": encoder, "decoder": decoder})


# what is made, how it is called, what it is given (lengths are of the whole, the same on every rank), how sequences lie
Case = tuple[Callable[[], Any], Callable[..., Tensor], tuple[Callable[[int], Tensor], ...], str]
CASES: dict[str, Case] = {
    "gpt": (lambda: GPT(V, W, H, 2, 16), lambda m, x: m(x), (tokens,), "zigzag"),
    "transformer": (
        lambda: transformer.EncoderDecoder(V, W, H, 12, 2),
        lambda m, source, target, n: m(source, target, n),
        (tokens, tokens, lengths),
        "contiguous",
    ),
    "transformer, learned places": (
        lambda: transformer.EncoderDecoder(V, W, H, 12, 1, positions="learned", longest=16, norm="post"),
        lambda m, source, target, n: m(source, target, n),
        (tokens, tokens, lengths),
        "zigzag",
    ),
    "bert": (lambda: BERT(V, W, H, 1, 16), lambda m, x, n: m.words(m(x, n)), (tokens, lengths), "zigzag"),
    "t5": (
        lambda: T5(V, W, H, 12, 1, buckets=6, farthest=5),
        lambda m, source, target, n: m(source, target, n),
        (tokens, tokens, lengths),
        "zigzag",
    ),
    "hybrid": (lambda: Hybrid(W, H, 2), lambda m, x: m(x)[0], (vectors,), "contiguous"),
    "hybrid, both ways": (
        lambda: Hybrid(W, H, 1, causal=False),
        lambda m, x, n: m(x, lengths=n)[0],
        (vectors, lengths),
        "contiguous",
    ),
    "linear recurrent": (
        lambda: LinearRecurrent(W, 2),
        lambda m, x, n: m(x, lengths=n)[0],
        (vectors, lengths),
        "contiguous",
    ),
    "longformer": (lambda: Longformer(W, H, 1, window=4), lambda m, x, n: m(x, lengths=n), (vectors, lengths), "zigzag"),
    "seq2seq": (lambda: pair(attention="general"), translated, (tokens, tokens, lengths), "contiguous"),
}  # fmt: skip


def check(group: Any, name: str, steps: int) -> None:
    make, call, kinds, sharding = CASES[name]
    torch.manual_seed(0)
    model = make().double()
    twin = copy.deepcopy(model)
    counts = [steps, steps - 1 if kinds.count(tokens) > 1 else steps]  # a source and its target
    given = [kind(counts[min(place, 1)] if kind is not lengths else counts[0]) for place, kind in enumerate(kinds)]
    expected = call(model, *given)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    real = lengths(counts[0])[:, None] if lengths in kinds and kinds.count(tokens) < 2 else None
    if real is not None:  # what comes of padding is to be ignored
        weights = weights * (torch.arange(expected.shape[1]) < real)[..., None]
    (expected * weights).sum().backward()
    own = [
        t if kind is lengths else shard_sequence(t, group, dim=1, sharding=sharding) for t, kind in zip(given, kinds, strict=True)
    ]
    with context_parallel(group, sharding=sharding):  # type: ignore[arg-type]
        out = call(twin, *own)
        (out * shard_sequence(weights, group, dim=1, sharding=sharding)).sum().backward()  # type: ignore[arg-type]
    sum_gradients(twin, group)
    seen = shard_sequence((weights != 0).any(-1), group, dim=1, sharding=sharding)  # type: ignore[arg-type]
    whole = shard_sequence(expected, group, dim=1, sharding=sharding)  # type: ignore[arg-type]
    torch.testing.assert_close(out[seen], whole[seen], msg=lambda text: f"{name}, {steps} steps: {text}")
    for (of, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        one = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        two = torch.zeros_like(parameter) if other.grad is None else other.grad
        torch.testing.assert_close(two, one, msg=lambda text, of=of: f"{name}, {steps} steps, {of}: {text}")


def check_all(group: Any, steps: tuple[int, ...]) -> None:
    for name in CASES:
        for count in steps:
            check(group, name, count)


def test_models_are_what_they_are_in_one_process(ranks):
    ranks.run(check_all, (10,))
    ranks.run(check_all, (11, 3), size=4)  # some ranks have fewer steps, or none


def forgotten(group: Any) -> None:
    """Places that every rank counts from 0."""
    right = positions.sequence_places
    positions.sequence_places = lambda steps, device=None: (torch.arange(steps), steps)  # type: ignore[assignment]
    try:
        with pytest.raises(AssertionError, match="gpt, 10 steps"):
            check(group, "gpt", 10)
    finally:
        positions.sequence_places = right


def test_a_model_that_counts_from_0_on_every_rank_is_seen(ranks):
    ranks.run(forgotten)


def refusals(group: Any) -> None:
    torch.manual_seed(0)
    x, words = vectors(4).float(), tokens(4)
    model, decoder, bert = GPT(V, W, H, 1, 16), pair(attention="bahdanau"), BERT(V, W, H, 1)
    linear, hybrid, five = LinearRecurrent(W, 1), Hybrid(W, H, 1), T5(V, W, H, 12, 1)
    xl, state = TransformerXL(V, W, H, 12, 1, memory=3), five.start(words, 4)
    calls: dict[str, Callable[[], Any]] = {
        "bahdanau": lambda: translated(decoder, words, words, lengths(4)),
        "local hybrid": lambda: Hybrid(W, H, 1, local=3)(x),
        "state of a hybrid": lambda: hybrid(x, hybrid.initial_state(x)),
        "step of a hybrid": lambda: hybrid.step(x[:, 0]),
        "step of a stack": lambda: linear.step(x[:, 0]),
        "step of t5": lambda: five.step(words[:, 0], state),
        "step of gpt": lambda: model.step(words[:, 0], model.start(B, 4)),
        "transformer-xl": lambda: xl(words, xl.start(B)),
        "block-recurrent": lambda: BlockRecurrent(W, H, 1, block=2, states=2)(x),
        "reformer": lambda: Reformer(W, H, 1, chunk=2, buckets=2)(x),
        "longformer": lambda: Longformer(W, H, 1, window=4)(x, torch.zeros(B, 1, dtype=torch.int64)),
        "tcn": lambda: TCN(W, (W,), 2)(x),
        "ntm": lambda: NTM(W, W, W, cells=4, cell_size=3)(x),
        "dnc": lambda: DNC(W, W, W, cells=4, cell_size=3)(x),
        "vit": lambda: ViT(4, 2, 1, 3, W, H, 1)(torch.zeros(B, 1, 4, 4)),
        "first token": lambda: bert.pooled(x),
        "places": lambda: require_whole_sequence("my module"),
    }
    for name, call in calls.items():
        with pytest.raises((RuntimeError, ValueError), match="needs? whole sequences|a cache is not shared") as seen:
            with context_parallel(group), torch.no_grad():
                call()
        assert "rank" not in str(seen.value), name  # each says it of itself, before anything is exchanged
        with torch.no_grad():
            call()  # outside it is as ever


def test_what_cannot_be_cut_is_refused(ranks):
    ranks.run(refusals)


def places(group: Any) -> None:
    rank = torch.distributed.get_rank(group)
    found, total = sequence_places(3)
    assert found.tolist() == [0, 1, 2] and total == 3
    with context_parallel(group):
        found, total = sequence_places([5, 0, 2][rank])
        assert found.tolist() == [[0, 1, 2, 3, 4], [], [5, 6]][rank] and total == 7 and found.dtype == torch.int64
    with context_parallel(group, sharding="zigzag"):
        found, total = sequence_places([3, 3, 2][rank], device="cpu")
        assert found.tolist() == [[0, 1, 7], [2, 3, 6], [4, 5]][rank] and total == 8
    with pytest.raises(RuntimeError, match=r"in zigzag 9 steps are cut into parts of \[3, 3, 3\].* got \[4, 3, 2\]"):
        with context_parallel(group, sharding="zigzag"):
            sequence_places(4 - rank)
    with pytest.raises(ValueError, match="steps must not be negative, got -1"):
        sequence_places(-1)
    with pytest.raises(TypeError, match="steps"):
        sequence_places(2.0)


def test_places_of_a_part(ranks):
    ranks.run(places, size=3)
