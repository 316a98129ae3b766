"""The Triton kernels of attention against a cache, in the interpreter, and how their work is cut."""

from __future__ import annotations

import os

import pytest
import torch

from fastseq import backends
from fastseq.backends.triton.attention_decode import choose_parts, choose_tile
from support.attention_decode import DecodeCase, decode, decode_by_torch, make_decode

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")


def decoded(case, dtype=torch.float64, **changes):
    with backends.use_backend("triton"):
        return decode(**make_decode(case, dtype) | changes)


@interpreted
@pytest.mark.parametrize("num_splits", [2, 7, 18, 19, 25])
def test_every_cut_of_the_keys_gives_the_same(num_splits):
    """Parts of several tiles, of one, and empty ones; the sink counts once."""
    case = DecodeCase(heads=2, heads_k=1, lengths=(300,), capacity=310, sinks=True)
    for one, other in zip(decoded(case), decoded(case, num_splits=num_splits), strict=True):
        torch.testing.assert_close(one, other)


@interpreted
def test_more_rows_than_a_program_holds():
    case = DecodeCase(heads=6, heads_k=2, queries=12, lengths=(30, 17), capacity=32, left=9, slopes=1)
    expected = decode_by_torch(**make_decode(case, torch.float64))
    for one, other in zip(decoded(case, num_splits=2), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)])
def test_offsets_beyond_32_bits(device):
    """A cache whose second head lies 2^31 elements behind the first, most of it never touched."""
    storage = torch.empty(2**31 + 64, dtype=torch.float16, device=device)  # pages of host memory never written cost nothing
    cache = storage.as_strided((1, 2, 2, 16), (0, 2**31, 16, 1))
    cache.copy_(torch.randn(1, 2, 2, 16))
    inputs = make_decode(DecodeCase(heads=2, lengths=(2,), capacity=2), torch.float16, device)
    inputs |= {"k_cache": cache, "v_cache": cache}
    with backends.use_backend("triton"):
        out, _ = decode(**inputs)
    dense = cache.clone(memory_format=torch.contiguous_format)
    with backends.use_backend("triton"):
        expected, _ = decode(**inputs | {"k_cache": dense, "v_cache": dense})
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("programs", "tiles", "processors", "expected"),
    [
        (132, 100, 132, 1),  # full already
        (500, 100, 132, 1),
        (100, 100, 132, 1),  # 76 % busy in one part; two parts, in two waves, are no busier
        (8, 256, 132, 15),  # one sequence of 8 key heads: 120 of 132 busy, which 33 parts would fill twice
        (8, 4, 132, 2),  # few keys: a part has two tiles at least
        (8, 1, 132, 1),
        (1, 10_000, 132, 109),  # of at most 128
        (70, 64, 132, 3),  # 140 programs take two waves, 210 keep 80 % busy
        (1, 0, 132, 1),
        (4, 100, 1, 1),  # the interpreter
    ],
)
def test_choose_parts(programs, tiles, processors, expected):
    assert choose_parts(programs, tiles, processors) == expected


def test_tiles_fit():
    """Powers of two, at least what a tensor core takes, and two programs of three tiles beside one another (sm_90: 227 KiB)."""
    for itemsize in (2, 4):
        for width in (16, 32, 64, 128, 256):
            for rows in (1, 5, 16, 17, 100):
                tile = choose_tile(rows, width, itemsize)
                assert tile.rows in (16, 32, 64) and tile.keys in (16, 32, 64, 128)
                assert 2 * 3 * 2 * tile.keys * width * itemsize <= 227 << 10
    assert choose_tile(5, 64, 2).rows == 16 and choose_tile(17, 64, 2).rows == 32 and choose_tile(100, 64, 4).rows == 32
