"""Which plans are listed, what a step's time is, what the tables say; on a machine without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fastseq.backends import BACKENDS, library
from fastseq.backends.cuda import recurrent
from fastseq.benchmarks.gpu import day, recurrent_plans, stages, tune_recurrent
from fastseq.benchmarks.gpu.recurrent_plans import Point, Target
from fastseq.benchmarks.measure.timing import Samples
from fastseq.benchmarks.workloads.clocks import HostClock
from support import cuda_host

planned = pytest.mark.skipif(library.reason() is not None, reason=str(library.reason()))
executed = pytest.mark.skipif(cuda_host.available() is not None, reason=str(cuda_host.available()))

POINT = Point("lstm", "bf16", "forward", 9, 2, 16, 1)
H200 = tune_recurrent.MODELS["h200"]


class Fake:
    """A machine on which a launch takes 50 us and twice what the model predicts for each step, on a clock of its own."""

    def __init__(self):
        self.seconds, self.launched = 0.0, []

    def run(self, direction, cell, precision, plan, arguments):
        assert (direction, cell, precision) == ("forward", "lstm", "bf16")
        assert not arguments["flags"].any()
        arguments["flags"].fill_(1)  # as a kernel leaves them
        self.launched.append((plan.numbers, arguments["steps"]))
        self.seconds += 50e-6 + arguments["steps"] * 2e-6 * plan.step_us

    def target(self, *clocks):
        machine = recurrent.Machine(lambda _: H200, lambda: "ieee", self.run)
        return Target("fake", H200, machine, "none", "cpu", (*clocks, HostClock(lambda: self.seconds)))


class NoCapture(HostClock):
    name = "CUDA graph"

    def prepare(self, run):
        raise RuntimeError("operation not permitted when stream is capturing")


def row(rank, predicted, measured, exchange="flags", **more):
    return POINT._asdict() | {
        "rank": rank, "predicted_us": predicted, "measured_us": measured, "exchange": exchange, "low_us": measured,
        "high_us": measured,
    } | more  # fmt: skip


def run(tmp_path, *argv):
    """The exit code of the command in this process, and its rows."""
    out = tmp_path / "rows.json"
    code = tune_recurrent.main(["--out", str(out), *argv])
    return code, [json.loads(line) for line in out.read_text().splitlines()]


def test_a_step_is_what_the_second_half_adds():
    whole, half = Samples([10e-6, 12e-6, 11e-6], 1), Samples([6e-6, 6e-6, 6e-6], 1)
    found = recurrent_plans.step(whole, half, 5)
    assert found["measured_us"] == pytest.approx(1.0) and found["rounds"] == 3
    assert 0.8 < found["low_us"] < 1.0 < found["high_us"] < 1.2


@planned
def test_launching_drops_out():
    fake = Fake()
    plans = dict(list(POINT.plans(H200).items())[:3])
    found = recurrent_plans.measure(POINT, plans, fake.target(NoCapture()))
    for rank, plan in plans.items():
        assert found[rank]["measured_us"] == pytest.approx(2 * plan.step_us)
        assert found[rank]["rounds"] >= 5 and found[rank]["clock"] == "wall clock"
    assert set(fake.launched) == {(plan.numbers, steps) for plan in plans.values() for steps in (4, 9)}


@planned
def test_a_clock_that_captures_is_preferred():
    fake = Fake()
    graph = HostClock(lambda: fake.seconds)
    graph.name = "CUDA graph"
    found = recurrent_plans.measure(POINT, {0: POINT.plan(H200, 0)}, fake.target(graph))
    assert found[0]["clock"] == "CUDA graph"


@planned
@pytest.mark.parametrize("direction", recurrent_plans.DIRECTIONS)
def test_candidates_are_distinct_and_the_best_by_the_model(direction):
    point = POINT._replace(B=64, H=512, direction=direction)
    rows = list(recurrent_plans.candidates(point, Target("h200", H200)))
    numbers = [tuple(r[name] for name in recurrent_plans.FIELDS) for r in rows]
    assert len(set(numbers)) == len(numbers) == rows[0]["of"] and rows[0]["rank"] == 0
    every = [point.plan(H200, rank) for rank in range(point.plan(H200, 0).of)]
    assert {plan.numbers for plan in every} == set(numbers)
    for r in rows:
        assert tuple(r[name] for name in recurrent_plans.FIELDS) == every[r["rank"]].numbers
        assert r["units"] * r["ctas"] >= 512 and r["parts"] == r["teams"] and r["predicted_us"] == every[r["rank"]].step_us
        assert r["exchange"].startswith("cluster" if r["cluster"] else "flags")
        assert r["exchange"].endswith("partial sums") == bool(r["reduce_scatter"])
    predicted = [r["predicted_us"] for r in rows]
    assert predicted == sorted(predicted)
    assert list(recurrent_plans.candidates(point, Target("h200", H200), 3)) == rows[:3]


@planned
def test_a_launch_that_fails_is_a_result_of_every_plan(monkeypatch):
    def broken(*given):
        raise RuntimeError("recurrent: a CUDA kernel could not be launched: too many resources")

    fake = Fake()
    target = fake.target()
    target = target._replace(machine=target.machine._replace(run=broken))
    good = SimpleNamespace(ok=True, reason=None, as_dict=lambda: {"ok": True})
    monkeypatch.setattr(recurrent_plans, "check", lambda *given: good)
    rows = list(recurrent_plans.candidates(POINT, target, 2))
    assert [r["failed"] for r in rows] == [
        "raised RuntimeError: recurrent: a CUDA kernel could not be launched: too many resources"
    ] * 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cell", "lstm,slstm"], "--cell: 'slstm' is none of lstm, gru, rnn_tanh"),
        (["--precision", "fp64"], "--precision: 'fp64' is none of bf16, fp16, tf32, ieee"),
        (["--direction", ""], "--direction: '' is none of forward, backward"),
        (["--lanes", "3"], "--lanes: '3' is none of 1, 2"),
        (["--hidden", "512,x"], "--hidden: '512,x' is not a list of positive numbers"),
        (["--batch", "0"], "--batch: '0' is not a list of positive numbers"),
        (["--batch", "100000", "--hidden", "100000"], "their product may be 2147483647 at most"),
        (["--steps", "1"], "--steps: 1 has no half; it must be at least 2"),
        (["--candidates", "0"], "--candidates: 0 is not above 0"),
        (["--device-model", "tpu"], "invalid choice"),
        (["--out", "/no/such/folder/rows"], "No such file"),
    ],
)
def test_bad_arguments_are_named(capsys, tmp_path, argv, message):
    with pytest.raises(SystemExit) as stop:
        tune_recurrent.main(["--device-model", "a100", "--out", str(tmp_path / "rows"), *argv])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_without_a_planner(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(library, "reason", lambda: "there is no library")
    with pytest.raises(SystemExit) as stop:
        tune_recurrent.main(["--out", str(tmp_path / "rows")])
    assert stop.value.code == 2 and "the planner is in the compiled library: there is no library" in capsys.readouterr().err


@planned
def test_a_gpu_is_taken_unless_a_model_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    for clock in ("GraphClock", "CudaClock"):
        monkeypatch.setattr(tune_recurrent, clock, lambda clock=clock: clock)
    machine = recurrent.GPU._replace(device=lambda device: H200)
    monkeypatch.setattr(recurrent, "GPU", machine)
    monkeypatch.setattr(BACKENDS["cuda"], "available", lambda: None)
    assert tune_recurrent.target(None) == Target("A GPU", H200, machine, "cuda", "cuda", ("GraphClock", "CudaClock"))
    assert tune_recurrent.target("a100") == Target("a100", tune_recurrent.MODELS["a100"])
    monkeypatch.setattr(BACKENDS["cuda"], "available", lambda: "the library has no kernels for sm_70")
    with pytest.raises(SystemExit) as stop:
        tune_recurrent.main(["--out", str(tmp_path / "rows")])
    assert stop.value.code == 2 and "backend cuda: the library has no kernels for sm_70" in capsys.readouterr().err


def test_regret_and_fits_by_hand():
    rows = [
        row(0, 1.0, 3.0),
        row(1, 2.0, 5.0),
        row(2, 3.0, 7.0),
        row(3, 1.5, 2.0, "cluster"),
        row(4, 1.0, None),
        row(5, 1.0, -1.0),
    ]
    assert tune_recurrent.regret(rows) == pytest.approx(0.5)
    assert tune_recurrent.regret(rows[1:]) is None
    found = tune_recurrent.fits(rows)
    assert list(found) == ["flags", "cluster"]
    assert found["flags"] == pytest.approx({"plans": 3, "ratio": 2.5, "correlation": 1.0, "slope": 2.0, "offset": 1.0})
    assert found["cluster"] == pytest.approx({"plans": 1, "ratio": 4 / 3})


def test_the_order_of_a_table():
    fast, slow, only_predicted = row(1, 9.0, 1.0), row(0, 1.0, 2.0), row(2, 0.5, None)
    failed = row(3, 0.1, None, failed="output is off")
    assert sorted([failed, only_predicted, slow, fast], key=tune_recurrent._order) == [fast, slow, only_predicted, failed]


@planned
def test_one_command_without_a_gpu(tmp_path):
    out = tmp_path / "rows.json"
    command = [sys.executable, "-m", "fastseq.benchmarks.gpu.tune_recurrent", "--out", str(out), "--device-model", "a100"]
    command += ["--cell", "lstm", "--precision", "bf16,ieee", "--hidden", "256,4096", "--batch", "8", "--lanes", "1"]
    done = subprocess.run([*command, "--candidates", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "predictions for a100. Nothing is measured." in done.stdout and "the model's choice" in done.stdout
    assert done.stdout.rstrip().endswith("8 combinations, 8 plans; nothing is measured")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["precision"], r["H"], r["direction"], r.get("rank")) for r in rows if "rank" in r][::2] == [
        (precision, 256, direction, 0) for precision in ("bf16", "ieee") for direction in ("forward", "backward")
    ]
    for r in rows:
        assert r["limits"]["multiprocessors"] == 108
        if "rank" in r:
            assert r["measured_us"] is None and r["check"] is None and r["predicted_us"] > 0 and not r["cluster"]
        else:
            assert r["H"] == 4096 and "do not fit" in r["obstacle"] and r["obstacle"] in done.stdout


@planned
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_the_stage_of_a_day_on_a_gpu(tmp_path):
    stage = next(stage for stage in day.table() if stage.name == "recurrent-plans")
    assert stages.walk([stage], tmp_path, 2.0)[stage.name].status == "finished"
    rows = [json.loads(line) for line in (tmp_path / "recurrent-plans.jsonl").read_text().splitlines()]
    assert len({Point(*(r[name] for name in Point._fields)) for r in rows}) == 32
    assert all("obstacle" not in r and r["rank"] < r["of"] for r in rows)
    assert day.said(tmp_path / stage.leaves, "finished") == f"32 combinations, {len(rows)} plans; nothing is measured"


@pytest.fixture
def on_the_host(monkeypatch):
    """The command as it runs on a GPU, with the kernels executed on the host; every launch is recorded."""
    launched = []

    def recorded(direction, cell, precision, plan, arguments):
        launched.append((direction, plan.numbers, arguments["steps"]))
        machine.run(direction, cell, precision, plan, arguments)

    machine = cuda_host.MACHINE
    monkeypatch.setattr(cuda_host, "MACHINE", machine._replace(run=recorded))
    host = Target("host", cuda_host.device, cuda_host.MACHINE, "cuda-host", "cpu", (HostClock(),))
    monkeypatch.setattr(tune_recurrent, "target", lambda model: host)
    monkeypatch.setattr(recurrent_plans, "SECONDS", 1e-6)
    return launched


TINY = ("--precision", "ieee", "--hidden", "24", "--batch", "3", "--lanes", "1", "--steps", "6", "--candidates", "2")


@executed
@pytest.mark.parametrize("direction", recurrent_plans.DIRECTIONS)
def test_candidates_are_checked_and_timed_on_their_own_plans(direction, on_the_host, tmp_path, capsys):
    code, rows = run(tmp_path, "--cell", "gru", "--direction", direction, *TINY)
    assert code == 0 and len(rows) == 2
    for r in rows:
        assert r["check"]["ok"] and r["measured_us"] is not None and r["low_us"] <= r["measured_us"] <= r["high_us"]
        assert r["rounds"] >= 5 and r["clock"] == "wall clock"
        numbers = tuple(r[name] for name in recurrent_plans.FIELDS)
        checked = {steps for way, plan, steps in on_the_host if (way, plan) == (direction, numbers)}
        assert checked == {1, recurrent_plans.CHECKED_STEPS, 3, 6}
    assert {plan for way, plan, _ in on_the_host if way == direction} == {
        tuple(r[n] for n in recurrent_plans.FIELDS) for r in rows
    }
    assert "2 of " in capsys.readouterr().out


@executed
def test_wrong_results_are_found_and_not_timed(on_the_host, tmp_path, monkeypatch, capsys):
    sound = cuda_host.MACHINE.run
    _, wrong, *_ = Point("lstm", "ieee", "forward", 6, 3, 24, 1).plans(cuda_host.device).values()

    def spoilt(direction, cell, precision, plan, arguments):
        sound(direction, cell, precision, plan, arguments)
        if plan == wrong:
            arguments["y"][-1] += 1

    monkeypatch.setattr(cuda_host, "MACHINE", cuda_host.MACHINE._replace(run=spoilt))
    code, rows = run(tmp_path, "--cell", "lstm", "--direction", "forward", *TINY)
    assert code == 1 and [r["check"]["ok"] for r in rows] == [True, False]
    assert "output is off by" in rows[1]["failed"] and rows[1]["measured_us"] is None and rows[0]["measured_us"] is not None
    assert capsys.readouterr().out.rstrip().endswith("; 1 plans failed")


@executed
def test_an_interrupted_run_keeps_its_rows(on_the_host, tmp_path, monkeypatch, capsys):
    measure = recurrent_plans.measure

    def interrupted(point, *more):
        if point.direction == "backward":
            raise KeyboardInterrupt
        return measure(point, *more)

    monkeypatch.setattr(recurrent_plans, "measure", interrupted)
    code, rows = run(tmp_path, "--cell", "lstm", *TINY)
    assert code == 130 and [r["direction"] for r in rows] == ["forward", "forward"]
    assert "1 combinations, 2 plans" in capsys.readouterr().out


def test_cells_and_precisions_are_those_of_the_kernels():
    assert set(recurrent_plans.MODULES) | {"rnn_relu"} == set(recurrent.CELLS) & {"lstm", "gru", "rnn_tanh", "rnn_relu"}
    for precision in recurrent_plans.WORKLOADS:
        assert POINT._replace(precision=precision).dtype in (torch.float16, torch.bfloat16, torch.float32)
        workload = POINT._replace(precision=precision).checked("cuda")
        assert (
            workload.small().T == 1 and (workload.B, workload.H) == (POINT.B, POINT.H) and workload.tf32 == (precision == "tf32")
        )
