"""The native CPU kernels of the recurrence at every instruction set of this machine: odd sizes, scratch, layouts, threads."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import fastseq
from fastseq import functional as F
from fastseq.backends import library
from support.cases import RecurrentCase
from support.recurrent import RecurrentBattery

LEVELS = ("default", "avx2", "avx512", "amx")
BATTERY = RecurrentBattery()
DTYPES = BATTERY.DTYPES

# batch, hidden, input: ones; one less and one more than a vector of 4, 8 and 16 lanes, than the 16 rows and the 32 depths of a
# tile, and than the rows that a product takes
SIZES = ((1, 1, 1), (2, 3, 33), (15, 17, 1), (16, 16, 31), (17, 31, 16), (31, 33, 8), (33, 48, 5), (49, 65, 40), (65, 130, 96))
CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu", "peephole_lstm", "slstm", "coupled_lstm")

ODD = [
    RecurrentCase(
        cell, steps=3, batch=batch, hidden=hidden, input=width, bidirectional=i % 3 == 1, state=i % 2 == 0, bias=i % 4 > 0
    )
    for i, (batch, hidden, width) in enumerate(SIZES)
    for cell in (CELLS[i % 4], CELLS[i % 3 + 4])
]
# several chunks of steps whose input is projected together, the last one shorter; rows that end and, backwards, begin within one
CHUNKED = [
    RecurrentCase("lstm", steps=300, batch=1, hidden=20, input=3),
    RecurrentCase("gru", steps=15, batch=20, hidden=35, input=9, layout="lengths", bidirectional=True),
    RecurrentCase("lstm", steps=15, batch=21, hidden=17, input=40, layout="packed", bidirectional=True),
    RecurrentCase("rnn_tanh", steps=9, batch=40, hidden=70, input=33, layout="lengths", bidirectional=True),
    RecurrentCase("lstm", steps=14, batch=9, hidden=600, input=20),
    # one row and three, of more depths than a run of sums; more rows than one product takes, with so much to save that it is stored
    # past the caches, in whole lines and not
    RecurrentCase("lstm", steps=60, batch=1, hidden=150, input=140),
    RecurrentCase("gru", steps=40, batch=3, hidden=140, input=130),
    RecurrentCase("lstm", steps=12, batch=50, hidden=256, input=16),
    RecurrentCase("gru", steps=15, batch=50, hidden=250, input=16, layout="packed"),
]
VARIANTS = [
    RecurrentCase("lstm", batch=18, hidden=33, projection=17, bidirectional=True),
    RecurrentCase("lstm", batch=18, hidden=33, zoneout=(0.3, 0.5), training=True, layout="lengths", bidirectional=True),
    RecurrentCase("gru", batch=35, hidden=17, zoneout=(0.4, 0.0), bidirectional=True),
    RecurrentCase("rnn_relu", batch=19, hidden=70, zoneout=(0.4, 0.0), training=True, layout="packed"),
    RecurrentCase("gru", batch=5, hidden=24, heads=3, bidirectional=True),
]


@pytest.fixture(autouse=True)
def native(monkeypatch):
    """Scratch holds NaN until it is written."""
    assert library.reason() is None
    monkeypatch.setenv("FASTSEQ_CPU_POISON", "1")
    with fastseq.use_backend("cpu"):
        yield


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    monkeypatch.setenv("FASTSEQ_CPU_LEVEL", request.param)
    if torch.ops.fastseq_native.cpu_level() != request.param:
        pytest.skip(f"this processor has no {request.param}")
    return request.param


@pytest.fixture(params=(1, 2, 3))
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODD, ids=str)
def test_odd_sizes(level, case, dtype):
    BATTERY.check(case, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", CHUNKED + VARIANTS, ids=str)
def test_chunks_and_variants(level, case, dtype):
    BATTERY.check(case, dtype, "cpu")


@pytest.mark.parametrize("case", (ODD[11], ODD[14], CHUNKED[1], CHUNKED[4], VARIANTS[1]), ids=str)
def test_threads(level, threads, case):
    for dtype in DTYPES[1:]:
        BATTERY.check(case, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_reruns_are_bit_equal(level, threads, dtype):
    for case in (CHUNKED[2], replace(CHUNKED[4], steps=5), ODD[12]):
        BATTERY.test_rerun_is_bit_equal(case, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_strides_and_offsets(level, dtype):
    """Inputs, states and parameters that lie anywhere give, bit for bit, what their copies give."""
    torch.manual_seed(0)
    params = [p.detach() for p in nn.LSTM(9, 33, dtype=dtype).parameters()]
    x, states = torch.randn(7, 5, 9, dtype=dtype), [torch.randn(1, 5, 33, dtype=dtype) for _ in range(2)]

    def anywhere(tensor: torch.Tensor) -> torch.Tensor:
        room = torch.full([n + 3 for n in tensor.shape], torch.nan, dtype=dtype)
        view = room[tuple(slice(1, n + 1) for n in tensor.shape)]
        view.copy_(tensor)
        return view

    expected = F.lstm(x, states, params)
    moved = F.lstm(anywhere(x.transpose(0, 1)).transpose(0, 1), [anywhere(s) for s in states], [anywhere(p) for p in params])
    assert all(torch.equal(a, b) for a, b in zip(expected, moved, strict=True))


def test_a_row_of_nan_stays_alone(level):
    """Tiles multiply whole blocks of rows and depths: what is beyond them must be zero, not merely multiplied by it."""
    torch.manual_seed(0)
    for cell, function in ((nn.LSTM, F.lstm), (nn.GRU, F.gru)):
        params = [p.detach().bfloat16() for p in cell(5, 33).parameters()]
        x = torch.randn(6, 19, 5).bfloat16()
        expected = function(x, None, params)[0]
        x[2, 7, 3] = torch.nan
        y = function(x, None, params)[0]
        others = torch.arange(19) != 7
        assert torch.equal(y[:, others], expected[:, others])
        assert torch.equal(y[:2], expected[:2]) and y[2:, 7].isnan().all()


def test_other_libraries_may_use_the_tiles(level):
    """oneDNN's bfloat16 products leave their own tile configuration, or none, behind."""
    torch.manual_seed(0)
    params = [p.detach().bfloat16() for p in nn.LSTM(40, 48).parameters()]
    x, a = torch.randn(4, 20, 40).bfloat16(), torch.randn(64, 64).bfloat16()
    expected, product = F.lstm(x, None, params)[0], a @ a
    for _ in range(3):
        assert torch.equal(F.lstm(x[:, :3], None, params)[0], F.lstm(x[:, :3].clone(), None, params)[0])
        assert torch.equal(a @ a, product)
        assert torch.equal(F.lstm(x, None, params)[0], expected)


def test_bfloat16_states_are_rounded_once(level):
    """y is h to the bit, and c stays in fp32: a call in two parts is the call in one."""
    torch.manual_seed(0)
    params = [p.detach().bfloat16() for p in nn.LSTM(12, 40).parameters()]
    x = torch.randn(10, 18, 12).bfloat16()
    y, h, _ = F.lstm(x, None, params)
    assert torch.equal(y[-1], h[0])
    gru = [p.detach().bfloat16() for p in nn.GRU(12, 40).parameters()]
    whole, _ = F.gru(x, None, gru)
    first, state = F.gru(x[:4], None, gru)
    assert torch.equal(whole, torch.cat((first, F.gru(x[4:], state, gru)[0])))


def test_amx_needs_permission():
    """A thread with a small alternative signal stack makes the system deny AMX: AVX-512 serves, and info says why."""
    if torch.ops.fastseq_native.cpu_amx_obstacle():
        pytest.skip("this process has no AMX: " + torch.ops.fastseq_native.cpu_amx_obstacle())
    code = (
        "import ctypes\n"
        "class Stack(ctypes.Structure):\n"
        "    _fields_ = [('base', ctypes.c_void_p), ('flags', ctypes.c_int), ('size', ctypes.c_size_t)]\n"
        "memory = ctypes.create_string_buffer(8192)\n"
        "stack = Stack(ctypes.addressof(memory), 0, 8192)\n"
        "assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0\n"
        "import torch, fastseq\n"
        "from fastseq import info\n"
        "from fastseq import functional as F\n"
        "params = [p.detach().bfloat16() for p in torch.nn.LSTM(4, 5).parameters()]\n"
        "with fastseq.use_backend('cpu'):\n"
        "    assert not F.lstm(torch.randn(3, 2, 4).bfloat16(), None, params)[0].isnan().any()\n"
        "print(torch.ops.fastseq_native.cpu_level(), info.collect()['devices'][0])\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "FASTSEQ_CPU_LEVEL"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("avx512 ") and "signal stack is too small" in result.stdout
