"""What PyTorch does to modules: functional calls, transforms, autocast, parametrization, copies."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq
from fastseq.modules import keep_type
from support.modules import (
    FP64,
    OPTIONS,
    B,
    H,
    I,
    T,
    assert_as_good,
    both,
    initial,
    leaves,
    random,
    run,
)

NAMES = ["RNN", "LSTM", "GRU"]
every_option = pytest.mark.parametrize(("name", "options"), OPTIONS)


def doubles(name, options):
    theirs, ours = both(name, dtype=torch.float64, **options)
    return theirs, ours, random(T, B, I, dtype=torch.float64)


def assert_close(actual, expected):
    for a, e in zip(leaves(actual), leaves(expected), strict=True):
        torch.testing.assert_close(a, e, **FP64)


@every_option
def test_functional_call(name, options):
    theirs, ours, input = doubles(name, options)
    other, _ = both(name, dtype=torch.float64, **options)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.7)
    parameters = dict(other.named_parameters())
    results = functional_call(ours, parameters, (input,))
    assert_close(results, other(input))
    gradients = torch.autograd.grad(results[0].sum(), list(parameters.values()))
    assert all(g.any() for g in gradients)
    assert_close(ours(input), theirs(input))


@every_option
def test_func_grad(name, options):
    theirs, ours, input = doubles(name, options)

    def gradients(module):
        def loss(parameters, x):
            return functional_call(module, parameters, (x,))[0].square().sum()

        return torch.func.grad(loss, (0, 1))(dict(module.named_parameters()), input)

    (expected, dx), (actual, dy) = gradients(theirs), gradients(ours)
    assert_close([*actual.values(), dy], [*expected.values(), dx])


@every_option
def test_vmap(name, options):
    theirs, ours, _ = doubles(name, options)
    many = random(3, T, B, I, dtype=torch.float64)
    assert_close(torch.func.vmap(lambda x: ours(x)[0])(many), torch.stack([theirs(x)[0] for x in many]))
    rows = many[0]
    each = torch.func.vmap(lambda x: ours(x)[0], in_dims=1, out_dims=1)(rows)
    assert_close(each, theirs(rows)[0])


@every_option
def test_vmap_over_an_ensemble(name, options):
    theirs, ours, input = doubles(name, options)
    ensemble = {n: random(3, *p.shape, dtype=p.dtype) for n, p in ours.named_parameters()}

    def gradient(module, parameters):
        return torch.func.grad(lambda p: functional_call(module, p, (input,))[0].square().sum())(parameters)

    actual = torch.func.vmap(lambda parameters: gradient(ours, parameters))(ensemble)
    for i in range(3):
        expected = gradient(theirs, {n: p[i] for n, p in ensemble.items()})
        for n, value in expected.items():
            torch.testing.assert_close(actual[n][i], value, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_vmap_with_lengths_and_dropout(name):
    _, ours = both(name, dropout=0.5, num_layers=2)
    many, lengths = random(2, T, B, I), torch.tensor([[6, 2, 3], [1, 5, 4]])
    ours.eval()
    actual = torch.func.vmap(lambda x, n: ours(x, lengths=n)[0])(many, lengths)
    for i in range(2):
        torch.testing.assert_close(actual[i], ours(many[i], lengths=lengths[i])[0])
    ours.train()
    same = many[:1].expand(2, -1, -1, -1)
    different = torch.func.vmap(lambda x: ours(x)[0], randomness="different")(same)
    assert not torch.equal(different[0], different[1])


@every_option
def test_forward_mode(name, options):
    theirs, ours, input = doubles(name, options)
    hx = initial(ours, dtype=torch.float64)
    tangents = [torch.randn_like(leaf) for leaf in (input, *leaves(hx))]

    def call(module, *flat):
        states = None if len(flat) == 1 else flat[1] if len(flat) == 2 else tuple(flat[1:])
        return tuple(leaves(module(flat[0], states)))

    primals = (input, *leaves(hx))
    _, expected = torch.autograd.functional.jvp(lambda *p: call(theirs, *p), primals, tuple(tangents))
    results, actual = torch.func.jvp(lambda *p: call(ours, *p), primals, tuple(tangents))
    assert_close(results, call(theirs, *primals))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)
    with forward_ad.dual_level():
        dual = call(ours, *(forward_ad.make_dual(p, t) for p, t in zip(primals, tangents, strict=True)))
        for d, e in zip(dual, expected, strict=True):
            torch.testing.assert_close(forward_ad.unpack_dual(d).tangent, e, rtol=1e-11, atol=1e-12)


@every_option
def test_jacobians_agree(name, options):
    _, ours, input = doubles(name, options)
    input = input[:2, :1]

    def last(x):
        return ours(x)[0][-1]

    forward, reverse = torch.func.jacfwd(last)(input), torch.func.jacrev(last)(input)
    torch.testing.assert_close(forward, reverse, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("kind", "recompute"), [("padded", False), ("padded", True), ("lengths", True), ("packed", False)])
@every_option
def test_double_backward(name, options, kind, recompute):
    """Every second derivative, among them those by initial states and by gradients of final states."""
    options = {k: v for k, v in options.items() if k != "num_layers"}
    ours = getattr(fastseq, name)(2, 4, **options, dtype=torch.float64, recompute=recompute)
    lengths = torch.tensor([3, 1])
    names = [n for n, _ in ours.named_parameters()]
    hx = leaves(initial(ours, 2, dtype=torch.float64))

    def call(x, *flat):
        states = flat[0] if len(hx) == 1 else flat[:2]
        keywords = {"lengths": lengths} if kind == "lengths" else {}
        if kind == "packed":
            x = pack_padded_sequence(x, lengths)
        parameters = dict(zip(names, flat[len(hx) :], strict=True))
        return tuple(leaves(functional_call(ours, parameters, (x, states), keywords)))

    flat = [random(3, 2, 2, dtype=torch.float64), *hx, *(p.detach() for p in ours.parameters())]
    flat = [t.clone().requires_grad_() for t in flat]
    assert torch.autograd.gradcheck(call, flat, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, flat, fast_mode=True)


def test_double_backward_through_cells():
    ours = fastseq.LSTM(2, 3, num_layers=2, bidirectional=True, dtype=torch.float64)
    names = [n for n, _ in ours.named_parameters()]

    def call(x, *flat):
        results = functional_call(ours, dict(zip(names, flat, strict=True)), (x,), {"return_cells": True})
        return results[2]

    flat = [random(3, 2, 2, dtype=torch.float64), *(p.detach() for p in ours.parameters())]
    flat = [t.clone().requires_grad_() for t in flat]
    assert torch.autograd.gradcheck(call, flat, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, flat, fast_mode=True)


class TestAutocast:
    @every_option
    def test_is_bf16_with_fp32_parameters(self, name, options):
        """bf16 out but of a GRU, fp32 gradients, as near to the truth as torch's module that is bf16 itself."""
        theirs, ours = both(name, **options)
        low = copy.deepcopy(theirs).bfloat16()
        input, hx = random(T, B, I), initial(theirs)
        with torch.autocast("cpu", torch.bfloat16):
            actual = run(ours, input, hx)
        expected = run(low, input, hx)
        wanted = torch.float32 if name == "GRU" else torch.bfloat16
        assert {v.dtype for k, v in actual.items() if k.startswith("result")} == {wanted}
        assert {v.dtype for k, v in actual.items() if k.startswith("grad")} == {torch.float32}
        actual = {k: v.bfloat16() for k, v in actual.items()}
        assert_as_good(actual, expected, run(copy.deepcopy(theirs).double(), input, hx))

    @pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("name", ["RNN", "GRU"])
    def test_dtypes_of_torch_for_every_kind_of_input(self, name, lower):
        theirs, ours = both(name)
        input, lengths, hx = random(T, B, I), torch.tensor([6, 4, 1]), initial(theirs)
        low, packed = input.to(lower), pack_padded_sequence(input, lengths)
        for arguments in ((input,), (input, hx), (input, hx.to(lower)), (low,), (low, hx), (packed,)):
            with torch.autocast("cpu", lower):
                expected, actual = theirs(*arguments), ours(*arguments)
            for e, a in zip(leaves(expected), leaves(actual), strict=True):
                assert a.dtype == e.dtype
                torch.testing.assert_close(a.float(), e.float(), rtol=0.05, atol=0.02)
        with torch.autocast("cpu", lower):
            kinds = {leaf.dtype for leaf in leaves(ours(input, lengths=lengths))}
        assert kinds == {torch.float32 if name == "GRU" else lower}

    def test_same_dtypes_of_an_lstm_for_every_kind_of_input(self):
        _, ours = both("LSTM")
        input, lengths = random(T, B, I), torch.tensor([6, 4, 1])
        with torch.autocast("cpu", torch.bfloat16):
            plain, given = ours(input), ours(input, lengths=lengths)
            packed = ours(pack_padded_sequence(input, lengths))
            low = ours(input.bfloat16())
        for results in (plain, given, packed, low):
            assert {leaf.dtype for leaf in leaves(results)} == {torch.bfloat16}

    @pytest.mark.parametrize("name", ["GRU", "GRUCell"])
    def test_a_state_goes_back_in(self, name):
        """Out of autocast, into a module in fp32; on a forced backend the cell as well."""
        ours = getattr(fastseq, name)(I, H)
        input = random(T, B, I) if name == "GRU" else random(B, I)
        for backend in ("auto", "cpu", "reference"):
            with fastseq.use_backend(backend):
                with torch.autocast("cpu", torch.bfloat16):
                    state = ours(input)
                state = state[1] if name == "GRU" else state
                assert state.dtype == torch.float32
                ours(input, state)

    @pytest.mark.parametrize("name", NAMES)
    def test_leaves_fp64_alone(self, name):
        _, ours = both(name, dtype=torch.float64)
        input = random(T, B, I, dtype=torch.float64)
        with torch.autocast("cpu", torch.bfloat16):
            inside = ours(input)
        assert all(torch.equal(a, b) for a, b in zip(leaves(inside), leaves(ours(input)), strict=True))


class TestCopies:
    @every_option
    def test_copies_are_equal_and_apart(self, name, options):
        _, ours = both(name, **options)
        ours.recompute = True
        input = random(T, B, I)
        stored = io.BytesIO()
        torch.save(ours, stored)
        stored.seek(0)
        copies = [
            copy.deepcopy(ours),
            pickle.loads(pickle.dumps(ours)),
            torch.load(stored, weights_only=False),
        ]
        for module in copies:
            assert type(module) is type(ours) and module.recompute
            results = zip(leaves(module(input)), leaves(ours(input)), strict=True)
            assert all(torch.equal(a, b) for a, b in results)
            with torch.no_grad():
                module.weight_hh_l0.zero_()
            assert not torch.equal(module(input)[0], ours(input)[0])

    @pytest.mark.parametrize("name", NAMES)
    def test_copy_of_a_swapped_module(self, name):
        theirs, ours = both(name)
        theirs.__class__ = getattr(keep_type, name)
        again = pickle.loads(pickle.dumps(copy.deepcopy(theirs)))
        input = random(T, B, I)
        assert torch.equal(again(input)[0], ours(input)[0])

    @pytest.mark.parametrize("name", NAMES)
    def test_state_dict_through_a_file(self, name):
        theirs, ours = both(name, num_layers=2, bidirectional=True)
        stored = io.BytesIO()
        torch.save(ours.state_dict(), stored)
        stored.seek(0)
        with torch.no_grad():
            for p in theirs.parameters():
                p.zero_()
        theirs.load_state_dict(torch.load(stored))
        assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))

    @pytest.mark.parametrize("name", NAMES)
    def test_changed_weights_are_seen(self, name):
        """Nothing of the weights outlives a call: assignment, in-place change and .data all count."""
        theirs, ours = both(name)
        input = random(T, B, I)
        for change in (
            lambda m: setattr(m, "weight_hh_l0", nn.Parameter(m.weight_hh_l0.detach() * 2)),
            lambda m: m.weight_ih_l0.detach().mul_(0.5),
            lambda m: setattr(m.bias_hh_l0, "data", torch.ones_like(m.bias_hh_l0)),
        ):
            before = ours(input)[0]
            change(theirs), change(ours)
            assert not torch.equal(ours(input)[0], before)
            torch.testing.assert_close(ours(input)[0], theirs(input)[0])


class TestReparametrization:
    @pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
    @pytest.mark.parametrize("name", NAMES)
    def test_weight_norm_as_a_hook(self, name):
        theirs, ours, input = doubles(name, {"bidirectional": True})
        for module in (theirs, ours):
            nn.utils.weight_norm(module, "weight_hh_l0")
            with torch.no_grad():
                module.weight_hh_l0_g.mul_(1.5)
        expected, actual = run(theirs, input), run(ours, input)
        assert_close(list(actual.values()), list(expected.values()))
        assert actual["grad of weight_hh_l0_g"].any() and actual["grad of weight_hh_l0_v"].any()
        nn.utils.remove_weight_norm(ours, "weight_hh_l0")
        assert_close(ours(input), theirs(input))

    @pytest.mark.parametrize("name", NAMES)
    def test_weight_norm_as_a_parametrization(self, name):
        theirs, ours, input = doubles(name, {"bidirectional": True})
        for module in (theirs, ours):
            nn.utils.parametrizations.weight_norm(module, "weight_hh_l0_reverse")
            with torch.no_grad():
                module.parametrizations.weight_hh_l0_reverse.original0.mul_(1.5)
        expected, actual = run(theirs, input), run(ours, input)
        assert_close(list(actual.values()), list(expected.values()))
        nn.utils.parametrize.remove_parametrizations(ours, "weight_hh_l0_reverse")
        assert type(ours) is getattr(fastseq, name)
        assert_close(ours(input), theirs(input))

    @pytest.mark.parametrize("name", NAMES)
    def test_dropped_weights(self, name):
        """A weight replaced by a plain tensor at every call, as in AWD-LSTM."""
        _, ours, input = doubles(name, {})
        raw = ours.weight_hh_l0
        del ours._parameters["weight_hh_l0"]
        ours.weight_hh_l0 = raw * 0.5
        ours(input)[0].sum().backward()
        assert raw.grad is not None and raw.grad.any()

    @pytest.mark.parametrize("name", NAMES)
    def test_tied_weights(self, name):
        theirs, ours = both(name, H, H, dtype=torch.float64)
        input = random(T, B, H, dtype=torch.float64)
        for module in (theirs, ours):
            module.weight_hh_l0 = module.weight_ih_l0
        expected, actual = run(theirs, input), run(ours, input)
        assert_close(list(actual.values()), list(expected.values()))


@pytest.mark.parametrize("name", NAMES)
def test_data_parallel_replicas(name):
    _, ours = both(name)
    input = random(T, B, I)
    replica = ours._replicate_for_data_parallel()
    for n, p in ours.named_parameters():
        setattr(replica, n, p.detach().clone().requires_grad_())
    assert torch.equal(replica(input)[0], ours(input)[0])


@pytest.mark.parametrize("name", NAMES)
def test_activation_checkpointing(name):
    theirs, ours, input = doubles(name, {"num_layers": 2})
    input.requires_grad_()
    plain = torch.autograd.grad(ours(input)[0].square().sum(), [input, *ours.parameters()])
    again = torch.utils.checkpoint.checkpoint(lambda x: ours(x)[0], input, use_reentrant=False)
    assert all(
        torch.equal(a, b)
        for a, b in zip(torch.autograd.grad(again.square().sum(), [input, *ours.parameters()]), plain, strict=True)
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_enters_the_graph(name):
    """A registered parameter that a call does not use is averaged wrongly by DistributedDataParallel."""
    _, ours = both(name, num_layers=2, bidirectional=True)
    ours(random(T, B, I))[0].sum().backward()
    assert all(p.grad is not None for p in ours.parameters())
