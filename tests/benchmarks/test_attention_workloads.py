"""The formulas of attention alone, its check, and providers that refuse honestly."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from fastseq.benchmarks.measure.case import Case, Participant
from fastseq.benchmarks.measure.check import check_provider, problem_of
from fastseq.benchmarks.measure.runner import Runner
from fastseq.benchmarks.measure.timing import Effort
from fastseq.benchmarks.providers.attention import (
    ATTENTION_PROVIDERS,
    EAGER,
    FLASH,
    FLEX,
    FLEX_ON_CPU,
    OWN,
    OWN_MODULE,
    REFORMER,
    SDPA,
    TORCH_MODULE,
    cpp_compiler,
    flex_call,
    flex_mask,
)
from fastseq.benchmarks.providers.base import Provider
from fastseq.benchmarks.providers.onnx_attention import FUNCTIONS, ONNX, ONNX_ATTENTION_PROVIDERS
from fastseq.benchmarks.roofline.model import roofline_of
from fastseq.benchmarks.roofline.peaks import Peaks
from fastseq.benchmarks.workloads.attention import CASES, AttentionWorkload, Bound, leaves_of, plain
from fastseq.benchmarks.workloads.attention_textbook import shifted, softmax_attention, t5_buckets, visible


def workload(function, mode="training", **more):
    return AttentionWorkload(function, **({"T": 70, "B": 2, "I": 64, "H": 64, "heads": 4, "mode": mode} | more))


POINTS = {
    "dense": workload("dense"),
    "causal, grouped": workload("dense", causal=True, kv_heads=2),
    "window": workload("window", causal=True, window=9),
    "band": workload("band", window=9),
    "blocks": workload("blocks", causal=True, block=16),
    "alibi, grouped": workload("alibi", kv_heads=2),
    "softcap": workload("softcap"),
    "bias, grouped": workload("bias", kv_heads=2),
    "t5": workload("t5"),
    "transformer-xl": workload("transformer-xl", causal=True),
    "self": workload("self"),
    "weights": workload("weights"),
    "padding": workload("padding"),
    "decode": workload("decode", "inference", T=1, keys=150, kv_heads=2),
    "hashed": workload("hashed", causal=True, T=96, block=16),
    "hashed, one chunk": workload("hashed", causal=True, block=70),
}


@pytest.mark.parametrize(
    ("w", "flops"),
    [
        (workload("dense", "inference", T=8, B=3), 4 * 3 * 64 * 8 * 8),
        (workload("dense", "training", T=8, B=3), 3.5 * 4 * 3 * 64 * 8 * 8),
        (workload("dense", "backward", T=8, B=3, causal=True), 2.5 * 4 * 3 * 64 * 8 * 8 / 2),
        (workload("dense", "inference", T=8, keys=20), 4 * 2 * 64 * 8 * 20),
        (workload("window", "inference", T=8, causal=True, window=3), 4 * 2 * 64 * (1 + 2 + 6 * 3)),
        (workload("window", "inference", T=8, causal=True, window=30), 4 * 2 * 64 * 36),
        (workload("weights", "inference", T=8), 4 * 2 * 64 * 8 * 8 + 2 * 16 * 4 * 64 * 64),
        (workload("hashed", "inference", T=64, causal=True, block=8), 4 * 2 * 64 * 64 * 2 * 8 / 2),
        (workload("hashed", "inference", T=64, block=64), 4 * 2 * 64 * 64 * 64),
    ],
)
def test_flops(w, flops):
    assert w.flops == flops


@pytest.mark.parametrize("name", ["window", "blocks"])
def test_pairs_are_those_that_are_seen(name):
    """Blocks count as whole ones: their edges along the diagonal are computed as well."""
    w = replace(POINTS[name], T=64)
    seen = visible(w, "cpu").sum().item()
    assert w.pairs() == seen if name == "window" else w.pairs() >= seen


def test_bytes_and_roofline():
    w = workload("decode", "inference", T=1, B=3, keys=100, kv_heads=2, H=64)
    assert w.bytes == 4 * 3 * 16 * (2 * 4 * 1 + 2 * 2 * 100)
    assert replace(POINTS["hashed"], mode="inference").bytes == 4 * 3 * 2 * 96 * 64  # queries that are keys, values, the result
    slow_memory = Peaks("cpu", 1, "float32", copy={256: 1e12, 131072: 1e6}, gemm=1e12)
    assert roofline_of(w, slow_memory).seconds == pytest.approx(w.bytes / 1e6) and roofline_of(w, slow_memory).bound == "memory"
    slow_products = Peaks("cpu", 1, "float32", copy={256: 1.0, 131072: 1e12}, gemm=1e6)
    assert roofline_of(w, slow_products).seconds == pytest.approx(w.flops / 1e6)
    assert roofline_of(w, slow_products).bound == "arithmetic"


def test_the_textbook_form_is_torchs_attention():
    q, k, v = (torch.randn(2, 4, 9, 8, dtype=torch.float64) for _ in "qkv")
    k, v = k[:, :2], v[:, :2]
    bias = torch.randn(4, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(
        softmax_attention(q, k, v, 8**-0.5, bias), F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=True)
    )


def test_relative_shift_and_buckets_by_hand():
    product = torch.arange(9.0).view(1, 3, 3)  # row 2 of the table is distance 0
    found = shifted(product)
    for i in range(3):
        assert found[0, i, : i + 1].tolist() == [product[0, i, j - i + 2].item() for j in range(i + 1)]
    buckets = t5_buckets(200, 200, "cpu")
    assert [buckets[100, 100 + d].item() for d in (0, -1, -7, -8, -90, 1, 7, 99)] == [0, 1, 7, 8, 14, 17, 23, 31]
    assert t5_buckets(200, 200, "cpu", bidirectional=False)[100, 130].item() == 0


@pytest.mark.parametrize("name", POINTS)
def test_every_provider_that_is_there_passes_the_gate(name):
    w, passed = POINTS[name], []
    for provider in ATTENTION_PROVIDERS.values():
        if provider.unavailable(w):
            continue
        result = check_provider(lambda shape, p=provider: (p.build(shape), ""), w)
        assert result.ok, f"{provider.name}: {result.reason}"
        assert 0 < result.error <= result.bound < 1e-4
        passed.append(provider.name)
    if CASES[w.function].hashed:
        pytest.importorskip("transformers")
        assert passed == [REFORMER]
    else:
        torchs = EAGER if w.function == "softcap" else SDPA
        assert {TORCH_MODULE, OWN_MODULE} <= set(passed) if CASES[w.function].module else {torchs, OWN} <= set(passed)


@pytest.mark.filterwarnings("ignore:.*without torch.compile")
@pytest.mark.parametrize("name", [n for n in POINTS if not (CASES[POINTS[n].function].module or n.startswith("hashed"))])
def test_flex_attention_computes_the_same(name):
    """Uncompiled, which needs no GPU; forward only."""

    def run(w, tensors):
        def attention(q, k, v, **options):
            return flex_attention(q, k, v, block_mask=flex_mask(w, q.device), **options)

        return Bound(lambda: flex_call(w, tensors, attention), leaves_of(w, tensors))

    result = check_provider(lambda shape: (run, ""), replace(POINTS[name], mode="inference"))
    assert result.ok, result.reason


@pytest.mark.parametrize("name", [n for n in POINTS if POINTS[n].function in FUNCTIONS])
def test_onnx_runtime_computes_the_same(name):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    provider = ONNX_ATTENTION_PROVIDERS[ONNX]
    for w in (replace(POINTS[name], mode="inference"), replace(POINTS[name], mode="inference", dtype="float16", threads=2)):
        assert provider.unavailable(w) is None
        result = check_provider(lambda shape: (provider.build(shape), ""), w)
        assert result.ok, result.reason


@pytest.mark.slow
@pytest.mark.skipif(cpp_compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("name", ["band", "alibi, grouped", "softcap"])
def test_flex_attention_is_compiled_for_a_cpu(name):
    provider = ATTENTION_PROVIDERS[FLEX_ON_CPU]
    w = replace(POINTS[name], mode="inference")
    assert provider.unavailable(w) is None
    result = check_provider(lambda shape: (provider.build(shape), ""), w)
    assert result.ok, result.reason


def test_a_band_is_the_window_of_both_sides():
    w = replace(POINTS["band"], T=64)
    seen = visible(w, "cpu")
    assert w.pairs() == seen.sum().item() and torch.equal(seen, seen.T)
    assert seen[20].nonzero().flatten().tolist() == list(range(11, 30))


def test_the_backward_alone_can_be_run_again():
    w = replace(POINTS["transformer-xl"], mode="backward")
    call = w.call(ATTENTION_PROVIDERS[OWN].build(w), problem_of(w))
    run = call.run
    first, second = run(), run()
    assert [t.shape for t in first] == [t.shape for t in call.leaves.values()]
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_settings_hold_inside_and_end():
    w = workload("dense", deterministic=True, tf32=True)
    before = torch.backends.cuda.matmul.allow_tf32
    with w.settings():
        assert torch.are_deterministic_algorithms_enabled() and torch.backends.cuda.matmul.allow_tf32
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cuda.matmul.allow_tf32 == before


@pytest.mark.parametrize(
    ("provider", "w", "reason"),
    [
        ("torch SDPA (cudnn)", POINTS["dense"], "torch refuses: No viable backend"),
        ("torch SDPA (flash)", POINTS["bias, grouped"], "torch refuses: No available kernel"),
        (FLEX, POINTS["dense"], "on a GPU only"),
        (FLEX_ON_CPU, POINTS["dense"], "has no backward there"),
        (SDPA, POINTS["softcap"], "has nothing for capped scores"),
        (FLASH, POINTS["dense"], "flash-attn"),
        (FLASH, POINTS["t5"], "has nothing for T5's relative bias table"),
        (SDPA, POINTS["weights"], "has nothing for averaged attention weights"),
        (OWN_MODULE, POINTS["dense"], "has nothing for"),
        (OWN, POINTS["hashed"], "has nothing for hashed attention"),
        (REFORMER, POINTS["dense"], "has nothing for no mask"),
        (REFORMER, replace(POINTS["hashed"], T=90), "a multiple of its chunks of 16, got 90"),
    ],
)
def test_who_cannot_says_why(provider, w, reason):
    assert reason in ATTENTION_PROVIDERS[provider].unavailable(w)


def test_a_backend_that_takes_the_call_is_not_refused():
    assert ATTENTION_PROVIDERS["torch SDPA (math)"].unavailable(POINTS["bias, grouped"]) is None
    inference = replace(POINTS["bias, grouped"], mode="inference")
    assert ATTENTION_PROVIDERS["torch SDPA (flash)"].unavailable(inference) is None  # a mask is no obstacle, its gradient is


def test_the_choice_of_torch_is_named():
    for name, choice in (("dense", "FLASH_ATTENTION"), ("bias, grouped", "MATH")):
        w = POINTS[name]
        call = w.call(ATTENTION_PROVIDERS[SDPA].build(w), problem_of(w))
        assert ATTENTION_PROVIDERS[SDPA].chose(call) == [choice]


def _off(w, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=w.causal) * 1.0001


def _off_by_one(w, q, k, v):
    return softmax_attention(q, k, v, w.E**-0.5, None, visible(replace(w, window=w.window + 1), q.device))


def _wrong_gradient(w, q, k, v):
    return F.scaled_dot_product_attention(q, k + 1e-3 * (k - k.detach()), v, is_causal=w.causal)


def _wrong_when_long(w, q, k, v):
    return F.scaled_dot_product_attention(q, k, v) + (0.1 if w.T > 67 else 0)


@pytest.mark.parametrize(
    ("function", "w", "reason"),
    [
        (_off, POINTS["dense"], "small shape.*output is off by"),
        (_off_by_one, POINTS["window"], "small shape.*output is off by"),
        (_wrong_gradient, POINTS["dense"], "grad k is off by"),
        (_wrong_when_long, POINTS["dense"], "actual shape.*output is off by"),
        (lambda w, q, k, v: q.new_full(q.shape, math.nan), replace(POINTS["dense"], mode="inference"), "off by nan"),
        (lambda w, q, k, v: q[..., :-1], replace(POINTS["dense"], mode="inference"), "has shape"),
    ],
)
def test_wrong_attention_has_no_time_and_no_speed_up(function, w, reason):
    providers = ATTENTION_PROVIDERS | {"wrong": Provider("wrong", "", "", lambda w: plain(function))}
    runner = Runner("cpu", providers=providers)
    runner.peaks[1, "float32"] = Peaks("cpu", 1, "float32", {1: 1e11, 64: 1e11}, {1: 1e10}, 1e11)
    effort = Effort(seconds=0.01, min_rounds=2, max_rounds=2)
    case = Case("attention", "dense", (Participant(SDPA, w), Participant("wrong", w)), effort, (("wrong", SDPA),))
    good, bad = runner.run(case)
    assert good.ok and good.time and good.detail["flops"] == w.flops
    assert bad.status == "wrong"
    assert re.search(reason, bad.reason), bad.reason
    assert (bad.time, bad.ratio, bad.roofline, bad.memory) == (None, None, None, None)


@pytest.mark.parametrize(
    ("w", "reason"),
    [
        (POINTS["dense"], "has inference only"),
        (replace(POINTS["t5"], mode="inference"), "has nothing for t5"),
        (replace(POINTS["dense"], mode="inference", dtype="bfloat16"), "has no bfloat16"),
        (replace(POINTS["dense"], mode="inference", device="cuda"), "is compared on a CPU"),
    ],
)
def test_what_onnx_runtime_lacks(w, reason):
    assert reason in ONNX_ATTENTION_PROVIDERS[ONNX].unavailable(w)
