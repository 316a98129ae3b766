"""The parts of the Triton attention kernels one by one, and the forward and weights on what the op battery cannot express."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq.backends import AttentionQuery
from fastseq.backends import triton as backend
from fastseq.backends.triton import attention_args
from fastseq.kernels.attention import bias, configs, mask, softmax
from fastseq.kernels.attention.args import DistanceRows, Dropout, Pairs, Parts, Sequences
from fastseq.ops.types import Spec
from fastseq.reference import attention as reference
from fastseq.testing import assert_close_to_truth

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _ints(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@triton.jit
def _ranges(out, cases, parts, BLOCK: tl.constexpr, N: tl.constexpr):
    n = tl.arange(0, N)
    first, last = tl.load(cases + 4 * n), tl.load(cases + 4 * n + 1)
    shift, T = tl.load(cases + 4 * n + 2), tl.load(cases + 4 * n + 3)
    begin, inner, outer, end = mask.keys_of(parts, first, last, shift, T, BLOCK)
    tl.store(out + 8 * n, begin)
    tl.store(out + 8 * n + 1, inner)
    tl.store(out + 8 * n + 2, outer)
    tl.store(out + 8 * n + 3, end)
    begin, inner, outer, end = mask.queries_of(parts, first, last, shift, T, BLOCK)
    tl.store(out + 8 * n + 4, begin)
    tl.store(out + 8 * n + 5, inner)
    tl.store(out + 8 * n + 6, outer)
    tl.store(out + 8 * n + 7, end)


def _check_range(bounds: list[int], visible: Tensor, block: int, what: str) -> None:
    """``visible`` [a few, T]: whether each of a few sees, or is seen by, each of T."""
    begin, inner, outer, end = bounds
    some, every = visible.any(0).nonzero().flatten().tolist(), visible.all(0)
    assert 0 <= begin <= inner <= outer <= end and begin % block == 0, what
    if not some:
        assert len(visible) or begin == end, what
        return
    assert begin // block == some[0] // block and end == some[-1] + 1, what
    whole = [n for n in range(visible.shape[1] // block) if every[n * block : (n + 1) * block].all()]
    found = list(range(inner // block, outer // block)) if outer > inner else []
    assert found == whole and (not found or inner % block == 0), what


@pytest.mark.parametrize("window", [(None, None), (None, 0), (3, 0), (0, 0), (9, 2), (None, 5), (4, None), (40, 37)])
def test_ranges_are_those_of_brute_force(window):
    left, right = window
    spans = [(0, 16), (16, 32), (32, 37), (5, 6), (48, 37)]
    cases = [(*span, shift, size) for span in spans for shift in (-30, *range(-5, 9), 33) for size in (0, 16, 37)]
    padded = cases + cases[:1] * (256 - len(cases))
    for block in (8, 16, 32):
        out = torch.empty(len(padded), 8, dtype=torch.int32, device=DEVICE)
        _ranges[(1,)](out, _ints(*padded), Parts(1.0, left=left, right=right), BLOCK=block, N=len(padded))
        for (first, last, shift, size), found in zip(cases, out.tolist(), strict=False):
            few, all_of_them = torch.arange(first, max(first, last))[:, None], torch.arange(size)
            for name, bounds, distance in (
                ("keys", found[:4], all_of_them - few - shift),
                ("queries", found[4:], few - all_of_them - shift),
            ):
                visible = torch.ones_like(distance, dtype=torch.bool)
                if left is not None:
                    visible &= distance >= -left
                if right is not None:
                    visible &= distance <= right
                what = f"{name} of [{first}, {last}), shift {shift}, {size} of them, tiles of {block}: {bounds}"
                _check_range(bounds, visible, block, what)


@triton.jit
def _sequence(out, seq, Tq, Tk):
    b = tl.program_id(0)
    q0, k0, Tq, Tk, shift = mask.sequence(seq, b, Tq, Tk)
    tl.store(out + 5 * b, q0)
    tl.store(out + 5 * b + 1, k0)
    tl.store(out + 5 * b + 2, Tq)
    tl.store(out + 5 * b + 3, Tk)
    tl.store(out + 5 * b + 4, shift)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"offset": 3}, [[0, 0, 9, 7, 3], [0, 0, 9, 7, 3]]),
        ({"offset": 3, "bottom_right": 1}, [[0, 0, 9, 7, 1], [0, 0, 9, 7, 1]]),
        ({"q_lengths": (4, 0), "bottom_right": 1}, [[0, 0, 4, 7, 3], [0, 0, 0, 7, 7]]),
        ({"k_lengths": (4, 0), "bottom_right": 1}, [[0, 0, 9, 4, -5], [0, 0, 9, 0, -9]]),
        ({"cu_q": (0, 2, 9), "cu_k": (0, 5, 7), "bottom_right": 1, "offset": 2}, [[0, 0, 2, 5, 5], [2, 5, 7, 2, -3]]),
    ],
)
def test_a_sequence_has_its_own_rows_sizes_and_shift(given, expected):
    out = torch.empty(2, 5, dtype=torch.int32, device=DEVICE)
    given = {name: _ints(*value) if isinstance(value, tuple) else value for name, value in given.items()}
    _sequence[(2,)](out, Sequences(**given), 9, 7)
    assert out.tolist() == expected


@triton.jit
def _masks(out, skipped, parts, i0, j0, shift, Tq, Tk, BM: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr):
    i, j = i0 + tl.arange(0, BM), j0 + tl.arange(0, BN)
    visible = mask.seen(parts, 0, 0, i, j, shift, Tq, Tk, EDGE)
    tl.store(out + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :], visible.to(tl.uint8))
    if parts.blocks is not None:
        tl.store(skipped, (mask.any_block(parts, 0, 0, i0, j0, Tq, Tk, BM, BN) == 0).to(tl.int32))


@pytest.mark.parametrize("block", [16, 17, 50])
def test_masks_windows_and_blocks_hide_what_they_should(block):
    tq, tk, shift = 70, 50, 4
    generator = torch.Generator().manual_seed(block)
    dense = torch.rand(tq, tk, generator=generator) > 0.3
    blocks = torch.rand(-(-tq // block), -(-tk // block), generator=generator) > 0.6
    parts = Parts(
        1.0,
        left=20,
        right=10,
        mask=attention_args.pairs(dense[None, None].to(DEVICE)),
        blocks=attention_args.pairs(blocks[None, None].to(DEVICE)),
        block_size=block,
    )
    full = blocks.repeat_interleave(block, 0).repeat_interleave(block, 1)[:tq, :tk]
    distance = torch.arange(tk) - torch.arange(tq)[:, None] - shift
    expected = torch.zeros(96, 64, dtype=torch.bool)
    expected[:tq, :tk] = dense & full & (distance >= -20) & (distance <= 10)
    tiles_skipped = 0
    for i0, j0 in itertools.product((0, 32, 64), (0, 16, 32, 48)):
        out, skipped = torch.empty(32, 16, dtype=torch.uint8, device=DEVICE), _ints(-1)
        _masks[(1,)](out, skipped, parts, i0, j0, shift, tq, tk, BM=32, BN=16, EDGE=True)
        assert torch.equal(out.cpu().bool(), expected[i0 : i0 + 32, j0 : j0 + 16])
        assert bool(skipped.item()) == (not full[i0 : i0 + 32, j0 : j0 + 16].any())
        tiles_skipped += int(skipped)
    assert 0 < tiles_skipped < 12 or block == 50


def test_an_interior_tile_costs_no_mask():
    out = torch.empty(16, 16, dtype=torch.uint8, device=DEVICE)
    _masks[(1,)](out, out, Parts(1.0, left=0, right=0), 0, 0, 0, 3, 3, BM=16, BN=16, EDGE=False)
    assert out.all()


@triton.jit
def _bands(table, x, y, rows_out, from_out, to_out, i0, j0, shift, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    W: tl.constexpr = 2 * (BM if BM > BN else BN)
    i, j, r, cols = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, W), tl.arange(0, 16)
    rows = bias.band(table, 1, i0, j0, shift, cols, E, 16, BM, W)
    tl.store(rows_out + r[:, None] * 16 + cols[None, :], rows)
    wide = tl.load(x + i[:, None] * W + r[None, :])
    tl.store(from_out + i[:, None] * BN + j[None, :], bias.from_band(wide, BM, BN, W))
    narrow = tl.load(y + i[:, None] * BN + j[None, :])
    tl.store(to_out + i[:, None] * W + r[None, :], bias.to_band(narrow, BM, BN, W))


@pytest.mark.parametrize(("rows", "keys"), [(16, 16), (32, 16), (16, 64)])
def test_bands_are_index_arithmetic(rows, keys):
    width, length, zero, features, i0, j0, shift = 2 * max(rows, keys), 41, 17, 12, 32, 16, -5
    generator = torch.Generator().manual_seed(rows)
    table = torch.randn(2, length, features, generator=generator)
    x, y = torch.randn(rows, width, generator=generator), torch.randn(rows, keys, generator=generator)
    outs = [torch.full(shape, torch.nan, device=DEVICE) for shape in ((width, 16), (rows, keys), (rows, width))]
    on_device = table.to(DEVICE)
    _bands[(1,)](
        DistanceRows(on_device, *on_device.stride()[:2], length, zero),
        *(t.to(DEVICE) for t in (x, y)),
        *outs,
        i0,
        j0,
        shift,
        E=features,
        BM=rows,
        BN=keys,
    )
    band, from_band, to_band = (t.cpu() for t in outs)
    for i, j in itertools.product(range(rows), range(keys)):
        r = j - i + rows - 1
        entry = (j0 + j) - (i0 + i + shift) + zero
        own = table[1, entry] if 0 <= entry < length else torch.zeros(features)
        assert torch.equal(band[r, :features], own) and not band[r, features:].any()
        assert from_band[i, j] == x[i, r] and to_band[i, r] == y[i, j]
    assert to_band.count_nonzero() == rows * keys


@triton.jit
def _kept(out, dropout, parts, b, h, Hq, i0, j0, BM: tl.constexpr, BN: tl.constexpr, QUADS: tl.constexpr):
    i, j = tl.arange(0, BM), tl.arange(0, BN)
    keep = softmax.kept(dropout, parts, b, h, Hq, i0 + i, j0, BM, BN, QUADS)
    tl.store(out + i[:, None] * BN + j[None, :], keep.to(tl.uint8))


@pytest.mark.parametrize("seed", [1, 2**33 + 5, 2**63 - 2])
@pytest.mark.parametrize("probability", [1e-9, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("place", [(), (0, 0, 0, 4), (5, 8, 7, 3), (70, 13, 2**31 - 40, 90), (3, 2**31 + 6, 0, 2)], ids=str)
def test_the_same_weights_are_dropped_as_in_the_reference(seed, probability, place):
    """Of a tile that begins at key 20, or at 22; a part of a larger attention moves it."""
    row, key, head, between = place or (0, 0, 0, 4)
    seeds = torch.tensor([seed, *place], dtype=torch.int64)
    threshold = reference.dropout_threshold(probability)
    b, h, i0 = 2, 3, 48
    for j0, quads in ((20, True), (20, False), (22, False)):
        first, which = key + j0, torch.tensor(head + b * between + h)
        at = torch.arange(first // 4, first // 4 + 9)
        random = torch.stack(reference.philox(seeds[:1], at, torch.arange(16)[:, None] + row + i0, which), -1).flatten(-2)
        out = torch.empty(16, 32, dtype=torch.uint8, device=DEVICE)
        parts, dropout = Parts(1.0, part=1 if place else None), Dropout(seeds.to(DEVICE), threshold, 1.0)
        _kept[(1,)](out, dropout, parts, b, h, 4, i0, j0, BM=16, BN=32, QUADS=quads)
        assert torch.equal(out.cpu().bool(), (random >= threshold)[:, first % 4 : first % 4 + 32]), (j0, quads)


@triton.jit
def _softmax(s, w_out, lse_out, sum_out, parts, TILES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Row sums of weights times key numbers in pieces, and the weights from the lse."""
    i, j = tl.arange(0, BM), tl.arange(0, BN)
    highest, total = softmax.start(parts, 0, BM, s.dtype.element_ty)
    acc = tl.zeros((BM,), s.dtype.element_ty)
    for tile in range(TILES):
        piece = tl.load(s + i[:, None] * (TILES * BN) + (tile * BN + j)[None, :])
        w, highest, total, factor = softmax.update(piece, highest, total, parts)
        acc = acc * factor + tl.sum(w * (tile * BN + j)[None, :], 1)
    factor, lse = softmax.finish(highest, total, parts)
    tl.store(lse_out + i, lse)
    tl.store(sum_out + i, acc * factor)
    for tile in range(TILES):
        at = i[:, None] * (TILES * BN) + (tile * BN + j)[None, :]
        tl.store(w_out + at, softmax.weights(tl.load(s + at), lse, parts))


@pytest.mark.parametrize(("scale", "sink"), [(None, None), (None, -1.5), (None, -torch.inf), (0.3, None)])
def test_softmax_in_pieces(scale, sink):
    dtype, least = torch.float32, torch.finfo(torch.float32).min
    s = 30 * torch.randn(16, 48, generator=torch.Generator().manual_seed(0))
    s[1], s[2, :40], s[3, 20:], s[4, 47] = -torch.inf, -torch.inf, -torch.inf, 300
    if scale is None:
        s[5, :30] = least
    w, lse, total = (torch.empty(shape, dtype=dtype, device=DEVICE) for shape in (s.shape, (16,), (16,)))
    sinks = None if sink is None else torch.tensor([sink], device=DEVICE)
    parts = Parts(1.0, sinks=sinks, base2=None if scale is None else scale * 1.4426950408889634)
    _softmax[(1,)](s.to(DEVICE), w, lse, total, parts, TILES=3, BM=16, BN=16)

    def expected(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = s * (scale or 1.0)
        joined = s if sink is None else torch.cat((s, torch.full((16, 1), sink, dtype=s.dtype)), 1)
        weights = torch.softmax(joined, 1).nan_to_num(0)[:, :48]
        return weights, torch.logsumexp(joined, 1), (weights * torch.arange(48)).sum(1)

    for name, actual, in_torch, truth in zip(
        ("w", "lse", "sum"), (w, lse, total), expected(s), expected(s.double()), strict=True
    ):
        hidden = torch.isinf(truth)
        assert torch.equal(torch.isinf(actual.cpu()), hidden), name
        own_error = 300 * torch.finfo(dtype).eps  # of the largest score: one rounding of it before the exponential
        assert_close_to_truth(
            actual.cpu().masked_fill(hidden, 0),
            in_torch.masked_fill(hidden, 0),
            truth.masked_fill(hidden, 0),
            name,
            own_error=own_error,
        )


def test_a_row_of_equal_finite_scores_has_equal_weights_however_low_they_are():
    s = torch.full((16, 48), torch.finfo(torch.float32).min, device=DEVICE)
    w, lse, total = (torch.empty(shape, device=DEVICE) for shape in (s.shape, (16,), (16,)))
    _softmax[(1,)](s, w, lse, total, Parts(1.0), TILES=3, BM=16, BN=16)
    assert torch.allclose(total, torch.full((16,), 47 / 2, device=DEVICE))


def _tensors(tq: int = 53, tk: int = 71, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, tq, 24, generator=generator), torch.randn(2, 1, tk, 24, generator=generator)
    return q.to(DEVICE, dtype), k.to(DEVICE, dtype)


def _values(tk: int = 71, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 1, tk, 40, generator=torch.Generator().manual_seed(9)).to(DEVICE, dtype)


def _widened(spec: Spec) -> Spec:
    names = ("bias", "relative_bias", "relative_q", "relative_k", "sinks")
    return spec._replace(**{n: getattr(spec, n).double() for n in names if getattr(spec, n) is not None})


def _check(q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> None:
    out, lse = backend.attention_forward(q, k, v, spec)
    for name, actual, in_torch, truth in zip(
        ("out", "lse"),
        (out, lse),
        reference.forward(q, k, v, spec),
        reference.forward(q.double(), k.double(), v.double(), _widened(spec)),
        strict=True,
    ):
        assert_close_to_truth(actual, in_torch, truth, name)
    for average in (False, True):
        assert_close_to_truth(
            backend.attention_weights(q, k, lse, spec, average),
            reference.weights(q, k, None, spec, average),
            reference.weights(q.double(), k.double(), None, _widened(spec), average),
            f"weights, {average=}",
        )


@pytest.mark.parametrize(
    ("tile", "relative", "dtype"),
    [((16, 16), False, torch.float32), ((16, 32), True, torch.float16), ((32, 16), True, torch.float32)],
    ids=str,
)
def test_several_tiles_and_a_rest(tile, relative, dtype, monkeypatch):
    monkeypatch.setattr(configs, "of", lambda *args, **kwargs: configs.Config(*tile))
    q, k, v = (t[:1] for t in (*_tensors(37, 55, dtype), _values(55, dtype)))
    spec = Spec(scale=0.2, left=29, right=11, offset=6)
    if relative:
        generator = torch.Generator().manual_seed(2)
        rows = torch.randn(2, 160, 24, generator=generator).to(DEVICE, dtype)
        biases = torch.randn(2, 110, generator=generator).to(DEVICE, dtype)
        spec = Spec(
            scale=0.2, relative_bias=biases, relative_bias_zero=61, relative_q=q.flip(1), relative_k=rows, relative_k_zero=80
        )
    _check(q, k, v, spec)


def test_strides_of_any_kind():
    generator = torch.Generator().manual_seed(4)
    packed = torch.randn(2, 30, 4 * 24 + 5, generator=generator).to(DEVICE)
    q, k, v = (packed[:, :, 5 + n * 48 : 5 + (n + 1) * 48].unflatten(-1, (2, 24)).transpose(1, 2) for n in (0, 0, 1))
    every_other = torch.rand(2, 2, 60, 60, generator=generator).to(DEVICE)[:, :, ::2, 1::2]
    visible = (every_other > 0.4)[:1].expand(2, -1, -1, -1)
    table = torch.randn(1, 140, generator=generator).to(DEVICE)[:, ::2].expand(2, -1)
    rows = torch.randn(1, 24, 70, generator=generator).to(DEVICE).transpose(1, 2).expand(2, -1, -1)
    slopes = torch.rand(1, 4, generator=generator).to(DEVICE)[:, ::2]
    spec = Spec(
        scale=0.2,
        mask=visible,
        bias=every_other.transpose(2, 3),
        relative_bias=table,
        relative_bias_zero=33,
        relative_q=q.flip(2),
        relative_k=rows,
        relative_k_zero=40,
        slopes=slopes,
        sinks=torch.randn(4, generator=generator).to(DEVICE)[1::2],
    )
    assert q.storage_offset() and not q.is_contiguous()
    _check(q, k, v, spec)


def test_what_lies_beyond_the_lengths_does_not_matter():
    q, k = _tensors()
    v = _values()
    lengths = _ints(37, 0), _ints(40, 71)
    spec = Spec(scale=0.2, q_lengths=lengths[0], k_lengths=lengths[1], right=5, sinks=torch.ones(2, device=DEVICE))
    clean = backend.attention_forward(q, k, v, spec)
    q[0, :, 37:], q[1], k[0, :, 40:], v[0, :, 40:] = torch.nan, torch.nan, torch.nan, torch.nan
    dirty = backend.attention_forward(q, k, v, spec)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert not dirty[0][0, :, 37:].any() and (dirty[1][0, :, 37:] == 1).all() and (dirty[1][1] == 1).all()


@pytest.mark.parametrize(("shape", "keys"), [((0, 2, 5, 8), 5), ((2, 2, 0, 8), 5), ((2, 2, 5, 8), 0)])
def test_nothing_to_attend_with_or_to(shape, keys):
    q, k = torch.ones(shape, device=DEVICE), torch.ones(shape[0], 1, keys, 8, device=DEVICE)
    for sinks in (None, torch.tensor([0.5, 2.0], device=DEVICE)):
        out, lse = backend.attention_forward(q, k, k, Spec(sinks=sinks))
        assert out.shape == q.shape and not out.any()
        expected = -torch.inf if sinks is None else sinks[:, None]
        assert torch.equal(lse, torch.zeros_like(lse) + expected)
        assert backend.attention_weights(q, k, lse, Spec(sinks=sinks), False).shape == (*shape[:3], keys)


def test_packed_sequences_none_of_which_has_keys():
    q, k = torch.ones(2, 5, 8, device=DEVICE), torch.ones(1, 0, 8, device=DEVICE)
    spec = Spec(cu_q=_ints(0, 3, 5), cu_k=_ints(0, 0, 0), max_q=3, max_k=0)
    out, lse = backend.attention_forward(q, k, k, spec)
    assert not out.any() and (lse == -torch.inf).all()


def _query(**changes: Any) -> AttentionQuery:
    given = {
        "op": "attention",
        "call": "forward",
        "device": torch.device(DEVICE),
        "dtype": torch.float16,
        "batch": 1,
        "heads": (1, 1),
        "lengths": (4, 4),
        "features": (8, 8),
        "layout": "padded",
        "window": (-1, -1),
        "offset": 0,
        "block_size": 0,
        "uses": (),
        "gradients": (),
    }
    return AttentionQuery(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"features": (257, 8)}, "1 to 256"),
        ({"features": (8, 0)}, "1 to 256"),
        ({"dtype": torch.int32}, "int32 is not one of"),
        ({"uses": ("blocks",), "block_size": 8}, "at least 16"),
        ({"offset": 1 << 29}, "below 2^29"),
    ],
)
def test_a_refusal_has_a_reason(changes, reason):
    assert backend.why_not(_query()) == []
    (why,) = backend.why_not(_query(**changes))
    assert reason in why


@pytest.mark.skipif(DEVICE == "cuda", reason="of the interpreter")
def test_the_interpreter_refuses_bfloat16(plain_interpreter):
    """Outside of these tests, which know how to make it right."""
    (why,) = backend.why_not(_query(dtype=torch.bfloat16))
    assert "interpreter" in why


def test_parts_are_absent_where_they_change_nothing():
    q, k = _tensors(dtype=torch.float16)
    parts, dropout, seq = attention_args.parts_of(q, k, Spec(scale=0.5, left=124, right=10**12))
    assert parts._replace(base2=None) == Parts(0.5) and parts.base2 is not None
    assert dropout is None and seq == Sequences()
    assert attention_args.parts_of(q, k, Spec(left=123))[0].left == 123
    assert attention_args.parts_of(q.float(), k.float(), Spec())[0].base2 is None
    assert all(
        attention_args.parts_of(q, k, spec)[0].base2 is None
        for spec in (Spec(scale=0.0), Spec(scale=-1.0), Spec(softcap=2.0), Spec(sinks=torch.zeros(2)))
    )


def test_pairs_of_masks_are_their_bytes():
    visible = torch.tensor([[True, False]], device=DEVICE)[None, None].expand(3, 1, 1, 2)
    pairs = attention_args.pairs(visible)
    assert pairs[1:] == (0, 0, 0, 1) and isinstance(pairs, Pairs) and pairs.pointer.dtype == torch.uint8


@pytest.mark.parametrize("setting", ["tf32", "ieee"])
def test_products_of_fp32_follow_the_flag_of_torch(setting):
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = setting
        assert attention_args.precision(torch.float32) == setting
        assert attention_args.precision(torch.float16) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
