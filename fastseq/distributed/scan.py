"""First-order linear recurrences over a sequence that lies on several ranks, all of which work at the same time.

What a rank's steps make of the state before them is a h + b: each rank finds its a and b, all ranks exchange these pairs, once,
and each then knows the state before its first step. The backward pass is the same the other way: what a rank's steps make of the
gradient behind them is a' g + c, of which a' is known.

In the order of the walk, backwards from the last rank to the first, ``before`` and ``behind`` are the neighbors.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops import scan as ops
from ..ops._dispatch import transforming, wants_gradient
from ..ops.types import SCAN_CELLS, ScanSpec, scan_kind, state_dtype
from ._exchange import account, swap
from ._ranks import Own, Ranks, agree
from .recurrent import check_lengths

_SHUT = -1e4  # of what "min_gru" and "min_lstm" let in, of which nothing is left
_BACKWARDS = (
    "an RG-LRU that goes backwards cannot have resets on several ranks, nor lengths without hx: its first step of a row is "
    "another, and a rank has that of some rows"
)

__all__: list[str] = []  # what the modules of this package share


def own_lengths(lengths: Tensor, steps: int, ranks: Ranks) -> Tensor:
    """How many of this rank's ``steps`` belong to each row, from the lengths in the whole sequence, the same on every rank.

    Raises on every rank:
        RuntimeError: if they differ between ranks or do not lie in the whole sequence.
    """
    sizes = [size for (size,) in Own().settle(ranks, {"call": "lengths", "lengths": lengths.tolist()}, (steps,))]
    check_lengths(lengths, sum(sizes))
    return (lengths - sum(sizes[: ranks.rank])).clamp(0, steps)


def inputs_before(x: Tensor, given: Tensor, spec: ScanSpec, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """For layers that read the step before as well, of x [t, B, I]: what stands before this rank's first step of each row, and
    the last step of the whole sequence, [B, I] each, both in the order of the walk; ``given`` stands before the first of all."""
    own, (steps, batch) = Own(), x.shape[:2]
    facts: dict[str, object] = {"call": "inputs before", "x": f"[.., {batch}, {x.shape[2]}] {x.dtype}", "reverse": spec.reverse}
    facts["wants gradients"] = wants_gradient([x])
    sizes = [size for (size,) in own.settle(ranks, facts, (steps,))]
    before = sum(sizes[: ranks.rank])
    lengths = torch.full((batch,), steps, device=x.device) if spec.lengths is None else spec.lengths.long()
    last = x.sum(0)  # without a step zeros, of which all ranks have a gradient or none has
    if steps and spec.reverse:
        last = x[0]
        if spec.resets is not None and before:
            last = torch.where((spec.resets[0] & (lengths > 0))[:, None], 0, last)
    elif steps:
        last = x.gather(0, (lengths - 1).clamp(min=0)[None, :, None].expand(1, *x.shape[1:]))[0]
    every = _Everywhere.apply(torch.cat((last, (lengths > 0)[:, None].to(last.dtype)), -1), ranks)
    first = state = given
    passed = False
    for rank in range(ranks.size)[:: -1 if spec.reverse else 1]:
        passed |= rank == ranks.rank
        there = every[rank, :, -1:] != 0
        state = torch.where(there, every[rank, :, :-1], state)
        # also of those behind, so that every rank's backward pass comes by what all ranks exchange
        first = torch.where(there & (not passed), every[rank, :, :-1], first)
    return first, state


class _Everywhere(torch.autograd.Function):
    """[ranks, ..], of all ranks; the gradient of a rank's own is the sum of what they have for it."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return torch.stack(_gathered(ranks, own))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        agree(ctx.ranks, {"call": "backward of inputs before"})
        first, *others = swap(ctx.ranks, list(gradient), [gradient.shape[1:]] * ctx.ranks.size)
        return sum(others, first), None


def scan_across(
    b: Tensor, a: Tensor, gate: Tensor | None, vector: Tensor | None, initial: Tensor | None, spec: ScanSpec, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """``ops.scan`` of this rank's steps; ``spec.lengths`` and ``spec.resets`` are those of this rank's steps.

    ``initial``, the same on every rank, counts on the first rank, backwards on the last; the final state is that of the whole
    sequence, on every rank. Gradients are those of the sum of the ranks' losses: of b, a and gate a rank's own, whole; of vector
    and initial each rank's part.

    Raises on every rank, in the same words:
        RuntimeError: if the ranks disagree in what they give, or what one of them raised while it computed.
    """
    own = Own()
    facts: dict[str, object] = {}
    own.run(_check, b, a, gate, vector, initial, spec, ranks, facts)
    sizes = [size for (size,) in own.settle(ranks, facts, (b.shape[0],))]
    a, spec = ops.prepared(b, a, spec)
    return _Across.apply(ranks, sizes, spec, b, a, gate, vector, initial)


def _check(
    b: Tensor,
    a: Tensor,
    gate: Tensor | None,
    vector: Tensor | None,
    initial: Tensor | None,
    spec: ScanSpec,
    ranks: Ranks,
    facts: dict[str, object],
) -> None:
    if spec.cu_seqlens is not None:
        raise ValueError("cu_seqlens do not go with a sequence on several ranks: give resets, true at the first step of each")
    if spec.cell == "rg_lru" and spec.reverse and (spec.resets is not None or (spec.lengths is not None and initial is None)):
        raise NotImplementedError(_BACKWARDS)
    if transforming():
        raise RuntimeError("transforms of torch.func and forward-mode AD do not go through a sequence on several ranks")
    ranks.require(b, "b")
    given = {"b": b, "a": a, "gate": gate, "vector": vector, "initial": initial}
    facts |= {
        "call": f"scan ({spec.cell})",
        "b": f"[.., {', '.join(map(str, b.shape[1:]))}] {b.dtype} on {b.device.type}",
        "a": f"{a.dim()}-D {a.dtype}",
        "reverse": spec.reverse,
        "given": [name for name, tensor in given.items() if tensor is not None],
        "resets": spec.resets is not None,
        "lengths": spec.lengths is not None,
        "wants gradients": wants_gradient([tensor for tensor in given.values() if tensor is not None]),
    }


class _Part(NamedTuple):
    """What a rank's steps make of the state before them: a h + b, and of rows that are cut within, b alone."""

    a: Tensor  # [B, C], of blocks [B, C, 2, 2]
    b: Tensor  # [B, C], of blocks [B, C, 2]
    cut: Tensor  # bool [B]
    apart: Tensor  # bool [B]: a reset parts the last of these steps, in the order of the walk, from the next rank's

    def behind(self, state: Tensor) -> Tensor:
        """The state behind these steps, as the next rank begins with it."""
        through = torch.where(_spread(self.cut, state), 0, _product(self.a, state))
        return torch.where(_spread(self.apart, state), 0, self.b + through)

    def before(self, gradient: Tensor, of_steps: Tensor) -> tuple[Tensor, Tensor]:
        """From the gradient of what the next rank begins with, and what that of the state before is by the steps' outputs alone:
        that of the state behind these steps, and that of the state before them."""
        own = torch.where(_spread(self.apart, gradient), 0, gradient)
        turned = self.a.mH if self.a.dim() > gradient.dim() else self.a.conj()
        return own, of_steps + torch.where(_spread(self.cut, own), 0, _product(turned, own))


def _product(a: Tensor, h: Tensor) -> Tensor:
    """a h, of numbers or of blocks. Zeros stay zeros: a product of many coefficients may be infinite though none of them is."""
    if a.dim() == h.dim():
        return torch.where(h == 0, 0, a * h)
    h = h.unsqueeze(-2)
    return torch.where(h == 0, 0, a * h).sum(-1)


def _spread(mask: Tensor, like: Tensor) -> Tensor:
    return mask.reshape(mask.shape + (1,) * (like.dim() - mask.dim()))


class _Across(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ranks: Ranks,
        sizes: list[int],
        spec: ScanSpec,
        b: Tensor,
        a: Tensor,
        gate: Tensor | None,
        vector: Tensor | None,
        initial: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        own = Own()
        order = list(range(ranks.size))[:: -1 if spec.reverse else 1]
        place = order.index(ranks.rank)
        wide = state_dtype(b.dtype)
        zeros = b.new_zeros(b.shape[1:], dtype=wide)
        # here or further on: the one rank that gives initial its gradient, and on which an RG-LRU's first step is another
        begins = not any(sizes[rank] for rank in order[:place])
        start = initial if begins else zeros
        first = own.run(_forward_op, b, a, gate, vector, start, *spec)
        mine = own.run(_part, b, a, gate, vector, spec, None if first is None else first[1], sum(sizes[: ranks.rank]), begins)
        parts = _exchanged(ranks, mine, zeros, scan_kind(b, a) == "blocks")
        states = [zeros]
        for rank in order:
            states.append(parts[rank].behind(states[-1]))
        if not begins:
            start = states[place]
            first = own.run(_forward_op, b, a, gate, vector, start, *spec)
        own.settle(ranks, {"call": "scan, the end of its forward pass"})
        assert first is not None
        h = first[0]
        kept = b if SCAN_CELLS[spec.cell].reads_b else None
        ctx.save_for_backward(kept, a, gate, vector, h, start, *spec[:3], *[tensor for part in parts for tensor in part])
        ctx.rest = ranks, order, place, begins, begins and (b.shape[0] > 0 or place == ranks.size - 1), spec[3:], b.dtype
        ctx.set_materialize_grads(False)
        return h, states[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        ranks, order, place, begins, of_initial, flags, dtype = ctx.rest
        b, a, gate, vector, h, initial, resets, lengths, cu_seqlens, *flat = ctx.saved_tensors
        parts = [_Part(*flat[i : i + 4]) for i in range(0, len(flat), 4)]
        spec, needs, own = ScanSpec(resets, lengths, cu_seqlens, *flags), ctx.needs_input_grad[3:], Own()
        given = b, a, gate, vector, h, initial
        own.settle(ranks, {"call": f"backward of scan ({spec.cell})"})
        zeros = torch.zeros_like(parts[0].b)
        of_steps = None
        if dh is not None and not begins:
            of_steps = own.run(_backward_op, dh, None, *given, *spec, [False] * 4)
        message = torch.stack([zeros if of_steps is None else of_steps[4], zeros if dfinal is None else dfinal.to(zeros.dtype)])
        every = _gathered(ranks, message)
        gradient = sum((every[rank][1] for rank in range(1, ranks.size)), every[0][1])
        mine = zeros
        for rank in reversed(order[place:]):
            mine, gradient = parts[rank].before(gradient, every[rank][0])
        grads = own.run(_backward_op, dh, mine, *given, *spec, list(needs[:4]))
        own.settle(ranks, {"call": "scan, the end of its backward pass"})
        assert grads is not None
        db, da, dgate, dvector, dinitial = grads
        return (
            None,
            None,
            None,
            db.to(dtype) if needs[0] else None,
            da.sum_to_size(a.shape).to(a.dtype) if needs[1] else None,
            dgate.to(gate.dtype) if needs[2] else None,
            dvector.to(vector.dtype) if needs[3] else None,
            (dinitial if of_initial else zeros) if needs[4] else None,
        )


_forward_op = torch.ops.fastseq.scan.default
_backward_op = torch.ops.fastseq.scan_backward.default


def _part(
    b: Tensor, a: Tensor, gate: Tensor | None, vector: Tensor | None, spec: ScanSpec, final: Tensor, before: int, first: bool
) -> _Part:
    """Of this rank's steps. ``first``: they begin with the initial state, which ``final`` has in it already."""
    steps, batch = b.shape[:2]
    lengths = torch.full((batch,), steps, device=b.device) if spec.lengths is None else spec.lengths
    cut = apart = torch.zeros(batch, dtype=torch.bool, device=b.device)
    if spec.resets is not None and steps:
        inside = torch.arange(steps, device=b.device)[:, None] < lengths
        if spec.reverse:
            cut = (spec.resets & inside)[1:].any(0)
            apart = spec.resets[0] & inside[0] & bool(before)
        else:
            cut = (spec.resets & inside).any(0)
    blocks = scan_kind(b, a) == "blocks"
    if first:
        return _Part(final.new_zeros((*final.shape, 2) if blocks else final.shape), final, torch.ones_like(cut), apart)
    nothing = b.new_full((1,) * b.dim(), _SHUT if spec.cell in ("min_gru", "min_lstm") else 0).expand(b.shape)
    units = torch.eye(2, dtype=final.dtype, device=b.device) if blocks else [torch.ones_like(final)]
    columns = [_forward_op(nothing, a, gate, vector, unit.expand_as(final).contiguous(), *spec)[1] for unit in units]
    return _Part(torch.stack(columns, -1) if blocks else columns[0], final, cut, apart)


def _exchanged(ranks: Ranks, own: _Part | None, like: Tensor, blocks: bool) -> list[_Part]:
    """The parts of all ranks; zeros of one that failed."""
    batch = like.shape[0]
    if own is None:
        no = torch.zeros(batch, dtype=torch.bool, device=like.device)
        own = _Part(like.new_zeros((*like.shape, 2) if blocks else like.shape), like, no, no)
    flags = torch.stack((own.cut, own.apart)).to(like.dtype)
    every = _gathered(ranks, torch.cat((own.a.flatten(), own.b.flatten(), flags.flatten())))
    shapes = own.a.shape, own.b.shape, flags.shape
    found = []
    for message in every:
        parts = message.split([math.prod(shape) for shape in shapes])
        a, b, marks = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
        found.append(_Part(a, b, *[mark != 0 for mark in marks]))
    return found


def _gathered(ranks: Ranks, message: Tensor) -> list[Tensor]:
    """Of every rank. Complex numbers travel as pairs of real ones."""
    real = torch.view_as_real(message) if message.is_complex() else message
    real = real.resolve_conj().contiguous()
    account(real, ranks.size - 1)
    every = [torch.empty_like(real) for _ in range(ranks.size)]
    dist.all_gather(every, real, group=ranks.group)
    return [torch.view_as_complex(of) if message.is_complex() else of for of in every]
