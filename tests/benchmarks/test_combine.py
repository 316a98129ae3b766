"""Several result files as one report."""

from __future__ import annotations

import pytest

from fastseq.benchmarks import cli
from fastseq.benchmarks.measure import combine, environment
from fastseq.benchmarks.measure.results import Results
from fastseq.benchmarks.report import reproduce


@pytest.fixture
def files(synthetic, tmp_path):
    """Two runs of one device, a suite each."""
    runs = {"a": synthetic.lengths({"torch.nn.LSTM": lambda T: 1e-5 * T}), "b": synthetic.single(lambda group, w: 2.0)}
    for name, results in runs.items():
        results.environment |= {
            "git": f"{name}12",
            "time": f"2030-01-0{len(name)} {name}",
            "cpu used by others": 0.5 * (name == "b"),
        }
        results.options = {"quick": name == "b", "full": False, "dtype": "float32", "threads": [2] * (name == "a")}
        results.save(tmp_path / f"{name}.json")
    return tmp_path / "a.json", tmp_path / "b.json"


def change(file, **environment):
    results = Results.load(file)
    results.environment |= environment
    results.save(file)


def test_rows_of_every_file(files):
    every = [Results.load(file) for file in files]
    found = combine.load(files)
    assert found.rows == every[0].rows + every[1].rows and found.suites() == ["sequential-vs-parallel", "cells"]
    assert found.seconds == 24.0 and found.options["quick"] and found.environment["cpu used by others"] == 0.5
    assert found.environment["git"] == "a12, b12" and len(found.peaks) == 1
    assert combine.load(files[:1]) == every[0]


def test_the_commands_of_every_run(files):
    """With the threads and the variables that were in force, options or not."""
    change(files[0], flags={"OMP_NUM_THREADS": "1", "FASTSEQ_CPU_LEVEL": "avx2", "mkldnn": True})
    assert reproduce.commands(combine.load(files)) == [
        "git checkout a12",
        "OMP_NUM_THREADS=1 FASTSEQ_CPU_LEVEL=avx2 "
        "python -m fastseq bench --suite sequential-vs-parallel --device cpu --threads 2",
        "git checkout b12",
        "python -m fastseq bench --suite cells --device cpu --threads 2 --quick",
        "python -m fastseq bench --json-in bench-results/*/results.json",
    ]
    change(files[0], git="a12+changes")
    assert reproduce.commands(combine.load(files[:1]))[0] == "git checkout a12  # and changes that were not committed"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"device name": "another"}, "different devices in one report: {0} is from A <fast> CPU & more, {1} from another"),
        ({"device": "cuda"}, "different devices in one report: {0} is from cpu, {1} from cuda"),
        (
            {"versions": {"python": "3.12.0", "torch": "2.14.0"}},
            "different versions in one report: {0} has torch 2.13.0, {1} has torch 2.14.0",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused(files, environment, message, capsys):
    change(files[1], **environment)
    with pytest.raises(SystemExit) as stop:
        cli.main(["--json-in", *map(str, files)])
    assert stop.value.code == 2 and message.format(*files) in capsys.readouterr().err


def test_a_point_that_two_files_have_is_refused(files, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--json-in", str(files[0]), str(files[0].with_name("b.json")), str(copy(files[0]))])
    assert stop.value.code == 2 and "both have eager LSTMCell loop inference T=32" in capsys.readouterr().err


def copy(file):
    new = file.with_name("copy.json")
    new.write_text(file.read_text())
    return new


def test_a_report_from_the_command_line(files, tmp_path):
    assert cli.main(["--json-in", *map(str, files), "--out", str(tmp_path / "out")]) == 0
    written = tmp_path / "out"
    page = (written / "report.html").read_text()
    assert "Single cells against torch.nn" in page and "Sequential against parallel" in page
    assert Results.load(written / "results.json").rows == combine.load(files).rows


@pytest.mark.parametrize(("value", "kept"), [("off", True), ("/home/me/cache", False)])
def test_no_folder_of_the_machine_is_recorded(monkeypatch, value, kept):
    monkeypatch.setenv("FASTSEQ_CACHE", value)
    assert ("FASTSEQ_CACHE" in environment.variables()) == kept
