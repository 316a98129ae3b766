from __future__ import annotations

import json
import re

import pytest
import torch

from fastseq.benchmarks import cli
from fastseq.benchmarks.measure.case import Options
from fastseq.benchmarks.measure.results import Results, Row
from fastseq.benchmarks.report import quality
from fastseq.benchmarks.suites import SUITES, selection

CPU = Options("cpu", "float32", (1,), quick=False)


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in argv])
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--suite", "speed"], "there is no suite 'speed'; there are: " + ", ".join(SUITES)),
        (["--device", "tpu"], "'tpu' is none of auto, cpu, cuda"),
        (["--device", "cuda:"], "'cuda:' is none of"),
        (["--threads", "two"], "'two' is not a list of positive numbers"),
        (["--threads", "1,0"], "'1,0' is not a list of positive numbers"),
        (["--dtype", "int8"], "invalid choice"),
        (["--device", "cpu", "--dtype", "float16"], "float16 is for GPUs"),
        (["--quick", "--full"], "--full: not allowed with argument --quick"),
        (["--only", "width=3"], "unknown key 'width'"),
        (["--only", "B"], "'B' is not of the form key=value"),
        (["--only", "B="], "'B=' is not of the form key=value"),
        (["--only", ""], "nothing given"),
        (["--only", "T=77"], "no point matches; these exist: T: 32, 64, 128"),
        (["--resume"], "--out is needed"),
        (["--restarts", "0"], "--restarts: 0 is not a positive number of processes"),
        (["--restarts", "-2"], "--restarts: -2 is not a positive number of processes"),
        (["--restarts", "two"], "--restarts: invalid int value: 'two'"),
        (["--picture", "a.gif"], "neither .svg nor .png"),
        (["--json-in", "/does/not/exist.json"], "cannot read /does/not/exist.json"),
    ],
)
def test_bad_arguments_are_named(capsys, argv, message):
    assert message in refused(capsys, *argv)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_missing_device_is_named(capsys):
    assert "cuda is not present" in refused(capsys, "--device", "cuda")


def test_a_folder_that_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot make the folder" in refused(capsys, "--out", tmp_path / "file" / "folder")


def test_list(capsys):
    assert cli.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in SUITES)


def test_only_keeps_the_baseline():
    cases = SUITES["recurrent"].plan(CPU)
    kept = selection.select(cases, selection.parse("provider=fastseq.GRU b=8 H=64,128 mode=training group=padded"))
    assert len(kept) == 2
    assert [[p.provider for p in case.participants] for case in kept] == [["torch.nn.GRU", "fastseq.GRU"]] * 2
    assert {(p.workload.B, p.workload.H) for case in kept for p in case.participants} == {(8, 64), (8, 128)}


def test_only_takes_precisions():
    cases = SUITES["recurrent"].plan(Options("cuda", "float32", (1,), quick=False))
    kept = selection.select(cases, selection.parse("precision=tf32 provider=fastseq.LSTM"))
    assert kept and {(p.workload.dtype, p.workload.tf32) for case in kept for p in case.participants} == {("float32", True)}


def test_only_takes_names_with_spaces():
    cases = SUITES["sequential-vs-parallel"].plan(CPU)
    kept = selection.select(cases, selection.parse("provider=fused_attention T=64"))
    assert [[p.provider for p in case.participants] for case in kept] == [["fused attention"]] * 2


def test_what_is_there_is_kept_after_every_group(tmp_path, monkeypatch):
    """A run that dies in its second group leaves the first one."""

    class Dies:
        def __init__(self, device, *, quick):
            self.peaks = {}

        def run(self, case, progress):
            if case.group == "data":
                raise MemoryError
            return [Row.of(case.suite, case.group, p.provider, p.workload, status="skipped") for p in case.participants]

        def close(self):
            pass

    monkeypatch.setattr(cli, "Runner", Dies)
    with pytest.raises(MemoryError):
        cli.main(["--suite", "recurrent", "--device", "cpu", "--quick", "--threads", "1", "--out", str(tmp_path)])
    kept = Results.load(tmp_path / "results.json")
    assert {r.group for r in kept.rows} == {"padded"} and len(kept.rows) == 3 * 2 * 2 * 5  # cells, B, H, providers of both modes


class Counts:
    """Measures nothing; `ran` has the points of every run, and the run with number `ends` of them is interrupted."""

    ran: list[tuple] = []
    ends = 10**9

    def __init__(self, device, *, quick):
        self.peaks = {}

    def run(self, case, progress):
        if len(self.ran) == self.ends:
            raise KeyboardInterrupt
        self.ran.append(self.point(case))
        return [Row.of(case.suite, case.group, p.provider, p.workload, status="skipped") for p in case.participants]

    def close(self):
        pass

    @staticmethod
    def point(case):
        w = case.participants[0].workload
        return case.group, w.function, w.mode, w.B, w.H


def counted(monkeypatch, *argv, ends=10**9):
    monkeypatch.setattr(cli, "Runner", Counts)
    monkeypatch.setattr(Counts, "ran", [])
    monkeypatch.setattr(Counts, "ends", ends)
    code = cli.main(["--suite", "recurrent", "--device", "cpu", "--quick", "--threads", "1", *argv])
    return code, Counts.ran


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    here = ("--out", str(tmp_path), "--resume")
    code, first = counted(monkeypatch, *here, ends=7)
    told = capsys.readouterr().out
    assert f" cases on cpu, into {tmp_path}" in told and re.search(r"^7 of \d+ after \d+ s$", told, re.MULTILINE)
    assert code == 130 and len(first) == 7 and Results.load(tmp_path / "results.json").options["interrupted"]
    code, second = counted(monkeypatch, *here)
    every = [Counts.point(case) for case in SUITES["recurrent"].plan(Options("cpu", "float32", (1,), quick=True))]
    assert code == 0 and first + second == every
    found = Results.load(tmp_path / "results.json")
    assert "interrupted" not in found.options and len({r.key for r in found.rows}) == len(found.rows) > len(every)
    assert counted(monkeypatch, *here) == (0, [])
    assert counted(monkeypatch, "--out", str(tmp_path)) == (0, every)  # without --resume: anew


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flags": {"deterministic": True}}, "deterministic was True, is False"),
        ({"device name": "another"}, "device name was another, is"),
        ({"versions": {"torch": "1.0"}}, "versions: torch was 1.0, is"),
    ],
)
def test_a_run_of_another_program_is_not_resumed(change, message, tmp_path, monkeypatch, capsys):
    counted(monkeypatch, "--out", str(tmp_path))
    before = Results.load(tmp_path / "results.json")
    before.environment |= change
    before.save(tmp_path / "results.json")
    with pytest.raises(SystemExit) as stop:
        counted(monkeypatch, "--out", str(tmp_path), "--resume")
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_commits_of_a_resumed_run_are_listed(tmp_path, monkeypatch):
    commits = iter(["abc", "def", "def"])
    monkeypatch.setattr(cli.environment, "git_sha", lambda: next(commits))
    for ends in (3, 5, 10**9):
        counted(monkeypatch, "--out", str(tmp_path), "--resume", ends=ends)
    assert Results.load(tmp_path / "results.json").environment["git"] == "abc, def"


def test_other_options_are_not_resumed(tmp_path, monkeypatch, capsys):
    counted(monkeypatch, "--out", str(tmp_path))
    with pytest.raises(SystemExit):
        counted(monkeypatch, "--out", str(tmp_path), "--resume", "--dtype", "float64")
    assert "options were {'dtype': 'float32'" in capsys.readouterr().err


def test_a_run_from_end_to_end(tmp_path, capsys, monkeypatch):
    """Two lengths, four layers: measured, written, shown again from the file."""
    out = tmp_path / "run"
    providers = "provider=torch.nn.LSTM,fused_attention,naive_attention,attention_block"
    assert (
        cli.main(
            [
                "--quick",
                "--threads",
                "1",
                "--device",
                "cpu",
                "--only",
                f"T=32,64 {providers}",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert str(out / "report.html") in said and "Transformers train faster" in said
    found = json.loads((out / "results.json").read_text())
    assert len(found["rows"]) == 2 * 2 * 4
    for row in found["rows"]:
        assert row["status"] == "ok" and row["check"]["ok"] and row["time"]["median"] > 0 and row["memory"] > 0
        assert row["roofline"]["seconds"] > 0 and row["chose"] is not None
    assert found["environment"]["versions"]["torch"] == torch.__version__
    assert len((out / "rows.csv").read_text().splitlines()) == 17

    again = tmp_path / "again"
    picture = tmp_path / "picture.svg"
    monkeypatch.setattr(quality, "refusal", lambda results: "")  # however busy the machine is that runs the tests
    assert cli.main(["--json-in", str(out / "results.json"), "--out", str(again), "--picture", str(picture)]) == 0
    assert (again / "report.html").read_text() == (out / "report.html").read_text()
    assert picture.read_text().lstrip().startswith("<?xml")
