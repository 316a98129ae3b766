"""A layer in which no unit sees another, parallel in time.

The state of such a unit, h or (h, c), depends on its own before, through a Jacobian J of one number or of 2 x 2. What is linear
along its trajectory is then a first-order recurrence, which one scan solves for all steps:

* ``backward``, where the trajectory is known: lambda_t = g_t + J_{t+1}^T lambda_{t+1}, the backward pass of a scan whose
  coefficients are J. Exact; then all steps' own gradients at once.
* ``newton``, where it is not: s_t = f(s_{t-1}, x_t) for all t, by iterations s_t + delta_t, where delta_t = J_t delta_{t-1} +
  f(s_{t-1}, x_t) - s_t. After k of them the first k + 1 steps are exact, and soon all are, where J is not long above 1.

Letters as in ``reference/recurrent.py``; L lanes of one direction, K numbers of a state. A lane is a unit: H = P = 1. Both are
given the scan that they run on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.types import Backward, Call, Forward, ScanSpec
from .cells import steps as cell_steps
from .scan import Scan, product

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
ScanBackward = Callable[..., tuple[Tensor, ...]]  # as ``reference/scan.py`` has it, and what is wanted
Sequential = Callable[[Forward], Sequence[Tensor]]  # the forward op
_MOST_LANES = 62  # of the sequential kernels
_MOST_NAMED = 8  # rows


def serves(call: Call) -> bool:
    """Whether a call is such a layer, of a cell that has a Jacobian."""
    return bool(call.row.jacobian) and call.hidden == 1 and call.projection is None and not call.zoned


class Rows:
    """A packed batch as a padded one, and back."""

    def __init__(self, batch_sizes: Tensor, device: torch.device) -> None:
        self.steps, self.batch = batch_sizes.shape[0], int(batch_sizes[0])
        step = torch.repeat_interleave(torch.arange(self.steps), batch_sizes)
        slot = torch.arange(len(step)) - (batch_sizes.cumsum(0) - batch_sizes)[step]
        self.places = (step * self.batch + slot).to(device)
        self.lengths = (batch_sizes[None] > torch.arange(self.batch)[:, None]).sum(1).to(device)

    def padded(self, rows: Any) -> Any:
        """[N, ..] -> [T, B, ..], zero where there is nothing; what is not there is left so."""
        if rows is None or rows.numel() == 0:
            return rows
        room = rows.new_zeros(self.steps * self.batch, *rows.shape[1:])
        room[self.places] = rows
        return room.unflatten(0, (self.steps, self.batch))

    def packed(self, rows: Tensor) -> Tensor:
        return rows.flatten(0, 1).index_select(0, self.places) if rows.dim() > 1 else rows


class Units(NamedTuple):
    """The units of one direction, and where they lie among the lanes."""

    math: Any
    weight: Tensor  # [L, G], the diagonals of R
    vectors: Tensor | None  # [L, V]
    pair: bool  # (h, c)
    backwards: bool
    lanes: list[int] | slice

    def of(self, rows: Tensor) -> Tensor:
        """[.., D, n] -> [.., L, n]"""
        return rows[..., self.lanes, :]

    def first(self, call: Call, batch: int) -> Tensor:
        """[B, L, K]"""
        return self._joined(call.h0, call.c0, batch)

    def anew(self, call: Call, batch: int) -> Tensor:
        """[B, L, K], what replaces the state at a reset."""
        return self._joined(call.reset_h, call.reset_c, batch)

    def cuts(self, call: Call) -> Tensor | None:
        """[T, B], the steps before which a row starts anew."""
        if call.resets is None or not self.backwards:
            return call.resets
        cuts = torch.cat((call.resets[1:], torch.zeros_like(call.resets[:1])))
        if call.lengths is None:
            return cuts
        return cuts & (torch.arange(1, len(cuts) + 1, device=cuts.device)[:, None] < call.lengths)

    def _joined(self, h: Tensor | None, c: Tensor | None, batch: int) -> Tensor:
        given = [h, c] if self.pair else [h]
        zeros = self.weight.new_zeros(batch, len(self.weight), 1)
        return torch.cat([zeros if s is None else s[self.lanes].transpose(0, 1).to(zeros.dtype) for s in given], -1)

    def step(self, x: Tensor, states: Tensor) -> tuple[Tensor, Any]:
        """The states after a step and its saved activations, of all steps at once, from input gates and the states before."""
        h, c = self.parts(states)
        h, c, saved = self.math.step(x, self.weight * h, self.vectors, h, c)
        return h if c is None else torch.cat((h, c), -1), saved

    def jacobian(self, saved: Any, before: Tensor, after: Tensor) -> Tensor:
        """[T, B, L] or [T, B, L, 2, 2]"""
        found = self.math.jacobian(self.weight, saved, self.vectors, *self.parts(before), *self.parts(after))
        return found.squeeze(-3 if self.pair else -1)

    def parts(self, states: Tensor) -> tuple[Tensor, Any]:
        """[.., K] -> h [.., 1], c [.., 1] or None"""
        return (states[..., :1], states[..., 1:]) if self.pair else (states, None)

    def numbers(self, states: Tensor) -> Tensor:
        """[.., K] as a scan has states: [..] of one number, [.., 2] of two."""
        return states if self.pair else states.squeeze(-1)

    def states(self, numbers: Tensor) -> Tensor:
        return numbers if self.pair else numbers.unsqueeze(-1)


def units_of(call: Call) -> Iterator[Units]:
    """The units of each direction."""
    wide = call.wide
    for backwards in sorted({bool(of) for of in call.reverse}):
        own = [lane for lane, of in enumerate(call.reverse) if bool(of) == backwards]
        lanes = slice(None) if len(own) == call.lanes else own
        vectors = None if call.vectors is None else call.vectors[lanes].to(wide)
        weight = call.weight[lanes].squeeze(-1).to(wide)
        yield Units(cell_steps(call.cell), weight, vectors, call.row.has_c, backwards, lanes)


class Start(NamedTuple):
    """Where rows start, of steps that are run together."""

    first: Tensor  # [B, L, K], before the first step of the walk
    lengths: Tensor | None  # [B]
    cuts: Tensor | None  # [T, B], where they start anew,
    anew: Tensor  # [B, L, K], from this

    def before(self, states: Tensor, backwards: bool) -> Tensor:
        """The states before every step [T, B, L, K], from those after."""
        shifted = torch.cat((states[1:], self.first[None]) if backwards else (self.first[None], states[:-1]))[: len(states)]
        if backwards and self.lengths is not None:
            following = torch.arange(1, len(states) + 1, device=states.device)[:, None] < self.lengths
            shifted = torch.where(following[..., None, None], shifted, self.first)
        return shifted if self.cuts is None else torch.where(self.cuts[..., None, None], self.anew, shifted)

    def part(self, steps: slice, rows: Any = slice(None)) -> Start:
        """Of some steps, and rows, from the same first states."""
        lengths = None if self.lengths is None else (self.lengths[rows] - steps.start).clamp(0, steps.stop - steps.start)
        cuts = None if self.cuts is None else self.cuts[steps, rows]
        return Start(self.first[rows], lengths, cuts, self.anew[rows])


def backward(call: Backward, scan_backward: ScanBackward) -> tuple[Tensor, ...]:
    """What the backward op gives, equal to the sequential one's but for rounding."""
    if call.batch_sizes is not None:
        rows = Rows(call.batch_sizes, call.y.device)
        names = ("dy", "dc", "y", "c", "gates", "resets")
        padded = {name: rows.padded(getattr(call, name)) for name in names}
        same = replace(call, batch_sizes=None, lengths=rows.lengths, **padded)
        dgates, drecurrent, *others = backward(same, scan_backward)
        return rows.packed(dgates), rows.packed(drecurrent), *others
    results = dgates, drecurrent, _, dh0, dc0, *of_resets = call.empty_results()
    own, wide = call.row.own_recurrent, call.wide
    lengths = None if call.lengths is None else call.lengths.to(torch.int32)
    for units in units_of(call):
        kept = (call.y, call.c) if units.pair else (call.y,)
        states = torch.cat([units.of(of).to(wide) for of in kept], -1)
        first = units.first(call, call.batch)
        start = Start(first, call.lengths, units.cuts(call), units.anew(call, call.batch))
        earlier = start.before(states, units.backwards)
        saved = units.of(call.gates).to(wide) if call.saved else None
        given = (call.dy, call.dc) if units.pair else (call.dy,)
        of_states = torch.cat([_or_zeros(g if g is None else units.of(g), states[..., :1]) for g in given], -1)
        finals = (call.dh_n, call.dc_n) if units.pair else (call.dh_n,)
        of_finals = [_or_zeros(g if g is None else g[units.lanes].transpose(0, 1), first[..., :1]) for g in finals]
        of_final, numbers = units.numbers(torch.cat(of_finals, -1)), units.numbers(of_states)
        spec, jacobian = ScanSpec(call.resets, lengths, None, "given", units.backwards), units.jacobian(saved, earlier, states)
        # of h and the initial state it reads the sizes alone, where no gradient of coefficients is wanted
        found, *_, of_first = scan_backward(
            numbers, of_final, None, jacobian, None, None, numbers, of_final, spec, [True, False, False, False]
        )
        dh, dc = units.parts(units.states(found))
        h, c = units.parts(states)
        dx, dr, _, _ = units.math.step_backward(dh, dc, saved, units.vectors, *units.parts(earlier), h, c)
        dgates[..., units.lanes, :] = dx.to(call.dtype)
        if own:
            drecurrent[..., units.lanes, :] = dr[..., -own:].to(call.dtype)
        of_h, of_c = units.parts(units.states(of_first).transpose(0, 1))
        dh0[units.lanes] = of_h.to(call.dtype)
        if units.pair:
            dc0[units.lanes] = of_c
        if start.cuts is not None and (call.reset_h is not None or call.reset_c is not None):
            through = units.states(product(jacobian.mT if units.pair else jacobian, found))
            sums = torch.where(start.cuts[..., None, None], through, 0).sum(0).transpose(0, 1)
            for room, of in zip(of_resets, units.parts(sums), strict=True):
                if room.numel():
                    room[units.lanes] = of
    return results


def _or_zeros(given: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if given is None else given.to(like.dtype)


class Solver(NamedTuple):
    """How far and how long Newton's method goes."""

    tolerance: float  # of |f(s_{t-1}, x_t) - s_t| / (1 + |s_t|), at every step, unit and number
    max_iterations: int
    chunk: int  # steps that are solved at once; 0: all
    strict: bool  # raise where it fails; else the sequential kernel goes on


@dataclass
class Report:
    """What became of a call."""

    iterations: list[int] = field(default_factory=list)  # of each direction and chunk
    residual: float = 0.0  # the largest that was accepted
    fallen: set[int] = field(default_factory=set)  # rows that the sequential kernel went on with

    def __str__(self) -> str:
        if not self.iterations:
            return "Newton: no steps"
        low, high, parts = min(self.iterations), max(self.iterations), len(self.iterations)
        many = str(high) if low == high else f"{low} to {high}"
        text = (
            f"Newton: iterations {many}" + (f" in each of {parts} parts" if parts > 1 else "") + f", residual {self.residual:.1e}"
        )
        if self.fallen:
            rows = ", ".join(map(str, sorted(self.fallen)[:_MOST_NAMED])) + (", .." if len(self.fallen) > _MOST_NAMED else "")
            text += f", by the sequential kernel then rows {rows}"
        return text


def newton(call: Forward, solver: Solver, scan: Scan, sequential: Sequential) -> tuple[Results, Report]:
    """What the forward op gives, and how it came about.

    Every unit of every row converges, or fails, by itself: neither its values nor its iterations depend on the others. One that
    does not get there in ``max_iterations``, or meets a number that is not finite, is run by ``sequential``, the op by the
    backend's kernels, from its last step that is within the tolerance. The first guess is f(s_0, x_t).

    Raises:
        RuntimeError: if one fails and the solver is strict.
    """
    if call.batch_sizes is not None:
        rows = Rows(call.batch_sizes, call.x.device)
        padded = replace(call, x=rows.padded(call.x), batch_sizes=None, lengths=rows.lengths, resets=rows.padded(call.resets))
        (y, h_n, c_n, c, gates), report = newton(padded, solver, scan, sequential)
        return (rows.packed(y), h_n, c_n, rows.packed(c), rows.packed(gates)), report
    results = y, h_n, c_n, c, gates = call.empty_results()
    x_gates, total, report = call.input_gates(), call.steps, Report()
    size = solver.chunk or max(1, total)
    starts = range(0, total, size)
    for units in units_of(call):
        state = units.first(call, call.batch)
        whole = Start(state, call.lengths, units.cuts(call), units.anew(call, call.batch))
        for begin in reversed(starts) if units.backwards else starts:
            part = slice(begin, min(begin + size, total))
            start = whole._replace(first=state).part(part)
            states, saved = _solved(call, units, units.of(x_gates[part]), start, part, solver, scan, sequential, report)
            state = _after(states, start, units.backwards)
            of_h, of_c = units.parts(states)
            y[part, :, units.lanes] = of_h.to(call.dtype)
            if units.pair and call.save_c:
                c[part, :, units.lanes] = of_c
            if call.saved and call.save_gates:
                gates[part, :, units.lanes] = saved.to(call.dtype)
        of_h, of_c = units.parts(state.transpose(0, 1))
        h_n[units.lanes] = of_h.to(call.dtype)
        if units.pair:
            c_n[units.lanes] = of_c
    return results, report


def _solved(
    call: Forward,
    units: Units,
    x: Tensor,
    start: Start,
    steps: slice,
    solver: Solver,
    scan: Scan,
    sequential: Sequential,
    report: Report,
) -> tuple[Tensor, Any]:
    """States [T, B, L, K] and saved activations [T, B, L, S], zero beyond the lengths, of steps that are solved at once."""
    lengths, own = start.lengths, x.to(start.first.dtype)
    resets, short = None if call.resets is None else call.resets[steps], None if lengths is None else lengths.to(torch.int32)
    spec = ScanSpec(resets, short, None, "given", units.backwards)
    beyond = None
    if lengths is not None:
        beyond = (torch.arange(len(x), device=x.device)[:, None] >= lengths)[..., None, None]
    states = _masked(units.step(own, start.first[None])[0], beyond)
    for iteration in range(solver.max_iterations + 1):
        earlier = start.before(states, units.backwards)
        after, saved = units.step(own, earlier)
        residual = _masked(after - states, beyond)
        error = (residual.abs() / (1 + states.abs())).amax(-1)
        worst = error.amax(0)  # [B, L]
        done = worst <= solver.tolerance
        going = ~done & worst.isfinite()
        if iteration == solver.max_iterations or not going.any():
            break
        delta, _ = scan(units.numbers(residual), units.jacobian(saved, earlier, after), None, None, None, spec)
        states = torch.where(going[..., None], states + units.states(delta), states)
    report.iterations.append(iteration)
    saved = None if saved is None else _masked(saved, beyond)
    if done.any():
        report.residual = max(report.residual, float(worst[done].max()))
    if done.all():
        return states, saved
    failed = ~done
    rows = failed.any(1).nonzero().squeeze(1)
    wrong = (failed & ~(error <= solver.tolerance)).flatten(1).any(1).nonzero()
    at = int(wrong[-1 if units.backwards else 0])
    if solver.strict:
        raise RuntimeError(_failure(solver, worst[failed], f"{len(rows)} of {len(done)} rows, from step {steps.start + at} on"))
    report.fallen.update(rows.tolist())
    part = slice(0, at + 1) if units.backwards else slice(at, len(x))
    resets = None if resets is None else resets[part, rows]
    again = _by_steps(call, units, x[part, rows], start._replace(first=earlier[at]).part(part, rows), resets, sequential)
    for values, found in zip((states, saved), again, strict=True):
        if values is not None:
            values[part, rows] = torch.where(failed[rows][..., None], found.to(values.dtype), values[part, rows])
    return states, saved


def _masked(values: Tensor, beyond: Tensor | None) -> Tensor:
    return values if beyond is None else values.masked_fill(beyond, 0)


def _failure(solver: Solver, reached: Tensor, where: str) -> str:
    """What to say of units that reached these residuals."""
    finite = reached[reached.isfinite()]
    found = [f"a residual of {float(finite.max()):.1e}"] if len(finite) else []
    found += ["numbers that are not finite"] if len(finite) < len(reached) else []
    return (
        f"Newton's method did not reach its tolerance of {solver.tolerance:g} in {solver.max_iterations} iterations, but "
        f"{' and '.join(found)}, in {where}. Give it more max_iterations or a smaller chunk, or otherwise='sequential'"
    )


def _by_steps(
    call: Forward,
    units: Units,
    x: Tensor,
    start: Start,
    resets: Tensor | None,
    sequential: Sequential,
) -> tuple[Tensor, Any]:
    """The same of some rows by the sequential kernel."""
    found = []
    lanes = list(range(call.lanes))[units.lanes] if isinstance(units.lanes, slice) else units.lanes
    h0, c0 = units.parts(start.first.transpose(0, 1))
    reset_h, reset_c = units.parts(start.anew.transpose(0, 1))
    for begin in range(0, len(lanes), _MOST_LANES):
        some = slice(begin, begin + _MOST_LANES)
        own = lanes[some]
        y, _, _, c, gates = sequential(
            Forward(
                x=x[:, :, some].flatten(2),
                w_ih=None,
                b_ih=None,
                weight=call.weight[own],
                vectors=None if call.vectors is None else call.vectors[own],
                projection=None,
                h0=h0[some].to(call.dtype),
                c0=c0[some] if units.pair else None,
                lengths=start.lengths,
                batch_sizes=None,
                hold_h=None,
                hold_c=None,
                cell=call.cell,
                reverse=[int(units.backwards)] * len(own),
                zoneout_h=0.0,
                zoneout_c=0.0,
                save_c=True,
                save_gates=True,
                resets=resets,
                reset_h=None if call.reset_h is None else reset_h[some].to(call.dtype),
                reset_c=None if call.reset_c is None else reset_c[some],
            )
        )
        found.append((torch.cat((y.to(call.wide), c), -1) if units.pair else y, gates))
    states, saved = zip(*found, strict=True)
    return torch.cat(states, 2), torch.cat(saved, 2) if call.saved else None


def _after(states: Tensor, start: Start, backwards: bool) -> Tensor:
    """The states [B, L, K] after the last step of the walk."""
    lengths = start.lengths
    if lengths is None:
        return states[0 if backwards else -1]
    last = torch.zeros_like(lengths) if backwards else (lengths - 1).clamp(min=0)
    found = states[last.long(), torch.arange(len(lengths), device=states.device)]
    return torch.where((lengths > 0)[:, None, None], found, start.first)
