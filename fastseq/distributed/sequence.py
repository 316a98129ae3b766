"""A sequence in parts, one for each rank: which steps a rank holds, and how they get there and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.utils.rnn import PackedSequence

from .._arguments import checked_int, checked_tensor, own_keywords, unknown
from ._exchange import swap
from ._ranks import Own, Ranks, agree

__all__ = ["positions", "shard_sequence", "unshard_sequence"]

Sharding = Literal["contiguous", "zigzag"]
SHARDINGS = ("contiguous", "zigzag")
Run = tuple[int, int]  # steps begin .. end
ZIGZAG = "a recurrence goes from step to step, so a rank's steps must be one run: give sharding='contiguous', got 'zigzag'"


def checked_sharding(sharding: Any) -> Sharding:
    """Raises ValueError if it is none."""
    if sharding not in SHARDINGS:
        raise ValueError(unknown("sharding", sharding, SHARDINGS))
    return sharding


def cut(length: int, parts: int) -> list[Run]:
    """Runs that cover ``length`` steps in order, the first ones longer by a step where they cannot be equal."""
    size, longer = divmod(length, parts)
    ends = [size * i + min(i, longer) for i in range(parts + 1)]
    return list(zip(ends, ends[1:], strict=False))


def runs_of_ranks(length: int, ranks: int, sharding: Sharding = "contiguous") -> list[list[Run]]:
    """Which steps each rank holds, in the order in which they lie there.

    Contiguous: one run each. Zigzag: of twice as many runs rank r holds number r and number 2 ranks - 1 - r, so that under a
    causal mask all have as many pairs of queries and keys.
    """
    if sharding == "contiguous":
        return [[run] for run in cut(length, ranks)]
    pieces = cut(length, 2 * ranks)
    return [[pieces[r], pieces[2 * ranks - 1 - r]] for r in range(ranks)]


def size_of(runs: Sequence[Run]) -> int:
    return sum(end - begin for begin, end in runs)


@own_keywords
def positions(
    length: int,
    mesh: DeviceMesh | dist.ProcessGroup,
    *,
    sharding: Sharding = "contiguous",
    device: torch.device | str | None = None,
) -> Tensor:
    """The places, int64 ``[t]``, of this rank's steps in a sequence: for embeddings and rotations of places.

    Args:
        length: T, steps of the whole sequence.
        mesh, sharding: as :func:`shard_sequence` takes them.
        device: where the places shall be; None: torch's default.

    Raises:
        TypeError: if ``length`` is no int.
        ValueError: if it is negative, or an argument as :func:`shard_sequence` does not take it.
    """
    if checked_int("length", length) < 0:
        raise ValueError(f"length must not be negative, got {length}")
    ranks = Ranks.of(mesh)
    return places_of(runs_of_ranks(length, ranks.size, checked_sharding(sharding))[ranks.rank], device)


def places_of(runs: Sequence[Run], device: torch.device | str | None) -> Tensor:
    """int64, one after the other."""
    return torch.cat([torch.arange(begin, end, device=device) for begin, end in runs])


@overload
def shard_sequence(
    tensor: Tensor, mesh: DeviceMesh | dist.ProcessGroup, *, dim: int, sharding: Sharding = "contiguous"
) -> Tensor: ...
@overload
def shard_sequence(
    tensor: PackedSequence, mesh: DeviceMesh | dist.ProcessGroup, *, sharding: Sharding = "contiguous"
) -> PackedSequence: ...


@own_keywords
def shard_sequence(
    tensor: Tensor | PackedSequence,
    mesh: DeviceMesh | dist.ProcessGroup,
    *,
    dim: int | None = None,
    sharding: Sharding = "contiguous",
) -> Tensor | PackedSequence:
    """This rank's steps of a tensor that every rank has whole: nothing is sent.

    Args:
        tensor: any shape; or a PackedSequence, of which a rank gets the rows of its steps: fewer sequences on later ranks, none
            where all have ended. Recurrent modules take it inside ``context_parallel``; ``unshard_sequence`` comes before
            ``torch.nn.utils.rnn.pad_packed_sequence``, which takes whole sequences alone.
        mesh: one dimension of a mesh, or a process group: the ranks that share the sequence.
        dim: the dimension of steps; not of a PackedSequence.
        sharding: ``"contiguous"``: a run of steps each, of equal lengths as far as possible, the first ones longer by a step;
            ``"zigzag"``: two runs each, which gives every rank as much to do under a causal mask.

    Returns:
        Its own contiguous tensor, with t steps along ``dim``; t may be 0. Differentiable. A PackedSequence of one.

    Raises:
        TypeError: if ``tensor`` is no tensor or ``mesh`` neither mesh nor group.
        IndexError: if there is no such dimension.
        ValueError: for another ``sharding``, a mesh of several dimensions, or one without this process.
    """
    if isinstance(tensor, PackedSequence):
        _check_packed(dim, sharding)
        ranks, batch_sizes = Ranks.of(mesh), tensor.batch_sizes
        begin, end = cut(len(batch_sizes), ranks.size)[ranks.rank]
        rows = slice(int(batch_sizes[:begin].sum()), int(batch_sizes[:end].sum()))
        return PackedSequence(
            tensor.data[rows].clone(), batch_sizes[begin:end].clone(), tensor.sorted_indices, tensor.unsorted_indices
        )
    ranks, dim = Ranks.of(mesh), checked_dim(tensor, dim)
    runs = runs_of_ranks(tensor.shape[dim], ranks.size, checked_sharding(sharding))[ranks.rank]
    return torch.cat([tensor.narrow(dim, begin, end - begin) for begin, end in runs], dim)


def _check_packed(dim: Any, sharding: Any) -> None:
    if dim is not None:
        raise ValueError("a PackedSequence says itself which rows are a step's: leave out dim")
    if checked_sharding(sharding) != "contiguous":
        raise ValueError(ZIGZAG)


@overload
def unshard_sequence(
    tensor: Tensor, mesh: DeviceMesh | dist.ProcessGroup, *, dim: int, sharding: Sharding = "contiguous"
) -> Tensor: ...
@overload
def unshard_sequence(
    tensor: PackedSequence, mesh: DeviceMesh | dist.ProcessGroup, *, sharding: Sharding = "contiguous"
) -> PackedSequence: ...


@own_keywords
def unshard_sequence(
    tensor: Tensor | PackedSequence,
    mesh: DeviceMesh | dist.ProcessGroup,
    *,
    dim: int | None = None,
    sharding: Sharding = "contiguous",
) -> Tensor | PackedSequence:
    """The whole tensor on every rank, from parts as :func:`shard_sequence` cuts them; contiguous parts may have any lengths.

    Its gradient on a rank is the sum over the ranks of what they have for that rank's steps: of a loss that all ranks form alike
    from the whole, each gives its share, so divide such a loss by their number.

    Args:
        tensor: this rank's part; a PackedSequence of one.
        mesh, dim, sharding: as :func:`shard_sequence` takes them.

    Raises:
        TypeError, IndexError, ValueError: as :func:`shard_sequence`.
        RuntimeError: on every rank, if the other dimensions, dtypes, devices or arguments differ between ranks, or the lengths
            are not those of the sharding.
    """
    if isinstance(tensor, PackedSequence):
        return _unsharded_packed(tensor, mesh, dim, sharding)
    ranks, own, lengths = Ranks.of(mesh), Own(), [0]
    facts: dict[str, object] = {}

    def check() -> int:
        at = checked_dim(tensor, dim)
        ranks.require(tensor, "tensor")
        others = [n for i, n in enumerate(tensor.shape) if i != at]
        facts.update(call="unshard_sequence", dim=at, sharding=checked_sharding(sharding), shape=others, dtype=tensor.dtype)
        facts["requires_grad"] = torch.is_grad_enabled() and tensor.requires_grad
        lengths[0] = tensor.shape[at]
        return at

    at = own.run(check)
    sizes = [numbers[0] for numbers in own.settle(ranks, facts, lengths)]
    held = held_runs(sizes, sharding)
    return _Whole.apply(tensor, ranks, at, held)


def _unsharded_packed(packed: PackedSequence, mesh: DeviceMesh | dist.ProcessGroup, dim: Any, sharding: Any) -> PackedSequence:
    ranks, own, order = Ranks.of(mesh), Own(), packed.sorted_indices
    own.run(_check_packed, dim, sharding)
    facts = {"call": "unshard_sequence, of packed sequences", "sorted_indices": None if order is None else order.tolist()}
    own.settle(ranks, facts)
    data = unshard_sequence(packed.data, mesh, dim=0)
    batch_sizes = unshard_sequence(packed.batch_sizes.to(ranks.device), mesh, dim=0).cpu()
    return PackedSequence(data, batch_sizes, order, packed.unsorted_indices)


def held_runs(sizes: Sequence[int], sharding: Sharding) -> list[list[Run]]:
    """Which steps each rank holds, given how many: contiguous parts may be of any length.

    Raises:
        RuntimeError: if zigzag parts are not those that ``shard_sequence`` cuts.
    """
    if sharding == "contiguous":
        ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        return [[run] for run in zip(ends, ends[1:], strict=False)]
    expected = runs_of_ranks(sum(sizes), len(sizes), sharding)
    wanted = [size_of(runs) for runs in expected]
    if list(sizes) != wanted:
        raise RuntimeError(
            f"in zigzag {sum(sizes)} steps are cut into parts of {wanted} (shard_sequence does it), got {list(sizes)}"
        )
    return expected


def checked_dim(tensor: Any, dim: Any) -> int:
    checked_int("dim", dim)
    dims = checked_tensor("tensor", tensor).dim()
    if not -dims <= dim < dims:
        raise IndexError(f"dim must lie in {-dims}..{dims - 1} for a tensor of {dims} dimensions, got {dim}")
    return dim % dims


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, ranks, dim, held):
        ctx.rest = ranks, dim, held
        own = tensor.movedim(dim, 0).contiguous()
        shapes = [(size_of(runs), *own.shape[1:]) for runs in held]
        whole = own.new_empty((sum(map(size_of, held)), *own.shape[1:]))
        for part, runs in zip(swap(ranks, [own] * ranks.size, shapes), held, strict=True):
            for piece, (begin, end) in zip(part.split([end - begin for begin, end in runs]), runs, strict=True):
                whole[begin:end] = piece
        return whole.movedim(0, dim).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        ranks, dim, held = ctx.rest
        agree(ranks, {"call": "backward of unshard_sequence"})
        first = gradient.movedim(dim, 0)
        parts = [torch.cat([first[begin:end] for begin, end in runs]) for runs in held]
        total, *others = swap(ranks, parts, [parts[ranks.rank].shape] * ranks.size)
        for other in others:
            total = total + other
        return total.movedim(0, dim), None, None, None
