"""The day on a GPU, with stages that are small Python programs or not run at all, and a clock that they advance."""

from __future__ import annotations

import json
import os
import signal
import sys
import tarfile
import time
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import psutil
import pytest
import torch

import fastseq
from fastseq.backends import BACKENDS, use_backend
from fastseq.benchmarks.gpu import baselines, day, sanitizer_smoke, self_check, stages, transfer
from fastseq.benchmarks.gpu.stages import Outcome, Stage
from fastseq.benchmarks.suites import SUITES
from fastseq.benchmarks.workloads.clocks import clock_for
from fastseq.cells import CELLS
from fastseq.ops.types import Spec


@pytest.fixture(autouse=True)
def own_store(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FASTSEQ_CACHE", str(tmp_path_factory.mktemp("store")))


interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
TABLE = [Stage(name, ("program",), 4, f"{name}.txt") for name in ("a", "b", "c")]


class Fake:
    """Runs stages in no time but for the clock: `ends` has the minutes and the exit status of a stage, None if it never ends."""

    def __init__(self, **ends):
        self.ends, self.ran, self.seconds = ends, [], 0.0

    def now(self):
        return self.seconds

    def execute(self, stage, folder, seconds):
        self.ran.append(stage.name)
        minutes, code = self.ends.get(stage.name, (1, 0))
        if isinstance(code, BaseException):
            raise code
        (folder / stage.log).write_text(f"{stage.name} began\nthe last words of {stage.name}\n\n")
        if 60 * minutes > seconds:
            minutes, code = seconds / 60, None
        self.seconds += 60 * minutes
        return code

    def walk(self, folder, minutes=25.0, table=TABLE, **options):
        return stages.walk(table, folder, minutes, now=self.now, execute=self.execute, **options)

    def day(self, monkeypatch, *argv, table=TABLE):
        monkeypatch.setattr(day, "table", lambda **options: list(table))
        monkeypatch.setattr(day, "device_name", lambda: "NVIDIA H100 80GB HBM3")
        walk = partial(stages.walk, now=self.now, execute=self.execute)
        monkeypatch.setattr(day, "stages", SimpleNamespace(walk=walk, last_line=stages.last_line))
        return day.main([str(a) for a in argv])


def statuses(outcomes):
    return {name: outcome.status for name, outcome in outcomes.items()}


def program(code, **more):
    return Stage(**{"name": "own", "command": (sys.executable, "-c", code), "minutes": 1, "leaves": "own.txt"} | more)


def test_stages_run_in_their_order_and_what_fails_or_takes_too_long_stops_nothing(tmp_path):
    fake = Fake(a=(1, 3), b=(9, 0))
    found = fake.walk(tmp_path)
    assert fake.ran == ["a", "b", "c"]
    assert statuses(found) == {"a": "failed", "b": "timed out", "c": "finished"}
    assert found["a"].reason == "exit code 3: the last words of a"
    assert found["b"] == Outcome("timed out", "stopped after 4.0 minutes", 4.0)


def test_what_the_time_does_not_reach_is_left_out(tmp_path):
    fake = Fake(a=(3, 0), b=(4, 0))
    found = fake.walk(tmp_path, 6.0)
    assert statuses(found) == {"a": "finished", "b": "timed out", "c": "left out"}
    assert found["b"].minutes == 3.0 and found["c"].reason == "no time was left"


def test_another_run_goes_on_where_the_last_one_stopped(tmp_path):
    Fake(a=(1, 1), b=(4, 0)).walk(tmp_path, 5.0)
    again = Fake()
    found = again.walk(tmp_path, 10.0)
    assert again.ran == ["c", "a"]  # b is finished, a had its turn
    assert set(statuses(found).values()) == {"finished"}
    everything = Fake()
    everything.walk(tmp_path, again=True)
    assert everything.ran == ["a", "b", "c"]


def test_a_stage_that_was_cut_short_comes_last_and_gets_all_the_time_that_is_left(tmp_path):
    Fake(a=(9, 0)).walk(tmp_path, 4.0)
    fake = Fake(a=(9, 0), b=(1, 1))
    found = fake.walk(tmp_path, 12.0)
    assert fake.ran == ["b", "c", "a"] and found["a"] == Outcome("finished", "", 9.0)
    assert Fake().walk(tmp_path, 0.1)["b"].status == "failed"  # what is known stays where no time is left


def test_a_stage_whose_file_is_gone_is_not_finished(tmp_path):
    Fake().walk(tmp_path)
    (tmp_path / "b.txt").unlink()
    fake = Fake()
    fake.walk(tmp_path)
    assert fake.ran == ["b"]


def test_only_the_stages_that_run_are_forgotten(tmp_path):
    Fake().walk(tmp_path)
    fake = Fake(b=(1, 1))
    found = fake.walk(tmp_path, table=TABLE[1:2], again=True)
    assert fake.ran == ["b"] and statuses(found) == {"a": "finished", "b": "failed", "c": "finished"}


def test_again_begins_with_nothing(tmp_path):
    Fake().walk(tmp_path)
    found = Fake(b=(1, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        found.walk(tmp_path, again=True)
    assert [(tmp_path / f"{name}.txt").exists() for name in "abc"] == [True, False, False]


def test_every_stage_is_kept_before_the_next_one_begins(tmp_path, monkeypatch):
    fake = Fake(b=(1, KeyboardInterrupt()))
    assert fake.day(monkeypatch, "--out", tmp_path) == 130
    assert statuses(stages.recall(tmp_path)) == {"a": "finished"}
    assert "| a | finished |" in (tmp_path / "summary.md").read_text()


def test_a_missing_tool_is_a_reason(tmp_path):
    fake = Fake()
    found = fake.walk(tmp_path, table=[replace(TABLE[0], tool="no-such-program-here")])
    assert found["a"] == Outcome("left out", "no-such-program-here is not installed") and fake.ran == []


def test_a_program_that_is_not_there(tmp_path):
    found = stages.walk([replace(TABLE[0], command=("no-such-program-here",))], tmp_path, 1.0)
    assert found["a"].status == "failed" and found["a"].reason.startswith("cannot start no-such-program-here: No such file")


def test_a_stage_must_leave_its_file_and_only_that(tmp_path):
    write = "import pathlib, sys; [pathlib.Path(f).write_text('x') for f in sys.argv[1:]]"
    own = program(write, leaves="own/results.json", drops=("own/report.html",))
    command = (*own.command, "{folder}/own/results.json", "{folder}/own/report.html")
    assert stages.walk([own], tmp_path, 1.0)["own"].reason == "it left no own/results.json"
    assert (tmp_path / "own.txt").is_file()  # the log of what did not finish
    assert stages.walk([replace(own, command=command)], tmp_path, 1.0)["own"].status == "finished"
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["results.json", "stages.json"]


def test_a_program_gets_its_environment_and_its_words_are_kept(tmp_path):
    own = program("import os; print(os.environ['MARK'], os.getcwd())", environment={"MARK": "seen"})
    assert stages.walk([own], tmp_path, 1.0)["own"].status == "finished"
    assert (tmp_path / "own.txt").read_text() == f"seen {stages.ROOT}\n"


@pytest.mark.parametrize("parent", (signal.default_int_handler, signal.SIG_IGN), ids=("foreground", "background"))
def test_a_program_whose_time_is_up_is_interrupted_and_its_children_end(tmp_path, parent):
    code = (
        "import subprocess, time\n"
        "child = subprocess.Popen(['sh', '-c', 'trap : INT; while :; do sleep 1; done'])\n"
        "print(child.pid, flush=True)\n"
        "try: time.sleep(60)\n"
        "except KeyboardInterrupt: print('interrupted', flush=True)\n"
    )
    before = signal.signal(signal.SIGINT, parent)
    try:
        assert stages.execute(program(code), tmp_path, 3.0) is None
    finally:
        signal.signal(signal.SIGINT, before)
    pid, word = (tmp_path / "own.txt").read_text().split()
    assert word == "interrupted"
    for _ in range(50):
        if not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    raise AssertionError("the child still runs")


def test_the_summary_names_what_failed_first(tmp_path, monkeypatch, capsys):
    (tmp_path / "environment.json").write_text(
        json.dumps({"versions": {"torch": "2.13.0"}, "time": "2030-01-01", "git": "abc", "library": "sm_90a"})
    )
    suite = replace(TABLE[2], leaves="c/results.json")
    (tmp_path / "c").mkdir()
    rows = [{"status": status} for status in ("ok", "ok", "wrong")]
    (tmp_path / "c/results.json").write_text(json.dumps({"rows": rows}))
    table = [*TABLE[:2], suite, replace(suite, name="d", leaves="d.txt", tool="no-such-program")]
    assert Fake(b=(1, 2)).day(monkeypatch, "--out", tmp_path, table=table) == 1
    assert "b: failed after 1.0 minutes: exit code 2: the last words of b" in capsys.readouterr().out
    lines = (tmp_path / "summary.md").read_text().splitlines()
    assert lines[0] == "# NVIDIA H100 80GB HBM3"
    assert lines[2] == "torch 2.13.0; commit abc; 2030-01-01. Library: sm_90a."
    assert lines[6:] == [
        "| b | failed | 1.0 | exit code 2: the last words of b |",
        "| d | left out | 0.0 | no-such-program is not installed |",
        "| a | finished | 1.0 | the last words of a |",
        "| c | finished | 1.0 | rows: 2 ok, 1 wrong |",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_cuda_device(capsys):
    assert day.main([]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: gpu-day needs a CUDA device: ") and said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stage", "lunch"], "there is no stage 'lunch'; there are: a, b, c"),
        (["--minutes", "0"], "--minutes: 0 is not above 0"),
        (["--minutes", "nan"], "--minutes: nan is not above 0"),
        (["--out", "{file}/folder"], "cannot make the folder"),
        (["--out", "{foreign}"], "does not hold the stages of an earlier run"),
        (["--out", "{foreign}/out", "--archive", "{file}/x.tar.gz"], "--archive: cannot write"),
    ],
)
def test_bad_arguments_are_named(argv, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "stages.json").write_text('{"a": 1}')
    assert Fake().day(monkeypatch, *(a.format(file=tmp_path / "file", foreign=tmp_path) for a in argv)) == 2
    assert message in capsys.readouterr().err


def test_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(day, "LIBRARY", tmp_path / "libfastseq.so")
    assert day.main(["--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    found = {stage.name: stage for stage in day.table("python3")}
    assert listed == list(found) and len(listed) == len(set(listed))
    assert listed[:7] == ["library", "environment", "info", "self-check", "baselines", "tune", "tests"]
    for name in SUITES:
        assert found[name].leaves == f"{name}/results.json" and "--resume" in found[name].command
        assert found[name].command[-2:] == ("--restarts", "1")
    again, first = found[listed[-1]], found["sequential-vs-parallel"]
    assert again.name == "restarts" and (*again.command, "--restarts", "1") == first.command and again.leaves == first.leaves
    assert set(day.SUITE_MINUTES) <= set(SUITES)
    files = {part for part in found["tests"].command if part.endswith(".py")}
    assert {"tests/ops/test_recurrent_gpu.py", "tests/csrc/test_host.py"} <= files and "tests/test_pack.py" not in files
    assert all(stage.environment["FASTSEQ_CACHE"] == "{folder}" for stage in found.values())
    (tmp_path / "libfastseq.so").write_text("")
    assert [stage.name for stage in day.table()] == listed[1:]
    assert day.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_eight_minutes_have_room_for_what_is_worth_most():
    """Each stage in its share, though none should end before: the first suite begins."""
    scale, left = 8 / day.MINUTES, 8.0
    for stage in day.table():
        if stage.name in SUITES:
            break
        left -= scale * stage.minutes
    assert left >= scale * stages.LEAST_MINUTES


def test_a_day_in_which_every_stage_hangs_ends_in_time(tmp_path):
    table = [replace(stage, tool="") for stage in day.table()]
    fake = Fake(**{stage.name: (99, 0) for stage in table})
    found = fake.walk(tmp_path, 8.0, table=table, scale=8 / day.MINUTES)
    assert fake.seconds <= 480 and fake.ran[:6] == [stage.name for stage in table][:6]
    assert {*statuses(found).values()} == {"timed out", "left out"} and statuses(found)["attention"] == "timed out"


def test_a_short_day_shortens_its_stages(tmp_path):
    fake = Fake(a=(9, 0), b=(0.2, 0))
    found = fake.walk(tmp_path, 8.0, scale=0.32)
    assert found["a"] == Outcome("timed out", "stopped after 1.3 minutes", 1.28) and found["b"].status == "finished"
    assert Fake(a=(9, 0)).walk(tmp_path / "another", 1.3, scale=0.32)["b"].status == "left out"


def test_a_command_is_told_its_time(tmp_path):
    own = program("import sys; print(*sys.argv[1:])")
    own = replace(own, command=(*own.command, "{seconds}", "{minutes}"), environment={"FASTSEQ_CACHE": "{folder}"})
    for seconds, told in ((20.0, "12 0.200\n"), (10.0, "5 0.083\n")):
        assert stages.execute(own, tmp_path, seconds) == 0
        assert (tmp_path / "own.txt").read_text() == told


def test_the_archive_is_written_after_every_stage(tmp_path, monkeypatch, capsys):
    seen, folder, file = [], tmp_path / "out", tmp_path / "day.tar.gz"

    class Watched(Fake):
        def execute(self, stage, folder, seconds):
            with tarfile.open(file) as tar:
                seen.append(sorted(tar.getnames()))
            return super().execute(stage, folder, seconds)

    fake = Watched(c=(1, KeyboardInterrupt()))
    assert fake.day(monkeypatch, "--out", folder, "--archive", file) == 130
    every = [["a.txt"], ["a.txt", "b.txt"]]
    assert seen == [[], *([f"out/{name}" for name in sorted([*done, "stages.json", "summary.md"])] for done in every)]
    with tarfile.open(file) as tar:
        assert b"| b | finished |" in tar.extractfile("out/summary.md").read()


def test_an_archive_has_room_for_the_small_files(tmp_path):
    folder, file = tmp_path / "out", tmp_path / "day.tar.gz"
    folder.mkdir()
    (folder / "small.txt").write_text("kept")
    (folder / "large.bin").write_bytes(os.urandom(20_000))
    assert transfer.archive(folder, file, most=10_000) == ["large.bin"] and file.stat().st_size <= 10_000
    with tarfile.open(file) as tar:
        assert sorted(tar.getnames()) == ["out/left-out.txt", "out/small.txt"]
        assert tar.extractfile("out/left-out.txt").read() == b"large.bin: 0.0 MiB\n"
    assert transfer.archive(folder, file) == [] and sorted(p.name for p in tmp_path.iterdir()) == ["day.tar.gz", "out"]


@pytest.mark.skipif(not (stages.ROOT / ".git").exists(), reason="no git checkout")
def test_what_travels_is_small_enough(capsys):
    sizes = transfer.travels(stages.ROOT)
    assert {"setup.py", "benchmarks/gpu/day.py"} <= sizes.keys() and not any(name.startswith(".venv") for name in sizes)
    assert (transfer.CARRIED in sizes) == (stages.ROOT / transfer.CARRIED).is_file()
    assert transfer.too_large(sizes) == ""
    more = sizes | {"a model": transfer.MOST_THERE}
    assert "and 64.0 MiB may: a model 64.0 MiB, " in transfer.too_large(more)
    assert day.main(["--travels"]) == 0 and f"in {len(sizes)} files, of at most 64 MiB" in capsys.readouterr().out


def test_the_summary_says_which_kernels_are_wrong(tmp_path):
    rows = [{"family": f"triton: {name}", "right": name != "b", "words": "y: error 1"} for name in "abc"]
    (tmp_path / "self-check.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"family": "cut sho')
    (own,) = (stage for stage in day.table() if stage.name == "self-check")
    text = day.summary("x", {"self-check": Outcome("failed", "exit code 1")}, [own], tmp_path)
    assert "| self-check | failed | 0.0 | exit code 1; families: 2 right, 1 wrong |" in text
    assert text.endswith("\n## Wrong kernels\n\n* triton: b: y: error 1\n")


def test_a_rehearsal_against_the_clock(tmp_path, capsys):
    """The real commands, on this CPU, in a day of seconds: what is cut short is so in time, and the archive has what there is."""
    began, file = time.monotonic(), tmp_path / "day.tar.gz"
    names = [argument for name in ("self-check", "baselines") for argument in ("--stage", name)]
    assert day.main(["--rehearse", "--minutes", "0.7", *names, "--out", str(tmp_path / "out"), "--archive", str(file)]) in (0, 1)
    assert time.monotonic() - began < 60
    assert set(statuses(stages.recall(tmp_path / "out"))) == {"self-check", "baselines"}
    with tarfile.open(file) as tar:
        assert {"out/summary.md", "out/stages.json", "out/self-check.jsonl"} <= {*tar.getnames()}


def child_of(monkeypatch, tmp_path, faults):
    """`self_check` with workers that do what ``faults`` says at a call of this number."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, os, sys, time\n"
        f"faults = {faults!r}\n"
        "for line in sys.stdin:\n"
        "    fault = faults.get(int(line), '')\n"
        "    if fault == 'crashes': os.kill(os.getpid(), 11)\n"
        "    if fault == 'hangs': time.sleep(60)\n"
        "    row = {'family': 'family ' + line.strip(), 'right': fault != 'is wrong', 'words': fault}\n"
        "    print(json.dumps([row]), flush=True)\n"
    )
    monkeypatch.setattr(self_check, "COMMAND", (sys.executable, str(script)))


@pytest.mark.parametrize("workers", [1, 3])
def test_a_family_that_crashes_or_hangs_costs_no_other(tmp_path, monkeypatch, capsys, workers):
    child_of(monkeypatch, tmp_path, {2: "crashes", 4: "hangs", 5: "is wrong"})
    monkeypatch.setattr(self_check, "calls", lambda device: dict.fromkeys(map(str, range(8))))
    out = tmp_path / "rows.jsonl"
    assert self_check.main(["--out", str(out), "--device", "cpu", "--each", "1.5", "--workers", str(workers)]) == 1
    rows = {row["family"]: row["words"] for row in map(json.loads, out.read_text().splitlines()) if not row["right"]}
    assert rows == {
        "2": "its process ended with signal 11",
        "4": "took more than 2 s and was ended",
        "family 5": "is wrong",
    }
    assert "5 families are right, 3 wrong" in capsys.readouterr().out


def test_what_the_self_check_has_no_time_for_is_no_verdict(tmp_path, monkeypatch, capsys):
    child_of(monkeypatch, tmp_path, {1: "hangs"})
    monkeypatch.setattr(self_check, "calls", lambda device: dict.fromkeys(map(str, range(4))))
    out = tmp_path / "rows.jsonl"
    assert self_check.main(["--out", str(out), "--device", "cpu", "--seconds", "1.5", "--workers", "1"]) == 0
    assert capsys.readouterr().out.endswith("1 families are right, 0 wrong; no time was left for 3 calls\n")


def test_every_cell_feature_and_dtype_is_among_the_calls():
    found = list(self_check.calls(torch.device("cpu")).values())
    recurrent = {(query.cell, query.dtype) for _, query in found if query.op == "recurrent"}
    assert recurrent >= {(cell, dtype) for cell in CELLS for dtype in self_check.DTYPES}
    attention = [query for _, query in found if query.op == "attention"]
    assert {use for query in attention for use in query.uses} == ALL_USES
    assert {query.layout for query in attention} == {"padded", "packed"}
    assert {query.kind for _, query in found if query.op == "scan"} == {"real", "complex", "blocks"}
    assert {query.call for _, query in found if query.op != "recurrent"} == {"forward", "weights", "decode"}
    first = [query for _, query in found[:6]]
    assert {query.op for query in first} == {"recurrent", "attention"} and all(query.dtype == torch.bfloat16 for query in first)


# what a query may name, but for the place of packed rows and a relative key's table
_TENSORS = {*Spec._fields[: Spec._fields.index("scale")]} - {"relative_k", "cu_q", "cu_k", "seed"}
ALL_USES = _TENSORS | {"softcap", "dropout", "dropout of a part", "bottom_right"}


def test_the_self_check_of_the_cpus_kernels(tmp_path, capsys):
    """A few of the real calls in a real process."""
    out, name = tmp_path / "rows.jsonl", "cpu: recurrent forward, gru"
    assert self_check.main(["--out", str(out), "--device", "cpu", "--workers", "1", "--only", f"{name}, "]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    dtypes = ("bfloat16", "float16", "float32")
    assert {row["family"] for row in rows} >= {f"{name}, {dtype}" for dtype in dtypes}
    assert all(row["right"] for row in rows) and f"{len(rows)} families are right, 0 wrong" in capsys.readouterr().out


def test_the_baselines_of_a_cpu(tmp_path, capsys):
    """Each kind; those that a CPU has no kernel for say so."""
    every = list(baselines.baselines("cpu", small=True))
    kinds = ("copy", "product", "LSTM", "GRU", "SDPA MATH", "SDPA CUDNN")
    picked = [next(baseline for baseline in every if baseline.name.startswith(kind)) for kind in kinds]
    rows = [baselines.measured(baseline, clock_for("cpu")) for baseline in picked]
    assert all(row["time"]["median"] > 0 and row["rate"] > 0 for row in rows[:-1]) and "failed" in rows[-1]
    assert baselines.main(["--out", str(tmp_path / "rows.jsonl"), "--device", "cpu", "--seconds", "0.01"]) == 0
    assert "the time is up" in capsys.readouterr().out


@pytest.mark.parametrize("program", [baselines, self_check])
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--device", "cpu", "--out", "{file}/x"], "Not a directory"),
        (["--device", "gpu", "--out", "{file}"], "gpu"),
        (["--device", "cuda", "--out", "{file}"], "torch finds no CUDA device"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_bad_arguments_of_the_stages(program, argv, message, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        program.main([a.format(file=tmp_path / "file") for a in argv])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_suite_goes_on_where_it_was_cut_short(tmp_path):
    """The command of the table, on this machine's CPU and a few points: a second run adds those that are missing."""
    suite = next(stage for stage in day.table() if stage.name == "cells")
    few = ("--quick", "--threads", "1", "--only")
    command = tuple("cpu" if part == "cuda" else part for part in suite.command) + few
    of_one = 11 if find_spec("onnxruntime") and find_spec("onnx") else 9
    for only, rows in (("cell=rnncell H=128 B=1", of_one), ("cell=rnncell H=128", 2 * of_one)):
        stage = replace(suite, command=(*command, only))
        assert stages.walk([stage], tmp_path, 2.0, again=False)["cells"].status == "finished"
        assert len(json.loads((tmp_path / "cells/results.json").read_text())["rows"]) == rows
        assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["results.json", "stages.json"]
        (tmp_path / "stages.json").unlink()


def test_the_environment_is_written(tmp_path):
    own = next(stage for stage in day.table() if stage.name == "environment")
    assert stages.walk([own], tmp_path, 1.0)["environment"].status == "finished"
    found = json.loads((tmp_path / "environment.json").read_text())
    assert found["versions"]["torch"] == torch.__version__ and found["library"]
    assert day.summary("x", {}, [own], tmp_path).count(found["time"]) == 1


def explained(run):
    def finite():
        with torch.enable_grad():
            assert all(tensor.isfinite().all() for tensor in run("cpu"))

    return str(fastseq.explain(finite))


@interpreted
@pytest.mark.parametrize("name", sanitizer_smoke.FAMILIES["triton"])
def test_one_of_each_triton_kernel_family_runs(name):
    with use_backend("triton"):
        said = explained(sanitizer_smoke.FAMILIES["triton"][name])
    form = next((form for form in sanitizer_smoke.FORMS if f"'{form}'" in name), "")
    assert "triton" in said and form in said


@pytest.mark.skipif(BACKENDS["cuda-host"].available() is not None, reason="needs the CUDA kernels built for the host")
@pytest.mark.parametrize("name", sanitizer_smoke.FAMILIES["cuda"])
def test_one_of_each_cuda_kernel_family_runs(name):
    with use_backend("cuda-host"):
        assert "cuda-host" in explained(sanitizer_smoke.FAMILIES["cuda"][name])


def test_a_family_that_gives_no_numbers_is_named(monkeypatch, capsys):
    families = {"good": lambda device: [torch.zeros(1)], "bad": lambda device: [torch.full((1,), torch.nan)]}
    absent = SimpleNamespace(available=lambda: "not on this machine")
    monkeypatch.setattr(sanitizer_smoke, "BACKENDS", BACKENDS | {"absent": absent})
    monkeypatch.setattr(sanitizer_smoke, "FAMILIES", {"reference": families, "absent": families})
    assert sanitizer_smoke.main("cpu") == 1
    said = ["reference, good: ran", "reference, bad: not finite", "absent: left out, not on this machine"]
    assert capsys.readouterr().out.splitlines() == said
    monkeypatch.delitem(families, "bad")
    assert sanitizer_smoke.main("cpu") == 0
