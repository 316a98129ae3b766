"""Rows that are contended or noisy are no ground for anything: no verdict, no crossover, no headline, no figure of a README."""

from __future__ import annotations

import pytest

from fastseq.benchmarks import assembly, cli
from fastseq.benchmarks.claims import table as claims
from fastseq.benchmarks.claims.evidence import judge, less, line, lowest, meet
from fastseq.benchmarks.measure.contention import Contention
from fastseq.benchmarks.measure.results import Results, Row, reliable
from fastseq.benchmarks.providers.registry import EVERY_PROVIDER
from fastseq.benchmarks.report import quality
from fastseq.benchmarks.report.findings import FAILS, HOLDS, INCONCLUSIVE, PARTLY, Line, together
from fastseq.benchmarks.suites import SUITES, decode, sequential_vs_parallel
from fastseq.benchmarks.workloads.decode import PREFILL, TOKENS, DecodeWorkload

BUSY = "other programs used 64% of the CPU"
LENGTHS = (32, 64, 128, 256, 512)
TIMED = ("parallel-ops", "train-faster")  # claims that follow from times


def linear(T):
    return 1e-5 * T


def square(T):
    return 1e-7 * T**2


@pytest.fixture
def results(synthetic):
    """The block, T², meets the LSTMs, T, at 100; naive attention is slower than fused."""
    found = synthetic.lengths(
        {
            "attention block": square,
            "fused attention": square,
            "naive attention": lambda T: 2 * square(T),
            "torch.nn.LSTM": linear,
            "fastseq.LSTM": lambda T: linear(T) / 1.1,
        }
    )
    return found


def contend(rows):
    for row in rows:
        row.contention = Contention(others=0.64, contended=BUSY).as_dict()


def scatter(rows):
    for row in rows:
        row.time |= {"low": 0.5 * row.time["median"], "high": 2 * row.time["median"]}


def verdict(results, claim):
    return next(v for v in claims.verdicts(results) if v.claim == claim)


def timed(results):
    return [row for row in results.rows if row.time]


@pytest.mark.parametrize("spoil", [contend, scatter])
def test_nothing_follows_from_a_run_on_a_busy_machine(results, spoil):
    before = {v.claim: v.state for v in claims.verdicts(results)}
    assert {before[claim] for claim in TIMED} <= {HOLDS, PARTLY, FAILS} and sequential_vs_parallel.present(results)[0].cards
    spoil(timed(results))
    for claim in TIMED:
        found = verdict(results, claim)
        assert found.state == INCONCLUSIVE and "contended or noisy" in found.verdict, found.verdict
        assert not found.crossovers and not found.figures and found.as_dict()["findings"][0]["crossovers"] == []
    assert verdict(results, "memory-more").state == before["memory-more"], "bytes do not depend on who else is busy"
    derived = sequential_vs_parallel.derive(results)
    assert derived["crossovers"] and all(c["at"] is None and c["void"] for c in derived["crossovers"])
    (section,) = sequential_vs_parallel.present(results)
    assert section.cards == []
    tables = {table.title: table for table in section.tables}
    assert all(
        cell.text.startswith("inconclusive") or cell.text == "–"
        for lines in tables["Crossover length, forward + backward"].rows
        for cell in lines[1:]
    )
    page = assembly.page(results)
    assert 'class="status bad"' in page and "Low confidence" in page and 'class="badge inconclusive"' in page
    assert (
        'class="badge holds"' not in page.split('id="claim-memory-more"')[0].split('id="claims"')[1].split("need more memory")[0]
    )


def test_no_card_from_a_mean_of_doubtful_rows(synthetic):
    for found, suite in (
        (synthetic.grid(lambda group, mode, cell, B, H: 2.0), SUITES["recurrent"]),
        (synthetic.single(lambda group, w: 2.0), SUITES["cells"]),
        (synthetic.alone(lambda kind, provider, T: 1.0), SUITES["attention"]),
    ):
        assert suite.present(found)[0].cards
        contend(timed(found))
        assert suite.present(found)[0].cards == []
    gpu = synthetic.gpu(lambda group, w: 3.0)
    assert SUITES["recurrent"].present(gpu)[0].cards
    scatter(timed(gpu))
    (section, *_) = SUITES["recurrent"].present(gpu)
    assert section.cards == [] and "inconclusive" in str([table.rows for table in section.tables if "arget" in table.title])


def test_a_fifth_of_the_rows_may_be_doubtful(results):
    rows = [row for row in results.rows if row.provider == "attention block" and row.mode == "training"]
    contend(rows[:1])
    found = verdict(results, "train-faster")
    assert found.verdict == "holds only up to T = 64, measured to 512" and "T = 64:" in found.figures, "32 is left out"
    contend(rows[1:2])
    assert verdict(results, "train-faster").verdict == "inconclusive, contended or noisy at 2 of 5 lengths"
    assert reliable(rows[1:]) is False and reliable(rows[2:]) is True and reliable([]) is True


def test_a_finding_is_void_where_too_many_of_the_rows_that_it_shows_are_doubtful(results):
    """Also where those that decide are not among them."""
    contend(row for row in results.rows if row.time and row.provider in ("naive attention", "torch.nn.LSTM"))
    found = verdict(results, "parallel-ops")
    assert found.state == INCONCLUSIVE and found.verdict == "inconclusive: 20 of 50 times were contended or noisy"


def lines_of(values, doubtful=()):
    return Line("a", values, {x: (0.99 * y, 1.01 * y) for x, y in values.items()}, doubtful=frozenset(doubtful), timed=True)


def test_an_order_that_changes_twice_is_no_crossover():
    a = lines_of({32: 1.0, 64: 3.0, 128: 1.0, 256: 1.0})
    b = Line("b", dict.fromkeys((32, 64, 128, 256), 2.0), {x: (1.98, 2.02) for x in (32, 64, 128, 256)}, timed=True)
    part = judge(less(a, b))
    assert (part.state, part.text) == (INCONCLUSIVE, "inconclusive, the order changes 2 times over T = 32…256")
    assert meet(a, b) == ()
    exact = judge(less(Line("a", a.values), Line("b", b.values)))
    assert exact.state == PARTLY, "bytes that were counted come and go for a reason"


def test_the_suites_crossover_is_void_where_curves_cross_twice(synthetic):
    wave = {"attention block": lambda T: linear(T) * (2 if T in (64, 512) else 0.5), "torch.nn.LSTM": linear}
    found = synthetic.lengths(wave)
    meeting = sequential_vs_parallel.compare(found.rows, "attention block", "torch.nn.LSTM", "training")
    assert meeting["void"] == "crosses 3 times" and meeting["at"] is None
    assert sequential_vs_parallel.crossover_text(meeting) == "inconclusive: crosses 3 times"


def test_spreads_that_meet_give_no_answer():
    a, b = lines_of({1: 1.0, 2: 1.0}), lines_of({1: 1.1, 2: 2.0})
    wide = Line("wide", {1: 1.1, 2: 1.1}, {1: (0.9, 1.2), 2: (0.9, 1.2)}, timed=True)
    assert less(a, wide).firm == {1: None, 2: None} and less(a, b).firm == {1: True, 2: True}
    assert less(lines_of({1: 1.0}, doubtful=(1,)), b).firm == {} and less(lines_of({1: 1.0}, doubtful=(1,)), b).doubtful == {1}


def test_the_best_line_is_doubtful_where_another_one_might_have_been_best():
    firm = lines_of({1: 1.0, 2: 1.0})
    near, far = lines_of({1: 1.005, 2: 5.0}, doubtful=(1, 2)), lines_of({1: 0.5, 2: 9.0}, doubtful=(1,))
    assert lowest([firm, near], "best").doubtful == {1} and lowest([firm, far], "best").doubtful == {1}
    assert lowest([firm, lines_of({1: 2.0, 2: 3.0}, doubtful=(1, 2))], "best").doubtful == frozenset()


def test_a_line_knows_its_doubtful_times_and_keeps_what_does_not_follow_from_them(results):
    rows = [row for row in results.rows if row.provider == "fastseq.LSTM" and row.mode == "training"]
    contend(rows[:2])
    scatter(rows[2:3])
    times, sizes = line(rows, "times"), line(rows, "bytes", lambda row: row.memory)
    assert times.doubtful == {32, 64, 128} and times.firm.keys() == {256, 512} and times.timed
    assert sizes.doubtful == frozenset() and not sizes.timed
    assert together((HOLDS, INCONCLUSIVE, FAILS)) == INCONCLUSIVE


@pytest.mark.parametrize("fastest", ["torch.nn.LSTM", "fastseq.LSTM", "fastseq.LSTMCell"])
def test_infer_faster_is_judged_against_the_fastest_recurrence(synthetic, fastest):
    """Attention lies between the fastest recurrent program and the others: it is not faster, whichever that is."""
    every = [name for name, p in decode.DECODE_PROVIDERS.items() if p.function == "decode lstm"]
    quick = next(name for name in every if name.startswith(fastest))
    block = next(name for name, p in decode.DECODE_PROVIDERS.items() if p.function == "decode block")
    rows = []
    for name in (*every, block):
        for stage in (PREFILL, TOKENS):
            for T in (64, 256, 1024):
                w = DecodeWorkload("block" if name == block else "lstm", T, 1, 64, 64, stage=stage, new=16)
                seconds = {quick: 1e-3, block: 2e-3}.get(name, 4e-3)
                rows.append(synthetic.timed(Row.of(decode.NAME, stage, name, w), seconds))
    environment = {"device": "cpu", "device name": "a device"}
    found = verdict(Results(environment, {}, rows), "infer-faster")
    assert len(every) > 2 and found.state == FAILS, found.verdict
    assert EVERY_PROVIDER[quick].function == "decode lstm"


def test_a_verdict_is_a_dozen_words_and_the_rest_is_folded(results):
    every = [v for v in claims.verdicts(results) if v.measured]
    assert every and all(len(v.brief.split()) <= 12 for v in every)
    assert {v.brief for v in every} >= {"holds only up to T = 64, measured to 512"}
    page = assembly.page(results)
    assert page.count("<details><summary>How it was tried") == len(every)
    assert page.count("more claims: <code>python -m fastseq bench --suite") == 1 and "not measured in this run" not in page


def test_the_status_of_a_run(results):
    results.options["quick"] = False
    assert quality.status(results) == quality.Status("good", "Data quality is good: none of 50 times contended or noisy")
    contend(timed(results)[:3])
    found = quality.status(results)
    assert (found.tone, found.text) == ("part", "Medium confidence: 3 of 50 times contended")
    scatter(timed(results)[3:13])
    found = quality.status(results)
    assert (found.tone, found.text) == ("bad", "Low confidence: 3 of 50 times contended; 10 of 50 noisy")


@pytest.mark.parametrize("option", ["--readme", "--picture"])
def test_no_figure_is_published_from_doubtful_rows(results, tmp_path, capsys, option):
    results.environment |= {"device name": "a device"}
    rows, file = timed(results), tmp_path / "results.json"
    target = tmp_path / ("README.md" if option == "--readme" else "picture.svg")
    assert quality.refusal(results) == ""
    contend(rows[: len(rows) // 20])
    assert quality.refusal(results) == "", "a twentieth may be"
    scatter(rows[-1:])
    results.save(file)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--json-in", str(file), option, str(target)])
    assert stopped.value.code == 2 and not target.exists()
    assert f"{option}: 3 of 50 times (6%) were contended or noisy" in capsys.readouterr().err
