"""The suite recurrent for a GPU: what it plans, marks and concludes. Nothing here needs one."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby, product
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastseq
from fastseq.backends.triton import _launch
from fastseq.benchmarks import assembly
from fastseq.benchmarks.measure.case import Case, Options, Participant
from fastseq.benchmarks.measure.check import check_provider, problem_of
from fastseq.benchmarks.measure.runner import Runner
from fastseq.benchmarks.measure.timing import Effort
from fastseq.benchmarks.providers.base import PROVIDERS, RECURRENT
from fastseq.benchmarks.providers.recurrent import RECURRENT_PROVIDERS, forced
from fastseq.benchmarks.providers.registry import EVERY_PROVIDER
from fastseq.benchmarks.report.model import Cell
from fastseq.benchmarks.roofline.peaks import Peaks
from fastseq.benchmarks.suites import recurrent, recurrent_gpu, recurrent_gpu_report
from fastseq.benchmarks.workloads.base import MODES, Workload
from fastseq.benchmarks.workloads.clocks import HostClock
from fastseq.benchmarks.workloads.recurrent import PRECISIONS, RecurrentWorkload
from support import cuda_host

GPU = Options("cuda", "float32", (1,), quick=False)
POINT = RecurrentWorkload("lstm", 1024, 64, 512, 512, dtype="float16")
SMALL = RecurrentWorkload("gru", 9, 3, 24, 24, "training")
PEAKS = Peaks("cpu", 1, "float32", {1: 1e11, 64: 1e11}, {1: 1e10}, 1e11)
SECONDS = 300  # of ten minutes; the other half is for checks, profiles and compiling


def workloads(cases):
    return [(c.group, c.participants[0].workload) for c in cases]


def text(cell):
    return cell.text if isinstance(cell, Cell) else cell


def table(results, title):
    (section,) = recurrent.present(results)
    return next((t for t in section.tables if t.title.startswith(title)), None)


def test_the_plan_is_a_choice_in_order_of_worth():
    cases = recurrent.plan(GPU)
    assert [group for group, _ in groupby(c.group for c in cases)] == list(recurrent_gpu.GROUPS)
    measured = sum(c.effort.seconds * (1 + (1 + len(c.participants)) / 4) for c in cases)  # as the runner spends it
    assert measured < SECONDS
    found = {(group, replace(w, mode="")) for group, w in workloads(cases)}
    assert len(cases) == 2 * len(found)  # forward, and forward + backward
    assert {w.precision for _, w in found} == set(PRECISIONS)
    assert {w.B for _, w in found} == set(recurrent_gpu.BATCHES) and {w.H for _, w in found} == set(recurrent_gpu.WIDTHS)
    assert {w.T for _, w in found} == set(recurrent_gpu.LENGTHS) and {w.function for _, w in found} == {"lstm", "gru", "rnn"}
    assert {(w.layers, w.bidirectional) for _, w in found} == {(1, False), (1, True), (2, False), (4, False)}
    assert all(w.lengths for group, w in found if group == "packed") and {w.device for _, w in found} == {"cuda"}
    targeted = {(w.function, w.B, w.H) for group, w in found if group == "small" and w.function != "rnn"}
    assert targeted == set(product(("lstm", "gru"), (1, 8, 16, 64), (64, 128)))


def test_who_takes_part():
    for case in recurrent.plan(GPU):
        names = [p.provider for p in case.participants]
        cell = recurrent_gpu.cell_of(case.participants[0].workload.function)
        others = (
            [f"torch.compile {cell}", f"eager {cell}Cell loop"]
            if case.group == "programs"
            else [f"fastseq.{cell} (triton)", f"fastseq.{cell} (cuda)"]
        )
        assert names == [f"torch.nn.{cell}", f"fastseq.{cell}", *others]
        assert case.baseline == tuple((name, names[0]) for name in names[1:])
        assert {EVERY_PROVIDER[name].function for name in names} == {cell.lower()}
        assert len({p.workload for p in case.participants}) == 1


def test_quick_is_a_handful_and_full_everything():
    extents = ({"quick": True}, {}, {"full": True})
    quick, default, full = (workloads(recurrent.plan(replace(GPU, **extent))) for extent in extents)
    assert len(quick) <= 10 and {"packed", "small", "large", "precision"} == {group for group, _ in quick}
    assert full[: len(default)] == default and len(full) == len(set(full))
    padded = {
        (w.function, w.precision, w.B, w.H, w.T, w.mode)
        for group, w in full
        if group in ("small", "large", "precision", "length")
    }
    sizes = recurrent_gpu.BATCHES, recurrent_gpu.WIDTHS, recurrent_gpu.LENGTHS
    grid = product(("lstm", "gru", "rnn"), PRECISIONS, *sizes, ("inference", "training"))
    assert padded == {p for p in grid if p[2] * p[3] * p[4] <= recurrent_gpu.LARGEST}


def test_a_dtype_that_is_asked_for_is_the_only_one():
    found = workloads(recurrent.plan(replace(GPU, dtype="float64")))
    assert {(w.dtype, w.tf32) for _, w in found} == {("float64", False)} and len(found) == len(set(found))
    assert {group for group, _ in found} == set(recurrent_gpu.GROUPS) - {"small", "large", "length"}  # which are of bf16


@pytest.mark.parametrize(
    ("change", "eligible"),
    [
        ({}, True),
        ({"function": "rnn"}, True),
        ({"function": "gru"}, False),
        ({"function": "rnn", "B": 96, "H": 896, "I": 896}, False),
        ({"dtype": "bfloat16"}, False),
        ({"dtype": "float32", "tf32": True}, False),
        ({"B": 12}, False),
        ({"B": 128}, True),
        ({"B": 136}, False),
        ({"H": 1024}, True),
        ({"H": 1152}, False),
        ({"H": 576}, False),
        ({"I": 80}, False),
        ({"layers": 2}, False),
        ({"bidirectional": True}, False),
        ({"packed": True}, False),
    ],
)
def test_where_cudnn_may_be_persistent(change, eligible):
    w = replace(POINT, **change)
    assert w.persistent is eligible and w.detail()["persistent"] is eligible


@pytest.mark.parametrize("dies", [False, True])
@pytest.mark.parametrize("tf32", [False, True])
def test_both_sides_run_under_the_same_flags_which_are_put_back(tf32, dies):
    def flags():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.rnn.fp32_precision

    before, seen = flags(), []

    class Looks(nn.GRU):
        def forward(self, x, hx=None):
            seen.append(flags())
            if dies and len(seen) > 20:
                raise KeyboardInterrupt
            return super().forward(x, hx)

    layer = replace(PROVIDERS["torch.nn.GRU"], build=lambda w: Looks(w.I, w.H))
    runner = Runner("cpu", providers={"one": replace(layer, name="one"), "other": replace(layer, name="other")})
    runner.peaks[1, "tf32" if tf32 else "float32"] = PEAKS
    w = replace(SMALL, mode="inference", tf32=tf32)
    case = Case("recurrent", "precision", (Participant("one", w), Participant("other", w)), Effort(0.01, 12, 12))
    if dies:
        with pytest.raises(KeyboardInterrupt):
            runner.run(case)
    else:
        assert all(row.ok and row.detail["precision"] == w.precision for row in runner.run(case))
    assert set(seen) == {(tf32, "tf32" if tf32 else "ieee")}
    assert flags() == before


def test_peaks_are_measured_under_the_flags_of_their_precision(monkeypatch):
    def measure(device, threads, dtype, *, quick, known):
        return replace(PEAKS, dtype=dtype, gemm=2.0 if torch.backends.cuda.matmul.allow_tf32 else 1.0)

    monkeypatch.setattr("fastseq.benchmarks.measure.runner.measure_peaks", measure)
    runner = Runner("cpu", providers=PROVIDERS)
    for tf32 in (True, False):
        w = replace(SMALL, tf32=tf32)
        runner.run(Case("recurrent", "precision", (Participant("torch.nn.GRU", w),), Effort(0.01, 1, 1), check=False))
    assert [(p.dtype, p.gemm) for p in runner.peaks.values()] == [("tf32", 2.0), ("float32", 1.0)]


@pytest.mark.parametrize("capturable", [True, False])
def test_every_provider_is_timed_in_a_graph_too(monkeypatch, capturable):
    class Graph(HostClock):
        def __init__(self, *, device):
            super().__init__()

        def prepare(self, run):
            if not capturable:
                raise RuntimeError("operation not permitted when stream is capturing")
            return run

    monkeypatch.setattr("fastseq.benchmarks.measure.runner.GraphClock", Graph)
    monkeypatch.setattr("fastseq.benchmarks.measure.runner.IssueClock", HostClock)
    monkeypatch.setattr("fastseq.benchmarks.measure.runner._free_memory", lambda device: 1 << 40)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    runner = Runner("cuda", clock=HostClock())
    runner.peaks[1, "float32"] = PEAKS
    names = "torch.nn.GRU", "fastseq.GRU"
    case = Case("recurrent", "small", tuple(Participant(name, SMALL) for name in names), Effort(0.01, 2, 2), (names[::-1],))
    rows = runner.run(case)
    assert all(row.ok and row.time and row.host and bool(row.graph) is capturable for row in rows)
    ratio = recurrent_gpu.graph_ratio({row.provider: row for row in rows})
    assert ratio == (rows[0].graph["median"] / rows[1].graph["median"] if capturable else None)


@pytest.mark.parametrize("change", [{"layers": 2}, {"bidirectional": True}, {"layers": 2, "bidirectional": True, "packed": True}])
@pytest.mark.parametrize("name", ["torch.nn.LSTM", "fastseq.LSTM", "fastseq.LSTM (triton)"])
def test_deep_and_bidirectional_layers_pass_the_gate(name, change):
    provider, w = EVERY_PROVIDER[name], replace(SMALL, function="lstm", T=4, **change)
    result = check_provider(lambda shape: (provider.build(shape), provider.layout), w)
    assert result.ok, result.reason


@pytest.mark.parametrize("name", ["torch.compile GRU", "fastseq.GRU (triton)", "eager GRUCell loop", "eager RNNCell loop"])
def test_the_other_programs_pass_the_gate(name):
    provider = EVERY_PROVIDER[name]
    result = check_provider(
        lambda shape: (provider.build(shape), provider.layout), replace(SMALL, function=provider.function, T=4)
    )
    assert result.ok, result.reason


def test_torch_compile_tells_that_it_compiles_nothing():
    provider = RECURRENT_PROVIDERS["torch.compile LSTM"]
    w = replace(SMALL, function="lstm")
    call = w.call(provider.build(w), problem_of(w), "time")
    assert len(call.parameters) == 4 and provider.chose(call) == ["compiled graphs: 0"]


@pytest.mark.parametrize("of", [SMALL, Workload("gru", 9, 3, 24, 24, "training")], ids=["its suite", "the headline suite"])
def test_a_forced_backend_is_forced_in_the_backward_pass_too(of):
    inside = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            inside.append(active[-1])
            return grad

    class Module(nn.GRU):
        @contextmanager
        def around(self):
            active.append(True)
            try:
                yield
            finally:
                active.append(False)

        def forward(self, x, hx=None):
            output, h_n = super().forward(x, hx)
            return Watched.apply(output), h_n

    active = [False]
    of.call(Module(24, 24), problem_of(of), "time").run()
    assert inside == [True] and active[-1] is False


def test_the_forced_backend_says_why_it_has_no_row_of_its_own(monkeypatch):
    reason = RECURRENT_PROVIDERS["fastseq.GRU (triton)"].unavailable
    device = "cuda" if torch.cuda.is_available() else "cpu"
    w = replace(SMALL, device=device, T=4)
    lacking = "bfloat16" if _launch.INTERPRETED else "float64"
    monkeypatch.setattr(_launch, "INTERPRETED_DTYPES", (torch.float16, torch.float32))  # tests mend its bfloat16
    assert f"dtype {lacking} is not one of" in reason(replace(w, dtype=lacking))
    for backends, expected in ((["reference"], None), (["triton"], "it is what fastseq chooses by itself here")):
        monkeypatch.setattr(fastseq, "explain", lambda *call, found=backends: SimpleNamespace(backends=found, calls=[]))
        assert reason(w) == expected


def test_targets_count_their_lowest_point(synthetic):
    def ratio(group, w):
        if group == "small":
            return 1.4 if (w.B, w.H, w.mode, w.function) == (64, 64, "training", "gru") else 2.5
        return 6.0 if group == "packed" else 1.0 if w.precision != "bfloat16" else 3.0

    derived = recurrent.derive(synthetic.gpu(ratio))
    found = {(t["target"], t["mode"]): t for t in derived["targets"]}
    small = "H ≤ 128, B ≤ 64, bf16, LSTM and GRU"
    assert found[small, "inference"]["reached"] and found[small, "inference"]["found"] == 2.5
    lost = found[small, "training"]
    assert (
        not lost["reached"]
        and lost["found"] == 1.4
        and lost["lowest"] == "small GRU bfloat16 forward + backward T=1024 B=64 H=64"
    )
    assert found["packed, T ≥ 128", "training"]["reached"] and found["every point", "training"]["reached"]
    assert derived["losses"] == derived["below least"] == []
    shown = table(synthetic.gpu(ratio), "Targets")
    assert [text(line[-1]) for line in shown.rows] == ["reached", "not reached", *["reached"] * 4]


CUDA_TARGETS = {  # the least speed-up forward, and forward + backward, with a row that is meant and one that is not
    "256 ≤ H ≤ 1024, B ≤ 64, bf16, TF32 and fp32, LSTM and GRU": (3.0, 2.5, ("tf32", 64, 512), ("float16", 64, 512)),
    "H ≤ 1024, 128 ≤ B ≤ 256, cuDNN not persistent, LSTM and GRU": (2.0, 1.5, ("bfloat16", 256, 1024), ("bfloat16", 64, 1024)),
    "LSTM in fp16 where cuDNN may be persistent": (1.0, 0.9, ("float16", 8, 1024), ("bfloat16", 16, 1024)),
    "H = 2048, B ≤ 32, LSTM and GRU": (1.5, 1.3, ("bfloat16", 16, 2048), ("bfloat16", 64, 2048)),
}


def on_cuda(results, of=lambda row: True, **sizes):
    return [
        r for r in results.rows if r.provider.endswith("(cuda)") and of(r) and all(getattr(r, k) == v for k, v in sizes.items())
    ]


def cuda_verdicts(results):
    return {(t["target"], t["mode"]): t for t in recurrent.derive(results)["CUDA targets"]}


def speed(rows, ratio):
    for row in rows:
        row.ratio["median"] = ratio


@pytest.mark.parametrize("title", CUDA_TARGETS)
@pytest.mark.parametrize("mode", MODES)
def test_targets_of_the_cuda_kernels_count_what_they_name(synthetic, title, mode):
    least, (meant, other) = CUDA_TARGETS[title][list(MODES).index(mode)], CUDA_TARGETS[title][2:]
    results = synthetic.gpu(lambda group, w: 0.1)  # fastseq's own choice does not matter
    speed(on_cuda(results), least)
    assert cuda_verdicts(results)[title, mode]["reached"]
    for (precision, B, H), reached in ((other, True), (meant, False)):
        rows = on_cuda(
            results,
            lambda r, p=precision: r.detail["precision"] == p and r.group in ("large", "precision"),
            function="lstm",
            mode=mode,
            B=B,
            H=H,
        )
        assert rows
        speed(rows, least * 0.99)
        assert cuda_verdicts(results)[title, mode]["reached"] is reached


@pytest.mark.parametrize(
    ("title", "group", "least"), [("both directions", "bidirectional", 2.5), ("packed, T ≥ 128", "packed", 5.0)]
)
def test_targets_of_the_cuda_kernels_for_a_structure(synthetic, title, group, least):
    results = synthetic.gpu(lambda group, w: 1.0)
    speed(on_cuda(results, group=group), least)
    assert cuda_verdicts(results)[title, "training"]["reached"]
    speed(on_cuda(results, group=group, mode="training")[-1:], least * 0.99)
    assert not cuda_verdicts(results)[title, "training"]["reached"]


def test_every_row_is_held_to_its_roofline(synthetic):
    results = synthetic.gpu(lambda group, w: 1.0)
    title = "every point within 1.5× its roofline"
    for row in on_cuda(results):
        row.roofline["seconds"] = row.seconds / 1.5
    verdict = cuda_verdicts(results)[title, "inference"]
    assert verdict["reached"] and verdict["untimed"] == 0 and verdict["found"] == pytest.approx(1 / 1.5)
    slow = on_cuda(results, mode="inference")[7]
    slow.roofline["seconds"] = slow.seconds / 1.6
    verdict = cuda_verdicts(results)[title, "inference"]
    assert not verdict["reached"] and verdict["lowest"] == recurrent_gpu.name(slow)
    line = next(line for line in table(results, "Targets of fastseq on CUDA").rows if line[0] == title)
    assert [text(cell) for cell in line[3:5]] == ["67% of roofline", "62% of roofline"] and text(line[-1]) == "not reached"


def test_a_shape_without_a_plan_is_told_and_reaches_no_target(synthetic):
    results = synthetic.gpu(lambda group, w: 9.0)
    speed(on_cuda(results), 9.0)
    row = on_cuda(results, H=2048, B=16, mode="training")[0]
    row.status, row.reason, row.time, row.ratio = "unavailable", "its recurrent weights do not fit", None, None
    verdict = cuda_verdicts(results)["H = 2048, B ≤ 32, LSTM and GRU", "training"]
    assert not verdict["reached"] and verdict["untimed"] == 1
    shown = {line[0]: line[-1] for line in table(results, "fastseq on CUDA C++").rows}
    assert shown[recurrent_gpu.name(row)] == "its recurrent weights do not fit"


def test_what_fastseq_chooses_by_itself_counts_for_the_backend_that_it_chose(synthetic):
    results = synthetic.gpu(lambda group, w: 9.0)
    for row in on_cuda(results):
        row.status, row.reason, row.time, row.ratio = "unavailable", "it is what fastseq chooses by itself here", None, None
    assert not any(t["reached"] for t in cuda_verdicts(results).values())
    for row in results.rows:
        if row.chose == ["backend: triton"]:
            row.chose = ["backend: cuda", "cuDNN: none"]
    verdicts = cuda_verdicts(results)
    assert verdicts["both directions", "training"]["reached"] and verdicts["both directions", "training"]["found"] == 9.0


def test_the_cuda_kernels_say_why_they_cannot_run_and_how_they_do(monkeypatch):
    provider = RECURRENT_PROVIDERS["fastseq.GRU (cuda)"]
    if not torch.cuda.is_available():
        assert provider.unavailable(replace(SMALL, T=4)) == "runs on cuda tensors, not on cpu"
    if cuda_host.available() is not None:
        pytest.skip(cuda_host.available())
    host = forced("GRU", "cuda-host", "plan", "")
    w = replace(SMALL, T=2, layers=2)
    assert host.unavailable(w) is None
    assert "do not fit" in host.unavailable(replace(w, H=4096, mode="inference"))
    obstacles = cuda_host.why_not
    monkeypatch.setattr(cuda_host, "why_not", lambda query: ["too wide"] if query.backward else obstacles(query))
    assert host.unavailable(w) == "backward: too wide" and host.unavailable(replace(w, mode="inference")) is None
    monkeypatch.undo()
    call = w.call(host.build(w), problem_of(w), "time")
    backend, forward, backward = host.chose(call)
    assert backend == "backend: cuda-host"
    assert forward.startswith("plan, forward: ") and backward.startswith("plan, backward: ") and "CTAs" in backward


def test_a_point_below_the_least_and_one_below_it_in_a_graph(synthetic):
    results = synthetic.gpu(
        lambda group, w: 0.85 if (group, w.mode) == ("4 layers", "training") and w.H == 128 else 2.0,
        lambda group, w: 0.7 if group == "2 layers" else 1.0,
    )
    derived = recurrent.derive(results)
    assert len(derived["below least"]) == 2 and all(point.startswith("4 layers") for point in derived["below least"])
    assert len(derived["below least in a graph"]) == 8
    every = next(t for t in derived["targets"] if (t["target"], t["mode"]) == ("every point", "training"))
    assert every["found"] == 0.85 and not every["reached"]
    assert len(table(results, "Points that fastseq loses: 2").rows) == 2


@pytest.mark.parametrize(("status", "reached"), [("wrong", False), ("unavailable", False), ("skipped", True)])
def test_a_point_without_a_time_reaches_no_target_unless_nobody_could_run_it(synthetic, status, reached):
    results = synthetic.gpu(lambda group, w: 9.0)
    row = next(r for r in results.rows if r.group == "packed" and r.provider == "fastseq.LSTM")
    row.status, row.reason, row.time, row.ratio, row.graph = status, "because", None, None, None
    found = {(t["target"], t["mode"]): t for t in recurrent.derive(results)["targets"]}
    assert found["packed, T ≥ 128", row.mode]["reached"] is reached and found["every point", row.mode]["reached"] is reached
    assert table(results, "Points that fastseq loses: 1").rows[0][2] == "because"


def test_what_cudnn_runs_persistently_is_marked_and_listed_apart(synthetic):
    results = synthetic.gpu(lambda group, w: 1.5)
    eligible = [p for p in recurrent_gpu.points_of(results.rows) if recurrent_gpu.own_of(p).detail["persistent"]]
    apart = table(results, "Where torch lets cuDNN choose")
    assert len(eligible) == len(apart.rows) > 0 and {line[0] for line in apart.rows} == {"persistent"}
    tables = [t for t in recurrent.present(results)[0].tables if t.heat]
    marked = [text(cell) for t in tables for line in t.rows for cell in line if "×ᴾ" in text(cell)]
    assert marked == ["1.50×ᴾ"] * len(eligible)
    ran = [line[-3] for line in table(results, "Every point").rows]
    assert ran.count("persistentᴾ") == len(eligible) and ran.count("standard") == len(ran) - len(eligible)


@pytest.mark.parametrize(("launches", "form"), [(3, "whole sequence"), (1024, "step by step"), (None, None)])
def test_the_form_is_read_from_the_launches(synthetic, launches, form):
    row = next(r for r in synthetic.gpu(lambda group, w: 1.0).rows if r.provider == "fastseq.GRU" and r.T == 1024)
    row.launches = launches
    assert recurrent_gpu_report._ran(row) == ["triton", *([form] if form else [])]


def test_other_programs_have_their_own_table(synthetic):
    results = synthetic.gpu(lambda group, w: 2.0, lambda group, w: 4.0)
    shown = table(results, "Beside other ways")
    assert len(shown.rows) == 8 and [text(c) for c in shown.rows[0][:5]] == ["LSTM", "forward", "128", "16", "128"]
    assert [text(c) for c in shown.rows[0][11:14]] == ["500 µs", "250 µs", "2.00×"]


def test_the_page_of_a_gpu(synthetic):
    results = synthetic.gpu(lambda group, w: 0.8 if w.B == 1 else 2.5)
    page = assembly.page(results)
    assert "Speed-up over torch.nn, every point" in page and "not reached" in page and "cuDNN ran" in page
    strips = recurrent_gpu_report._strips(results.rows, "inference")
    targets = {strip.label: strip.target for strip in strips if strip.target}
    assert targets == {"LSTM, small": 2.0, "GRU, small": 2.0, "LSTM, packed": 5.0, "GRU, packed": 5.0}
    assert {cell for cell in RECURRENT} <= {strip.label.split(",")[0] for strip in strips}
