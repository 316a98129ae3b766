"""NaN, scales that are not positive, and rows without keys: one policy on every backend, that of torch's products and softmax."""

from __future__ import annotations

import pytest
import torch

import fastseq
from fastseq.functional import attention, attention_with_kv_cache, scaled_dot_product_attention
from fastseq.testing import assert_all_close_to_truth, pooled_error

NAN = float("nan")
CPU = ("cpu", "reference", "torch", "auto")


def inputs(length: int = 5, dtype: torch.dtype = torch.float32, heads: int = 2):
    torch.manual_seed(length)
    return [torch.randn(1, heads, length, 8, dtype=dtype) for _ in range(3)]


class TestNaN:
    @pytest.mark.parametrize("backend", CPU)
    @pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 15, 16, 17, 33, 130])
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("where", ["q", "k", "all of k", "v"])
    def test_in_gives_out(self, backend, length, causal, where):
        q, k, v = inputs(length)
        if where == "all of k":
            k[:] = NAN
        else:
            {"q": q, "k": k, "v": v}[where][0, 0, length // 2] = NAN
        rows = torch.arange(length)
        at = length // 2
        later = rows >= (at if causal else 0)
        reached = {"q": rows == at, "k": later, "all of k": rows >= 0, "v": later}[where]
        with fastseq.use_backend(backend):
            out = scaled_dot_product_attention(q, k, v, is_causal=causal)
            lse = None if backend == "torch" else attention(q, k, v, causal=causal, return_lse=True)[1]
        assert out[0, 0, reached].isnan().all()
        if where == "q":  # of a key that is hidden it may or may not come through
            assert torch.equal(out[0, 0].isnan().all(-1), reached)
        assert where == "all of k" or out[0, 1].isfinite().all()
        assert lse is None or where == "v" or lse[0, 0, reached].isnan().all()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_every_dtype(self, dtype):
        q, k, v = inputs(4, dtype)
        q[0, 0, 1] = NAN
        out = scaled_dot_product_attention(q, k, v)
        assert out[0, 0, 1].isnan().all() and out.isnan().sum() == 8

    @pytest.mark.parametrize("backend", ["cpu", "reference", "auto"])
    def test_masked_windowed_packed_and_weights(self, backend):
        q, k, v = inputs(5)
        q[0, 0, 1] = NAN
        seen = torch.ones(5, 5, dtype=torch.bool)
        seen[2] = False
        rows = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
        cu = torch.tensor([0, 5])
        with fastseq.use_backend(backend):
            outs = [
                attention(q, k, v, attn_mask=seen),
                attention(q, k, v, window_size=(2, 2)),
                attention(q, k, v, return_weights=True)[0],
                attention(q, k, v, return_weights=True)[1],
                attention(q, k, v, seqlens_k=torch.tensor([3])),
                attention(*rows, cu_seqlens_q=cu, cu_seqlens_k=cu).transpose(0, 1)[None],
            ]
        for out in outs:
            assert out[0, 0, 1].isnan().any() and not out[0, 1].isnan().any() and not out[0, 0, [0, 2, 3, 4]].isnan().any()
        assert not outs[0][0, :, 2].any()  # sees no key

    @pytest.mark.parametrize("backend", ["cpu", "reference", "auto"])
    def test_cache(self, backend):
        q, k, v = inputs(4)
        q[0, 0, 1] = NAN
        with fastseq.use_backend(backend):
            for one in (q, q[:, :, 1:2]):
                out = attention_with_kv_cache(one, k, v, cache_seqlens=torch.tensor([4]))
                assert out[0, 0, one.shape[2] // 3].isnan().all() and out.isnan().sum() == 8

    @pytest.mark.parametrize("need_weights", [False, True])
    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("dropout", [0.0, 0.2])
    def test_module(self, need_weights, training, dropout):
        module = fastseq.MultiheadAttention(8, 2, dropout=dropout, batch_first=True).train(training)
        x, y = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
        x[0, 1] = NAN
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                out, _ = module(x, y, y, need_weights=need_weights)
            assert torch.equal(out.isnan().any(-1), x.isnan().any(-1))

    def test_gradients(self):
        q, k, v = inputs(4)
        q[0, 0, 1] = NAN
        given = [t.requires_grad_() for t in (q, k, v)]
        dq, _, _ = torch.autograd.grad(scaled_dot_product_attention(*given).sum(), given)
        assert dq[0, 0, 1].isnan().all() and dq[0, 1].isfinite().all()

    def test_a_row_of_zeros_is_no_nan(self):
        """Its lse can be 0, too, by which the kernel's rows of NaN are known."""
        q, k, v = inputs(1)
        out, lse = attention(q * 0, k, v, return_lse=True)
        torch.testing.assert_close(out, v)
        assert not lse.any()


class TestScale:
    @pytest.mark.parametrize("scale", [0.0, -0.5, -3.0])
    @pytest.mark.parametrize("length", [1, 5, 17, 300])
    @pytest.mark.parametrize("backend", ["cpu", "reference", "auto"])
    def test_not_positive(self, scale, length, backend):
        q, k, v = inputs(length)
        options = [{}, {"is_causal": True}, {"attn_mask": torch.ones(length, length, dtype=torch.bool).tril()}]
        for given in options:
            hidden = torch.ones(length, length, dtype=torch.bool).triu(1) if given else torch.zeros(1, dtype=torch.bool)

            def textbook(q, k, v, hidden=hidden):
                return torch.softmax((q @ k.mT * scale).masked_fill(hidden, -torch.inf), -1) @ v

            def results(function, dtype):
                tensors = [t.to(dtype, copy=True).requires_grad_() for t in (q, k, v)]
                out = function(*tensors)
                return dict(zip(("out", "dq", "dk", "dv"), (out, *torch.autograd.grad(out.square().sum(), tensors)), strict=True))

            with fastseq.use_backend(backend):
                actual = results(lambda *t, given=given: scaled_dot_product_attention(*t, scale=scale, **given), torch.float32)

            def fused(q, k, v, given=given):  # torch's kernel, which wants a positive scale
                return torch.nn.functional.scaled_dot_product_attention(-q, k, v, scale=-scale, **given)

            truth, formula = results(textbook, torch.float64), results(textbook, torch.float32)
            of_torch = results(fused, torch.float32) if scale else formula
            assert_all_close_to_truth(actual, of_torch, truth, own_error=pooled_error(formula, truth))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_second_derivatives_of_plain_calls(causal, masked):
    q, k, v = (t.double().requires_grad_() for t in inputs(4, heads=1))
    mask = None
    if masked and not causal:
        mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 1]], dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda *t: scaled_dot_product_attention(*t, mask, is_causal=causal), (q, k, v))
    assert torch.autograd.gradgradcheck(lambda *t: scaled_dot_product_attention(*t, mask, is_causal=causal), (q, k, v))
