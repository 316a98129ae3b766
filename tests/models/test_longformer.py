"""Longformer: against transformers and against a mask over all pairs, ragged rows, errors, and a needle out of the window."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracles import frozen
from oracles import longformer as oracle
from torch import nn

from fastseq.models import Longformer, WindowedAttention
from support import models as support

W, HEADS, T = 8, 2, 11


def joined(results, prefix, names):
    return torch.cat([results[f"{prefix}.{name}"] for name in names])


def as_theirs(named, layers):
    """Values by our names, by theirs."""
    found = {}
    for n in range(layers):
        for name, others in {
            "attention.query": ("attention.self.query",),
            "attention.key_value": ("attention.self.key", "attention.self.value"),
            "attention.query_global": ("attention.self.query_global",),
            "attention.key_value_global": ("attention.self.key_global", "attention.self.value_global"),
            "attention.out": ("attention.output.dense",),
            "attention_norm": ("attention.output.LayerNorm",),
            "up": ("intermediate.dense",),
            "down": ("output.dense",),
            "feedforward_norm": ("output.LayerNorm",),
        }.items():
            for kind in ("weight", "bias"):
                parts = named[f"blocks.{n}.{name}.{kind}"].chunk(len(others))
                found |= {f"layer.{n}.{other}.{kind}": part for other, part in zip(others, parts, strict=True)}
    return found


def test_parity_with_another_package():
    """Outputs, and gradients of input and weights: within its softmax in fp32."""
    results = frozen.read(oracle.__file__)
    options = {"window": oracle.WINDOW, "feedforward": oracle.INNER, "norm": "post"}
    model = Longformer(oracle.WIDTH, oracle.HEADS, oracle.DEPTH, **options).double()
    with torch.no_grad():
        for name, parameter in as_theirs(dict(model.named_parameters()), oracle.DEPTH).items():
            parameter.copy_(results["weights"][name])
    x, lengths = results["input"].requires_grad_(), torch.tensor(oracle.LENGTHS)
    y = model(x, torch.tensor(oracle.PLACES), lengths)
    y = y * (torch.arange(oracle.STEPS) < lengths[:, None])[..., None]
    torch.testing.assert_close(y, results["output"], rtol=0, atol=1e-6)
    frozen.weighted(y).backward()
    found = as_theirs({name: parameter.grad for name, parameter in model.named_parameters()}, oracle.DEPTH) | {"input": x.grad}
    torch.testing.assert_close(found, results["gradients"], rtol=1e-5, atol=1e-5)


def over_all_pairs(model, x, places, end):
    """One row x [T, W] with a mask of T x T, in plain PyTorch."""

    def split(y):
        return y.unflatten(-1, (HEADS, -1)).transpose(0, 1)

    chosen = [p for p in places if p >= 0]
    seen = (torch.arange(len(x))[:, None] - torch.arange(len(x))).abs() <= model.window // 2
    seen[:, chosen] = True
    seen[:, end:] = False
    k, v = (split(y) for y in model.key_value(x).chunk(2, -1))
    y = F.scaled_dot_product_attention(split(model.query(x)), k, v, seen)
    k, v = (split(y) for y in model.key_value_global(x)[:end].chunk(2, -1))
    told = F.scaled_dot_product_attention(split(model.query_global(x)), k, v)
    y = torch.stack([told[:, t] if t in chosen else y[:, t] for t in range(len(x))], 1)
    return model.out(y.transpose(0, 1).flatten(1))


@pytest.mark.parametrize("window", [2, 6, 40])
def test_against_a_mask_over_all_pairs(window):
    torch.manual_seed(0)
    model, x = WindowedAttention(W, HEADS, window).double(), torch.randn(3, T, W, dtype=torch.float64)
    nn.init.normal_(model.query_global.weight)
    nn.init.normal_(model.key_value_global.weight)
    places, lengths = torch.tensor([[0, 4, 10], [5, -1, 2], [-1, -1, -1]]), torch.tensor([11, 6, 9])
    y = model(x, places, lengths)
    for row in range(3):
        end = int(lengths[row])
        expected = over_all_pairs(model, x[row], places[row].tolist(), end)
        torch.testing.assert_close(y[row, :end], expected[:end])
        losses = [frozen.weighted(of[:end]) for of in (y[row], expected)]
        grads = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True) for loss in losses]
        for own, other in zip(*grads, strict=True):
            torch.testing.assert_close(own, torch.zeros_like(own) if other is None else other)
        torch.testing.assert_close(y[row, end:], model.out.bias.expand(T - end, -1))
    torch.testing.assert_close(model(x), model(x, torch.full((3, 2), -1)))


def test_rows_alone_and_in_another_order():
    torch.manual_seed(0)
    model = Longformer(W, HEADS, 2, window=(2, 4)).double()
    x, places, lengths = torch.randn(2, T, W, dtype=torch.float64), torch.tensor([[0, 3], [2, -1]]), torch.tensor([7, 11])
    y = model(x, places, lengths)
    torch.testing.assert_close(model(x[:1, :7], places[:1])[0], y[0, :7])
    torch.testing.assert_close(model(x[1:], places[1:, :1])[0], y[1])
    torch.testing.assert_close(model(x.flip(0), places.flip(0).flip(1), lengths.flip(0)), y.flip(0))


def test_begins_with_one_projection_for_both():
    model = WindowedAttention(W, HEADS, 2)
    assert torch.equal(model.query.weight, model.query_global.weight)
    assert torch.equal(model.key_value.bias, model.key_value_global.bias)


def test_dropouts_are_in_training_alone():
    x, places = torch.randn(2, T, W), torch.tensor([[0], [1]])
    for rates in ({"dropout": 0.5}, {"attention_dropout": 0.5}):
        model = Longformer(W, HEADS, 2, window=4, **rates)
        assert not torch.equal(model(x, places), model(x, places))
        model.eval()
        assert torch.equal(model(x, places), model(x, places))


@support.ON_COMPILERS
def test_compiled_without_a_break(compiler):
    model, places, lengths = Longformer(W, HEADS, 1, window=4).double(), torch.tensor([[0], [1]]), torch.tensor([7, 11])
    x = torch.randn(2, T, W, dtype=torch.float64)
    support.assert_compiles(lambda x: model(x, places, lengths), model, compiler, x)


fine, x = WindowedAttention(W, HEADS, 4), torch.randn(2, T, W)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: WindowedAttention(8, 3, 4), ValueError, r"heads must divide width \(8\), got 3"),
        (lambda: WindowedAttention(8, 2, 3), ValueError, "window must be even, half on each side, got 3"),
        (lambda: WindowedAttention(8, 2, (4, 4)), TypeError, r"window must be an int, got \(4, 4\)"),
        (lambda: WindowedAttention(8, 2, 4, attention_dropout=-1), ValueError, "attention_dropout must be"),
        (lambda: Longformer(8, 2, 2, window=(4,)), ValueError, "window must be an even int, or a tuple of 2"),
        (lambda: Longformer(8, 2, 2, window=4, norm="rms"), ValueError, "norm must be one of .*pre.*post.*'rms'"),
        (lambda: fine(torch.randn(T, W)), RuntimeError, r"the input must be \[any, any, 8\]"),
        (lambda: fine(x, torch.tensor([0, 1])), RuntimeError, r"places must be int64 \[2, G\] on cpu, got torch.int64 \[2\]"),
        (lambda: fine(x, torch.zeros(2, T, dtype=torch.bool)), RuntimeError, "places must be int64"),
        (lambda: fine(x, torch.tensor([[0], [T]])), RuntimeError, r"tokens of their row, \[11, 11\] each, none twice"),
        (lambda: fine(x, torch.tensor([[1, 1], [0, 1]])), RuntimeError, "none twice"),
        (lambda: fine(x, torch.tensor([[5], [5]]), torch.tensor([5, 11])), RuntimeError, r"\[5, 11\] each"),
        (lambda: fine(x, lengths=torch.tensor([5, 12])), RuntimeError, r"must lie in 0..11"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.slow
def test_a_global_token_finds_what_the_window_does_not():
    """One class token stands anywhere among 128; the first token, global or not, must say it."""
    classes, width = 16, 32

    def accuracy(is_global):
        torch.manual_seed(0)
        parts = nn.ModuleDict(
            {
                "embedding": nn.Embedding(2 * classes + 1, width),
                "model": Longformer(width, 2, 2, window=16, feedforward=64),
                "head": nn.Linear(width, classes),
            }
        )

        def run(rows):
            ids, target = torch.randint(classes, 2 * classes, (rows, 128)), torch.randint(classes, (rows,))
            ids[torch.arange(rows), torch.randint(40, 128, (rows,))] = target
            ids[:, 0] = 2 * classes
            places = torch.zeros(rows, 1, dtype=torch.int64) if is_global else None
            return parts["head"](parts["model"](parts["embedding"](ids), places)[:, 0]), target

        support.trained(parts, lambda: F.cross_entropy(*run(32)), 250, 2e-3)
        with torch.no_grad():
            logits, target = run(512)
        return (logits.argmax(-1) == target).float().mean().item()

    found = accuracy(True), accuracy(False)
    assert found[0] > 0.95 and found[1] < 0.12, found
