"""The op on every backend: results, reruns, what it refuses, compilation."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastseq
from fastseq import backends
from fastseq.testing import assert_all_close_to_truth, pooled_error
from support.attention_decode import (
    DECODE_CASES,
    LONG_DECODE_CASES,
    SMALL_DECODE_CASES,
    DecodeCase,
    decode,
    decode_by_torch,
    make_decode,
)
from support.battery import in_fp64

ABLE = ["cpu", "reference", *(["triton"] if "cpu" in backends.BACKENDS["triton"].devices else [])]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

op = torch.ops.fastseq.attention_decode.default


def exactly(inputs):
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def finite(results):
    out, lse = results
    return {"out": out, "lse": lse.masked_fill(lse == -torch.inf, 0)}


@functools.cache
def own_error(case, dtype):
    """PyTorch's in fp64, from that in fp32; in other dtypes it is measured beside the result."""
    if dtype != torch.float64:
        return 0.0
    given = [make_decode(case, torch.float32, seed=seed) for seed in range(4)]
    return in_fp64(max(pooled_error(finite(decode_by_torch(**one)), finite(decode_by_torch(**exactly(one)))) for one in given))


def check(case, dtype, backend, device="cpu"):
    """As close to the truth as PyTorch, and the same bits when run again."""
    inputs = make_decode(case, dtype, device)
    with backends.use_backend(backend):
        results = decode(**inputs)
        again = decode(**inputs)
    by_torch, truth = decode_by_torch(**inputs), decode_by_torch(**exactly(inputs))
    assert torch.equal(results[1] == -torch.inf, by_torch[1] == -torch.inf)
    assert_all_close_to_truth(finite(results), finite(by_torch), finite(truth), own_error=own_error(case, dtype))
    assert all(torch.equal(one, other) for one, other in zip(results, again, strict=True))


@pytest.mark.parametrize("backend", ABLE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", DECODE_CASES, ids=str)
def test_results(case, dtype, backend):
    check(case, dtype, backend)


LONG = [(case, backend) for case in LONG_DECODE_CASES for backend in ABLE]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "backend"), LONG, ids=str)
def test_long_caches(case, backend):
    check(case, torch.float32, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", [*DECODE_CASES, *LONG_DECODE_CASES], ids=str)
def test_triton_on_a_gpu(case, dtype):
    check(case, dtype, "triton", "cuda")


@pytest.mark.parametrize("backend", ABLE)
def test_memory_layout_is_the_contracts(backend):
    inputs = make_decode(DecodeCase(queries=3), torch.float32)
    with backends.use_backend(backend):
        out, lse = decode(**inputs)
    assert out.transpose(1, 2).is_contiguous() and lse.is_contiguous() and lse.dtype == torch.float32


@pytest.mark.parametrize("backend", ABLE)
def test_lengths_beyond_the_cache_are_clamped(backend):
    inputs = make_decode(DecodeCase(lengths=(35, 0)), torch.float32)
    with backends.use_backend(backend):
        expected = decode(**inputs)
        results = decode(**inputs | {"lengths": torch.tensor([99, -5], dtype=torch.int32)})
    assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))


@pytest.mark.parametrize("backend", ABLE)
@pytest.mark.parametrize("case", SMALL_DECODE_CASES, ids=str)
def test_opcheck(case, backend):
    inputs = make_decode(case, torch.float32)
    with backends.use_backend(backend):
        results = torch.library.opcheck(op, tuple(inputs.values()))
    assert set(results.values()) == {"SUCCESS"}, results


def test_wanted_gradients_are_refused():
    inputs = make_decode(DecodeCase(), torch.float32)
    for name in ("q", "k_cache", "v_cache"):
        wanting = inputs | {name: inputs[name].detach().requires_grad_()}
        with pytest.raises(RuntimeError, match=r"has no backward.*fastseq\.functional\.attention"):
            decode(**wanting)
        with torch.no_grad():
            decode(**wanting)


def test_compile_one_graph_for_every_length():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(tensors):
        return decode(**tensors, scale=0.3, num_splits=2)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    graphs = 0  # what the first call compiled
    for lengths, capacity in (((9, 3, 7), 11), ((12, 5, 2, 0, 8, 8, 1), 17)):  # sizes differ, or Dynamo takes them for one
        case = DecodeCase(lengths=lengths, capacity=capacity, queries=5, features=6, features_v=9)
        inputs = make_decode(case, torch.float32)
        tensors = {name: inputs[name] for name in ("q", "k_cache", "v_cache", "lengths")}
        torch.testing.assert_close(compiled(tensors), step(tensors))
        graphs = graphs or counter.frame_count
    assert counter.frame_count == graphs


def test_vmap_and_functional_transforms_run_the_reference():
    inputs = make_decode(DecodeCase(lengths=(19, 35)), torch.float64)
    expected, _ = decode(**inputs)
    stacked, _ = torch.func.vmap(lambda q: decode(**inputs | {"q": q}))(torch.stack([inputs["q"], 2 * inputs["q"]]))
    torch.testing.assert_close(stacked[0], expected)
    torch.testing.assert_close(stacked[1], decode(**inputs | {"q": 2 * inputs["q"]})[0])


def test_explain_names_the_call():
    inputs = make_decode(DecodeCase(page=5, softcap=2.0), torch.float32)
    explanation = fastseq.explain(decode, **inputs)
    assert explanation.backends == ["cpu"]
    text = str(explanation)
    assert "attention_decode decode" in text and "paged" in text and "softcap" in text
