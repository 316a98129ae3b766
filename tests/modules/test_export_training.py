"""Programs that torch.export or torch.jit.trace recorded train: the gradients of the module that they came from."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from torch import nn

import fastseq
from fastseq import functional as F
from fastseq.ops.attention_decode import attention_decode
from fastseq.ops.types import DecodeSpec

T, B, I, H = 5, 3, 4, 6  # noqa: E741


class Model(nn.Module):
    """A part of its own on both sides of what is tried."""

    def __init__(self, middle, width):
        super().__init__()
        self.before, self.middle, self.after = nn.Linear(I, I), middle, nn.Linear(width, 2)

    def forward(self, x):
        y = self.middle(self.before(x))
        return self.after(y if isinstance(y, torch.Tensor) else y[0])


class Attends(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, x):
        q = x.unflatten(-1, (2, 2)).permute(1, 2, 0, 3)
        out = F.attention(q, q, q, **self.options)
        return (out if isinstance(out, torch.Tensor) else out[0]).permute(2, 0, 1, 3).flatten(-2)


class Sdpa(nn.Module):
    def forward(self, x):
        q = x.unflatten(-1, (2, 2)).permute(1, 2, 0, 3)
        return F.scaled_dot_product_attention(q, q, q, is_causal=True).permute(2, 0, 1, 3).flatten(-2)


class MultiheadAttention(nn.Module):
    def __init__(self, need_weights):
        super().__init__()
        self.attention, self.need_weights = fastseq.MultiheadAttention(I, 2), need_weights

    def forward(self, x):
        out, weights = self.attention(x, x, x, need_weights=self.need_weights)
        return out if weights is None else out + weights.sum((1, 2))[:, None] * 0 + weights.square().sum()


MIDDLES = {
    "RNN": lambda: (fastseq.RNN(I, H, nonlinearity="relu"), H),
    "LSTM": lambda: (fastseq.LSTM(I, H, num_layers=2, bidirectional=True), 2 * H),
    "LSTM-projected": lambda: (fastseq.LSTM(I, H, proj_size=3), 3),
    "LSTM-recompute": lambda: (fastseq.LSTM(I, H, recompute=True), H),
    "GRU": lambda: (fastseq.GRU(I, H), H),
    "GRU-heads": lambda: (fastseq.GRU(I, H, num_heads=2, bias=False), H),
    "GRU-batch_first": lambda: (fastseq.GRU(I, H, batch_first=True), H),
    "PeepholeLSTM": lambda: (fastseq.PeepholeLSTM(I, H), H),
    "LayerNormGRU": lambda: (fastseq.LayerNormGRU(I, H), H),
    "SLSTM": lambda: (fastseq.SLSTM(I, H), H),
    "attention": lambda: (Attends(causal=True), I),
    "attention-sinks": lambda: (Attends(sinks=torch.ones(2, dtype=torch.float64), window_size=(2, 1)), I),
    "attention-lse": lambda: (Attends(return_lse=True, softcap=2.0), I),
    "sdpa": lambda: (Sdpa(), I),
    "MultiheadAttention": lambda: (MultiheadAttention(False), I),
    "MultiheadAttention-weights": lambda: (MultiheadAttention(True), I),
}
RECURRENT = [name for name in MIDDLES if name.startswith(("RNN", "LSTM", "GRU", "Peephole", "LayerNorm", "SLSTM"))]
NAMES = list(MIDDLES)


def model(name):
    torch.manual_seed(0)
    middle, width = MIDDLES[name]()
    return Model(middle, width).double()


def gradients(module, x):
    """Of every parameter, by name, and of x; torch's warning of an op without a derivative is an error."""
    x = x.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loss = module(x).square().sum()
        names, parameters = zip(*module.named_parameters(), strict=True)
        grads = torch.autograd.grad(loss, [x, *parameters])
    assert all(grad.any() for grad in grads) or x.shape[0] == 1  # without a state before the only step
    return dict(zip(("x", *names), grads, strict=True))


def random(seed=1):
    return torch.randn(T, B, I, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_exported(name, strict, with_gradients):
    """Recorded with gradients or without, for training or for inference."""
    module = model(name)
    with torch.set_grad_enabled(with_gradients):
        program = torch.export.export(module, (random(0),), strict=strict)
    torch.testing.assert_close(gradients(program.module(), random()), gradients(module, random()))


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch, of itself
@pytest.mark.parametrize("name", ["LSTM", "GRU", "attention", "MultiheadAttention-weights"])
def test_exported_decomposed_stored_and_compiled(name):
    module = model(name)
    expected = gradients(module, random())
    program = torch.export.export(module, (random(0),))
    stored = io.BytesIO()
    torch.export.save(program, stored)
    stored.seek(0)
    torch.testing.assert_close(gradients(torch.export.load(stored).module(), random()), expected)
    torch.testing.assert_close(gradients(program.run_decompositions().module(), random()), expected)
    torch._dynamo.reset()
    compiled = torch.compile(program.module(), backend="aot_eager", fullgraph=True)
    x = random().requires_grad_()
    (grad,) = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(grad, expected["x"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_traced_by_torchscript(name, with_gradients):
    module = model(name)
    with torch.set_grad_enabled(with_gradients):
        traced = torch.jit.trace(module, (random(0),), check_trace=False)
    stored = io.BytesIO()
    torch.jit.save(traced, stored)
    stored.seek(0)
    torch.testing.assert_close(gradients(torch.jit.load(stored), random()), gradients(module, random()))


@pytest.mark.parametrize("name", [*RECURRENT, "attention", "MultiheadAttention-weights"])
def test_double_backward(name):
    module = model(name)
    program = torch.export.export(module, (random(0),)).module()

    def second(module):
        x = random().requires_grad_()
        parameters = dict(module.named_parameters())
        (grad,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        own = {key: value for key, value in parameters.items() if not key.startswith("after.bias")}
        grads = torch.autograd.grad(grad.square().sum(), list(own.values()))
        return dict(zip(own, grads, strict=True))

    torch.testing.assert_close(second(program), second(module))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "attention"])
def test_transforms_of_a_program(name):
    module = model(name)
    program = torch.export.export(module, (random(0),)).module()

    def loss(module):
        return lambda x: module(x).square().sum()

    for transform in (torch.func.grad, torch.func.jacfwd, lambda f: torch.func.jvp(f, (random(),), (random(3),))[1]):
        actual, expected = transform(loss(program)), transform(loss(module))
        if callable(actual):
            actual, expected = actual(random()), expected(random())
        torch.testing.assert_close(actual, expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # attention's op, call by call; torch says so from 2.15 on
@pytest.mark.parametrize("name", ["LSTM", "GRU", "attention"])
def test_vmap_over_a_program(name):
    module, many = model(name), torch.stack((random(), random(4)))
    program = torch.export.export(module, (random(0),)).module()
    torch.testing.assert_close(torch.vmap(program)(many), torch.stack([module(x) for x in many]))
    grad = torch.func.grad(lambda x: program(x).square().sum())
    torch.testing.assert_close(torch.vmap(grad)(many), torch.stack([gradients(module, x)["x"] for x in many]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning")  # torch, of itself
def test_ahead_of_time_package(tmp_path):
    module = model("GRU").eval()
    program = torch.export.export(module, (random(0),))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(random()), module(random()))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch, of itself
def test_compiled_autograd():
    module = model("GRU")
    expected = gradients(module, random())
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        module(random()).square().sum().backward()
    torch.testing.assert_close(
        {name: p.grad for name, p in module.named_parameters()}, {k: v for k, v in expected.items() if k != "x"}
    )


@pytest.mark.parametrize("name", ["LSTM", "GRU", "attention"])
def test_recorded_ops_have_no_gradient_without_autograd(name):
    """Inference of a program: the op without what a backward pass would need, and no graph."""
    module = model(name)
    program = torch.export.export(module, (random(0),))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(random()), module(random()))
    with torch.inference_mode():
        torch.testing.assert_close(program.module()(random()), module(random()))
    names = [str(node.target) for node in program.graph.nodes if "fastseq" in str(node.target)]
    assert set(names) == {"fastseq.attention_forward.default" if name == "attention" else "fastseq.recurrent.default"}


def test_quantization_aware_training():
    """What it does to a program: a step between its nodes, gradients of the parameters, twice."""
    module = model("GRU")
    program = torch.export.export(module, (random(0),)).module()
    for node in list(program.graph.nodes):
        if node.op == "call_function" and "linear" in str(node.target):
            with program.graph.inserting_after(node):
                rounded = program.graph.call_function(torch.ops.aten.mul.Tensor, (node, 1.0))
            node.replace_all_uses_with(rounded, delete_user_cb=lambda user, own=rounded: user is not own)
    program.recompile()
    optimizer = torch.optim.SGD(program.parameters(), 0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = program(random()).square().sum()
        loss.backward()
        assert all(p.grad is not None for p in program.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


def test_decoding_has_no_backward_and_says_so():
    class Decodes(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(8, 8)

        def forward(self, q, cache, lengths):
            return attention_decode(self.project(q), cache, cache, DecodeSpec(lengths))[0]

    arguments = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 6, 8), torch.tensor([4], dtype=torch.int32)
    with torch.no_grad():
        program = torch.export.export(Decodes(), arguments).module()
        expected = program(*arguments)
    out = program(*arguments)
    torch.testing.assert_close(out.detach(), expected)
    with pytest.raises(RuntimeError, match="attention against a cache has no backward"):
        out.sum().backward()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("shortest", [1, 2])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_exported_for_any_length(name, shortest, strict):
    module = model(name)
    time = torch.export.Dim("time", min=shortest)
    program = torch.export.export(module, (random(),), dynamic_shapes=({0: time},), strict=strict).module()
    for steps in (shortest, 2, 3, 11):
        x = torch.randn(steps, B, I, dtype=torch.float64)
        torch.testing.assert_close(gradients(program, x)["x"], gradients(module, x)["x"])
