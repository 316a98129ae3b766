"""Bad calls: the exception type torch raises for the same call, and a message that says what was given."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq

LAYERS = ["RNN", "LSTM", "GRU"]
CELLS = ["RNNCell", "LSTMCell", "GRUCell"]
T, B, I, H = 3, 2, 4, 5  # noqa: E741


def error_of(call):
    with pytest.raises(Exception) as caught:  # noqa: B017
        call()
    return caught.value


def assert_same_error(theirs, ours, *parts):
    """Both calls raise the same type, and our message holds every part."""
    expected, actual = error_of(theirs), error_of(ours)
    assert type(actual) is type(expected), f"{actual!r} where torch raises {expected!r}"
    for part in parts:
        assert part in str(actual), f"{part!r} is not in {str(actual)!r}"


def words(error):
    """What a message says: its numbers and words."""
    return re.findall(r"\w+", str(error))


class TestConstructor:
    @pytest.mark.parametrize("name", LAYERS)
    @pytest.mark.parametrize(
        ("arguments", "options"),
        [
            ((0, 5), {}),
            ((-1, 5), {}),
            ((4, 0), {}),
            ((4, -5), {}),
            ((4, 5, 0), {}),
            ((4, 5, -1), {}),
            ((4.0, 5), {}),
            (("4", 5), {}),
            ((4, 5.0), {}),
            ((4, 5, 1.5), {}),
            ((4, 5, "2"), {}),
            ((4, 5, 2), dict(dropout=1.5)),
            ((4, 5, 2), dict(dropout=-0.1)),
            ((4, 5, 2), dict(dropout=float("nan"))),
            ((4, 5, 2), dict(dropout=True)),
            ((4, 5, 2), dict(dropout="much")),
            ((4, 5, 2), dict(dropout=None)),
            ((4, 5), dict(bias=1)),
            ((4, 5), dict(bias="True")),
            ((4, 5), dict(batch_first=0)),
            ((4, 5), dict(proj_size=5)),
            ((4, 5), dict(proj_size=-1)),
            ((4, 5), dict(dtype=torch.int64)),
        ],
        ids=str,
    )
    def test_layers(self, name, arguments, options):
        theirs = error_of(lambda: getattr(nn, name)(*arguments, **options))
        ours = error_of(lambda: getattr(fastseq, name)(*arguments, **options))
        assert type(ours) is type(theirs)
        assert words(ours) == words(theirs)

    def test_nonlinearity(self):
        assert_same_error(
            lambda: nn.RNN(4, 5, nonlinearity="sigmoid"),
            lambda: fastseq.RNN(4, 5, nonlinearity="sigmoid"),
            "sigmoid",
            "tanh",
            "relu",
        )

    @pytest.mark.parametrize("name", [*LAYERS, *CELLS])
    @pytest.mark.parametrize(
        ("arguments", "options", "text"),
        [
            ((4, 5), dict(mode="GRU"), "an unexpected keyword argument 'mode'"),
            ((4, 5), dict(peepholes=True), "an unexpected keyword argument 'peepholes'"),
            ((4,), {}, "missing 1 required positional argument: 'hidden_size'"),
            ((), {}, "missing 2 required positional arguments: 'input_size' and 'hidden_size'"),
        ],
    )
    def test_signature(self, name, arguments, options, text):
        """Python's own errors, of the class that was called rather than of torch's base."""
        theirs, ours = (lambda: getattr(nn, name)(*arguments, **options)), (lambda: getattr(fastseq, name)(*arguments, **options))
        assert_same_error(theirs, ours, f"{name}.__init__() ", text)

    @pytest.mark.parametrize("name", ["RNN", "GRU"])
    def test_what_only_others_have(self, name):
        text = f"{name}.__init__() got an unexpected keyword argument 'heads'; it is called num_heads here"
        with pytest.raises(TypeError, match=re.escape(text)):
            getattr(fastseq, name)(4, 6, heads=2)
        with pytest.raises(TypeError, match="'zone_out'; did you mean 'zoneout'"):
            getattr(fastseq, name)(4, 6, zone_out=0.1)
        with pytest.raises(TypeError, match="LSTM.__init__.. got an unexpected keyword argument 'nonlinearity'"):
            fastseq.LSTM(4, 5, nonlinearity="tanh")

    @pytest.mark.parametrize("value", [0, 2])
    @pytest.mark.parametrize("name", ["RNN", "GRU"])
    def test_projection_is_for_lstm_only(self, name, value):
        with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM"):
            getattr(fastseq, name)(4, 5, proj_size=value)

    @pytest.mark.parametrize("name", CELLS)
    @pytest.mark.parametrize(
        ("arguments", "options"),
        [
            ((-1, 5), {}),
            ((4, -5), {}),
            ((4.0, 5), {}),
            ((4, 5), dict(dtype=torch.int64)),
        ],
        ids=str,
    )
    def test_cells(self, name, arguments, options):
        theirs = error_of(lambda: getattr(nn, name)(*arguments, **options))
        ours = error_of(lambda: getattr(fastseq, name)(*arguments, **options))
        assert type(ours) is type(theirs)
        assert words(ours) == words(theirs)

    def test_unknown_nonlinearity_of_a_cell_is_an_error_of_the_call(self):
        theirs, ours = nn.RNNCell(4, 5, nonlinearity="sigmoid"), fastseq.RNNCell(4, 5, nonlinearity="sigmoid")
        input = torch.zeros(2, 4)
        assert_same_error(lambda: theirs(input), lambda: ours(input), "sigmoid", "tanh", "relu")


def zeros(*size, **options):
    return torch.zeros(*size, **options)


def states(name, *size, **options):
    """hx of these sizes, as the module takes it."""
    return (zeros(*size, **options), zeros(*size, **options)) if "LSTM" in name else zeros(*size, **options)


# Input, size of hx or None, options of hx, and what the message must say.
BATCHED = {
    "one dimension": (zeros(I), None, {}, ["2D or 3D", "1D"]),
    "four dimensions": (zeros(1, T, B, I), None, {}, ["2D or 3D", "4D"]),
    "no steps": (zeros(0, B, I), None, {}, ["larger than 0"]),
    "no steps, unbatched": (zeros(0, I), None, {}, ["larger than 0"]),
    "input_size": (zeros(T, B, 3), None, {}, ["Expected 4", "got 3"]),
    "input_size, unbatched": (zeros(T, 3), None, {}, ["Expected 4", "got 3"]),
    "double input": (zeros(T, B, I).double(), None, {}, ["float64", "float32"]),
    "half input": (zeros(T, B, I).half(), None, {}, ["float16", "float32"]),
    "integer input": (zeros(T, B, I).long(), None, {}, ["int64", "float32"]),
    "bool input": (zeros(T, B, I).bool(), None, {}, ["bool", "float32"]),
    "complex input": (zeros(T, B, I).cfloat(), None, {}, ["complex64", "float32"]),
    "input on another device": (zeros(T, B, I, device="meta"), None, {}, ["same device", "meta", "cpu"]),
    "hx of another batch": (zeros(T, B, I), (1, 3, H), {}, ["(1, 2, 5)", "[1, 3, 5]"]),
    "hx of another size": (zeros(T, B, I), (1, B, 4), {}, ["(1, 2, 5)", "[1, 2, 4]"]),
    "hx of more layers": (zeros(T, B, I), (2, B, H), {}, ["(1, 2, 5)", "[2, 2, 5]"]),
    "hx without batch": (zeros(T, B, I), (1, H), {}, ["batched 3-D", "2-D"]),
    "hx with batch, unbatched input": (zeros(T, I), (1, B, H), {}, ["unbatched 2-D", "3-D"]),
    "hx of one dimension, unbatched": (zeros(T, I), (H,), {}, ["unbatched 2-D", "1-D"]),
    "hx of another size, unbatched": (zeros(T, I), (1, 4), {}, ["(1, 1, 5)", "[1, 1, 4]"]),
    "hx on another device": (zeros(T, B, I), (1, B, H), dict(device="meta"), ["same device", "meta", "cpu"]),
    "double hx": (zeros(T, B, I), (1, B, H), dict(dtype=torch.float64), ["float64", "float32"]),
    "bf16 hx": (zeros(T, B, I), (1, B, H), dict(dtype=torch.bfloat16), ["bfloat16", "float32"]),
    "integer hx": (zeros(T, B, I), (1, B, H), dict(dtype=torch.int64), ["int64", "float32"]),
}


@pytest.mark.parametrize("given", [None, [1.0], "x"], ids=str)
@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_no_tensor(name, given):
    theirs, ours = getattr(nn, name)(I, H), getattr(fastseq, name)(I, H)
    assert_same_error(lambda: theirs(given), lambda: ours(given), f"{name}: input must be a Tensor", type(given).__name__)


class TestLayers:
    @pytest.mark.parametrize("batch_first", [False, True])
    @pytest.mark.parametrize("case", BATCHED)
    @pytest.mark.parametrize("name", LAYERS)
    def test_padded(self, name, case, batch_first):
        input, size, options, parts = BATCHED[case]
        if batch_first and input.dim() == 3:
            input = input.transpose(0, 1)
        hx = None if size is None else states(name, *size, **options)
        theirs = getattr(nn, name)(I, H, batch_first=batch_first)
        ours = getattr(fastseq, name)(I, H, batch_first=batch_first)
        assert_same_error(lambda: theirs(input, hx), lambda: ours(input, hx), *parts)

    @pytest.mark.parametrize("name", LAYERS)
    def test_parameters_on_another_device(self, name):
        theirs, ours = getattr(nn, name)(I, H, device="meta"), getattr(fastseq, name)(I, H, device="meta")
        input = zeros(T, B, I)
        assert_same_error(lambda: theirs(input), lambda: ours(input), "same device", "meta", "cpu")

    @pytest.mark.parametrize("name", LAYERS)
    def test_parameters_of_mixed_dtypes(self, name):
        theirs, ours = getattr(nn, name)(I, H), getattr(fastseq, name)(I, H)
        for module in (theirs, ours):
            module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.detach().double())
        input = zeros(T, B, I)
        assert_same_error(lambda: theirs(input), lambda: ours(input), "float32", "float64")

    @pytest.mark.parametrize("hx", [(zeros(1, B, H),), (zeros(1, B, H),) * 2, [zeros(1, B, H)]], ids=["one", "two", "list"])
    @pytest.mark.parametrize("name", ["RNN", "GRU"])
    def test_hx_is_one_tensor(self, name, hx):
        theirs, ours = getattr(nn, name)(I, H), getattr(fastseq, name)(I, H)
        packed = pack_padded_sequence(zeros(T, B, I), torch.tensor([3, 2]))
        for input in (zeros(T, B, I), zeros(T, I), packed):
            assert_same_error(lambda x=input: theirs(x, hx), lambda x=input: ours(x, hx), "one Tensor", type(hx).__name__)

    def test_hx_is_two_tensors(self):
        ours = fastseq.LSTM(I, H)
        state = zeros(1, B, H)
        packed = pack_padded_sequence(zeros(T, B, I), torch.tensor([3, 2]))
        for input in (zeros(T, B, I), packed):
            # torch gets as far as hx[1]: IndexError, RuntimeError or TypeError, as the tensor's size has it.
            with pytest.raises(TypeError, match="tuple of Tensors.*not a Tensor"):
                ours(input, state)
            with pytest.raises(RuntimeError, match="two hidden states.*tuple of 3"):
                ours(input, (state,) * 3)
            with pytest.raises(RuntimeError, match="two hidden states.*tuple of 1"):
                ours(input, (state,))
            with pytest.raises(AttributeError, match="NoneType"):
                ours(input, (state, None))
            with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size \(1, 2, 5\), got \[1, 2, 4\]"):
                ours(input, (state, zeros(1, B, 4)))
        assert ours(zeros(T, B, I), [state, state])[0].shape == (T, B, H)

    @pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
    @pytest.mark.parametrize("steps", [1, T])
    @pytest.mark.parametrize("layers", [1, 2])
    @pytest.mark.parametrize("gradients", [False, True])
    @pytest.mark.parametrize("name", LAYERS)
    def test_states_of_more_or_fewer_layers(self, name, gradients, layers, steps, packed):
        """A kernel that is given the rows of a layer does not see that others are left over."""
        ours = getattr(fastseq, name)(I, H, layers, bidirectional=True)
        input = zeros(steps, B, I)
        input = pack_padded_sequence(input, torch.full((B,), steps)) if packed else input
        right = zeros(2 * layers, B, H)
        for wrong in (zeros(2 * layers + 1, B, H), zeros(4 * layers, B, H), zeros(2 * layers - 1, B, H)):
            for hx in ((wrong, wrong), (wrong, right), (right, wrong)) if name == "LSTM" else (wrong,):
                with torch.set_grad_enabled(gradients), pytest.raises(RuntimeError) as caught:
                    ours(input, hx)
                assert f"size ({2 * layers}, {B}, {H}), got [{len(wrong)}, {B}, {H}]" in str(caught.value)

    def test_projection_has_two_sizes_of_state(self):
        theirs, ours = nn.LSTM(I, H, proj_size=2), fastseq.LSTM(I, H, proj_size=2)
        input, right, wrong = zeros(T, B, I), zeros(1, B, 2), zeros(1, B, H)
        assert ours(input, (right, wrong))[1][1].shape == wrong.shape
        for hx, part in (
            ((wrong, wrong), "hidden[0] size (1, 2, 2)"),
            ((right, right), "hidden[1] size (1, 2, 5)"),
        ):
            assert_same_error(lambda h=hx: theirs(input, h), lambda h=hx: ours(input, h), part)

    @pytest.mark.parametrize("sorted_", [True, False])
    @pytest.mark.parametrize("name", LAYERS)
    def test_packed(self, name, sorted_):
        """torch lets some of these through or fails inside; the rule here is that of padded input."""
        ours = getattr(fastseq, name)(I, H)

        def packed(input):
            return pack_padded_sequence(input, torch.tensor([3, 2] if sorted_ else [2, 3]), enforce_sorted=sorted_)

        with pytest.raises(RuntimeError, match="Expected 4, got 3"):
            ours(packed(zeros(T, B, 3)))
        with pytest.raises(ValueError, match="float64.*float32"):
            ours(packed(zeros(T, B, I).double()))
        for batch in (1, 3):
            with pytest.raises(RuntimeError, match=rf"\(1, 2, 5\), got \[1, {batch}, 5\]"):
                ours(packed(zeros(T, B, I)), states(name, 1, batch, H))
        with pytest.raises(RuntimeError, match="3-D.*2-D"):
            ours(packed(zeros(T, B, I)), states(name, B, H))
        with pytest.raises(RuntimeError, match="float64"):
            ours(packed(zeros(T, B, I)), states(name, 1, B, H, dtype=torch.float64))

    @pytest.mark.parametrize("name", LAYERS)
    def test_input_is_no_tensor(self, name):
        theirs, ours = getattr(nn, name)(I, H), getattr(fastseq, name)(I, H)
        for input in (None, [[1.0]]):
            assert_same_error(lambda x=input: theirs(x), lambda x=input: ours(x))


class TestLengths:
    """torch has no lengths here: the types are those of pack_padded_sequence, and of its checks of sizes and
    devices.
    """

    @pytest.mark.parametrize(
        ("lengths", "error", "message"),
        [
            (torch.tensor([4, 2]), RuntimeError, r"\[0, 3\].*4"),
            (torch.tensor([-1, 2]), RuntimeError, r"\[0, 3\].*-1"),
            (torch.tensor([3.0, 2.0]), RuntimeError, "int64 or int32.*float32"),
            (torch.tensor([3.0, float("nan")]), RuntimeError, "int64 or int32.*float32"),
            (torch.tensor([True, False]), RuntimeError, "int64 or int32.*bool"),
            (torch.tensor([3]), RuntimeError, r"\[2\].*\[1\]"),
            (torch.tensor([[3, 2]]), RuntimeError, r"\[2\].*\[1, 2\]"),
            (torch.tensor(3), RuntimeError, r"\[2\].*\[\]"),
            (torch.tensor([3, 2], device="meta"), RuntimeError, "cpu.*meta"),
            ([3, 2], TypeError, "Tensor.*list"),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("name", LAYERS)
    def test_batched(self, name, lengths, error, message):
        with pytest.raises(error, match=message):
            getattr(fastseq, name)(I, H)(zeros(T, B, I), lengths=lengths)

    @pytest.mark.parametrize(
        ("lengths", "error", "message"),
        [
            (torch.tensor([2]), RuntimeError, "0-D.*1-D"),
            (torch.tensor(4), RuntimeError, r"\[0, 3\].*4"),
            (torch.tensor(2.0), RuntimeError, "int64 or int32"),
            (2, TypeError, "Tensor.*int"),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("name", LAYERS)
    def test_unbatched(self, name, lengths, error, message):
        with pytest.raises(error, match=message):
            getattr(fastseq, name)(I, H)(zeros(T, I), lengths=lengths)

    @pytest.mark.parametrize("name", LAYERS)
    def test_not_with_a_packed_sequence(self, name):
        lengths = torch.tensor([3, 2])
        packed = pack_padded_sequence(zeros(T, B, I), lengths)
        with pytest.raises(ValueError, match="PackedSequence and lengths"):
            getattr(fastseq, name)(I, H)(packed, lengths=lengths)

    @pytest.mark.parametrize("name", LAYERS)
    def test_beyond_torch_means_by_keyword(self, name):
        with pytest.raises(TypeError, match="positional"):
            getattr(fastseq, name)(I, H)(zeros(T, B, I), None, torch.tensor([3, 2]))


STEPS = {
    "no dimension": (zeros(()), None, {}, ["1D or 2D", "0D"]),
    "three dimensions": (zeros(1, B, I), None, {}, ["1D or 2D", "3D"]),
    "input_size": (zeros(B, 3), None, {}, ["got 3", "expected 4"]),
    "input_size, unbatched": (zeros(3), None, {}, ["got 3", "expected 4"]),
    "double input": (zeros(B, I).double(), None, {}, ["float64", "float32"]),
    "integer input": (zeros(B, I).long(), None, {}, ["int64"]),
    "input on another device": (zeros(B, I, device="meta"), None, {}, ["device", "meta", "cpu"]),
    "hx on another device": (zeros(B, I), (B, H), dict(device="meta"), ["device", "meta", "cpu"]),
    "double hx": (zeros(B, I), (B, H), dict(dtype=torch.float64), ["float64", "float32"]),
    "hx of another batch": (zeros(B, I), (3, H), {}, ["batch size 2", "hidden0 batch size 3"]),
    "hx of batch one": (zeros(B, I), (1, H), {}, ["batch size 2", "hidden0 batch size 1"]),
    "hx of another size": (zeros(B, I), (B, 4), {}, ["hidden0", "got 4", "expected 5"]),
    "hx without batch": (zeros(B, I), (H,), {}, ["hidden0", "2-D", "1-D"]),
    "hx with batch, unbatched input": (zeros(I), (B, H), {}, ["hidden0", "1-D", "2-D"]),
    "hx of three dimensions": (zeros(B, I), (1, B, H), {}, ["1D or 2D", "3D"]),
}


class TestCells:
    @pytest.mark.parametrize("case", STEPS)
    @pytest.mark.parametrize("name", CELLS)
    def test_one_step(self, name, case):
        input, size, options, parts = STEPS[case]
        hx = None if size is None else states(name, *size, **options)
        theirs, ours = getattr(nn, name)(I, H), getattr(fastseq, name)(I, H)
        assert_same_error(lambda: theirs(input, hx), lambda: ours(input, hx), *parts)

    @pytest.mark.parametrize("name", ["RNNCell", "GRUCell"])
    def test_hx_is_one_tensor(self, name):
        theirs, ours = getattr(nn, name)(I, H), getattr(fastseq, name)(I, H)
        hx = (zeros(B, H), zeros(B, H))
        input = zeros(B, I)
        assert_same_error(lambda: theirs(input, hx), lambda: ours(input, hx), "one Tensor", "tuple of 2")

    @pytest.mark.parametrize(
        "hx",
        [zeros(B, H), zeros(2, B, H), (zeros(B, H),), (zeros(B, H),) * 3],
        ids=["2-D", "3-D", "one", "three"],
    )
    def test_hx_is_two_tensors(self, hx):
        theirs, ours = nn.LSTMCell(I, H), fastseq.LSTMCell(I, H)
        assert_same_error(lambda: theirs(zeros(B, I), hx), lambda: ours(zeros(B, I), hx), "(h, c)")

    def test_second_state(self):
        theirs, ours = nn.LSTMCell(I, H), fastseq.LSTMCell(I, H)
        for c, part in ((zeros(B, 4), "hidden1"), (zeros(1, H), "hidden1"), (zeros(1, B, H), "hx[1]")):
            hx = (zeros(B, H), c)
            assert_same_error(lambda h=hx: theirs(zeros(B, I), h), lambda h=hx: ours(zeros(B, I), h), part)


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_nothing_is_half_written(name):
    """A refused call leaves arguments and parameters as they were, and the module usable."""
    module = getattr(fastseq, name)(I, H)
    before = [p.clone() for p in module.parameters()]
    input = torch.randn(*((T,) if name in LAYERS else ()), B, I)
    rank = (1,) if name in LAYERS else ()
    hx = states(name, *rank, B, H + 1)
    with pytest.raises(RuntimeError):
        module(input, hx)
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))
    assert all(p.grad is None for p in module.parameters())
    module(input)
