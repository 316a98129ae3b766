"""First-order linear recurrences: the specification, in plain PyTorch over time.

h_t = a_t h_{t-1} + b_t in every channel, where a_t is a real number, a complex one, or a block of 2 x 2. T time, B batch,
C channels, N steps of all sequences of a packed call, S its sequences; time-major.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.types import SCAN_CELLS, ScanSpec, state_dtype

Scan = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, ScanSpec], tuple[Tensor, Tensor]]


class Places(NamedTuple):
    """Of the steps [T, B] (packed: [N, 1]), in the order of the walk."""

    sequence: Tensor  # which state of the S or B a step belongs to, int64
    first: Tensor  # of its sequence
    last: Tensor
    inside: Tensor  # not beyond its sequence's length
    cut: Tensor  # from the step before by a reset
    lengths: Tensor  # of every sequence, int64


def places(like: Tensor, spec: ScanSpec) -> Places:
    """Of the steps of ``like``, [T, B, ..]."""
    steps, batch = like.shape[:2]
    t = torch.arange(steps, device=like.device)[:, None].expand(steps, batch)
    if spec.cu_seqlens is not None:
        cu = spec.cu_seqlens.long().clamp(0, steps)
        sequence = (torch.searchsorted(cu, t, right=True) - 1).clamp(0, max(0, cu.shape[0] - 2))
        lengths = cu.diff()
        begin, end = cu[sequence], cu[sequence + 1]
        inside = (t >= begin) & (t < end)
    else:
        sequence = torch.arange(batch, device=like.device).expand(steps, batch)
        lengths = torch.full((batch,), steps, device=like.device) if spec.lengths is None else spec.lengths.long().clamp(0, steps)
        begin, end = torch.zeros_like(t), lengths.expand(steps, batch)
        inside = t < end
    ends = (t == begin) & inside, (t == end - 1) & inside
    cut = torch.zeros_like(inside) if spec.resets is None else spec.resets
    if spec.reverse:  # a reset cuts between a step and the one before it in time, whichever way the walk goes
        cut, ends = torch.cat((cut[1:], torch.zeros_like(cut[:1]))), ends[::-1]
        cut = cut & ~ends[0]
    return Places(sequence, *ends, inside, cut, lengths)


def product(a: Tensor, h: Tensor) -> Tensor:
    """a h, of numbers or of blocks."""
    return (a * h.unsqueeze(-2)).sum(-1) if a.dim() > h.dim() else a * h


def _spread(mask: Tensor, like: Tensor) -> Tensor:
    return mask.reshape(mask.shape + (1,) * (like.dim() - mask.dim()))


def positive(x: Tensor) -> Tensor:
    """g of "Were RNNs all we needed?": x + 1/2 from 0 on, below it the sigmoid."""
    return torch.where(x >= 0, x + 0.5, x.sigmoid())


def _slope(x: Tensor) -> Tensor:
    """That of ``positive``."""
    return torch.where(x >= 0, 1, x.sigmoid() * (-x).sigmoid())


class Given(NamedTuple):
    """What a cell makes a step of, in the dtype of states; or the gradients of these but the last."""

    a: Tensor
    b: Tensor
    gate: Tensor | None
    vector: Tensor | None  # [C]; its gradient [T, B, C]
    alone: Tensor | None  # bool: there is no state before the step


TINY = 1e-30  # of 1 - a^2, whose root has a slope everywhere then


def _shares(forget: Tensor, input: Tensor) -> tuple[Tensor, Tensor]:
    """What two gates, of which these are the logits, have in their sum."""
    apart = F.logsigmoid(forget) - F.logsigmoid(input)
    return apart.sigmoid(), (-apart).sigmoid()


def _decay(given: Given) -> tuple[Tensor, Tensor, Tensor]:
    """Of the RG-LRU: log a, a and sqrt(1 - a^2), which is 1 where a state is the first."""
    assert given.vector is not None and given.alone is not None
    log = -given.vector * given.a.sigmoid()
    root = (-torch.expm1(2 * log)).clamp(min=TINY).sqrt()
    return log, log.exp(), torch.where(given.alone, 1, root)


def transition(given: Given, cell: str) -> tuple[Tensor, Tensor]:
    """Coefficient and addend of the recurrence.

    a and b are, of ``log``, the logarithm of the coefficient and the addend; of layers, logits of gates and what these let in:
    ``min_gru`` z and the candidate; ``min_lstm`` f, candidate, gate i; ``hgrn`` f and i, vector f's lower bound; ``rg_lru`` r, x,
    gate i, vector c softplus(Lambda); ``qrnn`` f and z; ``qrnn_ifo`` f, z, gate i.
    """
    a, b, gate, vector, _ = given
    if cell == "log":
        return a.exp(), b
    if cell == "min_gru":
        z = a.sigmoid()
        return 1 - z, z * positive(b)
    if cell == "qrnn":
        return a.sigmoid(), (-a).sigmoid() * b.tanh()
    if cell == "hgrn":
        assert vector is not None
        return vector + (1 - vector) * a.sigmoid(), (1 - vector) * (-a).sigmoid() * F.silu(b)
    if cell == "given":
        return a, b
    assert gate is not None
    if cell == "min_lstm":
        kept, let_in = _shares(a, gate)
        return kept, let_in * positive(b)
    if cell == "qrnn_ifo":
        return a.sigmoid(), gate.sigmoid() * b.tanh()
    _, coefficient, root = _decay(given)  # rg_lru
    return coefficient, root * gate.sigmoid() * b


def transition_backward(of_coefficient: Tensor, of_addend: Tensor, given: Given, cell: str) -> Given:
    """The gradients of what is given."""
    a, b, gate, vector, alone = given
    nothing = (None, None, None)
    if cell == "given":
        return Given(of_coefficient, of_addend, *nothing)
    if cell == "log":
        return Given(of_coefficient * a.exp(), of_addend, *nothing)
    s = a.sigmoid()
    slope = s * (-a).sigmoid()
    if cell == "min_gru":
        return Given((of_addend * positive(b) - of_coefficient) * slope, of_addend * s * _slope(b), *nothing)
    if cell == "qrnn":
        z = b.tanh()
        return Given((of_coefficient - of_addend * z) * slope, of_addend * (-a).sigmoid() * (1 - z * z), *nothing)
    if cell == "hgrn":
        assert vector is not None
        i = b.sigmoid()
        of_gate = of_coefficient - of_addend * F.silu(b)
        of_b = of_addend * (1 - vector) * (-a).sigmoid() * i * (1 + b * (1 - i))
        return Given(of_gate * (1 - vector) * slope, of_b, None, of_gate * (-a).sigmoid(), None)
    assert gate is not None
    if cell == "min_lstm":
        kept, let_in = _shares(a, gate)
        of_apart = (of_coefficient - of_addend * positive(b)) * kept * let_in
        return Given(of_apart * (-a).sigmoid(), of_addend * let_in * _slope(b), -of_apart * (-gate).sigmoid(), None, None)
    i = gate.sigmoid()
    if cell == "qrnn_ifo":
        z = b.tanh()
        return Given(of_coefficient * slope, of_addend * i * (1 - z * z), of_addend * z * i * (-gate).sigmoid(), None, None)
    assert alone is not None
    log, coefficient, root = _decay(given)
    through_root = torch.where(alone, 0, of_addend * i * b * coefficient / root)
    of_log = (of_coefficient - through_root) * coefficient
    of_gate = of_addend * root * b * i * (-gate).sigmoid()
    return Given(of_log * log * (-a).sigmoid(), of_addend * root * i, of_gate, -of_log * s, None)


def _used(tensor: Tensor, unused: Tensor) -> Tensor:
    """In the dtype of states; what is not used may be anything, and becomes a number."""
    return torch.where(_spread(unused, tensor), 0, tensor.to(state_dtype(tensor.dtype)))


def forward(
    b: Tensor, a: Tensor, gate: Tensor | None, vector: Tensor | None, initial: Tensor | None, spec: ScanSpec
) -> tuple[Tensor, Tensor]:
    """h as b, and the final states in the dtype of states. Differentiable."""
    at, wide, cell = places(b, spec), state_dtype(b.dtype), SCAN_CELLS[spec.cell]
    steps, states = b.shape[0], len(at.lengths)
    start = b.new_zeros((states, *b.shape[2:]), dtype=wide) if initial is None else initial.to(wide)
    h, every = start[at.sequence[0]] if steps and states else start[:0], [b[:0].to(wide)]
    cut = ~at.inside | (at.cut | at.first if initial is None else at.cut)
    for t in reversed(range(steps)) if spec.reverse else range(steps):
        beyond = ~at.inside[t]
        unused = beyond if cell.reads_b else cut[t]
        gate_t = None if gate is None else _used(gate[t], beyond)
        a_t = _used(a[t if a.shape[0] > 1 else 0], unused)
        a_t, b_t = transition(Given(a_t, _used(b[t], beyond), gate_t, vector, _spread(cut[t], h)), spec.cell)
        # not by a product: what is cut off may be infinite or NaN, and zero times that is no zero, here or in the gradient
        before = torch.where(_spread(at.first[t], h), start[at.sequence[t]], h)
        before = torch.where(_spread(cut[t], h), 0, before)
        h = torch.where(_spread(at.inside[t], h), b_t + product(a_t, before), h)
        every.append(h[None])
    if spec.reverse:
        every = every[:1] + every[:0:-1]
    h = torch.cat(every)
    final = start
    if steps and states:
        if spec.cu_seqlens is None:
            final = every[1 if spec.reverse else -1][0]
        else:
            ends = spec.cu_seqlens.long().clamp(0, steps)
            chosen = h[(ends[:-1] if spec.reverse else ends[1:] - 1).clamp(0, steps - 1), 0]
            final = torch.where(_spread(at.lengths > 0, start), chosen, start)
    return torch.where(_spread(at.inside, h), h, 0).to(b.dtype), final


def backward(
    dh: Tensor | None,
    dfinal: Tensor | None,
    b: Tensor | None,
    a: Tensor,
    gate: Tensor | None,
    vector: Tensor | None,
    h: Tensor,
    initial: Tensor | None,
    spec: ScanSpec,
    scan: Scan = forward,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """Gradients of b, of a (of every row; summed over its steps if a has one), gate, vector and the initial states, in the dtype
    of states.

    The same scan the other way: lambda_t = dh_t + a*_{t+1} lambda_{t+1}, db = lambda, da_t = lambda_t h*_{t-1} and
    dh_0 = a*_1 lambda_1, where * is the conjugate, or the transpose of a block.

    Args:
        b: of cells that read it, else None.
        scan: how to scan; with a differentiable one the result is differentiable.
    """
    at, wide, cell = places(h, spec), state_dtype(h.dtype), SCAN_CELLS[spec.cell]
    blocks, steps, back = a.dim() > h.dim(), h.shape[0], 1 if spec.reverse else -1
    g = torch.zeros_like(h, dtype=wide) if dh is None else dh.to(wide)
    if dfinal is not None and steps and len(at.lengths):
        g = torch.where(_spread(at.last, g), g + dfinal[at.sequence], g)
    alone = ~at.inside | (at.cut if initial is not None else at.cut | at.first)
    constant = a.shape[0] == 1 and steps != 1
    a = a.to(state_dtype(a.dtype)) if constant else _used(a, ~at.inside if cell.reads_b else alone)
    b = a if b is None else _used(b, ~at.inside)
    given = Given(a, b, None if gate is None else _used(gate, ~at.inside), vector, _spread(alone, h))
    coefficient, _ = transition(given, spec.cell)
    adjoint = (
        coefficient.mT if blocks else coefficient.conj_physical()
    )  # programs of torch.compile miss the lazy kind within an op
    following = adjoint if constant else adjoint.roll(back, 0)
    reversed_spec = spec._replace(cell="given", reverse=not spec.reverse)
    of_b, _ = scan(g, following, None, None, None, reversed_spec)
    before = h.to(wide).roll(-back, 0)
    if initial is not None and steps and len(at.lengths):
        before = torch.where(_spread(at.first, before), initial.to(wide)[at.sequence], before)
    before = torch.where(_spread(alone, before), 0, before)
    if blocks:
        da, db, dgate, dvector = of_b.unsqueeze(-1) * before.unsqueeze(-2), of_b, None, None
    else:
        da, db, dgate, dvector, _ = transition_backward(of_b * before.conj_physical(), of_b, given, spec.cell)
    if constant:
        da = (
            da.sum(0)
            if spec.cu_seqlens is None
            else da.new_zeros(len(at.lengths), *da.shape[2:]).index_add(0, at.sequence[:, 0], da[:, 0])
        )
        da = da[None]
    of_initial = torch.zeros((len(at.lengths), *h.shape[2:]), dtype=wide, device=h.device)
    if initial is not None and steps and len(at.lengths):
        reach = at.first & ~at.cut
        through = product(torch.where(_spread(reach, adjoint), adjoint, 0), torch.where(_spread(reach, of_b), of_b, 0))
        if spec.cu_seqlens is None:
            of_initial = through.sum(0)
        else:
            of_initial = of_initial.index_add(0, at.sequence[:, 0], through[:, 0])
    if dfinal is not None:
        of_initial = torch.where(_spread(at.lengths > 0, of_initial), of_initial, dfinal.to(wide))
    return db, da, dgate, None if dvector is None else dvector.sum((0, 1)), of_initial
