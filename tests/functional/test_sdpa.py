"""Our scaled_dot_product_attention and torch's: same values, gradients, dtypes, shapes and exceptions."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.testing._internal.common_methods_invocations import op_db

import fastseq
from fastseq.choice import sources
from fastseq.choice.decision import Candidate
from fastseq.ops import _attention_eager as eager
from fastseq.testing import assert_all_close_to_truth
from support.battery import headed
from support.modules import FP64

ours = fastseq.functional.scaled_dot_product_attention
theirs = torch.nn.functional.scaled_dot_product_attention

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMES = ("query", "key", "value", "attn_mask")
INF = float("inf")
INTERPRETED = "cpu" in fastseq.backends.BACKENDS["triton"].devices  # Triton, without a GPU


def results(function: Any, tensors: dict[str, Any], options: dict[str, Any]) -> dict[str, Tensor]:
    """Output and gradients, the cotangent of the output being the same at every call."""
    leaves = {
        name: t.detach().clone().requires_grad_() if type(t) is Tensor and t.is_floating_point() else t
        for name, t in tensors.items()
    }
    out = function(**leaves, **options)
    wanted = {name: t for name, t in leaves.items() if isinstance(t, Tensor) and t.requires_grad}
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(out.dtype)
    grads = torch.autograd.grad(out, list(wanted.values()), cotangent)
    return {"output": out.detach(), **{f"gradient of {n}": g for n, g in zip(wanted, grads, strict=True)}}


def assert_as_torch(tensors: dict[str, Any], reference: Any = theirs, **options: Any) -> None:
    """In the tensors' dtype, against torch in fp64; `reference` is torch's own way in the dtype."""
    wide = {n: t.double() if type(t) is Tensor and t.is_floating_point() else t for n, t in tensors.items()}
    by_torch, truth = results(reference, tensors, options), results(theirs, wide, options)
    assert all(value.isfinite().all() for value in truth.values())
    actual = results(ours, tensors, options)
    if tensors["query"].dtype != torch.float64:
        return assert_all_close_to_truth(actual, by_torch, truth)
    # gradients are differences of products of two of the tensors
    products = max(t.abs().max().item() ** 2 for t in wide.values() if type(t) is Tensor and t.numel() and t.dtype != torch.bool)
    for name, expected in truth.items():
        scale = max(1.0, products, *expected.abs().flatten().tolist())
        torch.testing.assert_close(actual[name] / scale, expected / scale, **FP64, msg=headed(name))


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def coins(*shape: int) -> Tensor:
    return torch.rand(shape) > 0.3


def qkv(q: tuple[int, ...] = (2, 3, 4, 8), k: tuple[int, ...] = (2, 3, 5, 8), features: int = 6) -> dict[str, Any]:
    return dict(query=normal(*q), key=normal(*k), value=normal(*k[:-1], features))


def samples(dtype: torch.dtype) -> list[Any]:
    op = next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
    return list(op.sample_inputs("cpu", dtype, requires_grad=True))


def fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """torch with four dimensions, where it takes its fused kernel: the backward of that recomputes the weights, as ours does."""
    batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    shape = (1,) * (2 - len(batch)) + batch
    out = theirs(*(t.expand(*shape, *t.shape[-2:]) for t in (query, key, value)), attn_mask, **options)
    return out.reshape(*batch, *out.shape[-2:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_samples(dtype):
    compared = 0
    for sample in samples(dtype):
        options = dict(sample.kwargs)
        tensors = dict(query=sample.input, key=sample.args[0], value=sample.args[1], attn_mask=options.pop("attn_mask", None))
        if options["dropout_p"] == 0:
            assert_as_torch(tensors, fused, **options)
            compared += 1
        else:
            out, expected = ours(**tensors, **options), theirs(**tensors, **options)
            assert out.shape == expected.shape and out.dtype == expected.dtype and out.isfinite().all()
    assert compared > 10


MASKS = [
    (4, 5),
    (1, 5),
    (4, 1),
    (1, 1),
    (3, 4, 5),
    (1, 4, 5),
    (2, 1, 4, 5),
    (2, 3, 4, 5),
    (1, 1, 1, 1),
    (1, 1, 1, 5),
    (2, 3, 1, 5),
]


@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_masks(shape):
    torch.manual_seed(0)
    for mask in (coins(*shape), normal(*shape)):
        assert_as_torch(qkv() | dict(attn_mask=mask))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_dtypes(dtype):
    torch.manual_seed(0)
    tensors = {name: t.to(dtype) for name, t in qkv().items()}
    assert_as_torch(tensors | dict(attn_mask=normal(4, 5).to(dtype)))
    if dtype.itemsize == 2:
        assert_as_torch(tensors | dict(attn_mask=normal(3, 4, 5)))
    assert_as_torch(tensors, is_causal=True)
    assert_as_torch(tensors | dict(attn_mask=coins(3, 4, 5)))


SHAPES = {
    "2-D": ((4, 8), (5, 8), (5, 6), [(4, 5), (5,), ()]),
    "3-D": ((3, 4, 8), (3, 5, 8), (3, 5, 6), [(4, 5), (3, 1, 5), (5,)]),
    "5-D": ((2, 2, 3, 4, 8), (2, 2, 3, 5, 8), (2, 2, 3, 5, 6), [(2, 3, 4, 5), (2, 1, 3, 4, 5), (1, 1, 3, 1, 5), (4, 5)]),
    "6-D": ((2, 1, 2, 1, 4, 8), (1, 3, 2, 3, 5, 8), (2, 3, 1, 3, 5, 6), [(2, 3, 1, 3, 4, 5), (2, 1, 4, 5)]),
    "fewer dimensions of k": ((2, 3, 4, 8), (3, 5, 8), (3, 5, 6), [(2, 3, 4, 5)]),
    "fewer dimensions of q": ((4, 8), (2, 3, 5, 8), (2, 3, 5, 6), [(2, 1, 4, 5)]),
    "fewer dimensions of v": ((2, 3, 4, 8), (2, 3, 5, 8), (5, 6), [(2, 1, 1, 5)]),
    "one key head": ((2, 3, 4, 8), (2, 1, 5, 8), (2, 1, 5, 6), [(2, 3, 4, 5)]),
    "one query head": ((2, 1, 4, 8), (2, 3, 5, 8), (2, 3, 5, 6), [(2, 3, 4, 5)]),
    "one head of v": ((2, 3, 4, 8), (2, 3, 5, 8), (2, 1, 5, 6), [(4, 5)]),
    "one sequence of q": ((1, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 6), [(2, 1, 4, 5)]),
    "one sequence of k": ((2, 3, 4, 8), (1, 3, 5, 8), (1, 3, 5, 6), [(2, 1, 4, 5)]),
    "only v has sequences": ((1, 3, 4, 8), (1, 3, 5, 8), (2, 3, 5, 6), [(1, 3, 4, 5)]),
    "only v has heads": ((2, 1, 4, 8), (2, 1, 5, 8), (2, 3, 5, 6), [(4, 5)]),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
    torch.manual_seed(0)
    q, k, v, masks = SHAPES[name]
    tensors = dict(query=normal(*q), key=normal(*k), value=normal(*v))
    assert_as_torch(tensors)
    assert_as_torch(tensors, is_causal=True, scale=0.3)
    for shape in masks:
        for mask in (coins(*shape), normal(*shape)):
            assert_as_torch(tensors | dict(attn_mask=mask))


if INTERPRETED:

    def test_on_triton():
        torch.manual_seed(0)
        with fastseq.use_backend("triton"):
            assert_as_torch(qkv((1, 2, 4, 8), (1, 2, 5, 8)) | dict(attn_mask=normal(2, 1, 5)))
            assert_as_torch(qkv((2, 4, 8), (1, 5, 8)), enable_gqa=True, is_causal=True)
            assert_as_torch(qkv((4, 8), (5, 8)) | dict(attn_mask=torch.tensor([True, False, True, True, False])), scale=0.5)


@pytest.mark.parametrize(
    "q, k", [((2, 6, 4, 8), (2, 3, 5, 8)), ((6, 4, 8), (2, 5, 8)), ((2, 2, 4, 3, 8), (2, 2, 1, 5, 8))], ids=str
)
def test_grouped_heads(q, k):
    torch.manual_seed(0)
    tensors = qkv(q, k)
    assert_as_torch(tensors, enable_gqa=True)
    assert_as_torch(tensors | dict(attn_mask=normal(*q[:-1], k[-2])), enable_gqa=True)


def test_grouped_heads_differ_between_key_and_value():
    torch.manual_seed(0)
    assert_as_torch(dict(query=normal(2, 6, 4, 8), key=normal(2, 3, 5, 8), value=normal(2, 2, 5, 6)), enable_gqa=True)


@pytest.mark.parametrize("lengths", [(4, 6), (6, 4), (5, 5), (1, 5), (5, 1)], ids=str)
def test_causal(lengths):
    torch.manual_seed(0)
    tensors = qkv((2, 3, lengths[0], 8), (2, 3, lengths[1], 8), 8)
    assert_as_torch(tensors, is_causal=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lower right with more queries than keys
        biases = [causal_upper_left(*lengths), causal_lower_right(*lengths)]
    for bias in biases:
        expected = theirs(**tensors, attn_mask=bias)
        torch.testing.assert_close(ours(**tensors, attn_mask=bias), expected)
        assert expected.isfinite().all()


def test_hidden_rows_are_zero():
    torch.manual_seed(0)
    mask = coins(4, 5)
    mask[1], mask[:, 0], mask[1, 0] = False, True, False
    for hidden in (mask, torch.zeros(4, 5).masked_fill(~mask, -INF)):
        assert_as_torch(qkv() | dict(attn_mask=hidden))
        assert not ours(**qkv(), attn_mask=hidden)[:, :, 1].any()


@pytest.mark.parametrize("backend", ["reference", "cpu", *(["triton"] if INTERPRETED else [])])
def test_rows_that_are_as_low_as_can_be_are_the_mean(backend):
    torch.manual_seed(0)
    tensors = qkv()
    lowest = torch.zeros(4, 5)
    lowest[1] = torch.finfo(torch.float32).min
    with fastseq.use_backend(backend):
        out = ours(**tensors, attn_mask=lowest)
    torch.testing.assert_close(out[:, :, 1], tensors["value"].mean(2))
    torch.testing.assert_close(out, theirs(**tensors, attn_mask=lowest))


EMPTY = {
    "queries": lambda t: t | dict(query=t["query"][:, :, :0]),
    "keys": lambda t: t | dict(key=t["key"][:, :, :0], value=t["value"][:, :, :0]),
    "features": lambda t: t | dict(query=t["query"][..., :0], key=t["key"][..., :0]),
    "features of v": lambda t: t | dict(value=t["value"][..., :0]),
    "sequences": lambda t: {n: x[:0] for n, x in t.items()},
    "heads": lambda t: {n: x[:, :0] for n, x in t.items()},
}


@pytest.mark.parametrize("what", EMPTY)
def test_empty(what):
    torch.manual_seed(0)
    assert_as_torch(EMPTY[what](qkv()))


@pytest.mark.parametrize("scale", [0.0, -1.5, 2, 0.3])
def test_scale(scale):
    torch.manual_seed(0)
    assert_as_torch(qkv(), scale=scale)


def test_any_strides():
    torch.manual_seed(0)
    tensors = dict(
        query=normal(2, 3, 8, 4).mT, key=normal(5, 2, 8, 3).permute(1, 3, 0, 2), value=normal(2, 3, 5, 1).expand(2, 3, 5, 6)
    )
    mask = normal(5, 4).t()
    torch.testing.assert_close(ours(**tensors, attn_mask=mask), theirs(**tensors, attn_mask=mask))
    torch.testing.assert_close(ours(**tensors, attn_mask=mask > 0), theirs(**tensors, attn_mask=mask > 0))
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    everywhere = normal(1, 4, 5).expand(3, 4, 5)
    torch.testing.assert_close(ours(**whole, attn_mask=everywhere), theirs(**whole, attn_mask=everywhere))
    gradients, dout = [], normal(2, 3, 1, 1).expand(2, 3, 4, 6)
    for function in (ours, theirs):
        leaves = [tensor.requires_grad_() for tensor in whole.values()]
        gradients.append(torch.autograd.grad(function(*leaves), leaves, dout))
    torch.testing.assert_close(*gradients)


q, k, v = (normal(*shape) for shape in ((2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 6)))
ERRORS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "mask 1-D": ((q, k, v, coins(5)), {}),
    "mask 0-D": ((q, k, v, torch.tensor(True)), {}),
    "mask [B, L, S]": ((q, k, v, coins(2, 4, 5)), {}),
    "mask 5-D": ((q, k, v, coins(1, 2, 3, 4, 5)), {}),
    "mask 3-D beside 2-D": ((q[0, 0], k[0, 0], v[0, 0], coins(1, 4, 5)), {}),
    "mask of other keys": ((q, k, v, coins(4, 6)), {}),
    "mask of other queries": ((q, k, v, coins(3, 5)), {}),
    "mask of other sequences": ((q, k, v, coins(4, 3, 4, 5)), {}),
    "mask of more sequences": ((q[:1], k[:1], v, coins(2, 1, 4, 5)), {}),
    "mask of key heads": ((normal(2, 6, 4, 8), k, v, coins(2, 3, 4, 5)), dict(enable_gqa=True)),
    "mask int": ((q, k, v, torch.ones(4, 5).int()), {}),
    "mask uint8": ((q, k, v, torch.ones(4, 5).byte()), {}),
    "mask fp64": ((q, k, v, torch.ones(4, 5).double()), {}),
    "mask fp16 beside fp32": ((q, k, v, torch.ones(4, 5).half()), {}),
    "mask fp16 beside bf16": ((q.bfloat16(), k.bfloat16(), v.bfloat16(), torch.ones(4, 5).half()), {}),
    "mask on another device": ((q, k, v, torch.ones(4, 5, device="meta")), {}),
    "mask a list": ((q, k, v, [[True]]), {}),
    "mask and causal": ((q, k, v, coins(4, 5)), dict(is_causal=True)),
    "causal bias and causal": ((q, k, v, causal_lower_right(4, 5)), dict(is_causal=True)),
    "causal bias of other keys": ((q, k, v, causal_lower_right(4, 6)), {}),
    "dtypes of q and k": ((q, k.double(), v), {}),
    "dtypes of q and v": ((q, k, v.double()), {}),
    "int": ((q.int(), k.int(), v.int()), {}),
    "bool": ((q.bool(), k.bool(), v.bool()), {}),
    "complex": ((q.cfloat(), k.cfloat(), v.cfloat()), {}),
    "fp8": ((q.to(torch.float8_e4m3fn), k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)), {}),
    "devices": ((q, k.to("meta"), v), {}),
    "1-D": ((q[0, 0, 0], k[0, 0, 0], v[0, 0, 0]), {}),
    "features": ((q, k[..., :7], v), {}),
    "lengths of k and v": ((q, k, v[:, :, :4]), {}),
    "heads": ((normal(2, 6, 4, 8), k, v), {}),
    "sequences": ((normal(3, 3, 4, 8), k, v), {}),
    "heads do not divide": ((normal(2, 7, 4, 8), k, v), dict(enable_gqa=True)),
    "more key heads": ((normal(2, 3, 4, 8), normal(2, 6, 5, 8), normal(2, 6, 5, 8)), dict(enable_gqa=True)),
    "groups of no heads": ((q[0, 0], k[0, 0], v[0, 0]), dict(enable_gqa=True)),
    "no query": ((None, k, v), {}),
    "no key": ((q, None, v), {}),
    "dropout": ((q, k, v), dict(dropout_p=1.1)),
    "dropout a word": ((q, k, v), dict(dropout_p="a")),
    "positional scale": ((q, k, v, None, 0.0, False, 1.0), {}),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    arguments, options = ERRORS[name]
    with pytest.raises(Exception) as by_torch:  # noqa: PT011, B017
        theirs(*arguments, **options)
    with pytest.raises(Exception) as by_us:  # noqa: PT011, B017
        ours(*arguments, **options)
    assert by_us.type is by_torch.type, by_us.value


def test_errors_say_what_was_given():
    with pytest.raises(
        RuntimeError, match=r"scores \[2, 3, 4, 5\], got \[2, 4, 5\]; one mask for each sequence is \[N, 1, L, S\]"
    ):
        ours(q, k, v, coins(2, 4, 5))
    with pytest.raises(RuntimeError, match="torch.float32 .*, got torch.int32"):
        ours(q, k, v, torch.ones(4, 5).int())
    with pytest.raises(RuntimeError, match=r"query \[2, 6, 4, 8\], key \[2, 3, 5, 8\], value \[2, 3, 5, 6\]"):
        ours(normal(2, 6, 4, 8), k, v)


def test_dropout():
    """Of the identity, the output is the dropped weights, and dv of the identity their transpose."""
    torch.manual_seed(0)
    query, key = normal(2, 3, 40, 8), normal(2, 3, 40, 8)
    value = torch.eye(40).expand(2, 3, 40, 40).clone().requires_grad_()
    whole = ours(query, key, value)
    torch.manual_seed(5)
    dropped = ours(query, key, value, dropout_p=0.25)
    torch.manual_seed(5)
    assert torch.equal(dropped, ours(query, key, value, dropout_p=0.25))
    assert not torch.equal(dropped, ours(query, key, value, dropout_p=0.25))
    kept = dropped != 0
    torch.testing.assert_close(dropped, torch.where(kept, whole / 0.75, 0))
    share = kept.double().mean().item()
    assert abs(share - 0.75) < 5 * (0.25 * 0.75 / kept.numel()) ** 0.5
    (dv,) = torch.autograd.grad(dropped, value, torch.eye(40).expand(2, 3, 40, 40))
    torch.testing.assert_close(dv, dropped.mT.detach())
    assert not ours(query, key, value, dropout_p=1.0).any()
    assert not theirs(query, key, value, dropout_p=1.0).any()


@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8), (2, 3, 5, 8), (2, 2, 3, 5, 8)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_dropout_is_the_same_with_gradients(shape, masked):
    """As checkpointing wants it, whose first pass may be without them."""
    torch.manual_seed(0)
    leaf = normal(*shape).requires_grad_()
    options = {"attn_mask": coins(5, 5)} if masked else {}

    def run(x: Tensor) -> Tensor:
        return ours(x, x, x, dropout_p=0.4, **options)

    torch.manual_seed(1)
    with torch.no_grad():
        expected = run(leaf)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    torch.testing.assert_close(run(leaf), expected)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("shape", [None, (5, 5), (3, 1, 5), (2, 3, 5, 5)], ids=str)
@pytest.mark.parametrize("by", ["scaled_dot_product_attention", "bhsd", "bshd", "lse"])
def test_batched_gradients(by, shape):
    """is_grads_batched, vectorize=True: all cotangents in one call give what each gives alone."""
    torch.manual_seed(0)
    q = (2, 5, 3, 8) if by == "bshd" else (2, 3, 5, 8)
    leaves = [normal(*of, dtype=torch.float64).requires_grad_() for of in [q] * 3 + ([shape] if shape else [])]
    bias = leaves[3] if shape else None
    if by == "scaled_dot_product_attention":
        out = ours(*leaves[:3], bias, is_causal=bias is None)
    else:
        options = dict(layout="bshd") if by == "bshd" else dict(return_lse=by == "lse")
        out = fastseq.functional.attention(*leaves[:3], attn_bias=bias, causal=bias is None, **options)
        out = out[0] if by == "lse" else out
    cotangents = torch.randn(3, *out.shape, dtype=torch.float64)
    together = torch.autograd.grad(out, leaves, cotangents, is_grads_batched=True, retain_graph=True)
    for index, cotangent in enumerate(cotangents):
        alone = torch.autograd.grad(out, leaves, cotangent, retain_graph=True)
        torch.testing.assert_close([grad[index] for grad in together], list(alone))


@pytest.mark.parametrize("mask", [None, "bool", "bias", "trained bias"])
@pytest.mark.parametrize("wanted", ["q", "kv", "v"])
@pytest.mark.parametrize("by", ["scaled_dot_product_attention", "bhsd", "bshd"])
def test_batched_gradients_of_some(by, wanted, mask):
    """Of what is not asked for there is nothing to be laid out."""
    torch.manual_seed(0)
    given = [normal(*((2, 5, 3, 8) if by == "bshd" else (2, 3, 5, 8)), dtype=torch.float64) for _ in range(3)]
    leaves = [tensor.requires_grad_() for name, tensor in zip("qkv", given, strict=True) if name in wanted]
    added = None if mask is None else torch.randn(3, 1, 5, dtype=torch.float64)
    if mask == "trained bias":
        leaves.append(added.requires_grad_())
    elif mask == "bool":
        added = added < 1
    if by == "scaled_dot_product_attention":
        out = ours(*given, added)
    else:
        out = fastseq.functional.attention(*given, **{"attn_mask" if mask == "bool" else "attn_bias": added}, layout=by)
    cotangents = torch.randn(3, *out.shape, dtype=torch.float64)
    together = torch.autograd.grad(out, leaves, cotangents, is_grads_batched=True, retain_graph=True)
    for index, cotangent in enumerate(cotangents):
        alone = torch.autograd.grad(out, leaves, cotangent, retain_graph=True)
        torch.testing.assert_close([grad[index] for grad in together], list(alone))


@pytest.mark.parametrize("module", [False, True])
def test_batched_gradients_of_many_keys(module):
    """In float32, where the forward pass keeps more of the lse than the op of these gradients takes."""
    torch.manual_seed(0)
    if module:
        attention, leaf = fastseq.MultiheadAttention(16, 2), torch.randn(130, 2, 16, requires_grad=True)
        leaves, out = [leaf], attention(leaf, leaf, leaf, need_weights=False)[0]
    else:
        leaves = [torch.randn(2, 3, 130, 8, requires_grad=True) for _ in range(3)]
        out = ours(*leaves, is_causal=True)
    cotangents = torch.randn(3, *out.shape)
    together = torch.autograd.grad(out, leaves, cotangents, is_grads_batched=True, retain_graph=True)
    for index, cotangent in enumerate(cotangents):
        alone = torch.autograd.grad(out, leaves, cotangent, retain_graph=True)
        torch.testing.assert_close([grad[index] for grad in together], list(alone))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    torch.manual_seed(0)
    wide = qkv()
    low = {n: t.to(dtype) for n, t in wide.items()}
    for mask in (None, normal(4, 5), coins(4, 5)):
        narrow = mask.to(dtype) if mask is not None and mask.is_floating_point() else mask
        expected = results(ours, low | dict(attn_mask=narrow), {})
        with torch.autocast("cpu", dtype=dtype):
            actual = results(ours, wide | dict(attn_mask=mask), {})
            by_torch = results(theirs, wide | dict(attn_mask=mask), {})
        assert {n: t.dtype for n, t in actual.items()} == {n: t.dtype for n, t in by_torch.items()}
        for name, value in actual.items():
            assert torch.equal(value, expected[name].to(value.dtype)), name
    doubles = {n: t.double() for n, t in wide.items()}
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(ours(**doubles), ours(**doubles))
        assert ours(**doubles).dtype == theirs(**doubles).dtype == torch.float64
        with pytest.raises(RuntimeError, match="one dtype"):
            ours(**wide | dict(query=doubles["query"]))


@pytest.mark.parametrize("options", [dict(), dict(is_causal=True), dict(enable_gqa=True)], ids=str)
def test_second_derivatives(options):
    torch.manual_seed(0)
    heads = 2 if options.get("enable_gqa") else 1
    query, key, value = (normal(1, h, n, e).double().requires_grad_() for h, n, e in ((heads, 3, 2), (1, 4, 2), (1, 4, 3)))
    mask = None if options.get("is_causal") else normal(1, heads, 1, 4).double().requires_grad_()
    inputs = (query, key, value) if mask is None else (query, key, value, mask)
    assert torch.autograd.gradcheck(lambda *t: ours(*t, **options), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: ours(*t, **options), inputs)


def test_transforms():
    torch.manual_seed(0)
    query, key, value, mask = normal(4, 2, 3, 4, 8), normal(4, 2, 3, 5, 8), normal(4, 2, 3, 5, 6), normal(4, 1, 1, 4, 5)
    expected = theirs(query, key, value, mask)
    torch.testing.assert_close(torch.vmap(ours)(query, key, value, mask), expected)
    torch.testing.assert_close(torch.vmap(ours, (0, None, None))(query, key[0], value[0]), theirs(query, key[:1], value[:1]))

    def loss(function: Any) -> Any:
        return lambda *t: function(*t).square().sum()

    torch.testing.assert_close(
        torch.vmap(torch.func.grad(loss(ours)))(query, key, value, mask),
        torch.vmap(torch.func.grad(loss(theirs)))(query, key, value, mask),
    )


@pytest.mark.parametrize("options", [dict(), dict(is_causal=True), dict(dropout_p=0.5)], ids=str)
def test_compile(options):
    torch.manual_seed(0)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    masks = (None,) if options else (None, normal(2, 1, 4, 5), coins(4, 5), causal_lower_right(4, 5))
    for mask in masks:
        torch.manual_seed(3)
        # an eager call with dropout is torch's on a CPU, which draws otherwise
        with fastseq.use_backend("reference" if "dropout_p" in options else "auto"):
            expected = results(ours, qkv() | dict(attn_mask=mask), options)
        torch.manual_seed(3)
        torch.testing.assert_close(results(compiled, qkv() | dict(attn_mask=mask), options), expected)


def test_compile_for_any_size():
    torch._dynamo.reset()
    counter, graphs = CompileCounterWithBackend("aot_eager"), 0
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=counter)
    for batch, heads, length, keys in ((2, 3, 4, 5), (7, 9, 10, 11), (8, 6, 13, 12)):
        tensors = qkv((batch, heads, length, 8), (batch, heads, keys, 8)) | dict(attn_mask=normal(batch, 1, length, keys))
        torch.testing.assert_close(compiled(**tensors), ours(**tensors))
        graphs = graphs or counter.frame_count
    assert counter.frame_count == graphs


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_nested(layout):
    torch.manual_seed(0)

    def nested(lengths: tuple[int, ...], heads: int = 2, features: int = 8) -> Tensor:
        if layout == torch.strided:
            return torch.nested.nested_tensor([normal(heads, n, features) for n in lengths], requires_grad=True)
        parts = [normal(n, heads, features) for n in lengths]
        return torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)

    def attend(function: Any, *tensors: Tensor, **options: Any) -> list[Tensor]:
        if layout == torch.jagged:
            tensors = tuple(t.transpose(1, 2) for t in tensors)
        out = function(*tensors, **options)
        assert out.is_nested and out.layout == layout
        return list(out.unbind())

    leaves = query, key, value = nested((3, 5, 1)), nested((4, 2, 6)), nested((4, 2, 6), features=6)
    if layout == torch.jagged:
        value = torch.nested.nested_tensor_from_jagged(value.values(), key.offsets())
    gradients = []
    for function in (ours, theirs):
        total = sum(part.square().sum() for part in attend(function, query, key, value))
        gradients.append([part for grad in torch.autograd.grad(total, leaves, retain_graph=True) for part in grad.unbind()])
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(attend(ours, query, key, value), attend(theirs, query, key, value))
    torch.testing.assert_close(attend(ours, query, query, query, scale=2.0), attend(theirs, query, query, query, scale=2.0))

    nested_q = nested((3, 5, 1), heads=4)
    sequences = zip(nested_q.unbind(), key.unbind(), value.unbind(), strict=True)
    alone = [[t if layout == torch.strided else t.transpose(0, 1) for t in sequence] for sequence in sequences]
    for options in (dict(is_causal=True, enable_gqa=True), dict(enable_gqa=True)):
        expected = [theirs(*sequence, **options) for sequence in alone]
        torch.testing.assert_close(attend(ours, nested_q, key, value, **options), expected)
    with pytest.raises(RuntimeError, match="heads of nested"):
        attend(ours, nested_q, key, value)
    with pytest.raises(ValueError, match="attn_mask"):
        attend(ours, query, key, value, attn_mask=coins(5, 5))
    with pytest.raises(ValueError, match="all be nested"):
        ours(query, normal(3, 2, 5, 8), normal(3, 2, 5, 8))
    with pytest.raises(RuntimeError, match="fit|same sequence lengths"):
        attend(ours, query, key, nested((4, 3, 6)))


def test_nested_rows_of_ragged_heads():
    torch.manual_seed(0)
    tensor = torch.nested.nested_tensor([normal(3, 2, 8), normal(5, 2, 8)], layout=torch.jagged)
    torch.testing.assert_close(ours(tensor, tensor, tensor).values(), theirs(tensor, tensor, tensor).values())


class TestPlainCalls:
    """Eager calls on the CPU are one call of the library, whatever of these they ask for, unless torch's kernel is the faster."""

    @pytest.fixture(autouse=True)
    def without_a_choice(self):
        with fastseq.use_backend("cpu"):
            yield

    @pytest.fixture
    def calls(self, monkeypatch) -> list[Any]:
        ours(*(torch.ones(1, 1, 1, 1),) * 3)  # so that the op is known
        found: list[bool] = []

        def counted(native):
            def call(*arguments):
                results = native(*arguments)
                found.append(results is not None and len(results) > 0)
                return results

            return call

        for name in ("_native", "_native_plain"):
            monkeypatch.setattr(eager, name, counted(getattr(eager, name)))
        return found

    @pytest.mark.parametrize("gradients", [False, True])
    @pytest.mark.parametrize("layout", ["heads first", "time first", "broadcast batch"])
    def test_one_call(self, calls, gradients, layout):
        torch.manual_seed(0)
        tensors = qkv((2, 4, 5, 8), (2, 4, 5, 8))
        if layout == "time first":
            tensors = {name: t.transpose(1, 2).contiguous().transpose(1, 2) for name, t in tensors.items()}
        elif layout == "broadcast batch":
            tensors = {name: t[:1].expand(2, -1, -1, -1) for name, t in tensors.items()}
        tensors = {name: t.requires_grad_(gradients) if t.is_leaf else t for name, t in tensors.items()}
        grouped = tensors | {name: tensors[name][:, :2] for name in ("key", "value")}
        cases = [tensors, tensors | dict(is_causal=True), tensors | dict(scale=2), tensors | dict(scale=0.0)]
        cases += [tensors | dict(attn_mask=mask) for mask in (coins(5, 5), normal(5, 5), coins(2, 1, 1, 5), normal(4, 5, 1))]
        cases += [grouped | dict(enable_gqa=True), grouped | dict(enable_gqa=True, is_causal=True)]
        for number, given in enumerate(cases):
            torch.testing.assert_close(ours(**given), theirs(**given))
            assert len(calls) == number + 1 and calls[-1]
        ours(**tensors, dropout_p=0.5)
        assert len(calls) == len(cases) + 1 and calls[-1]

    def test_ranks(self, calls):
        for shape in ((5, 8), (3, 5, 8)):
            q, k, v, mask = normal(*shape), normal(*shape), normal(*shape), coins(5, 5)
            mask[:, 0] = True
            for options in ({}, {"is_causal": True}, {"attn_mask": mask}):
                torch.testing.assert_close(ours(q, k, v, **options), theirs(q, k, v, **options))
                assert calls.pop()

    def test_results_lie_time_before_heads(self):
        assert ours(**qkv()).transpose(1, 2).is_contiguous()

    def test_an_output_written_over_is_refused(self):
        q, k, v = (t.requires_grad_() for t in qkv().values())
        out = ours(q, k, v)
        out.detach().zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


@pytest.mark.parametrize("by", [ours, fastseq.functional.attention])
def test_what_torch_is_chosen_for_is_right_where_its_fused_kernel_is_not(by):
    """Of few keys it loses NaN, and causal it gives NaN for scales that are not positive."""
    torch.manual_seed(0)
    name = "causal" if by is fastseq.functional.attention else "is_causal"
    query, key, value = (torch.randn(2, 4, 9, 16) for _ in range(3))
    undefined = query.index_fill(2, torch.tensor([4]), torch.nan)
    with sources.instead(lambda call: Candidate("torch")):
        assert by(undefined, key, value)[:, :, 4].isnan().all()
        for scale in (0.0, -0.5):
            found = by(query, key, value, scale=scale, **{name: True})
            with fastseq.use_backend("reference"):
                torch.testing.assert_close(found, by(query, key, value, scale=scale, **{name: True}))
