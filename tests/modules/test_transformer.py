"""TransformerEncoderLayer: all of it in one native call without gradients, torch's forward around our attention with them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastseq
from fastseq.testing import assert_close_to_truth
from support.modules import FP64

N, L, E, H, HIDDEN = 3, 7, 12, 3, 20  # H is odd: torch's fused path wants it even, ours does not mind
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def check(found: torch.Tensor, expected: torch.Tensor, truth: torch.Tensor) -> None:
    if found.dtype == torch.float64:  # torch's is the truth
        torch.testing.assert_close(found, expected, **FP64)
    else:
        assert_close_to_truth(found, expected, truth.detach())


def both(dtype: torch.dtype = torch.float64, **options) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    theirs = nn.TransformerEncoderLayer(E, H, HIDDEN, **{"dropout": 0.0, **options}).to(dtype).eval()
    with torch.no_grad():
        for norm in (theirs.norm1, theirs.norm2):
            norm.weight.normal_(1, 0.3)
            norm.bias.normal_()
        theirs.self_attn.in_proj_bias.normal_()
        theirs.self_attn.out_proj.bias.normal_()
    ours = copy.deepcopy(theirs)
    assert len(fastseq.convert(ours)) == 2
    assert type(ours) is fastseq.TransformerEncoderLayer and type(ours.self_attn) is fastseq.MultiheadAttention
    return theirs, ours


def source(batch_first: bool, dtype: torch.dtype = torch.float64, length: int = L) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(*((N, length) if batch_first else (length, N)), E).to(dtype)


def masks(kind: str, dtype: torch.dtype = torch.float64, length: int = L) -> dict:
    """Keyword arguments; every query sees a key."""
    torch.manual_seed(3)
    padding = torch.arange(length) >= torch.tensor([length, length - 2, 3])[:, None]
    gaps = torch.rand(N, length) < 0.4
    gaps[:, 0] = False
    hidden = torch.rand(length, length) < 0.4
    hidden[:, 0] = False
    per_head = torch.rand(N * H, length, length) < 0.4
    per_head[..., 0] = False
    causal = torch.ones(length, length, dtype=torch.bool).triu(1)

    def added(mask):
        return torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, -torch.inf)

    return {
        "none": {},
        "padding": {"src_key_padding_mask": padding},
        "padding added": {"src_key_padding_mask": added(padding)},
        "gaps": {"src_key_padding_mask": gaps},
        "gaps added": {"src_key_padding_mask": added(gaps)},
        "gaps, first row": {"src_key_padding_mask": (torch.arange(length) % 2 == 1) & (torch.arange(N) == 0)[:, None]},
        "numbers": {"src_key_padding_mask": torch.randn(N, length).to(dtype)},
        "mask": {"src_mask": hidden},
        "mask added": {"src_mask": torch.randn(length, length).to(dtype).masked_fill(hidden, -torch.inf)},
        "per head": {"src_mask": per_head},
        "causal": {"src_mask": causal, "is_causal": True},
        "causal and gaps": {"src_mask": causal, "is_causal": True, "src_key_padding_mask": gaps},
        "both": {"src_mask": hidden, "src_key_padding_mask": gaps},
        "both, suffix": {"src_mask": hidden, "src_key_padding_mask": padding},
        "both added": {"src_mask": added(hidden), "src_key_padding_mask": added(gaps)},
        "both numbers": {
            "src_mask": torch.randn(N * H, length, length).to(dtype),
            "src_key_padding_mask": torch.randn(N, length).to(dtype),
        },
    }[kind]


KINDS = ["none", "padding", "padding added", "gaps", "gaps added", "numbers", "mask", "mask added", "per head", "causal"]
KINDS += ["gaps, first row", "causal and gaps", "both", "both, suffix", "both added", "both numbers"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_eval_without_gradients(kind, norm_first, batch_first):
    for activation in ("relu", "gelu", nn.ReLU(), nn.GELU(), F.gelu):
        theirs, ours = both(norm_first=norm_first, batch_first=batch_first, activation=activation)
        x = source(batch_first)
        expected = theirs(x, **masks(kind))  # with gradients: torch's slow path, which has every mask
        with torch.no_grad():
            actual = ours(x, **masks(kind))
            assert ours._in_one_call(x, *arguments(kind)) is not None
        assert actual.shape == x.shape and actual.stride() == x.stride()
        torch.testing.assert_close(actual, expected.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch_first", [False, True])
def test_what_is_one_in_memory(batch_first):
    """Sequences, or steps, that are expanded: their rows do not lie one after another."""
    theirs, ours = both(batch_first=batch_first)
    x = source(batch_first)
    for alike in (x[:1].expand(x.shape), x[:, :1].expand(x.shape)):
        expected = theirs(alike), theirs.self_attn(alike, alike, alike, need_weights=False)[0]
        with torch.no_grad():
            found = ours(alike), ours.self_attn(alike, alike, alike, need_weights=False)[0]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other.detach(), rtol=1e-12, atol=1e-12)


def arguments(kind: str) -> tuple:
    given = masks(kind)
    return given.get("src_mask"), given.get("src_key_padding_mask"), given.get("is_causal", False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["none", "padding", "mask", "gaps added"])
def test_dtypes(kind, dtype):
    theirs, ours = both(dtype, batch_first=True, activation="gelu")
    x = source(True, dtype)
    truth = copy.deepcopy(theirs).double()(x.double(), **masks(kind)).detach()
    given = masks(kind, dtype)
    with torch.no_grad():
        check(ours(x, **given), theirs(x, **given), truth)


@pytest.mark.parametrize("shape", [(1, 1), (1, 33), (5, 1), (2, 130)])
def test_sizes(shape):
    theirs, ours = both(batch_first=True)
    x = torch.randn(*shape, E).double()
    expected = theirs(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours(x[0]), expected[0], rtol=1e-12, atol=1e-12)
        swapped = x.transpose(0, 1).contiguous().transpose(0, 1)  # time before batch in memory
        torch.testing.assert_close(ours(swapped), expected, rtol=1e-12, atol=1e-12)
        apart = torch.randn(*shape, 2 * E).double()
        apart[..., ::2] = x
        torch.testing.assert_close(ours(apart[..., ::2]), expected, rtol=1e-12, atol=1e-12)


def test_all_padding_gives_zeros_for_the_attention():
    _, ours = both(batch_first=True)
    x, padding = source(True), torch.zeros(N, L, dtype=torch.bool)
    padding[1] = True
    with torch.no_grad():
        attended = ours.self_attn.out_proj.bias.expand(L, E)
        middle = ours.norm1(x[1] + attended)
        expected = ours.norm2(middle + ours.linear2(F.relu(ours.linear1(middle))))
        torch.testing.assert_close(ours(x, src_key_padding_mask=padding)[1], expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_training(kind, batch_first):
    results = []
    for module in both(batch_first=batch_first):
        x = source(batch_first).requires_grad_()
        out = module.train()(x, **masks(kind))
        out.sin().sum().backward()
        results.append([out.detach(), x.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


class TestOtherWays:
    def way(self, ours: nn.Module, *given) -> bool:
        with torch.no_grad():
            return ours._in_one_call(*given) is not None

    def test_hooks_run(self):
        theirs, ours = both(batch_first=True)
        x = source(True)
        for name, _ in ours.named_modules():
            if name.startswith("dropout") or not name:
                continue
            calls, changed = [], copy.deepcopy(ours)
            changed.get_submodule(name).register_forward_hook(lambda *args, calls=calls: calls.append(1))
            with torch.no_grad():
                torch.testing.assert_close(changed(x), theirs(x), rtol=1e-12, atol=1e-12)
            assert calls, name

    @pytest.mark.parametrize(
        "options",
        [{"activation": torch.tanh}, {"activation": nn.GELU("tanh")}, {"bias": False}],
        ids=["tanh", "tanh's gelu", "no biases"],
    )
    def test_what_the_library_has_not(self, options):
        torch.manual_seed(1)
        theirs = nn.TransformerEncoderLayer(E, 2, HIDDEN, batch_first=True, **options).double().eval()
        ours, x = copy.deepcopy(theirs), source(True)
        fastseq.convert(ours)
        assert not self.way(ours, x, None, None, False)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x))

    def test_parts_of_another_kind(self):
        theirs, ours = both(batch_first=True)

        class Doubled(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        ours.linear1.__class__ = Doubled
        with torch.no_grad():
            assert not torch.allclose(ours(source(True)), theirs(source(True)))

    @pytest.mark.filterwarnings("ignore:.*torch.jit")
    def test_scripted_parts(self):
        theirs, ours = both()
        ours.linear1 = torch.jit.script(ours.linear1)
        with torch.no_grad():
            torch.testing.assert_close(ours(source(False)), theirs(source(False)), **FP64)

    @pytest.mark.parametrize("part", ["self_attn", "linear1", "linear2", "norm1", "norm2", "dropout", "dropout1", "dropout2"])
    @pytest.mark.parametrize("gradients", [False, True])
    def test_parts_whose_forward_is_replaced_on_the_instance(self, part, gradients):
        """As tools do that shard, quantize or look into a model without hooks."""
        results = []
        for module in both():
            own = module.get_submodule(part)

            def doubled(*given, forward=own.forward, **options):
                out = forward(*given, **options)
                return 2 * out if isinstance(out, torch.Tensor) else (2 * out[0], *out[1:])

            own.forward = doubled
            with torch.set_grad_enabled(gradients):
                results.append(module(source(False)).detach())
        torch.testing.assert_close(*results, **FP64)

    @pytest.mark.parametrize("part", ["dropout", "dropout1", "dropout2", "self_attn"])
    def test_dropout_alone_in_training(self, part):
        """Monte Carlo dropout: the model in eval mode, what draws in training."""
        theirs, ours = both()
        for module in (theirs, ours):
            alone = module.get_submodule(part).train()
            setattr(alone, "dropout" if part == "self_attn" else "p", 1.0)
        with torch.no_grad():
            torch.testing.assert_close(ours(source(False)), theirs(source(False)), **FP64)
            assert not self.way(ours, source(False), None, None, False)

    @pytest.mark.parametrize("part", ["dropout", "dropout1", "dropout2"])
    def test_another_module_in_place_of_dropout(self, part):
        class Doubled(nn.Module):
            def forward(self, x):
                return 2 * x

        theirs, ours = both()
        for module in (theirs, ours):
            setattr(module, part, Doubled())
        with torch.no_grad():
            torch.testing.assert_close(ours(source(False)), theirs(source(False)), **FP64)
            setattr(ours, part, nn.Identity().eval())
            assert self.way(ours, source(False), None, None, False)

    @pytest.mark.parametrize("block", ["_sa_block", "_ff_block"])
    @pytest.mark.parametrize("on", ["class", "instance"])
    @pytest.mark.parametrize("gradients", [False, True])
    def test_blocks_of_ones_own(self, block, on, gradients):
        class Doubled(nn.TransformerEncoderLayer):
            pass

        def doubled(self, *given, **options):
            return 2 * getattr(nn.TransformerEncoderLayer, block)(self, *given, **options)

        theirs, ours = both()
        for module in (theirs, ours):
            if on == "instance":
                setattr(module, block, doubled.__get__(module))
        if on == "class":
            setattr(Doubled, block, doubled)
            theirs.__class__ = Doubled
            ours = copy.deepcopy(theirs)
            assert len(fastseq.convert(ours)) == 2
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(ours(source(False)), theirs(source(False)), **FP64)

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("register", ["forward_pre", "forward", "full_backward_pre", "full_backward"])
    def test_hooks_of_every_module_run(self, register, training):
        seen = []
        install = getattr(nn.modules.module, f"register_module_{register}_hook")
        for module in both():
            module.train(training)
            handle = install(lambda module, *given: seen[-1].append(type(module)) if type(module) is nn.Linear else None)
            try:
                seen.append([])
                module(source(False).requires_grad_()).sum().backward()
            finally:
                handle.remove()
        assert seen[0] == seen[1] == [nn.Linear] * 2

    def test_wrong_arguments_as_torch(self):
        theirs, ours = both(torch.float32, batch_first=True)
        x = source(True, torch.float32)
        for given in (
            {"src_mask": torch.zeros(L, L + 1, dtype=torch.bool)},
            {"src_mask": torch.zeros(L, L, dtype=torch.int64)},
            {"src_key_padding_mask": torch.zeros(N, L + 1, dtype=torch.bool)},
            {"src_key_padding_mask": torch.zeros(N + 1, L, dtype=torch.bool)},
        ):
            with pytest.raises(Exception) as expected:  # noqa: PT011
                theirs(x, **given)
            with torch.no_grad(), pytest.raises(type(expected.value)):
                ours(x, **given)
        for wrong in (x[..., :-1], x.double(), x[None]):
            with pytest.raises((RuntimeError, AssertionError)), torch.no_grad():
                ours(wrong)

    def test_mixed_masks_warn_as_torch(self):
        theirs, ours = both(torch.float32, batch_first=True)
        given = {"src_mask": torch.zeros(L, L), "src_key_padding_mask": masks("gaps")["src_key_padding_mask"]}
        for module in (theirs, ours):
            with torch.no_grad(), pytest.warns(UserWarning, match="mismatched"):
                module(source(True, torch.float32), **given)

    def test_explained(self):
        _, ours = both(torch.float32, batch_first=True)
        assert fastseq.explain(ours, source(True, torch.float32)).backends == ["cpu"]

    def test_compiled_and_exported(self):
        theirs, ours = both(batch_first=True)
        x = source(True)
        with torch.no_grad():
            torch.testing.assert_close(torch.export.export(ours, (x,)).module()(x), theirs(x))


class TestLevels:
    """Rows and features enough for AMX, which multiplies fp32 in parts of bf16; none of them a multiple of a tile."""

    BATCH, STEPS, WIDTH, HIDDEN = 5, 33, 72, 100

    @pytest.fixture(autouse=True, params=["default", "avx2", "avx512", "avx512_bf16", "amx"])
    def level(self, request, monkeypatch):
        monkeypatch.setenv("FASTSEQ_CPU_LEVEL", request.param)
        monkeypatch.setenv("FASTSEQ_CPU_POISON", "1")

    def pair(self, dtype: torch.dtype, **options) -> tuple[nn.Module, nn.Module, torch.Tensor]:
        torch.manual_seed(1)
        theirs = nn.TransformerEncoderLayer(self.WIDTH, 3, self.HIDDEN, batch_first=True, **options).to(dtype).eval()
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_()
        ours = copy.deepcopy(theirs)
        fastseq.convert(ours)
        return theirs, ours, torch.randn(self.BATCH, self.STEPS, self.WIDTH).to(dtype)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("options", [{}, {"norm_first": True, "activation": "gelu"}], ids=["norm last", "norm first"])
    def test_layers(self, dtype, options):
        theirs, ours, x = self.pair(dtype, **options)
        mask = torch.rand(self.STEPS, self.STEPS) < 0.4
        mask.fill_diagonal_(False)
        truth = copy.deepcopy(theirs).double()(x.double(), mask).detach()
        with torch.no_grad():
            check(ours(x, mask), theirs(x, mask), truth)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("which", ["self", "memory", "distinct"])
    def test_attention(self, dtype, which):
        theirs, ours, x = self.pair(dtype)
        y, z = torch.randn(2, self.BATCH, 2 * self.STEPS, self.WIDTH).to(dtype)
        given = {"self": (x, x, x), "memory": (x, y, y), "distinct": (x, y, z)}[which]
        truth = copy.deepcopy(theirs.self_attn).double()(*(t.double() for t in given))
        with torch.no_grad():
            found, expected = ours.self_attn(*given), theirs.self_attn(*given)
        for results in zip(found, expected, truth, strict=True):
            check(*results)

    @pytest.mark.parametrize("scale", [1e-36, 1e18, torch.inf, torch.nan])
    def test_numbers_beyond_the_parts(self, scale):
        """What bf16's range does not hold is multiplied in fp32."""
        theirs, ours, x = self.pair(torch.float32)
        x[1, 2, 3] = scale
        x[2] *= 1e-36
        theirs.linear1.weight.data[4] *= 1e-36
        ours.load_state_dict(theirs.state_dict())
        with torch.no_grad():
            actual, expected = ours(x), theirs(x)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4, equal_nan=True)

    def test_weights_beyond_the_parts(self):
        theirs, ours, x = self.pair(torch.float32)
        theirs.self_attn.in_proj_weight.data[4, 5] = 3.4e38  # infinity, were it rounded to bf16
        x[..., 5] = 0
        ours.load_state_dict(theirs.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


class TestModule:
    def test_constructor(self):
        for options in (
            {},
            {"bias": False, "norm_first": True, "activation": "gelu", "batch_first": True, "layer_norm_eps": 1e-3},
        ):
            theirs, ours = nn.TransformerEncoderLayer(E, H, **options), fastseq.TransformerEncoderLayer(E, H, **options)
            assert list(ours.state_dict()) == list(theirs.state_dict()) and isinstance(ours, nn.TransformerEncoderLayer)
            assert type(ours.self_attn) is fastseq.MultiheadAttention
            ours.load_state_dict(theirs.state_dict())

    def test_copies_and_back(self):
        theirs, ours = both(batch_first=True)
        x = source(True)
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert type(twin) is fastseq.TransformerEncoderLayer
            with torch.no_grad():
                assert torch.equal(twin(x), ours(x))
        fastseq.revert(ours)
        assert type(ours) is nn.TransformerEncoderLayer and type(ours.self_attn) is nn.MultiheadAttention
        torch.testing.assert_close(ours(x), theirs(x))

    def test_traced_by_fx_as_a_leaf(self):
        theirs, ours = both(batch_first=True)
        graph = torch.fx.symbolic_trace(nn.Sequential(ours))
        assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "output"]
        with torch.no_grad():
            torch.testing.assert_close(graph(source(True)), theirs(source(True)), rtol=1e-12, atol=1e-12)
