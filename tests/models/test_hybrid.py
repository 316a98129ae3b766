"""Hybrid: against torch.nn's parts, its local GRU window by window, steps, ragged rows, errors, and text against both parents."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracles import frozen
from torch import nn

import fastseq
from fastseq.models import Hybrid
from support import models as support

W, HEADS, T = 8, 2, 9
KINDS = pytest.mark.parametrize("local", [None, 3, 1])


def made(local=None, **options):
    torch.manual_seed(0)
    return Hybrid(W, HEADS, 2, local=local, feedforward=12, **options).double()


def inputs(rows=3):
    return torch.randn(rows, T, W, dtype=torch.float64, requires_grad=True)


def by_torch(block, x, pre):
    """One row x [1, T, W] through a block, by torch.nn's LSTM (or GRU, over every window) and TransformerEncoderLayer."""
    if block.local:
        recurrent = nn.GRU(W, W, batch_first=True)
    else:
        recurrent = nn.LSTM(W, W if block.causal else W // 2, batch_first=True, bidirectional=not block.causal)
    layer = nn.TransformerEncoderLayer(W, HEADS, 12, 0.0, "gelu", batch_first=True, norm_first=pre)
    renamed = {
        "self_attn.in_proj_": "query_key_value.",
        "self_attn.out_proj.": "out.",
        "linear1.": "up.",
        "linear2.": "down.",
        "norm1.": "attention_norm.",
        "norm2.": "feedforward_norm.",
    }
    parameters = dict(block.named_parameters())
    of_layer = {ours + kind: parameters[theirs + kind] for ours, theirs in renamed.items() for kind in ("weight", "bias")}
    of_recurrent = {name: parameters[f"recurrent.{name}"] for name, _ in recurrent.named_parameters()}
    given = block.recurrent_norm(x) if pre else x
    if block.local:
        padded = F.pad(given, (0, 0, block.local - 1, 0))
        windows = [padded[:, t : t + block.local] for t in range(x.shape[1])]
        y = torch.stack([torch.func.functional_call(recurrent, of_recurrent, window)[1][0] for window in windows], 1)
    else:
        y = torch.func.functional_call(recurrent, of_recurrent, given)[0]
    x = x + y if pre else block.recurrent_norm(x + y)
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype) if block.causal else None
    return torch.func.functional_call(layer, of_layer, x, {"src_mask": mask, "is_causal": block.causal})


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize(("local", "causal"), [(None, True), (None, False), (3, True)])
def test_parity_with_torchs_parts(local, causal, norm):
    """Outputs and gradients of ragged rows, each row alone in torch's parts."""
    model, x, lengths = made(local, causal=causal, norm=norm), inputs(), torch.tensor([9, 4, 1])
    y, state = model(x, lengths=lengths)
    assert state is None
    rows = []
    for row, end in enumerate(lengths.tolist()):
        z = x[row : row + 1, :end]
        for block in model.blocks:
            z = by_torch(block, z, norm == "pre")
        rows.append(F.pad(model.norm(z)[0], (0, 0, 0, T - end)))
    expected = torch.stack(rows)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    leaves = [x, *model.parameters()]
    grads = [torch.autograd.grad(frozen.weighted(of), leaves) for of in (y, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)


@KINDS
def test_every_call_goes_on_where_the_last_one_ended(local):
    support.assert_steps_are_forward(made(local), inputs(2).detach())


@KINDS
def test_causal_and_rows_alone(local):
    support.assert_causal(made(local), inputs().detach())
    support.assert_rows_stand_alone(made(local), inputs().detach())


def test_dropouts_are_in_training_alone():
    for rates in ({"dropout": 0.5}, {"attention_dropout": 0.5}):
        model, x = made(**rates), inputs()
        assert not torch.equal(model(x)[0], model(x)[0])
        model.eval()
        assert torch.equal(model(x)[0], model(x)[0])


def test_its_recurrence_and_attention_are_fastseqs():
    said = str(fastseq.explain(made().float(), torch.randn(2, T, W)))
    assert "lstm" in said.lower() and "attention" in said.lower()


@support.ON_COMPILERS
@pytest.mark.parametrize("local", [None, 3])
def test_compiled_without_a_break(local, compiler):
    model = made(local)
    support.assert_compiles(lambda x: model(x)[0], model, compiler, torch.randn(2, T, W, dtype=torch.float64))


fine, both_ways, x = made().float(), made(causal=False).float(), torch.randn(2, T, W)
state = fine(x)[1]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Hybrid(8, 3, 1), ValueError, r"heads must divide width \(8\), got 3"),
        (lambda: Hybrid(8, 2, 1, local=0), ValueError, "local must be"),
        (lambda: Hybrid(8, 2, 1, local=2, causal=False), ValueError, "causal=False goes with .* without local, .* local=2"),
        (lambda: Hybrid(8, 2, 1, norm="none"), ValueError, "norm must be one of"),
        (lambda: Hybrid(8, 2, 1, attention_dropout=1.5), ValueError, "attention_dropout must be"),
        (lambda: fine(torch.randn(2, T, 4)), RuntimeError, r"the input must be \[any, any, 8\]"),
        (lambda: fine(torch.randn(3, T, W), state), RuntimeError, r"state\[0\]\[0\] must be \[3, 1, 8\]"),
        (lambda: made(3).float()(x, state), RuntimeError, r"state\[0\] must be a tuple of 3"),
        (lambda: fine(x, (state[0], tuple(t[:, :1] for t in state[1]))), RuntimeError, "as many keys as values, and in every"),
        (lambda: fine(x, state, torch.tensor([1, 2])), ValueError, "got it with lengths"),
        (lambda: both_ways(x, state), ValueError, "got it with causal=False"),
        (lambda: both_ways.step(x[:, 0]), ValueError, "causal=False has no step"),
        (lambda: fine(x, lengths=torch.tensor([1, 10])), RuntimeError, r"lengths must lie in 0..9"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_recall_needs_attention_and_order_needs_recurrence():
    """Pairs (key, value), then a key: its value is at the key's place plus one. Attention alone, without positions, does not know
    what stands beside what; the block of both does."""
    symbols, width, pairs = 8, 32, 6

    class Alone(nn.Module):
        """The block without its recurrence."""

        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(
                nn.TransformerEncoderLayer(width, 2, 64, 0.0, "gelu", batch_first=True, norm_first=True) for _ in range(1)
            )

        def forward(self, x):
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
            for layer in self.layers:
                x = layer(x, mask, is_causal=True)
            return x, None

    def accuracy(build):
        torch.manual_seed(0)
        parts = nn.ModuleDict({"embedding": nn.Embedding(symbols, width), "model": build(), "head": nn.Linear(width, symbols)})

        def run(rows):
            keys = torch.rand(rows, symbols).argsort(-1)[:, :pairs]
            values = torch.randint(symbols, (rows, pairs))
            asked = torch.randint(pairs, (rows, 1))
            ids = torch.cat((torch.stack((keys, values), -1).flatten(1), keys.gather(1, asked)), 1)
            y = parts["model"](parts["embedding"](ids))[0]
            return parts["head"](y[:, -1]), values.gather(1, asked)[:, 0]

        support.trained(parts, lambda: F.cross_entropy(*run(64)), 1500, 3e-3)
        with torch.no_grad():
            logits, target = run(512)
        return (logits.argmax(-1) == target).float().mean().item()

    found = accuracy(lambda: Hybrid(width, 2, 1, feedforward=64)), accuracy(Alone)
    assert found[0] > 0.95 and found[1] < 0.6, found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_text_is_learned_better_than_by_the_lstm_of_as_many_parameters():
    """Bits for a character of this project's license, which has its own words often, after equal steps."""
    text = Path(fastseq.__file__).parents[1].joinpath("LICENSE").read_text()
    symbols = sorted(set(text))
    ids = torch.tensor([symbols.index(symbol) for symbol in text])

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = fastseq.LSTM(64, 104, 2, batch_first=True)
            self.out = nn.Linear(104, 64)

        def forward(self, x):
            return self.out(self.layers(x)[0]), None

    def bits(build):
        torch.manual_seed(0)
        ends = {"embedding": nn.Embedding(len(symbols), 64), "head": nn.Linear(64, len(symbols))}
        parts = nn.ModuleDict({**ends, "model": build()})

        def loss(rows=16):
            start = torch.randint(len(ids) - 65, (rows, 1))
            rows = ids[start + torch.arange(65)]
            y = parts["head"](parts["model"](parts["embedding"](rows[:, :-1]))[0])
            return F.cross_entropy(y.flatten(0, 1), rows[:, 1:].flatten())

        support.trained(parts, loss, 300, 3e-3)
        with torch.no_grad():
            return loss(128).item() / math.log(2), sum(p.numel() for p in parts["model"].parameters())

    found = bits(lambda: Hybrid(64, 4, 2, feedforward=128)), bits(Plain)
    (hybrid, parameters), (of_lstm, as_many) = found
    assert abs(parameters / as_many - 1) < 0.2 and hybrid < of_lstm < 4.4, found
