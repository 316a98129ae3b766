"""RNN, LSTM and GRU give what torch.nn gives: parameters, outputs and gradients, over the grid of options."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import fastseq
from fastseq.modules import keep_type
from support.modules import (
    FP64,
    OPTIONS,
    B,
    H,
    I,
    T,
    assert_same,
    assert_same_together,
    both,
    initial,
    leaves,
    outcomes,
    random,
    run,
)

NAMES = ["RNN", "LSTM", "GRU"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def grid(name, **axes):
    """The module's name with every combination of the options."""
    for values in itertools.product(*axes.values()):
        options = dict(zip(axes, values, strict=True))
        yield pytest.param(name, options, id="-".join([name, *(f"{k}={v}" for k, v in options.items())]))


SHARED = dict(num_layers=[1, 2], bidirectional=[False, True], batch_first=[False, True], bias=[True, False])
GRID = [
    *grid("RNN", **SHARED, nonlinearity=["tanh", "relu"]),
    *grid("LSTM", **SHARED, proj_size=[0, 3]),
    *grid("GRU", **SHARED),
]


class TestConstruction:
    @pytest.mark.parametrize(("name", "options"), GRID)
    def test_same_seed_same_weights(self, name, options):
        torch.manual_seed(3)
        theirs = getattr(nn, name)(I, H, **options)
        after = torch.rand(1)
        torch.manual_seed(3)
        ours = getattr(fastseq, name)(I, H, **options)
        assert torch.equal(after, torch.rand(1))
        expected, actual = theirs.state_dict(), ours.state_dict()
        assert list(actual) == list(expected)
        for key, value in expected.items():
            assert torch.equal(actual[key], value), key
        theirs.load_state_dict(actual)
        ours.load_state_dict(expected)
        assert repr(ours) == f"fastseq.{theirs!r}"
        assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
        assert [[p.shape for p in layer] for layer in ours.all_weights] == [
            [p.shape for p in layer] for layer in theirs.all_weights
        ]

    @pytest.mark.parametrize("name", NAMES)
    def test_positional_arguments(self, name):
        arguments = [I, H, 2, False, True, 0.5, True]
        if name == "RNN":
            arguments.insert(3, "relu")
        theirs, ours = getattr(nn, name)(*arguments), getattr(fastseq, name)(*arguments)
        assert repr(ours) == f"fastseq.{theirs!r}"
        assert ours.mode == theirs.mode
        public = {k for k in vars(theirs) if not k.startswith("_")}
        assert public <= set(vars(ours))
        for key in public:
            assert getattr(ours, key) == getattr(theirs, key), key

    @pytest.mark.parametrize("name", NAMES)
    def test_device_and_dtype(self, name):
        ours = getattr(fastseq, name)(I, H, device="meta", dtype=torch.bfloat16)
        assert {(p.device.type, p.dtype) for p in ours.parameters()} == {("meta", torch.bfloat16)}
        output, _ = ours(torch.empty(T, B, I, device="meta", dtype=torch.bfloat16))
        assert (output.device.type, output.dtype, output.shape) == ("meta", torch.bfloat16, (T, B, H))
        ours = ours.to_empty(device="cpu")
        ours.reset_parameters()
        assert ours(torch.zeros(T, B, I, dtype=torch.bfloat16))[0].shape == (T, B, H)

    @pytest.mark.parametrize("name", NAMES)
    def test_dropout_without_effect_warns(self, name):
        with pytest.warns(UserWarning, match="non-zero dropout expects num_layers greater than 1"):
            getattr(fastseq, name)(I, H, dropout=0.5)

    @pytest.mark.parametrize("name", NAMES)
    def test_recompute_is_a_keyword_and_off(self, name):
        cls = getattr(fastseq, name)
        assert cls(I, H).recompute is False
        assert cls(I, H, recompute=True).recompute is True
        swapped = getattr(nn, name)(I, H)
        swapped.__class__ = cls
        assert swapped.recompute is False

    @pytest.mark.parametrize("name", NAMES)
    def test_flatten_parameters_is_torchs(self, name, monkeypatch):
        module = getattr(fastseq, name)(I, H)
        before = [p.data_ptr() for p in module.parameters()]
        module.flatten_parameters()
        assert [p.data_ptr() for p in module.parameters()] == before  # on a CPU
        laid_out = []
        monkeypatch.setattr(nn.RNNBase, "flatten_parameters", lambda self: laid_out.append(self))
        module.double()
        assert laid_out == [module]
        others = [getattr(fastseq, name)(I, H, num_heads=H)] + [fastseq.LayerNormLSTM(I, H)] * (name == "LSTM")
        del laid_out[:]  # of building them
        for other in others:
            other.double(), other.flatten_parameters()
        assert laid_out == []

    @pytest.mark.gpu
    @pytest.mark.parametrize("name", NAMES)
    def test_weights_are_in_one_buffer_on_a_gpu(self, name):
        module = getattr(fastseq, name)(I, H, num_layers=2).cuda()
        assert len({p.untyped_storage().data_ptr() for p in module.parameters()}) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # "RNN module weights are not part of single contiguous chunk of memory"
            module(torch.randn(3, 2, I, device="cuda"))[0].sum().backward()


class TestParity:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("name", "options"), GRID)
    def test_batched(self, name, options, dtype):
        theirs, ours = both(name, dtype=dtype, **options)
        input = random(*((B, T) if theirs.batch_first else (T, B)), I, dtype=dtype)
        assert_same_together(
            [
                outcomes(theirs, ours, input, case=" from zeros"),
                outcomes(theirs, ours, input, initial(theirs, dtype=dtype), case=" from hx"),
            ]
        )

    @pytest.mark.parametrize("batch_first", [False, True])
    @pytest.mark.parametrize(("name", "options"), OPTIONS)
    def test_unbatched(self, name, options, batch_first):
        theirs, ours = both(name, batch_first=batch_first, **options)
        assert_same(theirs, ours, random(T, I))
        assert_same(theirs, ours, random(T, I), initial(theirs, None))

    @pytest.mark.parametrize(
        ("lengths", "enforce_sorted"),
        [([6, 4, 1], True), ([6, 4, 1], False), ([3, 6, 2], False), ([5, 5, 5], True), ([5, 5, 5], False)],
        ids=str,
    )
    @pytest.mark.parametrize(("name", "options"), OPTIONS)
    def test_packed(self, name, options, lengths, enforce_sorted):
        theirs, ours = both(name, **options)
        packed = pack_padded_sequence(random(T, B, I), torch.tensor(lengths), enforce_sorted=enforce_sorted)
        assert_same(theirs, ours, packed)
        assert_same(theirs, ours, packed, initial(theirs))
        expected, actual = theirs(packed)[0], ours(packed)[0]
        assert isinstance(actual, PackedSequence)
        for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
            e, a = getattr(expected, field), getattr(actual, field)
            assert (e is None and a is None) or torch.equal(e, a), field

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(("name", "options"), OPTIONS)
    def test_packed_in_other_dtypes(self, name, options, dtype):
        theirs, ours = both(name, dtype=dtype, **options)
        packed = pack_sequence([random(n, I, dtype=dtype) for n in (2, 6, 3)], enforce_sorted=False)
        assert_same(theirs, ours, packed, initial(theirs, dtype=dtype))

    @pytest.mark.parametrize("name", NAMES)
    def test_sizes(self, name):
        calls = []
        for sizes in [(1, 1, 1, 2), (1, 3, 4, 5), (5, 1, 3, 7), (2, 2, 17, 33), (70, 2, 3, 2)]:
            time, batch, features, hidden = sizes
            theirs, ours = both(name, features, hidden, num_layers=2, bidirectional=True)
            hx = initial(theirs, batch)
            calls.append(outcomes(theirs, ours, random(time, batch, features), hx, case=f" of {sizes}"))
        assert_same_together(calls)

    @pytest.mark.parametrize("name", NAMES)
    def test_non_contiguous_and_offset(self, name):
        theirs, ours = both(name)
        input = random(B, 2 * T, I + 3).transpose(0, 1)[1::2, :, 2:-1]
        assert not input.is_contiguous()
        hx = initial(theirs, B + 2)
        cut = hx[:, 1:-1] if name != "LSTM" else tuple(s[:, 1:-1] for s in hx)
        expected, actual = theirs(input, cut), ours(input, cut)
        for e, a in zip(leaves(expected), leaves(actual), strict=True):
            torch.testing.assert_close(a, e)

    @pytest.mark.parametrize(("name", "options"), OPTIONS)
    def test_no_rows(self, name, options):
        theirs, ours = both(name, **options)
        expected, actual = theirs(torch.zeros(T, 0, I)), ours(torch.zeros(T, 0, I))
        assert [leaf.shape for leaf in leaves(actual)] == [leaf.shape for leaf in leaves(expected)]
        sum(leaf.sum() for leaf in leaves(actual)).backward()
        assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())

    @pytest.mark.parametrize("batch_first", [False, True])
    @pytest.mark.parametrize("name", NAMES)
    def test_dropout_with_the_same_seed(self, name, batch_first):
        theirs, ours = both(name, num_layers=3, dropout=0.4, bidirectional=True, batch_first=batch_first)
        input = random(*((B, T) if batch_first else (T, B)), I)
        assert_same(theirs, ours, input, seed=11)
        torch.manual_seed(0)
        first = ours(input)[0]
        assert not torch.equal(first, ours(input)[0])
        ours.eval()
        assert torch.equal(ours(input)[0], ours(input)[0])
        assert_same(theirs.eval(), ours, input)

    @pytest.mark.parametrize("name", NAMES)
    def test_dropout_of_everything(self, name):
        theirs, ours = both(name, num_layers=2, dropout=1.0)
        assert_same(theirs, ours, random(T, B, I), seed=0)

    @pytest.mark.parametrize("name", NAMES)
    def test_gradients_only_where_asked(self, name):
        theirs, ours = both(name, num_layers=2)
        input = random(T, B, I)
        for module in (theirs, ours):
            module.requires_grad_(False)
            module.weight_hh_l0.requires_grad_()
            module.bias_ih_l1.requires_grad_()
            module(input)[0].square().sum().backward()
        assert [n for n, p in ours.named_parameters() if p.grad is not None] == ["weight_hh_l0", "bias_ih_l1"]
        for n, p in theirs.named_parameters():
            torch.testing.assert_close(ours.get_parameter(n).grad, p.grad)

    @pytest.mark.parametrize("name", NAMES)
    def test_without_gradients(self, name):
        theirs, ours = both(name)
        input = random(T, B, I)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                expected, actual = theirs(input), ours(input)
            for e, a in zip(leaves(expected), leaves(actual), strict=True):
                assert not a.requires_grad and a.is_inference() == e.is_inference()
                torch.testing.assert_close(a, e)

    @pytest.mark.parametrize("name", NAMES)
    def test_nothing_is_written_to_the_arguments(self, name):
        _, ours = both(name, num_layers=2, bidirectional=True)
        input, hx = random(T, B, I), initial(ours)
        before = [leaf.clone() for leaf in leaves((input, hx))]
        results = leaves(ours(input, hx))
        for result in results:
            with torch.no_grad():
                result.zero_()
        assert all(torch.equal(a, b) for a, b in zip(leaves((input, hx)), before, strict=True))

    @pytest.mark.parametrize("name", NAMES)
    def test_same_bits_twice(self, name):
        _, ours = both(name, num_layers=2, bidirectional=True)
        input, hx = random(T, B, I), initial(ours)
        first, second = run(ours, input, hx), run(ours, input, hx)
        assert all(torch.equal(first[key], second[key]) for key in first)

    @pytest.mark.parametrize("name", NAMES)
    def test_moves_between_dtypes(self, name):
        theirs, ours = both(name)
        for dtype in (torch.float64, torch.bfloat16, torch.float32):
            theirs.to(dtype), ours.to(dtype)
            assert_same(theirs, ours, random(T, B, I, dtype=dtype))


class TestLengths:
    @pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
    @pytest.mark.parametrize("batch_first", [False, True])
    @pytest.mark.parametrize(("name", "options"), OPTIONS)
    def test_as_packed(self, name, options, batch_first, index):
        """Padded input with lengths gives what torch.nn gives for the same sequences packed."""
        lengths = torch.tensor([3, 6, 1])
        theirs, ours = both(name, batch_first=batch_first, **options)

        class Packing(nn.Module):
            def __init__(self, module):
                super().__init__()
                self.module = module

            def forward(self, input, hx):
                packed = pack_padded_sequence(input, lengths, batch_first, enforce_sorted=False)
                output, states = self.module(packed, hx)
                return pad_packed_sequence(output, batch_first, total_length=T)[0], states

        class Padding(nn.Module):
            def __init__(self, module):
                super().__init__()
                self.module = module

            def forward(self, input, hx):
                return self.module(input, hx, lengths=lengths.to(index))

        input = random(*((B, T) if batch_first else (T, B)), I)
        assert_same(Packing(theirs), Padding(ours), input)
        assert_same(Packing(theirs), Padding(ours), input, initial(theirs))

    @pytest.mark.parametrize(("name", "options"), OPTIONS)
    def test_zero_length_returns_the_initial_state(self, name, options):
        _, ours = both(name, **options)
        hx = initial(ours)
        output, states = ours(random(T, B, I), hx, lengths=torch.tensor([0, 4, 0]))
        assert not output[:, [0, 2]].any() and output[:4, 1].any() and not output[4:, 1].any()
        for given, final in zip(leaves(hx), leaves(states), strict=True):
            assert torch.equal(final[:, [0, 2]], given[:, [0, 2]])

    @pytest.mark.parametrize(("name", "options"), OPTIONS)
    def test_padding_is_never_read(self, name, options):
        """Whatever stands beyond a length, NaN too, reaches neither results nor gradients."""
        _, ours = both(name, **options)
        lengths = torch.tensor([3, 6, 1])
        input, hx = random(T, B, I), initial(ours)
        poisoned = input.masked_fill((torch.arange(T)[:, None] >= lengths)[..., None], float("nan"))
        clean, actual = run(ours, input, hx, lengths=lengths), run(ours, poisoned, hx, lengths=lengths)
        for key, value in clean.items():
            assert torch.equal(actual[key], value), key

    @pytest.mark.parametrize("name", NAMES)
    def test_unbatched(self, name):
        theirs, ours = both(name, bidirectional=True)
        input = random(T, I)
        output, states = ours(input, lengths=torch.tensor(4))
        expected, expected_states = theirs(input[:4])
        torch.testing.assert_close(output[:4], expected)
        assert not output[4:].any()
        for e, a in zip(leaves(expected_states), leaves(states), strict=True):
            torch.testing.assert_close(a, e)


class TestCells:
    """Cell states of every step, against torch's own cell run step by step."""

    def expected(self, theirs, input, hx):
        """[T, B, D*H] of one layer. torch.nn returns only the last: run it over every prefix."""
        lanes = []
        for lane in range(2 if theirs.bidirectional else 1):
            steps = []
            for t in range(input.size(0)):
                part = input[: t + 1] if lane == 0 else input[t:]
                steps.append(theirs(part, hx)[1][1][lane])
            lanes.append(torch.stack(steps))
        return torch.cat(lanes, -1)

    @pytest.mark.parametrize("options", [dict(), dict(bidirectional=True), dict(proj_size=3), dict(bias=False)], ids=str)
    def test_one_layer(self, options):
        theirs, ours = both("LSTM", dtype=torch.float64, **options)
        input, hx = random(T, B, I, dtype=torch.float64), initial(theirs, dtype=torch.float64)
        output, (h_n, c_n), cells = ours(input, hx, return_cells=True)
        assert cells.shape == (1, T, B, (2 if theirs.bidirectional else 1) * H)
        torch.testing.assert_close(cells[0], self.expected(theirs, input, hx), **FP64)
        torch.testing.assert_close(output, theirs(input, hx)[0], **FP64)
        assert torch.equal(cells[0, -1, :, :H], c_n[0])

    def test_of_every_layer_and_differentiable(self):
        _, ours = both("LSTM", num_layers=2, bidirectional=True, dtype=torch.float64)
        first, second = (fastseq.LSTM(i, H, bidirectional=True, dtype=torch.float64) for i in (I, 2 * H))
        for k, module in enumerate((first, second)):
            module.load_state_dict({n.replace(f"_l{k}", "_l0"): p for n, p in ours.state_dict().items() if f"_l{k}" in n})
        input = random(T, B, I, dtype=torch.float64)
        cells = ours(input, return_cells=True)[2]
        between, _, expected_0 = first(input, return_cells=True)
        expected_1 = second(between, return_cells=True)[2]
        assert torch.equal(cells, torch.cat([expected_0, expected_1]))
        cells.square().sum().backward()
        (expected_0.square().sum() + expected_1.square().sum()).backward()
        for k, module in enumerate((first, second)):
            for n, p in module.named_parameters():
                torch.testing.assert_close(ours.get_parameter(n.replace("_l0", f"_l{k}")).grad, p.grad)

    def test_layouts(self):
        _, ours = both("LSTM", num_layers=2, bidirectional=True)
        _, first = both("LSTM", num_layers=2, bidirectional=True, batch_first=True)
        input = random(T, B, I)
        output, _, cells = ours(input, return_cells=True)
        assert torch.equal(first(input.transpose(0, 1), return_cells=True)[2], cells.transpose(1, 2))
        torch.testing.assert_close(ours(input[:, 1], return_cells=True)[2], cells[:, :, 1])
        torch.testing.assert_close(first(input[:, 1], return_cells=True)[2], cells[:, :, 1])

    def test_lengths_and_packed(self):
        _, ours = both("LSTM", num_layers=2, bidirectional=True)
        input, lengths = random(T, B, I), torch.tensor([3, 6, 1])
        cells = ours(input, lengths=lengths, return_cells=True)[2]
        assert not cells[:, 3:, 0].any() and not cells[:, 1:, 2].any()
        packed = pack_padded_sequence(input, lengths, enforce_sorted=False)
        output, _, packed_cells = ours(packed, return_cells=True)
        for k in range(2):
            padded, _ = pad_packed_sequence(output._replace(data=packed_cells[k]))
            torch.testing.assert_close(padded, cells[k])


@pytest.mark.parametrize("kind", ["padded", "lengths", "packed"])
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_recompute_changes_nothing(name, options, kind):
    _, ours = both(name, **options)
    again = getattr(fastseq, name)(I, H, **options, recompute=True)
    again.load_state_dict(ours.state_dict())
    input, lengths = random(T, B, I), torch.tensor([3, 6, 1])
    keywords = {"lengths": lengths} if kind == "lengths" else {}
    if kind == "packed":
        input = pack_padded_sequence(input, lengths, enforce_sorted=False)
    hx = initial(ours)
    expected, actual = run(ours, input, hx, **keywords), run(again, input, hx, **keywords)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, msg=lambda m, n=key: f"{n}: {m}")


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_recompute_saves_memory(name):
    """Without the gates of every step, less than half of the bytes are held for the backward."""
    held = {}
    for recompute in (False, True):
        module = getattr(fastseq, name)(8, 64, recompute=recompute)
        storages = {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            results = module(random(50, 8, 8))
        held[recompute] = sum(storages.values()) - sum(4 * p.numel() for p in module.parameters())
        del results
    assert held[True] < held[False] / 2


class TestKeepType:
    @pytest.mark.parametrize(("name", "options"), OPTIONS)
    def test_is_both(self, name, options):
        theirs, ours = both(name, **options)
        cls = getattr(keep_type, name)
        kept = cls(I, H, **options)
        assert isinstance(kept, getattr(nn, name)) and isinstance(kept, getattr(fastseq, name))
        assert cls.forward is getattr(fastseq, name).forward
        assert cls.__init__ is getattr(fastseq, name).__init__
        assert repr(kept) == f"fastseq.{theirs!r}"
        kept.load_state_dict(theirs.state_dict())
        input, hx = random(T, B, I), initial(ours)
        expected, actual = run(ours, input, hx), run(kept, input, hx)
        assert all(torch.equal(actual[key], value) for key, value in expected.items())

    @pytest.mark.parametrize("name", NAMES)
    def test_recompute(self, name):
        assert getattr(keep_type, name)(I, H, recompute=True).recompute is True

    @pytest.mark.parametrize("namespace", [fastseq, keep_type], ids=["fastseq", "keep_type"])
    @pytest.mark.parametrize(("name", "options"), OPTIONS)
    def test_class_swap(self, name, options, namespace):
        theirs, _ = both(name, **options)
        input = random(T, B, I)
        expected = run(theirs, input)
        identities = [id(p) for p in theirs.parameters()]
        theirs.__class__ = getattr(namespace, name)
        actual = run(theirs, input)
        assert [id(p) for p in theirs.parameters()] == identities
        for key, value in expected.items():
            torch.testing.assert_close(actual[key], value)
