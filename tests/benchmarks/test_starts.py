"""Headlines over several processes: what their rows say, with processes that are small programs, and once a real one."""

from __future__ import annotations

import csv
import json
import sys
import time
from dataclasses import fields, replace

import numpy as np
import psutil
import pytest
from torch import nn

from fastseq.benchmarks import cli, compare, doubts, readme, report, reproduce, starts
from fastseq.benchmarks.own import add_provider, joined, remove_provider
from fastseq.benchmarks.presentation import Options, ratio_cell, time_cell
from fastseq.benchmarks.results import Results, Row, write_csv
from fastseq.benchmarks.runner import Case, Participant, Runner
from fastseq.benchmarks.starts import Starts, join
from fastseq.benchmarks.suites import SUITES, sequential_vs_parallel
from fastseq.benchmarks.timing import Effort
from fastseq.benchmarks.workloads import Workload

BASE, OWN = "torch.nn.LSTM", "fastseq.LSTM"
THREE = Options("cpu", "float32", (), quick=True, starts=3)


def row(synthetic, seconds, ratio=None, provider=OWN, **more):
    w = Workload("lstm", 32, 8, 256, 256, "training")
    made = Row.of(sequential_vs_parallel.NAME, "length", provider, w)
    synthetic.timed(made, seconds, over=BASE if ratio else None, ratio=ratio or 1.0)
    return replace(made, **more)


def condition(**found):
    return starts.Condition(**found).as_dict()


def test_medians_over_starts(synthetic):
    """Three starts of 2 % spread each: 1.0, 1.3, 1.2 ms."""
    found = row(synthetic, 1e-3, 2.0)
    for seconds, ratio in ((1.3e-3, 1.6), (1.2e-3, 1.5)):
        join(found, row(synthetic, seconds, ratio))
    assert found.starts["count"] == 3 and found.starts["medians"] == [1e-3, 1.3e-3, 1.2e-3]
    assert found.time["median"] == found.seconds == 1.2e-3 and found.time["fastest"] == pytest.approx(0.97e-3)
    low, high = np.quantile([1e-3, 1.3e-3, 1.2e-3], (0.2, 0.8))
    assert (found.time["low"], found.time["high"]) == pytest.approx((low, high)) and found.time["rounds"] == 27
    assert found.starts["between"] == pytest.approx(0.25) and found.starts["within"] == pytest.approx(0.04)
    assert found.ratio["median"] == 1.6 and found.ratio["baseline"] == BASE and found.starts["ratios"] == [2.0, 1.6, 1.5]
    assert (found.ratio["low"], found.ratio["high"]) == pytest.approx(tuple(np.quantile([2.0, 1.6, 1.5], (0.2, 0.8))))
    assert found.starts["ratio_between"] == pytest.approx(0.5 / 1.6) and found.starts["ratio_within"] == pytest.approx(0.06)
    assert found.floor["seconds"] / 1.2e-3 == found.of_floor


def test_the_interval_reaches_as_far_as_the_starts_or_as_the_rounds(synthetic):
    alone, far, near = row(synthetic, 1e-3, 2.0), row(synthetic, 1e-3, 2.0), row(synthetic, 1e-3, 2.0)
    assert alone.interval == (alone.time["low"], alone.time["high"]) == pytest.approx((0.98e-3, 1.02e-3))
    join(far, row(synthetic, 1.4e-3, 3.0))
    assert far.interval == (1e-3, 1.4e-3) and far.ratio_interval == (2.0, 3.0) and far.noisy
    assert far.interval[0] < far.time["low"] < far.time["high"] < far.interval[1]
    join(near, row(synthetic, 1e-3, 2.0))
    assert near.interval == alone.interval and near.ratio_interval == alone.ratio_interval and not near.noisy


def test_a_start_that_is_wrong_makes_the_row_wrong(synthetic):
    found = row(synthetic, 1e-3, 2.0)
    join(found, row(synthetic, 1e-3, 2.0))
    bad = {"ok": False, "error": 0.5, "bound": 1e-6, "worst": "output", "reason": "output is off"}
    join(found, row(synthetic, 1e-3, status="wrong", reason="output is off", time=None, check=bad))
    assert found.status == "wrong" and found.reason == "start 3: output is off" and found.check == bad
    assert found.time is found.ratio is found.floor is found.memory is found.starts is None and np.isnan(found.seconds)
    join(found, row(synthetic, 1e-3, 2.0))
    assert found.status == "wrong" and found.time is None, "a later start that is right mends nothing"


def test_a_start_without_a_time_is_told(synthetic):
    found = row(synthetic, 1e-3, 2.0)
    join(found, row(synthetic, 1e-3, status="skipped", reason="would need 9 GiB", time=None))
    assert found.ok and found.seconds == 1e-3 and found.time["rounds"] == 9
    assert found.starts["count"] == 1 and found.starts["missing"] == "start 2: skipped, would need 9 GiB"
    join(found, row(synthetic, 2e-3))
    assert found.starts["count"] == 2 and found.starts["ratios"] == [2.0] and found.ratio["median"] == 2.0


def test_what_disturbed_a_start_is_told(synthetic):
    found = row(synthetic, 1e-3, condition=condition(others=0.02, redone="one", clock=1500))
    join(found, row(synthetic, 1e-3, condition=condition(others=0.4, disturbed="other programs")))
    assert found.disturbed == "start 2: other programs" and found.condition["others"] == 0.4
    assert found.condition["redone"] == "one" and found.condition["clock"] == 1500
    join(found, row(synthetic, 1e-3, condition=condition(throttled=0.5, reasons="power", disturbed="throttled")))
    assert found.disturbed == "start 2: other programs; start 3: throttled" and found.condition["reasons"] == "power"
    old = row(synthetic, 1e-3)
    join(old, row(synthetic, 1e-3, condition=condition(others=0.1)))
    assert old.condition["others"] == 0.1 and old.disturbed is None


MEASURED = 'print("case measured", flush=True)\n'
PROGRAM = """
import json, os, sys, time
from pathlib import Path
folder = Path({folder!r})
number = len(list(folder.glob("asked-*.json"))) + 1
(folder / f"asked-{{number}}.json").write_text(Path(sys.argv[1]).read_text())
(folder / "pid").write_text(str(os.getpid()))
print("words of a library")
print("step length training", flush=True)
{last}
"""


@pytest.fixture
def here(synthetic):
    """Results of the suite's headlines, of two providers at T = 32 and 64, and those cases."""
    results = synthetic.lengths({BASE: lambda T: 2e-5 * T, OWN: lambda T: 1e-5 * T})
    plan = sequential_vs_parallel.plan(Options("cpu", "float32", (results.rows[0].threads,), quick=True))
    cases = [
        replace(case, participants=tuple(p for p in case.participants if p.provider in (BASE, OWN)))
        for case in plan
        if case.participants[0].workload.T <= 64
    ]
    keys = set().union(*(case.keys() for case in cases))
    results.rows = [r for r in results.rows if r.key in keys]
    results.environment = dict(results.environment)
    return results, cases


@pytest.fixture
def process(here, tmp_path, monkeypatch):
    """`process(factor, last, ...)`: a start that answers with times as many times as long, then runs `last`."""
    results, _ = here

    def prepare(*factors, last="", change=lambda rows: rows, environment=None):
        for number, factor in enumerate(factors, 1):
            rows = json.loads(json.dumps(results.as_dict()))["rows"]
            for r in rows:
                if r["time"]:
                    r["time"] |= {name: r["time"][name] * factor for name in ("median", "low", "high", "fastest")}
            answer = results.as_dict() | {"rows": change(rows), "environment": results.environment | (environment or {})}
            (tmp_path / f"answer-{number}.json").write_text(json.dumps(answer))
        file = tmp_path / "start.py"
        hand_back = (
            'Path(sys.argv[2]).write_text((folder / f"answer-{number}.json").read_text())\nprint("case measured", flush=True)\n'
        )
        file.write_text(PROGRAM.format(folder=str(tmp_path), last=(hand_back if factors else "") + last))
        monkeypatch.setattr(starts, "COMMAND", (sys.executable, str(file)))
        return lambda: [json.loads(f.read_text()) for f in sorted(tmp_path.glob("asked-*.json"))]

    return prepare


def test_starts_follow_each_other(here, process):
    results, cases = here
    asked = process(1.5, 1.1)
    said, kept = [], []
    assert starts.left(cases, results, THREE) == 2 * len(cases) == 8
    starts.measure(
        cases,
        results,
        THREE,
        tell=said.append,
        advance=lambda: said.append("."),
        keep=lambda: kept.append(results.rows[0].starts["count"]),
    )
    assert [(r.starts["count"], r.starts["missing"]) for r in results.rows] == [(3, None)] * 8
    first = results.rows[0]
    assert first.starts["medians"] == pytest.approx([first.starts["medians"][0] * f for f in (1, 1.5, 1.1)])
    assert kept == [2, 3] and said == ["start 2", "again, length training", ".", "start 3", "again, length training", "."]
    one, two = asked()
    assert {tuple(key) for key in one["keys"]} == {r.key for r in results.rows} and one["options"]["device"] == "cpu"
    assert one["keys"] == two["keys"] and len(one["peaks"]) == 1
    assert starts.left(cases, results, THREE) == 0
    starts.measure(cases, results, THREE)
    assert len(asked()) == 2, "nothing lacks a start"
    planned = starts.planned(one, replace(THREE, threads=(results.rows[0].threads,)))
    assert [case.keys() for case in planned] == [case.keys() for case in cases] and all(case.headline for case in planned)


def test_only_headlines_and_only_what_has_a_time(here, process):
    results, cases = here
    asked = process(1.0)
    starts.measure([replace(case, headline=False) for case in cases], results, THREE)
    assert asked() == [] and starts.left(cases, Results({}, {}), THREE) == 8
    for r in results.rows:
        r.status, r.time = "unavailable", None
    starts.measure(cases, results, THREE)
    assert asked() == [] and starts.left(cases, results, THREE) == 0


def test_missing_starts_are_made_up_for(here, process):
    """As --resume finds them: two of four cases have their second start."""
    results, cases = here
    done = set().union(*(case.keys() for case in cases[:2]))
    asked = process(1.2, change=lambda rows: [r for r in rows if Row(**r).key in done])
    two = replace(THREE, starts=2)
    starts.measure(cases, results, two)
    assert {r.key for r in results.rows if r.starts["count"] == 2} == done and starts.left(cases, results, two) == 2
    assert {r.starts["missing"] for r in results.rows if r.key not in done} == {"the other process did not measure it"}
    process(1.2, 1.3)
    starts.measure(cases, results, two)
    assert {tuple(key) for key in asked()[-1]["keys"]} == {r.key for r in results.rows} - done
    assert [(r.starts["count"], r.starts["missing"]) for r in results.rows] == [(2, None)] * 8


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"last": "sys.exit('no memory')"}, "the process ended with 1: no memory"),
        ({"last": "os.abort()"}, "the process ended with -6: "),
        (
            {"factors": (1.0,), "environment": {"versions": {"python": "3.12.0", "torch": "2.14.0"}}},
            "the process ran under other conditions: versions: torch was 2.13.0, is 2.14.0",
        ),
        ({"factors": (1.0,), "environment": {"device name": "another"}}, "device name was A <fast> CPU & more, is another"),
    ],
)
def test_a_start_that_fails_costs_nothing_but_itself(here, process, given, reason):
    results, cases = here
    before = [r.time for r in results.rows]
    asked = process(*given.get("factors", ()), **{k: v for k, v in given.items() if k != "factors"})
    starts.measure(cases, results, THREE)
    assert len(asked()) == 1 and [r.time for r in results.rows] == before
    assert all(r.starts["count"] == 1 and reason in r.starts["missing"] for r in results.rows)
    assert doubts.notes(replace(results, options={"starts": 3})) == [
        "8 of 8 headlines were measured in fewer than 3 processes. They are listed."
    ]


def test_what_a_start_measured_before_it_died_stays(here, process):
    results, cases = here
    process(1.5, last="sys.exit('killed')", change=lambda rows: rows[:2])
    starts.measure(cases, results, THREE)
    assert [r.starts["count"] for r in results.rows] == [2, 2] + [1] * 6
    assert all("killed" in r.starts["missing"] for r in results.rows)


def test_an_interrupt_ends_the_process_and_keeps_what_it_measured(here, process, tmp_path):
    results, cases = here
    process(1.5, last="time.sleep(600)", change=lambda rows: rows[:2])

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        starts.measure(cases, results, THREE, advance=interrupt)
    assert [r.starts["count"] if r.starts else 1 for r in results.rows] == [2, 2] + [1] * 6
    pid = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_process_that_does_not_heed_is_killed(here, process, tmp_path, monkeypatch):
    results, cases = here
    monkeypatch.setattr(starts, "PATIENCE", 0.2)
    process(1.5, last=f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{MEASURED}time.sleep(600)")
    seen = iter([None, KeyboardInterrupt()])

    def second():
        error = next(seen)
        if error:
            raise error

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        starts.measure(cases, results, THREE, advance=second)
    assert time.monotonic() - start < 60 and not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_no_speed_up_over_a_baseline_that_was_wrong(here, process):
    results, cases = here

    def change(rows):
        bad = next(r for r in rows if r["provider"] == BASE)
        bad.update(status="wrong", reason="output is off", time=None)
        return rows

    process(1.0, change=change)
    assert all(r.ratio for r in results.rows if r.provider == OWN)
    starts.measure(cases, results, replace(THREE, starts=2))
    (wrong,) = (r for r in results.rows if r.status == "wrong")
    (beside,) = (r for r in results.rows if (r.provider, r.mode, r.T) == (OWN, wrong.mode, wrong.T))
    assert wrong.reason == "start 2: output is off" and beside.ratio is None and beside.starts["ratios"] == []
    assert beside.starts["count"] == 2 and sum(r.ratio is not None for r in results.rows) == 3


def test_a_real_start_and_a_provider_that_it_does_not_know(monkeypatch):
    """One tiny headline, in this process and in another one."""
    w = Workload("lstm", 32, 8, 256, 256, "training", threads=1)
    plan = sequential_vs_parallel.plan(Options("cpu", "float32", (1,), quick=True))
    (case,) = (case for case in plan if w in [p.workload for p in case.participants])
    kept = tuple(p for p in case.participants if p.provider in (BASE, OWN))
    add_provider("mine", lambda w: nn.LSTM(w.I, w.H), like=BASE)
    try:
        case = joined(replace(case, participants=kept, effort=Effort(seconds=0.1, max_rounds=5)))
        runner = Runner("cpu", quick=True)
        results = Results(starts.environment.collect("cpu"), {}, runner.run(case), list(runner.peaks.values()))
        steps, options = [], Options("cpu", "float32", (1,), quick=True, starts=2)
        starts.measure([case], results, options, tell=steps.append)
    finally:
        remove_provider("mine")
    base, own, mine = results.rows
    assert [r.starts["missing"] for r in results.rows] == [None, None, starts.NOT_KNOWN]
    assert [r.starts["count"] for r in results.rows] == [2, 2, 1] and mine.ratio and mine.ok
    for r in (base, own):
        assert len(set(r.starts["medians"])) == 2 and min(r.starts["medians"]) > 0 and r.condition is not None
    assert own.starts["ratios"][1] == pytest.approx(base.starts["medians"][1] / own.starts["medians"][1])
    assert "start 2" in steps and any(step.startswith("again, length training T=32") for step in steps)


def test_another_package_is_refused(tmp_path, capsys):
    (tmp_path / "request.json").write_text(json.dumps({"here": "/elsewhere"}))
    assert starts.main([str(tmp_path / "request.json"), str(tmp_path / "answer.json")]) == 2
    assert "finds another fastseq" in capsys.readouterr().err


def test_which_cases_are_headlines():
    """Those that the README's verdicts and the picture are made of."""
    for name, suite in SUITES.items():
        for case in suite.plan(Options("cpu", "float32", (1,), quick=True)):
            assert case.headline is (name == sequential_vs_parallel.NAME)


class Counts:
    """In place of Runner: a time of 1 ms for everything."""

    synthetic = None

    def __init__(self, device, *, quick):
        self.peaks = {}

    def run(self, case, progress):
        return [self.synthetic.timed(Row.of(case.suite, case.group, p.provider, p.workload), 1e-3) for p in case.participants]

    def close(self):
        pass


@pytest.mark.parametrize(
    ("argv", "count"), [((), 3), (("--quick",), 1), (("--quick", "--starts", "2"), 2), (("--starts", "1"), 1)]
)
def test_the_command_line(argv, count, synthetic, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(Counts, "synthetic", synthetic)
    monkeypatch.setattr(cli, "Runner", Counts)
    monkeypatch.setattr(starts, "_start", lambda wanted, results, options, tell, advance: found.append(options.starts) or "no")
    only = ("--device", "cpu", "--threads", "1", "--only", f"T=32 provider={OWN}", "--out", str(tmp_path))
    assert cli.main([*argv, *only]) == 0
    results = Results.load(tmp_path / "results.json")
    assert results.options["starts"] == count and found == [count] * (count > 1)
    assert cli.main([*argv, *only, "--resume"]) == 0, "what failed is tried again"
    assert found == [count] * (2 if count > 1 else 0)
    assert cli.main([*argv, *only, "--resume", "--starts", "5"]) == 0, "more starts of what is there"
    assert found[-1] == 5 and Results.load(tmp_path / "results.json").options["starts"] == 5
    assert cli.main([*argv, *only, "--resume", "--starts", "1"]) == 0
    assert found[-1] == 5 and Results.load(tmp_path / "results.json").options["starts"] == 5


def test_an_interrupted_start_leaves_an_interrupted_run(synthetic, tmp_path, monkeypatch):
    monkeypatch.setattr(Counts, "synthetic", synthetic)
    monkeypatch.setattr(cli, "Runner", Counts)

    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(starts, "_start", interrupted)
    only = ("--device", "cpu", "--threads", "1", "--only", f"T=32 provider={OWN}", "--out", str(tmp_path))
    assert cli.main([*only]) == 130
    results = Results.load(tmp_path / "results.json")
    assert results.options["interrupted"] and len(results.rows) == 4 and all(r.time for r in results.rows)


@pytest.fixture
def measured(here, process):
    results, cases = here
    process(1.5, 1.1)
    starts.measure(cases, results, THREE)
    results.options["starts"] = 3
    return results


def test_files(measured, tmp_path):
    """JSON and back; columns of the CSV; a file from before the starts."""
    measured.save(tmp_path / "new.json")
    assert Results.load(tmp_path / "new.json").rows == measured.rows
    write_csv(measured.rows, tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open() as file:
        line = next(csv.DictReader(file))
    assert (
        line["starts.count"] == "3" and [float(v) for v in line["starts.medians"].split()] == measured.rows[0].starts["medians"]
    )
    assert float(line["starts.between"]) == pytest.approx(0.5 / 1.1)
    old = json.loads((tmp_path / "new.json").read_text())
    for r in old["rows"]:
        del r["starts"], r["condition"]
    del old["options"]["starts"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    loaded = Results.load(tmp_path / "old.json")
    assert all(r.starts is r.condition is r.disturbed is None for r in loaded.rows)
    assert loaded.rows[0].interval == (loaded.rows[0].time["low"], loaded.rows[0].time["high"])
    assert {f.name for f in fields(Row)} >= {"starts", "condition"}


def test_the_page(measured):
    first = measured.rows[0]
    first.starts["missing"] = "start 4: <gone>"
    first.condition = condition(others=0.4, redone="busy", disturbed="other programs used 40% of the CPU")
    page = report.page(measured)
    for part in ("Headlines by start", "Starts of the process", "45.5%", "start 4: &lt;gone&gt;", "in up to 3 processes"):
        assert part in page, part
    assert "Disturbed rows" in page and "1 of 8 rows were disturbed while they were timed" in page
    assert "timed once more: busy; disturbed: other programs used 40% of the CPU" in page
    assert report.derive(measured)["disturbed"] == [0]
    (section,) = doubts.starts(measured)
    assert len(section.tables[0].rows) == 8 and {len(r) for r in section.tables[0].rows} == {len(section.tables[0].columns)}
    assert "3 starts of the process: 45.5% between them, 4.0% within" in time_cell(first).hint
    own = next(r for r in measured.rows if r.provider == OWN)
    assert "3 starts of the process: 0.0% between them, 6.0% within" in ratio_cell(own).hint
    assert "behind every line, whose times are medians over 3 starts of the process:" in "\n".join(readme.verdicts(measured))


def test_nothing_is_said_without_further_starts(here):
    results, _ = here
    page = report.page(results)
    assert not any(word in page for word in ("Headlines by start", "processes: their times", "Disturbed rows", "once more"))
    assert readme.verdicts(results)[0].endswith("behind every line:") and report.derive(results)["disturbed"] == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quick": True}, ""),
        ({"quick": True, "starts": 1}, ""),
        ({"quick": False, "starts": 3}, ""),
        ({"quick": True, "starts": 3}, " --starts 3"),
        ({"quick": False, "starts": 1}, " --starts 1"),
    ],
)
def test_the_command_that_repeats_it(here, options, words):
    results, _ = here
    quick = " --quick" if options["quick"] else ""
    command = reproduce.commands(replace(results, options=options))[0]
    assert command == f"python -m fastseq bench --device cpu{quick}{words}"


def test_compare_takes_the_spread_over_starts(synthetic):
    """10 % slower: a verdict between single starts, none where the starts themselves lie further apart."""
    before, after = (Results({}, {}, [row(synthetic, seconds)]) for seconds in (1e-3, 1.1e-3))
    assert [c.verdict for c in compare.changes(before, after)] == [compare.SLOWER]
    join(before.rows[0], row(synthetic, 1.2e-3))
    join(before.rows[0], row(synthetic, 1e-3))
    (change,) = compare.changes(before, after)
    assert change.verdict == compare.SAME and (before.rows[0].interval, after.rows[0].interval) == (
        pytest.approx((0.98e-3, 1.2e-3)),
        pytest.approx((1.078e-3, 1.122e-3)),
    )
    assert change.speed == pytest.approx((0.98 / 1.122, 1 / 1.1, 1.2 / 1.078))


def test_compare_takes_the_spread_of_speed_ups_over_starts(synthetic):
    before, after = (Results({}, {}, [row(synthetic, s, r)]) for s, r in ((1e-3, 2.0), (1.3e-3, 1.6)))
    assert [c.verdict for c in compare.changes(before, after)] == [compare.SLOWER]
    join(before.rows[0], row(synthetic, 1e-3, 1.5))
    (change,) = compare.changes(before, after)
    assert (change.verdict, change.reason) == (compare.SAME, f"{BASE} moved alike")


@pytest.mark.parametrize("which", ["old", "new"])
def test_a_disturbed_row_is_no_ground_for_a_verdict(synthetic, which, tmp_path):
    files = {name: Results({}, {}, [row(synthetic, s)]) for name, s in (("old", 1e-3), ("new", 2e-3))}
    files[which].rows[0].condition = condition(disturbed="other programs used 40% of the CPU")
    (change,) = compare.changes(files["old"], files["new"])
    assert (change.verdict, change.reason) == (compare.DISTURBED, f"{which}: other programs used 40% of the CPU")
    for name, results in files.items():
        results.save(tmp_path / name)
    assert cli.main(["compare", str(tmp_path / "old"), str(tmp_path / "new"), "--fail-on-slower"]) == 0
    assert "1 disturbed" in compare.summary([change])[0]


def test_lists_of_one_start(synthetic):
    found = Starts.of(row(synthetic, 1e-3, 2.0)).as_dict()
    assert found["count"] == 1 and found["between"] is None and found["within"] == pytest.approx(0.04)
    assert Case("s", "g", (Participant(OWN, Workload("lstm", 1, 1, 1, 1, "inference")),), Effort()).headline is False
