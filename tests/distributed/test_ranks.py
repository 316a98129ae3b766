"""Agreement before and after every operation: the same error on every rank, in time; and the processes that tests run on."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from fastseq.distributed._ranks import NUMBERS, Own, Ranks, agree, agreed, known
from support.ranks import Pool, RankError


def raised(call, *args, **kwargs):
    """Type and words of the exception, and whether the ranks of the call know it; or None."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        return type(error).__name__, str(error), isinstance(args[0], Ranks) and known(error, args[0])
    return None


def agreements(group):
    ranks = Ranks.of(group)
    found = {"numbers": agree(ranks, {"call": "x"}, [ranks.rank, 7])}
    found["many"] = agree(ranks, {}, list(range(NUMBERS)))
    found["facts"] = raised(agree, ranks, {"call": "x", "dtype": "float32" if ranks.rank else "float64"})
    found["missing"] = raised(agree, ranks, {"call": "x"} | ({"mask": 1} if ranks.rank == 1 else {}))
    found["count"] = raised(agree, ranks, {}, [0] * (1 + ranks.rank))

    class Own_(ValueError):
        pass

    def fails():
        if ranks.rank == 1:
            raise Own_("no such thing\n\tat all")
        return 3

    found["error"] = raised(agreed, ranks, fails)
    found["long"] = raised(agree, ranks, {"words": "ä" * 5000 * ranks.rank})
    own = Own()
    own.run(fails)
    found["kept"] = own.run(lambda: 5)
    found["settled"] = raised(own.settle, ranks)
    found["after"] = agree(ranks, {"call": "y"})  # nothing is left over
    return found


def test_all_ranks_raise_the_same_error(ranks):
    for size in (1, 3):
        found = ranks.run(agreements, size=size)
        first = found[0]
        assert first["numbers"] == [[r, 7] for r in range(size)] and first["many"] == [list(range(NUMBERS))] * size
        assert first["after"] == [[]] * size
        kept = [f.pop("kept") for f in found]
        assert kept == [5 if r != 1 else None for r in range(size)]
        assert all(f == first for f in found)
        if size == 1:
            assert first["facts"] is first["missing"] is first["count"] is first["error"] is first["settled"] is None
            continue
        kind, words, known = first["facts"]
        assert kind == "RuntimeError" and known
        assert words == ("the ranks must agree, but differ in dtype: rank 0 has float64, rank 1 has float32, rank 2 has float32")
        assert "mask: rank 0 has nothing, rank 1 has 1" in first["missing"][1]
        assert "how much they tell" in first["count"][1]
        assert first["error"] == first["settled"] == ("ValueError", "rank 1: Own_: no such thing\n\tat all", True)
        assert first["long"][0] == "RuntimeError" and first["long"][1].count("ä") == 15000


def who_takes_part(group):
    rank = dist.get_rank()
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("context",))
    found = {"mesh": (Ranks.of(mesh).rank, Ranks.of(mesh).size), "group": (Ranks.of(group).rank, Ranks.of(group).size)}
    found["none"] = raised(Ranks.of, None)
    found["word"] = raised(Ranks.of, "cpu")
    plane = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("data", "context"))
    found["plane"] = raised(Ranks.of, plane)
    own = Ranks.of(plane["context"])
    found["line"] = (own.rank, own.size) == (rank % 2, 2)
    other = dist.new_group([0])
    found["outside"] = raised(Ranks.of, other)
    return found


def test_who_takes_part(ranks):
    found = ranks.run(who_takes_part, size=4)
    for rank, own in enumerate(found):
        assert own["mesh"] == own["group"] == (rank, 4) and own["line"]
        assert own["none"][0] == own["word"][0] == "TypeError" and "not str" in own["word"][1]
        assert own["plane"][:2] == (
            "ValueError",
            "one dimension of the mesh is needed, such as mesh['context'], got a mesh of [2, 2]",
        )
        assert own["outside"] is None if rank == 0 else own["outside"][0] == "ValueError"


def test_without_torch_distributed():
    with pytest.raises(RuntimeError, match="not initialized"):
        Ranks.of(None)  # type: ignore[arg-type]


def raises_on_one(group):
    if dist.get_rank() == 1:
        raise KeyError("planted")
    return dist.get_rank()


def dies_on_one(group):
    if dist.get_rank() == 1:
        os._exit(3)
    return dist.get_rank()


def hangs(group):
    if dist.get_rank() == 1:
        dist.recv(torch.zeros(1), src=0)
    return dist.get_rank()


def pid(group):
    return os.getpid()


@pytest.mark.slow
def test_the_pool_tells_what_went_wrong_and_starts_anew():
    pool = Pool()
    try:
        first = pool.run(pid)
        assert pool.run(pid) == first and len(set(first)) == 2
        with pytest.raises(RankError, match="rank 1 raised(.|\n)*KeyError: 'planted'"):
            pool.run(raises_on_one)
        assert set(pool.run(pid)).isdisjoint(first)
        with pytest.raises(RankError, match=r"exit code 3"):
            pool.run(dies_on_one)
        begun = time.monotonic()
        with pytest.raises(RankError, match="rank 1 is not done(.|\n)*in hangs"):
            pool.run(hangs, seconds=8.0)
        assert time.monotonic() - begun < 60
    finally:
        pool.close()
