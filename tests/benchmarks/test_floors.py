"""The floor of a workload on a machine with round numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastseq.benchmarks.cells import CellWorkload
from fastseq.benchmarks.floors import Peaks, floor_of, measure
from fastseq.benchmarks.recurrent import RecurrentWorkload
from fastseq.benchmarks.workloads import Workload

H, T = 256, 100
# 100 GB/s from the caches, 20 GB/s copied, 100 GFLOP/s
PEAKS = Peaks("cpu", 1, "float32", {16: 1e11, 65536: 1e11}, {65536: 2e10}, 1e11)
R = 4 * H * H * 4  # bytes of the recurrent weights of an LSTM


def test_one_row_is_bound_by_reading_the_weights_at_every_step():
    w = Workload("lstm", T, 1, H, H)
    floor = floor_of(w, PEAKS)
    project = 2 * T * 4 * H * H / 1e11
    assert floor.bound == "weights"
    assert floor.seconds == pytest.approx(T * R / 1e11 + project)


def test_many_rows_are_bound_by_arithmetic():
    floor = floor_of(Workload("lstm", T, 32, H, H), PEAKS)
    assert floor.bound == "arithmetic"
    assert floor.seconds == pytest.approx(2 * (2 * T * 32 * 4 * H * H) / 1e11)


def test_training_is_three_times_the_arithmetic():
    inference = Workload("gru", T, 32, H, H)
    training = replace(inference, mode="training")
    assert floor_of(training, PEAKS).seconds == pytest.approx(3 * floor_of(inference, PEAKS).seconds)


def test_packed_rows_count_as_far_as_they_go():
    w = Workload("gru", T, 8, H, H, packed=True)
    assert w.active()[0] == 8 and sum(w.active()) == w.tokens == sum(w.lengths)
    assert floor_of(w, PEAKS).seconds < floor_of(replace(w, packed=False), PEAKS).seconds


def test_layers_and_directions_overlap_but_all_their_weights_are_read():
    one = RecurrentWorkload("lstm", T, 1, H, H)
    stack = replace(one, layers=2, bidirectional=True)
    project = 2 * T * 4 * H * (2 * H + 2 * 2 * H) / 1e11  # two directions over the input, then two over both directions' output
    assert floor_of(one, PEAKS).seconds == floor_of(Workload("lstm", T, 1, H, H), PEAKS).seconds
    assert floor_of(stack, PEAKS).seconds == pytest.approx(T * 4 * R / 1e11 + project)


@pytest.mark.parametrize(("B", "bound"), [(1, "weights"), (64, "arithmetic")])
def test_a_cell_reads_both_weights_or_computes_with_them(B, bound):
    w = CellWorkload("grucell", 64, B, H, H)
    elements = 3 * H * 2 * H
    step = max(elements * 4 / 1e11, 2 * B * elements / 1e11)
    floor = floor_of(w, PEAKS)
    assert floor.bound == bound and floor.seconds == pytest.approx(64 * step)
    assert floor_of(replace(w, mode="training"), PEAKS).seconds == pytest.approx(3 * 64 * step)


def test_attention_grows_with_the_square_of_t():
    def seconds(T):
        return floor_of(Workload("attention", T, 1, 64, 64), PEAKS).seconds

    assert seconds(16384) / seconds(8192) == pytest.approx(4, rel=0.05)


def test_bandwidth_between_the_measured_sizes():
    peaks = replace(PEAKS, read={64: 1e11, 256: 5e10})
    assert peaks.read_bandwidth(64 << 10) == pytest.approx(1e11)
    assert peaks.read_bandwidth(128 << 10) == pytest.approx(7.5e10)
    assert peaks.read_bandwidth(1 << 30) == pytest.approx(5e10)


@pytest.mark.slow
def test_measured_peaks_are_plausible():
    peaks = measure("cpu", 1, "float32", quick=True)
    assert all(1e8 < b < 1e13 for b in [*peaks.read.values(), *peaks.copy.values()])
    assert 1e8 < peaks.gemm < 1e14
    assert 0 < peaks.launch["operator"] < 1e-2
