"""What tests/support/interpreter.py makes of Triton's interpreter: a right bfloat16, and accesses held to their tensors."""

from __future__ import annotations

import pytest
import torch

from support import interpreter
from support.interpreter import ON

triton = pytest.importorskip("triton")
tl = triton.language
from triton.runtime.errors import InterpreterError  # noqa: E402

import fastseq  # noqa: E402
from fastseq.kernels.attention import forward as attention_forward  # noqa: E402
from fastseq.kernels.attention.memory import load_rows  # noqa: E402
from fastseq.kernels.recurrent import whole  # noqa: E402
from support.attention import PLAIN, make, named, spec_of  # noqa: E402

WHERE = r"forward, kernels/test_interpreter\.py:\d+: load of .* "
pytestmark = pytest.mark.skipif(not ON, reason="needs TRITON_INTERPRET=1")


@triton.jit
def arithmetic(a, b, out, N: tl.constexpr):
    """[9, N]: what a rounds to after each of these."""
    i = tl.arange(0, N)
    x, y = tl.load(a + i), tl.load(b + i)
    tl.store(out + i, x + y)
    tl.store(out + N + i, x * y)
    tl.store(out + 2 * N + i, x * y + y)
    tl.store(out + 3 * N + i, tl.where(x > y, x, y) - tl.full((N,), 0.3, tl.bfloat16))
    tl.store(out + 4 * N + i, tl.abs(x))
    tl.store(out + 5 * N + i, (x.to(tl.float32) / 3).to(tl.bfloat16))
    tl.store(out + 6 * N + i, (x.to(tl.int16, bitcast=True) ^ 1).to(tl.bfloat16, bitcast=True))
    tl.store(out + 7 * N + i, tl.load(a + i, mask=i < 3, other=1.5))
    rows = tl.dot(x[:, None] + tl.zeros((N, N), tl.bfloat16), y[None, :] + tl.zeros((N, N), tl.bfloat16))
    tl.store(out + 8 * N + i, tl.max(rows, 1))


def calculated(x, y):
    """By the kernel, and by torch, which rounds after every operation too."""
    out = torch.empty(9, len(x), dtype=torch.bfloat16)
    arithmetic[(1,)](x, y, out, N=len(x))
    flipped = (x.view(torch.int16) ^ 1).view(torch.bfloat16)
    masked = torch.where(torch.arange(len(x)) < 3, x, 1.5)
    products = (x.double()[:, None] * len(x) * y.double()).amax(1).to(torch.bfloat16)
    larger = torch.maximum(x, y) - torch.tensor(0.3).bfloat16()
    return out, torch.stack((x + y, x * y, x * y + y, larger, x.abs(), (x.float() / 3).bfloat16(), flipped, masked, products))


def numbers():
    torch.manual_seed(0)
    return torch.randn(16).bfloat16(), torch.randn(16).bfloat16()


def test_bfloat16_is_rounded_after_every_operation():
    out, expected = calculated(*numbers())
    assert torch.equal(out, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_plain_interpreter_gets_bfloat16_wrong(plain_interpreter):
    """Silently: this is why it is refused where nobody has made it right."""
    out = torch.zeros(5, 16, dtype=torch.bfloat16)
    x, y = numbers()
    casts[(1,)](x, y, out, N=16)
    assert not torch.equal(out[0], x + y) and not torch.equal(out[1], (x.float() / 3).bfloat16())


@triton.jit
def casts(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(a + i), tl.load(b + i)
    tl.store(out + i, x + y)
    tl.store(out + N + i, (x.to(tl.float32) / 3).to(tl.bfloat16))


def test_fp32_is_rounded_to_the_nearest_even_bfloat16():
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x7F7FFFFF, 0x00008000, 0x00018000, 0x7F800000])
    x = torch.cat((bits.to(torch.int32).view(torch.float32), torch.tensor([float("nan"), -0.0, 1e-45, -3.3e38])))
    rounded = torch.from_numpy(interpreter.rounded(x.numpy()))
    torch.testing.assert_close(rounded.bfloat16(), x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(rounded.nan_to_num(), x.bfloat16().float().nan_to_num())
    assert torch.equal(rounded.signbit(), x.signbit())


@triton.jit
def copied(source, target, n, N: tl.constexpr, STEP: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(target + i, tl.load(source + i * STEP, mask=i < n, other=0.0), mask=i < n)


def test_an_access_beyond_its_tensor_is_an_error():
    source, target = torch.arange(10.0), torch.zeros(10)
    copied[(1,)](source, target, 10, N=16, STEP=1)
    assert torch.equal(target, source)
    where = r"copied, kernels/test_interpreter\.py:\d+: "
    with pytest.raises(InterpreterError, match=where + r"load of 2 of 12 elements beyond float32 \[10\] .* at offset 10 of 10"):
        copied[(1,)](source, torch.zeros(12), 12, N=16, STEP=1)
    with pytest.raises(InterpreterError, match=where + r"store of 1 of 10 elements beyond float32 \[9\]"):
        copied[(1,)](source, target[:9], 10, N=16, STEP=1)


def test_the_memory_of_another_tensor_is_beyond_it_too():
    both = torch.zeros(20)
    with pytest.raises(InterpreterError, match=r"load of 6 of 16 elements beyond float32 \[10\]"):
        copied[(1,)](both[:10], both[4:], 16, N=16, STEP=1)


def test_so_are_the_gaps_of_a_view():
    columns = torch.zeros(8, 2)[:, 0]
    copied[(1,)](columns, torch.zeros(8), 8, N=8, STEP=2)
    with pytest.raises(InterpreterError, match=r"load of 4 of 8 elements beyond float32 \[8\] with strides \[2\]"):
        copied[(1,)](columns, torch.zeros(8), 8, N=8, STEP=1)


def test_a_pointer_from_nowhere():
    with pytest.raises(InterpreterError, match="a pointer that came from no tensor of the launch"):
        forged[(1,)](torch.zeros(4).data_ptr(), torch.zeros(1))


@triton.jit
def forged(address, target):
    tl.store(target, tl.load(address.to(tl.pointer_type(tl.float32))))


@triton.jit
def unmasked_rows(x, b, h, first, rows, T, cols, E: tl.constexpr, BE: tl.constexpr, WHOLE: tl.constexpr = False):
    """`load_rows` that forgets where rows and features end."""
    return tl.load(x.pointer + b * x.batch + h * x.head + (first + rows).to(tl.int64)[:, None] * x.time + cols[None, :])


def test_a_tail_without_its_mask_is_seen_in_attention(monkeypatch):
    inputs = make(PLAIN, torch.float32)

    def run():
        with torch.no_grad(), fastseq.use_backend("triton"):
            return torch.ops.fastseq.attention_forward(*(inputs[name] for name in "qkv"), *spec_of(inputs))

    run()
    assert attention_forward.load_rows is load_rows
    monkeypatch.setattr(attention_forward, "load_rows", unmasked_rows)
    with pytest.raises(InterpreterError, match=WHERE + r"beyond float32 \[2, 2, 5, 8\]"):
        run()


def test_a_tail_without_its_mask_is_seen_in_the_recurrence(monkeypatch):
    """Three sequences of five units in a tile of more, all of which are read."""
    torch.manual_seed(0)
    module, x = fastseq.GRU(3, 5), torch.randn(4, 3, 3)

    def run():
        with torch.no_grad(), fastseq.use_backend("triton"):
            return module(x)

    run()
    monkeypatch.setattr(whole, "load_tiles", unmasked_tiles)
    with pytest.raises(InterpreterError, match=WHERE + r"beyond float32 \[4, 3, 1, 15\]"):
        run()


@triton.jit
def unmasked_tiles(pointer, at, mask, H, N: tl.constexpr, ACC: tl.constexpr):
    """`load_tiles` without its mask."""
    tiles = ()
    for g in tl.static_range(N):
        tiles = tiles + (tl.load(pointer + at + g * H).to(ACC),)
    return tiles


def test_the_battery_is_watched():
    """Every kernel of attention with every feature, by one case that has them all: accesses are counted."""
    (everything,) = named("everything")
    inputs = make(everything, torch.float32)
    with interpreter.checked_bounds() as seen, fastseq.use_backend("triton"):
        out, _ = torch.ops.fastseq.attention_forward(*(inputs[name].detach() for name in "qkv"), *spec_of(inputs))
    assert out.isfinite().all() and seen.kernels == {"forward"} and seen.count > 100
