"""The native scan at every level of instructions: odd widths, threads, memory that nobody wrote."""

from __future__ import annotations

import pytest
import torch

from fastseq.backends import library
from fastseq.functional import scan
from fastseq.ops.scan import scan as scan_op
from fastseq.ops.types import SCAN_CELLS, ScanSpec
from support.scan import LAYER_CELLS, SCAN_CASES, make_scan, run_scan, scan_by_torch

pytestmark = pytest.mark.skipif(library.reason() is not None, reason=str(library.reason()))
NARROW = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    monkeypatch.setenv("FASTSEQ_CPU_POISON", "1")


@pytest.mark.parametrize("case", SCAN_CASES, ids=str)
def test_every_case(level, case):
    inputs = make_scan(case, torch.float64)
    outputs, expected = run_scan(inputs), scan_by_torch(inputs)
    torch.testing.assert_close(outputs, expected)
    tensors = [t for t in inputs.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    used = [i for i, out in enumerate(expected) if out.requires_grad]
    if used:
        found, wanted = (
            torch.autograd.grad([results[i].square().sum() for i in used], tensors, allow_unused=True)
            for results in (outputs, expected)
        )
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other)


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_every_width(level, dtype, reverse):
    """Channels that fill vectors and tails of every length, by themselves and among others."""
    generator = torch.Generator().manual_seed(0)
    widest = 70
    b = torch.randn(5, 2, widest, generator=generator).to(dtype).requires_grad_()
    a = torch.rand(5, 2, widest, generator=generator).requires_grad_()
    for width in range(1, widest + 1):
        own = [t[..., :width].detach().clone().requires_grad_() for t in (b, a)]
        results = [scan(x, y, reverse=reverse) for x, y in ((b[..., :width], a[..., :width]), own)]
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
        grads = torch.autograd.grad(results[1][0].float().square().sum(), own)
        exact = [t.detach().double().requires_grad_() for t in own]
        truth = scan(*exact, reverse=reverse)
        expected = torch.autograd.grad(truth[0].square().sum(), exact)
        for one, other in zip((results[1][0], *grads), (truth[0], *expected), strict=True):
            torch.testing.assert_close(
                one.double(), other, rtol=2e-2, atol=2e-2
            ) if dtype in NARROW else torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "batch_first"),
    [((300, 1, 700), False), ((300, 3, 260), True), ((300, 3, 260), False), ((64, 7, 33), True)],
    ids=str,
)
@pytest.mark.parametrize("of_a", ["every", "channels"])
def test_threads_change_no_bit(shape, batch_first, of_a):
    generator = torch.Generator().manual_seed(0)
    order = (shape[1], shape[0], shape[2]) if batch_first else shape
    b = torch.randn(order, generator=generator).requires_grad_()
    a = torch.rand(order if of_a == "every" else shape[2:], generator=generator).requires_grad_()
    resets = torch.rand(order[:2], generator=generator) < 0.1
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            h, final = scan(b, a, resets=resets, batch_first=batch_first)
            results.append((h, final, *torch.autograd.grad(h.square().sum(), (b, a))))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))


@pytest.mark.parametrize("cell", LAYER_CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_of_every_width(level, cell, dtype):
    """Vectors and tails of any length give what channels by themselves give, in every gradient; with a beginning and a reset."""
    generator = torch.Generator().manual_seed(0)
    row, widest = SCAN_CELLS[cell], 37
    a, b, gate = (torch.randn(4, 1, widest, generator=generator).to(dtype) for _ in range(3))
    vector, resets = torch.rand(widest, generator=generator), torch.tensor([[False], [False], [True], [False]])
    spec = ScanSpec(resets, None, None, cell, False)

    def run(start, stop):
        used = [b, a, gate if row.gate else None, vector if row.vector else None]
        own = [t if t is None else t[..., start:stop].clone().requires_grad_() for t in used]
        h, final = scan_op(*own, None, spec)
        leaves = [t for t in own if t is not None]
        return [h, final, *torch.autograd.grad([h.float().square().sum(), final.sum()], leaves)]

    for start, stop in ((0, 16), (16, widest)):
        whole = run(0, stop)
        for one, part in zip(whole, run(start, stop), strict=True):
            torch.testing.assert_close(one[..., start:], part)
    single = [run(c, c + 1) for c in range(widest)]
    for one, parts in zip(run(0, widest), zip(*single, strict=True), strict=True):
        torch.testing.assert_close(one, torch.cat(parts, -1))


def test_gradients_past_the_caches(level):
    """From 16 MiB on they are streamed to memory; rows that are no whole vectors are not."""
    for channels in (4096, 4099):
        b, a = torch.randn(1100, 1, channels, requires_grad=True), torch.rand(1100, 1, channels, requires_grad=True)
        h, _ = scan(b, a)
        db, da = torch.autograd.grad(h.sum(), (b, a))
        few = [t.detach()[:, :, -70:].clone().requires_grad_() for t in (b, a)]
        own = torch.autograd.grad(scan(*few)[0].sum(), few)
        assert torch.equal(db[..., -70:], own[0]) and torch.equal(da[..., -70:], own[1])


def test_gradients_of_gates_past_the_caches(level):
    given = [torch.randn(1100, 1, 4096) for _ in range(3)]
    spec = ScanSpec(None, None, None, "min_lstm", False)
    grads = []
    for start in (0, 4096 - 80):
        b, a, gate = (t[:, :, start:].clone().requires_grad_() for t in given)
        grads.append(torch.autograd.grad(scan_op(b, a, gate, None, None, spec)[0].sum(), (b, a, gate)))
    for whole, few in zip(*grads, strict=True):
        assert torch.equal(whole[..., -80:], few)


def test_strides_of_every_kind():
    """Gradients that are expanded, states of one channel, rows that lie apart."""
    b, a = torch.randn(6, 2, 8), torch.rand(6, 2, 8)
    expected, _ = scan(b, a)
    apart = torch.randn(6, 5, 8)[:, ::3]
    apart.copy_(b)
    torch.testing.assert_close(scan(apart, a)[0], expected)
    torch.testing.assert_close(scan(torch.stack((b, b), -1)[..., 0], a)[0], expected)
    torch.testing.assert_close(scan(b[..., :1], a[..., :1])[0], expected[..., :1])
    torch.testing.assert_close(scan(b.flip(0), a.flip(0), reverse=True)[0].flip(0), expected)
