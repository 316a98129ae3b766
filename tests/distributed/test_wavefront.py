"""The table of jobs: nobody starts before what it needs is there, and all that is to do is done."""

from __future__ import annotations

import itertools

import pytest

from fastseq.distributed._wavefront import Job, rounds

SIZES = list(itertools.product((1, 2, 3, 4, 7), (1, 2, 3), (1, 2, 5)))


@pytest.mark.parametrize("directions", [1, 2])
def test_every_job_is_done_once_after_what_it_needs(directions):
    for ranks, layers, micro_batches in SIZES:
        table = rounds(ranks, layers, micro_batches, directions)
        when = [{job: number for number, row in enumerate(table) if (job := row[rank]) is not None} for rank in range(ranks)]
        everything = {Job(*of) for of in itertools.product(range(layers), range(micro_batches), range(directions))}
        for rank in range(ranks):
            assert when[rank].keys() == everything
            for (layer, micro, way), number in when[rank].items():
                upstream = rank + 1 if way else rank - 1
                if 0 <= upstream < ranks:
                    assert when[upstream][Job(layer, micro, way)] < number
                assert layer == 0 or all(when[rank][Job(layer - 1, micro, other)] < number for other in range(directions))
        for way in range(directions):
            orders = {
                tuple(job for row in table if (job := row[rank]) is not None and job.direction == way) for rank in range(ranks)
            }
            assert len(orders) == 1, "messages between two ranks have no names: both must have the same order"


def test_one_way_takes_as_many_rounds_as_jobs_and_ranks_but_one():
    for ranks, layers, micro_batches in SIZES:
        assert len(rounds(ranks, layers, micro_batches, 1)) == layers * micro_batches + ranks - 1


def test_two_ways_fill_the_rounds_as_micro_batches_grow():
    """Of a layer of eight micro-batches on four ranks each has sixteen jobs, and waits three rounds at most."""
    assert len(rounds(4, 1, 8, 2)) <= 16 + 3
    assert len(rounds(4, 3, 8, 2)) <= 3 * (16 + 3)
