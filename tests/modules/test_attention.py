"""fastseq.MultiheadAttention beside torch.nn's: options, masks, weights, gradients, errors, and what differs on purpose."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

import fastseq
from fastseq.functional._attention_call import Call
from fastseq.modules import attention as module_under_test
from fastseq.testing import assert_close_to_truth
from support.modules import assert_as_good

N, L, S, E, H = 3, 5, 7, 6, 2
KDIM, VDIM = 4, 8

INPUTS = {  # which of query, key and value are the same tensor, and the sizes of key and value
    "self": "qqq",
    "memory": "qkk",
    "positions": "qqv",
    "distinct": "qkv",
    "sizes": "qKV",
}
MASKS = (
    *("none", "padding", "attn", "attn per head", "padding and attn", "padding and attn per head", "padding added"),
    *("attn added", "attn per head added", "both added", "padding, attn added", "padding added, attn"),
)
WEIGHTS = {"no weights": dict(need_weights=False), "averaged": {}, "per head": dict(average_attn_weights=False)}


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)


def both(dtype=torch.float64, **options):
    """torch's module and ours with the same weights; biases that are not 0."""
    torch.manual_seed(1)
    theirs = nn.MultiheadAttention(E, H, **options, dtype=dtype)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "bias" in name:
                parameter.normal_()
    ours = fastseq.MultiheadAttention(E, H, **options, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(kind="self", batch_first=True, batched=True, dtype=torch.float64):
    """query, key and value, the same object where ``kind`` says so."""
    sizes = {"q": (L, E), "k": (S, E), "v": (S, E), "K": (S, KDIM), "V": (S, VDIM)}
    if kind == "positions":
        sizes["v"] = (L, E)
    made = {}
    for letter in INPUTS[kind]:
        time, features = sizes[letter]
        shape = (time, features) if not batched else (N, time, features) if batch_first else (time, N, features)
        made.setdefault(letter, torch.randn(shape).to(dtype).requires_grad_())
    return [made[letter] for letter in INPUTS[kind]]


def masks(kind, length, keys, batched=True, dtype=torch.float64):
    """Keyword arguments; every query sees at least one key."""
    batch = N if batched else 1
    padding = torch.arange(keys) >= torch.tensor([keys, keys - 2, keys - 3])[:batch, None]
    shape = (batch * H, length, keys) if "per head" in kind else (length, keys)
    hidden = torch.rand(shape) < 0.4
    hidden[..., 0] = False
    given = {}
    if kind.startswith(("padding", "both")):
        added = "padding added" in kind or "both" in kind
        given["key_padding_mask"] = torch.randn(batch, keys).to(dtype).masked_fill(padding, -torch.inf) if added else padding
    if "attn" in kind or "both" in kind:
        added = "attn added" in kind or "per head added" in kind or "both" in kind
        given["attn_mask"] = torch.randn(shape).to(dtype).masked_fill(hidden, -torch.inf) if added else hidden
    if not batched and "key_padding_mask" in given:
        given["key_padding_mask"] = given["key_padding_mask"][0]
    return given


def run(module, arguments, keywords, case=""):
    """Results and gradients of one call, by name; cotangents are the same at every call."""
    dtype = module.out_proj.weight.dtype
    copies = {}
    for x in arguments:
        copies.setdefault(id(x), x.detach().to(dtype).requires_grad_())
    keywords = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in keywords.items()
    }
    module.zero_grad()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Support for mismatched")
        results = [r for r in module(*(copies[id(x)] for x in arguments), **keywords) if r is not None]
    generator = torch.Generator().manual_seed(7)
    torch.autograd.backward(results, [torch.randn(r.shape, generator=generator).to(r.dtype) for r in results])
    values = {f"result {i}{case}": r.detach() for i, r in enumerate(results)}
    values |= {f"grad of input {i}{case}": x.grad for i, x in enumerate(copies.values())}
    return values | {f"grad of {name}{case}": p.grad for name, p in module.named_parameters()}


def assert_alike(pair, calls):
    """Of several calls (arguments, keywords): ours is as near to the truth as torch's."""
    theirs, ours = pair
    exact = copy.deepcopy(theirs).double()
    outcomes = [{}, {}, {}]
    for number, call in enumerate(calls):
        for values, module in zip(outcomes, (ours, theirs, exact), strict=True):
            values |= run(module, *call, case=f" of call {number}")
    assert_as_good(*outcomes)


def calls(kind, batch_first, batched=True, dtype=torch.float64):
    for mask, weights in itertools.product(MASKS, WEIGHTS.values()):
        arguments = inputs(kind, batch_first, batched, dtype)
        length, keys = L, L if kind in ("self", "positions") else S
        yield arguments, masks(mask, length, keys, batched, dtype) | weights


class TestSameAsTorch:
    @pytest.mark.parametrize("kind", INPUTS)
    @pytest.mark.parametrize("batch_first", [False, True])
    @pytest.mark.parametrize(("add_bias_kv", "add_zero_attn"), [(False, False), (True, False), (False, True), (True, True)])
    def test_every_mask_in_fp64(self, kind, batch_first, add_bias_kv, add_zero_attn):
        options = dict(batch_first=batch_first, add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn)
        options |= dict(kdim=KDIM, vdim=VDIM) if kind == "sizes" else {}
        assert_alike(both(**options), calls(kind, batch_first))

    @pytest.mark.parametrize("kind", ["self", "memory", "sizes"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_every_mask_in_lower_precision(self, kind, dtype):
        options = dict(kdim=KDIM, vdim=VDIM) if kind == "sizes" else {}
        assert_alike(both(dtype, batch_first=True, **options), calls(kind, True, dtype=dtype))

    @pytest.mark.parametrize("options", [dict(), dict(bias=False), dict(batch_first=True, add_bias_kv=True, add_zero_attn=True)])
    def test_without_a_batch(self, options):
        assert_alike(both(**options), calls("self", False, batched=False))
        assert_alike(both(**options), calls("distinct", False, batched=False))

    def test_without_biases(self):
        for kind in ("self", "memory", "distinct"):
            assert_alike(both(bias=False, batch_first=True), calls(kind, True))

    def test_autocast(self):
        theirs, ours = both(torch.float32, batch_first=True, add_bias_kv=True)
        exact = copy.deepcopy(theirs).double()
        x = torch.randn(N, L, E)
        given = masks("padding, attn added", L, L, dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            truth = exact(*[x.double()] * 3, **{k: v if v.dtype == torch.bool else v.double() for k, v in given.items()})
            with torch.autocast("cpu", torch.bfloat16):
                expected, actual = theirs(x, x, x, **given), ours(x, x, x, **given)
        for a, e, t in zip(actual, expected, truth, strict=True):
            assert a.dtype == e.dtype == torch.bfloat16
            assert_close_to_truth(a, e, t)
        actual[0].float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in ours.parameters())

    @pytest.mark.parametrize(("length", "keys", "batch"), [(0, 3, 2), (3, 0, 2), (3, 4, 0), (0, 0, 1)])
    def test_nothing_to_attend(self, length, keys, batch):
        theirs, ours = both(batch_first=True)
        q, k = torch.randn(batch, length, E).double(), torch.randn(batch, keys, E).double()
        for actual, expected in zip(ours(q, k, k), theirs(q, k, k), strict=True):
            torch.testing.assert_close(actual, expected)

    def test_constructor_and_state(self):
        assert [(p.name, p.default) for p in inspect.signature(fastseq.MultiheadAttention).parameters.values()] == [
            (p.name, p.default) for p in inspect.signature(nn.MultiheadAttention).parameters.values()
        ]
        assert [*inspect.signature(fastseq.MultiheadAttention.forward).parameters.values()] == [
            parameter.replace(annotation=p.annotation)
            for parameter, p in zip(
                inspect.signature(nn.MultiheadAttention.forward).parameters.values(),
                inspect.signature(fastseq.MultiheadAttention.forward).parameters.values(),
                strict=True,
            )
        ]
        for options in (dict(), dict(kdim=KDIM, vdim=VDIM, add_bias_kv=True), dict(bias=False, dtype=torch.float64)):
            torch.manual_seed(3)
            theirs = nn.MultiheadAttention(E, H, **options)
            torch.manual_seed(3)
            ours = fastseq.MultiheadAttention(E, H, **options)
            assert repr(ours) == f"fastseq.{theirs!r}"
            assert list(ours.state_dict()) == list(theirs.state_dict())
            for name, value in theirs.state_dict().items():
                assert torch.equal(ours.state_dict()[name], value) and ours.state_dict()[name].dtype == value.dtype
            theirs.load_state_dict(ours.state_dict())
        x = torch.randn(N, L, E, device="meta")
        out, weights = fastseq.MultiheadAttention(E, H, device="meta", batch_first=True)(x, x, x)
        assert out.is_meta and out.shape == x.shape and weights.shape == (N, L, L)
        with pytest.raises(ValueError):
            fastseq.MultiheadAttention(0, H)
        with pytest.raises(AssertionError):
            fastseq.MultiheadAttention(5, 2)

    def test_copies(self):
        _, ours = both(batch_first=True)
        x = inputs()
        expected = ours(*x)
        for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            for a, e in zip(again(*x), expected, strict=True):
                assert torch.equal(a, e)


class Doubled(nn.Module):
    calls = 0

    def forward(self, parameter):
        Doubled.calls += 1
        return 2 * parameter


class TestParametersThatAreComputed:
    """They are no parameters of the module any more, yet of every call, with gradients and without."""

    @pytest.mark.parametrize("how", ["parametrized", "pruned"])
    @pytest.mark.parametrize("kind", ["self", "positions", "distinct"])
    @pytest.mark.parametrize("name", ["in_proj_weight", "in_proj_bias", "bias_k", "bias_v"])
    def test_as_torch(self, name, kind, how):
        theirs, ours = both(add_bias_kv=name in ("bias_k", "bias_v"), batch_first=True)
        for module in (theirs, ours):
            if how == "parametrized":
                nn.utils.parametrize.register_parametrization(module, name, Doubled())
            else:
                prune.l1_unstructured(module, name, 0.5)
        given = inputs(kind)
        expected = theirs(*given)
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                Doubled.calls = 0
                torch.testing.assert_close(ours(*given), expected)
                assert Doubled.calls == (how == "parametrized")  # what draws or iterates does it once

    @pytest.mark.parametrize("missing", ["bias_k", "bias_v"])
    def test_one_of_two_that_go_together(self, missing):
        for module in both(add_bias_kv=True, batch_first=True):
            setattr(module, missing, None)
            with pytest.raises(AssertionError, match="bias_k"):
                module(*inputs())


class TestHint:
    """is_causal: with it, attn_mask is the causal mask."""

    causal = torch.ones(L, S, dtype=torch.bool).triu(1)

    @pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
    @pytest.mark.parametrize("padding", ["none", "padding", "padding added"])
    @pytest.mark.parametrize("appended", [{}, dict(add_bias_kv=True, add_zero_attn=True)], ids=["", "appended"])
    def test_as_torch_with_the_mask(self, weights, padding, appended):
        theirs, ours = both(batch_first=True, **appended)
        arguments = inputs("memory")
        given = masks(padding, L, S) | dict(attn_mask=self.causal) | weights
        expected = run(theirs, arguments, given)
        actual = run(ours, arguments, given | dict(is_causal=True))
        assert_as_good(actual, expected, expected)

    def test_the_hint_alone_decides_where_it_does_in_torch(self):
        theirs, ours = both(batch_first=True)
        arguments, given = inputs("memory"), dict(attn_mask=torch.zeros(1, 1).bool(), is_causal=True, need_weights=False)
        expected = run(theirs, arguments, given)
        assert_as_good(run(ours, arguments, given), expected, expected)

    def test_no_mask_is_formed(self, monkeypatch):
        _, ours = both(batch_first=True)
        seen = spy(monkeypatch)
        x = torch.randn(N, L, E).double()
        padding = masks("padding", L, L)["key_padding_mask"]
        ours(x, x, x, padding, attn_mask=self.causal[:, :L], is_causal=True)
        (call,) = seen
        assert call.spec.mask.shape == (N, 1, 1, L) and call.spec.bias is None and (call.spec.left, call.spec.right) == (-1, 0)

    def test_needs_the_mask(self):
        for module in both(batch_first=True):
            with pytest.raises(RuntimeError, match="attn_mask"):
                module(*inputs(), is_causal=True)


def spy(monkeypatch):
    """The calls that leave the module where the CPU's library does not take the whole of it."""
    seen = []
    monkeypatch.setattr(fastseq.MultiheadAttention, "_in_one_call", lambda *arguments: None)

    def watched(op):
        def watching(q, k, v, spec, *rest):
            seen.append(Call(q, k, v, spec))
            return op(q, k, v, spec, *rest)

        return watching

    for name in ("attention", "attention_output", "attention_and_weights"):
        monkeypatch.setattr(module_under_test, name, watched(getattr(module_under_test, name)))
    return seen


class Products(TorchDispatchMode):
    """Counts matrix products that add their bias themselves."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket is torch.ops.aten.addmm
        return function(*args, **(kwargs or {}))


class TestCost:
    @pytest.mark.parametrize(("kind", "expected"), [("self", 2), ("memory", 3), ("positions", 3), ("distinct", 4), ("sizes", 4)])
    @pytest.mark.parametrize("batch_first", [False, True])
    def test_projections(self, kind, expected, batch_first):
        _, ours = both(batch_first=batch_first, **(dict(kdim=KDIM, vdim=VDIM) if kind == "sizes" else {}))
        with fastseq.use_backend("cpu"), torch.no_grad(), Products() as products:
            out, _ = ours(*inputs(kind, batch_first), need_weights=False)
        assert products.count == expected
        assert out.is_contiguous()

    @pytest.mark.parametrize("weights", [False, True])
    @pytest.mark.parametrize("batched", [False, True])
    @pytest.mark.parametrize("mask", ["none", "padding", "attn added", "padding, attn added", "both added"])
    @pytest.mark.parametrize("kind", ["self", "memory", "positions", "distinct", "sizes"])
    @pytest.mark.filterwarnings("ignore:Support for mismatched")
    def test_training_is_one_call_between_the_projections(self, monkeypatch, kind, mask, batched, weights):
        """Whatever the three inputs and the two masks are."""
        found, own = [], module_under_test.projected_attention

        def projected_attention(*args):
            found.append(own(*args))
            return found[-1]

        monkeypatch.setattr(module_under_test, "projected_attention", projected_attention)
        _, ours = both(torch.float32, **(dict(kdim=KDIM, vdim=VDIM) if kind == "sizes" else {}))
        arguments = inputs(kind, False, batched, torch.float32)
        keys = L if kind in ("self", "positions") else S
        ours(*arguments, **masks(mask, L, keys, batched, torch.float32), need_weights=weights)
        assert len(found) == 1 and found[0] is not None

    @pytest.mark.parametrize("wanted", ["out", "weights", "both"])
    @pytest.mark.parametrize("kind", ["self", "memory", "positions", "distinct"])
    @pytest.mark.parametrize("batch_first", [False, True])
    def test_gradients_in_batches(self, batch_first, kind, wanted):
        """is_grads_batched=True: all cotangents in one call give what each gives alone."""
        _, ours = both(torch.float32, batch_first=batch_first)
        arguments = inputs(kind, batch_first, True, torch.float32)
        leaves = [t.requires_grad_() for t in {id(t): t for t in arguments}.values()]
        out, weights = ours(*arguments, need_weights=True)
        results = {"out": [out], "weights": [weights], "both": [out, weights]}[wanted]
        many = [torch.randn(3, *result.shape) for result in results]
        options = dict(retain_graph=True, allow_unused=True)
        together = torch.autograd.grad(results, leaves, many, is_grads_batched=True, **options)
        alone = [torch.autograd.grad(results, leaves, [cotangent[i] for cotangent in many], **options) for i in range(3)]
        for i, found in enumerate(together):
            each = [grads[i] for grads in alone]
            if found is None:
                assert not torch.stack(each).any()
            else:
                torch.testing.assert_close(found, torch.stack(each))

    @pytest.mark.parametrize("mask", ["padding, attn added", "padding added, attn", "both added"])
    @pytest.mark.parametrize("kind", ["self", "memory"])
    @pytest.mark.filterwarnings("ignore:Support for mismatched")
    def test_inference_is_one_call_with_masks_of_two_types(self, kind, mask):
        """As models on nn.Transformer have them: padding is bool, what is causal is added."""
        _, ours = both(torch.float32)
        given = masks(mask, L, L if kind == "self" else S, dtype=torch.float32)
        arguments = [given.get("key_padding_mask"), True, given.get("attn_mask"), True, False]
        with torch.no_grad():
            assert ours._in_one_call(*inputs(kind, False, True, torch.float32), *arguments) is not None

    @pytest.mark.parametrize("batch_first", [False, True])
    def test_heads_are_views_of_the_projection(self, monkeypatch, batch_first):
        _, ours = both(batch_first=batch_first)
        seen = spy(monkeypatch)
        ours(*inputs("self", batch_first), need_weights=False)
        assert len({x.untyped_storage().data_ptr() for x in seen[0][:3]}) == 1
        assert seen[0].q.shape == (N, H, L, E // H) and seen[0].q.stride(-1) == 1

    @pytest.mark.parametrize(
        ("kind", "mask", "bias"),
        [
            ("padding", (N, 1, 1, L), None),
            ("attn", (1, 1, L, L), None),
            ("attn per head", (N, H, L, L), None),
            ("padding and attn", (1, 1, L, L), (N, 1, 1, L)),
            ("padding, attn added", (N, 1, 1, L), (1, 1, L, L)),
            ("padding added, attn", (1, 1, L, L), (N, 1, 1, L)),
            ("both added", None, (N, 1, L, L)),
        ],
    )
    def test_masks_are_not_multiplied_out(self, monkeypatch, kind, mask, bias):
        _, ours = both(batch_first=True)
        seen = spy(monkeypatch)
        run(ours, inputs(), masks(kind, L, L))
        spec = seen[0].spec
        assert tuple(None if t is None else tuple(t.shape) for t in (spec.mask, spec.bias)) == (mask, bias)


class TestOnPurpose:
    @pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
    @pytest.mark.parametrize("added", [False, True])
    def test_all_padding_gives_zeros(self, weights, added):
        theirs, ours = both(batch_first=True)
        padding = torch.zeros(N, L, dtype=torch.bool)
        padding[1] = True
        if added:
            padding = torch.zeros(N, L).double().masked_fill(padding, -torch.inf)
        values = run(ours, inputs(), dict(key_padding_mask=padding) | weights)
        assert all(value.isfinite().all() for value in values.values())
        assert torch.equal(values["result 0"][1], ours.out_proj.bias.detach().expand(L, E))
        if weights.get("need_weights", True):
            assert not values["result 1"][1].any() and values["result 1"][0].any()

    def test_hooks_of_the_output_projection_run(self):
        _, ours = both(batch_first=True)
        ours.out_proj.register_forward_hook(lambda module, args, output: output * 0)
        assert not ours(*inputs())[0].any()

    def test_replaced_forward_and_hooks_of_every_module_run(self):
        _, ours = both(batch_first=True)
        handle = nn.modules.module.register_module_forward_hook(lambda module, given, output: seen.append(module))
        seen: list[nn.Module] = []
        try:
            ours(*inputs())
        finally:
            handle.remove()
        assert ours.out_proj in seen
        ours.out_proj.forward = lambda x: 0 * x
        assert not ours(*inputs())[0].any()

    def test_fp32_masks_beside_other_dtypes(self):
        for dtype in (torch.bfloat16, torch.float64):
            _, ours = both(dtype, batch_first=True)
            x = torch.randn(N, L, E, dtype=dtype)
            mask = torch.zeros(L, L).masked_fill(torch.ones(L, L).triu(1).bool(), -torch.inf)
            assert torch.equal(ours(x, x, x, attn_mask=mask)[0], ours(x, x, x, attn_mask=mask.to(dtype))[0])


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("appended", [False, True])
def test_input_made_in_inference_mode(need_weights, appended):
    """Features of a frozen model, say: torch takes them where sequences come second."""
    theirs, ours = both(batch_first=True, add_zero_attn=appended)
    with torch.inference_mode():
        x = torch.randn(2, 5, E, dtype=torch.float64)
    for module in (theirs, ours):
        module(x, x, x, need_weights=need_weights)[0].sum().backward()
    for (name, expected), found in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, msg=name)


class TestDropout:
    def test_weights_are_those_that_were_used(self):
        _, ours = both(batch_first=True, dropout=0.5)
        x = torch.randn(N, 40, E).double()
        torch.manual_seed(5)
        out, weights = ours(x, x, x, average_attn_weights=False)
        torch.manual_seed(5)
        again, average = ours(x, x, x)
        other, _ = ours(x, x, x)
        assert torch.equal(out, again) and not torch.equal(out, other)
        torch.testing.assert_close(average, weights.mean(1))
        plain = ours.eval()(x, x, x, average_attn_weights=False)[1]
        ratio = weights / plain
        kept = ratio != 0
        torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 2.0))
        deviation = 0.5 / kept.numel() ** 0.5
        assert abs(kept.double().mean().item() - 0.5) < 5 * deviation
        v = torch.nn.functional.linear(x, ours.in_proj_weight[2 * E :], ours.in_proj_bias[2 * E :])
        heads = weights @ v.unflatten(-1, (H, -1)).transpose(1, 2)
        torch.testing.assert_close(out, ours.out_proj(heads.transpose(1, 2).flatten(2)))

    def test_of_one(self):
        for module in both(batch_first=True, dropout=1.0):
            out, weights = module(*inputs())
            assert not weights.any() and torch.equal(out, module.out_proj.bias.expand_as(out))

    def test_that_is_no_probability(self):
        for module in both(batch_first=True, dropout=1.5):
            with pytest.raises(ValueError, match="between 0 and 1"):
                module(*inputs())
            module.eval()(*inputs())


def given(*shape, dtype=torch.float64):
    return torch.zeros(shape, dtype=dtype)


WRONG = {
    "query 4-D": dict(query=given(1, N, L, E)),
    "query 1-D": dict(query=given(E)),
    "key 2-D": dict(key=given(S, E)),
    "value 2-D": dict(value=given(S, E)),
    "query features": dict(query=given(N, L, E + 1)),
    "key features": dict(key=given(N, S, E + 1), value=given(N, S, E + 1)),
    "value length": dict(value=given(N, S + 1, E)),
    "key batch": dict(key=given(N + 1, S, E), value=given(N + 1, S, E)),
    "query dtype": dict(query=given(N, L, E, dtype=torch.float32)),
    "padding uint8": dict(key_padding_mask=given(N, S, dtype=torch.uint8)),
    "padding int": dict(key_padding_mask=given(N, S, dtype=torch.int64)),
    "padding 1-D": dict(key_padding_mask=given(S, dtype=torch.bool)),
    "padding 3-D": dict(key_padding_mask=given(N, 1, S, dtype=torch.bool)),
    "padding length": dict(key_padding_mask=given(N, S + 1, dtype=torch.bool)),
    "padding batch": dict(key_padding_mask=given(1, S, dtype=torch.bool)),
    "attn uint8": dict(attn_mask=given(L, S, dtype=torch.uint8)),
    "attn int": dict(attn_mask=given(L, S, dtype=torch.int32)),
    "attn 1-D": dict(attn_mask=given(S, dtype=torch.bool)),
    "attn 4-D": dict(attn_mask=given(N, H, L, S, dtype=torch.bool)),
    "attn transposed": dict(attn_mask=given(S, L, dtype=torch.bool)),
    "attn of one query": dict(attn_mask=given(1, S, dtype=torch.bool)),
    "attn without heads": dict(attn_mask=given(N, L, S, dtype=torch.bool)),
    "attn fp16": dict(attn_mask=given(L, S, dtype=torch.float16)),
    "hint with a wrong mask": dict(attn_mask=given(S, S, dtype=torch.bool), is_causal=True),
}


class TestErrors:
    @pytest.mark.parametrize("changed", WRONG.values(), ids=WRONG)
    def test_type_as_torch(self, changed):
        arguments = dict(query=given(N, L, E), key=given(N, S, E), value=given(N, S, E)) | changed
        theirs, ours = both(batch_first=True)
        with pytest.raises((AssertionError, RuntimeError)) as expected:
            theirs(**arguments)
        with fastseq.use_backend("cuda"), pytest.raises(type(expected.value)) as caught:  # nothing runs before it
            ours(**arguments)
        assert "was forced" not in str(caught.value)

    @pytest.mark.parametrize(
        "changed",
        [
            dict(key=given(N, S, E)),
            dict(key_padding_mask=given(1, S, dtype=torch.bool)),
            dict(attn_mask=given(1, L, S, dtype=torch.bool)),
            dict(attn_mask=given(L, S + 1, dtype=torch.bool)),
        ],
    )
    def test_without_a_batch(self, changed):
        arguments = dict(query=given(L, E), key=given(S, E), value=given(S, E)) | changed
        theirs, ours = both()
        with pytest.raises((AssertionError, RuntimeError)) as expected:
            theirs(**arguments)
        with pytest.raises(type(expected.value)):
            ours(**arguments)

    def test_other_sizes_of_key_and_value(self):
        for arguments in ([given(N, L, E), given(N, S, KDIM), given(N, S - 1, VDIM)], [given(N, L, E)] * 3):
            theirs, ours = both(batch_first=True, kdim=KDIM, vdim=VDIM)
            with pytest.raises((AssertionError, RuntimeError)) as expected:
                theirs(*arguments)
            with pytest.raises(type(expected.value)):
                ours(*arguments)

    def test_mixed_masks_warn(self):
        for module in both(batch_first=True):
            with pytest.warns(UserWarning, match="mismatched key_padding_mask and attn_mask is deprecated"):
                module(*inputs(), **masks("padding, attn added", L, L))

    def test_mask_elsewhere(self):
        _, ours = both(batch_first=True)
        with pytest.raises(RuntimeError, match="attn_mask must be on the query's device cpu, got meta"):
            ours(*inputs(), attn_mask=torch.zeros(L, L, device="meta"))


class TestNested:
    lengths = (3, 5, 1)

    def sequences(self, dtype=torch.float64, features=E, lengths=lengths):
        return [torch.randn(length, features, dtype=dtype) for length in lengths]

    @pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
    def test_strided_as_torch(self, weights):
        theirs, ours = both(batch_first=True)
        x = torch.nested.nested_tensor(self.sequences())
        with torch.no_grad():
            expected, actual = theirs.eval()(x, x, x, **weights), ours.eval()(x, x, x, **weights)
        assert actual[0].is_nested and actual[0].layout == torch.strided
        for a, e in zip(actual[0].unbind(), expected[0].unbind(), strict=True):
            torch.testing.assert_close(a, e)
        if weights.get("need_weights", True):
            torch.testing.assert_close(actual[1], expected[1])
        else:
            assert actual[1] is None

    @pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
    @pytest.mark.parametrize("kind", ["self", "memory", "sizes"])
    def test_gradients_as_padded(self, layout, kind):
        _, ours = both(batch_first=True, **(dict(kdim=KDIM, vdim=VDIM) if kind == "sizes" else {}))
        lengths = {"q": self.lengths, "k": (2, 6, 4), "K": (2, 6, 4), "V": (2, 6, 4)}
        sizes = {"q": E, "k": E, "K": KDIM, "V": VDIM}
        given = {c: self.sequences(features=sizes[c], lengths=lengths[c]) for c in dict.fromkeys(INPUTS[kind])}
        keys = lengths[INPUTS[kind][1]]
        if layout == torch.jagged and kind == "sizes":
            offsets = torch.tensor([0, *itertools.accumulate(keys)])
            nested = {c: torch.nested.nested_tensor_from_jagged(torch.cat(x), offsets) for c, x in given.items() if c != "q"}
            nested["q"] = torch.nested.nested_tensor(given["q"], layout=layout)
            nested = {c: nested[c].detach().requires_grad_() for c in given}
        else:
            nested = {c: torch.nested.nested_tensor(x, layout=layout, requires_grad=True) for c, x in given.items()}
        out, weights = ours(*(nested[c] for c in INPUTS[kind]))
        assert out.is_nested and out.layout == layout
        padding = torch.arange(max(keys)) >= torch.tensor(keys)[:, None]
        padded = {c: nn.utils.rnn.pad_sequence(x, batch_first=True).requires_grad_() for c, x in given.items()}
        expected, expected_weights = ours(*(padded[c] for c in INPUTS[kind]), padding)
        valid = torch.arange(max(self.lengths)) < torch.tensor(self.lengths)[:, None]
        torch.testing.assert_close(out.values().view(-1, E), expected[valid])
        torch.testing.assert_close(weights, expected_weights * valid[..., None])
        factor = torch.randn_like(weights)
        actual = torch.autograd.grad(
            out.values().square().sum() + (weights * factor).sum(), [*nested.values(), *ours.parameters()]
        )
        reference = torch.autograd.grad(
            expected[valid].square().sum() + (expected_weights * factor * valid[..., None]).sum(),
            [*padded.values(), *ours.parameters()],
        )
        for c, a, e in zip(nested, actual, reference, strict=False):
            torch.testing.assert_close(a.to_padded_tensor(0.0), e, msg=lambda m, c=c: f"{c}: {m}")
        for a, e in zip(actual[len(nested) :], reference[len(nested) :], strict=True):
            torch.testing.assert_close(a, e)

    def test_jagged_results_go_with_their_inputs(self):
        _, ours = both(batch_first=True)
        x = torch.nested.nested_tensor(self.sequences(), layout=torch.jagged)
        out, _ = ours(x, x, x, need_weights=False)
        assert (x + out).values().shape == (sum(self.lengths), E)
        assert out._maybe_max_seqlen == max(self.lengths)  # else the next layer waits for the device to know it

    def test_dropout_is_that_of_the_weights(self):
        _, ours = both(batch_first=True, dropout=0.5)
        x = torch.nested.nested_tensor(self.sequences(), layout=torch.jagged)
        out, weights = ours(x, x, x, average_attn_weights=False)
        v = torch.nn.functional.linear(x.to_padded_tensor(0.0), ours.in_proj_weight[2 * E :], ours.in_proj_bias[2 * E :])
        heads = weights @ v.unflatten(-1, (H, -1)).transpose(1, 2)
        expected = ours.out_proj(heads.transpose(1, 2).flatten(2))
        for i, length in enumerate(self.lengths):
            torch.testing.assert_close(out[i], expected[i, :length])

    def test_refused(self):
        x = torch.nested.nested_tensor(self.sequences())
        padded = torch.zeros(3, 5, E).double()
        mask = torch.zeros(3, 5, dtype=torch.bool)
        for options, arguments, keywords in (
            (dict(batch_first=True), (x, x, x), dict(key_padding_mask=mask)),
            (dict(batch_first=True), (x, x, x), dict(attn_mask=mask)),
            (dict(batch_first=True), (x, padded, padded), {}),
            (dict(), (x, x, x), {}),
            (dict(batch_first=True, add_bias_kv=True), (x, x, x), {}),
            (dict(batch_first=True, add_zero_attn=True), (x, x, x), {}),
        ):
            for module in both(**options):
                with torch.no_grad(), pytest.raises(AssertionError, match="(?i)nested"):
                    module.eval()(*arguments, **keywords)


class TestTransforms:
    def test_vmap_and_per_sample_gradients(self):
        _, ours = both()
        parameters = dict(ours.named_parameters())
        x = torch.randn(4, L, E).double()

        def loss(parameters, x):
            out, weights = torch.func.functional_call(ours, parameters, (x, x, x))
            return out.square().sum() + weights.square().sum()

        actual = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        for i in range(len(x)):
            expected = torch.autograd.grad(loss(parameters, x[i]), list(parameters.values()))
            for name, e in zip(parameters, expected, strict=True):
                torch.testing.assert_close(actual[name][i], e, msg=lambda m, name=name: f"{name}: {m}")

    def test_gradcheck(self):
        _, ours = both(batch_first=True, add_bias_kv=True)
        names = [name for name, _ in ours.named_parameters()]
        padding = masks("padding", L, L)["key_padding_mask"]

        def call(x, *parameters):
            return torch.func.functional_call(ours, dict(zip(names, parameters, strict=True)), (x, x, x, padding))

        flat = [t.detach().requires_grad_() for t in (torch.randn(N, L, E).double(), *ours.parameters())]
        assert torch.autograd.gradcheck(call, flat, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, flat, fast_mode=True)


class TestCompiled:
    @pytest.fixture(autouse=True)
    def fresh_dynamo(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize(
        ("options", "mask", "weights"),
        [
            (dict(batch_first=True), "none", "no weights"),
            (dict(add_bias_kv=True, add_zero_attn=True), "padding and attn", "averaged"),
            (dict(batch_first=True, dropout=0.3), "both added", "per head"),
        ],
    )
    def test_one_graph_for_all_sizes(self, options, mask, weights):
        _, ours = both(torch.float32, **options)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=counter)
        frames = None
        for length in (5, 8):
            x = torch.randn(*((N, length) if ours.batch_first else (length, N)), E, requires_grad=True)
            given = masks(mask, length, length, dtype=torch.float32) | WEIGHTS[weights]
            outcomes = []
            for call in (compiled, ours):
                torch.manual_seed(2)
                # compiled, dropout is the op's; eager on a CPU it is torch's, which draws otherwise
                with fastseq.use_backend("reference" if call is ours and ours.dropout else None):
                    results = [r for r in call(x, x, x, **given) if r is not None]
                outcomes.append([*results, *torch.autograd.grad(sum(r.square().sum() for r in results), [x, *ours.parameters()])])
            for a, e in zip(*outcomes, strict=True):
                torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
            frames = frames or counter.frame_count
        assert counter.frame_count == frames, "compiled again for another size"

    def test_export(self):
        _, ours = both(torch.float32, batch_first=True)
        ours.eval()
        x, padding = torch.randn(N, L, E), torch.arange(L) >= torch.tensor([5, 3, 4])[:, None]
        batch, time = torch.export.Dim("batch", max=64), torch.export.Dim("time", max=64)
        sizes = [{0: batch, 1: time}] * 3 + [{0: batch, 1: time}]
        program = torch.export.export(ours, (x, x.clone(), x.clone(), padding), dynamic_shapes=sizes)
        x, padding = torch.randn(2, 9, E), torch.arange(9) >= torch.tensor([9, 4])[:, None]
        for a, e in zip(program.module()(x, x.clone(), x.clone(), padding), ours(x, x, x, padding), strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("place", range(5))
def test_no_tensor(place):
    """torch's type of error, which it raises from inside, and the name of the argument."""
    x = torch.zeros(3, 2, 8)
    given = [x, x, x, None, False, None]
    given[(0, 1, 2, 3, 5)[place]] = [1]
    name = ("query", "key", "value", "key_padding_mask", "attn_mask")[place]
    with pytest.raises(AttributeError, match=f"MultiheadAttention: {name} must be a Tensor, not a list of 1"):
        fastseq.MultiheadAttention(8, 2)(*given)


def test_sizes_that_are_no_ints():
    for arguments, name in ((("8", 2), "embed_dim"), ((8, "2"), "num_heads")):
        with pytest.raises(TypeError, match=f"{name} must be an int, got '[82]'"):
            fastseq.MultiheadAttention(*arguments)
