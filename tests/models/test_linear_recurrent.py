"""Stacks of linear recurrence: against another package, steps, ragged rows, segments, errors, and what they cannot learn."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracles import frozen
from oracles import min_lm as oracle
from torch import nn

import fastseq
from fastseq.models import LinearRecurrent
from support import models as support

W, T = 6, 9
NAMES = {
    "recurrent_norm.weight": "1.weight",
    "out.weight": "2.to_out.weight",
    "feedforward_norm.weight": "3.weight",
    "up.weight": "4.0.weight",
    "up.bias": "4.0.bias",
    "down.weight": "4.2.weight",
    "down.bias": "4.2.bias",
}


@pytest.mark.parametrize(
    ("kind", "layer", "gates"), [("min_gru", fastseq.MinGRU, "gate"), ("min_lstm", fastseq.MinLSTM, "f_i_gate")]
)
def test_parity_with_another_package(kind, layer, gates):
    """Logits and every gradient; their rows are of the candidate, then of the gates, ours the other way round."""
    results, layer = frozen.read(oracle.__file__)[kind], partial(layer, bias=False)
    model = LinearRecurrent(oracle.WIDTH, oracle.DEPTH, layer=layer, units=oracle.UNITS, feedforward=oracle.INNER).double()
    names = {"norm.weight": "norm.weight"}
    of_block = NAMES | {"recurrent.weight_ih_l0": f"2.to_hidden_and_{gates}.weight"}
    names |= {f"blocks.{n}.{own}": f"layers.{n}.{other}" for n in range(oracle.DEPTH) for own, other in of_block.items()}

    def turned(name, tensor, back=1):
        return tensor.roll(-back * oracle.UNITS, 0) if "recurrent.weight" in name else tensor

    model.load_state_dict({name: turned(name, results["weights"][other]) for name, other in names.items()})
    embedding, head = (results["weights"][name].requires_grad_() for name in ("token_emb.weight", "to_logits.weight"))
    logits = model(F.embedding(results["ids"], embedding))[0] @ head.mT
    torch.testing.assert_close(logits, results["logits"], rtol=0, atol=1e-13)
    frozen.weighted(logits).backward()
    found = {names[name]: turned(name, parameter.grad, -1) for name, parameter in model.named_parameters()}
    found |= {"token_emb.weight": embedding.grad, "to_logits.weight": head.grad}
    torch.testing.assert_close(found, results["gradients"], rtol=1e-11, atol=1e-12)


LAYERS = [
    fastseq.MinGRU,
    fastseq.MinLSTM,
    fastseq.HGRN,
    fastseq.RGLRU,
    fastseq.QRNN,
    partial(fastseq.QRNN, window=2),
    fastseq.LRU,
]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LinearRecurrent(W, 2, units=5).double()


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_every_layer_goes_on_where_the_last_call_ended(layer):
    torch.manual_seed(0)
    model, x, state = LinearRecurrent(W, 2, layer=layer).double(), torch.randn(2, T, W, dtype=torch.float64), None
    whole, last = model(x)
    support.assert_causal(model, x)
    for t in range(T):
        y, state = model.step(x[:, t], state)
        torch.testing.assert_close(y, whole[:, t])
    torch.testing.assert_close(support.flat(state), support.flat(last))


def test_every_call_goes_on_where_the_last_one_ended(model):
    support.assert_steps_are_forward(model, torch.randn(2, T, W, dtype=torch.float64))


def test_causal_and_rows_alone(model):
    x = torch.randn(3, T, W, dtype=torch.float64)
    support.assert_causal(model, x)
    support.assert_rows_stand_alone(model, x)


def test_ragged_rows_and_segments(model):
    """A row's end state is that of the row alone; a segment begins as a row does."""
    x, lengths = torch.randn(2, T, W, dtype=torch.float64), torch.tensor([4, 9])
    y, state = model(x, lengths=lengths)
    alone, last = model(x[:1, :4])
    torch.testing.assert_close(y[:1], F.pad(alone, (0, 0, 0, T - 4)))
    torch.testing.assert_close([h[:, :1] for h in state], list(last))
    resets = torch.zeros(2, T, dtype=torch.bool)
    resets[:, 3] = True
    y, _ = model(x, resets=resets)
    torch.testing.assert_close(y, torch.cat((model(x[:, :3])[0], model(x[:, 3:])[0]), 1))


def test_any_layer_of_its_kind():
    """A GRU has the interface but for resets; it is none of these, yet shows that nothing of minGRU is built in."""

    class Layer(fastseq.GRU):
        def forward(self, input, hx=None, lengths=None, resets=None):
            return super().forward(input, hx, lengths=lengths)

    torch.manual_seed(0)
    model, x, state = LinearRecurrent(W, 2, layer=Layer).double(), torch.randn(2, T, W, dtype=torch.float64), None
    whole, last = model(x)
    for t in range(T):
        y, state = model.step(x[:, t], state)
        torch.testing.assert_close(y, whole[:, t])
    torch.testing.assert_close(state, last)


def test_dropout_is_in_training_alone():
    model, x = LinearRecurrent(W, 2, dropout=0.5), torch.randn(2, T, W)
    assert not torch.equal(model(x)[0], model(x)[0])
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])


@support.ON_COMPILERS
def test_compiled_without_a_break(model, compiler):
    support.assert_compiles(lambda x: model(x)[0], model, compiler, torch.randn(2, T, W, dtype=torch.float64))


fine, x = LinearRecurrent(W, 2), torch.randn(2, T, W)
state = fine(x)[1]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LinearRecurrent(0, 1), ValueError, "width must be"),
        (lambda: LinearRecurrent(6, 1, units=2.5), TypeError, "units must be an int, got 2.5"),
        (lambda: LinearRecurrent(6, 1, layer="min_gru"), TypeError, "layer must be a layer's class.* got 'min_gru'"),
        (lambda: LinearRecurrent(6, 1, dropout=-0.1), ValueError, "dropout must be"),
        (lambda: fine(torch.randn(2, T, 5)), RuntimeError, r"the input must be \[any, any, 6\]"),
        (lambda: fine(torch.randn(3, T, W), state), RuntimeError, r"Expected hidden size \(1, 3, 6\)"),
        (lambda: fine(x, state[:1]), RuntimeError, "state must be a tuple of 2, as this model gives it back, got a tuple of 1"),
        (lambda: fine(x, state[0]), RuntimeError, "got Tensor"),
        (lambda: fine(x, ()), RuntimeError, "got a tuple of 0"),
        (lambda: LinearRecurrent(W, 2, units=5)(x, state), RuntimeError, "Expected hidden size"),
        (lambda: fine(x, lengths=torch.tensor([1.0, 2.0])), RuntimeError, "lengths must be an int64 Tensor"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_adds_what_is_marked_but_does_not_count():
    """The sum of two marked numbers among 50 is learned; the parity of bits, which a GRU has exactly, is not."""

    def adding(rows=32):
        x = torch.rand(rows, 50, 2)
        marked = torch.stack((torch.randint(25, (rows,)), torch.randint(25, 50, (rows,))), 1)
        x[..., 1] = 0
        x[torch.arange(rows)[:, None], marked, 1] = 1
        return x, x[..., 0].gather(1, marked).sum(1)

    torch.manual_seed(0)
    parts = nn.ModuleDict({"into": nn.Linear(2, 32), "model": LinearRecurrent(32, 2, feedforward=64), "out": nn.Linear(32, 1)})

    def loss(rows=32):
        x, target = adding(rows)
        return F.mse_loss(parts["out"](parts["model"](parts["into"](x))[0][:, -1])[:, 0], target)

    support.trained(parts, loss, 1000, 3e-3)
    with torch.no_grad():
        of_sum = loss(512).item()

    def parity(model):
        torch.manual_seed(0)
        parts = nn.ModuleDict({"embedding": nn.Embedding(2, 32), "model": model(), "out": nn.Linear(32, 2)})
        length = [2]

        def run(steps, rows):
            bits = torch.randint(2, (rows, steps))
            return parts["out"](parts["model"](parts["embedding"](bits))[0]), bits.cumsum(1) % 2

        def loss():
            length[0] += 1  # a curriculum: by the 40th step two bits, by the 1600th forty
            logits, target = run(min(40, 2 + length[0] // 40), 32)
            return F.cross_entropy(logits.flatten(0, 1), target.flatten())

        support.trained(parts, loss, 1800, 5e-3)
        with torch.no_grad():
            logits, target = run(40, 256)
        return (logits.argmax(-1) == target)[:, -1].float().mean().item()

    of_gru = parity(lambda: fastseq.GRU(32, 32, batch_first=True))
    found = of_sum, of_gru, parity(lambda: LinearRecurrent(32, 2, feedforward=64))
    assert found[0] < 0.02 and found[1] == 1.0 and found[2] < 0.65, found  # 0.167: the mean of the sums
