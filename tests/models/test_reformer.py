"""Reformer: against other packages and against all pairs, ragged rows, memory of the way back, errors, and what rounds buy."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from oracles import frozen
from oracles import reformer as oracle
from oracles import reversible as of_blocks
from torch import nn

from fastseq.models import HashedAttention, Reformer, ReversibleBlock
from fastseq.models.reversible import reversible
from support import models as support

W, HEADS, E = 8, 2, 4


@pytest.mark.parametrize("name", oracle.CASES)
def test_attention_parity_with_another_package(name):
    results, (rounds, causal) = frozen.read(oracle.__file__)[name], oracle.CASES[name]
    options = {"chunk": oracle.CHUNK, "buckets": oracle.BUCKETS, "rounds": rounds, "causal": causal}
    model = HashedAttention(W, HEADS, **options).double()
    model.out = nn.Identity()
    model.load_state_dict(results["weights"])
    x = results["input"].requires_grad_()
    y = model(x, results["rotations"])
    torch.testing.assert_close(y, results["output"], rtol=0, atol=1e-10)
    frozen.weighted(y).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()} | {"input": x.grad}
    torch.testing.assert_close(found, results["gradients"], rtol=1e-9, atol=1e-9)


def over_all_pairs(model, x, rotations):
    """One row x [T, W] in plain PyTorch, T x T scores of each round, without a chunk: who sees whom, how often."""
    T, M, R = len(x), model.chunk, model.rounds
    q, v = (part(x).view(T, HEADS, E) for part in (model.query_key, model.value))
    heads = []
    for h in range(HEADS):
        times = torch.zeros(R, T, T, dtype=x.dtype)
        chunks = []
        for r in range(R):
            turned = (q[:, h] @ rotations[h, :, r]).tolist()
            bucket = [max(range(model.buckets), key=lambda n, row=row: [*row, *(-z for z in row)][n]) for row in turned]
            order = sorted(range(T), key=lambda t, bucket=bucket: (bucket[t], t))
            chunks += [(r, order[start : start + M]) for start in range(0, T, M)]
        for n, (r, chunk) in enumerate(chunks):
            for i in chunk:
                for j in chunk + chunks[n - 1][1]:
                    times[r, i, j] += j < i if model.causal else j != i
        scores = q[:, h] @ (q[:, h] / (q[:, h].square().mean(-1, keepdim=True) + 1e-6).sqrt()).mT / math.sqrt(E)
        weights = times.sum(0) * scores.exp()
        alone = weights.sum(-1) == 0
        weights = torch.where(alone[:, None], torch.eye(T, dtype=x.dtype), weights)
        heads.append(weights / weights.sum(-1, keepdim=True) @ v[:, h])
    return model.out(torch.cat(heads, -1))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("rounds", "length"), [(1, 12), (1, 3), (2, 11), (3, 14), (2, 1)])
def test_against_all_pairs(rounds, length, causal):
    torch.manual_seed(length)
    model = HashedAttention(W, HEADS, chunk=4, buckets=6, rounds=rounds, causal=causal).double()
    x, rotations = torch.randn(2, length, W, dtype=torch.float64), model.rotations()
    y = model(x, rotations)
    expected = torch.stack([over_all_pairs(model, row, rotations) for row in x])
    torch.testing.assert_close(y, expected)
    grads = [torch.autograd.grad(frozen.weighted(of), list(model.parameters())) for of in (y, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("causal", [True, False])
def test_rows_alone_and_in_another_order(causal):
    torch.manual_seed(0)
    model = Reformer(W, HEADS, 2, chunk=4, buckets=4, rounds=2, causal=causal).double()
    x, lengths, rotations = torch.randn(4, 14, W, dtype=torch.float64), torch.tensor([5, 14, 0, 9]), model.rotations()
    y = model(x, rotations, lengths)
    for row, end in enumerate(lengths.tolist()):
        torch.testing.assert_close(model(x[row : row + 1, :end], rotations)[0], y[row, :end])
    torch.testing.assert_close(model(x.flip(0), rotations, lengths.flip(0)), y.flip(0))


def test_causal():
    """A token that is scaled keeps its bucket, and so the chunks: nothing before it changes."""
    torch.manual_seed(0)
    model = HashedAttention(W, HEADS, chunk=4, buckets=4, rounds=2).double()
    x, rotations = torch.randn(2, 12, W, dtype=torch.float64), model.rotations()
    other = x.clone()
    other[:, 7] *= 3
    y, changed = model(x, rotations), model(other, rotations)
    torch.testing.assert_close(changed[:, :7], y[:, :7])
    assert (changed[:, 7:] != y[:, 7:]).any()


def test_other_rotations_are_another_call():
    torch.manual_seed(0)
    model, x = HashedAttention(W, HEADS, chunk=4, buckets=4), torch.randn(1, 16, W)
    rotations = model.rotations()
    assert torch.equal(model(x, rotations), model(x, rotations)) and not torch.equal(model(x), model(x))


def test_reversible_parity_with_another_package():
    results = frozen.read(of_blocks.__file__)
    blocks = nn.ModuleList(ReversibleBlock(of_blocks.part(), of_blocks.part()) for _ in range(of_blocks.BLOCKS)).double()
    names = {name: name.replace(".f.", ".0.").replace(".g.", ".1.") for name, _ in blocks.named_parameters()}
    blocks.load_state_dict({name: results["weights"][other] for name, other in names.items()})
    x = results["input"].requires_grad_()
    y = torch.cat(reversible(blocks, *x.chunk(2, -1), [()] * of_blocks.BLOCKS), -1)
    torch.testing.assert_close(y, results["output"], rtol=0, atol=1e-14)
    frozen.weighted(y).backward()
    found = {names[name]: parameter.grad for name, parameter in blocks.named_parameters()} | {"input": x.grad}
    torch.testing.assert_close(found, results["gradients"], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("frozen_part", [False, True])
def test_the_way_back_is_that_of_the_plain_loop(frozen_part):
    torch.manual_seed(0)
    model = Reformer(W, HEADS, 3, chunk=4, buckets=4, rounds=2).double()
    if frozen_part:
        model.blocks[1].f.attention.value.weight.requires_grad_(False)
    x, rotations = torch.randn(2, 10, W, dtype=torch.float64, requires_grad=True), model.rotations()
    first = second = x
    for block, of_block in zip(model.blocks, rotations, strict=True):
        first, second = block(first, second, of_block, None)
    expected, y = model.norm((first + second) / 2), model(x, rotations)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    grads = [torch.autograd.grad(frozen.weighted(of), leaves) for of in (y, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)


def test_what_is_kept_does_not_grow_with_depth():
    def kept(depth):
        sizes = []
        model = Reformer(W, HEADS, depth, chunk=4, buckets=4)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(torch.randn(2, 16, W, requires_grad=True))
        return sum(sizes)

    assert kept(1) == kept(4)


def test_autocast_goes_back_in_the_precision_of_the_way_there():
    torch.manual_seed(0)
    model, x = Reformer(W, HEADS, 2, chunk=4, buckets=4), torch.randn(2, 12, W)
    rotations, parameters = model.rotations(), list(model.parameters())
    exact = torch.autograd.grad(model(x, rotations).square().sum(), parameters)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x, rotations)
    lowered = torch.autograd.grad(y.float().square().sum(), parameters)
    torch.testing.assert_close(lowered, exact, rtol=0.2, atol=2.0)
    assert any(not torch.equal(a, b) for a, b in zip(lowered, exact, strict=True))


@support.ON_COMPILERS
def test_compiled_without_a_break(compiler):
    model = Reformer(W, HEADS, 1, chunk=4, buckets=4, rounds=2).double()
    rotations, x = model.rotations(), torch.randn(2, 10, W, dtype=torch.float64)
    support.assert_compiles(lambda x: model(x, rotations), model, compiler, x)


fine, x = Reformer(W, HEADS, 2, chunk=4, buckets=4), torch.randn(2, 10, W)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: HashedAttention(8, 3, chunk=4, buckets=4), ValueError, r"heads must divide width \(8\), got 3"),
        (lambda: HashedAttention(8, 2, chunk=4, buckets=3), ValueError, "buckets must be even.* got 3"),
        (lambda: HashedAttention(8, 2, chunk=0, buckets=2), ValueError, "chunk must be"),
        (lambda: Reformer(8, 2, 1, chunk=4, buckets=4, rounds=1.5), TypeError, "rounds must be an int, got 1.5"),
        (lambda: Reformer(8, 2, 1, chunk=4, buckets=4, dropout=0.1), TypeError, "unexpected keyword argument 'dropout'"),
        (lambda: fine(torch.randn(2, 10, 4)), RuntimeError, r"the input must be \[any, any, 8\]"),
        (lambda: fine(x, fine.rotations()[:1]), RuntimeError, "rotations must be 2, one for each block, got 1"),
        (lambda: fine(x, [r[:, :, :, :1] for r in fine.rotations()]), RuntimeError, r"= \[2, 4, 1, 2\], got \[2, 4, 1, 1\]"),
        (lambda: fine(x, lengths=torch.tensor([3, 11])), RuntimeError, r"lengths must lie in 0..10, got \[3, 11\]"),
        (lambda: fine(x, lengths=torch.tensor([3])), RuntimeError, r"lengths must be an int64 Tensor \[2\]"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_rounds_beat_one():
    """Say a row of 31 symbols again: with four rounds all of it, with one not yet."""
    length, symbols, width = 31, 15, 64

    def accuracy(rounds):
        torch.manual_seed(0)
        parts = nn.ModuleDict(
            {
                "embedding": nn.Embedding(symbols + 1, width),
                "places": nn.Embedding(2 * length + 2, width),
                "model": Reformer(width, 4, 1, chunk=8, buckets=8, rounds=rounds),
                "head": nn.Linear(width, symbols),
            }
        )

        def run(rows):
            word = torch.randint(symbols, (rows, length))
            ids = F.pad(word, (1, 0), value=symbols).repeat(1, 2)
            y = parts["model"](parts["embedding"](ids) + parts["places"].weight)
            return parts["head"](y[:, length + 1 : -1]).flatten(0, 1), word.flatten()

        support.trained(parts, lambda: F.cross_entropy(*run(32)), 150, 2e-3)
        with torch.no_grad():
            logits, target = run(128)
        return (logits.argmax(-1) == target).float().mean().item()

    found = accuracy(4), accuracy(1)
    assert found[0] > 0.99 and found[1] < found[0] - 0.02, found
