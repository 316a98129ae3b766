"""The attention op, on every backend of this machine: the battery, and what only attention can get wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fastseq
from fastseq import backends
from fastseq.ops import attention as op
from fastseq.ops.attention import GRADIENTS, Spec, attention, attention_backward, attention_weights, attention_with_weights
from fastseq.reference import attention as reference
from support.attention import (
    ATTENTION_CASES,
    COMPILED_ATTENTION_CASES,
    PLAIN,
    SMALL_ATTENTION_CASES,
    SMALL_WEIGHTS_CASES,
    WEIGHTS_CASES,
    AttentionCase,
    dense,
    make,
    named,
    resized,
    spec_of,
)
from support.battery import OpBattery, differentiable

ABLE = [name for name, module in backends.BACKENDS.items() if "attention" in module.ops and {"cpu", "any"} & set(module.devices)]
every_backend = pytest.mark.parametrize("backend", ABLE)


def against(inputs, backend, *calls):
    """A backend's reasons against calls of the op."""
    spec, tensors = spec_of(inputs), [inputs[name] for name in "qkv"]
    wanted = [name in inputs for name in GRADIENTS]
    queries = [op._query(call, *tensors, spec, wanted if "backward" in call else None) for call in calls]
    return [reason for query in queries for reason in backends.obstacles(backend, query)]


def detached(inputs):
    return {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


class AttentionBattery(OpBattery):
    OP = "attention"
    DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

    def make(self, case, dtype, device="cpu", seed=0):
        return make(case, dtype, device, seed)

    def resized(self, case):
        return resized(case)

    def supports(self, case, dtype, backend):
        """Triton's interpreter is slow: every case in fp32, the small ones in every dtype."""
        if backend == "triton" and dtype != torch.float32 and case not in self.SMALL_CASES:
            return False
        return super().supports(case, dtype, backend)

    def magnifies(self, case):
        return True  # the exponential magnifies the rounding of the largest scores


class TestAttention(AttentionBattery):
    CASES = ATTENTION_CASES
    SMALL_CASES = SMALL_ATTENTION_CASES
    COMPILED_CASES = COMPILED_ATTENTION_CASES

    def against(self, inputs, backend, backward):
        return against(inputs, backend, "backward" if backward else "forward")

    def run(self, inputs):
        """lse with a finite mark for rows without keys, which the bounds can compare."""
        out, lse = attention(inputs["q"], inputs["k"], inputs["v"], spec_of(inputs))
        return out, torch.where(lse == -torch.inf, 3.0, lse)

    def run_torch(self, inputs):
        out, lse, _ = dense(inputs)
        return out, torch.where(lse == -torch.inf, 3.0, lse)

    def op_samples(self, case, dtype):
        inputs = detached(self.make(case, dtype))
        spec = spec_of(inputs)
        q, k, v = (inputs[name] for name in "qkv")
        out, lse = torch.ops.fastseq.attention_forward(q, k, v, *spec)
        wanted = [name in inputs for name in GRADIENTS]
        samples = [(torch.ops.fastseq.attention_forward.default, (q, k, v, *spec))]
        backend = backends.forced()
        if backend is None or not self.against(inputs, backend, True):
            backward = (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse, *spec, wanted)
            samples.append((torch.ops.fastseq.attention_backward.default, backward))
        return samples


class TestWeights(AttentionBattery):
    CASES = WEIGHTS_CASES
    SMALL_CASES = SMALL_WEIGHTS_CASES
    COMPILED_CASES = [
        replace(case, average=average) for case, average in zip(COMPILED_ATTENTION_CASES[:2], (True, False), strict=True)
    ]

    def against(self, inputs, backend, backward):
        return against(inputs, backend, *(("weights_backward",) if backward else ("forward", "weights")))

    def run(self, inputs):
        spec, (q, k, v) = spec_of(inputs), (inputs[name] for name in "qkv")
        return (attention_weights(q, k, attention(q, k, v, spec)[1], spec, inputs["case"].average),)

    def run_torch(self, inputs):
        weights = dense(inputs)[2]
        return (weights.mean(1) if inputs["case"].average else weights,)

    def op_samples(self, case, dtype):
        inputs = detached(self.make(case, dtype))
        spec, (q, k, v) = spec_of(inputs), (inputs[name] for name in "qkv")
        lse = torch.ops.fastseq.attention_forward(q, k, v, *spec)[1]
        w = torch.ops.fastseq.attention_weights(q, k, lse, *spec, case.average)
        wanted = [name in inputs and name != "v" for name in GRADIENTS]
        samples = [(torch.ops.fastseq.attention_weights.default, (q, k, lse, *spec, case.average))]
        backend = backends.forced()
        if backend is None or not self.against(inputs, backend, True):
            backward = (torch.randn_like(w), q, k, lse, *spec, case.average, wanted)
            samples.append((torch.ops.fastseq.attention_weights_backward.default, backward))
        return samples


class TestWithWeights(AttentionBattery):
    """Everything from one call: a case of weights for each way to form them."""

    CASES = SMALL_CASES = [
        replace(case, average=average)
        for average, case in zip(
            (True, False, False, True, False),
            named("grouped", "window", "mask-all-dead", "both-lengths-causal", "everything"),
            strict=True,
        )
    ]
    COMPILED_CASES = TestWeights.COMPILED_CASES

    def against(self, inputs, backend, backward):
        if backward:
            return against(inputs, backend, "backward", "weights_backward")
        return against(inputs, backend, "forward", "weights")

    def run(self, inputs):
        out, lse, w = attention_with_weights(*(inputs[name] for name in "qkv"), spec_of(inputs), inputs["case"].average)
        return out, torch.where(lse == -torch.inf, 3.0, lse), w

    def run_torch(self, inputs):
        out, lse, w = dense(inputs)
        return out, torch.where(lse == -torch.inf, 3.0, lse), w.mean(1) if inputs["case"].average else w

    def op_samples(self, case, dtype):
        inputs = detached(self.make(case, dtype))
        q, k, v = (inputs[name] for name in "qkv")
        return [(torch.ops.fastseq.attention_with_weights.default, (q, k, v, *spec_of(inputs), case.average))]


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_which_backend_does_what(case):
    """A call that goes to the reference for no good reason would be a silent slow path."""
    for dtype in (torch.float64, torch.float32, torch.float16):
        inputs = make(case, dtype)
        calls = ("forward", "backward", *(() if case.packed else ("weights", "weights_backward")))
        for backend in ABLE:
            assert not against(inputs, backend, *calls)


@every_backend
@pytest.mark.parametrize(
    "case", named("causal-bottom-right-dead", "mask-all-dead", "key-lengths", "packed-without-keys"), ids=str
)
def test_rows_without_keys(case, backend):
    """Zero, never NaN, with finite gradients and none for the query itself."""
    inputs = make(replace(case, sinks=False), torch.float32)
    with fastseq.use_backend(backend):
        out, lse = attention(inputs["q"], inputs["k"], inputs["v"], spec_of(inputs))
        dead = lse == -torch.inf
        assert dead.any() and not dead.all()
        assert not out[dead].any() and out[~dead].any(-1).all()
        grads = torch.autograd.grad((out.sum(), torch.where(dead, 0, lse).sum()), list(differentiable(inputs).values()))
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][dead].any()


@every_backend
@pytest.mark.parametrize("case", named("both-lengths-causal", "everything"), ids=str)
def test_what_lies_beyond_the_lengths_does_not_matter(case, backend):
    inputs = make(replace(case, softcap=0.0, dropout=0.0, relative_k=0, bias=None, relative_bias=0), torch.float64)

    def run():
        with fastseq.use_backend(backend):
            out, lse = attention(inputs["q"], inputs["k"], inputs["v"], spec_of(inputs))
            dout = torch.ones_like(out)
            for b, length in enumerate(case.q_lengths):
                dout[b, :, length:] = filling
            return out, lse, *torch.autograd.grad(out, [inputs[name] for name in "qkv"], dout)

    filling = 0.0
    expected = run()
    filling = torch.nan
    with torch.no_grad():
        for names, lengths in (("q", case.q_lengths), ("kv", case.k_lengths)):
            for name in names:
                for b, length in enumerate(lengths):
                    inputs[name][b, :, length:] = torch.nan
    assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))


@every_backend
@pytest.mark.parametrize("with_lse", (False, True))
def test_halves_merged_by_lse_are_the_whole(backend, with_lse):
    """Forward and backward over parts of the keys, as ring attention does it: the backward takes the out and lse of the whole."""
    inputs = make(AttentionCase("ring", lengths=(6, 10), heads=(4, 2), right=0, offset=4), torch.float64)
    q, k, v = (inputs[name].detach() for name in "qkv")
    spec = spec_of(inputs)
    halves = [(k[:, :, :5], v[:, :, :5], spec), (k[:, :, 5:], v[:, :, 5:], spec._replace(offset=spec.offset - 5))]
    with fastseq.use_backend(backend):
        out, lse = attention(q, k, v, spec)
        dout, dlse = torch.randn_like(out), torch.randn_like(lse) if with_lse else None
        dq, dk, dv, *_ = attention_backward(dout, dlse, q, k, v, out, lse, spec, [True] * 3 + [False] * 4)
        parts = [attention(q, *half) for half in halves]
        merged = torch.logsumexp(torch.stack([part_lse for _, part_lse in parts]), 0)
        merged_out = sum(part * torch.exp(part_lse - merged)[..., None] for part, part_lse in parts)
        grads = [
            attention_backward(dout, dlse, q, half_k, half_v, out, lse, half, [True] * 3 + [False] * 4)
            for half_k, half_v, half in halves
        ]
    torch.testing.assert_close(merged, lse)
    torch.testing.assert_close(merged_out, out)
    torch.testing.assert_close(grads[0][0] + grads[1][0], dq)
    torch.testing.assert_close(torch.cat((grads[0][1], grads[1][1]), 2), dk)
    torch.testing.assert_close(torch.cat((grads[0][2], grads[1][2]), 2), dv)


@every_backend
def test_weights_are_those_of_the_output(backend):
    """After dropout, so weights @ v is out; every head of the average has the same share."""
    inputs = detached(make(AttentionCase("drop", dropout=0.3, heads=(4, 2), lengths=(5, 9)), torch.float64))
    q, k, v = (inputs[name] for name in "qkv")
    spec = spec_of(inputs)
    if against(inputs, backend, "forward", "weights"):
        backend = "auto"
    with fastseq.use_backend(backend):
        out, lse = attention(q, k, v, spec)
        w = attention_weights(q, k, lse, spec, False)
        average = attention_weights(q, k, lse, spec, True)
    torch.testing.assert_close(w @ v.repeat_interleave(2, 1), out)
    torch.testing.assert_close(w.mean(1), average)
    assert not torch.allclose(w.sum(-1), torch.ones(()).double())


def test_unwanted_gradients_are_not_computed():
    inputs = make(PLAIN, torch.float32)
    q, k, v = (inputs[name].detach() for name in "qkv")
    out, lse = attention(q, k, v, spec_of(inputs))
    for backend in ABLE:
        with fastseq.use_backend(backend):
            for name, wanted in (("q", 0), ("k", 1), ("v", 2)):
                grads = attention_backward(out, None, q, k, v, out, lse, spec_of(inputs), [i == wanted for i in range(7)])
                assert [grad.numel() > 0 for grad in grads] == [i == wanted for i in range(7)], name


def test_large_scores_do_not_overflow():
    q = torch.full((1, 1, 3, 8), 300.0)
    for backend in ABLE:
        with fastseq.use_backend(backend):
            out, lse = attention(q, q, q, Spec())
        torch.testing.assert_close(out, q)
        torch.testing.assert_close(lse, torch.full((1, 1, 3), 8 * 300.0**2 + torch.tensor(3.0).log().item()))


@pytest.mark.parametrize("case", [replace(PLAIN, right=0), *named("everything", "packed-with-positions")], ids=str)
def test_transforms_take_the_plain_path(case):
    """vmap over heads of arguments, forward-mode and torch.func.grad see through the op."""
    inputs = detached(make(case, torch.float64))
    spec = spec_of(inputs)
    q, k, v = (inputs[name] for name in "qkv")

    def function(q):
        return attention(q, k, v, spec)[0]

    tangent = torch.randn_like(q)
    _, forward = torch.func.jvp(function, (q,), (tangent,))
    _, pull = torch.func.vjp(function, q)
    cotangent = torch.randn_like(forward)
    torch.testing.assert_close((forward * cotangent).sum(), (pull(cotangent)[0] * tangent).sum())
    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf), leaf, cotangent)
    torch.testing.assert_close(pull(cotangent)[0], expected)
    batched = torch.stack((q, q * 2))
    torch.testing.assert_close(torch.func.vmap(function)(batched), torch.stack([function(one) for one in batched]))


@pytest.mark.parametrize("backend", ("auto", "reference"))
@pytest.mark.parametrize("weights", (False, True))
def test_autocast_stays_outside(backend, weights):
    """The op computes in the dtypes it is given, forward and backward."""
    inputs = make(named("everything")[0], torch.float32)
    tensors, spec = differentiable(inputs), spec_of(inputs)

    def run():
        out, lse = attention(inputs["q"], inputs["k"], inputs["v"], spec)
        outputs = (attention_weights(inputs["q"], inputs["k"], lse, spec, True),) if weights else (out, lse)
        grads = torch.autograd.grad([(t * t).sum() for t in outputs], list(tensors.values()), allow_unused=True)
        return [*outputs, *(grad for grad in grads if grad is not None)]

    with fastseq.use_backend(backend):
        expected = run()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results = run()
    assert len(results) == len(expected) and all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("weights", (False, True))
def test_autocast_stays_outside_of_plain_torch(weights):
    """The backward of a backward and transforms run the reference, whose products autocast would lower."""
    inputs = make(named("everything")[0], torch.float32)
    tensors, spec = differentiable(inputs), spec_of(inputs)
    q, k, v = (inputs[name] for name in "qkv")
    tangent = torch.randn_like(q)

    def function(q):
        out, lse = attention(q, k, v, spec)
        return attention_weights(q, k, lse, spec, True) if weights else out

    def run():
        grads = torch.autograd.grad(function(q).square().sum(), list(tensors.values()), create_graph=True, allow_unused=True)
        forward = torch.func.jvp(function, (q.detach(),), (tangent,))
        return [grad for grad in grads if grad is not None], [*forward, torch.func.vmap(function)(q.detach()[None])]

    def twice(grads):
        second = torch.autograd.grad([g.square().sum() for g in grads], list(tensors.values()), allow_unused=True)
        return [grad for grad in second if grad is not None]

    grads, transformed = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered_grads, lowered_transformed = run()
    expected, results = [*grads, *twice(grads), *transformed], [*lowered_grads, *twice(lowered_grads), *lowered_transformed]
    assert len(results) == len(expected) and all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_a_window_costs_what_it_shows(backend, monkeypatch):
    """Tiles of long sequences: every pair that is seen is in one, and few others; the result is that of one tile."""
    monkeypatch.setattr(reference, "_HELD", 1 << 12)
    monkeypatch.setattr(reference, "_ROWS", 16)
    inputs = make(AttentionCase("long", batch=2, lengths=(300, 280), left=20, right=10, mask="bk"), torch.float64)
    q, k, v = (inputs[name] for name in "qkv")
    spec = spec_of(inputs)
    sizes = [(t.rows.stop - t.rows.start) * (t.keys.stop - t.keys.start) for t in reference.tiles(q, k, spec)]
    assert len(sizes) > 10 and sum(sizes) < 2 * 300 * 31 * 2 and max(sizes) <= 1 << 12
    with fastseq.use_backend(backend):
        out, lse = attention(q, k, v, spec)
        grads = torch.autograd.grad((out.sum(), lse.exp().sum()), (q, k, v))
    true_out, true_lse, _ = dense(inputs)
    expected = torch.autograd.grad((true_out.sum(), true_lse.exp().sum()), (q, k, v))
    torch.testing.assert_close((out, lse, *grads), (true_out, true_lse, *expected))


@pytest.mark.parametrize("average", (False, True))
@pytest.mark.parametrize(
    "window", (dict(), dict(right=0, bottom_right=True), dict(left=20, right=10), dict(k_lengths=(170, 90))), ids=str
)
def test_weights_in_blocks(window, average):
    """Blocks of some queries of a sequence give what all at once would."""
    inputs = make(AttentionCase("long", lengths=(150, 170), heads=(4, 2), mask="bhqk", average=average, **window), torch.float64)
    results = TestWithWeights().run(inputs)
    grads = TestWithWeights().gradients(results, inputs)
    expected = TestWithWeights().run_torch(inputs)
    torch.testing.assert_close(results, expected)
    torch.testing.assert_close(grads, TestWithWeights().gradients(expected, inputs))


def test_explain_names_the_reasons():
    q, k, v = (torch.randn(2, 2, *shape) for shape in ((5, 0), (7, 0), (7, 8)))
    text = str(fastseq.explain(attention, q, k, v, Spec(right=0)))
    assert text.startswith("attention forward, float32 on cpu, padded, B=2 H=(2, 2) T=(5, 7) E=(0, 8), causal: reference")
    assert "not cpu: the CPU's kernels have no products without features" in text


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_triton_on_a_gpu(case, dtype):
    TestAttention().check(case, dtype, "triton", "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", WEIGHTS_CASES, ids=str)
def test_triton_weights_on_a_gpu(case, dtype):
    TestWeights().check(case, dtype, "triton", "cuda")
