"""Headlines over several processes: what their rows say, with processes that are small programs, and once a real one."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import fields, replace

import numpy as np
import psutil
import pytest
from torch import nn

from fastseq.benchmarks import assembly, cli, suites
from fastseq.benchmarks.measure import restarts
from fastseq.benchmarks.measure.case import Case, Options, Participant
from fastseq.benchmarks.measure.restarts import Restarts, join
from fastseq.benchmarks.measure.results import Results, Row, write_csv
from fastseq.benchmarks.measure.runner import Runner
from fastseq.benchmarks.measure.timing import Effort
from fastseq.benchmarks.providers.custom import add_provider, remove_provider
from fastseq.benchmarks.report import compare, quality, reproduce
from fastseq.benchmarks.report.model import ratio_cell, time_cell
from fastseq.benchmarks.suites import SUITES, joined, sequential_vs_parallel
from fastseq.benchmarks.workloads.base import Workload

BASE, OWN = "torch.nn.LSTM", "fastseq.LSTM"
THREE = Options("cpu", "float32", (), quick=True, restarts=3)


def row(synthetic, seconds, ratio=None, provider=OWN, **more):
    w = Workload("lstm", 32, 8, 256, 256, "training")
    made = Row.of(sequential_vs_parallel.NAME, "length", provider, w)
    synthetic.timed(made, seconds, over=BASE if ratio else None, ratio=ratio or 1.0)
    return replace(made, **more)


def contention(**found):
    return restarts.Contention(**found).as_dict()


def test_medians_over_restarts(synthetic):
    """Three processes of 2 % spread each: 1.0, 1.3, 1.2 ms."""
    found = row(synthetic, 1e-3, 2.0)
    for seconds, ratio in ((1.3e-3, 1.6), (1.2e-3, 1.5)):
        join(found, row(synthetic, seconds, ratio))
    assert found.restarts["count"] == 3 and found.restarts["medians"] == [1e-3, 1.3e-3, 1.2e-3]
    assert found.time["median"] == found.seconds == 1.2e-3 and found.time["fastest"] == pytest.approx(0.97e-3)
    low, high = np.quantile([1e-3, 1.3e-3, 1.2e-3], (0.2, 0.8))
    assert (found.time["low"], found.time["high"]) == pytest.approx((low, high)) and found.time["rounds"] == 27
    assert found.restarts["between"] == pytest.approx(0.25) and found.restarts["within"] == pytest.approx(0.04)
    assert found.ratio["median"] == 1.6 and found.ratio["baseline"] == BASE and found.restarts["ratios"] == [2.0, 1.6, 1.5]
    assert (found.ratio["low"], found.ratio["high"]) == pytest.approx(tuple(np.quantile([2.0, 1.6, 1.5], (0.2, 0.8))))
    assert found.restarts["ratio_between"] == pytest.approx(0.5 / 1.6) and found.restarts["ratio_within"] == pytest.approx(0.06)
    assert found.roofline["seconds"] / 1.2e-3 == found.of_roofline


def test_the_interval_reaches_as_far_as_the_processes_or_as_the_rounds(synthetic):
    alone, far, near = row(synthetic, 1e-3, 2.0), row(synthetic, 1e-3, 2.0), row(synthetic, 1e-3, 2.0)
    assert alone.interval == (alone.time["low"], alone.time["high"]) == pytest.approx((0.98e-3, 1.02e-3))
    join(far, row(synthetic, 1.4e-3, 3.0))
    assert far.interval == (1e-3, 1.4e-3) and far.ratio_interval == (2.0, 3.0) and far.noisy
    assert far.interval[0] < far.time["low"] < far.time["high"] < far.interval[1]
    join(near, row(synthetic, 1e-3, 2.0))
    assert near.interval == alone.interval and near.ratio_interval == alone.ratio_interval and not near.noisy


def test_a_process_that_is_wrong_makes_the_row_wrong(synthetic):
    found = row(synthetic, 1e-3, 2.0)
    join(found, row(synthetic, 1e-3, 2.0))
    bad = {"ok": False, "error": 0.5, "bound": 1e-6, "worst": "output", "reason": "output is off"}
    join(found, row(synthetic, 1e-3, status="wrong", reason="output is off", time=None, check=bad))
    assert found.status == "wrong" and found.reason == "process 3: output is off" and found.check == bad
    assert found.time is found.ratio is found.roofline is found.memory is found.restarts is None and np.isnan(found.seconds)
    join(found, row(synthetic, 1e-3, 2.0))
    assert found.status == "wrong" and found.time is None, "a later process that is right mends nothing"


def test_a_process_without_a_time_is_told(synthetic):
    found = row(synthetic, 1e-3, 2.0)
    join(found, row(synthetic, 1e-3, status="skipped", reason="would need 9 GiB", time=None))
    assert found.ok and found.seconds == 1e-3 and found.time["rounds"] == 9
    assert found.restarts["count"] == 1 and found.restarts["missing"] == "process 2: skipped, would need 9 GiB"
    join(found, row(synthetic, 2e-3))
    assert found.restarts["count"] == 2 and found.restarts["ratios"] == [2.0] and found.ratio["median"] == 2.0


def test_what_contended_a_process_is_told(synthetic):
    found = row(synthetic, 1e-3, contention=contention(others=0.02, redone="one", clock=1500))
    join(found, row(synthetic, 1e-3, contention=contention(others=0.4, contended="other programs")))
    assert found.contended == "process 2: other programs" and found.contention["others"] == 0.4
    assert found.contention["redone"] == "one" and found.contention["clock"] == 1500
    join(found, row(synthetic, 1e-3, contention=contention(throttled=0.5, reasons="power", contended="throttled")))
    assert found.contended == "process 2: other programs; process 3: throttled" and found.contention["reasons"] == "power"
    old = row(synthetic, 1e-3)
    join(old, row(synthetic, 1e-3, contention=contention(others=0.1)))
    assert old.contention["others"] == 0.1 and old.contended is None


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
    """`process(factor, last, ...)`: a process that answers with times as many times as long, then runs `last`."""
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
        monkeypatch.setattr(restarts, "COMMAND", (sys.executable, str(file)))
        return lambda: [json.loads(f.read_text()) for f in sorted(tmp_path.glob("asked-*.json"))]

    return prepare


def test_processes_follow_each_other(here, process):
    results, cases = here
    asked = process(1.5, 1.1)
    said, kept = [], []
    assert restarts.left(cases, results, THREE) == 2 * len(cases) == 8
    restarts.measure(
        cases,
        results,
        THREE,
        tell=said.append,
        advance=lambda: said.append("."),
        keep=lambda: kept.append(results.rows[0].restarts["count"]),
    )
    assert [(r.restarts["count"], r.restarts["missing"]) for r in results.rows] == [(3, None)] * 8
    first = results.rows[0]
    assert first.restarts["medians"] == pytest.approx([first.restarts["medians"][0] * f for f in (1, 1.5, 1.1)])
    assert kept == [2, 3] and said == ["process 2", "again, length training", ".", "process 3", "again, length training", "."]
    one, two = asked()
    assert {tuple(key) for key in one["keys"]} == {r.key for r in results.rows} and one["options"]["device"] == "cpu"
    assert one["keys"] == two["keys"] and len(one["peaks"]) == 1
    assert restarts.left(cases, results, THREE) == 0
    restarts.measure(cases, results, THREE)
    assert len(asked()) == 2, "nothing lacks a start"
    planned = restarts.planned(one, replace(THREE, threads=(results.rows[0].threads,)), suites.plan)
    assert [case.keys() for case in planned] == [case.keys() for case in cases] and all(case.headline for case in planned)


def test_only_headlines_and_only_what_has_a_time(here, process):
    results, cases = here
    asked = process(1.0)
    restarts.measure([replace(case, headline=False) for case in cases], results, THREE)
    assert asked() == [] and restarts.left(cases, Results({}, {}), THREE) == 8
    for r in results.rows:
        r.status, r.time = "unavailable", None
    restarts.measure(cases, results, THREE)
    assert asked() == [] and restarts.left(cases, results, THREE) == 0


def test_missing_processes_are_made_up_for(here, process):
    """As --resume finds them: two of four cases have their second start."""
    results, cases = here
    done = set().union(*(case.keys() for case in cases[:2]))
    asked = process(1.2, change=lambda rows: [r for r in rows if Row(**r).key in done])
    two = replace(THREE, restarts=2)
    restarts.measure(cases, results, two)
    assert {r.key for r in results.rows if r.restarts["count"] == 2} == done and restarts.left(cases, results, two) == 2
    assert {r.restarts["missing"] for r in results.rows if r.key not in done} == {"the other process did not measure it"}
    process(1.2, 1.3)
    restarts.measure(cases, results, two)
    assert {tuple(key) for key in asked()[-1]["keys"]} == {r.key for r in results.rows} - done
    assert [(r.restarts["count"], r.restarts["missing"]) for r in results.rows] == [(2, None)] * 8


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
    restarts.measure(cases, results, THREE)
    assert len(asked()) == 1 and [r.time for r in results.rows] == before
    assert all(r.restarts["count"] == 1 and reason in r.restarts["missing"] for r in results.rows)
    assert quality.notes(replace(results, options={"restarts": 3})) == [
        "8 of 8 headlines were measured in fewer than 3 processes. They are listed."
    ]


def test_what_a_start_measured_before_it_died_stays(here, process):
    results, cases = here
    process(1.5, last="sys.exit('killed')", change=lambda rows: rows[:2])
    restarts.measure(cases, results, THREE)
    assert [r.restarts["count"] for r in results.rows] == [2, 2] + [1] * 6
    assert all("killed" in r.restarts["missing"] for r in results.rows)


def test_an_interrupt_ends_the_process_and_keeps_what_it_measured(here, process, tmp_path):
    results, cases = here
    process(1.5, last="time.sleep(600)", change=lambda rows: rows[:2])

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        restarts.measure(cases, results, THREE, advance=interrupt)
    assert [r.restarts["count"] if r.restarts else 1 for r in results.rows] == [2, 2] + [1] * 6
    pid = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_process_that_does_not_heed_is_killed(here, process, tmp_path, monkeypatch):
    results, cases = here
    monkeypatch.setattr(restarts, "PATIENCE", 0.2)
    process(1.5, last=f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{MEASURED}time.sleep(600)")
    seen = iter([None, KeyboardInterrupt()])

    def second():
        error = next(seen)
        if error:
            raise error

    with pytest.raises(KeyboardInterrupt):
        restarts.measure(cases, results, THREE, advance=second)
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_no_speed_up_over_a_baseline_that_was_wrong(here, process):
    results, cases = here

    def change(rows):
        bad = next(r for r in rows if r["provider"] == BASE)
        bad.update(status="wrong", reason="output is off", time=None)
        return rows

    process(1.0, change=change)
    assert all(r.ratio for r in results.rows if r.provider == OWN)
    restarts.measure(cases, results, replace(THREE, restarts=2))
    (wrong,) = (r for r in results.rows if r.status == "wrong")
    (beside,) = (r for r in results.rows if (r.provider, r.mode, r.T) == (OWN, wrong.mode, wrong.T))
    assert wrong.reason == "process 2: output is off" and beside.ratio is None and beside.restarts["ratios"] == []
    assert beside.restarts["count"] == 2 and sum(r.ratio is not None for r in results.rows) == 3


def test_a_real_process_and_a_provider_that_it_does_not_know(monkeypatch):
    """One tiny headline, in this process and in another one."""
    w = Workload("lstm", 32, 8, 256, 256, "training", threads=1)
    plan = sequential_vs_parallel.plan(Options("cpu", "float32", (1,), quick=True))
    (case,) = (case for case in plan if w in [p.workload for p in case.participants])
    kept = tuple(p for p in case.participants if p.provider in (BASE, OWN))
    add_provider("mine", lambda w: nn.LSTM(w.I, w.H), like=BASE)
    try:
        case = joined(replace(case, participants=kept, effort=Effort(seconds=0.1, max_rounds=5)))
        runner = Runner("cpu", quick=True)
        results = Results(restarts.environment.collect("cpu"), {}, runner.run(case), list(runner.peaks.values()))
        steps, options = [], Options("cpu", "float32", (1,), quick=True, restarts=2)
        restarts.measure([case], results, options, tell=steps.append)
    finally:
        remove_provider("mine")
    base, own, mine = results.rows
    assert [r.restarts["missing"] for r in results.rows] == [None, None, restarts.NOT_KNOWN]
    assert [r.restarts["count"] for r in results.rows] == [2, 2, 1] and mine.ratio and mine.ok
    for r in (base, own):
        assert len(set(r.restarts["medians"])) == 2 and min(r.restarts["medians"]) > 0 and r.contention is not None
    assert own.restarts["ratios"][1] == pytest.approx(base.restarts["medians"][1] / own.restarts["medians"][1])
    assert "process 2" in steps and any(step.startswith("again, length training T=32") for step in steps)


def test_another_package_is_refused(tmp_path, capsys):
    (tmp_path / "request.json").write_text(json.dumps({"here": "/elsewhere"}))
    assert restarts.main([str(tmp_path / "request.json"), str(tmp_path / "answer.json")], suites.plan) == 2
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
    ("argv", "count"), [((), 3), (("--quick",), 1), (("--quick", "--restarts", "2"), 2), (("--restarts", "1"), 1)]
)
def test_the_command_line(argv, count, synthetic, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(Counts, "synthetic", synthetic)
    monkeypatch.setattr(cli, "Runner", Counts)
    monkeypatch.setattr(
        restarts, "_start", lambda wanted, results, options, tell, advance: found.append(options.restarts) or "no"
    )
    only = ("--device", "cpu", "--threads", "1", "--only", f"T=32 provider={OWN}", "--out", str(tmp_path))
    assert cli.main([*argv, *only]) == 0
    results = Results.load(tmp_path / "results.json")
    assert results.options["restarts"] == count and found == [count] * (count > 1)
    assert cli.main([*argv, *only, "--resume"]) == 0, "what failed is tried again"
    assert found == [count] * (2 if count > 1 else 0)
    assert cli.main([*argv, *only, "--resume", "--restarts", "5"]) == 0, "more processes for what is there"
    assert found[-1] == 5 and Results.load(tmp_path / "results.json").options["restarts"] == 5
    assert cli.main([*argv, *only, "--resume", "--restarts", "1"]) == 0
    assert found[-1] == 5 and Results.load(tmp_path / "results.json").options["restarts"] == 5


def test_an_interrupted_process_leaves_an_interrupted_run(synthetic, tmp_path, monkeypatch):
    monkeypatch.setattr(Counts, "synthetic", synthetic)
    monkeypatch.setattr(cli, "Runner", Counts)

    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(restarts, "_start", interrupted)
    only = ("--device", "cpu", "--threads", "1", "--only", f"T=32 provider={OWN}", "--out", str(tmp_path))
    assert cli.main([*only]) == 130
    results = Results.load(tmp_path / "results.json")
    assert results.options["interrupted"] and len(results.rows) == 4 and all(r.time for r in results.rows)


@pytest.fixture
def measured(here, process):
    results, cases = here
    process(1.5, 1.1)
    restarts.measure(cases, results, THREE)
    results.options["restarts"] = 3
    return results


def test_files(measured, tmp_path):
    """JSON and back; columns of the CSV; a file from before these columns."""
    measured.save(tmp_path / "new.json")
    assert Results.load(tmp_path / "new.json").rows == measured.rows
    write_csv(measured.rows, tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open() as file:
        line = next(csv.DictReader(file))
    assert (
        line["restarts.count"] == "3"
        and [float(v) for v in line["restarts.medians"].split()] == measured.rows[0].restarts["medians"]
    )
    assert float(line["restarts.between"]) == pytest.approx(0.5 / 1.1)
    old = json.loads((tmp_path / "new.json").read_text())
    for r in old["rows"]:
        del r["restarts"], r["contention"]
    del old["options"]["restarts"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    loaded = Results.load(tmp_path / "old.json")
    assert all(r.restarts is r.contention is r.contended is None for r in loaded.rows)
    assert loaded.rows[0].interval == (loaded.rows[0].time["low"], loaded.rows[0].time["high"])
    assert {f.name for f in fields(Row)} >= {"restarts", "contention"}


def test_the_page(measured):
    first = measured.rows[0]
    first.restarts["missing"] = "process 4: <gone>"
    first.contention = contention(others=0.4, redone="busy", contended="other programs used 40% of the CPU")
    page = assembly.page(measured)
    for part in ("Headlines by process", "Process restarts", "45.5%", "process 4: &lt;gone&gt;", "in up to 3 processes"):
        assert part in page, part
    assert "Contended rows" in page and "1 of 8 times contended" in page
    assert "timed once more: busy; contended: other programs used 40% of the CPU" in page
    assert assembly.derive(measured)["contended"] == [0]
    (section,) = quality.restarts(measured)
    assert len(section.tables[0].rows) == 8 and {len(r) for r in section.tables[0].rows} == {len(section.tables[0].columns)}
    assert "3 processes: 45.5% between them, 4.0% within" in time_cell(first).hint
    own = next(r for r in measured.rows if r.provider == OWN)
    assert "3 processes: 0.0% between them, 6.0% within" in ratio_cell(own).hint


def test_nothing_is_said_without_further_restarts(here):
    results, _ = here
    page = assembly.page(results)
    assert not any(word in page for word in ("Headlines by process", "processes: their times", "Contended rows", "once more"))
    assert assembly.derive(results)["contended"] == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quick": True}, ""),
        ({"quick": True, "restarts": 1}, ""),
        ({"quick": False, "restarts": 3}, ""),
        ({"quick": True, "restarts": 3}, " --restarts 3"),
        ({"quick": False, "restarts": 1}, " --restarts 1"),
    ],
)
def test_the_command_that_repeats_it(here, options, words):
    results, _ = here
    quick = " --quick" if options["quick"] else ""
    command = reproduce.commands(replace(results, options=options))[0]
    assert command == f"python -m fastseq bench --suite sequential-vs-parallel --device cpu --threads 1{quick}{words}"


def test_compare_takes_the_spread_over_restarts(synthetic):
    """10 % slower: a verdict between single processes, none where the processes themselves lie further apart."""
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


def test_compare_takes_the_spread_of_speed_ups_over_restarts(synthetic):
    before, after = (Results({}, {}, [row(synthetic, s, r)]) for s, r in ((1e-3, 2.0), (1.3e-3, 1.6)))
    assert [c.verdict for c in compare.changes(before, after)] == [compare.SLOWER]
    join(before.rows[0], row(synthetic, 1e-3, 1.5))
    (change,) = compare.changes(before, after)
    assert (change.verdict, change.reason) == (compare.SAME, f"{BASE} moved alike")


@pytest.mark.parametrize("which", ["old", "new"])
def test_a_contended_row_is_no_ground_for_a_verdict(synthetic, which, tmp_path):
    files = {name: Results({}, {}, [row(synthetic, s)]) for name, s in (("old", 1e-3), ("new", 2e-3))}
    files[which].rows[0].contention = contention(contended="other programs used 40% of the CPU")
    (change,) = compare.changes(files["old"], files["new"])
    assert (change.verdict, change.reason) == (compare.CONTENDED, f"{which}: other programs used 40% of the CPU")
    for name, results in files.items():
        results.save(tmp_path / name)
    assert cli.main(["compare", str(tmp_path / "old"), str(tmp_path / "new"), "--fail-on-slower"]) == 0
    assert "1 contended" in compare.summary([change])[0]


def test_lists_of_one_start(synthetic):
    found = Restarts.of(row(synthetic, 1e-3, 2.0)).as_dict()
    assert found["count"] == 1 and found["between"] is None and found["within"] == pytest.approx(0.04)
    assert Case("s", "g", (Participant(OWN, Workload("lstm", 1, 1, 1, 1, "inference")),), Effort()).headline is False
