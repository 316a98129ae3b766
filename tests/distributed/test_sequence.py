"""Parts of a sequence: what every rank holds, the way back, and gradients through both."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pack_padded_sequence

from fastseq.distributed import positions, shard_sequence, unshard_sequence
from fastseq.distributed.sequence import cut, held_runs, runs_of_ranks, size_of


@pytest.mark.parametrize("sharding", ["contiguous", "zigzag"])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_runs_cover_the_sequence_once(sharding, n):
    for length in (0, 1, 2, 7, 8, 23):
        runs = runs_of_ranks(length, n, sharding)
        assert sorted(step for of in runs for begin, end in of for step in range(begin, end)) == list(range(length))
        sizes = [size_of(of) for of in runs]
        assert max(sizes) - min(sizes) <= (1 if sharding == "contiguous" else 2)
        assert held_runs(sizes, sharding) == runs
    assert [end - begin for begin, end in cut(7, 3)] == [3, 2, 2]


def test_zigzag_shares_causal_work_alike():
    """Pairs of a query and a key that it sees, by rank."""
    pairs = [sum(place + 1 for begin, end in of for place in range(begin, end)) for of in runs_of_ranks(64, 4, "zigzag")]
    assert len(set(pairs)) == 1
    assert len({sum(range(*of[0])) for of in runs_of_ranks(64, 4)}) == 4


def test_contiguous_parts_may_have_any_length_and_zigzag_may_not():
    assert held_runs([3, 0, 5], "contiguous") == [[(0, 3)], [(3, 3)], [(3, 8)]]
    with pytest.raises(RuntimeError, match=r"zigzag 8 steps are cut into parts of \[4, 4\].*got \[3, 5\]"):
        held_runs([3, 5], "zigzag")


def there_and_back(group):
    rank, n = dist.get_rank(group), dist.get_world_size(group)
    for sharding in ("contiguous", "zigzag"):
        for length in (1, 2, 9, 16):
            whole = torch.arange(2 * length * 3, dtype=torch.float64).view(2, length, 3)
            part = shard_sequence(whole, group, dim=1, sharding=sharding)
            places = positions(length, group, sharding=sharding)
            assert torch.equal(part, whole[:, places]) and part.is_contiguous()
            part.requires_grad_()
            back = unshard_sequence(part, group, dim=-2, sharding=sharding)
            assert torch.equal(back, whole)
            weights = torch.randn(2, length, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
            (back * weights * (rank + 1)).sum().backward()
            torch.testing.assert_close(part.grad, weights[:, places] * (n * (n + 1) // 2))
    uneven = torch.full((rank * 2, 1), float(rank), requires_grad=True)
    assert unshard_sequence(uneven, group, dim=0).flatten().tolist() == [float(r) for r in range(n) for _ in range(2 * r)]
    whole = torch.randn(8, dtype=torch.float64, requires_grad=True)
    shard_sequence(whole, group, dim=0, sharding="zigzag").sum().backward()
    assert whole.grad.sum() == len(positions(8, group, sharding="zigzag"))
    return True


def packed_there_and_back(group):
    rank, n = dist.get_rank(group), dist.get_world_size(group)
    torch.manual_seed(3)
    for lengths, is_sorted in (([7, 2, 5], False), ([9, 4, 1], True), ([1, 1], True), ([2, 8, 8, 3], False)):
        x = torch.randn(max(lengths), len(lengths), 3, dtype=torch.float64, requires_grad=True)
        whole = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=is_sorted)
        part = shard_sequence(whole, group)
        begin, end = cut(max(lengths), n)[rank]
        assert torch.equal(part.batch_sizes, whole.batch_sizes[begin:end])
        assert part.data.shape == (int(part.batch_sizes.sum()), 3)
        back = unshard_sequence(part, group)
        for own, other in zip(back, whole, strict=True):
            assert own is None and other is None or torch.equal(own, other)
        weights = torch.randn(whole.data.shape, dtype=torch.float64)
        (back.data * weights).sum().backward()
        dist.all_reduce(x.grad, group=group)  # of what each rank cut off
        again = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=is_sorted)
        (expected,) = torch.autograd.grad((again.data * weights).sum(), x)
        torch.testing.assert_close(x.grad, expected * n)
    return True


def mistakes(group):
    rank, found = dist.get_rank(group), {}
    packed = pack_padded_sequence(torch.zeros(3, 2, 1), torch.tensor([1, 3]), enforce_sorted=False)
    calls = {
        "features": lambda: unshard_sequence(torch.zeros(2, 3 + rank), group, dim=0),
        "dtype": lambda: unshard_sequence(torch.zeros(2, 3, dtype=[torch.float32, torch.float64][rank]), group, dim=0),
        "zigzag": lambda: unshard_sequence(torch.zeros(2 + 3 * rank), group, dim=0, sharding="zigzag"),
        "sharding": lambda: unshard_sequence(torch.zeros(2), group, dim=0, sharding=["zigzag", "contiguous"][rank]),
        "dim of one": lambda: unshard_sequence(torch.zeros(2), group, dim=rank),
        "name": lambda: unshard_sequence(torch.zeros(2), group, dim=0, sharding="zigzags"),
        "no tensor": lambda: shard_sequence([1], group, dim=0),
        "length": lambda: positions(-1, group),
        "dim of packed": lambda: shard_sequence(packed, group, dim=0),
        "zigzag of packed": lambda: shard_sequence(packed, group, sharding="zigzag"),
        "packed on one": lambda: unshard_sequence(packed, group) if rank else unshard_sequence(torch.zeros(2), group, dim=0),
        "order": lambda: unshard_sequence(packed._replace(sorted_indices=torch.tensor([rank, 1 - rank])), group),
        "zigzag of packed on one": lambda: unshard_sequence(packed, group, sharding=["contiguous", "zigzag"][rank]),
        "no dim": lambda: shard_sequence(torch.zeros(2), group),
    }
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            found[name] = type(error).__name__, str(error)
    return found


def test_there_and_back(ranks):
    for n in (1, 2, 4):
        assert all(ranks.run(there_and_back, size=n))
        assert all(ranks.run(packed_there_and_back, size=n))


def test_mistakes_are_told_on_every_rank(ranks):
    first, second = ranks.run(mistakes)
    assert first == second
    assert first["features"] == (
        "RuntimeError",
        "the ranks must agree, but differ in shape: rank 0 has [3], rank 1 has [4]",
    )
    assert "dtype: rank 0 has torch.float32, rank 1 has torch.float64" in first["dtype"][1]
    assert "parts of [3, 4] (shard_sequence does it), got [2, 5]" in first["zigzag"][1]
    assert "sharding: rank 0 has zigzag" in first["sharding"][1]
    assert first["dim of one"] == ("IndexError", "rank 1: dim must lie in -1..0 for a tensor of 1 dimensions, got 1")
    assert first["name"][0] == "ValueError" and "did you mean 'zigzag'" in first["name"][1]
    assert first["no tensor"][0] == "TypeError" and first["length"] == ("ValueError", "length must not be negative, got -1")
    assert first["dim of packed"][0] == first["zigzag of packed"][0] == "ValueError"
    assert "leave out dim" in first["dim of packed"][1] and "must be one run" in first["zigzag of packed"][1]
    assert "rank 0 has unshard_sequence, rank 1 has unshard_sequence, of packed sequences" in first["packed on one"][1]
    assert "sorted_indices: rank 0 has [0, 1], rank 1 has [1, 0]" in first["order"][1]
    assert first["zigzag of packed on one"][0] == "ValueError" and "rank 1: a recurrence" in first["zigzag of packed on one"][1]
    assert first["no dim"][0] == "TypeError" and "dim" in first["no dim"][1]
