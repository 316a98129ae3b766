"""Two runs whose times are given by formulas, and what is said of them."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest

from fastseq.benchmarks import cli
from fastseq.benchmarks.report import compare
from fastseq.benchmarks.report.compare import FASTER, FOUND, LOST, NEITHER, ONLY_NEW, ONLY_OLD, SAME, SLOWER

OWN, BASE = "fastseq.LSTM", "torch.nn.LSTM"


@pytest.fixture
def old(synthetic):
    return synthetic.lengths({BASE: lambda T: 2e-5 * T, OWN: lambda T: 1e-5 * T, "eager LSTMCell loop": lambda T: 4e-5 * T})


@pytest.fixture
def new(old):
    return copy.deepcopy(old)


def rows(results, provider, T=512, mode="inference"):
    return [r for r in results.rows if (r.provider, r.T, r.mode) == (provider, T, mode)]


def scale(row, time, ratio=None):
    row.time |= {key: row.time[key] * time for key in ("median", "low", "high", "fastest")}
    if ratio:
        row.ratio |= {key: row.ratio[key] * ratio for key in ("median", "low", "high")}


def verdicts(old, new, provider=OWN, T=512):
    return {c.verdict for c in compare.changes(old, new) if (c.row.provider, c.row.T, c.row.mode) == (provider, T, "inference")}


def run(tmp_path, old, new, *argv):
    for name, results in (("old.json", old), ("new.json", new)):
        results.save(tmp_path / name)
    return cli.main(["compare", str(tmp_path / "old.json"), str(tmp_path / "new.json"), *argv])


# Quantiles are 2 % around the median, those of the speed-up 3 %.
@pytest.mark.parametrize(
    ("time", "ratio", "verdict"),
    [
        (1.0, 1.0, SAME),
        (1.03, 1 / 1.03, SAME),
        (0.97, 1 / 0.97, SAME),
        (1.10, 1 / 1.10, SLOWER),
        (0.90, 1 / 0.90, FASTER),
        (1.10, 1.0, SAME),  # torch.nn became slower to the same extent
        (0.90, 1.0, SAME),
        (1.10, 1.2, SAME),  # torch.nn became slower still
    ],
)
def test_overlapping_intervals_are_the_same(old, new, time, ratio, verdict):
    (row,) = rows(new, OWN)
    scale(row, time, ratio)
    assert verdicts(old, new) == {verdict}
    assert all(c.verdict == SAME for c in compare.changes(old, new) if c.verdict not in (verdict, NEITHER))


def test_a_wide_interval_hides_what_a_narrow_one_shows(old, new):
    for results in (old, new):
        for row in rows(results, "eager LSTMCell loop"):
            row.ratio = None
    (row,) = rows(new, "eager LSTMCell loop")
    scale(row, 1.1)
    assert verdicts(old, new, "eager LSTMCell loop") == {SLOWER}
    row.time["low"] = row.time["median"] * 0.9
    assert verdicts(old, new, "eager LSTMCell loop") == {SAME}


def test_another_torch_is_no_measure(old, new):
    (row,) = rows(new, OWN)
    scale(row, 1.1, 1.0)
    assert verdicts(old, new) == {SAME}
    new.environment["versions"] = {"torch": "2.14.1"}
    assert verdicts(old, new) == {SLOWER}
    assert "versions: torch was 2.13.0, is 2.14.1" in compare.notes(old, new)


def test_a_speed_up_over_itself_is_no_measure(old, new):
    for results in (old, new):
        rows(results, OWN)[0].ratio["baseline"] = "fastseq.GRU"
    scale(rows(new, OWN)[0], 1.1, 1.0)
    assert verdicts(old, new) == {SLOWER}


def test_rows_of_one_file_and_rows_without_a_time(old, new):
    short, middle, long = (rows(new, OWN, T)[0] for T in (32, 128, 512))
    short.status, short.reason, short.time = "wrong", "output is off by 1", None
    rows(old, OWN, 64)[0].time = None
    middle.H += 1
    new.rows.remove(long)
    found = {c.row.T: c for c in compare.changes(old, new) if c.own and c.row.mode == "inference" and c.row.provider == OWN}
    assert (found[32].verdict, found[32].reason) == (LOST, "wrong: output is off by 1")
    assert found[64].verdict == FOUND and found[256].verdict == SAME and found[512].verdict == ONLY_OLD
    assert {
        c.verdict for c in compare.changes(old, new) if c.row.T == 128 and c.row.provider == OWN and c.row.mode == "inference"
    } == {
        ONLY_OLD,
        ONLY_NEW,
    }
    assert verdicts(old, new, "torch.nn.GRU") == {NEITHER}


def test_details_tell_rows_apart_but_figures_do_not(synthetic):
    old = synthetic.gpu(lambda group, w: 2.0)
    new = copy.deepcopy(old)
    for row in new.rows:
        row.detail |= {"flops": 7, "loss": 0.5}
    assert {c.verdict for c in compare.changes(old, new)} == {SAME}
    assert len(compare.changes(old, new)) == len(old.rows)
    new.rows[0].detail["precision"] = "int4"
    assert {c.verdict for c in compare.changes(old, new)} == {SAME, ONLY_OLD, ONLY_NEW}
    points = [row[2] for row in compare.table(compare.changes(old, new)).rows]
    assert len(points) == len(set(zip(points, (row[1] for row in compare.table(compare.changes(old, new)).rows), strict=True)))


def test_the_table_and_the_exit_code(old, new, tmp_path, capsys):
    assert run(tmp_path, old, new, "--fail-on-slower") == 0
    scale(rows(new, OWN)[0], 1.25, 1 / 1.25)
    assert run(tmp_path, old, new) == 0
    capsys.readouterr()
    assert run(tmp_path, old, new, "--fail-on-slower") == 1
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if "slower" in line)
    assert all(part in line for part in (OWN, "T=512", "5.12 ms", "6.40 ms", "0.80×", "0.77–0.83"))
    assert "rows of fastseq: 1 slower, 9 same" in said and "1.00×, median of 20 rows" in said


def test_only_rows_of_fastseq_fail(old, new, tmp_path):
    scale(rows(new, BASE)[0], 1.25)
    assert verdicts(old, new, BASE) == {SLOWER} and run(tmp_path, old, new, "--fail-on-slower") == 0
    lost = rows(new, OWN)[0]
    lost.status, lost.time = "wrong", None
    assert run(tmp_path, old, new, "--fail-on-slower") == 1


@pytest.mark.parametrize(
    ("device", "change", "message"),
    [
        ("cpu", {"device name": "another"}, "cannot be compared: device name was A <fast> CPU & more, is another"),
        ("cpu", {"device": "cuda"}, "device was cpu, is cuda"),
        ("cuda", {"flags": {"cudnn.allow_tf32": False}}, "cudnn.allow_tf32 was None, is False"),
        ("cpu", {"flags": {"float32_matmul_precision": "medium"}}, "float32_matmul_precision was None, is medium"),
    ],
)
def test_runs_that_cannot_be_compared(old, new, device, change, message, tmp_path, capsys):
    old.environment["device"] = new.environment["device"] = device
    new.environment |= change
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, old, new)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_gpus_flags_do_not_concern_a_cpu(old, new, tmp_path, capsys):
    new.environment["flags"] = {"cudnn.allow_tf32": False}
    assert run(tmp_path, old, new) == 0
    assert "flags: cudnn.allow_tf32 was not told, is False" in capsys.readouterr().out


def test_files_that_cannot_be_read(old, tmp_path, capsys):
    old.save(tmp_path / "old.json")
    for name, content, message in (
        ("a", "{", "is not JSON"),
        ("b", '{"schema": "fastseq-benchmark", "version": 99}', "version 99"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(SystemExit) as stop:
            cli.main(["compare", str(tmp_path / "old.json"), str(tmp_path / name)])
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_what_speaks_against_a_run_is_said(old, new):
    busy = {"git": "abc", "cpu used by others": 0.3, "cpu": {"name": "A <fast> CPU & more", "cpus": 2, "MHz": 900}}
    new = replace(new, environment=new.environment | busy, options={"quick": False, "interrupted": True})
    assert compare.notes(old, new) == [
        "git was not told, is abc",
        "old: a quick run: fewer repetitions",
        "new: other programs used 30% of the CPU",
        "new: it was interrupted",
    ]
