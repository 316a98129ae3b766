"""``fastseq.functional.scan``: layouts, dtypes, what it refuses."""

from __future__ import annotations

import pytest
import torch

from fastseq.functional import scan

T, B, C = 6, 3, 4
b, a = torch.randn(T, B, C), torch.rand(T, B, C)
packed, cu = torch.randn(T, C), torch.tensor([0, 2, 2, T])


def test_layouts_agree():
    h, final = scan(b, a)
    again, last = scan(b.transpose(0, 1), a.transpose(0, 1), batch_first=True)
    torch.testing.assert_close(again.transpose(0, 1), h)
    torch.testing.assert_close(last, final)
    for row in range(B):
        one, end = scan(b[:, row], a[:, row])
        assert one.shape == (T, C) and end.shape == (C,)
        torch.testing.assert_close(one, h[:, row])
        torch.testing.assert_close(end, final[row])


def test_h_has_the_layout_of_b():
    """So that what reads it next reads rows as they lie."""
    contiguous = torch.randn(B, T, C)
    h, _ = scan(contiguous.transpose(0, 1), a)
    assert h.transpose(0, 1).is_contiguous()
    h, _ = scan(contiguous, torch.rand(C), batch_first=True)
    assert h.is_contiguous()
    h, _ = scan(torch.randn(C, T, B).permute(1, 2, 0), a)
    assert h.is_contiguous()


def test_packed_sequences_are_the_sequences():
    initial, rates = torch.randn(3, C), torch.rand(T, C)
    h, final = scan(packed, rates, initial=initial, cu_seqlens=cu)
    for s, (begin, end) in enumerate(zip(cu.tolist(), cu.tolist()[1:], strict=False)):
        own, last = scan(packed[begin:end], rates[begin:end], initial=initial[s])
        torch.testing.assert_close(h[begin:end], own)
        torch.testing.assert_close(final[s], last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_states_are_fp32_beside_16_bits(dtype):
    """Thousands of steps of a slow decay, of which a state in 16 bits would keep nothing."""
    ones, decay = torch.full((4096, 1, 1), 1e-3, dtype=dtype), torch.tensor([1 - 1e-3])
    h, final = scan(ones, decay)
    assert h.dtype == dtype and final.dtype == torch.float32
    expected = float(ones[0, 0, 0]) * (1 - (1 - 1e-3) ** 4096) / 1e-3
    assert abs(final.item() - expected) < 1e-4
    by_log, _ = scan(ones, log_a=decay.log().to(dtype).expand(4096, 1, 1))
    torch.testing.assert_close(by_log, h, rtol=2e-2, atol=1e-3)


def test_a_real_coefficient_beside_complex_states():
    z = torch.randn(T, B, C, dtype=torch.complex64)
    torch.testing.assert_close(scan(z, a)[0], scan(z, a.to(torch.complex64))[0])
    torch.testing.assert_close(scan(z.conj(), a)[0], scan(z, a)[0].conj())


def test_autocast_changes_nothing():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h, _ = scan(b, a)
    assert torch.equal(h, scan(b, a)[0])


REFUSED = [
    (ValueError, "give either a or log_a, got neither", {}),
    (ValueError, "give either a or log_a, got both", {"a": a, "log_a": a}),
    (ValueError, "cu_seqlens excludes batch_first", {"b": packed, "a": packed, "cu_seqlens": cu, "batch_first": True}),
    (ValueError, "cu_seqlens excludes lengths", {"b": packed, "a": packed, "cu_seqlens": cu, "lengths": torch.tensor([1, 1, 1])}),
    (ValueError, "log_a has no meaning for 2 x 2 blocks", {"b": torch.randn(T, B, C, 2), "log_a": torch.randn(C, 2, 2)}),
    (TypeError, "b must be a Tensor, not list", {"b": [1.0], "a": a}),
    (TypeError, "resets must be a Tensor, not bool", {"a": a, "resets": True}),
    (TypeError, r"unexpected keyword argument 'reset'; did you mean 'resets'", {"a": a, "reset": None}),
    (NotImplementedError, "b must be one of float16, .*, got torch.int64", {"b": torch.ones(T, B, C).long(), "a": a}),
    (RuntimeError, r"b must be \[T, B, C\].*got \[6\]", {"b": torch.randn(T), "a": a}),
    (
        RuntimeError,
        r"b must be \[N, C\] with cu_seqlens.*got \[6, 3, 4, 2\]",
        {"b": torch.randn(T, B, C, 2), "a": a, "cu_seqlens": cu},
    ),
    (
        RuntimeError,
        r"a must be torch.float32 beside a b of torch.float32, got torch.bfloat16: rounded to 16 bits",
        {"a": a.bfloat16()},
    ),
    (
        RuntimeError,
        r"a must be torch.float32 beside a b of torch.bfloat16, .*keep a in fp32",
        {"b": b.bfloat16(), "a": a.bfloat16()},
    ),
    (RuntimeError, r"a must be torch.float32 beside a b of torch.float32, got torch.float64", {"a": a.double()}),
    (RuntimeError, r"log_a must be torch.float32, got|log_a must be torch.float32 beside", {"log_a": a.half()}),
    (RuntimeError, r"a must be broadcast to \[6, 3, 4\], got \[5, 3, 4\]", {"a": torch.rand(5, B, C)}),
    (RuntimeError, r"a must be broadcast to \[6, 3, 4\], got \[1, 6, 3, 4\]", {"a": a[None]}),
    (RuntimeError, r"a must end in \[2, 2\]", {"b": torch.randn(T, B, C, 2), "a": torch.rand(C, 2)}),
    (RuntimeError, "resets must be bool, got torch.int64", {"a": a, "resets": torch.zeros(T, B).long()}),
    (RuntimeError, r"resets must be \[T, B\] = \[6, 3\], got \[3, 6\]", {"a": a, "resets": torch.zeros(B, T).bool()}),
    (
        RuntimeError,
        r"resets must be \[B, T\] = \[6, 3\], got \[3, 6\]",
        {"a": a, "resets": torch.zeros(B, T).bool(), "batch_first": True},
    ),
    (
        RuntimeError,
        r"resets must be \[6\], got \[5\]",
        {"b": packed, "a": packed, "cu_seqlens": cu, "resets": torch.zeros(5).bool()},
    ),
    (
        RuntimeError,
        r"resets must be on cpu, where the sequence is, got meta",
        {"a": a, "resets": torch.zeros(T, B, device="meta").bool()},
    ),
    (RuntimeError, r"lengths must lie in 0..6, got \[7, 1, 1\]", {"a": a, "lengths": torch.tensor([7, 1, 1])}),
    (RuntimeError, r"lengths must be \[B\] = \[3\], got \[2\]", {"a": a, "lengths": torch.tensor([1, 1])}),
    (RuntimeError, "lengths must be int32 or int64", {"a": a, "lengths": torch.ones(B)}),
    (RuntimeError, r"cu_seqlens must rise from 0 to the number of steps, 6", {"b": packed, "a": packed, "cu_seqlens": cu[:3]}),
    (RuntimeError, r"cu_seqlens must rise", {"b": packed, "a": packed, "cu_seqlens": torch.tensor([0, 4, 2, 6])}),
    (RuntimeError, r"initial must be \[3, 4\], one state for each sequence, got \[4\]", {"a": a, "initial": torch.zeros(C)}),
    (
        RuntimeError,
        "initial must have b's dtype torch.float32, got torch.float64",
        {"a": a, "initial": torch.zeros(B, C).double()},
    ),
]


@pytest.mark.parametrize(("error", "message", "given"), REFUSED, ids=[message[:50] for _, message, _ in REFUSED])
def test_bad_input(error, message, given):
    with pytest.raises(error, match=message):
        scan(**{"b": b} | given)
