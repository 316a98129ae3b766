"""The specification of attention against a cache, against torch's scaled_dot_product_attention one sequence at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastseq.ops.types import DecodeSpec
from fastseq.reference import attention_decode as reference
from support.attention_decode import DECODE_CASES, decode_by_torch, make_decode


def forward(q, k_cache, v_cache, **fields):
    return reference.forward(q, k_cache, v_cache, DecodeSpec(**fields))


def dense(tensor, table, b, length):
    """[1, Hkv, length, E] of one sequence."""
    if table is None:
        return tensor[b : b + 1, :, :length]
    pages = [tensor[page] for page in table[b].tolist()[: -(-length // tensor.shape[2])]]
    return torch.cat([tensor[0, :, :0], *pages], 1)[None, :, :length]


@pytest.mark.parametrize("case", [c for c in DECODE_CASES if c.left < 0 and not (c.softcap or c.sinks)], ids=str)
def test_against_torch(case):
    inputs = make_decode(case, torch.float64)
    out, lse = forward(**inputs)
    for b, length in enumerate(case.lengths):
        k, v = (dense(inputs[name], inputs["block_table"], b, length) for name in ("k_cache", "v_cache"))
        distance = torch.arange(length) - (torch.arange(case.queries) + length - case.queries)[:, None]
        bias = torch.zeros(case.heads, case.queries, length, dtype=torch.float64)
        if inputs["slopes"] is not None:
            bias -= inputs["slopes"][b % len(inputs["slopes"])].double()[:, None, None] * distance.abs()
        if case.right >= 0:
            bias.masked_fill_(distance > case.right, -torch.inf)
        expected = F.scaled_dot_product_attention(
            inputs["q"][b : b + 1], k, v, attn_mask=bias[None], scale=inputs["scale"], enable_gqa=True
        )
        torch.testing.assert_close(out[b : b + 1], expected)
        scores = inputs["q"][b] @ k[0].repeat_interleave(case.heads // case.heads_k, 0).mT * inputs["scale"] + bias
        torch.testing.assert_close(lse[b], torch.logsumexp(scores, -1))


@pytest.mark.parametrize("case", DECODE_CASES, ids=str)
def test_against_queries_one_by_one(case):
    """Windows, softcap and sinks, which torch has not; and nothing that no query sees is looked at, for it is NaN."""
    inputs = make_decode(case, torch.float64)
    expected = decode_by_torch(**inputs)
    torch.testing.assert_close(forward(**inputs), expected)


def test_is_differentiable():
    inputs = make_decode(DECODE_CASES[1], torch.float64)
    tensors = [inputs[name].nan_to_num(neginf=-1.0).requires_grad_() for name in ("q", "k_cache", "v_cache", "sinks")]

    def function(q, k_cache, v_cache, sinks):
        return forward(**inputs | {"q": q, "k_cache": k_cache, "v_cache": v_cache, "sinks": sinks})[0]

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
