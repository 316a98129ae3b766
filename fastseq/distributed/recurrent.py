"""Recurrent layers over a sequence that lies on several ranks: states go from rank to rank, and back go their gradients.

A layer is sequential, so what ranks gain together is a wavefront: while rank r + 1 runs a layer on one micro-batch, rank r, which
gave it the state, runs the next micro-batch, or the next layer. ``_wavefront`` has the table; between two of its rounds each rank
sends what it has just made to its neighbor and gets what that has made. The backward pass walks the same table from its end. A
rank keeps activations of its own steps alone.

Letters: t this rank's steps, T all ranks', B batch, I input, H hidden, P projection or H, L layers, D directions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import dropout as dropped

from .._arguments import checked_int
from ..cells import Cell
from ..functional._recurrent_layers import Checked, Layer, Options, checked, run_layer, unseen
from ..ops._dispatch import is_sharded, transforming, unshared, wants_gradient
from ..ops.recurrent import without_padding
from ..ops.types import state_dtype
from ._exchange import Batch, account
from ._packed import packing
from ._ranks import Own, Ranks
from ._wavefront import Job, rounds
from .sequence import cut

__all__ = ["sum_gradients"]

_DOCUMENTS = "cu_seqlens do not go with a sequence on several ranks: give resets, true at the first step of each sequence"


def sum_gradients(module: nn.Module, mesh: DeviceMesh | dist.ProcessGroup) -> None:
    """Adds up the gradients of a module's parameters over the ranks of a sequence, each of which has that of its part.

    So the gradient is that of the sum of the ranks' losses. A parameter without a gradient on some rank counts as zero there, and
    has none where no rank has one. DistributedDataParallel over the ranks does the same, but for dividing by their number.

    Args:
        module: the same on every rank.
        mesh: one dimension of a mesh, or a process group: the ranks that share the sequence.

    Raises:
        TypeError, ValueError, RuntimeError: as ``fastseq.distributed.shard_sequence`` of ``mesh``.
        RuntimeError: on every rank, if parameters or the dtypes of gradients differ between ranks, or a parameter is a DTensor
            on these ranks.
    """
    ranks, own = Ranks.of(mesh), Own()
    parameters = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    facts = {"call": "sum_gradients"} | {name: f"{list(p.shape)} {p.dtype}" for name, p in parameters}
    for name, parameter in parameters:
        if is_sharded(parameter):
            own.run(ranks.require_another, parameter, name)
    own.settle(ranks, facts)
    there = torch.tensor([p.grad is not None for _, p in parameters], dtype=torch.int32, device=ranks.device)
    dist.all_reduce(there, group=ranks.group)
    for (_, parameter), count in zip(parameters, there.tolist(), strict=True):
        if count:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grad: Any = parameter.grad
            dist.all_reduce(grad.to_local() if is_sharded(grad) else grad, group=ranks.group)


def run_across(
    cell: Cell,
    input: Tensor,
    states: Sequence[Tensor | None],
    params: Sequence[Tensor | None],
    options: Options,
    cu_seqlens: Tensor | None,
    ranks: Ranks,
    micro_batches: int,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """``functional.recurrent`` of a sequence whose steps lie on the ranks, a run on each, in their order.

    ``input`` ``[t, B, I]`` and resets are this rank's; hx, reset_to, parameters and ``lengths`` ``[B]``, of the whole sequence,
    are alike on all. hx counts where a direction starts: on the first rank, backwards on the last. Output and c are this rank's;
    the final states, which the last rank has, backwards the first, are given to all. Of packed sequences input ``[N, I]`` is the
    rows of this rank's steps, with their ``batch_sizes``; states are those of all sequences.

    Raises on every rank, in the same words:
        RuntimeError: if the ranks disagree, or what one of them raised while it computed.
        ValueError: for ``cu_seqlens``; for more micro-batches than rows.
    """
    if options.batch_sizes is not None:  # padded in between
        rows = packing(input, options, ranks)
        resets = None if options.resets is None else rows.padded(options.resets)
        padded = replace(options, batch_sizes=None, batch_first=False, lengths=rows.lengths, resets=resets)
        y, finals, c = run_across(cell, rows.padded(input), states, params, padded, cu_seqlens, ranks, micro_batches)
        return rows.packed(y), finals, None if c is None else torch.stack([rows.packed(of_layer) for of_layer in c])
    own = Own()
    facts: dict[str, object] = {}
    call = own.run(_checked, cell, input, states, params, options, cu_seqlens, ranks, micro_batches, facts)
    seed = int(torch.empty((), dtype=torch.int64).random_()) if options.training and options.weight_dropout else 0
    numbers = own.settle(ranks, facts, (0 if call is None else call.x.shape[0], seed))
    assert call is not None
    layers = _with_dropped_weights(call, numbers[0][1])
    if not sum(size for size, _ in numbers):
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    run = _Run(cell, call, layers, ranks, [size for size, _ in numbers], micro_batches, bool(facts["wants gradients"]))
    if options.lengths is not None:
        check_lengths(options.lengths, run.total)
        run.x = without_padding(run.x, options.lengths - run.before)
    with unshared():
        y, *rest = _Across.apply(run, *run.tensors())
    finals, cells = tuple(rest[: len(cell.states)]), rest[len(cell.states) :]
    if not options.batch_first:
        return y, finals, cells[0] if cells else None
    return y.transpose(0, 1), finals, cells[0].transpose(1, 2) if cells else None


def _checked(
    cell: Cell,
    input: Tensor,
    states: Sequence[Tensor | None],
    params: Sequence[Tensor | None],
    options: Options,
    cu_seqlens: Tensor | None,
    ranks: Ranks,
    micro_batches: int,
    facts: dict[str, object],
) -> Checked:
    """The call, if it is one for several ranks; into ``facts`` what all must have alike."""
    if cu_seqlens is not None:
        raise ValueError(_DOCUMENTS)
    if transforming():
        raise RuntimeError("transforms of torch.func and forward-mode AD do not go through a sequence on several ranks")
    call = checked(cell, input, states, params, options)
    ranks.require(call.x, "input")
    if not 1 <= checked_int("micro_batches", micro_batches) <= max(1, call.x.shape[1]):
        raise ValueError(f"micro_batches must lie in 1..{call.x.shape[1]}, the rows of the batch, got {micro_batches}")
    given = [call.x, *[s for s in (*call.states, *(call.reset_to or ())) if s is not None]]
    given += [tensor for layer in call.layers for of in layer.values() for tensor in of]
    facts |= {
        "call": f"recurrent ({cell.name})",
        "input": f"[.., {call.x.shape[1]}, {call.x.shape[2]}] {call.x.dtype} on {call.x.device.type}",
        "hidden size": call.hidden,
        "micro_batches": micro_batches,
        "lengths": None if options.lengths is None else options.lengths.tolist(),
        "hx": [state is not None for state in call.states],
        "resets": options.resets is not None,
        "reset_to": None if call.reset_to is None else [s is not None and list(s.shape) for s in call.reset_to],
        "wants gradients": int(wants_gradient(given)),
    }
    names = ("num_layers", "bidirectional", "proj_size", "num_heads", "has_biases", "training", "return_cells", "zoneout")
    facts |= {name: getattr(options, name) for name in (*names, "dropout", "weight_dropout", "solver")}
    return call


def check_lengths(lengths: Tensor, total: int) -> None:
    """Alike on all ranks."""
    if lengths.numel():
        low, high = (int(of) for of in lengths.aminmax())
        if low < 0 or high > total:
            what = f"lengths must lie in [0, {total}], the number of steps of all ranks"
            raise RuntimeError(f"{what}; got values from {low} to {high}")


def _with_dropped_weights(call: Checked, seed: int) -> list[Layer]:
    """Every rank drops the same elements of w_hh."""
    chance = call.options.weight_dropout if call.options.training else 0
    if not chance:
        return call.layers
    generator = torch.Generator(call.x.device).manual_seed(seed)

    def thinned(w_hh: Tensor) -> Tensor:
        kept = torch.rand(w_hh.shape, generator=generator, device=w_hh.device) >= chance
        return w_hh * kept / (1 - chance) if chance < 1 else w_hh * kept

    return [layer | {"weight_hh": [thinned(w_hh) for w_hh in layer["weight_hh"]]} for layer in call.layers]


class _Done(NamedTuple):
    """A job with what its backward pass needs: leaves and results of a graph of its own."""

    x: Tensor  # [t, rows, I]
    states: list[Tensor]  # [1, rows, n] each
    reset_to: list[Tensor | None]  # [1, rows or 1, n]
    y: Tensor  # [t, rows, P]
    after: list[Tensor]  # the states for the rank downstream
    c: Tensor | None  # of every step


class _Run:
    """A call on this rank: who does what when, and the places of its tensors."""

    def __init__(
        self, cell: Cell, call: Checked, layers: list[Layer], ranks: Ranks, sizes: list[int], micro_batches: int, gradients: bool
    ) -> None:
        self.options = replace(call.options, weight_dropout=0, batch_first=False, bidirectional=False, num_layers=1)
        self.cell, self.zoneout, self.ranks, self.gradients = cell, call.zoneout, ranks, gradients
        self.x, self.layers = call.x, layers
        self.hx: list[Tensor | None] = list(call.states)
        self.reset_to: list[Tensor | None] = list(call.reset_to or [None] * len(self.hx))
        self.directions, self.last = 2 if call.options.bidirectional else 1, len(layers) - 1
        self.steps, self.total, self.before = sizes[ranks.rank], sum(sizes), sum(sizes[: ranks.rank])
        width = call.options.proj_size or call.hidden
        self.widths = [width if name == "h" else call.hidden for name in cell.states]
        self.wide = state_dtype(call.x.dtype)
        self.dtypes = [call.x.dtype if name == "h" else self.wide for name in cell.states]
        self.rows = [slice(*run) for run in cut(call.x.shape[1], micro_batches)]
        self.table = rounds(ranks.size, len(layers), micro_batches, self.directions)

    def tensors(self) -> list[Tensor | None]:
        """Everything that may want a gradient."""
        weights = [tensor for layer in self.layers for of in layer.values() for tensor in of]
        return [self.x, *self.hx, *self.reset_to, *weights]

    def take(self, tensors: Sequence[Tensor | None]) -> None:
        """``tensors`` in place of those that ``tensors()`` gave."""
        rest: Any = iter(tensors)
        self.x = next(rest)
        self.hx, self.reset_to = [next(rest) for _ in self.hx], [next(rest) for _ in self.hx]
        self.layers = [{name: [next(rest) for _ in of] for name, of in layer.items()} for layer in self.layers]

    def lane(self, job: Job) -> int:
        return job.layer * self.directions + job.direction

    def weights(self, job: Job) -> Layer:
        return {name: [of[job.direction]] for name, of in self.layers[job.layer].items()}

    def owner(self, direction: int) -> int:
        """The rank that has the final states."""
        return 0 if direction else self.ranks.size - 1

    def upstream(self, direction: int) -> int | None:
        """The rank that hands its states to this one; None: here the sequence starts."""
        rank = self.ranks.rank + (1 if direction else -1)
        return rank if 0 <= rank < self.ranks.size else None

    def downstream(self, direction: int) -> int | None:
        return self.upstream(1 - direction)

    def first_states(self, job: Job) -> list[Tensor]:
        """What the whole sequence starts from."""
        rows, lane = self.rows[job.micro_batch], self.lane(job)
        found = []
        for state, name, width, dtype in zip(self.hx, self.cell.states, self.widths, self.dtypes, strict=True):
            if state is None:
                found.append(self.x.new_full((1, rows.stop - rows.start, width), unseen(name), dtype=dtype))
            else:
                found.append(state[lane : lane + 1, rows].to(dtype))
        return found

    def do(self, job: Job, x: Tensor, states: list[Tensor]) -> _Done:
        x = x.detach().requires_grad_(self.gradients and (job.layer > 0 or self.x.requires_grad))
        states = [state.detach().requires_grad_(self.gradients) for state in states]
        rows, lane = self.rows[job.micro_batch], self.lane(job)
        if self.steps == 0:
            y, empty = (x.new_empty(0, x.shape[1], width) for width in (self.widths[0], self.widths[-1]))
            return _Done(x, states, [None] * len(states), y, states, empty if self.options.return_cells else None)
        anew: list[Tensor | None] = [None] * len(states)
        for place, whole in enumerate(self.reset_to):
            if whole is not None:
                own = whole[lane : lane + 1, rows if whole.shape[1] > 1 else slice(None)]
                anew[place] = own.detach().requires_grad_(whole.requires_grad)
        lengths = None if self.options.lengths is None else (self.options.lengths[rows] - self.before).clamp(0, self.steps)
        resets = None if self.options.resets is None else self.options.resets[:, rows]
        options = replace(self.options, lengths=lengths, resets=resets)
        with torch.set_grad_enabled(self.gradients):
            y, finals, c = run_layer(
                self.cell, x, states, anew, self.weights(job), options, self.zoneout, False, False, [job.direction]
            )
            after = list(finals)
            if job.direction and resets is not None and self.before:  # a reset at the first step parts it from the rank before
                cuts = resets[0] if lengths is None else resets[0] & (lengths > 0)
                after = [
                    torch.where(cuts[None, :, None], _like(state, new, name), state)
                    for name, state, new in zip(self.cell.states, after, anew, strict=True)
                ]
        return _Done(x, states, anew, y, after, c)

    def undo(
        self, job: Job, done: _Done, dy: Tensor | None, dafter: list[Tensor], dc: Tensor | None, grads: dict[int, Tensor]
    ) -> tuple[Tensor | None, Sequence[Tensor | None]]:
        """Gradients of the job's x and states; those of reset_to and of weights are added to ``grads``, by their ``id``."""
        if self.steps == 0:
            return None, dafter
        weights = [tensor for of in self.weights(job).values() for tensor in of]
        wanted = [t for t in (done.x, *done.states, *done.reset_to, *weights) if t is not None and t.requires_grad]
        pairs = [(done.y, dy), *zip(done.after, dafter, strict=True), (done.c, dc)]
        used = [(out, grad.to(out.dtype)) for out, grad in pairs if out is not None and grad is not None and out.requires_grad]
        made = torch.autograd.grad([out for out, _ in used], wanted, [grad for _, grad in used], allow_unused=True)
        found = {id(tensor): grad for tensor, grad in zip(wanted, made, strict=True) if grad is not None}
        for weight in weights:
            if id(weight) in found:
                grads[id(weight)] = grads[id(weight)] + found[id(weight)] if id(weight) in grads else found[id(weight)]
        for whole, part in zip(self.reset_to, done.reset_to, strict=True):
            if whole is not None and part is not None and id(part) in found:
                total = grads.setdefault(id(whole), torch.zeros_like(whole))
                total[self.lane(job), self.rows[job.micro_batch] if whole.shape[1] > 1 else slice(None)] += found[id(part)][0]
        return found.get(id(done.x)), [found.get(id(state)) for state in done.states]

    def exchange(self, number: int, made: Tensor | None, back: bool, mail: dict[Job, tuple[Batch, Tensor]]) -> Batch:
        """After a round: what this rank has ``made`` goes to its neighbor downstream, ``back`` upstream, and what its neighbors
        have made for it comes, into ``mail``."""
        row, batch = self.table[number], Batch(self.ranks)
        job = row[self.ranks.rank]
        if job is not None and made is not None:
            to = self.upstream(job.direction) if back else self.downstream(job.direction)
            if to is not None:
                batch.send(made, to)
        for direction in range(self.directions):
            source = self.downstream(direction) if back else self.upstream(direction)
            theirs = None if source is None else row[source]
            if source is not None and theirs is not None and theirs.direction == direction:
                buffer = self.x.new_empty(self._numbers(theirs), dtype=self.wide)
                batch.receive(buffer, source)
                mail[theirs] = batch, buffer
        return batch.post()

    def _numbers(self, job: Job) -> int:
        rows = self.rows[job.micro_batch]
        return (rows.stop - rows.start) * sum(self.widths)

    def packed(self, job: Job, states: Sequence[Tensor | None] | None) -> Tensor:
        """States, or their gradients, one after the other in the dtype of the widest; zeros for those that are not there."""
        if states is None:
            return self.x.new_zeros(self._numbers(job), dtype=self.wide)
        rows = self.rows[job.micro_batch]
        sizes = [(rows.stop - rows.start) * width for width in self.widths]
        zeros = self.x.new_zeros
        parts = [zeros(n, dtype=self.wide) if s is None else s.detach().flatten() for s, n in zip(states, sizes, strict=True)]
        return torch.cat([part.to(self.wide) for part in parts])

    def unpacked(self, job: Job, buffer: Tensor) -> list[Tensor]:
        rows = self.rows[job.micro_batch]
        count = rows.stop - rows.start
        parts = buffer.split([count * width for width in self.widths])
        return [part.view(1, count, w).to(dtype) for part, w, dtype in zip(parts, self.widths, self.dtypes, strict=True)]

    def results(self, past: _Past) -> tuple[Tensor, ...]:
        """What the call gives back; final states from the ranks that have them."""
        micros, ways = range(len(self.rows)), range(self.directions)

        def whole(of: dict[Job, Tensor], layer: int) -> Tensor:
            parts = [[of[Job(layer, micro, way)] for way in ways] for micro in micros]
            rows = [torch.cat(part, -1) if len(part) > 1 else part[0] for part in parts]
            if len(rows) > 1 or len(ways) > 1:
                return torch.cat(rows, 1)
            return rows[0].clone()  # the caller may overwrite his

        finals = []
        for way in ways:
            layers = range(self.last + 1)
            own = self._shapes()
            buffer = self.x.new_empty(sum(map(math.prod, own)), dtype=self.wide)
            if self.owner(way) == self.ranks.rank:
                of_states = zip(*[past.finals[Job(layer, micro, way)] for layer in layers for micro in micros], strict=True)
                joined = [torch.cat([part[0].to(self.wide) for part in parts]).flatten() for parts in of_states]
                buffer = torch.cat(joined).detach()
                account(buffer, self.ranks.size - 1)
            dist.broadcast(buffer, group=self.ranks.group, group_src=self.owner(way))
            finals.append([part.view(shape) for part, shape in zip(buffer.split([*map(math.prod, own)]), own, strict=True)])
        states = [torch.stack(of_ways, 1).flatten(0, 1).to(self.x.dtype) for of_ways in zip(*finals, strict=True)]
        cells = [torch.stack([whole(past.c, layer) for layer in range(self.last + 1)]).to(self.x.dtype)] if past.c else []
        return whole(past.y, self.last), *states, *cells

    def collected(self, dfinals: Sequence[Tensor | None]) -> list[list[Tensor]]:
        """Gradients of the final states, of each direction [L, B, n], summed over the ranks on the rank that made them."""
        found = []
        for way in range(self.directions):
            shapes = self._shapes()
            parts = [
                self.x.new_zeros(shape, dtype=self.wide) if grad is None else grad[way :: self.directions].to(self.wide)
                for grad, shape in zip(dfinals, shapes, strict=True)
            ]
            buffer = torch.cat([part.flatten() for part in parts])
            if self.owner(way) != self.ranks.rank:
                account(buffer)
            dist.reduce(buffer, group=self.ranks.group, group_dst=self.owner(way))
            found.append([part.view(shape) for part, shape in zip(buffer.split([*map(math.prod, shapes)]), shapes, strict=True)])
        return found

    def _shapes(self) -> list[tuple[int, int, int]]:
        return [(self.last + 1, self.x.shape[1], width) for width in self.widths]


def unhooked() -> Any:
    """A block whose graphs keep their tensors as they are. What a checkpoint around it would form anew, it would form for each
    job, out of step with the other ranks."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _like(state: Tensor, new: Tensor | None, name: str) -> Tensor:
    return torch.full_like(state, unseen(name)) if new is None else new.to(state.dtype).expand_as(state)


class _Across(torch.autograd.Function):
    """Output [t, B, D*P], final states [L*D, B, n], and c of every step [L, t, B, D*H] if it is returned."""

    @staticmethod
    def forward(ctx: Any, run: _Run, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.needs = ctx.needs_input_grad[1:]
        run.take([None if t is None else t.detach().requires_grad_(need) for t, need in zip(tensors, ctx.needs, strict=True)])
        ctx.set_materialize_grads(False)
        own, past = Own(), _Past()
        with unhooked():
            _forward(run, own, past)
        own.settle(run.ranks, {"call": "recurrent, the end of its forward pass"})
        ctx.run, ctx.past = run, past
        results = run.results(past)
        past.y, past.c, past.finals = {}, {}, {}
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.past is None:
            raise RuntimeError("a recurrence over several ranks goes backward once, also with retain_graph")
        run, own, count = ctx.run, Own(), len(ctx.run.cell.states)
        own.settle(run.ranks, {"call": f"backward of recurrent ({run.cell.name})"})
        with unshared():
            grads = _backward(run, own, ctx.past, dy, run.collected(rest[:count]), rest[count] if len(rest) > count else None)
        own.settle(run.ranks, {"call": "recurrent, the end of its backward pass"})
        ctx.past = None
        given = zip(run.tensors(), ctx.needs, strict=True)
        return None, *[grads.get(id(t), torch.zeros_like(t)) if need and t is not None else None for t, need in given]


class _Past:
    """What jobs have made, for those after them and for the backward pass."""

    def __init__(self) -> None:
        self.y: dict[Job, Tensor] = {}
        self.c: dict[Job, Tensor] = {}
        self.finals: dict[Job, list[Tensor]] = {}  # on the rank where a direction ends
        self.inputs: dict[tuple[int, int], Tensor] = {}  # of a layer on a micro-batch
        self.masks: dict[tuple[int, int], Tensor] = {}  # of the dropout on the way into it
        self.done: dict[Job, _Done] = {}


def _arrived(mail: dict[Job, tuple[Batch, Tensor]], job: Job) -> Tensor:
    batch, buffer = mail.pop(job)
    batch.wait()
    return buffer


def _forward(run: _Run, own: Own, past: _Past) -> None:
    mail: dict[Job, tuple[Batch, Tensor]] = {}
    posted: list[Batch] = []

    def do(job: Job, states: list[Tensor]) -> list[Tensor]:
        at = job.layer, job.micro_batch
        if job.layer == 0:
            x = run.x[:, run.rows[job.micro_batch]]
        elif at in past.inputs:
            x = past.inputs.pop(at)  # of two directions the second
        else:
            below = [past.y.pop(Job(job.layer - 1, job.micro_batch, way)) for way in range(run.directions)]
            x = torch.cat(below, -1).detach() if len(below) > 1 else below[0].detach()
            if run.options.training and run.options.dropout:
                past.masks[at] = dropped(torch.ones_like(x), run.options.dropout)
                x = x * past.masks[at]
            if run.directions > 1:
                past.inputs[at] = x
        done = run.do(job, x, states)
        past.y[job] = done.y
        if done.c is not None:
            past.c[job] = done.c
        if run.downstream(job.direction) is None:
            past.finals[job] = done.after
        if run.gradients:
            past.done[job] = done
        return done.after

    for number, row in enumerate(run.table):
        job, made = row[run.ranks.rank], None
        if job is not None:
            came = run.upstream(job.direction) is not None
            states = run.unpacked(job, _arrived(mail, job)) if came else own.run(run.first_states, job)
            made = run.packed(job, own.run(do, job, states))
        posted.append(run.exchange(number, made, False, mail))
    for batch in posted:
        batch.wait()


def _backward(
    run: _Run, own: Own, past: _Past, dy: Tensor | None, dfinals: list[list[Tensor]], dc: Tensor | None
) -> dict[int, Tensor]:
    """Gradients of the run's tensors, by their ``id``."""
    mail: dict[Job, tuple[Batch, Tensor]] = {}
    posted: list[Batch] = []
    grads: dict[int, Tensor] = {}
    dinputs: dict[tuple[int, int], Tensor] = {}
    width, hidden = run.widths[0], run.widths[-1]

    def undo(job: Job, dafter: list[Tensor]) -> Sequence[Tensor | None]:
        at, above = (job.layer, job.micro_batch), (job.layer + 1, job.micro_batch)
        rows, lane = run.rows[job.micro_batch], slice(job.direction * width, (job.direction + 1) * width)
        if job.layer == run.last:
            of_y = None if dy is None else dy[:, rows, lane]
        else:
            of_y = dinputs[above][..., lane] if above in dinputs else None
            if of_y is not None and above in past.masks:
                of_y = of_y * past.masks[above][..., lane]
        of_c = None if dc is None else dc[job.layer][:, rows, job.direction * hidden : (job.direction + 1) * hidden]
        dx, dstates = run.undo(job, past.done.pop(job), of_y, dafter, of_c, grads)
        if dx is not None and job.layer:
            dinputs[at] = dinputs[at] + dx if at in dinputs else dx
        elif dx is not None and run.x.requires_grad:
            grads.setdefault(id(run.x), torch.zeros_like(run.x))[:, rows] += dx
        if run.upstream(job.direction) is None:
            for state, grad in zip(run.hx, dstates, strict=True):
                if state is not None and state.requires_grad and grad is not None:
                    grads.setdefault(id(state), torch.zeros_like(state))[run.lane(job), rows] = grad[0].to(state.dtype)
        return dstates

    for number in reversed(range(len(run.table))):
        job, made = run.table[number][run.ranks.rank], None
        if job is not None:
            if run.downstream(job.direction) is None:
                dafter = [of[job.layer : job.layer + 1, run.rows[job.micro_batch]] for of in dfinals[job.direction]]
            else:
                dafter = run.unpacked(job, _arrived(mail, job))
            made = run.packed(job, own.run(undo, job, dafter))
        posted.append(run.exchange(number, made, True, mail))
    for batch in posted:
        batch.wait()
    return grads
