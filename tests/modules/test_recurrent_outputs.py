"""Outputs belong to the caller: in-place work on them, no views, gradients of many cotangents at once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastseq
from support.modules import B, H, I, T, both, leaves, random
from support.recurrent import EVERY_MODULE as EVERY

OPTIONS = ({}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True}, {"recompute": True})
BY = {
    "relu_": lambda y: y.relu_(),
    "nn.ReLU": nn.ReLU(inplace=True),
    "nn.Dropout": nn.Dropout(0.5, inplace=True),
    "+=": lambda y: y.add_(1),
    "*= mask": lambda y: y.mul_(torch.arange(y.shape[0])[:, None, None] < 3),
    "[mask] = 0": lambda y: y.masked_fill_(y > 0, 0),
    "[0] = 0": lambda y: y.__setitem__(0, 0) or y,
    "a view of it": lambda y: y[1:].zero_() is not None and y,
}


def step(module, x, change, **keywords):
    """Gradients of x and the parameters through an output that was overwritten."""
    torch.manual_seed(5)
    module.zero_grad()
    input = copy.deepcopy(x)
    leaf = input.data if isinstance(input, PackedSequence) else input
    leaf.requires_grad_()
    y = module(input, **keywords)[0]
    y = y.data if isinstance(y, PackedSequence) else y
    y = change(y)
    (y * y).sum().backward()
    return {"x": leaf.grad, **{name: p.grad for name, p in module.named_parameters()}}


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
@pytest.mark.parametrize("name", ["RNN", "GRU"])
def test_in_place_as_with_torch(name, options, by):
    theirs, ours = both(name, dtype=torch.float64, **options)
    x = random(T, B, I, dtype=torch.float64)
    torch.testing.assert_close(step(ours, x, BY[by]), step(theirs, x, BY[by]))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_in_place_as_out_of_place(name, options):
    """Every cell, padded, ragged and packed, packed with rows of one length."""
    torch.manual_seed(0)
    ours = getattr(fastseq, name)(I, H, dtype=torch.float64, **options)
    x, lengths = random(T, B, I, dtype=torch.float64), torch.tensor([6, 4, 1])
    if options.get("batch_first"):
        x = x.transpose(0, 1)
    packed = pack_padded_sequence(x, lengths, batch_first=ours.batch_first)
    even = pack_padded_sequence(x, torch.tensor([T] * B), batch_first=ours.batch_first)
    for input, keywords in ((x, {}), (x, {"lengths": lengths}), (packed, {}), (even, {})):
        torch.testing.assert_close(step(ours, input, torch.Tensor.relu_, **keywords), step(ours, input, torch.relu, **keywords))


def test_a_model_trains_as_before():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.act, self.fc = nn.GRU(I, H), nn.ReLU(inplace=True), nn.Linear(H, 1)

        def forward(self, x):
            return self.fc(self.act(self.gru(x)[0]))

    theirs = Net().double()
    ours = copy.deepcopy(theirs)
    fastseq.convert(ours)
    x = random(T, B, I, dtype=torch.float64)
    for net in (theirs, ours):
        net(x).sum().backward()
    for a, e in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, e.grad)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch, of itself
@pytest.mark.parametrize("where", ["inside", "outside", "both"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_in_place_around_torch_compile(backend, where):
    """In the compiled region, where the copy disappears if nobody needs it, and after it, where the output is overwritten."""
    torch._dynamo.reset()
    module = fastseq.GRU(I, H)

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = module

        def forward(self, x):
            y, h = self.gru(x)
            return (y.add_(1) if where != "outside" else y), h

    compiled, x = torch.compile(Inside(), backend=backend, fullgraph=True), random(T, B, I)

    def through(call, out_of_place):
        module.zero_grad()
        y, _ = call(x)
        if where != "inside":
            y = y.sigmoid() if out_of_place else y.sigmoid_()
        (y * y).sum().backward()
        return [p.grad for p in module.parameters()]

    def plainly(x):
        y, h = module(x)
        return (y + 1 if where != "outside" else y), h

    torch.testing.assert_close(through(compiled, False), through(plainly, True))


def test_in_place_in_an_exported_program_and_under_checkpointing():
    module, x = fastseq.GRU(I, H, dtype=torch.float64), random(T, B, I, dtype=torch.float64)
    program = torch.export.export(module, (x,)).module()
    expected = step(module, x, torch.relu)
    assert step(program, x, torch.Tensor.relu_).keys() == expected.keys()
    torch.testing.assert_close(step(program, x, torch.Tensor.relu_), expected)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, x):
            return (torch.utils.checkpoint.checkpoint(lambda x: self.module(x)[0].relu_(), x, use_reentrant=False),)

    actual = step(Checkpointed(), x, lambda y: y)
    torch.testing.assert_close({key.removeprefix("module."): value for key, value in actual.items()}, expected)


def test_saved_tensors_can_leave():
    """Nothing holds the memory of the output when saved tensors are stored elsewhere."""
    module, x = fastseq.GRU(64, 64), torch.randn(50, 8, 64)
    kept = []

    def pack(tensor):
        kept.append(tensor.clone())
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, kept.__getitem__):
        y = module(x)[0]
    held = y.grad_fn.changes
    assert held.untyped_storage().nbytes() == 0
    y.square().sum().backward()
    got = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    module(x)[0].square().sum().backward()
    torch.testing.assert_close(got, [p.grad for p in module.parameters()])


@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_results_are_no_views(name, options, with_gradients):
    """FSDP2's hooks would be lost by in-place work on a view."""
    module = getattr(fastseq, name)(I, H, **options)
    x, lengths = random(T, T, I), torch.tensor([6, 5, 4, 3, 2, 1])
    even = torch.full((T,), T)
    with torch.set_grad_enabled(with_gradients):
        results = [module(x), module(x, lengths=lengths)]
        results += [module(pack_padded_sequence(x, n)) for n in (lengths, even)]
    for result in results:
        for leaf in leaves(result[0]) if name == "SLSTM" else leaves(result):
            assert not leaf._is_view()
    if name in ("LSTM", "CoupledLSTM"):
        assert not module(x, return_cells=True)[2]._is_view()


@pytest.mark.parametrize("kind", ["padded", "lengths", "packed", "recompute", "zoneout", "float32"])
@pytest.mark.parametrize("name", [*EVERY, "LSTM-projected", "GRU-heads"])
def test_batched_gradients(name, kind):
    """is_grads_batched, vectorize=True: all cotangents in one call give what each gives alone."""
    torch.manual_seed(0)
    base, _, option = name.partition("-")
    options = {"projected": {"proj_size": 3}, "heads": {"num_heads": 2}, "": {}}[option]
    extra = {"recompute": {"recompute": True}, "zoneout": {"zoneout": 0.2}}.get(kind, {})
    dtype = torch.float32 if kind == "float32" else torch.float64
    module = getattr(fastseq, base)(I, 6, num_layers=2, bidirectional=True, dtype=dtype, **options, **extra)
    x = random(4, 2, I, dtype=dtype).requires_grad_()
    lengths = torch.tensor([4, 2])
    if kind == "packed":
        y = module(pack_padded_sequence(x, lengths))[0].data
    else:
        y = module(x, **({"lengths": lengths} if kind == "lengths" else {}))[0]
    cotangents = torch.randn(3, *y.shape, dtype=dtype)
    inputs = [x, *module.parameters()]
    together = torch.autograd.grad(y, inputs, cotangents, is_grads_batched=True, retain_graph=True)
    for i, cotangent in enumerate(cotangents):
        alone = torch.autograd.grad(y, inputs, cotangent, retain_graph=True)
        torch.testing.assert_close([grad[i] for grad in together], list(alone))


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_vectorized_jacobian_and_hessian(name):
    theirs, ours = both(name, dtype=torch.float64, num_layers=2, bidirectional=True)
    x = random(3, 1, I, dtype=torch.float64)

    def of(module):
        def scalar(x):
            return module(x)[0].square().sum()

        jacobian = torch.autograd.functional.jacobian(lambda x: module(x)[0], x, vectorize=True)
        return jacobian, torch.autograd.functional.hessian(scalar, x, vectorize=True)

    torch.testing.assert_close(of(ours), of(theirs))
