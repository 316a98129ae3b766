from __future__ import annotations

import json

import pytest
import torch

from fastseq.benchmarks import cli, selection
from fastseq.benchmarks.presentation import Options
from fastseq.benchmarks.results import Results, Row
from fastseq.benchmarks.suites import SUITES

CPU = Options("cpu", "float32", (1,), quick=False)


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in argv])
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--suite", "speed"], "there is no suite 'speed'; there are: sequential-vs-parallel, recurrent, cells, attention"),
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

    monkeypatch.setattr(cli, "Runner", Dies)
    with pytest.raises(MemoryError):
        cli.main(["--suite", "recurrent", "--device", "cpu", "--quick", "--threads", "1", "--out", str(tmp_path)])
    kept = Results.load(tmp_path / "results.json")
    assert {r.group for r in kept.rows} == {"padded"} and len(kept.rows) == 3 * 2 * 2 * 2 * 2  # cells, B, H, modes, providers


def test_a_run_from_end_to_end(tmp_path, capsys):
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
        assert row["floor"]["seconds"] > 0 and row["chose"] is not None
    assert found["environment"]["versions"]["torch"] == torch.__version__
    assert len((out / "rows.csv").read_text().splitlines()) == 17

    again = tmp_path / "again"
    picture = tmp_path / "picture.svg"
    assert cli.main(["--json-in", str(out / "results.json"), "--out", str(again), "--picture", str(picture)]) == 0
    assert (again / "report.html").read_text() == (out / "report.html").read_text()
    assert picture.read_text().lstrip().startswith("<?xml")
