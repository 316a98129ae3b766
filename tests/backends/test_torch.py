"""Calls that go to torch's own kernels: which ones, that nothing else about them changes, and that forcing overrides it."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq
from fastseq import backends
from fastseq.backends.torch import attention as torch_attention
from fastseq.choice import lengths, sources
from fastseq.functional import scaled_dot_product_attention
from fastseq.functional._attention_call import Options, prepared
from fastseq.testing import assert_close_to_truth

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

SEQUENCES = [("LSTM", {}), ("GRU", {}), ("RNN", {}), ("RNN", {"nonlinearity": "relu"})]


SHORT = 8  # steps up to which torch takes a sequence in these tests


@pytest.fixture(autouse=True)
def short_sequences_are_torchs() -> Iterator[None]:
    with lengths.everywhere(lengths.Steps(1, SHORT)):
        yield


def both(name: str, *sizes: int, **options) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    theirs = getattr(nn, name)(*(sizes or (4, 8)), **options)
    ours = copy.deepcopy(theirs)
    assert fastseq.convert(ours)
    return theirs, ours


def flat(result) -> list[torch.Tensor]:
    return torch.utils._pytree.tree_leaves(result)


def states(module: nn.RNNBase, batch: int):
    layers = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(layers, batch, module.hidden_size)
    return (h, torch.randn_like(h)) if module.mode == "LSTM" else h


def backends_of(function, *args, **kwargs) -> set[str]:
    return set(fastseq.explain(function, *args, **kwargs).backends)


class TestShortSequences:
    @pytest.mark.parametrize("name,more", SEQUENCES)
    @pytest.mark.parametrize(
        "options",
        [{}, {"num_layers": 2, "bias": False}, {"bidirectional": True, "batch_first": True}, {"num_layers": 3, "dropout": 0.5}],
    )
    @pytest.mark.parametrize("given", [False, True])
    def test_bit_equal_to_torchs(self, name, more, options, given):
        """Outputs, gradients and dropout between layers: the very kernel, on the same parameters, from the same random state."""
        theirs, ours = both(name, **more, **options)
        x = torch.randn(2, 2, 4)
        hx = states(theirs, 2) if given else None
        assert backends_of(ours, x, hx) == {"torch"}
        results = []
        for module in (theirs, ours):
            torch.manual_seed(3)
            inputs = x.clone().requires_grad_()
            outputs = flat(module(inputs, hx))
            sum((out * out).sum() for out in outputs).backward()
            results.append([*outputs, inputs.grad, *(p.grad for p in module.parameters())])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("name,more", SEQUENCES)
    def test_recomputing_is_ours(self, name, more, packed):
        """torch's kernels keep what their backward needs, so a short call in training is ours; else there is nothing to keep."""
        module = getattr(fastseq, name)(4, 8, **more, recompute=True)
        x = torch.randn(2, 3, 4)
        x = pack_padded_sequence(x, torch.tensor([2, 2, 1])) if packed else x
        chosen = []
        with backends.watching(lambda query, backend: chosen.append(backend)):
            module(x)
            with torch.no_grad():
                module(x)
        assert chosen == ["cpu", "torch"]

    @pytest.mark.parametrize("name,more", SEQUENCES)
    def test_double_backward(self, name, more):
        theirs, ours = both(name, **more)
        ours.double()
        x = torch.randn(2, 1, 4, dtype=torch.double, requires_grad=True)
        assert backends_of(ours, x) == {"torch"}
        assert torch.autograd.gradgradcheck(lambda x: ours(x)[0], (x,))

    @pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
    def test_what_torch_lacks_is_ours(self, name):
        x = torch.randn(2, 3, 4)
        assert backends_of(getattr(fastseq, name)(4, 8), x) == {"torch"}
        assert backends_of(getattr(fastseq, name)(4, 8), x, lengths=torch.tensor([2, 1, 0])) == {"cpu"}
        for options in ({"zoneout": 0.1}, {"num_heads": 2}, {"weight_dropout": 0.5}):
            assert backends_of(getattr(fastseq, name)(4, 8, **options), x) == {"cpu"}

    @pytest.mark.parametrize("gradients", [False, True])
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize(
        ("first", "last", "words"),
        [
            (1, 8, "up to 8 steps"),
            (3, 8, "from 3 up to 8 steps"),
            (3, lengths.ENDLESS, "from 3 steps"),
            (1, lengths.ENDLESS, "at every length"),
            (*lengths.OURS, ""),
        ],
    )
    @pytest.mark.parametrize("name,more", SEQUENCES)
    def test_limits_follow_the_table(self, name, more, first, last, words, packed, gradients):
        module = getattr(fastseq, name)(4, 8, **more).requires_grad_(gradients)
        with lengths.everywhere(lengths.Steps(first, last)):
            for steps in (1, 2, 3, 8, 9, 100):
                x = torch.randn(steps, 2, 4)
                with torch.set_grad_enabled(gradients):
                    chosen = []
                    with backends.watching(lambda query, backend, chosen=chosen: chosen.append(backend)):
                        module(pack_padded_sequence(x, torch.tensor([steps, 1])) if packed else x)
                assert chosen == ["torch" if first <= steps <= last else "cpu"]
            if words:
                text = str(fastseq.explain(module, torch.randn(3, 2, 4)))
                assert f"torch, torch's kernel is faster {words} without gradients" in text

    @pytest.mark.parametrize("level", lengths.LEVELS)
    def test_the_committed_table_has_every_kind_of_call(self, level):
        table = lengths.table_of(level, json.loads(lengths.FILE.read_text()))
        for name, more in SEQUENCES:
            cell = getattr(fastseq, name)(4, 8, **more).cell
            for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                for layout, lanes, gradients in product(("padded", "packed"), (1, 2), (False, True)):
                    for batch, hidden in product((1, 3, 1000), (1, 100, 5000)):
                        first, last = table.steps(cell, dtype, layout, lanes, batch, hidden, gradients)
                        assert (first, last) == lengths.OURS or 1 <= first <= last

    def test_finding_a_row_is_short(self, monkeypatch):
        """The kernel of one step takes some microseconds; generous, for a busy machine."""
        monkeypatch.setattr(lengths, "_table", None)
        best = min(self._microseconds(sources.layers_are_torchs) for _ in range(50))
        assert best < 1

    @staticmethod
    def _microseconds(find) -> float:
        start = time.thread_time()
        for _ in range(100):
            find("lstm", torch.float32, "padded", 1, 8, 40, 256, False)
        return (time.thread_time() - start) * 1e4

    @pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
    def test_forced(self, name):
        theirs, ours = both(name)
        x, long = torch.randn(1, 2, 4), torch.randn(200, 2, 4)
        for backend in ("cpu", "reference", "torch"):
            with fastseq.use_backend(backend):
                assert backends_of(ours, x) == backends_of(ours, long) == {backend}
                torch.testing.assert_close(ours(long)[0], theirs(long)[0])

    @pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
    def test_transforms_and_autocast(self, name):
        theirs, ours = both(name)
        x = torch.randn(5, 2, 3, 4)
        torch.testing.assert_close(torch.vmap(lambda x: ours(x)[0])(x), torch.stack([theirs(each)[0] for each in x]))
        with torch.autocast("cpu", torch.bfloat16):
            actual, expected = ours(x[0])[0], theirs(x[0])[0]
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)

    @pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
    def test_parameters_are_read_by_name(self, name):
        """functional_call and weight_norm exchange them; torch's own modules keep a list beside."""
        theirs, ours = both(name)
        x = torch.randn(1, 2, 4)
        other = {key: value.detach() * 2 for key, value in ours.named_parameters()}
        expected = copy.deepcopy(theirs)
        expected.load_state_dict(other)
        torch.testing.assert_close(torch.func.functional_call(ours, other, (x,))[0], expected(x)[0])

    @pytest.mark.parametrize(
        "bad",
        [
            (torch.randn(1, 2, 5),),
            (torch.randn(1, 2, 4), torch.randn(1, 3, 8)),
            (torch.randn(1, 2, 4).double(),),
            (torch.randn(0, 2, 4),),
        ],
    )
    def test_errors_are_those_of_long_calls(self, bad):
        theirs, ours = both("GRU")
        for module in (theirs, ours):
            with pytest.raises((RuntimeError, ValueError)):
                module(*bad)


class TestHalf:
    @pytest.mark.parametrize("name,more", SEQUENCES)
    @pytest.mark.parametrize("packed", [False, True])
    def test_half_after_convert(self, name, more, packed):
        theirs, ours = both(name, **more, num_layers=2, bidirectional=True)
        exact = copy.deepcopy(theirs).double()
        theirs.half()
        ours.half()
        x = torch.randn(40, 3, 4).half()
        exact_x = x.double()
        if packed:
            x, exact_x = (pack_padded_sequence(t, torch.tensor([40, 7, 30]), enforce_sorted=False) for t in (x, exact_x))
        assert backends_of(ours, x) == {"cpu"}
        for a, e, t in zip(flat(ours(x)), flat(theirs(x)), flat(exact(exact_x)), strict=True):
            if a.is_floating_point():
                assert_close_to_truth(a, e, t.detach())
        assert fastseq.revert(ours)

    @pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
    def test_autocast(self, name):
        theirs, ours = both(name)
        x = torch.randn(40, 3, 4)
        expected = theirs(x)[0]
        with torch.autocast("cpu", torch.float16):
            if name == "GRU":  # which torch runs in fp32
                assert ours(x)[0].dtype == theirs(x)[0].dtype
            else:  # torch's LSTM wants a CPU with fp16 arithmetic here
                assert ours(x)[0].dtype == torch.float16 and backends_of(ours, x) == {"cpu"}
                torch.testing.assert_close(ours(x)[0].float(), expected, rtol=0.02, atol=0.02)

    def test_reference_says_so_once(self, caplog, monkeypatch):
        monkeypatch.setattr(backends.library, "reason", lambda: "there is no library")
        module = fastseq.PeepholeLSTM(4, 8).half()
        with caplog.at_level("WARNING", "fastseq"):
            for _ in range(3):
                module(torch.randn(40, 1, 4).half())
        (record,) = [r for r in caplog.records if "peephole_lstm" in r.getMessage()]
        assert "not cpu: there is no library" in record.getMessage()


def attention(dropout=0.5, **options):
    return both("MultiheadAttention", 16, 4, dropout=dropout, batch_first=True, **options)


KINDS = {
    "nothing": {},
    "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])},
    "gaps": {"key_padding_mask": torch.tensor([[False] * 5, [False, True, False, True, True]])},
    "mask": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1)},
    "causal": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1), "is_causal": True},
    "floating": {"attn_mask": torch.linspace(-1, 1, 200).view(8, 5, 5)},
}
KINDS["both"] = KINDS["mask"] | KINDS["gaps"]
KINDS["both, suffix"] = KINDS["mask"] | KINDS["padding"]


class TestAttention:
    """Nothing but what is forced, recorded or without a library goes to torch's functions."""

    @pytest.mark.parametrize("weights", [False, True])
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("batch_first", [False, True])
    def test_dropout_is_the_references(self, kind, weights, batch_first):
        """The bits that a seed stands for are defined, so one backend computes what another does."""
        _, ours = both("MultiheadAttention", 16, 4, dropout=0.5, batch_first=batch_first)
        x = torch.randn(2, 5, 16) if batch_first else torch.randn(5, 2, 16)
        assert backends_of(ours, x, x, x, need_weights=weights, **KINDS[kind]) == {"cpu"}
        results = []
        for backend in ("auto", "cpu", "reference"):
            torch.manual_seed(3)
            inputs = x.clone().requires_grad_()
            with fastseq.use_backend(backend):
                out, w = ours(inputs, inputs, inputs, need_weights=weights, **KINDS[kind])
                grads = torch.autograd.grad((out.sin() + 1).square().sum(), [inputs, *ours.parameters()])
            results.append([out, *([w] if weights else []), *grads])
        for found in zip(*results, strict=True):
            torch.testing.assert_close(found[0], found[2])
            torch.testing.assert_close(found[1], found[2])
        torch.manual_seed(4)
        assert not torch.equal(ours(x, x, x, need_weights=weights, **KINDS[kind])[0], results[0][0])

    @pytest.mark.parametrize("weights", [False, True])
    def test_rows_without_keys_are_zeros(self, weights):
        _, ours = both("MultiheadAttention", 16, 4, dropout=0.5, batch_first=True, bias=False)
        x, pad = torch.randn(2, 5, 16), torch.tensor([[True] * 5, [False] * 5])
        for training in (False, True):
            for gradients in (False, True):
                with torch.set_grad_enabled(gradients):
                    out, w = ours.train(training)(x, x, x, key_padding_mask=pad, need_weights=weights)
                assert not out[0].any() and out[1].isfinite().all() and (w is None or not w[0].any())

    def test_hooks_of_the_projection_run(self):
        _, ours = both("MultiheadAttention", 16, 4, batch_first=True)
        calls = []
        ours.out_proj.register_forward_hook(lambda *args: calls.append(1))
        x = torch.randn(2, 5, 16)
        for training in (False, True):
            ours.train(training)(x, x, x, need_weights=False)
        with torch.no_grad():
            ours.eval()(x, x, x)
        assert len(calls) == 3

    @pytest.mark.parametrize("function", [scaled_dot_product_attention, fastseq.functional.attention])
    def test_functions_with_dropout(self, function):
        q, k, v = (torch.randn(2, 4, 6, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
        mask = torch.ones(6, 6, dtype=torch.bool).tril()
        causal = "is_causal" if function is scaled_dot_product_attention else "causal"
        for options in ({}, {causal: True}, {"attn_mask": mask}, {"scale": -0.5, causal: True}):
            results = []
            for backend in ("auto", "cpu", "reference"):
                torch.manual_seed(3)
                with fastseq.use_backend(backend):
                    out = function(q, k, v, dropout_p=0.3, **options)
                    results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
            for found in zip(*results, strict=True):
                torch.testing.assert_close(found[0], found[2])
                torch.testing.assert_close(found[1], found[2])
            assert backends_of(function, q, k, v, dropout_p=0.3, **options) == {"cpu"}

    def test_gradient_of_a_bias(self):
        q, k, v = (torch.randn(2, 4, 6, 8, requires_grad=True) for _ in range(3))
        bias = torch.randn(1, 4, 6, 6, requires_grad=True)
        got = torch.autograd.grad(scaled_dot_product_attention(q, k, v, bias).square().sum(), (q, k, v, bias))
        want = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, bias).square().sum(), (q, k, v, bias))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)

    def test_forced(self):
        _, ours = both("MultiheadAttention", 16, 4, dropout=0.5, batch_first=True)
        x = torch.randn(2, 5, 16)
        for backend in ("torch", "reference", "cpu"):
            with fastseq.use_backend(backend):
                assert backends_of(ours, x, x, x) == {backend}

    def test_without_a_library(self, monkeypatch):
        theirs, ours = both("MultiheadAttention", 16, 4, batch_first=True)
        monkeypatch.setattr(backends.library, "reason", lambda: "there is no library")
        x = torch.randn(2, 5, 16)
        for options in ({}, {"need_weights": False}, KINDS["both"]):
            text = str(fastseq.explain(ours, x, x, x, **options))
            assert ": torch, there is no library" in text
            for a, b in zip(flat(ours(x, x, x, **options)), flat(theirs(x, x, x, **options)), strict=True):
                torch.testing.assert_close(a, b)
        q = torch.randn(2, 4, 6, 8)
        torch.testing.assert_close(scaled_dot_product_attention(q, q, q), F.scaled_dot_product_attention(q, q, q))
        assert backends_of(fastseq.functional.attention, q, q, q, softcap=5.0) == {"reference"}


def test_a_bool_mask_without_the_library_hides():
    """torch's products and softmax add the mask that they are given, bool or not."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 7, 8, requires_grad=True) for _ in range(3))
    mask = torch.rand(2, 1, 7, 7) < 0.5
    mask[..., 0] = True
    mask[1, :, 3] = False  # a query that sees no key
    call = prepared(q, k, v, Options(attn_mask=mask))
    out = torch_attention.attention(*call)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(out, expected)
    assert (out[1, :, 3] == 0).all()
    for own, theirs in zip(
        torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(own, theirs)
