"""The temporal convolutional network against pytorch-tcn, and what must hold of it whatever the weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracles import frozen
from oracles import tcn as theirs
from torch import nn

from fastseq import GRU
from fastseq.models.generation import rows
from fastseq.models.tcn import TCN
from support import tasks
from support import token_models as holds
from support.models import trained

CHANNELS = (4, 4, 6)


def made(weight_norm=True, **options) -> TCN:
    torch.manual_seed(0)
    return TCN(3, CHANNELS, 3, weight_norm=weight_norm, **options).double()


def inputs(steps=9):
    torch.manual_seed(1)
    return torch.randn(3, steps, 3, dtype=torch.float64)


def from_pytorch_tcn(weights):
    pairs = (("network.", "blocks."), ("conv1", "convolutions.0"), ("conv2", "convolutions.1"), ("downsample", "around"))
    renamed = {}
    for name, weight in weights.items():
        for other, ours in pairs:
            name = name.replace(other, ours)
        renamed[name] = weight
    return renamed


@pytest.mark.parametrize("weight_norm", [True, False])
def test_it_is_pytorch_tcns(weight_norm):
    results = frozen.read(theirs.__file__)
    case, x = results["weight norm" if weight_norm else "plain"], results["input"].requires_grad_()
    model = TCN(theirs.INPUTS, theirs.CHANNELS, theirs.KERNEL, weight_norm=weight_norm).double()
    model.load_state_dict(from_pytorch_tcn(case["weights"]))
    output, _ = model(x)
    holds.close(output, case["output"])
    (of_input,) = torch.autograd.grad(frozen.weighted(output), x, retain_graph=True)
    holds.close(of_input, case["gradients"].pop("input"))
    holds.same_gradients(output, model, from_pytorch_tcn(case["gradients"]))


def test_step_is_forward_causal_and_rows_stand_alone():
    model, x = made(), inputs()
    holds.step_is_forward(model, x, model.start(3))
    holds.causal(lambda given: model(given)[0], x, -x)
    holds.permuted(lambda given: model(given)[0], x)
    _, state = model(x)
    whole = model(x, state)[0]
    for b in range(3):
        holds.close(model(x[b : b + 1], rows(state, torch.tensor([b])))[0], whole[b : b + 1])


def test_the_receptive_field_ends_where_it_is_said_to():
    model = made()
    assert model.receptive_field == 1 + 2 * 2 * (2**3 - 1)
    x = inputs(model.receptive_field + 1).requires_grad_()
    torch.manual_seed(2)
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, 0.1, 0.2)  # nothing is cut off by a ReLU
    (grad,) = torch.autograd.grad(model(x.abs())[0][:, -1].sum(), x)
    assert (grad[:, 0] == 0).all() and (grad[:, 1:] != 0).all()


def test_compiles_whole():
    model, x = made(), inputs()
    holds.captured(model, x, model.start(3))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("weight_norm", [True, False])
def test_compiles_whole_with_inductor(weight_norm):
    model, x = made(weight_norm), inputs()
    holds.compiled(model, lambda given, state: model(given, state)[0], x, model.start(3))
    holds.captured(model.step, x[:, 0], model.start(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype):
    model, x = made().to(dtype), inputs().to(dtype)
    out, state = model(x)
    expected = model.double()(x.double())[0]
    assert out.dtype == dtype and {past.dtype for past in state} == {dtype}
    assert (out.double() - expected).abs().max() < 100 * torch.finfo(dtype).eps


def test_dropout_is_off_unless_named():
    x, plain = inputs(), made()
    dropped = made(dropout=0.5)
    assert torch.equal(plain.train()(x)[0], plain.eval()(x)[0])
    assert not torch.equal(dropped.train()(x)[0], plain(x)[0]) and torch.equal(dropped.eval()(x)[0], plain(x)[0])


def test_errors_name_the_argument_and_what_is_accepted():
    with pytest.raises(ValueError, match="kernel must be at least 2, got 1"):
        TCN(3, CHANNELS, 1)
    with pytest.raises(ValueError, match="levels must be greater than zero, got 0"):
        TCN(3, (), 3)
    with pytest.raises(ValueError, match="channels must be greater than zero, got 0"):
        TCN(3, (4, 0), 3)
    with pytest.raises(ValueError, match=r"dropout must be a number in \[0, 1\], got 1.5"):
        made(dropout=1.5)
    with pytest.raises(RuntimeError, match=r"the input must be \[any, any, 3\], got \[3, 9, 4\]"):
        made()(torch.zeros(3, 9, 4))
    with pytest.raises(TypeError, match="unexpected keyword argument 'causal'"):
        made(causal=False)


def test_a_state_of_another_model_or_batch_is_refused():
    model, x = made(), inputs()
    _, state = model(x)
    for other, message in (
        (rows(state, torch.tensor([0, 1])), r"state\[0\] must be \[3, 3, 2\] for this model and batch, got \[2, 3, 2\]"),
        (state[:4], "state must be a tuple of 6, as this model gives it back, got a tuple of 4"),
        (tuple(past.float() for past in state), "state.0. must suit an input of torch.float64"),
        (TCN(3, CHANNELS, 4).double()(x)[1], r"state\[0\] must be \[3, 3, 2\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            model.step(x[:, 0], other)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_it_copies_over_a_hundred_steps_where_a_gru_does_not():
    """Ten symbols after a hundred steps, 900 steps of training: silence alone costs 0.173 nats."""
    found = {}
    for name in ("tcn", "gru"):
        torch.manual_seed(0)
        body, width = (TCN(10, [16] * 5, 8), 16) if name == "tcn" else (GRU(10, 64, batch_first=True), 64)
        model = nn.ModuleList([body, nn.Linear(width, 9)])

        def loss_of(batch, model=model):
            x, target = batch
            return F.cross_entropy(model[1](model[0](x)[0]).flatten(0, 1), target.flatten())

        batches = tasks.copies(32, 100, seed=1)
        trained(model, lambda loss_of=loss_of, batches=batches: loss_of(next(batches)), 900, 2e-3)
        others = tasks.copies(100, 100, seed=2)
        found[name] = tasks.mean_loss(lambda loss_of=loss_of, others=others: loss_of(next(others)), 5)
    print(found)
    assert found["tcn"] < 0.01 and found["gru"] > 0.15
