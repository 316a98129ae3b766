"""What the recurrent modules have that torch.nn's do not: other cells, zoneout, weight dropout, blocks of units."""

from __future__ import annotations

import copy
import inspect
import io
import typing

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastseq
from fastseq.modules import keep_type
from support.recurrent import MODULES_OF_VARIANTS as VARIANTS

EVERY = ("LSTM", "GRU", "RNN", *VARIANTS)
PAIRS = ("LSTM", "CoupledLSTM", "PeepholeLSTM", "LayerNormLSTM")
T, B, I, H = 6, 3, 4, 6  # noqa: E741


def make(name, **options):
    torch.manual_seed(0)
    return getattr(fastseq, name)(I, H, dtype=torch.float64, **options)


def sequence(seed=1):
    return torch.randn(T, B, I, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def flat(result):
    output, states = result[:2]
    return [output, *([states] if isinstance(states, torch.Tensor) else states)]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_cell_walks_as_the_module(name):
    module, cell, x = make(name), make(f"{name}Cell"), sequence()
    cell.load_state_dict({key.removesuffix("_l0"): value for key, value in module.state_dict().items()})
    states, outputs = None, []
    for x_t in x:
        states = cell(x_t, states)
        outputs.append(states if isinstance(states, torch.Tensor) else states[0])
    output, *finals = flat(module(x))
    torch.testing.assert_close(torch.stack(outputs), output)
    for final, state in zip(finals, [states] if isinstance(states, torch.Tensor) else states, strict=True):
        torch.testing.assert_close(final[0], state)
    alone = cell(x[0, 0])
    torch.testing.assert_close(alone if isinstance(alone, torch.Tensor) else alone[0], outputs[0][0])


@pytest.mark.parametrize("name", VARIANTS)
def test_layouts_agree(name):
    """lengths, a PackedSequence in any order, batch_first, one sequence alone, a sequence in two parts."""
    module, x = make(name, bidirectional=True, num_layers=2), sequence()
    lengths = torch.tensor([4, 6, 2])
    output, *states = flat(module(x, lengths=lengths))
    packed, *packed_states = flat(module(pack_padded_sequence(x, lengths, enforce_sorted=False)))
    torch.testing.assert_close(pad_packed_sequence(packed)[0], output)
    for state, other in zip(states, packed_states, strict=True):
        torch.testing.assert_close(state, other)
    one = flat(module(x[:4, 0]))
    torch.testing.assert_close(one[0], output[:4, 0])
    torch.testing.assert_close(one[1], states[0][:, 0])
    module.batch_first = True
    torch.testing.assert_close(flat(module(x.transpose(0, 1), lengths=lengths))[0], output.transpose(0, 1))
    module = make(name)
    whole = flat(module(x))
    first, states = module(x[:2])
    torch.testing.assert_close(torch.cat((first, flat(module(x[2:], states))[0])), whole[0])


@pytest.mark.parametrize("name", VARIANTS)
def test_saved_and_loaded(name):
    module = make(name, num_heads=2, zoneout=0.25, num_layers=2)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert (other.num_heads, other.zoneout, repr(other)) == (2, 0.25, repr(module))
        other.eval(), module.eval()
        torch.testing.assert_close(flat(other(sequence())), flat(module(sequence())), rtol=0, atol=0)
    assert "zoneout=0.25, num_heads=2" in repr(module)
    assert [len(names) for names in module.all_weights] == [len(names) for names in module._all_weights]


@pytest.mark.parametrize("name", EVERY)
def test_every_parameter_gets_a_gradient(name):
    module = make(name, bidirectional=True, num_layers=2, num_heads=3, zoneout=0.3, weight_dropout=0.2)
    module(sequence())[0].square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in module.parameters())


def test_peepholes_of_zero_are_an_lstm():
    module, plain = make("PeepholeLSTM"), make("LSTM")
    plain.load_state_dict({key: value for key, value in module.state_dict().items() if "peephole" not in key})
    assert not torch.allclose(module(sequence())[0], plain(sequence())[0])
    nn.init.zeros_(module.weight_peephole_l0)
    torch.testing.assert_close(module(sequence())[0], plain(sequence())[0])


@pytest.mark.parametrize("name", ("LSTM", "GRU", "RNN", "CoupledLSTM", "PeepholeLSTM", "SLSTM"))
def test_heads_are_blocks_of_the_recurrent_weight(name):
    blocks, whole = make(name, num_heads=2, bidirectional=True), make(name, bidirectional=True)
    state = blocks.state_dict()
    for key, value in state.items():
        if key.startswith("weight_hh"):
            gates = value.chunk(value.shape[0] // H)
            state[key] = torch.cat([torch.block_diag(*gate.chunk(2)) for gate in gates])
    whole.load_state_dict(state)
    hx = [torch.rand(2, B, H, dtype=torch.float64) + 0.5 for _ in flat(whole(sequence()))[1:]]
    hx = hx[0] if len(hx) == 1 else tuple(hx)
    torch.testing.assert_close(flat(blocks(sequence(), hx)), flat(whole(sequence(), hx)))


@pytest.mark.parametrize("name", EVERY)
def test_zoneout(name):
    """All or nothing keeps or leaves the state; in training units are drawn, otherwise states mix."""
    x = sequence()
    states = [torch.rand(1, B, H, dtype=torch.float64) + 0.5 for _ in flat(make(name)(x))[1:]]
    hx = states[0] if len(states) == 1 else tuple(states)
    kept = make(name, zoneout=1.0)
    for mode in (True, False):
        torch.testing.assert_close(flat(kept.train(mode)(x, hx))[1], states[0])
    plain, half = make(name), make(name, zoneout=0.5)
    steps = [plain(x[:1], hx)[0], half.eval()(x[:1], hx)[0], half.train()(x[:1], hx)[0]]
    torch.testing.assert_close(steps[1], (steps[0] + states[0]) / 2)
    held = steps[2] == states[0]
    torch.testing.assert_close(steps[2], torch.where(held, states[0], steps[0]))
    assert held.any() and not held.all()
    torch.manual_seed(5)
    first = half(x, hx)[0]
    torch.manual_seed(5)
    assert torch.equal(first, half(x, hx)[0]) and not torch.equal(first, half(x, hx)[0])


@pytest.mark.parametrize("name", PAIRS)
def test_zoneout_of_c(name):
    hx = tuple(torch.rand(1, B, H, dtype=torch.float64) + 0.5 for _ in range(2))
    module, plain = make(name, zoneout=(0.0, 1.0)), make(name)
    output, (_, c_n), cells = module(sequence(), hx, return_cells=True)
    torch.testing.assert_close(c_n, hx[1])
    torch.testing.assert_close(cells[0], hx[1].expand(T, B, H))
    torch.testing.assert_close(output[:1], plain(sequence()[:1], hx)[0])  # h sees the c that was proposed


def test_weight_dropout():
    """Elements of w_hh, the same in every step; none at inference."""
    module, plain, x = make("GRU", weight_dropout=0.5), make("GRU"), sequence()
    torch.testing.assert_close(module.eval()(x)[0], plain(x)[0])
    torch.manual_seed(3)
    expected = make("GRU")
    torch.manual_seed(3)
    weight = nn.functional.dropout(expected.weight_hh_l0.detach(), 0.5)
    with torch.no_grad():
        expected.weight_hh_l0.copy_(weight)
    torch.manual_seed(3)
    output = module.train()(x)[0]
    torch.testing.assert_close(output, expected(x)[0])
    output.sum().backward()
    assert not module.weight_hh_l0.grad[weight == 0].any()
    all_gone = make("GRU", weight_dropout=1.0)(x)[0]
    nn.init.zeros_(plain.weight_hh_l0)
    torch.testing.assert_close(all_gone, plain(x)[0])


@pytest.mark.parametrize("name", ("LayerNormLSTM", "SLSTM"))
@pytest.mark.parametrize("training", (True, False))
def test_compiled(name, training):
    module = make(name, num_heads=2, zoneout=0.4, num_layers=2).train(training)
    call = torch.compile(module, fullgraph=True, backend="aot_eager")
    outputs = []
    for run in (call, module):
        torch.manual_seed(4)
        module.zero_grad()
        output = run(sequence())[0]
        output.square().sum().backward()
        outputs.append([output, *(parameter.grad.clone() for parameter in module.parameters())])
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("name", VARIANTS)
def test_autocast_and_double_backward(name):
    module, x = make(name).float(), sequence().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = module(x)[0]
        (grad,) = torch.autograd.grad(output.float().square().sum(), x, create_graph=True)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), module(x)[0], rtol=0.05, atol=0.05)
    assert torch.isfinite(torch.autograd.grad(grad.square().sum(), module.weight_hh_l0)[0]).all()


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("LSTM", {"num_heads": 4}, ValueError, r"num_heads must be a positive integer that divides hidden_size \(6\), got 4"),
        ("GRU", {"num_heads": 0}, ValueError, "got 0"),
        ("GRU", {"num_heads": 2.0}, ValueError, "got 2.0"),
        ("LSTM", {"num_heads": 2, "proj_size": 2}, ValueError, "proj_size and num_heads exclude each other"),
        ("LSTM", {"zoneout": 1.5}, ValueError, "zoneout must be a number in .* got 1.5"),
        ("LSTM", {"zoneout": "0.1"}, TypeError, "zoneout must be a number in .* got '0.1'"),
        ("LSTM", {"zoneout": (0.1, None)}, TypeError, "got .0.1, None."),
        ("RNN", {"weight_dropout": "0.1"}, TypeError, "weight_dropout must be a number, got '0.1'"),
        ("GRU", {"num_heads": "2"}, TypeError, "num_heads must be a positive integer"),
        ("GRU", {"recompute": "yes"}, TypeError, "recompute must be a bool, got 'yes'"),
        ("LSTM", {"zoneout": (0.1, 0.2, 0.3)}, ValueError, "got .0.1, 0.2, 0.3"),
        ("GRU", {"zoneout": (0.1, 0.2)}, ValueError, "zoneout must be a number in"),
        ("SLSTM", {"zoneout": (0.1, 0.2)}, ValueError, "zoneout must be a number in"),
        ("RNN", {"weight_dropout": -0.1}, ValueError, "weight_dropout must lie in .0, 1., got -0.1"),
        ("SLSTM", {"proj_size": 2}, ValueError, "proj_size argument is only supported for LSTM"),
        ("LayerNormGRU", {"proj_size": 2}, ValueError, "proj_size argument is only supported for LSTM"),
        ("PeepholeLSTM", {"nonlinearity": "tanh"}, TypeError, "unexpected keyword argument 'nonlinearity'"),
        ("CoupledLSTM", {"dropout": 2.0}, ValueError, "dropout should be a number in range"),
    ],
)
def test_wrong_options(name, options, error, message):
    with pytest.raises(error, match=message):
        make(name, **options)


@pytest.mark.parametrize(
    ("hx", "error", "message"),
    [
        (torch.zeros(1, B, H), TypeError, r"SLSTM: hx must be a tuple of Tensors \(h, c, n, m\)"),
        ((torch.zeros(1, B, H),) * 2, RuntimeError, "SLSTM expects 4 hidden states"),
        ((torch.zeros(1, B, H),) * 3 + (None,), AttributeError, "SLSTM: hx must be a tuple"),
        ((torch.zeros(B, H),) * 4, RuntimeError, "should also be 3-D"),
        ((torch.zeros(1, B, H),) * 3 + (torch.zeros(1, B, 2),), RuntimeError, r"Expected hidden\[3\] size"),
    ],
)
def test_wrong_states(hx, error, message):
    with pytest.raises(error, match=message):
        make("SLSTM").float()(sequence().float(), hx)


def test_a_cell_without_c_has_none_to_return():
    params = list(make("GRU").parameters())
    with pytest.raises(ValueError, match="return_cells needs a cell with a state c; gru has h alone"):
        fastseq.functional.recurrent("gru", sequence(), None, params, return_cells=True)
    with pytest.raises(ValueError, match="unknown cell 'lsmt'; accepted: rnn_tanh"):
        fastseq.functional.recurrent("lsmt", sequence(), None, params)
    with pytest.raises(ValueError, match="unknown cell 'lstmm'; accepted: .*did you mean 'lstm'"):
        fastseq.functional.recurrent_cell("lstmm", sequence()[0], None, params)
    with pytest.raises(TypeError, match=r"hx must be a tuple of Tensors \(h, c\), not Tensor"):
        fastseq.functional.lstm(sequence(), sequence(), params)
    with pytest.raises(TypeError, match="input must be a Tensor, not list"):
        fastseq.functional.gru([1.0], None, params)
    with pytest.raises(TypeError, match="weight_ih must be a Tensor, not str"):
        fastseq.functional.gru(sequence(), None, ["w", *params[1:]])
    with pytest.raises(TypeError, match="dropout must be a number, got '0.5'"):
        fastseq.functional.gru(sequence(), None, params, dropout="0.5")
    with pytest.raises(TypeError, match="recurrent.. got an unexpected keyword argument 'heads'; it is called num_heads here"):
        fastseq.functional.recurrent("gru", sequence(), None, params, heads=2)
    with pytest.raises(RuntimeError, match=r"gru has 1 states \(h\), got 2"):
        fastseq.functional.recurrent("gru", sequence(), (None, None), params)


def test_kept_types_have_the_options():
    module = keep_type.LSTM(I, H, zoneout=0.5, num_heads=2)
    assert isinstance(module, nn.LSTM) and module.weight_hh_l0.shape == (4 * H, H // 2)
    assert fastseq.convert(nn.LSTM(I, H)) is not None


PUBLIC = [(module, name) for module in (fastseq, keep_type) for name in module.__all__ if isinstance(getattr(module, name), type)
          and issubclass(getattr(module, name), nn.Module)]  # fmt: skip


@pytest.mark.parametrize("module, name", PUBLIC, ids=lambda value: getattr(value, "__name__", value))
def test_a_public_class_goes_by_its_name(module, name):
    """In repr, in help() and in Python's own errors, wherever its methods are written; and its signature is torch's."""
    kind = getattr(module, name)
    arguments = (8, 2) if name == "MultiheadAttention" else (8, 4)
    assert repr(kind(*arguments)).startswith(f"fastseq.{name}(")
    assert repr(type("Own", (kind,), {})(*arguments)).startswith("Own(")
    assert kind.__init__.__qualname__ == f"{name}.__init__" and kind.forward.__qualname__ == f"{name}.forward"
    assert kind.forward.__doc__
    with pytest.raises(TypeError, match=rf"^{name}\.__init__\(\) missing"):
        kind()
    with pytest.raises(TypeError, match=rf"^{name}\.forward\(\) takes from"):
        kind(*arguments)(*range(20))
    parameters = inspect.signature(kind).parameters
    assert {parameter.kind for parameter in parameters.values()} <= {
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    }
    if hasattr(nn, name) and hasattr(typing, "get_overloads"):
        constructor = getattr(nn, name).__init__
        theirs = list(inspect.signature([*typing.get_overloads(constructor), constructor][0]).parameters)[1:]
        assert [own for own in parameters if own in theirs] == theirs
        more = [parameter for own, parameter in parameters.items() if own not in theirs]
        assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in more)
