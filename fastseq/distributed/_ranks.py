"""Who takes part, and that all of them agree: before anything is exchanged, and after it.

Every operation here begins and ends with ``agree``, one small all_gather. So it is also where a rank that failed elsewhere meets
the others: as long as it calls ``agree`` once more with its error, all of them raise it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..ops._dispatch import is_sharded

Result = TypeVar("Result")

NUMBERS = 8  # integers that a rank may tell the others when they agree
_FAILED, _FINGERPRINT, _TEXT, _COUNT = range(4)  # of a header, before its numbers
_KINDS = {kind.__name__: kind for kind in (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError, IndexError)}


@dataclass(frozen=True)
class Ranks:
    """The processes that share a sequence: this one is ``rank`` of ``size``."""

    group: dist.ProcessGroup
    rank: int
    size: int
    device: torch.device  # of what is exchanged where nothing else says so

    @classmethod
    def of(cls, mesh: DeviceMesh | dist.ProcessGroup) -> Ranks:
        """Of one dimension of a mesh, or of a process group.

        Raises:
            TypeError: if it is neither.
            ValueError: if the mesh has more than one dimension, or this process is not among the ranks.
            RuntimeError: if torch.distributed was not initialized.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("torch.distributed is not initialized: call torch.distributed.init_process_group first")
        if isinstance(mesh, DeviceMesh):
            if mesh.ndim != 1:
                names = mesh.mesh_dim_names
                hint = f", such as mesh[{names[-1]!r}]" if names else ""
                raise ValueError(f"one dimension of the mesh is needed{hint}, got a mesh of {list(mesh.shape)}")
            group: Any = mesh.get_group() if mesh.get_coordinate() is not None else dist.GroupMember.NON_GROUP_MEMBER
        elif isinstance(mesh, dist.ProcessGroup) or mesh is dist.GroupMember.NON_GROUP_MEMBER:
            group = mesh
        else:
            raise TypeError(f"a DeviceMesh or a ProcessGroup is needed, not {type(mesh).__name__}")
        if group is dist.GroupMember.NON_GROUP_MEMBER or dist.get_rank(group) < 0:
            raise ValueError(f"process {dist.get_rank()} is not among the ranks that were given")
        return cls(group, dist.get_rank(group), dist.get_world_size(group), _device_of(group))

    def require(self, tensor: Tensor, name: str) -> None:
        """Raise RuntimeError unless it is a plain tensor, of a device whose tensors the group's backend exchanges."""
        require_plain(tensor, name)
        config = dist.get_backend_config(self.group)
        if f"{tensor.device.type}:" not in config:
            raise RuntimeError(f"{name} is on {tensor.device}, which the process group ({config}) does not exchange")

    def require_another(self, tensor: Any, name: str) -> None:
        """Raise RuntimeError if a DTensor lies on several of these ranks, of which each gives its own part of the sequence."""
        own = dist.get_process_group_ranks(self.group)
        if len(set(tensor.device_mesh.mesh.flatten().tolist()) & set(own)) > 1:
            raise RuntimeError(
                f"{name} is a DTensor on the ranks that share the sequence: give this rank's own tensor, such as "
                f"{name}.to_local(), or DTensors along another dimension of the mesh"
            )


def require_plain(tensor: Any, name: str) -> None:
    """Raise RuntimeError for a DTensor."""
    if is_sharded(tensor):
        raise RuntimeError(f"{name} is a DTensor: give this rank's own tensor, such as {name}.to_local()")


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """The CPU, if the group's backend exchanges its tensors, else the accelerator of this process."""
    kinds = [entry.partition(":")[0] for entry in dist.get_backend_config(group).split(",")]
    if "cpu" in kinds:
        return torch.device("cpu")
    return torch.device(kinds[0], torch.accelerator.current_device_index())


def agree(
    ranks: Ranks, facts: Mapping[str, object], numbers: Sequence[int] = (), error: Exception | None = None
) -> list[list[int]]:
    """The numbers of every rank, once all have come here with the same facts and none with an error.

    Args:
        facts: what must be the same on every rank, by the name that a message shall use. Values are compared by their ``str``.
        numbers: at most ``NUMBERS`` integers, as many on every rank, which may differ.
        error: what went wrong on this rank.

    Raises on every rank, in the same words:
        the first rank's error, if there is one, of its type if that is one of Python's usual ones, else RuntimeError;
        RuntimeError: if facts differ.
    """
    text = _described(error) if error is not None else "\n".join(f"{name}\t{value}" for name, value in facts.items())
    encoded = text.encode()
    fingerprint = int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little", signed=True)
    header = [int(error is not None), fingerprint, len(encoded), len(numbers), *numbers, *[0] * (NUMBERS - len(numbers))]
    headers = gathered(ranks, torch.tensor(header)).tolist()
    if not any(h[_FAILED] for h in headers) and len({(h[_FINGERPRINT], h[_COUNT]) for h in headers}) == 1:
        return [h[_COUNT + 1 : _COUNT + 1 + len(numbers)] for h in headers]
    longest = max(1, *(h[_TEXT] for h in headers))
    padded = torch.frombuffer(bytearray(encoded.ljust(longest, b"\0")), dtype=torch.uint8)
    rows = gathered(ranks, padded).cpu()
    texts = [bytes(row[: h[_TEXT]].tolist()).decode() for row, h in zip(rows, headers, strict=True)]
    failed = [rank for rank, h in enumerate(headers) if h[_FAILED]]
    raised = _error_of(failed[0], texts[failed[0]]) if failed else RuntimeError(_differing(texts))
    make_known(raised, ranks)
    raise raised from error


_turns: dict[str, int] = {}


def own_turn(ranks: Ranks) -> int:
    """The number that this rank would give to an operation of these ranks that begins now."""
    return _turns.get(ranks.group.group_name, 0) + 1


def common_turn(ranks: Ranks, turns: Sequence[int]) -> int:
    """The number that all give it: after an error some may have begun fewer."""
    _turns[ranks.group.group_name] = max(turns)
    return max(turns)


def known(error: BaseException, ranks: Ranks) -> bool:
    """Whether all of these ranks were told of an exception."""
    return ranks.group.group_name in getattr(error, "known_to", ())


def make_known(error: BaseException, ranks: Ranks) -> None:
    """Say so of it."""
    error.known_to = {*getattr(error, "known_to", ()), ranks.group.group_name}  # type: ignore[attr-defined]


def agreed(ranks: Ranks, check: Callable[[], Result]) -> Result:
    """``check()`` if it raises on no rank; otherwise the error, on every rank."""
    own = Own()
    result = own.run(check)
    own.settle(ranks)
    return result  # type: ignore[return-value]


class Own:
    """What a rank computes between exchanges: an error waits until the exchanges are done, since others count on them."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def run(self, function: Callable[..., Result], *args: Any) -> Result | None:
        """``function(*args)``; None after an error."""
        if self.error is None:
            try:
                return function(*args)
            except Exception as error:
                self.error = error
        return None

    def settle(self, ranks: Ranks, facts: Mapping[str, object] | None = None, numbers: Sequence[int] = ()) -> list[list[int]]:
        """``agree``, with the error if there was one."""
        return agree(ranks, facts or {}, [0] * len(numbers) if self.error is not None else numbers, self.error)


def gathered(ranks: Ranks, row: Tensor) -> Tensor:
    """[size, ..] from the same shape on every rank."""
    row = row.to(ranks.device)
    rows = [torch.empty_like(row) for _ in range(ranks.size)]
    dist.all_gather(rows, row, group=ranks.group)
    return torch.stack(rows)


def _described(error: Exception) -> str:
    kind = next((base.__name__ for base in type(error).__mro__ if base.__name__ in _KINDS), "RuntimeError")
    text = str(error) if type(error).__name__ == kind else f"{type(error).__name__}: {error}"
    return f"{kind}\t{text}"


def _error_of(rank: int, text: str) -> Exception:
    kind, _, message = text.partition("\t")
    return _KINDS[kind](f"rank {rank}: {message}")


def _differing(texts: Sequence[str]) -> str:
    """What the ranks disagree about."""
    given = [dict(line.split("\t", 1) for line in text.splitlines()) for text in texts]
    names = list(dict.fromkeys(name for facts in given for name in facts))
    parts = []
    for name in names:
        values = [facts.get(name, "nothing") for facts in given]
        if len(set(values)) > 1:
            parts.append(f"{name}: " + ", ".join(f"rank {rank} has {value}" for rank, value in enumerate(values)))
    return f"the ranks must agree, but differ in {'; '.join(parts) if parts else 'how much they tell each other'}"
