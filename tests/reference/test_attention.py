"""The specification against torch's own attention and against formulas as their papers have them, with every score in memory."""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch.nn import functional as F

from fastseq.ops.types import Spec
from fastseq.reference import attention as reference

DOUBLE = torch.float64


def random(*shape):
    return torch.randn(*shape, dtype=DOUBLE).requires_grad_()


def tensors(tq=6, tk=9, heads=4, kv_heads=2, features=8, batch=2):
    torch.manual_seed(0)
    return random(batch, heads, tq, features), random(batch, kv_heads, tk, features), random(batch, kv_heads, tk, features + 3)


def same(actual, expected, *leaves):
    """Values and gradients."""
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn_like(actual)
    for got, wanted in zip(
        torch.autograd.grad(actual, leaves, cotangent, retain_graph=True),
        torch.autograd.grad(expected, leaves, cotangent, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("group", (1, 2, 4))
def test_plain_is_torchs(group):
    q, k, v = tensors(kv_heads=4 // group)
    out, lse = reference.forward(q, k, v, Spec(scale=0.3))
    same(out, F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True), q, k, v)
    scores = 0.3 * q @ k.repeat_interleave(group, 1).mT
    same(lse, scores.exp().sum(-1).log(), q, k)


@pytest.mark.parametrize("tq,tk", ((6, 6), (6, 9), (9, 6)))
def test_causal_is_torchs(tq, tk):
    q, k, v = tensors(tq, tk)
    top_left = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    same(reference.forward(q, k, v, Spec(scale=8**-0.5, right=0))[0], top_left, q, k, v)
    visible = torch.ones(tq, tk, dtype=torch.bool).tril(tk - tq)
    bottom_right = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    same(reference.forward(q, k, v, Spec(scale=8**-0.5, right=0, bottom_right=True))[0], bottom_right, q, k, v)


@pytest.mark.parametrize(
    "left,right,offset,bottom_right", ((2, 1, 0, False), (0, 0, 0, True), (3, -1, 2, False), (-1, 2, -3, True))
)
def test_windows_are_bands_of_a_mask(left, right, offset, bottom_right):
    q, k, v = tensors()
    visible = torch.zeros(6, 9, dtype=torch.bool)
    for i in range(6):
        place = i + offset + (9 - 6 if bottom_right else 0)
        for j in range(9):
            visible[i, j] = (left < 0 or j >= place - left) and (right < 0 or j <= place + right)
    spec = Spec(scale=8**-0.5, left=left, right=right, offset=offset, bottom_right=bottom_right)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    same(reference.forward(q, k, v, spec)[0], expected, q, k, v)


@pytest.mark.parametrize("shape", ((1, 1, 1, 9), (2, 1, 6, 9), (1, 4, 6, 1), (2, 4, 6, 9)))
def test_masks_and_biases_are_torchs(shape):
    q, k, v = tensors()
    bias, mask = random(*shape), torch.rand(shape) < 0.6
    both = torch.where(mask, bias, -torch.inf)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=both.expand(2, 4, 6, 9), enable_gqa=True)
    same(reference.forward(q, k, v, Spec(scale=8**-0.5, mask=mask, bias=bias))[0], expected, q, k, v, bias)


def test_packed_sequences_do_not_see_each_other():
    torch.manual_seed(0)
    sizes = ((3, 5), (0, 2), (4, 4))
    q, k, v = random(4, 7, 8), random(2, 11, 8), random(2, 11, 5)
    cu_q, cu_k = torch.tensor([0, 3, 3, 7], dtype=torch.int32), torch.tensor([0, 5, 7, 11], dtype=torch.int32)
    spec = Spec(scale=0.4, cu_q=cu_q, cu_k=cu_k, right=0, bottom_right=True, max_q=4, max_k=5)
    parts = []
    for b, (tq, tk) in enumerate(sizes):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        visible = torch.ones(tq, tk, dtype=torch.bool).tril(tk - tq)
        parts.append(
            F.scaled_dot_product_attention(q[:, rows], k[:, keys], v[:, keys], attn_mask=visible, scale=0.4, enable_gqa=True)
        )
    same(reference.forward(q, k, v, spec)[0], torch.cat(parts, 1), q, k, v)


def test_lengths_are_padding_masks():
    q, k, v = tensors()
    lengths = torch.tensor([4, 9], dtype=torch.int32)
    visible = (torch.arange(9) < lengths[:, None])[:, None, None]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    same(reference.forward(q, k, v, Spec(scale=8**-0.5, k_lengths=lengths))[0], expected, q, k, v)


def test_blocks_are_a_mask_of_their_size():
    q, k, v = tensors()
    blocks = torch.tensor([[[[True, False, True], [False, True, True]]]])
    visible = torch.kron(blocks[0, 0].int(), torch.ones(4, 4, dtype=torch.int32)).bool()[:6, :9]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    same(reference.forward(q, k, v, Spec(scale=8**-0.5, blocks=blocks, block_size=4))[0], expected, q, k, v)


def test_alibi_as_press_et_al_have_it():
    """softmax(q k^T + m [-(i - 1), .., -1, 0]), causal."""
    q, k, v = tensors(6, 6, kv_heads=4)
    slopes = torch.tensor([[2.0**-n for n in (2, 4, 6, 8)]])
    distances = torch.stack([torch.cat((torch.arange(-i, 1), torch.zeros(5 - i))) for i in range(6)])
    hidden = torch.full((6, 6), -torch.inf).triu(1)
    bias = slopes[0, :, None, None] * distances + hidden
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.double())
    same(reference.forward(q, k, v, Spec(scale=8**-0.5, right=0, slopes=slopes))[0], expected, q, k, v)


def test_a_table_of_distances_is_t5s_bias():
    """T5 looks a [Tq, Tk] matrix of buckets up in an embedding; entry `zero` of ours is distance 0."""
    q, k, v = tensors(6, 9, kv_heads=4)
    table = random(4, 5)  # buckets: distance clamped to -2 .. 2
    distance = torch.arange(9)[None] - torch.arange(6)[:, None]
    bias = table[:, distance.clamp(-2, 2) + 2]
    by_distance = table[:, torch.arange(-5, 9).clamp(-2, 2) + 2]
    out, _ = reference.forward(q, k, v, Spec(scale=8**-0.5, relative_bias=by_distance, relative_bias_zero=5))
    same(out, F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None].expand(2, -1, -1, -1)), q, k, v, table)


def test_an_index_outside_a_table_adds_nothing():
    q, k, v = tensors(6, 9, kv_heads=4)
    short = random(4, 3)
    wide = F.pad(short, (4, 7))  # distances -5 .. 8, of which -1 .. 1 are the short table's
    out, _ = reference.forward(q, k, v, Spec(relative_bias=short, relative_bias_zero=1))
    same(out, reference.forward(q, k, v, Spec(relative_bias=wide, relative_bias_zero=5))[0], q, k, v, short)


def test_transformer_xls_relative_shift():
    """BD as Dai et al. compute it: (q + v) R^T for R from the farthest distance to the nearest, one zero column, another view."""
    torch.manual_seed(0)
    memory, tq, heads = 3, 5, 2
    tk = memory + tq
    q, k, v = random(2, heads, tq, 8), random(2, heads, tk, 8), random(2, heads, tk, 8)
    content, position, r = random(heads, 1, 8), random(heads, 1, 8), random(heads, tk, 8)  # u, v, R
    bd = torch.einsum("bhie,hme->bhim", q + position, r)
    shifted = torch.cat((bd.new_zeros(2, heads, tq, 1), bd), -1).view(2, heads, tk + 1, tq)[:, :, 1:].reshape(bd.shape)
    scores = ((q + content) @ k.mT + shifted) * 8**-0.5
    scores = scores.masked_fill(~torch.ones(tq, tk, dtype=torch.bool).tril(memory), -torch.inf)
    expected = scores.softmax(-1) @ v
    spec = Spec(scale=8**-0.5, right=0, bottom_right=True, relative_q=q + position, relative_k=r, relative_k_zero=tk - 1)
    same(reference.forward(q + content, k, v, spec)[0], expected, q, k, v, content, position, r)


def test_softcap_and_sinks():
    q, k, v = tensors(kv_heads=4)
    sinks = random(4)
    scores = 2.5 * torch.tanh(q @ k.mT * 0.3 / 2.5)
    w = torch.cat((scores, sinks[None, :, None, None].expand(2, 4, 6, 1)), -1).softmax(-1)[..., :-1]
    out, lse = reference.forward(q, k, v, Spec(scale=0.3, softcap=2.5, sinks=sinks))
    same(out, w @ v, q, k, v, sinks)
    torch.testing.assert_close(lse, torch.log(scores.exp().sum(-1) + sinks.exp()[:, None]))


def test_weights_and_their_average():
    q, k, v = tensors(kv_heads=4)
    spec = Spec(scale=0.3, right=2)
    _, lse = reference.forward(q, k, v, spec)
    w = (q @ k.mT * 0.3).masked_fill(torch.ones(6, 9, dtype=torch.bool).triu(3), -torch.inf).softmax(-1)
    torch.testing.assert_close(reference.weights(q, k, lse, spec, False), w)
    torch.testing.assert_close(reference.weights(q, k, lse, spec, True), w.mean(1))


def plain_philox(seed, c0, c1, c2):
    """Philox 4x32-10 with Python's integers."""
    k0, k1, c3 = seed & 0xFFFFFFFF, seed >> 32, 0
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


SEED = 0x7EDCBA9876543210


def test_philox():
    c0, c1, c2 = torch.arange(5), torch.arange(5) * 2**29 + 1, 2**32 - 1 - torch.arange(5)
    found = torch.stack(reference.philox(torch.tensor([SEED]), c0, c1, c2), -1).tolist()
    assert found == [list(plain_philox(SEED, *c)) for c in zip(c0.tolist(), c1.tolist(), c2.tolist(), strict=True)]


def test_philox_is_tritons():
    triton = pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the interpreter is off where there is a GPU")
    import triton.language as tl

    def kernel(seed, out, N: tl.constexpr):
        c = tl.arange(0, N).to(tl.uint32)
        zero = tl.zeros((N,), tl.uint32)
        a, b, x, y = tl.philox(tl.load(seed), c, c * 3, zero + 7, zero)
        at = out + tl.arange(0, N) * 4
        tl.store(at, a.to(tl.int64))
        tl.store(at + 1, b.to(tl.int64))
        tl.store(at + 2, x.to(tl.int64))
        tl.store(at + 3, y.to(tl.int64))

    out = torch.zeros(8, 4, dtype=torch.int64)
    seed = torch.tensor([SEED])
    triton.jit(kernel)[(1,)](seed, out, N=8)
    c = torch.arange(8)
    assert torch.equal(out, torch.stack(reference.philox(seed, c, c * 3, torch.full((8,), 7)), -1))


def test_dropout_keeps_the_share_it_says():
    """Over 2^16 weights: 5 standard deviations; the kept are scaled, and none of the streams repeats another."""
    q = torch.zeros(2, 4, 64, 8, dtype=DOUBLE)
    k = torch.zeros(2, 4, 128, 8, dtype=DOUBLE)
    w = reference.weights(q, k, None, Spec(dropout=0.3, seed=torch.tensor([SEED])), False)
    share = (w == 0).double().mean().item()
    assert abs(share - 0.3) < 5 * math.sqrt(0.3 * 0.7 / w.numel())
    assert torch.equal(w.unique(), torch.tensor([0, 1 / 128 / 0.7], dtype=DOUBLE))
    assert len(w.flatten(0, 2).unique(dim=0)) == 2 * 4 * 64


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_sixteen_bits_are_computed_in_fp32(dtype):
    """Only what is stored is rounded."""
    q, k, v = (t.detach().to(dtype) for t in tensors())
    spec = Spec(scale=0.3, right=3)
    out, lse = reference.forward(q, k, v, spec)
    true_out, true_lse = reference.forward(q.double(), k.double(), v.double(), spec)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.double(), true_out, rtol=torch.finfo(dtype).eps, atol=1e-6)
