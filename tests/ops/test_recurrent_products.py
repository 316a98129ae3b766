"""The native products behind the gradients of a layer's input and weights: against float64, and against PyTorch's own error."""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastseq
from fastseq.backends import cpu, library
from fastseq.choice.device import LEVELS
from fastseq.testing import assert_all_close_to_truth
from support.cases import RecurrentCase
from support.recurrent import RecurrentBattery

DTYPES = (torch.bfloat16, torch.float32)
# kinds of gradients, as bits of `wanted`
W_IH, W_HH, B_IH, B_HH, X = 1, 2, 4, 8, 16


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Scratch holds NaN until it is written."""
    assert library.reason() is None
    monkeypatch.setenv("FASTSEQ_CPU_POISON", "1")


OWN = ("avx512_bf16", "amx")  # levels with products of their own


def at_level(level, monkeypatch):
    monkeypatch.setenv("FASTSEQ_CPU_LEVEL", level)
    if torch.ops.fastseq_native.cpu_level() != level:
        pytest.skip(f"this processor has no {level}")


@pytest.fixture(params=OWN)
def own_level(request, monkeypatch):
    at_level(request.param, monkeypatch)
    return request.param


@pytest.fixture
def amx(monkeypatch):
    at_level("amx", monkeypatch)


def made(
    steps, batch, inputs, gates, width, *, lanes=1, own=0, layout="padded", state=True, resets=False, dtype=torch.float32, seed=0
):  # fmt: skip
    """Arguments of the op but for what is wanted; zero beyond a sequence's length, as the contract has it. ``resets``: to states
    where there are some at the beginning."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    lengths = sizes = None
    leading = (steps, batch)
    if layout != "padded":
        given = torch.randint(0 if layout == "lengths" else 1, steps + 1, (batch,), generator=generator)
        given[0] = steps
    if layout == "lengths":
        lengths = given
    elif layout == "packed":
        sizes = (given[None] > torch.arange(steps)[:, None]).sum(1)
        leading = (int(sizes.sum()),)
    rows = {"x": random(*leading, inputs), "dgates": random(*leading, lanes, gates), "y": random(*leading, lanes, width)}
    rows["drecurrent"] = random(*leading, lanes, own) if own else torch.empty(0, dtype=dtype)
    if lengths is not None:
        beyond = torch.arange(steps)[:, None] >= lengths
        for name in ("dgates", "y") + (("drecurrent",) if own else ()):
            rows[name][beyond] = 0
    return {
        **{name: rows[name] for name in ("x", "dgates", "drecurrent", "y")},
        "h0": random(lanes, batch, width) if state else None,
        "lengths": lengths,
        "batch_sizes": sizes,
        "resets": torch.rand(leading, generator=generator) < 0.3 if resets else None,
        "reset_h": random(lanes, batch, width) if resets and state else None,
        "w_ih": [random(gates, inputs) for _ in range(lanes)],
        "reverse": 0b10 if lanes > 1 else 0,
    }


def before(call, lane):
    """The state before every step, row by row, by loops."""
    y, h0, lengths, sizes, resets = (call[name] for name in ("y", "h0", "lengths", "batch_sizes", "resets"))
    packed = sizes is not None
    counts = sizes.tolist() if packed else [y.shape[1]] * y.shape[0]
    begins = [sum(counts[:t]) for t in range(len(counts))]
    states = y[:, lane] if packed else y[:, :, lane].flatten(0, 1)
    backwards = call["reverse"] >> lane & 1
    found = []
    for t, count in enumerate(counts):
        other = t + 1 if backwards else t - 1
        for slot in range(count):
            inside = 0 <= other < len(counts) and slot < counts[other]
            if backwards and lengths is not None:
                inside = inside and other < lengths[slot]
            begin = t if not backwards else other if inside else None
            anew = resets is not None and begin is not None and resets.flatten()[begins[begin] + slot]
            first = call["reset_h"] if anew else h0
            first = torch.zeros_like(states[0]) if first is None else first[lane, slot]
            found.append(states[begins[other] + slot] if inside and not anew else first)
    return torch.stack(found)


def plain(call, dtype, wanted):
    """The same products by PyTorch in a dtype, by name."""
    lanes, inputs = call["y"].shape[-2], call["x"].shape[-1]
    x = call["x"].reshape(-1, inputs).to(dtype)
    dgates = call["dgates"].reshape(len(x), lanes, -1).to(dtype)
    results = {}
    if wanted & X:
        results["dx"] = (dgates.flatten(1) @ torch.cat(call["w_ih"]).to(dtype)).view(call["x"].shape)
    for lane in range(lanes):
        d = dr = dgates[:, lane]
        if call["drecurrent"].numel():
            own = call["drecurrent"].reshape(len(x), lanes, -1)[:, lane].to(dtype)
            dr = torch.cat((d[:, : -own.shape[1]], own), 1)
        each = (
            (W_IH, "w_ih", lambda d=d: d.t() @ x),
            (W_HH, "w_hh", lambda lane=lane, dr=dr: dr.t() @ before(call, lane).to(dtype)),
            (B_IH, "b_ih", lambda d=d: d.sum(0)),
            (B_HH, "b_hh", lambda dr=dr: dr.sum(0)),
        )
        results |= {f"d{name} {lane}": product() for bit, name, product in each if wanted & bit}
    return results


def native(call, wanted):
    lanes = call["y"].shape[-2]
    bits = [wanted & ~X] * lanes
    bits[0] = wanted
    return torch.ops.fastseq_native.recurrent_gradients(*call.values(), bits, False)


def named(call, wanted):
    found = native(call, wanted)
    names = plain(call, torch.float32, wanted).keys()
    assert len(found) == len(names)
    return dict(zip(names, found, strict=True))


def rms(results, truths):
    """Of all results together, each relative to its own size."""
    errors = [(value.double() - truths[name]).square().mean() / truths[name].square().mean() for name, value in results.items()]
    return math.sqrt(sum(errors) / len(errors))


# one; less than a tile of 16 rows, 16 columns, 32 depths, and than a panel of 32, as many, one more; less than a block of 14
# rows, as many, two of them; more depths than a run of 512, 256 and 128; more panels than a block has
SIZES = [
    dict(steps=1, batch=1, inputs=1, gates=1, width=1),
    dict(steps=3, batch=5, inputs=7, gates=15, width=3),
    dict(steps=4, batch=8, inputs=16, gates=32, width=16),
    dict(steps=3, batch=11, inputs=17, gates=33, width=31, state=False),
    dict(steps=8, batch=16, inputs=33, gates=64, width=32, lanes=2),
    dict(steps=2, batch=7, inputs=14, gates=28, width=7),
    dict(steps=3, batch=86, inputs=50, gates=56, width=14),
    dict(steps=3, batch=43, inputs=31, gates=48, width=65, lanes=2, own=16),
    dict(steps=5, batch=13, inputs=40, gates=132, width=44, own=44, state=False),
    dict(steps=9, batch=57, inputs=49, gates=40, width=10, own=40),
    dict(steps=19, batch=27, inputs=20, gates=516, width=129),
    dict(steps=40, batch=27, inputs=3, gates=24, width=530),
    dict(steps=1100, batch=1, inputs=34, gates=68, width=17, lanes=2),
    dict(steps=12, batch=9, inputs=18, gates=36, width=12, layout="lengths"),
    dict(steps=12, batch=9, inputs=18, gates=36, width=12, layout="lengths", lanes=2, state=False),
    dict(steps=17, batch=35, inputs=5, gates=36, width=12, layout="lengths", lanes=2, own=12),
    dict(steps=13, batch=11, inputs=18, gates=36, width=12, layout="packed", lanes=2),
    dict(steps=13, batch=40, inputs=18, gates=36, width=12, layout="packed", lanes=2, own=12, state=False),
    dict(steps=9, batch=7, inputs=18, gates=36, width=12, lanes=2, resets=True),
    dict(steps=1, batch=40, inputs=18, gates=36, width=12, resets=True, state=False),
    dict(steps=12, batch=9, inputs=18, gates=36, width=12, layout="lengths", lanes=2, own=12, resets=True),
    dict(steps=13, batch=11, inputs=18, gates=36, width=12, layout="packed", lanes=2, resets=True, state=False),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "-".join(map(str, sizes.values())))
def test_sizes_and_layouts(own_level, sizes, dtype):
    call, wanted = made(**sizes, dtype=dtype), W_IH | W_HH | B_IH | B_HH | X
    assert_all_close_to_truth(named(call, wanted), plain(call, dtype, wanted), plain(call, torch.float64, wanted))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wanted", (X, W_IH, W_HH, B_IH, B_HH, W_HH | B_HH, W_IH | B_IH, X | W_IH, W_HH | B_IH, B_IH | B_HH))
def test_some_of_them(own_level, wanted, dtype):
    for own in (0, 12):
        call = made(7, 5, 9, 36, 12, lanes=2, own=own, dtype=dtype)
        assert_all_close_to_truth(named(call, wanted), plain(call, dtype, wanted), plain(call, torch.float64, wanted))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operands_that_are_not_contiguous(own_level, dtype):
    call, wanted = made(7, 35, 33, 48, 12, dtype=dtype), W_IH | W_HH | B_IH | X
    expected = native(call, wanted)
    x, w_ih = call["x"], call["w_ih"][0]
    for other_x in (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.movedim(2, 0).contiguous().movedim(0, 2),
        x.repeat(1, 1, 2)[..., :33],
    ):
        for other_w in (w_ih, w_ih.t().contiguous().t(), w_ih.repeat(1, 2)[:, :33]):
            other = call | {"x": other_x, "w_ih": [other_w]}
            for found, value in zip(native(other, wanted), expected, strict=True):
                assert torch.equal(found, value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_nothing(own_level, dtype):
    call, wanted = made(40, 30, 70, 520, 130, dtype=dtype, layout="lengths"), W_IH | W_HH | B_IH | B_HH | X
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(native(call, wanted))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def guarded(tensor, at_the_end):
    """The same in memory of its own, against a page that nobody may touch."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return tensor
    pages = -(-size // mmap.PAGESIZE) + 2
    memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
    libc, address = ctypes.CDLL(None, use_errno=True), ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, pages - 1):
        if libc.mprotect(ctypes.c_void_p(address + page * mmap.PAGESIZE), mmap.PAGESIZE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    begin = (pages - 1) * mmap.PAGESIZE - size if at_the_end else mmap.PAGESIZE
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=begin).view(tensor.shape)
    return copy.copy_(tensor)


def run_guarded():
    for sizes, dtype, at_the_end in itertools.product(SIZES, DTYPES, (True, False)):
        call, wanted = made(**sizes, dtype=dtype), W_IH | W_HH | B_IH | B_HH | X
        moved = {key: guarded(value, at_the_end) if torch.is_tensor(value) else value for key, value in call.items()}
        moved["w_ih"] = [guarded(w, at_the_end) for w in call["w_ih"]]
        for found, expected in zip(native(moved, wanted), native(call, wanted), strict=True):
            assert torch.equal(found, expected)


def test_nothing_beyond_the_operands_is_read(own_level):
    code = f"import sys; sys.path[:0] = {sys.path!r}; import test_recurrent_products as t; t.library.load(); t.run_guarded()"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.returncode} {done.stderr}"


def decades(tensor, count):
    return tensor * 10.0 ** torch.empty(tensor.shape).uniform_(-count, 0)


STRESS = {
    "normal": lambda t: t,
    "large": lambda t: t * 64,
    "8 decades": lambda t: decades(t, 8),
    "4 decades": lambda t: decades(t, 4),
    "far from zero": lambda t: t + 100,
    "heavy tails": lambda t: t / torch.randn_like(t).abs().clamp(min=1e-3),
    "small": lambda t: t * 1e-14,
    "columns of all sizes": lambda t: t * 10.0 ** torch.linspace(-12, 3, t.shape[-1]),
}


@pytest.mark.parametrize("stress", STRESS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_not_above_pytorchs(own_level, dtype, stress):
    """Root mean squares, over so many numbers that chance plays no part."""
    call, wanted = made(64, 32, 130, 256, 64, dtype=torch.float32), W_IH | W_HH | X
    torch.manual_seed(1)
    for name in ("x", "dgates", "y", "h0"):
        call[name] = STRESS[stress](call[name])
    call = {name: value.to(dtype) if torch.is_tensor(value) else value for name, value in call.items()}
    call["w_ih"] = [w.to(dtype) for w in call["w_ih"]]
    truths = plain(call, torch.float64, wanted)
    assert rms(named(call, wanted), truths) <= 1.01 * rms(plain(call, dtype, wanted), truths)


def test_sums_of_some_steps_are_as_exact_as_sums_of_each(monkeypatch):
    """What torch's own modules do: a product for each step, one of few terms, and then a sum over the steps."""
    at_level("avx512_bf16", monkeypatch)
    steps, errors = 16, []
    for seed in range(5):
        call = made(steps, 8, 64, 128, 64, seed=seed)
        truths = plain(call, torch.float64, W_IH | W_HH)
        dgates, x, states = call["dgates"].view(steps, 8, -1), call["x"].view(steps, 8, -1), before(call, 0).view(steps, 8, -1)
        pairs = {"dw_ih 0": x, "dw_hh 0": states}
        by_steps = {name: sum(d.t() @ r for d, r in zip(dgates, right, strict=True)) for name, right in pairs.items()}
        errors.append((rms(named(call, W_IH | W_HH), truths), rms(by_steps, truths)))
    ours, theirs = (sum(e) for e in zip(*errors, strict=True))
    assert ours <= 1.01 * theirs


OUTSIDE = {
    "infinite": ("x", lambda t: t.index_put((torch.tensor(3), torch.tensor(1)), torch.tensor(math.inf))),
    "not a number": ("dgates", lambda t: t.index_put((torch.tensor(3), torch.tensor(1)), torch.tensor(math.nan))),
    "too large": ("y", lambda t: t * 1e31),
    "too small": ("dgates", lambda t: t * 1e-33),
    "one column too small": ("x", lambda t: torch.cat((t[..., :-1], t[..., -1:] * 1e-33), -1)),
    "one row too small": ("dgates", lambda t: torch.cat((t[:1] * 1e-33, t[1:]))),
    "too large products": ("y", lambda t: t * 1e25),
    "too small products": ("y", lambda t: t * 1e-20),
}


@pytest.mark.parametrize("outside", OUTSIDE)
def test_parts_beyond_their_range(amx, outside):
    """Float32 is not multiplied in parts where that would lose something; bfloat16 is as it is."""
    name, change = OUTSIDE[outside]
    for dtype, served in zip(DTYPES, (True, False), strict=True):
        call = made(9, 5, 20, 36, 12, dtype=torch.float32)
        if "products" in outside:
            call["dgates"] = call["dgates"] * (1e25 if "large" in outside else 1e-20)
        call[name], call["h0"] = change(call[name]), None
        call = {key: value.to(dtype) if torch.is_tensor(value) else value for key, value in call.items()}
        call["w_ih"] = [w.to(dtype) for w in call["w_ih"]]
        assert bool(native(call, W_IH | W_HH | X)) == served


def test_zeros_stay_within_their_range(own_level):
    call = made(9, 5, 20, 36, 12)
    for name in ("x", "y", "h0", "dgates"):
        zero = call | {name: torch.zeros_like(call[name])}
        for found, expected in zip(
            native(zero, W_IH | W_HH | X), plain(zero, torch.float32, W_IH | W_HH | X).values(), strict=True
        ):
            assert torch.equal(found == 0, expected == 0)


@pytest.mark.parametrize(("backend", "served"), (("cpu", True), (None, True), ("reference", False)))
def test_who_takes_them(own_level, backend, served, monkeypatch):
    """A module whose cell has more than weights and biases, but not where another backend is forced or a mode looks on."""
    found, real = [], cpu.layer_gradients
    monkeypatch.setattr(cpu, "layer_gradients", lambda *arguments: found.append(real(*arguments)) or found[-1])
    layer, x = fastseq.PeepholeLSTM(20, 20, num_layers=2), torch.randn(40, 16, 20, requires_grad=True)
    lengths = torch.arange(16) + 20
    with fastseq.use_backend(backend):
        layer(x, lengths=lengths)[0].sum().backward()
        assert [results is not None for results in found] == [True] * (2 * served)
        found.clear()
        with FlopCounterMode(display=False):
            layer(x, lengths=lengths)[0].sum().backward()
        assert not found


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float16, torch.float64), ids=str)
def test_levels(level, dtype, monkeypatch):
    """Where the products are not served, PyTorch's are; either way a layer's gradients are right."""
    at_level(level, monkeypatch)
    assert bool(native(made(3, 2, 4, 8, 2, dtype=dtype), W_IH)) == (level in OWN and dtype in DTYPES)
    battery = RecurrentBattery()
    with fastseq.use_backend("cpu"):
        for case in (
            RecurrentCase("lstm", steps=9, batch=7, hidden=18, input=35, bidirectional=True, layout="lengths"),
            RecurrentCase("gru", steps=9, batch=7, hidden=18, input=35, bidirectional=True, layout="packed"),
        ):
            battery.check(case, dtype, "cpu")


@pytest.mark.parametrize(
    ("name", "change"), (("dgates", lambda t: t[..., :-1]), ("x", lambda t: t.double()), ("h0", lambda t: t[:, 1:]))
)
def test_what_does_not_fit_is_refused(own_level, name, change):
    call = made(3, 2, 4, 8, 2)
    with pytest.raises(RuntimeError, match="recurrent: "):
        native(call | {name: change(call[name])}, W_IH | W_HH | X)
