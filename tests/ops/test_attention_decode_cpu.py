"""The CPU kernels for few rows at every instruction set of this machine: odd sizes, layouts, parts, what nobody may read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastseq import backends
from fastseq.backends import library
from fastseq.testing import assert_all_close_to_truth
from support.attention import AttentionCase, dense, make, spec_of
from support.attention_decode import DecodeCase, decode, decode_by_torch, make_decode
from support.battery import widened

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def native(monkeypatch):
    """Scratch holds NaN until it is written."""
    assert library.reason() is None
    monkeypatch.setenv("FASTSEQ_CPU_POISON", "1")
    with backends.use_backend("cpu"), torch.no_grad():
        yield


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# rows of a key head; features of keys and of values: ones, and one less and one more than vectors of 2 to 32 values; keys: the
# same, and one less and one more than a block
SIZES = [
    DecodeCase(heads=1, heads_k=1, lengths=(1,), capacity=1, features=1, features_v=1),
    DecodeCase(heads=1, heads_k=1, lengths=(2, 3), capacity=3, features=2, features_v=3),
    DecodeCase(heads=2, heads_k=1, lengths=(7, 9), capacity=9, features=7, features_v=5),
    DecodeCase(heads=6, heads_k=2, lengths=(15, 17, 16), capacity=17, features=9, features_v=15),
    DecodeCase(heads=4, heads_k=1, lengths=(31, 33), capacity=33, features=17, features_v=16),
    DecodeCase(heads=5, heads_k=1, lengths=(127, 128, 129), capacity=130, features=16, features_v=17),
    DecodeCase(heads=12, heads_k=2, lengths=(64, 1), capacity=70, features=31, features_v=33),
    DecodeCase(heads=7, heads_k=1, lengths=(63, 65), capacity=65, features=33, features_v=31),
    DecodeCase(heads=8, heads_k=1, lengths=(300,), capacity=300, features=64, features_v=96),
    DecodeCase(heads=9, heads_k=1, lengths=(40, 19), capacity=40, features=65, features_v=63),
    DecodeCase(heads=2, heads_k=2, lengths=(200, 0), capacity=200, features=100, features_v=130),
    DecodeCase(heads=3, heads_k=1, queries=13, lengths=(45, 5), capacity=50, features=20, features_v=12),
    DecodeCase(heads=2, heads_k=1, queries=70, lengths=(90, 50), capacity=100, features=16, features_v=16, left=20),
    DecodeCase(heads=1, heads_k=1, lengths=(5,), capacity=5, features=0, features_v=4),
    DecodeCase(heads=1, heads_k=1, lengths=(5,), capacity=5, features=4, features_v=0),
]
# windows that begin and end within a vector of keys and on its border, at both ends of a block
WINDOWS = [
    DecodeCase(heads=heads, heads_k=1, queries=3, lengths=(150, 40), capacity=160, left=left, right=right)
    for heads in (1, 2)
    for left, right in ((0, 0), (15, 1), (16, 0), (63, -1), (127, 2), (128, 0))
]
FEATURES = [
    DecodeCase(heads=4, heads_k=1, lengths=(90, 33), capacity=96, page=16, slopes=2, sinks=True, softcap=2.0, left=40),
    DecodeCase(heads=2, heads_k=2, lengths=(90, 33), capacity=96, page=3, slopes=1, softcap=0.5),
    DecodeCase(heads=8, heads_k=1, queries=2, lengths=(90, 33), capacity=91, page=7, right=-1, sinks=True, left=30),
    # the first key that is seen is the last of a page, and the first
    DecodeCase(heads=2, heads_k=1, lengths=(90, 91), capacity=96, page=16, left=26),
    DecodeCase(heads=8, heads_k=2, lengths=(0, 0), capacity=8, sinks=True),
    DecodeCase(heads=3, heads_k=1, lengths=(400, 100), capacity=400, num_splits=3, sinks=True, slopes=1),
    DecodeCase(heads=1, heads_k=1, lengths=(400, 3), capacity=400, num_splits=400, page=4, left=350),
    DecodeCase(heads=16, heads_k=1, queries=3, lengths=(700, 5), capacity=700, num_splits=2),
    # features enough for tiles that read keys as they lie: in pages shorter than a tile, in pages of one, cut by a window
    DecodeCase(heads=8, heads_k=1, lengths=(90, 33), capacity=98, page=7, features=64, features_v=64),
    DecodeCase(heads=10, heads_k=2, lengths=(90, 131), capacity=144, page=16, features=96, features_v=33, left=70),
    DecodeCase(
        heads=16, heads_k=2, lengths=(300, 257), capacity=300, features=80, features_v=80, slopes=2, sinks=True, softcap=2.0
    ),
    DecodeCase(heads=4, heads_k=1, queries=2, lengths=(150, 40), capacity=160, features=64, features_v=130, left=63, right=1),
    DecodeCase(heads=8, heads_k=1, queries=5, lengths=(45, 150), capacity=160, features=32, features_v=32, num_splits=2),
]


def finite(results):
    out, lse = results
    return {"out": out, "lse": lse.masked_fill(lse == -torch.inf, 0)}


def check(results, by_torch, truth):
    assert torch.equal(results[1] == -torch.inf, truth[1] == -torch.inf)
    own = 0.0 if results[0].dtype != torch.float64 else 1e-15
    assert_all_close_to_truth(finite(results), finite(by_torch), finite(truth), own_error=own)


def check_decode(case, dtype, **changes):
    inputs = make_decode(case, dtype) | changes
    results = decode(**inputs)
    check(results, decode_by_torch(**inputs), decode_by_torch(**{name: widened(value) for name, value in inputs.items()}))
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*SIZES, *WINDOWS, *FEATURES], ids=str)
def test_results(case, dtype, level):
    check_decode(case, dtype)


def reordered(tensor, order):
    """The same values, dimensions in another order in memory, rows further apart than they need."""
    back = [order.index(i) for i in range(4)]
    wide = torch.full([tensor.shape[i] for i in order[:-1]] + [tensor.shape[3] + 3], torch.nan, dtype=tensor.dtype)
    wide[..., :-3] = tensor.permute(order)
    return wide[..., :-3].permute(back)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 2, 0, 3)], ids=str)
@pytest.mark.parametrize("case", [SIZES[8], FEATURES[0]], ids=str)
def test_every_layout_gives_the_same_bits(case, order, dtype):
    inputs = make_decode(case, dtype)
    expected = decode(**inputs)
    results = decode(**inputs | {name: reordered(inputs[name], order) for name in ("q", "k_cache", "v_cache")})
    assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))


@pytest.mark.parametrize("count", (2, 3, 5))
@pytest.mark.parametrize(
    "case",
    [
        DecodeCase(heads=8, heads_k=1, lengths=(3000,), capacity=3000, features=64, features_v=64),
        DecodeCase(heads=8, heads_k=2, lengths=(900, 0, 1, 2500), capacity=2500, features=64, features_v=32, sinks=True),
        DecodeCase(heads=2, heads_k=2, lengths=(2000, 4000, 300), capacity=4096, features=128, features_v=128, page=16),
    ],
    ids=str,
)
def test_parts_of_threads(case, count, threads):
    """Heads that are cut at any block, and merged; bit-equal when run again."""
    threads(count)
    results = check_decode(case, torch.float32)
    again = decode(**make_decode(case, torch.float32))
    assert all(torch.equal(one, other) for one, other in zip(results, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", (1, 2, 4, 8))
def test_a_nan_makes_its_rows_nan_and_no_others(heads, dtype, level):
    """Wherever it stands, be it the first score of a block or the last, in a part of its own."""
    case = DecodeCase(heads=heads, heads_k=1, lengths=(150, 150), capacity=150, num_splits=2)
    for place in (0, 63, 64, 149):
        for name in ("q", "k_cache", "v_cache"):
            inputs = make_decode(case, dtype)
            inputs[name][1, 0, place if name != "q" else 0, 3] = torch.nan
            out, lse = decode(**inputs)
            assert not out[0].isnan().any() and not lse[0].isnan().any()
            seen = out[1].isnan()
            assert seen[..., 3].all() and not seen[..., :3].any() if name == "v_cache" else seen[0].all()
            assert name == "q" or seen[..., 3].all()
            assert lse[1, 0].isnan().all() == (name != "v_cache")


@pytest.mark.parametrize("heads", (1, 4))
def test_infinite_and_far_scores(heads, level):
    """exp of -inf, and of what is far below the maximum, is zero; a later maximum far above leaves nothing of what was summed."""
    case = DecodeCase(heads=heads, heads_k=1, lengths=(300,), capacity=300)
    inputs = make_decode(case, torch.float32) | {"scale": 1.0}
    inputs["q"].fill_(1.0)
    for keys in (torch.linspace(-1e4, 1e4, 300), torch.linspace(1e4, -1e4, 300), torch.full((300,), -1e30)):
        inputs["k_cache"].zero_()[0, 0, :, 0] = keys
        out, lse = decode(**inputs)
        expected, expected_lse = decode_by_torch(**{name: widened(value) for name, value in inputs.items()})
        torch.testing.assert_close(out.double(), expected)
        torch.testing.assert_close(lse.double(), expected_lse)
    inputs["k_cache"].zero_()[0, 0, :299, 0] = -torch.inf
    out, lse = decode(**inputs)
    assert torch.equal(out, inputs["v_cache"][:, :, 299:].expand_as(out)) and lse.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", (1, 4))
def test_infinite_values(heads, dtype, level):
    """They are no NaN, since what a block's end is filled up with is none of its values."""
    case = DecodeCase(heads=heads, heads_k=1, lengths=(45,), capacity=45, features=32, features_v=8)
    for place in (0, 32, 44):
        inputs = make_decode(case, dtype)
        inputs["v_cache"][0, 0, place, 3] = torch.inf
        out, _ = decode(**inputs)
        assert (out[..., 3] == torch.inf).all() and out[..., :3].isfinite().all() and out[..., 4:].isfinite().all()


# What attention against a cache does not have, through the general op, whose few rows these kernels take.
GENERAL = [
    AttentionCase("mask", lengths=(1, 37), heads=(4, 2), mask="bk", dead=True),
    AttentionCase("mask-of-all", lengths=(2, 70), heads=(4, 1), mask="bhqk", dead=True),
    AttentionCase("mask-broadcast-over-keys", lengths=(3, 20), mask="hq", dead=True),
    AttentionCase("bias", lengths=(1, 67), heads=(8, 1), bias="hqk", hiding_bias=True),
    AttentionCase("bias-broadcast-over-keys", lengths=(2, 67), heads=(2, 2), bias="bq"),
    AttentionCase("relative-bias", lengths=(4, 70), relative_bias=139, bottom_right=True, right=0),
    AttentionCase("relative-bias-short", lengths=(2, 70), heads=(4, 1), relative_bias=21, offset=31),
    AttentionCase("packed", packed=((1, 70), (3, 3), (0, 4), (2, 0)), heads=(2, 1), sinks=True),
    AttentionCase(
        "both-lengths", batch=3, lengths=(3, 40), q_lengths=(3, 2, 0), k_lengths=(40, 33, 5), right=0, bottom_right=True
    ),
    AttentionCase("offset", lengths=(4, 50), offset=20, left=7, right=3, slopes=2),
    AttentionCase("negative-scale", lengths=(1, 33), scale=-0.7, softcap=0.8, features=(24, 40), time_first=True),
    AttentionCase(
        "everything", lengths=(2, 70), heads=(4, 1), mask="qk", bias="bhk", relative_bias=31, slopes=1, sinks=True, left=40
    ),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GENERAL, ids=str)
def test_general_op(case, dtype, level):
    inputs = make(case, dtype)
    results = torch.ops.fastseq_native.attention_forward(*(inputs[name] for name in "qkv"), *spec_of(inputs), False)
    truth = dense({name: widened(value) for name, value in inputs.items()})[:2]
    check(results, dense(inputs)[:2], truth)


@pytest.mark.parametrize("heads", ((2, 2), (4, 1)), ids=str)
def test_a_hidden_key_may_hold_anything(heads, level):
    inputs = make(AttentionCase("mask", lengths=(1, 37), heads=heads, mask="bk"), torch.float32)
    inputs["mask"][..., 20] = False
    expected = torch.ops.fastseq_native.attention_forward(*(inputs[name] for name in "qkv"), *spec_of(inputs), False)
    for value in (torch.nan, torch.inf):
        inputs["k"][:, :, 20] = value
        results = torch.ops.fastseq_native.attention_forward(*(inputs[name] for name in "qkv"), *spec_of(inputs), False)
        assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))


def test_a_bias_whose_keys_are_far_apart():
    inputs = make(AttentionCase("bias", lengths=(2, 41), heads=(2, 1), bias="bhqk", mask="bhqk"), torch.float32)
    expected = dense(inputs)[:2]
    for name in ("bias", "mask"):
        inputs[name] = inputs[name].mT.contiguous().mT
    results = torch.ops.fastseq_native.attention_forward(*(inputs[name] for name in "qkv"), *spec_of(inputs), False)
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(q=torch.zeros(2, 4, 16)), "q must have 4 dimensions, got 3"),
        (dict(q=torch.zeros(2, 4, 16, 1).mT[..., ::2]), "last dimension of q must be contiguous"),
        (dict(q=torch.zeros(2, 3, 1, 16)), "heads must be a multiple of those of the cache, got 3 and 2"),
        (dict(k_cache=torch.zeros(3, 2, 35, 16)), "k_cache must have 2 in dimension 0, got 3"),
        (dict(v_cache=torch.zeros(2, 2, 34, 16)), "v_cache must have 35 in dimension 2, got 34"),
        (dict(v_cache=torch.zeros(2, 2, 35, 16).half()), "v_cache has a wrong dtype"),
        (dict(lengths=torch.zeros(3, dtype=torch.int32)), "lengths must have 2 in dimension 0, got 3"),
        (dict(lengths=torch.zeros(2)), "lengths has a wrong dtype"),
        (dict(slopes=torch.zeros(4)), "slopes must have 2 dimensions, got 1"),
        (dict(sinks=torch.zeros(3)), "sinks must have 4 in dimension 0, got 3"),
        (dict(block_table=torch.zeros(2, dtype=torch.int32)), "block_table must have 2 dimensions, got 1"),
        (dict(num_splits=-1), "num_splits must not be negative, got -1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_raw_op_refuses(changes, message):
    inputs = make_decode(DecodeCase(lengths=(19, 35)), torch.float32) | changes
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastseq_native.attention_decode(*inputs.values())


def test_pages_that_there_are_not_stand_for_some_page():
    """As in the reference; the functional face refuses them."""
    case = replace(FEATURES[0], sinks=False)
    inputs = make_decode(case, torch.float32)
    inputs["k_cache"].nan_to_num_(), inputs["v_cache"].nan_to_num_()
    inputs["block_table"][0, 5] = 1 << 30
    results = decode(**inputs)
    inputs["block_table"][0, 5] = len(inputs["k_cache"]) - 1
    assert all(torch.equal(one, other) for one, other in zip(results, decode(**inputs), strict=True))
