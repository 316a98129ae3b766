"""The roofline of a workload on a machine with round numbers."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastseq.backends import library
from fastseq.benchmarks.roofline import peaks as peaks_module
from fastseq.benchmarks.roofline.model import roofline_of
from fastseq.benchmarks.roofline.peaks import Peaks, measure_peaks
from fastseq.benchmarks.workloads.base import Workload
from fastseq.benchmarks.workloads.cells import CellWorkload
from fastseq.benchmarks.workloads.recurrent import RecurrentWorkload

H, T = 256, 100
# 100 GB/s from the caches, 20 GB/s copied, 100 GFLOP/s
PEAKS = Peaks("cpu", 1, "float32", {16: 1e11, 65536: 1e11}, {65536: 2e10}, 1e11)
R = 4 * H * H * 4  # bytes of the recurrent weights of an LSTM


def test_one_row_is_bound_by_reading_the_weights_at_every_step():
    w = Workload("lstm", T, 1, H, H)
    roofline = roofline_of(w, PEAKS)
    project = 2 * T * 4 * H * H / 1e11
    assert roofline.bound == "weights"
    assert roofline.seconds == pytest.approx(T * R / 1e11 + project)


def test_many_rows_are_bound_by_arithmetic():
    roofline = roofline_of(Workload("lstm", T, 32, H, H), PEAKS)
    assert roofline.bound == "arithmetic"
    assert roofline.seconds == pytest.approx(2 * (2 * T * 32 * 4 * H * H) / 1e11)


def test_training_is_three_times_the_arithmetic():
    inference = Workload("gru", T, 32, H, H)
    training = replace(inference, mode="training")
    assert roofline_of(training, PEAKS).seconds == pytest.approx(3 * roofline_of(inference, PEAKS).seconds)


def test_packed_rows_count_as_far_as_they_go():
    w = Workload("gru", T, 8, H, H, packed=True)
    assert w.active()[0] == 8 and sum(w.active()) == w.tokens == sum(w.lengths)
    assert roofline_of(w, PEAKS).seconds < roofline_of(replace(w, packed=False), PEAKS).seconds


def test_layers_and_directions_overlap_but_all_their_weights_are_read():
    one = RecurrentWorkload("lstm", T, 1, H, H)
    stack = replace(one, layers=2, bidirectional=True)
    project = 2 * T * 4 * H * (2 * H + 2 * 2 * H) / 1e11  # two directions over the input, then two over both directions' output
    assert roofline_of(one, PEAKS).seconds == roofline_of(Workload("lstm", T, 1, H, H), PEAKS).seconds
    assert roofline_of(stack, PEAKS).seconds == pytest.approx(T * 4 * R / 1e11 + project)


@pytest.mark.parametrize(("B", "bound"), [(1, "weights"), (64, "arithmetic")])
def test_a_cell_reads_both_weights_or_computes_with_them(B, bound):
    w = CellWorkload("grucell", 64, B, H, H)
    elements = 3 * H * 2 * H
    step = max(elements * 4 / 1e11, 2 * B * elements / 1e11)
    roofline = roofline_of(w, PEAKS)
    assert roofline.bound == bound and roofline.seconds == pytest.approx(64 * step)
    assert roofline_of(replace(w, mode="training"), PEAKS).seconds == pytest.approx(3 * 64 * step)


@pytest.mark.parametrize(("mode", "launches"), [("inference", 1), ("training", 2)])
def test_a_call_takes_a_launch_at_least(mode, launches):
    tiny = Workload("rnn", 1, 1, 8, 8, mode)
    slow = replace(PEAKS, launch={"operator": 5e-3, "kernel in a graph": 1e-3})
    roofline = roofline_of(tiny, slow)
    assert (roofline.bound, roofline.seconds) == ("launch", pytest.approx(launches * 1e-3))
    assert roofline_of(tiny, replace(PEAKS, launch={"operator": 5e-3})).seconds == pytest.approx(launches * 5e-3)
    assert roofline_of(CellWorkload("rnncell", 64, 1, 8, 8, mode), slow).seconds == pytest.approx(64 * launches * 1e-3)
    assert roofline_of(tiny, replace(PEAKS, launch={"operator": 1e-12})) == roofline_of(tiny, PEAKS)


def test_weights_that_stay_on_chip_are_read_once():
    w = Workload("lstm", T, 1, H, H)
    project, compute = 2 * T * 4 * H * H / 1e11, 2 * 4 * H * H / 1e11
    once = roofline_of(w, replace(PEAKS, on_chip=R))
    assert once.seconds == pytest.approx(R / 1e11 + (T - 1) * compute + project)
    assert roofline_of(w, replace(PEAKS, on_chip=R - 1)) == roofline_of(w, PEAKS)
    short = roofline_of(replace(w, T=1), replace(PEAKS, on_chip=R))
    assert short.bound == "weights" and short.note.endswith("once")


def test_attention_grows_with_the_square_of_t():
    def seconds(T):
        return roofline_of(Workload("attention", T, 1, 64, 64), PEAKS).seconds

    assert seconds(16384) / seconds(8192) == pytest.approx(4, rel=0.05)


def test_a_gpus_peaks(monkeypatch):
    """Every rate is 1e9; a GPU of 4 multiprocessors with 100 KiB of shared memory each."""
    clocks = []

    def rate(w, clock=None, rounds=5):
        clocks.append((w.function, clock))
        return 1e9

    chip = SimpleNamespace(multi_processor_count=4, shared_memory_per_multiprocessor=100 << 10)
    monkeypatch.setattr(peaks_module, "_rate", rate)
    monkeypatch.setattr(peaks_module, "GraphClock", lambda **options: "graph")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: chip)
    peaks = measure_peaks("cuda:0", 1, "bfloat16")
    assert peaks.on_chip == 4 * (100 + 256 << 10) and peaks.least == peaks.launch["kernel in a graph"] == 1e-9
    assert ("launch", "graph") in clocks and ("launch", None) in clocks
    assert list(peaks.read) == list(peaks_module.READ_KIB["cuda"]) and peaks.gemm == 1e9 and peaks.dtype == "bfloat16"


def test_peaks_of_an_older_file():
    old = PEAKS.as_dict()
    del old["on_chip"], old["fma"]
    assert Peaks.from_dict(old) == PEAKS
    known = replace(PEAKS, fma=3e11)
    assert Peaks.from_dict(known.as_dict()) == known


@pytest.mark.parametrize(("fma", "peak", "which"), [(2e11, 2e11, "200 GFLOP/s of multiply-adds"), (5e10, 1e11, "of torch.mm")])
@pytest.mark.parametrize(
    "w", [Workload("lstm", T, 32, H, H), CellWorkload("grucell", 64, 64, H, H), Workload("attention", T, 8, H, H)]
)
def test_the_faster_arithmetic_is_the_roofline_and_named(w, fma, peak, which):
    """Nothing that was seen to run goes below it."""
    roofline, slow = roofline_of(w, replace(PEAKS, fma=fma)), roofline_of(w, PEAKS)
    assert roofline.bound == "arithmetic" and which in roofline.note and slow.note == "100 GFLOP/s of torch.mm"
    assert roofline.seconds == pytest.approx(slow.seconds * 1e11 / peak)


def test_bandwidth_between_the_measured_sizes():
    peaks = replace(PEAKS, read={64: 1e11, 256: 5e10})
    assert peaks.read_bandwidth(64 << 10) == pytest.approx(1e11)
    assert peaks.read_bandwidth(128 << 10) == pytest.approx(7.5e10)
    assert peaks.read_bandwidth(1 << 30) == pytest.approx(5e10)


@pytest.mark.slow
def test_measured_peaks_are_plausible():
    peaks = measure_peaks("cpu", 1, "float32", quick=True)
    assert all(1e8 < b < 1e13 for b in [*peaks.read.values(), *peaks.copy.values()])
    assert 1e8 < peaks.gemm < 1e14
    assert library.reason() or 1e9 < peaks.fma < 1e14
    assert 0 < peaks.launch["operator"] < 1e-2
