"""The native CPU kernels of the recurrence at every instruction set of this machine: odd sizes, scratch, layouts, threads."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import fastseq
from fastseq import functional as F
from fastseq.backends import library
from fastseq.testing import FACTOR, ROUNDINGS, assert_all_close_to_truth, relative_error
from support.cases import RecurrentCase
from support.recurrent import RecurrentBattery

BATTERY = RecurrentBattery()
DTYPES = (*BATTERY.DTYPES, torch.float16)

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
    # one row and three, of more depths, in pairs as well, than a run of sums; more rows than one product takes, with so much to
    # save that it is stored past the caches, in whole lines and not
    RecurrentCase("lstm", steps=60, batch=1, hidden=290, input=270),
    RecurrentCase("gru", steps=40, batch=3, hidden=270, input=260),
    # one sequence, whose input is projected in pieces beside its steps: backwards, ended early, of tiles of several blocks
    RecurrentCase("lstm", steps=75, batch=1, hidden=150, input=40, layout="lengths", bidirectional=True),
    RecurrentCase("rnn_tanh", steps=70, batch=1, hidden=320, input=33),
    RecurrentCase("rnn_relu", steps=70, batch=1, hidden=330, input=33, layout="lengths"),
    RecurrentCase("gru", steps=70, batch=1, hidden=200, input=70, bidirectional=True),
    RecurrentCase("lstm", steps=12, batch=50, hidden=256, input=16),
    RecurrentCase("gru", steps=15, batch=50, hidden=250, input=16, layout="packed"),
]
VARIANTS = [
    RecurrentCase("lstm", batch=18, hidden=33, projection=17, bidirectional=True),
    RecurrentCase("lstm", batch=18, hidden=33, zoneout=(0.3, 0.5), training=True, layout="lengths", bidirectional=True),
    RecurrentCase("gru", batch=35, hidden=17, zoneout=(0.4, 0.0), bidirectional=True),
    RecurrentCase("rnn_relu", batch=19, hidden=70, zoneout=(0.4, 0.0), training=True, layout="packed"),
    RecurrentCase("gru", batch=5, hidden=24, heads=3, bidirectional=True),
    RecurrentCase("layer_norm_lstm", batch=18, hidden=33, projection=17, bidirectional=True),
    RecurrentCase(
        "layer_norm_lstm", batch=35, hidden=70, zoneout=(0.3, 0.5), training=True, layout="lengths", bidirectional=True
    ),
    RecurrentCase("layer_norm_gru", steps=9, batch=20, hidden=200, layout="packed", bidirectional=True),
]


@pytest.fixture(autouse=True)
def native(monkeypatch):
    """Scratch holds NaN until it is written."""
    assert library.reason() is None
    monkeypatch.setenv("FASTSEQ_CPU_POISON", "1")
    with fastseq.use_backend("cpu"):
        yield


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


# a step of many sequences: whole vectors of 4, 8 and 16 lanes and not, one to several groups of them; rows, runs and tiles that
# end early
STEPS = ((16, 1, 17), (31, 130, 16), (48, 7, 33), (64, 200, 65), (100, 16, 130))


def _step_results(module, dtype, x, state):
    given = None if state is None else tuple(t.to(dtype) for t in state) if len(state) > 1 else state[0].to(dtype)
    with torch.no_grad():
        return {str(i): t for i, t in enumerate(tree_leaves(module.to(dtype)(x.to(dtype), given)))}


@pytest.mark.parametrize("name", ("RNN", "LSTM", "GRU"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_steps_of_many_sequences(level, name, dtype):
    """Of cells, and of layers in both directions, whose rows of the output lie apart; with and without biases and states."""
    for place, (batch, width, hidden) in enumerate(STEPS):
        torch.manual_seed(place)
        options = {"bias": place != 1, **({"nonlinearity": "relu"} if name == "RNN" and place % 2 else {})}
        for kind, more, lanes in ((f"{name}Cell", {}, 1), (name, {"bidirectional": True}, 2)):
            theirs = getattr(nn, kind)(width, hidden, **options, **more).to(dtype)
            ours = getattr(fastseq, kind)(width, hidden, **options, **more).to(dtype)
            ours.load_state_dict(theirs.state_dict())
            x = torch.randn(*(1,) * (lanes > 1), batch, width, dtype=dtype)
            state = [torch.randn(*(lanes,) * (lanes > 1), batch, hidden, dtype=dtype) for _ in range(1 + (name == "LSTM"))]

            given = x, None if place == 2 else state
            found, plain = (_step_results(module, dtype, *given) for module in (ours, theirs))
            if dtype == torch.float64:  # sums of up to 330 terms of either
                torch.testing.assert_close(found, plain, rtol=0, atol=330 * 8 * torch.finfo(dtype).eps)
            else:
                assert_all_close_to_truth(found, plain, _step_results(theirs, torch.float64, *given))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", CHUNKED + VARIANTS, ids=str)
def test_chunks_and_variants(level, case, dtype):
    BATTERY.check(case, dtype, "cpu")


@pytest.mark.parametrize("case", (ODD[11], ODD[14], CHUNKED[1], CHUNKED[4], *CHUNKED[7:11], VARIANTS[1], *VARIANTS[-2:]), ids=str)
def test_threads(level, threads, case):
    for dtype in DTYPES[1:]:
        BATTERY.check(case, dtype, "cpu")


# what AMX multiplies in three parts: rows of a tile and one more, less than two, more; depths of a tile and one more; every cell
IN_PARTS = [
    RecurrentCase(
        cell, steps=17, batch=batch, hidden=hidden, input=width, bidirectional=i % 3 == 1, state=i % 2 == 0, layout=layout
    )
    for i, (cell, batch, hidden, width, layout) in enumerate(
        (
            ("lstm", 16, 64, 32, "padded"),
            ("lstm", 33, 79, 33, "lengths"),
            ("gru", 17, 65, 5, "padded"),
            ("gru", 49, 64, 31, "packed"),
            ("rnn_tanh", 31, 113, 64, "lengths"),
            ("rnn_relu", 65, 130, 1, "padded"),
            ("peephole_lstm", 18, 57, 3, "padded"),
            ("slstm", 35, 65, 40, "lengths"),
            ("coupled_lstm", 32, 95, 17, "padded"),
            ("lstm", 40, 200, 200, "padded"),
            ("layer_norm_lstm", 17, 65, 20, "padded"),
            ("layer_norm_gru", 33, 79, 33, "lengths"),
        )
    )
]


@pytest.mark.parametrize("case", IN_PARTS, ids=str)
def test_products_in_parts(threads, case):
    BATTERY.check(case, torch.float32, "cpu")


def _layer(library, name, dtype, params, x, h0, dy, **options):
    """Outputs and gradients of a layer of ``library`` with these parameters, each in ``dtype``."""
    layer = getattr(library, name)(x.shape[-1], dy.shape[-1], dtype=dtype, **options)
    with torch.no_grad():
        for own, given in zip(layer.parameters(), params, strict=True):
            own.copy_(given)
    x, h0 = (tensor.detach().to(dtype).requires_grad_() for tensor in (x, h0))
    y, state = layer(x, (h0, torch.zeros_like(h0)) if name == "LSTM" else h0)
    y.backward(dy.to(dtype))
    gradients = {f"d{key}": value.grad for key, value in layer.named_parameters()}
    return {"y": y.detach(), "h_n": (state[0] if name == "LSTM" else state).detach(), "dx": x.grad, "dh0": h0.grad} | gradients


def _three(name, params, x, h0, dy, **options):
    """The same by torch in float64, by torch, by fastseq."""
    single = [p.float() for p in params]
    given = (x.float().double(), h0.float().double(), dy.float().double())
    truth = _layer(nn, name, torch.float64, single, *given, **options)
    return (
        truth,
        _layer(nn, name, torch.float32, single, *given, **options),
        _layer(fastseq, name, torch.float32, single, *given, **options),
    )


def _random(name, hidden=64, batch=32, steps=32, scale=1.0, seed=0):
    torch.manual_seed(seed)
    params = [scale * p.detach() for p in getattr(nn, name)(hidden, hidden, dtype=torch.float64).parameters()]
    return params, *(torch.randn(n, batch, hidden, dtype=torch.float64) for n in (steps, 1, steps))


def _rms(result, truth):
    return (result.double() - truth).square().mean().sqrt().item()


@pytest.mark.parametrize("hidden", (112, 256))
@pytest.mark.parametrize("name", ("LSTM", "GRU", "RNN"))
def test_parts_are_as_exact_as_torch(name, hidden):
    """Root mean square errors of what the recurrence computes, pooled over y, h_n and dh0, are at most torch's own.

    Multiply-adds, where there are no parts, round as torch's do: the same but for the order, which chance decides.
    """
    truth, torchs, ours = _three(name, *_random(name, hidden))
    keys, chance = ("y", "h_n", "dh0"), 1.0 if torch.ops.fastseq_native.cpu_level() == "amx" else 1.05
    assert sum(_rms(ours[k], truth[k]) for k in keys) <= chance * sum(_rms(torchs[k], truth[k]) for k in keys)


@pytest.mark.parametrize("steps, batch", ((1, 1), (1, 40), (40, 1), (9, 20)))
def test_activations_are_off_by_rounding_and_little_more(level, steps, batch):
    """Products with ones in a diagonal are exact: h is tanh(x), and where g is 1 and nothing stays of c, c is sigmoid(x)."""
    torch.manual_seed(0)
    hidden = 512
    x = torch.randn(steps, batch, hidden) * torch.logspace(-3, 0.3, hidden)[torch.randperm(hidden)]
    rnn, lstm = fastseq.RNN(hidden, hidden, bias=False), fastseq.LSTM(hidden, hidden)
    with torch.no_grad():
        for module in (rnn, lstm):
            for parameter in module.parameters():
                parameter.zero_()
            module.weight_ih_l0[:hidden] = torch.eye(hidden)
        lstm.bias_ih_l0[hidden : 3 * hidden] = torch.tensor([-200.0, 20.0]).repeat_interleave(hidden)  # f and g
        h, c = rnn(x)[0], lstm(x)[1][1][0]
    for found, function, given in ((h, torch.tanh, x), (c, torch.sigmoid, x[-1])):
        exact = function(given.double())
        unit = 2.0 ** (torch.frexp(exact)[1].double() - 24)
        ours, theirs = (_rms(values / unit, exact / unit) for values in (found, function(given)))
        assert ours <= 1.25 * max(theirs, 12**-0.5), function  # rounding alone: anything within half a unit


@pytest.mark.parametrize("steps, batch", ((1, 1), (1, 8), (3, 4)))
@pytest.mark.parametrize("hidden", (64, 200))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", ("LSTM", "GRU", "RNN"))
def test_short_calls_are_as_exact_as_torch(level, name, dtype, hidden, steps, batch):
    """Few rows read weights as they are, and project the input first: what comes between is as wide as in a long call."""
    errors = []
    for seed in range(12):
        torch.manual_seed(seed)
        theirs = getattr(nn, name)(hidden, hidden, dtype=dtype)
        ours = getattr(fastseq, name)(hidden, hidden, dtype=dtype)
        ours.load_state_dict(theirs.state_dict())
        x, h0 = torch.randn(steps, batch, hidden, dtype=dtype), 0.5 * torch.randn(1, batch, hidden, dtype=dtype)
        state = (h0, 0.5 * torch.randn_like(h0)) if name == "LSTM" else h0
        wide = tuple(s.double() for s in state) if name == "LSTM" else h0.double()
        with torch.no_grad():
            found = ours(x, state)[0], theirs(x, state)[0]
            truth = copy.deepcopy(theirs).double()(x.double(), wide)[0]
        errors.append([_rms(y, truth) for y in found])
    own, torchs = (sum(e) for e in zip(*errors, strict=True))
    assert own <= 1.03 * torchs


def _decades(shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 10 ** torch.empty(shape, dtype=torch.float64).uniform_(-8, 0, generator=generator)


def _stressed(kind, name, seed=0):
    """(params, x, h0, dy) that are hard for parts, some of them beyond their range."""
    params, x, h0, dy = _random(name, hidden=112, batch=19, seed=seed)
    if kind == "large weights":
        params = [8 * p for p in params]
    elif kind == "decades":
        x, h0, dy = x * _decades(x.shape), h0 * _decades(h0.shape), dy * _decades(dy.shape)
    elif kind == "heavy tails":
        x, dy = x / torch.rand_like(x), dy / torch.rand_like(dy)
    elif kind == "tiny inputs":
        params = [*params[:2], *(torch.zeros_like(p) for p in params[2:])]
        x, h0 = x * 1e-36, h0 * 1e-36
    elif kind == "subnormal inputs":
        params = [*params[:2], *(torch.zeros_like(p) for p in params[2:])]
        x, h0 = x * 1e-40, torch.zeros_like(h0)
    elif kind == "tiny weights":
        params = [1e-34 * p for p in params]
    elif kind == "tiny products":
        params = [1e-17 * params[0], 1e-17 * params[1], *(torch.zeros_like(p) for p in params[2:])]
        x, h0 = x * 1e-17, h0 * 1e-17
    elif kind == "fading state":
        params, x = [params[0], 0.3 * params[1], *(torch.zeros_like(p) for p in params[2:])], torch.zeros(150, 19, 112).double()
        dy = torch.zeros_like(x)
        dy[0] = 1
    elif kind == "vanishing gradients":
        x, dy = torch.randn(150, 19, 112).double(), torch.zeros(150, 19, 112).double()
        params, dy[-1] = [params[0], 0.3 * params[1], *params[2:]], 1
    return params, x, h0, dy


@pytest.mark.parametrize(
    "kind",
    (
        "large weights",
        "decades",
        "heavy tails",
        "tiny inputs",
        "subnormal inputs",
        "tiny weights",
        "tiny products",
        "fading state",
        "vanishing gradients",
    ),
)
@pytest.mark.parametrize("name", ("LSTM", "GRU", "RNN"))
def test_parts_or_none(name, kind):
    """The relative error of each result, however small that is, is at most twice torch's own, beside four roundings: torch's
    of these inputs, or where that was lucky of others.

    Gradients of weights are sums over all rows, one product, whose rounding is a random walk with steps of 0.3 units; torch's
    layer adds them step by step, those that fade first.
    """
    given = _stressed(kind, name)
    truth, torchs, ours = _three(name, *given)
    walk = 0.3 * (given[1].shape[0] * given[1].shape[1]) ** 0.5
    for key, value in truth.items():
        scale = value.abs().max().item()
        own = (torchs[key] - value).abs().max().item()
        roundings = 4 + walk * key.startswith("dweight")
        least = roundings * torch.finfo(torch.float32).eps * scale + 2**-145
        error = (ours[key] - value).abs().max().item()
        if error > 2 * own + least:
            own = max(own, scale * max(_own_error(name, kind, key, seed) for seed in (1, 2, 3)))
        assert error <= 2 * own + least, (key, scale)


@functools.cache
def _own_error(name, kind, key, seed):
    truth, torchs, _ = _three(name, *_stressed(kind, name, seed))
    return relative_error(torchs[key], truth[key])


@pytest.mark.parametrize("value", (torch.inf, -torch.inf, torch.nan, 3e38, 1e31))
@pytest.mark.parametrize("where", ("x", "h0", "weight"))
@pytest.mark.parametrize("name", ("LSTM", "GRU", "RNN"))
def test_what_is_no_sum_of_parts(name, where, value, monkeypatch):
    """Beyond the range of parts, multiply-adds take the call: bit for bit what they give where there are no tiles."""
    params, x, h0, dy = _random(name, hidden=112, batch=17, steps=16)
    {"x": x, "h0": h0, "weight": params[1]}[where].view(-1)[77] = value
    results = []
    for level in ("avx512", "amx"):
        monkeypatch.setenv("FASTSEQ_CPU_LEVEL", level)
        layer = getattr(fastseq, name)(112, 112)
        with torch.no_grad():
            for own, given in zip(layer.parameters(), params, strict=True):
                own.copy_(given)
            states = (h0.float(), torch.zeros_like(h0).float()) if name == "LSTM" else h0.float()
            results.append(layer(x.float(), states)[0])
    assert torch.equal(results[0].view(torch.int32), results[1].view(torch.int32))


def test_states_that_grow(monkeypatch):
    """A relu's state that leaves the range of parts on its way: as multiply-adds have it."""
    torch.manual_seed(0)
    x, weight = torch.rand(40, 18, 112), torch.eye(112) * 9 + torch.rand(112, 112) / 9
    params = [torch.rand(112, 112), weight, torch.rand(112), torch.rand(112)]
    results = []
    for level in ("avx512", "amx"):
        monkeypatch.setenv("FASTSEQ_CPU_LEVEL", level)
        results.append(F.rnn(x, None, params, nonlinearity="relu")[0])
    assert results[0][-1].isinf().any() or results[0][-1].max() > 1e30
    assert torch.equal(*results)


def test_parts_are_used(monkeypatch):
    """Ordinary numbers are multiplied in parts at the level amx, and at no other."""
    params, x, h0, _ = _random("GRU")
    results = []
    for level in ("avx512", "amx"):
        monkeypatch.setenv("FASTSEQ_CPU_LEVEL", level)
        found = torch.ops.fastseq_native.cpu_level()
        results.append(F.gru(x.float(), h0.float(), [p.float() for p in params])[0])
    assert torch.equal(*results) == (found != "amx")


def test_pairs_are_used(monkeypatch):
    """Of bfloat16 at the level avx512_bf16, and of nothing else at any."""
    params, x, h0, _ = _random("GRU")
    for dtype in DTYPES:
        results = []
        for level in ("avx512", "avx512_bf16"):
            monkeypatch.setenv("FASTSEQ_CPU_LEVEL", level)
            found = torch.ops.fastseq_native.cpu_level()
            results.append(F.gru(x.to(dtype), h0.to(dtype), [p.to(dtype) for p in params])[0])
        assert torch.equal(*results) == (found != "avx512_bf16" or dtype != torch.bfloat16)


@pytest.mark.parametrize("steps", (2, 48))  # weights read where they lie, and packed
@pytest.mark.parametrize("value", (torch.inf, -torch.inf, torch.nan, 3e38))
@pytest.mark.parametrize("where", ("x", "h0", "weight"))
def test_what_no_bfloat16_product_holds(level, where, value, steps):
    """Infinity and NaN, given or of products too large, are where torch has them, and everything else is as near to the truth."""
    params, x, h0, _ = _random("RNN", hidden=112, batch=3, steps=steps)
    {"x": x, "h0": h0, "weight": params[1]}[where].view(-1)[77] = value
    params, x, h0 = [p.bfloat16() for p in params], x.bfloat16(), h0.bfloat16()
    torchs = nn.RNN(112, 112, nonlinearity="relu", dtype=torch.bfloat16)
    truth = nn.RNN(112, 112, nonlinearity="relu", dtype=torch.float64)
    with torch.no_grad():
        for own in (torchs, truth):
            for mine, given in zip(own.parameters(), params, strict=True):
                mine.copy_(given)
        y = F.rnn(x, h0, params, nonlinearity="relu")[0]
        expected = torchs(x, h0)[0]
        exact = truth(x.double(), h0.double())[0]
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())
    finite = expected.isfinite()
    scale = exact[finite].abs().max()
    assert _rms(y[finite] / scale, exact[finite] / scale) <= 1.1 * _rms(expected[finite] / scale, exact[finite] / scale) + 1e-4


def test_powers_of_two_pass_through(level):
    """What is small, but nowhere subnormal, is computed as exactly: a network of relu without biases is linear in its scale."""
    params, x, h0, _ = _random("RNN", hidden=80, batch=20, steps=20)
    w_ih, weight, *_ = (p.bfloat16() for p in params)
    biases = [torch.zeros(80, dtype=torch.bfloat16)] * 2
    x, h0 = x.bfloat16(), h0.bfloat16()
    y = F.rnn(x, h0, [w_ih, weight, *biases], nonlinearity="relu")[0]
    for scale in (2.0**-80, 2.0**80):
        assert torch.equal(F.rnn(x * scale, h0 * scale, [w_ih, weight, *biases], nonlinearity="relu")[0], y * scale)


@pytest.mark.parametrize("name", ("LayerNormLSTM", "LayerNormGRU"))
def test_small_gradients_through_norms(name, monkeypatch):
    """Too small for parts, they are multiplied as they are where there are no tiles; others are not."""
    torch.manual_seed(0)
    layer, x, dy = getattr(fastseq, name)(80, 80), torch.randn(32, 32, 80), torch.randn(32, 32, 80)
    y = layer(x)[0]
    for scale in (1e-33, 1.0):
        results = []
        for level in ("avx512", "amx"):
            monkeypatch.setenv("FASTSEQ_CPU_LEVEL", level)
            found = torch.ops.fastseq_native.cpu_level()
            results.append(torch.autograd.grad(y, layer.weight_hh_l0, dy * scale, retain_graph=True)[0])
        if found != "avx512_bf16":  # whose products of float32 are others than those of AVX-512, and have no parts
            assert torch.equal(*results) == (found != "amx" or scale < 1)
        torch.testing.assert_close(results[0] / scale, results[1] / scale, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("hidden", (1, 31, 48, 257))
@pytest.mark.parametrize("name", ("LayerNormLSTM", "LayerNormGRU"))
def test_units_that_are_alike(name, hidden, dtype, level):
    """A norm leaves nothing of R h and of c but the rounding of their mean, which it makes large. Nor of the gradients of R and
    of h, which are left out: all that they are sums of cancels."""
    torch.manual_seed(0)
    layer = getattr(fastseq, name)(5, hidden)
    gates = layer.weight_hh_l0.shape[0] // hidden
    with torch.no_grad():
        for key, parameter in layer.named_parameters():
            if key == "weight_hh_l0":
                parameter.copy_(torch.randn(1, hidden) * 8)
            elif parameter.shape[0] == gates * hidden:
                parameter.copy_(torch.randn(gates, *parameter.shape[1:]).repeat_interleave(hidden, 0))
            else:
                parameter.copy_(torch.randn(1))
    layer, x, dy = layer.to(dtype), torch.randn(1, 3, 5).to(dtype), torch.randn(1, 3, hidden).to(dtype)
    states = [torch.randn(1, 3, hidden).to(dtype), torch.randn(1, 3, 1).expand(1, 3, hidden).to(dtype)]
    states = states if name == "LayerNormLSTM" else states[:1]

    def results(layer, dtype):
        given = [state.to(dtype) for state in states]
        y, last = layer(x.to(dtype), tuple(given) if len(given) > 1 else given[0])
        parameters = [parameter for key, parameter in layer.named_parameters() if key != "weight_hh_l0"]
        return [y, *tree_leaves(last), *torch.autograd.grad(y, parameters, dy.to(dtype))]

    found = results(layer, dtype)
    with fastseq.use_backend("reference"):
        plain, truth = results(layer, dtype), results(copy.deepcopy(layer).double(), torch.float64)

    def error(some):
        return max((a - b).abs().max().item() / max(1, b.abs().max().item()) for a, b in zip(some, truth, strict=True))

    assert error(found) <= FACTOR * error(plain) + ROUNDINGS * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_what_a_long_call_saves(level, dtype):
    """What is saved past the caches, since it is larger than they are, is what a call half as long saves."""
    torch.manual_seed(0)
    steps, batch, hidden = 32, 56, 256  # 9 MB in float32
    x = torch.randn(steps, batch, 20).to(dtype)
    w_ih, b_ih, weight = (torch.randn(4 * hidden, n).to(dtype) / 16 for n in (20, 1, hidden))

    def saved(x):
        walk = (None, None, None, None, "lstm", [0], 0.0, 0.0)
        arguments = (x, w_ih, b_ih.flatten(), weight[None], None, None, None, None)
        y, _, _, c, gates = torch.ops.fastseq.recurrent_forward(*arguments, *walk, True, True)
        return y, c, gates

    for long, short in zip(saved(x), saved(x[: steps // 2]), strict=True):
        assert torch.equal(long[: steps // 2], short) and not long.isnan().any()


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


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_states_are_rounded_once(level, dtype):
    """y is h to the bit, and c stays in fp32: a call in two parts is the call in one."""
    torch.manual_seed(0)
    params = [p.detach().to(dtype) for p in nn.LSTM(12, 40).parameters()]
    x = torch.randn(10, 18, 12).to(dtype)
    y, h, _ = F.lstm(x, None, params)
    assert torch.equal(y[-1], h[0])
    gru = [p.detach().to(dtype) for p in nn.GRU(12, 40).parameters()]
    whole, _ = F.gru(x, None, gru)
    first, state = F.gru(x[:4], None, gru)
    assert torch.equal(whole, torch.cat((first, F.gru(x[4:], state, gru)[0])))


def test_float16_is_converted_exactly(level):
    """All its numbers, and what lies between two of them: subnormal numbers, ties to even, overflow to infinity, NaN."""
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.float16).view(-1, 1)
    h0 = numbers[numbers.isfinite()].view(1, -1, 1).expand(-1, -1, 33).contiguous()
    forward = torch.ops.fastseq.recurrent_forward

    def run(cell, x, weight, vectors=None, h0=None):
        steps = x.expand(3, *x.shape[1:]).contiguous()  # three steps: the product of a single one is made elsewhere
        rest = (None, h0, None, None, None, None, None, cell, [0], 0.0, 0.0, False, False)
        return forward(steps, None, None, weight, vectors, *rest)[0][0, :, 0]

    # h = relu(x)
    x = numbers.expand(1, -1, 33)
    y = run("rnn_relu", x, numbers.new_zeros(1, 33, 33))
    assert torch.equal(y.nan_to_num(-1.0), x[0].clamp(min=0).nan_to_num(-1.0))  # a NaN is one, and a zero that is negative equal
    # h = h0, since z = 1
    gates = numbers.new_zeros(1, 1, 99)
    gates[..., 33:66] = torch.inf
    assert torch.equal(run("gru", gates.expand(1, h0.shape[1], -1), numbers.new_zeros(1, 99, 33), None, h0), h0[0])
    # h = relu(w h0): products of two such numbers are exact in fp32
    for w in (1.5, 0.5, 1 + 2.0**-10, 3.0, 0.376, 2.0**-24, -1.25, 65504.0, -0.00071):
        weight = torch.eye(33, dtype=torch.float16)[None] * torch.tensor(w).half()
        y = run("rnn_relu", gates[..., :33].expand(1, h0.shape[1], -1) * 0 + 0, weight, None, h0)
        assert torch.equal(y, (h0[0].float() * weight[0, 0, 0].float()).clamp(min=0).half())


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
