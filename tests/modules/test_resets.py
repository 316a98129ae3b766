"""``resets`` and ``reset_to`` of the modules: every form of input gives what the padded one does; what does not fit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastseq
from fastseq.cells import CELLS
from support.recurrent import MODULES_OF_VARIANTS

KINDS = ("RNN", "LSTM", "GRU", *MODULES_OF_VARIANTS)
T, B, I, H = 6, 4, 3, 8  # noqa: E741
LENGTHS = torch.tensor([3, 6, 6, 1])


def made(kind: str, **options: Any) -> tuple[Any, Tensor, Tensor, Any, Any]:
    """A module of two layers in both directions, input, resets, hx and, alike for all rows, reset_to."""
    torch.manual_seed(0)
    module = getattr(fastseq, kind)(I, H, 2, bidirectional=True, dtype=torch.float64, **options)
    states = len(CELLS[module.cell].states)

    def of_batch(batch: int) -> Any:
        found = tuple(torch.rand(4, batch, H, dtype=torch.float64) + (i == 2) for i in range(states))
        return found if states > 1 else found[0]

    return module, torch.randn(T, B, I, dtype=torch.float64), torch.rand(T, B) < 0.4, of_batch(B), of_batch(1)


def flat(state: Any) -> list[Tensor]:
    return list(state) if isinstance(state, tuple) else [state]


def mapped(state: Any, change: Any) -> Any:
    return tuple(map(change, state)) if isinstance(state, tuple) else change(state)


@pytest.mark.parametrize("to", (False, True))
@pytest.mark.parametrize("kind", KINDS)
class TestForms:
    def test_segments_one_by_one(self, kind, to):
        module, x, resets, hx, reset_to = made(kind)
        x, resets, hx = x[:, :1], resets[:, :1], mapped(hx, lambda state: state[:, :1])
        resets[:] = torch.tensor([False, False, True, False, True, False])[:, None]
        y, finals = module(x, hx, resets=resets, reset_to=reset_to if to else None)
        again = reset_to if to else None
        if again is None:
            again = mapped(hx, torch.zeros_like)
            again = (*again[:3], again[3] - torch.inf) if kind == "SLSTM" else again
        backwards = (torch.arange(4) % 2 == 1)[:, None, None]
        parts, ends = [], []
        for begin, end in ((0, 2), (2, 4), (4, 6)):
            start = [
                torch.where(backwards, a if end == T else b, b if begin else a)
                for a, b in zip(flat(hx), flat(again), strict=True)
            ]
            part, states = module(x[begin:end], tuple(start) if isinstance(hx, tuple) else start[0])
            parts.append(part)
            ends.append(flat(states))
        torch.testing.assert_close(y, torch.cat(parts))
        torch.testing.assert_close(flat(finals), [torch.where(backwards, a, b) for a, b in zip(ends[0], ends[2], strict=True)])

    def test_batch_first_and_unbatched(self, kind, to):
        module, x, resets, hx, reset_to = made(kind)
        options = {"reset_to": reset_to} if to else {}
        y, finals = module(x, hx, resets=resets, **options)
        for train in (True, False):
            other = made(kind, batch_first=True)[0].train(train)
            with torch.set_grad_enabled(train):
                found, states = other(x.transpose(0, 1), hx, resets=resets.t(), **options)
            torch.testing.assert_close(found.transpose(0, 1), y)
            torch.testing.assert_close(states, finals)
            if to:
                options["reset_to"] = mapped(reset_to, lambda state: state[:, 0])
            for row in range(B):
                own = mapped(hx, lambda state, row=row: state[:, row])
                for each in (module, other):
                    found, states = each(x[:, row], own, resets=resets[:, row], **options)
                    torch.testing.assert_close(found, y[:, row])
                    torch.testing.assert_close(flat(states), [state[:, row] for state in flat(finals)])
            if to:
                options["reset_to"] = reset_to

    def test_lengths_and_packed(self, kind, to):
        module, x, resets, hx, reset_to = made(kind)
        every = mapped(reset_to, lambda state: state * torch.arange(1, B + 1)[:, None])  # one of each row
        for anew in (reset_to, every) if to else (None,):
            expected, finals = module(x, hx, lengths=LENGTHS, resets=resets, reset_to=anew)
            packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
            of_rows = pack_padded_sequence(resets, LENGTHS, enforce_sorted=False)
            for given in (of_rows, of_rows.data):
                y, states = module(packed, hx, resets=given, reset_to=anew)
                torch.testing.assert_close(pad_packed_sequence(y)[0], expected)
                torch.testing.assert_close(states, finals)
            alone = PackedSequence(packed.data, packed.batch_sizes)  # in its own order
            order = packed.sorted_indices
            own = None if anew is None else mapped(anew, lambda s, order=order: s if s.shape[1] == 1 else s[:, order])
            y, _ = module(alone, resets=of_rows.data, reset_to=own)
            torch.testing.assert_close(y.data, module(packed, resets=of_rows, reset_to=anew)[0].data)


@pytest.mark.parametrize("kind", ("LSTM", "GRU", "SLSTM"))
def test_a_learned_state(kind):
    """One parameter for all rows has the sum of their gradients, by every way that a call can go."""
    module, x, resets, hx, reset_to = made(kind)
    found = []
    for batch in (1, B):
        learned = mapped(reset_to, lambda s, batch=batch: s.expand(-1, batch, -1).clone().requires_grad_())
        y, _ = module(x, hx, resets=resets, reset_to=learned)
        y.pow(2).sum().backward()
        found.append([state.grad.sum(1, keepdim=True) for state in flat(learned)])
    torch.testing.assert_close(*found)
    assert all(grad.any() for grad in found[0][:2])


def test_zoneout_dropout_and_recompute():
    """In training, where what is drawn is drawn for a row as a whole."""
    module, x, resets, hx, _ = made("LSTM", zoneout=(0.3, 0.4), dropout=0.5)
    twin = copy.deepcopy(module)
    twin.recompute = True
    results = []
    for each in (module, twin):
        torch.manual_seed(5)
        y, _ = each(x, hx, resets=resets)
        results.append([y, *torch.autograd.grad(y.pow(2).sum(), list(each.parameters()))])
    torch.testing.assert_close(*results)
    whole = torch.zeros_like(resets)
    torch.manual_seed(5)
    assert not torch.allclose(module(x, hx, resets=whole)[0], results[0][0])


def test_converted_modules_have_them():
    model = nn.Sequential(nn.LSTM(I, H))
    fastseq.convert(model)
    module = model[0]
    x, resets = torch.randn(T, B, I), torch.zeros(T, B, dtype=torch.bool)
    resets[3] = True
    torch.testing.assert_close(module(x, resets=resets)[0][3:], module(x[3:])[0])


@pytest.mark.parametrize("kind", ("LSTM", "GRU"))
def test_bad_calls(kind):
    module, x, resets, hx, reset_to = made(kind)
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    others = pack_padded_sequence(resets, LENGTHS.flip(0), enforce_sorted=False)
    state, single = flat(reset_to)[0], kind == "GRU"
    form = "one Tensor h" if single else r"a tuple of Tensors \(h, c\)"
    wide = mapped(reset_to, lambda s: s.expand(-1, 3, -1))
    for train in (True, False):
        module.train(train)
        for args, given, error, message in (
            ((x,), {"resets": resets.float()}, RuntimeError, "resets must be bool, got torch.float32"),
            ((x,), {"resets": resets.t()}, RuntimeError, r"resets must be \[T, B\] = \[6, 4\], got \[4, 6\]"),
            ((x,), {"resets": resets[:, 0]}, RuntimeError, r"got \[6\]"),
            ((x,), {"resets": resets.to("meta")}, RuntimeError, "resets must be on cpu, where the sequence is, got meta"),
            ((x,), {"resets": resets.tolist()}, TypeError, "resets must be a Tensor, not list"),
            ((x,), {"resets": others}, TypeError, "resets must be a Tensor as the input is, got a PackedSequence"),
            ((x[:, 0],), {"resets": resets}, RuntimeError, "resets should be 1-D but got 2-D"),
            ((packed,), {"resets": resets}, RuntimeError, r"resets must be \[16\], got \[6, 4\]"),
            ((packed,), {"resets": others}, ValueError, "resets must be packed as the input is"),
            ((x,), {"reset_to": reset_to}, ValueError, "give resets too"),
            (
                (x,),
                {"resets": resets, "reset_to": (state,) * 3},
                TypeError,
                f"reset_to must be {form}, as hx is, got a tuple of 3",
            ),
            ((x,), {"resets": resets, "reset_to": [state, None]}, TypeError, f"reset_to must be {form}"),
            (
                (x,),
                {"resets": resets, "reset_to": mapped(reset_to, lambda s: s[:, 0])},
                RuntimeError,
                "should be 3-D here, got 2-D",
            ),
            ((x,), {"resets": resets, "reset_to": wide}, RuntimeError, "Expected reset_to's h for a batch of 4 or 1, got"),
            ((packed,), {"resets": packed.data[:, 0] > 0, "reset_to": wide}, RuntimeError, "for a batch of 4 or 1, got"),
            ((x,), {"resets": resets, "reset_to": mapped(reset_to, lambda s: s[:2])}, RuntimeError, r"of size \[4, B, 8\], got"),
            (
                (x,),
                {"resets": resets, "reset_to": mapped(reset_to, Tensor.float)},
                RuntimeError,
                r"reset_to's h dtype \(torch.float32",
            ),
            (
                (x,),
                {"cu_seqlens": torch.tensor([0, 6])},
                ValueError,
                r"Expected input to be 2D with cu_seqlens, \[N, I\], got 3D",
            ),
            ((packed,), {"cu_seqlens": torch.tensor([0, 6])}, ValueError, "got a PackedSequence and cu_seqlens"),
            ((x[:, 0],), {"cu_seqlens": torch.tensor([0, 6]), "lengths": LENGTHS}, ValueError, "got lengths and cu_seqlens"),
        ):
            with pytest.raises(error, match=message):
                module(*args, **given)
