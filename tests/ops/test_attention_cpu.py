"""The CPU kernels of attention at every instruction set of this machine: whatever shape, stride and combination of features.

The bound is PyTorch's best path: of 16-bit inputs its math path, which computes in fp32 and rounds at the end.
"""

from __future__ import annotations

import functools
import itertools
import math
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.common_methods_invocations import op_db

import fastseq
from fastseq import backends
from fastseq.backends import library
from fastseq.backends.cpu import attention as cpu
from fastseq.choice.device import LEVELS
from fastseq.ops import _attention_eager as eager
from fastseq.ops import attention as op
from fastseq.ops.attention import GRADIENTS, attention, attention_weights
from fastseq.ops.types import Spec
from fastseq.testing import FACTOR, assert_all_close_to_truth, assert_close_to_truth, pooled_error
from support.attention import ATTENTION_CASES, PLAIN, WEIGHTS_CASES, AttentionCase, dense, make, named, spec_of
from support.attention_decode import DECODE_CASES, DecodeCase, decode, decode_by_torch, make_decode
from support.battery import SEEDS, OpBattery, in_fp64

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
THREADS = (1, 2, 3)

ours = fastseq.functional.scaled_dot_product_attention
theirs = torch.nn.functional.scaled_dot_product_attention


@contextmanager
def at(level: str) -> Iterator[str]:
    """The level that calls within run at: this one, or the highest that the processor has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTSEQ_CPU_LEVEL", level)
        yield torch.ops.fastseq_native.cpu_level()


def reached(level: str) -> bool:
    with at(level) as found:
        return found == level


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scratch holds NaN until it is written; AMX multiplies float32 in parts, whatever the size."""
    assert library.reason() is None
    monkeypatch.setenv("FASTSEQ_CPU_POISON", "1")
    monkeypatch.setenv("FASTSEQ_CPU_PARTS", "1")
    with fastseq.use_backend("cpu"):
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def wide(inputs: dict[str, Any]) -> dict[str, Any]:
    """16-bit tensors in fp32; their gradients are rounded on their way back."""
    half = (torch.bfloat16, torch.float16)
    return {name: t.float() if isinstance(t, Tensor) and t.dtype in half else t for name, t in inputs.items()}


class Battery(OpBattery):
    OP = "attention"

    def make(self, case: AttentionCase, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        return make(case, dtype, device, seed)

    def run(self, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        """lse with a finite mark for rows without keys, which the bounds can compare."""
        out, lse = attention(inputs["q"], inputs["k"], inputs["v"], spec_of(inputs))
        return out, torch.where(lse == -torch.inf, 3.0, lse)

    def run_torch(self, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        out, lse, _ = dense(wide(inputs))
        return out.to(inputs["q"].dtype), torch.where(lse == -torch.inf, 3.0, lse)

    def against(self, inputs: dict[str, Any], backend: str, backward: bool) -> list[str]:
        wanted = [name in inputs for name in GRADIENTS] if backward else None
        call = "backward" if backward else "forward"
        return backends.obstacles(backend, op._query(call, *(inputs[name] for name in "qkv"), spec_of(inputs), wanted))

    def magnifies(self, case: AttentionCase) -> bool:
        return True  # the exponential magnifies the rounding of the largest scores


class Weights(Battery):
    def run(self, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        spec, (q, k, v) = spec_of(inputs), (inputs[name] for name in "qkv")
        return (attention_weights(q, k, attention(q, k, v, spec)[1], spec, inputs["case"].average),)

    def run_torch(self, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        weights = dense(wide(inputs))[2]
        assert weights is not None
        return ((weights.mean(1) if inputs["case"].average else weights).to(inputs["q"].dtype),)

    def against(self, inputs: dict[str, Any], backend: str, backward: bool) -> list[str]:
        tensors, spec = [inputs[name] for name in "qk"], spec_of(inputs)
        if not backward:
            query = op._query("weights", *tensors, None, spec)
            return super().against(inputs, backend, False) + backends.obstacles(backend, query)
        wanted = [name in inputs and name != "v" for name in GRADIENTS]
        return backends.obstacles(backend, op._query("weights_backward", *tensors, None, spec, wanted))


class WithWeights(Battery):
    """Output, lse and weights of one call, whose gradients are those of one pass."""

    def run(self, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        out, lse, weights = eager.attention(*(inputs[name] for name in "qkv"), spec_of(inputs), inputs["case"].average)
        return out, torch.where(lse == -torch.inf, 3.0, lse), weights

    def run_torch(self, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        return *super().run_torch(inputs), *WEIGHTS.run_torch(inputs)

    def against(self, inputs: dict[str, Any], backend: str, backward: bool) -> list[str]:
        return super().against(inputs, backend, backward) + WEIGHTS.against(inputs, backend, backward)


BATTERY, WEIGHTS, WITH_WEIGHTS = Battery(), Weights(), WithWeights()


def told(outputs: tuple[Tensor, ...], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"output {i}": t.detach() for i, t in enumerate(outputs)} | {f"gradient of {n}": t for n, t in gradients.items()}


def expected(battery: Battery, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By PyTorch in the dtype, and in fp64; what is nothing but rounding there is zero."""
    outputs = battery.run_torch(inputs)
    by_torch, truth = told(outputs, battery.gradients(outputs, inputs)), told(*battery.truth(inputs))
    truth = {name: torch.zeros_like(t) if t.numel() and t.abs().max() < 1e-9 else t for name, t in truth.items()}
    return by_torch, truth


def found(battery: Battery, inputs: dict[str, Any]) -> dict[str, Tensor]:
    outputs = battery.run(inputs)
    with battery.backward_of(inputs, "cpu"):
        return told(outputs, battery.gradients(outputs, inputs))


def cancelled(inputs: dict[str, Any], lse: Tensor | None = None) -> dict[str, float]:
    """Of gradients, what is left when products that are equal are subtracted: of one key, all that there is.

    The gradient of a score is w (dout v - sum dout out), of two sums in their own order; each is at most |dout| |v|. And w is the
    exponential of score - lse, whose rounding is that of lse wherever w counts. That of v is a sum of w dout over the queries,
    whatever is left of it.
    """
    case, q, k, v = inputs["case"], *(inputs[name] for name in "qkv")
    if 0 in (*q.shape, *k.shape, *v.shape):
        return {}
    unit = torch.finfo(torch.promote_types(q.dtype, torch.float32)).eps / 2
    exponent = lse.detach().abs().max().item() if lse is not None and lse.numel() else 0.0
    most = 5.0 * unit * (1 + exponent) / max(1 - case.dropout, 1e-3)  # of normal deviates
    score = most * math.sqrt(v.shape[-1]) * v.detach().double().norm(dim=-1).max().item()
    scale = abs(1 / math.sqrt(q.shape[-1]) if case.scale is None else case.scale)
    rows = math.sqrt(q[..., 0].numel())  # that a gradient of something else than a query is summed over
    of = {"q": "k", "k": "q", "relative_q": "relative_k", "relative_k": "relative_q"}
    factors = {name: scale * inputs[other].detach().abs().max().item() for name, other in of.items() if other in inputs}
    factors = {name: factors.get(name, 1.0) * (1 if name.endswith("q") else rows) for name in GRADIENTS if name != "v"}
    return {f"gradient of {name}": score * factor for name, factor in factors.items()} | {"gradient of v": most * rows}


def compare(results: list[dict[str, Tensor]], where: str, own: float, rest: dict[str, float]) -> None:
    """Ours, torch's and the truth by the rule of fastseq.testing; what cancels may be off by ``rest`` in any case."""
    actual, by_torch, truth = results
    own = max(own, pooled_error(by_torch, truth))
    for name, value in truth.items():
        scale = value.abs().max().item() if value.numel() else 0.0
        error = max(own, rest.get(name, 0.0) / (FACTOR * scale)) if scale else own
        ours, torchs = actual[name], by_torch[name]
        if not scale and name in rest:  # nothing to be relative to
            value = torchs = ours.clamp(-rest[name], rest[name])
        assert_close_to_truth(ours, torchs, value, f"{name} {where}", own_error=error)


def check(battery: Battery, inputs: dict[str, Any], levels: tuple[str, ...] = LEVELS) -> None:
    """At all these levels of this machine."""
    by_torch, truth = expected(battery, inputs)
    own, rest = battery.own_error(inputs["case"], inputs["q"].dtype), cancelled(inputs, truth.get("output 1"))
    for level in filter(reached, levels):
        with at(level):
            results = found(battery, inputs)
        compare([results, by_torch, truth], f"at {level}", own, rest)


def refused(battery: Battery, case: AttentionCase) -> list[str]:
    return battery.against(make(case, torch.float32), "cpu", False)


def listed(battery: Battery, case: AttentionCase, dtype: torch.dtype) -> None:
    reasons = refused(battery, case)
    if reasons:
        pytest.skip("; ".join(reasons))
    check(battery, make(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_every_feature(case, dtype):
    listed(BATTERY, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", WEIGHTS_CASES, ids=str)
def test_weights(case, dtype):
    listed(WEIGHTS, case, dtype)


def returning_weights(cases: Any) -> list[AttentionCase]:
    """Per head and averaged in turns."""
    padded = (case for case in cases if not case.packed)
    return [replace(case, average=i % 2 == 1) for i, case in enumerate(padded)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", returning_weights(ATTENTION_CASES), ids=str)
def test_gradients_of_output_and_weights(case, dtype):
    listed(WITH_WEIGHTS, case, dtype)


# one less and one more than lanes (4, 8, 16), rows of a tile (16), depths of a tile (32), blocks of queries and of keys
EDGES = (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 193, 255, 257)
WIDTHS = (64, 1, 3, 16, 33, 128, 31, 40, 80, 17, 96, 7, 32, 65, 15, 48, 112, 130, 8, 127, 24, 63, 72)
EDGE_CASES = [
    AttentionCase(
        f"{rows}x{keys}-{E}:{Ev}{'-causal' if causal else ''}",
        batch=1,
        heads=(2, 1),
        lengths=(rows, keys),
        features=(E, Ev),
        right=0 if causal else -1,
        bottom_right=i % 4 == 3,
        time_first=i % 3 == 0,
    )
    for i, (rows, keys, E, Ev) in enumerate(zip(EDGES, EDGES[7:] + EDGES[:7], WIDTHS, WIDTHS[5:] + WIDTHS[:5], strict=True))
    for causal in (False, True)
] + [
    AttentionCase(f"{T}x{T}-64-causal", batch=1, heads=(1, 1), lengths=(T, T), features=(64, 64), right=0)
    for T in (16, 64, 65, 128, 129, 257)
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", EDGE_CASES, ids=str)
def test_edges_of_blocks(case, dtype):
    check(BATTERY, make(case, dtype))


# one off at the edge of a block of queries or keys
WINDOWS = [
    AttentionCase(f"window{left}:{right}", batch=1, heads=(1, 1), lengths=(T, T), features=(16, 16), left=left, right=right)
    for T, left, right in ((130, 63, 0), (130, 64, 0), (130, 65, 64), (200, 31, 33), (200, 128, 1), (140, 0, 0), (140, 1, 127))
] + [
    AttentionCase("mask-edges", batch=1, heads=(2, 2), lengths=(129, 130), mask="qk", dead=True),
    AttentionCase("lengths-edges", batch=4, lengths=(65, 130), q_lengths=(65, 64, 16, 1), k_lengths=(128, 129, 64, 1), right=0),
    AttentionCase("packed-edges", packed=((64, 64), (1, 130), (65, 16), (16, 65)), right=0, bottom_right=True),
    AttentionCase("blocks-edges", batch=1, blocks="hqk", block_size=16, lengths=(130, 131)),
    AttentionCase("blocks-of-64", batch=1, blocks="qk", block_size=64, lengths=(130, 193), right=0, bottom_right=True),
    AttentionCase("bias-edges", batch=2, lengths=(65, 129), bias="hk", heads=(4, 2)),
    AttentionCase("sinks-edges", batch=2, lengths=(65, 129), heads=(4, 2), sinks=True),
    AttentionCase("hiding-bias-edges", batch=2, lengths=(65, 129), bias="bqk", hiding_bias=True),
    AttentionCase("relative-bias-edges", batch=1, heads=(2, 1), lengths=(65, 129), relative_bias=70),
    AttentionCase("relative-bias-of-all", batch=1, heads=(2, 1), lengths=(65, 129), relative_bias=257, slopes=1, offset=-3),
    # few queries of heads that share keys: their rows together are more than go over the keys at once, or end within a group
    AttentionCase("few-shared", batch=2, heads=(8, 2), lengths=(5, 300), features=(64, 40), right=0, bottom_right=True),
    AttentionCase("few-shared-window", batch=1, heads=(9, 1), lengths=(8, 290), left=70, right=2, offset=200, bias="bqk"),
    AttentionCase("few-shared-lengths", batch=3, heads=(6, 2), lengths=(7, 270), q_lengths=(7, 3, 0), k_lengths=(270, 33, 1)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", WINDOWS, ids=str)
def test_edges_of_what_is_seen(case, dtype):
    check(BATTERY, make(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
@pytest.mark.parametrize("battery", (WEIGHTS, WITH_WEIGHTS), ids=("weights", "both"))
@pytest.mark.parametrize("case", returning_weights((*EDGE_CASES[::3], *WINDOWS)), ids=str)
def test_gradients_of_weights_at_edges(case, battery, dtype):
    """Keys of several chunks, whose weights are seen before their gradients are formed."""
    check(battery, make(case, dtype))


def test_gradients_of_weights_of_any_strides(level):
    """Bit for bit what contiguous gradients give; where autograd has expanded one number, that is what is read."""
    for case, dtype in itertools.product(named("several-tiles", "grouped", "key-lengths"), DTYPES):
        inputs = make(case, dtype)
        (q, k, v), spec = (inputs[name].detach() for name in "qkv"), spec_of(inputs)
        for average in (False, True):
            out, lse, weights = eager.attention(q, k, v, spec, average)
            one = torch.randn((), dtype=torch.float64).to(dtype)
            for dw in (
                torch.randn_like(weights).mT.contiguous().mT,
                one.expand(weights.shape),
                weights[..., :1].expand_as(weights),
            ):
                results = [
                    cpu.attention_gradients(out, lse, given, average, q, k, v, out, lse, spec, [True] * 3 + [False] * 4 + [True])
                    for given in (dw, dw.contiguous())
                ]
                assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("both", (False, True))
@pytest.mark.parametrize("average", (False, True))
@pytest.mark.parametrize("dropout", (0.0, 0.3))
@pytest.mark.parametrize("batch_first", (False, True))
def test_modules_weights_have_gradients(level, batch_first, dropout, average, both):
    """nn.MultiheadAttention in training, between its projections one call: the reference's gradients, and of the same dropout."""
    for steps, padded, forced in itertools.product((9, 130), (False, True), (False, True)):
        torch.manual_seed(0)
        module = fastseq.MultiheadAttention(12, 3, dropout=dropout, batch_first=batch_first).double()
        x = torch.randn(2, steps, 12, dtype=torch.float64, requires_grad=True)
        padding = (torch.arange(steps) >= torch.tensor([[steps], [steps - 4]])) if padded else None
        results = []
        for backend in ("cpu" if forced else "auto", "reference"):
            with fastseq.use_backend(backend):
                torch.manual_seed(1)
                out, weights = module(*[x if batch_first else x.transpose(0, 1)] * 3, padding, average_attn_weights=average)
                factor = torch.linspace(-1, 1, steps, dtype=torch.float64)
                loss = (weights.square() * factor).sum() + ((out * out).sum() if both else 0)
                wanted = [x, module.in_proj_weight, *([module.out_proj.weight] if both else [])]
                results.append((out, weights, *torch.autograd.grad(loss, wanted)))
        torch.testing.assert_close(results[0], results[1])


# any call

SIZES = st.integers(1, 9) | st.sampled_from((15, 16, 17, 31, 32, 33, 47, 64, 65, 70))
PAIRS = st.sets(st.sampled_from("bhqk"), min_size=1).map(lambda letters: "".join(sorted(letters, key="bhqk".index)))
HIDES = ("window", "mask", "lengths", "blocks")
SHAPES = ("bias", "relative_bias", "relative_k", "slopes", "softcap", "sinks", "dropout", "scale")
FAMILIES = {
    "plain": (),
    "hidden": HIDES,
    "scores": SHAPES,
    "everything": (*HIDES, *SHAPES),
    "packed": ("packed", "window", *(name for name in SHAPES if name != "bias")),
}


def lacking(name: str) -> bool:
    """Whether the CPU has no kernel for this feature, alone."""
    alone = {
        "window": {"left": 2, "right": 1},
        "lengths": {"k_lengths": (3, 7)},
        "packed": {"packed": ((5, 7), (3, 3))},
        "mask": {"mask": "qk"},
        "bias": {"bias": "qk"},
        "blocks": {"blocks": "qk", "block_size": 16},
        "relative_bias": {"relative_bias": 9},
        "relative_k": {"relative_k": 9},
        "slopes": {"slopes": 1},
        "softcap": {"softcap": 1.0},
        "sinks": {"sinks": True},
        "dropout": {"dropout": 0.3},
        "scale": {"scale": -0.3},
    }
    return bool(refused(BATTERY, replace(PLAIN, **alone[name])))


@functools.cache
def features_of(family: str) -> tuple[str, ...]:
    return tuple(name for name in FAMILIES[family] if not lacking(name))


@st.composite
def calls(draw: st.DrawFn, family: str) -> AttentionCase:
    """A case with some features of a family, those that the CPU has a kernel for."""
    features = features_of(family)
    used = draw(st.sets(st.sampled_from(features))) if features else set()
    used |= {"packed"} if family == "packed" else set()
    batch, keys = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    group, (tq, tk) = draw(st.sampled_from((1, 1, 2, 3))), (draw(SIZES), draw(SIZES))
    e = draw(SIZES)
    more: dict[str, Any] = {"features": (e, draw(st.just(e) | SIZES)), "time_first": draw(st.booleans())}
    if "packed" in used:
        length = st.integers(0, 20)
        more["packed"] = tuple((draw(length), draw(length)) for _ in range(batch))
        if not sum(q * k for q, k in more["packed"]):
            more["packed"] = (*more["packed"][1:], (3, 5))
        tq, tk = (max(pair[i] for pair in more["packed"]) for i in (0, 1))
    if "window" in used:
        side = st.just(-1) | st.integers(0, 20)
        more |= {"left": draw(side), "right": draw(st.just(0) | side), "bottom_right": draw(st.booleans())}
        more["offset"] = draw(st.just(0) | st.integers(-5, 20))
    if "mask" in used:
        more |= {"mask": draw(PAIRS), "dead": draw(st.booleans())}
    if "lengths" in used:
        for name, most in draw(
            st.sampled_from(((("q_lengths", tq),), (("k_lengths", tk),), (("q_lengths", tq), ("k_lengths", tk))))
        ):
            more[name] = tuple(draw(st.integers(0, most)) for _ in range(batch))
    if "blocks" in used:
        more |= {"blocks": draw(PAIRS.filter(lambda p: "q" in p and "k" in p)), "block_size": 16}
    if "bias" in used:
        more |= {"bias": draw(PAIRS), "hiding_bias": draw(st.booleans())}
    if "scale" in used:
        more["scale"] = draw(st.sampled_from((0.0, -0.3, -1.0, 0.05, 1.0)))
    more |= {name: draw(st.integers(1, tq + tk)) for name in ("relative_bias", "relative_k") if name in used}
    more |= {"slopes": draw(st.sampled_from((1, batch)))} if "slopes" in used else {}
    more |= {"softcap": draw(st.sampled_from((0.7, 5.0, 50.0)))} if "softcap" in used else {}
    more |= {"dropout": draw(st.sampled_from((0.1, 0.5, 0.9)))} if "dropout" in used else {}
    more |= {"sinks": True} if "sinks" in used else {}
    return AttentionCase("fuzzed", batch=batch, heads=(keys * group, keys), lengths=(tq, tk), **more)


@st.composite
def placed(draw: st.DrawFn, inputs: dict[str, Any]) -> dict[str, Any]:
    """The same values anywhere in memory, NaN around them: dimensions in any order, but the last, in rows with room between."""
    moved = dict(inputs)
    for name in ("q", "k", "v", "bias", "mask", "relative_q"):
        t = inputs.get(name)
        if t is None:
            continue
        order = draw(st.permutations(range(t.dim() - 1)))
        room = [draw(st.integers(0, 2)) for _ in range(t.dim())]
        moved[name] = anywhere(t, order, room)
    return moved


def anywhere(t: Tensor, order: Any, room: Any) -> Tensor:
    ordered = t.detach().permute(*order, t.dim() - 1)
    filling = torch.nan if t.is_floating_point() else True
    around = torch.full([n + extra for n, extra in zip(ordered.shape, room, strict=True)], filling, dtype=t.dtype)
    place = around[tuple(slice(extra // 2, extra // 2 + n) for n, extra in zip(ordered.shape, room, strict=True))]
    place.copy_(ordered)
    back = [order.index(d) for d in range(t.dim() - 1)]
    return place.permute(*back, t.dim() - 1).detach().requires_grad_(t.requires_grad)


def fuzzed(examples: int) -> Any:
    """The same examples in every run."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@fuzzed(40)
@given(data=st.data())
def test_any_call(family, dtype, data):
    inputs = make(data.draw(calls(family)), dtype)
    check(BATTERY, data.draw(placed(inputs)))


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "packed"])
@fuzzed(20)
@given(data=st.data())
def test_weights_of_any_call(family, dtype, data):
    case = replace(data.draw(calls(family)), average=data.draw(st.booleans()))
    check(WITH_WEIGHTS, data.draw(placed(make(case, dtype))))


# what torch calls attention


def torch_results(function: Any, tensors: dict[str, Any], options: dict[str, Any]) -> dict[str, Tensor]:
    """Output and gradients, the cotangent of the output being the same at every call."""
    leaves = {
        name: t.detach().clone().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t
        for name, t in tensors.items()
    }
    out = function(**leaves, **options)
    differentiable = {name: t for name, t in leaves.items() if isinstance(t, Tensor) and t.requires_grad}
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(out.dtype)
    return told(
        (out,), dict(zip(differentiable, torch.autograd.grad(out, list(differentiable.values()), cotangent), strict=True))
    )


def by_math(**arguments: Any) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return theirs(**arguments)


def by_flash(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """torch's fused kernel, where it takes the call: with four dimensions."""
    batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    shape = (1,) * (2 - len(batch)) + batch
    out = theirs(*(t.expand(*shape, *t.shape[-2:]) for t in (query, key, value)), attn_mask, **options)
    return out.reshape(*batch, *out.shape[-2:])


def best_of_torchs(tensors: dict[str, Any], options: dict[str, Any]) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """Error and results of torch's path with the smaller error, and the truth."""
    exact = {n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in tensors.items()}
    truth = torch_results(by_math, exact, options)
    if tensors["query"].dtype == torch.float64:
        single = {n: t.float() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in tensors.items()}
        return in_fp64(pooled_error(torch_results(by_math, single, options), truth)), truth, truth
    paths = [torch_results(path, tensors, options) for path in (by_math, by_flash)]
    best = min(paths, key=lambda results: pooled_error(results, truth))
    return pooled_error(best, truth), best, truth


def as_torchs_best(tensors: dict[str, Any], own_error: float = 0.0, **options: Any) -> None:
    """At every level, against fp64; the bound is that of torch's path with the smaller error."""
    own, best, truth = best_of_torchs(tensors, options)
    own = max(own, own_error)
    exact = {n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in tensors.items()}
    q, k, v = (exact[name] for name in ("query", "key", "value"))
    scale = options.get("scale")
    case = replace(PLAIN, scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    rest = cancelled({"case": case, "q": tensors["query"], "k": k, "v": v})
    names = {"q": "query", "k": "key", "bias": "attn_mask"}
    rest = {f"gradient of {names[short]}": rest.get(f"gradient of {short}", 0.0) for short in names}
    for level in filter(reached, LEVELS):
        with at(level):
            results = torch_results(ours, tensors, options)
        compare([results, best, truth], f"at {level}", own, rest)


SAMPLES = range(13)


@functools.cache
def samples(dtype: torch.dtype) -> list[Any]:
    torch.manual_seed(0)
    entry = next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
    every = [s for s in entry.sample_inputs("cpu", dtype, requires_grad=True) if s.kwargs.get("dropout_p", 0) == 0]
    assert len(every) == len(SAMPLES)
    return every


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", SAMPLES)
def test_torchs_samples(index, dtype):
    """Scores of a hundred magnify rounding: as in the battery, torch's error is that of a few sets of inputs."""
    tensors, options = of_sample(samples(dtype)[index])
    own = max(best_of_torchs(shuffled(tensors, seed), options)[0] for seed in SEEDS)
    with fastseq.use_backend("auto"):
        as_torchs_best(tensors, own, **options)


def shuffled(tensors: dict[str, Any], seed: int) -> dict[str, Any]:
    """The same numbers at other places; masks as they are."""
    generator = torch.Generator().manual_seed(seed)
    moved = {name: tensors[name].detach() for name in ("query", "key", "value")}
    moved = {name: t.flatten()[torch.randperm(t.numel(), generator=generator)].view(t.shape) for name, t in moved.items()}
    return tensors | moved


def of_sample(sample: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and options."""
    options = dict(sample.kwargs)
    mask = options.pop("attn_mask", None)
    return dict(query=sample.input, key=sample.args[0], value=sample.args[1], attn_mask=mask), options


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", (0.0, -0.5, -1e-3, 1e-30))
@pytest.mark.parametrize("sizes", ((1, 1), (5, 5), (17, 33), (65, 65), (70, 33)), ids=str)
def test_scales_that_are_not_positive(sizes, scale, dtype):
    torch.manual_seed(0)
    (rows, keys), shape = sizes, (1, 2)
    tensors = dict(query=(*shape, rows, 16), key=(*shape, keys, 16), value=(*shape, keys, 16))
    given = {name: torch.randn(size).to(dtype) for name, size in tensors.items()}
    for causal in (False, True):
        as_torchs_best(given, is_causal=causal, scale=scale)


# float32 by AMX in three parts: of calls without gradients


@pytest.fixture
def amx() -> None:
    if not reached("amx"):
        pytest.skip("no AMX here")


parts = pytest.mark.usefixtures("amx")

# levels that multiply pairs of bfloat16
BY_PAIRS = ("avx512_bf16", "amx")


@pytest.fixture(params=BY_PAIRS)
def pairs(request) -> Iterator[None]:
    with at(request.param) as found:
        if found != request.param:
            pytest.skip(f"no {request.param} here")
        yield


def inference(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return eager.attention(*(inputs[name].detach() for name in "qkv"), spec_of(inputs))


def check_in_parts(inputs: dict[str, Any]) -> None:
    by_torch, truth = ({n: t for n, t in of.items() if n.startswith("output")} for of in expected(BATTERY, inputs))
    out, lse = inference(inputs)
    results = told((out, torch.where(lse == -torch.inf, 3.0, lse)), {})
    compare([results, by_torch, truth], "in parts", BATTERY.own_error(inputs["case"], torch.float32), {})


# more keys than the caches hold: blocks of queries take turns
LONG = [
    AttentionCase(name, batch=1, heads=(2, 1), lengths=(200, keys), features=(64, 64), **options)
    for keys in (1500, 4200)
    for name, options in (
        (f"long-{keys}", {}),
        (f"long-{keys}-causal", dict(right=0, bottom_right=True)),
        (f"long-{keys}-window", dict(left=70, right=3, bottom_right=True)),
        (f"long-{keys}-hidden", dict(mask="qk", dead=True, dropout=0.3)),
        (f"long-{keys}-lengths", dict(k_lengths=(keys - 33,), q_lengths=(131,), sinks=True)),
        (f"long-{keys}-relative", dict(relative_k=300, right=0, offset=900)),
    )
] + [
    AttentionCase("long-queries", heads=(2, 1), lengths=(580, 150), features=(40, 24), left=90, right=0, time_first=True),
    AttentionCase("long-packed", packed=((140, 1500), (3, 7), (33, 1400)), features=(64, 64), right=0, bottom_right=True),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_sequences(case, dtype):
    check(BATTERY, make(case, dtype), LEVELS if case.name == "long-queries" else BY_PAIRS)


@parts
@pytest.mark.parametrize("case", (*ATTENTION_CASES, *EDGE_CASES, *WINDOWS, *LONG), ids=str)
def test_every_feature_in_parts(case):
    reasons = refused(BATTERY, case)
    if reasons:
        pytest.skip("; ".join(reasons))
    check_in_parts(make(case, torch.float32))


@parts
@pytest.mark.parametrize("family", FAMILIES)
@fuzzed(40)
@given(data=st.data())
def test_any_call_in_parts(family, data):
    inputs = make(data.draw(calls(family)), torch.float32)
    check_in_parts(data.draw(placed(inputs)))


def of_random(T: int, E: int, seed: int = 0, heads: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, T, heads, E, generator=generator, dtype=torch.float64).transpose(1, 2) for _ in range(3)]


def three(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The truth, torch's result, ours in parts."""
    single = [t.float() for t in (q, k, v)]
    return theirs(*(t.double() for t in single), **options), theirs(*single, **options), ours(*single, **options)


@parts
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("T,E", ((128, 64), (512, 64), (512, 128), (1500, 64), (300, 40)))
def test_parts_are_as_exact_as_torch(T, E, causal):
    """Root mean square errors are at most torch's own."""
    truth, torchs, found = three(*of_random(T, E), is_causal=causal)
    assert (found - truth).square().mean() <= (torchs - truth).square().mean()


def decades(shape: Any, count: int) -> Tensor:
    return 10 ** torch.empty(shape, dtype=torch.float64).uniform_(-count, 0, generator=torch.Generator().manual_seed(1))


STRESSES = {
    "scores": lambda q, k, v: (8 * q, 8 * k, v),
    "low scores": lambda q, k, v: (q.abs() + 3, -k.abs() - 3, v),
    "high scores": lambda q, k, v: (q.abs() + 3, k.abs() + 3, v),
    "rising scores": lambda q, k, v: (q.abs(), k * torch.linspace(0, 9, k.shape[-2]).double()[:, None], v),
    "values over decades": lambda q, k, v: (q, k, v * decades(v.shape, 8)),
    "keys over decades": lambda q, k, v: (8 * q * decades(q.shape, 4), 8 * k * decades(k.shape, 4), v),
    "heavy tails": lambda q, k, v: (q / decades(q.shape, 1), k, v / decades(v.shape, 3)),
    "shifted values": lambda q, k, v: (q, k, v + 100),
    "tiny values": lambda q, k, v: (q, k, v * 1e-36),
    "subnormal values": lambda q, k, v: (q, k, v * 1e-40),
    "least values": lambda q, k, v: (q.abs() + 2, -k.abs() - 2, v.sign() * 1e-30 * (1 + v.abs())),
    "large values": lambda q, k, v: (q, k, v * 1e17),
    "one tiny value": lambda q, k, v: (q, k, torch.where(torch.arange(v.shape[-2])[:, None] == 0, v * 1e-36, v)),
    "tiny keys": lambda q, k, v: (q * 1e15, k * 1e-15, v),
    "tiny queries": lambda q, k, v: (q * 1e-25, k * 1e25, v),
    "tiny scores": lambda q, k, v: (q * 1e-36, k * 1e-36, v),
}


@parts
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("kind", STRESSES)
def test_parts_or_none(kind, causal):
    """The relative error of each query's result, however small that is, is at most twice torch's largest, beside roundings."""
    truth, torchs, found = three(*STRESSES[kind](*of_random(160, 64)), is_causal=causal)
    scale = truth.abs().amax(-1)
    own = ((torchs - truth).abs().amax(-1) / scale).max()
    assert ((found - truth).abs().amax(-1) <= (2 * own + 4 * torch.finfo(torch.float32).eps) * scale + 2**-145).all()


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.int32)


@parts
@pytest.mark.parametrize("value", (torch.inf, -torch.inf, torch.nan, 3e38, 1e31, -1e-31, 1e-40))
@pytest.mark.parametrize("where", "kv")
def test_what_is_no_sum_of_parts(where, value):
    """Beyond the range of parts, multiply-adds take the queries that meet the number, and no others, bit for bit."""
    q, k, v = (t.float() for t in of_random(200, 64, heads=3))
    clean = ours(q, k, v, is_causal=True)
    {"k": k, "v": v}[where][0, 1, 100, 5] = value
    found = ours(q, k, v, is_causal=True)
    with at("avx512"):
        by_multiply_adds = ours(q, k, v, is_causal=True)
    if where == "k" and abs(value) < 1:  # a key too small is as good as none
        return torch.testing.assert_close(found, by_multiply_adds)
    assert torch.equal(bits(found[:, 1, 128:]), bits(by_multiply_adds[:, 1, 128:]))
    assert torch.equal(found[:, ::2], clean[:, ::2]) and torch.equal(found[:, 1, :64], clean[:, 1, :64])
    assert not torch.equal(clean[:, ::2], by_multiply_adds[:, ::2])


@parts
def test_queries_that_are_no_sum_of_parts():
    """Large numbers are multiplied otherwise; one that is infinite or NaN is nobody else's matter."""
    q, k, v = (t.float() for t in of_random(200, 64))
    clean = ours(q, k, v)
    for value in (1e31, -1e36):
        spoiled = q.clone()
        spoiled[0, 1, 70, 5] = value
        with at("avx512"):
            expected = ours(spoiled, k, v)
        found = ours(spoiled, k, v)
        assert torch.equal(found[0, 1, 64:96], expected[0, 1, 64:96]) and torch.equal(found[0, 0], clean[0, 0])
    for value in (torch.inf, -torch.inf, torch.nan):
        spoiled = q.clone()
        spoiled[0, 1, 70, 5] = value
        found = ours(spoiled, k, v)
        assert found[0, 1, 70].isnan().all()
        found[0, 1, 70] = clean[0, 1, 70]
        assert torch.equal(found, clean)


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
@pytest.mark.parametrize("keys", (150, 1500, 4200))
def test_bits_of_heads(dtype, keys):
    """What is packed for one head, or one sequence, serves no other: each has the bits that it has alone."""
    torch.manual_seed(0)
    sizes = ((600 if keys < 1000 else 200, 4), (keys, 2), (keys, 2))
    q, k, v = (torch.randn(3, n, heads, 64).to(dtype).transpose(1, 2) for n, heads in sizes)
    k[1], v[2] = k[0], v[0]
    for level in filter(reached, ("avx2", "avx512", *BY_PAIRS) if keys < 1000 else BY_PAIRS):
        with at(level):
            whole = ours(q, k, v, enable_gqa=True)
            for b, h in itertools.product(range(3), range(4)):
                alone = ours(q[b : b + 1, h : h + 1], k[b : b + 1, h // 2 : h // 2 + 1], v[b : b + 1, h // 2 : h // 2 + 1])
                assert torch.equal(alone, whole[b : b + 1, h : h + 1])
            assert torch.equal(whole, ours(*(t.contiguous() for t in (q, k, v)), enable_gqa=True))
            for count in THREADS:
                with threads(count):
                    assert torch.equal(whole, ours(q, k, v, enable_gqa=True))


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("T,E", ((128, 64), (512, 64), (130, 128)))
def test_bfloat16_is_as_exact_as_torch(T, E, causal):
    """Root mean square errors are within a twentieth of torch's own; most of both is the rounding of weights and results."""
    half = [t.bfloat16() for t in of_random(T, E, heads=4)]
    truth, torchs = theirs(*(t.double() for t in half), is_causal=causal), theirs(*half, is_causal=causal)
    found = ours(*half, is_causal=causal)
    assert (found - truth).square().mean().sqrt() <= 1.05 * (torchs - truth).square().mean().sqrt()


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("E", (40, 64, 128))
@pytest.mark.parametrize("hidden", ("nothing", "later", "keys", "bias"))
def test_bfloat16_without_lse_is_as_exact_as_with(hidden, E):
    """Without lse weights are rounded by what is added before, and their sum is that of the rounded ones alone; those of few keys
    are of two parts, and the result has no error but that of its rounding."""
    torch.manual_seed(0)
    for queries, keys in ((1, 300), (31, 33), (33, 31), (16, 64), (65, 129), (130, 700), (128, 512), (97, 1)):
        q, k, v = (torch.randn(2, n, heads, E).bfloat16().transpose(1, 2) for n, heads in ((queries, 4), (keys, 2), (keys, 2)))
        options: dict[str, Any] = {"enable_gqa": True, "is_causal": hidden == "later"}
        if hidden == "keys":
            options["attn_mask"] = torch.rand(2, 1, queries, keys) < 0.7
        elif hidden == "bias":
            options["attn_mask"] = 2 * torch.randn(1, 4, queries, keys).bfloat16()
        with_lse = ours(q.clone().requires_grad_(), k, v, **options).detach()
        found = ours(q, k, v, **options)
        mask = options.pop("attn_mask", None)
        mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
        truth = theirs(q.double(), k.double(), v.double(), mask, **options)
        seen = ~truth.isnan()  # of rows that see a key
        without, saved, least = ((t - truth)[seen].square().mean().sqrt() for t in (found, with_lse, truth.bfloat16()))
        if keys > 64:
            assert max(without, saved) <= 1.03 * min(without, saved) + 1e-5, (queries, keys)
        else:
            assert without <= 1.03 * least + 1e-5 and saved >= least, (queries, keys)
        assert not found[~seen].any()


@parts
def test_parts_are_used(monkeypatch):
    """From 128 queries on, without gradients: a backward pass forms the scores again, rounded as those of its lse."""
    monkeypatch.delenv("FASTSEQ_CPU_PARTS")
    for T, gradients in itertools.product((64, 128), (False, True)):
        q, k, v = (t.float().requires_grad_(gradients) for t in of_random(T, 64))
        spec = Spec(scale=0.125, left=50, right=50)
        results = []
        for level in ("avx512", "amx"):
            with at(level):
                results.append((ours(q, k, v).detach(), eager.attention(q, k, v, spec)[0].detach()))
        assert all(torch.equal(*pair) == (gradients or T < 128) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("level_of_pairs", BY_PAIRS)
@pytest.mark.parametrize("sizes", ((130, 64, 4), (1, 40, 2), (2, 300, 1), (64, 64, 4)), ids=str)
def test_pairs_are_used(level_of_pairs, sizes, monkeypatch):
    """In bfloat16 alone, by the kernels of few queries too: sums of pairs are rounded otherwise, which lse shows."""
    if not reached(level_of_pairs):
        pytest.skip(f"no {level_of_pairs} here")
    monkeypatch.delenv("FASTSEQ_CPU_PARTS")
    torch.manual_seed(0)
    queries, keys, key_heads = sizes
    inputs = [torch.randn(30, heads, n, 128) for n, heads in ((queries, 4), (keys, key_heads), (keys, key_heads))]
    # a tile wants three queries of a key's head; Intel's vectors multiply pairs at half the rate of single numbers
    by_pairs = level_of_pairs != "amx" or queries * 4 // key_heads > 2
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        results = []
        for level in ("avx512", level_of_pairs):
            with at(level):
                results.append(eager.attention(*(t.to(dtype) for t in inputs), Spec(scale=1.0))[1])
        assert torch.equal(*results) == (dtype != torch.bfloat16 or not by_pairs)


# what a softmax in blocks can get wrong


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_rows_masked_by_the_least_number(level, dtype):
    """A bias of the least number hides keys from those who see others; who sees no others sees all of them alike."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 150, 16).to(dtype) for _ in range(3))
    mask = torch.zeros(150, 150, dtype=dtype)
    mask[::3] = torch.finfo(dtype).min
    mask[1::3, 70:] = torch.finfo(dtype).min
    tensors = dict(query=q, key=k, value=v, attn_mask=mask)
    exact = {name: t.double() for name, t in tensors.items()}
    exact["attn_mask"] = torch.where(mask < 0, -1e30, 0.0).double()  # of which a score takes nothing, as here
    assert_close_to_truth(ours(q, k, v, mask), by_math(**tensors), by_math(**exact))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ("rising", "falling", "late", "equal"))
def test_maxima_that_move(level, order, dtype):
    """Scores that rise from block to block, fall, or jump at the last key: what was summed before must be rescaled."""
    torch.manual_seed(0)
    keys, E = 300, 16
    slope = {
        "rising": torch.linspace(-30, 30, keys),
        "falling": torch.linspace(30, -30, keys),
        "late": torch.zeros(keys).index_fill(0, torch.tensor(keys - 1), 60.0),
        "equal": torch.full((keys,), 40.0),
    }
    inputs = make(AttentionCase(order, batch=1, heads=(1, 1), lengths=(40, keys), features=(E, E)), dtype)
    with torch.no_grad():
        inputs["q"][..., 0] = 4.0
        inputs["k"][..., 0] = slope[order]
    check(BATTERY, inputs, (level,))


@pytest.mark.parametrize("lse", (True, False))
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("kind", ("steep", "steeper", "far"))
def test_biases_by_distance_that_move(level, kind, dtype, lse):
    """Slopes raise scores from block to block by more than weights hold; -inf hides keys far away."""
    slopes = kind.startswith("steep")
    more = {"slopes": 1} if slopes else {"relative_bias": 601}
    inputs = make(AttentionCase(kind, batch=1, heads=(2, 2), lengths=(300, 300), features=(16, 16), **more), dtype)
    with torch.no_grad():
        if slopes:
            inputs["slopes"][:] = torch.tensor([1.5, -0.5] if kind == "steep" else [20.0, 0.01])
        else:
            inputs["relative_bias"][:, (torch.arange(601) - 300).abs() > 40] = -torch.inf
    if lse:
        check(BATTERY, inputs, (level,))
        return
    by_torch, truth = ({"output 0": of["output 0"]} for of in expected(BATTERY, inputs))
    spec = spec_of(inputs)
    by_table = {"relative_bias": spec.relative_bias, "relative_bias_zero": spec.relative_bias_zero}
    options = {"alibi_slopes": spec.slopes} if slopes else by_table
    with torch.no_grad():
        found = fastseq.functional.attention(*(inputs[name].detach() for name in "qkv"), scale=spec.scale, **options)
    compare([{"output 0": found}, by_torch, truth], "without lse", BATTERY.own_error(inputs["case"], dtype), {})


@pytest.mark.parametrize("lse", (True, False))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bias_by_distance_may_hide_all(level, dtype, lse):
    """Of a head whose bias is -inf at every distance, rows are as those that see no key: zeros."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 150, 16).to(dtype).requires_grad_(lse) for _ in range(3))
    table = torch.zeros(2, 299).to(dtype)
    table[1] = -torch.inf
    found = fastseq.functional.attention(q, k, v, relative_bias=table).detach()
    assert not found[:, 1].any()
    assert found[:, 0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cap", (0.7, 3.0, 4.8, 50.0))
def test_caps_near_and_far(level, cap, dtype):
    """Keys with a score near their cap, and keys with none, take the hyperbolic tangent in two ways; here they alternate."""
    inputs = make(AttentionCase("capped", batch=1, heads=(2, 1), lengths=(70, 131), features=(16, 16), softcap=cap), dtype)
    with torch.no_grad():
        inputs["k"][:, :, ::2] *= 0.2
    check(BATTERY, inputs, (level,))


def errors_of_gradients(
    own: Callable[..., Tensor], tensors: dict[str, Tensor], dout: Tensor, kind: str, **options: Any
) -> dict[str, tuple[float, float]]:
    """Relative root mean square errors of float32, ours and that of torch's better path, of output and gradients."""

    def of(attention: Callable[..., Tensor], given: dict[str, Tensor], dout: Tensor) -> list[Tensor]:
        given = {name: t.detach().requires_grad_() for name, t in given.items()}
        out = attention(**given, is_causal=kind == "causal", **options)
        return [out.detach(), *torch.autograd.grad(out, list(given.values()), dout)]

    truth = of(theirs, {name: t.double() for name, t in tensors.items()}, dout.double())
    found = of(own, tensors, dout)
    by_torch = []
    for path in [SDPBackend.MATH] if kind == "bias" else [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]:
        with sdpa_kernel([path]):
            by_torch.append(of(theirs, tensors, dout))

    def error(i: int, results: list[Tensor]) -> float:
        return ((results[i] - truth[i]).norm() / truth[i].norm()).item()

    names = ("out", *(f"d{name}" for name in tensors))
    return {name: (error(i, found), min(error(i, results) for results in by_torch)) for i, name in enumerate(names)}


@pytest.mark.parametrize("kind", ("full", "causal", "bias"))
@pytest.mark.parametrize("T", (60, 130, 600, 2100))
def test_gradients_are_as_exact_as_torchs(level, T, kind):
    """Of float32. The lse of many keys is large: its rounding alone would be half of the error.

    A bias sees each weight's own gradient, less a delta that, of many keys, is a product of the rounded output.
    """
    torch.manual_seed(0)
    batch = max(1, 600 // T)
    tensors = {name: torch.randn(batch, 3, T, 16) for name in ("query", "key", "value")}
    if kind == "bias":
        tensors["attn_mask"] = torch.randn(batch, 3, T, T)
    found = errors_of_gradients(ours, tensors, torch.randn(batch, 3, T, 16), kind)
    fused = level != "default" or platform.machine() != "x86_64"  # else all products are rounded, unlike torch's
    factors = {"dattn_mask": 1.1 if fused else 1.3}
    worse = {name: own / best for name, (own, best) in found.items() if own > factors.get(name, 1.03 if fused else 1.1) * best}
    assert not worse


@pytest.mark.parametrize("kind", ("full", "bias"))
def test_gradients_of_few_queries_to_many_keys(level, kind):
    """Their forward pass has kernels of its own, which do not say what rounding took from the lse."""
    torch.manual_seed(0)
    tensors = {name: torch.randn(20, 3, 5 if name == "query" else 300, 16) for name in ("query", "key", "value")}
    if kind == "bias":
        tensors["attn_mask"] = torch.randn(20, 3, 5, 300)
    found = errors_of_gradients(ours, tensors, torch.randn(20, 3, 5, 16), kind)
    worse = {name: own / best for name, (own, best) in found.items() if own > FACTOR * best}
    assert not worse


@pytest.mark.parametrize("added", (1e3, -1e3, 2.0**22, -(2.0**22), 2.0**23, -(2.0**23)))
@pytest.mark.parametrize("T", (60, 130))
def test_gradients_of_scores_far_from_zero(level, T, added):
    """All scores are small whole numbers and a large one, exactly. An lse as large may be rounded to a whole number."""
    torch.manual_seed(0)
    tensors = {name: torch.randint(-1, 2, (2, 3, T, 4)).float() for name in ("query", "key", "value")}
    tensors["attn_mask"] = torch.full((2, 3, T, T), added)
    found = errors_of_gradients(ours, tensors, torch.randn(2, 3, T, 4), "bias", scale=1.0)
    worse = {name: own / best for name, (own, best) in found.items() if own > FACTOR * best}
    assert not worse


@pytest.mark.parametrize("T", (60, 130))
def test_a_query_without_keys_beside_scores_far_from_zero(level, T):
    """Nothing of its lse, which is infinite, comes into its gradient, however its neighbors' are formed."""
    torch.manual_seed(0)
    tensors = [torch.randint(-1, 2, (1, 2, T, 4)).float().requires_grad_() for _ in range(3)]
    mask = torch.full((T, T), 2.0**23)
    mask[5] = -torch.inf
    gradients = torch.autograd.grad(ours(*tensors, attn_mask=mask, scale=1.0).sum(), tensors)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][:, :, 5].any()


@pytest.mark.parametrize("scale", (3.0, 40.0))
@pytest.mark.parametrize("T", (60, 130, 600))
def test_gradients_of_steep_scores(level, T, scale):
    """A few keys have nearly all the weight, and lse is as large as the largest scores."""
    torch.manual_seed(0)
    tensors = {name: torch.randn(max(1, 600 // T), 3, T, 16) for name in ("query", "key", "value")}
    found = errors_of_gradients(ours, tensors, torch.randn_like(tensors["query"]), "full", scale=scale)
    largest = max(best for _, best in found.values())  # what rounding takes from such scores
    worse = {name: own / largest for name, (own, _) in found.items() if own > FACTOR * largest}
    assert not worse


@pytest.mark.parametrize("batch_first", (False, True))
def test_gradients_of_many_outputs_at_once(batch_first):
    """is_grads_batched goes through the op, which takes the lse without what rounding took from it."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 80, 8, requires_grad=True) for _ in range(3))
    out = ours(q, k, v)
    douts = torch.randn(3, *out.shape)
    found = torch.autograd.grad(out, (q, k, v), douts, is_grads_batched=True, retain_graph=True)
    for i, dout in enumerate(douts):
        expected = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
        torch.testing.assert_close([grad[i] for grad in found], [*expected])
    module = fastseq.MultiheadAttention(12, 3, batch_first=batch_first)
    x = torch.randn(2, 80, 12, requires_grad=True) if batch_first else torch.randn(80, 2, 12, requires_grad=True)
    out, weights = module(x, x, x)
    douts, dweights = torch.randn(3, *out.shape), torch.randn(3, *weights.shape)
    (found,) = torch.autograd.grad((out, weights), x, (douts, dweights), is_grads_batched=True, retain_graph=True)
    for i, both in enumerate(zip(douts, dweights, strict=True)):
        (expected,) = torch.autograd.grad((out, weights), x, both, retain_graph=True)
        torch.testing.assert_close(found[i], expected)


@pytest.mark.parametrize("hidden", ("later", "window", "nothing"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_a_bias_of_every_pair(level, hidden, dtype):
    """It is written once, where some query of a block sees a key; elsewhere it is zero, whatever was in its memory."""
    hides = {"later": {"right": 0}, "window": {"left": 3, "right": 3}, "nothing": {}}[hidden]
    inputs = make(AttentionCase(hidden, batch=1, heads=(2, 1), lengths=(150, 200), bias="bhqk", **hides), dtype)
    torch.use_deterministic_algorithms(True)  # new tensors hold NaN
    try:
        assert torch.empty(3).isnan().all()
        check(BATTERY, inputs, (level,))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("size", (1e-30, 1e-18, 1e15, 1e30, 3e38))
def test_extreme_numbers(level, size):
    """Values whose products are subnormal, or which are beyond what parts of fp32 can hold: as multiply-adds have them."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 33, 16), torch.randn(1, 2, 70, 16), torch.rand(1, 2, 70, 16) * size
    truth = theirs(q.double(), k.double(), v.double())
    error = (theirs(q, k, v).double() - truth).abs().max().item()
    assert (ours(q, k, v).double() - truth).abs().max() <= 2 * error + 2.0**-22 * size
    scaled = ours(q * size if size < 1 else q / size, k / size if size < 1 else k * min(size, 1e36), v / size)
    if size <= 1e30:
        torch.testing.assert_close(scaled, ours(q, k, v / size), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_infinite_and_undefined_values_are_torchs(level, dtype):
    """An infinite value is infinite for the queries that see it, a NaN is a NaN; a query's own are nobody else's."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 70, 16).to(dtype) for _ in range(3))
    clean = ours(q, k, v, is_causal=True)
    for number in (torch.inf, -torch.inf, torch.nan):
        spoiled = q.clone()
        spoiled[0, 1, 40, 3] = number
        out = ours(spoiled, k, v, is_causal=True)
        assert out[0, 1, 40].isnan().all()
        out[0, 1, 40] = clean[0, 1, 40]
        assert torch.equal(out, clean)
        spoiled = v.clone()
        spoiled[0, 1, 40, 3] = number
        out, expected = ours(q, k, spoiled), by_math(query=q, key=k, value=spoiled)
        assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.isinf(), expected.isinf())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_drops_what_the_whole_drops(level, dtype):
    """Of heads, queries and keys at odd places: the zeros of the whole, forward and in the gradients, and of plain PyTorch."""
    B, H, Tq, Tk, seed = 3, 4, 90, 150, 123_456_789_012
    common: dict[str, Any] = {"dropout": 0.4, "scale": 1.0}
    q, k, v = torch.zeros(B, H, Tq, 8, dtype=dtype), torch.zeros(B, H, Tk, 8, dtype=dtype), torch.eye(Tk, dtype=dtype)
    kept = attention(q, k, v.expand(B, H, Tk, Tk).contiguous(), Spec(seed=torch.tensor([seed]), **common))[0] != 0
    for b, h, i, j in ((0, 0, 0, 0), (1, 2, 7, 3), (2, 1, 33, 66), (0, 3, 16, 129), (1, 0, 1, 64)):
        own_q, own_k = q[b:, h:, i:].contiguous(), k[b:, h:, j:].contiguous()
        own_v = torch.eye(Tk - j, dtype=dtype).expand(B - b, H - h, -1, -1).contiguous()
        spec = Spec(seed=torch.tensor([seed, i, j, b * H + h, H]), **common)
        out, lse = attention(own_q, own_k, own_v, spec)
        assert torch.equal(out != 0, kept[b:, h:, i:, j:]), (b, h, i, j)
        with fastseq.use_backend("reference"):
            plain = attention(own_q, own_k, own_v, spec)[0]
        assert torch.equal(plain != 0, out != 0), (b, h, i, j)
        dout, wanted = torch.eye(Tq - i, Tk - j, dtype=dtype).expand_as(out), [name == "v" for name in GRADIENTS]
        dv = op.attention_backward(dout, None, own_q, own_k, own_v, out, lse, spec, wanted)[2]
        # query n asks for feature n: dv of a key has, transposed, the weights that it kept
        assert torch.equal(dv.mT[..., : Tq - i, :] != 0, kept[b:, h:, i:, j:][..., : Tk - j, :]), (b, h, i, j)


def test_keys_beyond_the_lengths_do_not_matter(level):
    """NaN beyond the lengths: bit for bit what numbers there give."""
    for dtype in DTYPES:
        case = AttentionCase("hidden", batch=3, heads=(2, 1), lengths=(70, 130), k_lengths=(130, 65, 1), left=40, right=3)
        inputs = make(case, dtype)
        q, k, v = (inputs[name].detach() for name in "qkv")
        expected = attention(q, k, v, spec_of(inputs))
        for t in (k, v):
            for b, length in enumerate(case.k_lengths):
                t[b, :, length:] = torch.nan
        found = attention(q, k, v, spec_of(inputs))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


# bits

REPEATED = [
    *named("several-tiles", "causal-tiles", "grouped", "both-lengths-causal", "packed-causal-grouped", "bias-hqk-causal"),
    AttentionCase("long", batch=1, heads=(1, 1), lengths=(300, 300), features=(64, 64), right=0),
    AttentionCase("few-queries", batch=1, heads=(4, 2), lengths=(3, 700), features=(64, 64)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_bits_of_runs_and_of_threads(level, case, dtype):
    """Outputs do not depend on the number of threads; gradients, summed by so many of them, are those of any run with as many."""
    inputs, single = make(case, dtype), {}
    for count in THREADS:
        with threads(count):
            first, again = found(BATTERY, inputs), found(BATTERY, inputs)
        single = single or first
        for name, t in first.items():
            assert torch.equal(t, again[name]), f"{name}, {count} threads"
            assert torch.equal(t, single[name]) or name.startswith("gradient"), f"{name}, {count} threads"


@pytest.mark.parametrize("count", THREADS)
@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_gradients_by_threads(level, case, count):
    with threads(count):
        for dtype in DTYPES[1:3]:
            check(BATTERY, make(case, dtype), (level,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_strides(level, dtype):
    """Tensors that lie anywhere give, bit for bit, what their copies give."""
    for case in named("several-tiles", "odd-features", "mask-all-dead", "bias-bk", "packed-causal-grouped"):
        inputs = make(case, dtype)
        plain = {
            name: t.detach().contiguous().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t
            for name, t in inputs.items()
        }
        expected = found(BATTERY, plain)
        for order in itertools.permutations(range(inputs["q"].dim() - 1)):
            moved = {name: anywhere(inputs[name], order, (1,) * len(order) + (3,)) for name in "qkv"}
            results = found(BATTERY, inputs | moved)
            assert all(torch.equal(t, results[name]) for name, t in expected.items())


def test_heads_that_share_memory(level):
    """Keys and values expanded over batch or heads, and q, k, v as slices of one projection."""
    torch.manual_seed(0)
    for dtype in DTYPES:
        q, one = torch.randn(3, 4, 33, 16).to(dtype), torch.randn(3, 1, 47, 16).to(dtype)
        assert torch.equal(ours(q, one.expand(-1, 4, -1, -1), one.expand(-1, 4, -1, -1)), ours(q, *[one.repeat(1, 4, 1, 1)] * 2))
        first = one[:1].expand(3, 4, -1, -1)
        assert torch.equal(ours(q, first, first), ours(q, first.contiguous(), first.contiguous()))
        parts = torch.randn(2, 33, 3, 4, 16).to(dtype).permute(2, 0, 3, 1, 4)
        assert torch.equal(ours(*parts), ours(*(t.contiguous() for t in parts)))


def test_other_libraries_may_use_the_tiles(level):
    """oneDNN's bfloat16 products leave their own tile configuration, or none, behind."""
    torch.manual_seed(0)
    q, a = torch.randn(1, 2, 70, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    expected, product = ours(q, q, q), a @ a
    for _ in range(3):
        assert torch.equal(ours(q[:, :, :33], q, q), expected[:, :, :33])
        assert torch.equal(a @ a, product)
        assert torch.equal(ours(q, q, q), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [*DECODE_CASES, DecodeCase(lengths=(300, 1, 256), capacity=320, features=64, features_v=64)], ids=str
)
def test_decoding(level, case, dtype):
    inputs = make_decode(case, dtype)
    out, lse = decode(**inputs)
    exactly = {n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in inputs.items()}
    names = ("out", "lse")
    truth = dict(zip(names, decode_by_torch(**exactly), strict=True))
    by_torch = dict(zip(names, decode_by_torch(**wide(inputs)), strict=True))
    by_torch["out"] = by_torch["out"].to(dtype)
    own = 0.0
    if dtype == torch.float64:
        single = {n: t.float() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in inputs.items()}
        own = in_fp64(pooled_error(finite(dict(zip(names, decode_by_torch(**single), strict=True))), finite(truth)))
    assert torch.equal(lse == -torch.inf, truth["lse"] == -torch.inf)
    assert_all_close_to_truth(finite({"out": out, "lse": lse}), finite(by_torch), finite(truth), own_error=own)


def finite(results: dict[str, Tensor]) -> dict[str, Tensor]:
    return results | {"lse": results["lse"].masked_fill(results["lse"] == -torch.inf, 0)}


# a model


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, attend: Any) -> Tensor:
        B, T, W = x.shape
        q, k, v = self.qkv(self.before(x)).view(B, T, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(attend(query=q, key=k, value=v, is_causal=True).transpose(1, 2).reshape(B, T, W))
        return x + self.inner(self.after(x))


class Model(nn.Module):
    def __init__(self, words: int = 20, width: int = 64, heads: int = 4, length: int = 48) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(words, width), nn.Parameter(0.1 * torch.randn(length, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(2))
        self.readout = nn.Linear(width, words)

    def loss(self, tokens: Tensor, attend: Any) -> Tensor:
        x = self.embedding(tokens) + self.positions
        for block in self.blocks:
            x = block(x, attend)
        return F.cross_entropy(self.readout(x)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def gradients_of(model: nn.Module, tokens: Tensor, attend: Any) -> list[Tensor]:
    return list(torch.autograd.grad(model.loss(tokens, attend), list(model.parameters())))


def test_gradients_of_a_model_in_training(level):
    """Over 100 steps, bf16 gradients are as far from those in fp32 as with torch's math path, and no farther at the end."""
    torch.manual_seed(0)
    model = Model()
    half = Model().bfloat16()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    errors: dict[Any, list[float]] = {ours: [], by_math: []}
    with fastseq.use_backend("auto"):
        for step in range(100):
            tokens = (torch.randint(20, (4, 1)) + torch.arange(48) * torch.randint(1, 4, (4, 1))) % 20
            tokens = torch.where(torch.rand(4, 48) < 0.1, torch.randint(20, (4, 48)), tokens)
            truth = gradients_of(model, tokens, by_math)
            if step % 20 == 0 or step >= 95:
                with torch.no_grad():
                    for own, exact in zip(half.parameters(), model.parameters(), strict=True):
                        own.copy_(exact)
                    wide = Model()
                    for own, exact in zip(wide.parameters(), half.parameters(), strict=True):
                        own.copy_(exact)
                exact = gradients_of(wide, tokens, by_math)
                for attend, found in errors.items():
                    off = [(g.float() - t).square().sum() for g, t in zip(gradients_of(half, tokens, attend), exact, strict=True)]
                    found.append(math.sqrt(sum(off) / sum(t.square().sum() for t in exact)))
            for parameter, gradient in zip(model.parameters(), truth, strict=True):
                parameter.grad = gradient
            optimizer.step()
    ratios = [one / other for one, other in zip(errors[ours], errors[by_math], strict=True)]
    assert math.prod(ratios) ** (1 / len(ratios)) <= 1.1 and max(ratios) <= 1.5, ratios
