"""Verdicts follow from the figures, whatever the figures are."""

from __future__ import annotations

import random

import pytest

from fastseq.benchmarks.claims import table as claims
from fastseq.benchmarks.claims.evidence import judge, less, lowest, meet
from fastseq.benchmarks.measure.results import Results, Row
from fastseq.benchmarks.providers.decode import DECODE_PROVIDERS, GROWING, RESERVED, layer_name
from fastseq.benchmarks.providers.registry import EVERY_PROVIDER
from fastseq.benchmarks.providers.systems import own_name
from fastseq.benchmarks.providers.variable_length import MASK, NESTED, VARIABLE_PROVIDERS
from fastseq.benchmarks.providers.variable_length import layer_name as variable_name
from fastseq.benchmarks.report.findings import FAILS, HOLDS, NOT_MEASURED, PARTLY, UNDECIDED, Line, together
from fastseq.benchmarks.suites import (
    SUITES,
    decode,
    long_range,
    sequential_vs_parallel,
    small_data,
    statements,
    systems,
    variable_length,
)
from fastseq.benchmarks.workloads.decode import PREFILL, TOKENS, DecodeWorkload
from fastseq.benchmarks.workloads.experiments import Experiment
from fastseq.benchmarks.workloads.statements import Context, Statement
from fastseq.benchmarks.workloads.systems import SystemWorkload, TextExperiment
from fastseq.benchmarks.workloads.variable_length import VariableWorkload

LSTM = layer_name("fastseq", "LSTM")


def verdict(results, claim):
    return next(v for v in claims.verdicts(results) if v.claim == claim)


def linear(T):
    return 1e-5 * T


def square(T):
    return 1e-7 * T**2


@pytest.mark.parametrize(
    ("holds", "state", "text"),
    [
        ({32: True, 64: True}, HOLDS, "holds for T = 32…64"),
        ({32: True}, HOLDS, "holds for T = 32"),
        ({32: False, 64: False}, FAILS, "does not hold here, T = 32…64"),
        ({32: False, 64: None}, FAILS, "does not hold here, T = 32…64 (no difference at T = 64)"),
        ({32: None, 64: None}, UNDECIDED, "undecided, no difference for T = 32…64"),
        ({32: False, 64: True, 128: True}, PARTLY, "holds only from T = 64 on, measured to 128"),
        ({32: True, 64: None, 128: False}, PARTLY, "holds only up to T = 32, measured to 128"),
        ({32: False, 64: True, 128: False}, PARTLY, "holds only for T = 64"),
        ({32: True, 64: False, 128: True}, PARTLY, "holds only at T = 32, 128"),
    ],
)
def test_verdict_over_lengths(holds, state, text):
    part = judge(holds)
    assert (part.state, part.text) == (state, text)


@pytest.mark.parametrize(
    ("states", "state"),
    [
        ((HOLDS, HOLDS), HOLDS),
        ((HOLDS, FAILS), PARTLY),
        ((FAILS, UNDECIDED), FAILS),
        ((UNDECIDED,), UNDECIDED),
        ((PARTLY,), PARTLY),
    ],
)
def test_answers_together(states, state):
    assert together(states) == state


def test_less_decides_nothing_within_three_per_cent_or_where_spreads_meet():
    a = Line("a", {1: 1.0, 2: 1.02, 4: 2.0, 8: 0.0}, {4: (1.0, 2.5)})
    b = Line("b", {1: 2.0, 2: 1.0, 4: 3.0, 8: 1.0, 16: 1.0}, {4: (2.4, 3.1)})
    assert less(a, b).firm == {1: True, 2: None, 4: None, 8: True}


def test_the_lowest_line_is_that_of_every_length_where_all_were_measured():
    a, b = Line("a", {1: 1.0, 2: 5.0, 4: 1.0}, {1: (0.5, 2.0)}), Line("b", {1: 3.0, 2: 2.0})
    found = lowest([a, b, Line("none", {})], "best")
    assert found.values == {1: 1.0, 2: 2.0} and found.spread == {1: (0.5, 2.0)}


def test_a_crossover_names_who_is_lower_and_its_interval():
    """T² / 60 and 5 T meet at 300; either is known to 10 %."""
    lengths = [2**k for k in range(5, 11)]
    block, layer = ({T: f(T) for T in lengths} for f in (lambda T: T**2 / 60, lambda T: 5.0 * T))
    lines = [Line(name, of, {T: (v / 1.1, v * 1.1) for T, v in of.items()}) for name, of in (("block", block), ("layer", layer))]
    for pair in (lines, lines[::-1]):
        (found,) = meet(*pair, "training")
        assert str(found) == "training: block lower up to T ≈ 300 (248…363), layer beyond"
    assert meet(lines[0], lines[0]) == ()


def test_every_statement_has_a_verdict_and_none_without_figures(synthetic):
    found = claims.verdicts(synthetic.lengths({}))
    assert [v.claim for v in found] == list(claims.CLAIMS) and len(found) == 13
    assert {v.state for v in found} == {NOT_MEASURED} and not any(v.figures for v in found)


def test_a_claim_without_rows_says_which_suite_to_run(synthetic):
    for v in claims.verdicts(synthetic.lengths({})):
        assert {word for word in v.advice.split() if word in SUITES} == set(v.missing)
        assert set(claims.CLAIMS[v.claim].suites) <= SUITES.keys()
    assert verdict(synthetic.lengths({}), "infer-faster").verdict == (
        "not measured in this run: python -m fastseq bench --suite decode"
    )


def test_overhead_follows_time_and_memory_of_one_program(synthetic):
    """A window costs T, everything T²: they meet at T = 256; blocks always cost more; memory is the same."""
    cost = {"full causal": lambda T: T * T / 256, "window": lambda T: 1.0 * T, "blocks": lambda T: 2.0 * T * T}
    results = synthetic.alone(
        lambda kind, provider, T: cost.get(kind, lambda T: 1.0)(T) * (1 if provider.startswith("fast") else 7)
    )
    found = verdict(results, "overhead")
    assert "time, sliding window: holds only from T = 512 on, measured to 512" in found.verdict
    assert "time, block-sparse: does not hold here, T = 128…512" in found.verdict
    assert "memory, sliding window: undecided, no difference for T = 128…512" in found.verdict
    assert found.state == PARTLY and "time, sliding window: full causal lower up to T ≈ 256" in found.crossovers
    assert "512 s against 1024 s at T = 512" in found.figures
    assert not verdict(synthetic.lengths({}), "overhead").measured


@pytest.mark.parametrize(
    ("hashed", "fused", "own"),
    [
        (lambda T: 100 * T, "holds only from T = 512 on, measured to 512", "holds for T = 128…512"),
        (lambda T: 1 * T, "holds for T = 128…512", "holds for T = 128…512"),
        (lambda T: 9 * T * T, "does not hold here, T = 128…512", "does not hold here, T = 128…512"),
        (lambda T: 4 * T * T, "does not hold here, T = 128…512", "undecided, no difference for T = 128…512"),
    ],
)
def test_overhead_of_hashed_attention_is_beside_fused_and_beside_its_own_program(synthetic, hashed, fused, own):
    """Everything takes T² / 4 when fused, and sixteen times that in the program that hashes."""
    cost = {"hashed": hashed, "shared query-key": lambda T: 4 * T * T}
    rows = synthetic.alone(lambda kind, provider, T: cost.get(kind, lambda T: T * T / 4)(T))
    found = verdict(rows, "overhead")
    assert f"time, hashed beside fused: {fused}" in found.verdict
    assert f"time, hashed beside all keys of its own program: {own}" in found.verdict
    assert "memory, hashed beside fused: undecided" in found.verdict and "hashed attention by Reformer" in found.figures
    assert {line.name for panel in found.findings[0].panels for line in panel.lines} >= {"hashed", "shared query-key"}
    rows.rows = [row for row in rows.rows if row.function != "hashed"]  # as an older file has them
    assert "hashed beside" not in verdict(rows, "overhead").verdict
    assert "hashed attention not measured" in verdict(rows, "overhead").figures


def test_train_faster_holds_up_to_the_crossover(synthetic):
    """The block takes 1e-7 T², the LSTM 1e-5 T: they meet at T = 100."""
    results = synthetic.lengths({"attention block": square, "torch.nn.LSTM": linear})
    found = verdict(results, "train-faster")
    assert found.verdict == "holds only up to T = 64, measured to 512"
    assert found.crossovers == "attention block lower up to T ≈ 100 (96…104), LSTM beyond"
    assert found.where == "on A <fast> CPU & more, B = 8, width 256, float32, 1 thread"
    assert "T = 32: 2,500,000 tokens/s against 800,000" in found.figures


def test_train_faster_turns_with_the_figures(synthetic):
    fast = {"attention block": lambda T: 1e-6 * T, "torch.nn.LSTM": linear}
    assert verdict(synthetic.lengths(fast), "train-faster").verdict == "holds for T = 32…512"
    slow = {"attention block": lambda T: 1e-4 * T, "torch.nn.LSTM": linear}
    assert verdict(synthetic.lengths(slow), "train-faster").verdict == "does not hold here, T = 32…512"


def test_train_faster_is_against_the_fastest_lstm(synthetic):
    seconds = {
        "attention block": lambda T: 5e-6 * T,
        "torch.nn.LSTM": linear,
        "fastseq.LSTM": lambda T: 2e-6 * T,
    }
    assert verdict(synthetic.lengths(seconds), "train-faster").verdict == "does not hold here, T = 32…512"


def test_parallel_ops_holds_while_attention_is_flat(synthetic):
    flat = {"fused attention": lambda T: 1e-3, "torch.nn.LSTM": linear}
    assert verdict(synthetic.lengths(flat), "parallel-ops").verdict.startswith("forward: holds for T = 32…512")
    bent = {"fused attention": lambda T: 1e-3 * max(1.0, T / 128), "torch.nn.LSTM": linear}
    found = verdict(synthetic.lengths(bent), "parallel-ops")
    assert "forward + backward: holds only up to T = 128" in found.verdict
    assert "T¹·⁰⁰" in found.figures and "10.0 µs per step" in found.figures


def test_parallel_ops_takes_the_fastest_attention(synthetic):
    seconds = {"fused attention": linear, "fastseq attention": lambda T: 1e-5, "torch.nn.LSTM": lambda T: 1e-3 * T}
    assert verdict(synthetic.lengths(seconds), "parallel-ops").state == HOLDS


def test_parallel_ops_does_not_hold_where_attention_grows_at_once(synthetic):
    grown = {"fused attention": linear, "torch.nn.LSTM": linear}
    found = verdict(synthetic.lengths(grown), "parallel-ops")
    assert found.state == FAILS and "does not hold here as time" in found.verdict


def test_the_two_memory_claims_are_opposites(synthetic):
    names = ("naive attention", "fused attention", "torch.nn.LSTM")
    memory = {
        "naive attention": lambda T: 100 * T**2,
        "fused attention": lambda T: 5e3 * T,
        "torch.nn.LSTM": lambda T: 1e4 * T,
    }
    results = synthetic.lengths(dict.fromkeys(names, linear), memory)
    more, less = verdict(results, "memory-more"), verdict(results, "memory-less")
    assert more.verdict == (
        "naive attention: holds only from T = 128 on, measured to 512; fused attention: does not hold here, T = 32…512"
    )
    assert less.verdict == ("naive attention: holds only up to T = 64, measured to 512; fused attention: holds for T = 32…512")
    assert "25.0 MiB" in more.figures


@pytest.mark.parametrize("seed", range(8))
def test_contradictory_statements_get_contradictory_verdicts(synthetic, seed):
    """Whatever the figures: where one holds the other does not, and at every length one of them does."""
    lengths, names = (32, 64, 128, 256, 512), ("fused attention", "torch.nn.LSTM")
    drawn = iter(random.Random(seed).sample(range(1, 100), 2 * len(lengths)))
    sizes = {(name, T): next(drawn) * 2**20 for name in names for T in lengths}
    memory = {name: (lambda T, name=name: sizes[name, T]) for name in names}
    results = synthetic.lengths(dict.fromkeys(names, linear), memory)
    more, fewer = (verdict(results, claim).findings[0].parts[0] for claim in ("memory-more", "memory-less"))
    wins = {sizes["fused attention", T] > sizes["torch.nn.LSTM", T] for T in lengths}
    expected = {(True,): (HOLDS, FAILS), (False,): (FAILS, HOLDS)}.get(tuple(wins), (PARTLY, PARTLY))
    assert (more.state, fewer.state) == expected and more.text != fewer.text


def test_wrong_rows_are_no_figures(synthetic):
    results = synthetic.lengths({"attention block": square, "torch.nn.LSTM": linear})
    for row in results.rows:
        if row.provider == "attention block":
            row.status = "wrong"
    found = verdict(results, "train-faster")
    assert not found.measured and found.verdict == "not measured: its rows are missing"


def test_crossovers_and_exponents_of_the_suite(synthetic):
    results = synthetic.lengths({"fused attention": square, "torch.nn.GRU": linear})
    derived = sequential_vs_parallel.derive(results)
    fits = {(f["provider"], f["mode"], f["quantity"]): f["exponent"] for f in derived["fits"]}
    assert fits["fused attention", "training", "seconds"] == pytest.approx(2)
    assert fits["torch.nn.GRU", "inference", "seconds"] == pytest.approx(1)
    meeting = next(c for c in derived["crossovers"] if c["mode"] == "training")
    assert (meeting["a"], meeting["b"]) == ("fused attention", "torch.nn.GRU")
    assert meeting["at"] == pytest.approx(100)
    assert sequential_vs_parallel.crossover_text(meeting) == "recurrence above T ≈ 100 (96…104)"


def results_of(suite, *rows):
    return Results({"device name": "a device"}, {}, [row for row in rows if row.suite == suite], [], 1.0)


def generation(synthetic, seconds):
    """Rows of the suite decode; `seconds(provider, stage, T)` for a token of those 16, or for the prefill."""
    rows = []
    for name in (LSTM, GROWING, RESERVED):
        function = DECODE_PROVIDERS[name].function.removeprefix("decode ")
        for stage in (PREFILL, TOKENS):
            for T in (64, 256, 1024):
                w = DecodeWorkload(function, T, 1, 64, 64, stage=stage, new=16)
                calls = 16 if stage == TOKENS else 1
                rows.append(synthetic.timed(Row.of(decode.NAME, stage, name, w), calls * seconds(name, stage, T)))
    return results_of(decode.NAME, *rows)


def test_infer_faster_tells_prefill_from_generation(synthetic):
    def seconds(name, stage, T):
        if name == LSTM:
            return 1e-6 * T if stage == PREFILL else 256e-6
        return (4e-7 * T if stage == PREFILL else 1e-6 * T) * (2 if name == GROWING else 1)

    results = generation(synthetic, seconds)
    found = verdict(results, "infer-faster")
    assert found.verdict == "prefill: holds for T = 64…1024; token by token: holds only up to T = 64, measured to 1024"
    assert "a token after T = 1024: 1.02 ms against 256 µs for the LSTM" in found.figures
    assert "kept after T = 1024: 512 KiB of keys and values against 0.50 KiB of state" in found.figures
    assert found.crossovers.startswith("token by token: attention block lower up to T ≈ 256")
    more, fewer = verdict(results, "memory-more"), verdict(results, "memory-less")
    assert (more.verdict, fewer.verdict) == ("generation: holds for T = 64…1024", "generation: does not hold here, T = 64…1024")
    assert more.missing == ("sequential-vs-parallel", "memory")


def test_variable_length_answers_for_both_families(synthetic):
    seconds = {
        variable_name("torch.nn", "LSTM", "padded"): 3.0,
        variable_name("fastseq", "LSTM", "packed"): 1.0,
        MASK: 1.0,
        NESTED: 2.0,
    }
    rows = []
    for name, value in seconds.items():
        function = VARIABLE_PROVIDERS[name].function.removeprefix("variable ")
        for T in (64, 128):
            w = VariableWorkload(function, T, 4, 32, 32, "training", spread="skewed")
            rows.append(synthetic.timed(Row.of(variable_length.NAME, f"skewed {function}", name, w), value * T))
    found = verdict(results_of(variable_length.NAME, *rows), "variable-length")
    assert found.verdict == (
        "LSTM is fastest padded, forward + backward: does not hold here, T = 64…128; "
        "attention is fastest without padding, forward + backward: does not hold here, T = 64…128"
    )
    assert "longest row 128: 128 s without padding, 384 s with it" in found.figures and "% of a padded batch" in found.figures


def experiment(suite, group, name, value, *, T=32, samples=0, low=None, high=None):
    w = Experiment(EVERY_PROVIDER[name].function, T, 8, 32, 32, task=group, samples=samples)
    row = Row.of(suite, group, name, w)
    row.metric = {"name": "", "unit": "", "median": value, "low": low or value, "high": high or value, "seeds": 3}
    return row


def reaches(factors, recalled):
    """Gradients that decay by a factor for each step, and accuracies by length."""
    rows = [experiment(long_range.NAME, "gradient", name, factor**T, T=T) for name, factor in factors.items() for T in (2, 8, 32)]
    rows += [experiment(long_range.NAME, "recall", name, v, T=T) for name, of in recalled.items() for T, v in of.items()]
    return results_of(long_range.NAME, *rows)


def test_long_range_compares_gradients_and_recall():
    factors = {"fastseq.RNN": 0.5, "fastseq.LSTM": 0.9, "fastseq.GRU": 0.7, "fastseq attention": 0.95}
    recalled = {"fastseq.LSTM": {4: 1.0, 16: 0.2}, "attention block": {4: 1.0, 16: 0.9}}
    found = verdict(reaches(factors, recalled), "long-range")
    assert [part.state for finding in found.findings for part in finding.parts] == [HOLDS, PARTLY, HOLDS]
    assert "T = 16: 20% of recurrence, 90% of attention" in found.figures and "fastseq.LSTM 0.9," in found.figures
    turned = verdict(reaches(factors | {"fastseq attention": 0.1}, {}), "long-range")
    assert turned.state == FAILS


def counted(right):
    return [experiment(long_range.NAME, "parity", name, v, T=T) for name, of in right.items() for T, v in of.items()]


def test_parallel_ops_tells_what_parallel_recurrence_buys_and_gives_up(synthetic):
    """Beside an answer that it does not change: as fast as its line says, and a parity that it cannot count."""
    seconds = {"fused attention": square, "torch.nn.GRU": linear}
    plain = verdict(synthetic.lengths(seconds), "parallel-ops")
    assert "parallel in time" not in plain.figures and "parity" not in plain.figures and plain.missing == ("long-range",)
    results = synthetic.lengths(seconds | {"fastseq.MinGRU": lambda T: 4e-6 * T})
    results.rows += counted({name: {32: 1.0, 256: v} for name, v in (("fastseq.GRU", 1.0), ("fastseq.MinGRU", 0.51))})
    found = verdict(results, "parallel-ops")
    assert found.verdict == plain.verdict and found.missing == ()
    said = (
        "forward: time grows as T²·⁰⁰ for fused attention and T¹·⁰⁰ for the fastest recurrent layer, which takes 10.0 µs per "
        "step, and as T¹·⁰⁰ for recurrence that is parallel in time, fastseq.MinGRU: 2.50 times as fast as that layer, "
        "12.80 times as fast as fused attention at T = 512"
    )
    assert found.figures.startswith(said)
    assert found.figures.endswith(
        "parity of T bits, named right (chance is 50%), T = 32: fastseq.GRU 100%, fastseq.MinGRU 100%; "
        "T = 256: fastseq.GRU 100%, fastseq.MinGRU 51%"
    )
    titles = [panel.title for panel in found.findings[0].panels]
    assert titles == ["Time of a layer, forward", "Time of a layer, forward + backward", "Parity of T bits, named right"]
    for row in results.rows:
        if row.provider == "fastseq.MinGRU" and row.time and row.T < 128:
            row.time |= {"low": row.time["low"] / 2}  # noisy, at two lengths of five
    assert "parallel in time" not in verdict(results, "parallel-ops").figures


def test_parity_alone_is_no_answer(synthetic):
    rows = counted({"fastseq.GRU": {32: 1.0}, "fastseq.MinGRU": {32: 0.5}})
    found = verdict(results_of(long_range.NAME, *rows), "parallel-ops")
    assert not found.measured and found.missing == ("sequential-vs-parallel",)


@pytest.mark.parametrize(
    ("factors", "states", "word"),
    [
        ({"fastseq.RNN": 0.5, "fastseq.LSTM": 0.9, "fastseq.GRU": 0.4}, [HOLDS, HOLDS, FAILS], "vanishes"),
        ({"fastseq.RNN": 1.5, "fastseq.LSTM": 1.1, "fastseq.GRU": 1.6}, [HOLDS, HOLDS, FAILS], "explodes"),
        ({"fastseq.RNN": 1.0, "fastseq.LSTM": 0.9}, [FAILS], "neither"),
    ],
)
def test_vanishing_is_the_factor_of_a_step(factors, states, word):
    found = verdict(reaches(factors, {}), "vanishing")
    assert [part.state for part in found.findings[0].parts] == states and word in found.verdict


def test_small_data_needs_seeds_apart():
    def rows(lstm, block):
        of = {"fastseq.LSTM": lstm, "attention block": block}
        return [
            experiment(small_data.NAME, "text", name, v, samples=n, low=v - 0.1, high=v + 0.1)
            for name, values in of.items()
            for n, v in values.items()
        ]

    found = verdict(
        results_of(small_data.NAME, *rows({1024: 2.0, 4096: 2.0, 16384: 2.0}, {1024: 3.0, 4096: 2.1, 16384: 1.0})), "small-data"
    )
    assert found.verdict == "text: holds only up to n = 1024, measured to 16384"
    assert "n = 1024: 2 against 3" in found.figures and "n ≈" in found.crossovers


def told(suite, group, name, w, value):
    row = Row.of(suite.NAME, group, name, w)
    row.metric = {"name": "", "unit": "", "median": value, "low": value, "high": value, "seeds": 3}
    return row


def on_its_own(group, name, value, T):
    return told(statements, group, name, Statement(EVERY_PROVIDER[name].function, T, 8, 32, 32), value)


def test_order_is_known_if_more_than_rounding_changes():
    def rows(plain, with_places):
        changes = {statements.ORDER[statements.PLAIN]: plain, statements.ORDER[statements.POSITIONED]: with_places}
        return [on_its_own(group, statements.ENCODER, v, T) for group, v in changes.items() for T in (8, 64)]

    assert verdict(results_of(statements.NAME, *rows(1e-16, 0.1)), "order").state == HOLDS
    knows = verdict(results_of(statements.NAME, *rows(0.2, 0.1)), "order")
    assert knows.verdict.startswith("fastseq encoder does not know the order: does not hold here, T = 8…64")
    assert verdict(results_of(statements.NAME, *rows(1e-16, 1e-15)), "order").state == PARTLY
    mask = [on_its_own(statements.ORDER[statements.PLAIN], statements.DECODER, 0.3, T) for T in (8, 64)]
    both = verdict(results_of(statements.NAME, *rows(1e-16, 0.1), *mask), "order")
    assert both.state == PARTLY and "fastseq decoder does not know the order: does not hold here" in both.verdict


def test_fixed_context_is_judged_beyond_the_window():
    def found(cached):
        losses = {statements.ALONE: {8: 0.0, 24: 2.0, 64: 2.1}, statements.CACHED: cached}
        rows = [
            told(statements, statements.CONTEXT[how], statements.XL, Context("Transformer-XL", T, 8, 32, 32, variant=how), v)
            for how, of in losses.items()
            for T, v in of.items()
        ]
        return verdict(results_of(statements.NAME, *rows), "fixed-context")

    assert found({8: 0.0, 24: 0.1, 64: 0.2}).state == HOLDS
    partly = found({8: 0.0, 24: 0.1, 64: 2.2})
    assert partly.verdict == (
        "beyond 16 steps, segments alone miss the token: holds for T = 24…64; "
        "cached segments see it: holds only up to T = 24, measured to 64"
    )
    assert found({8: 0.0, 24: 2.0, 64: 2.2}).findings[0].parts[1].state == FAILS


def of_systems(synthetic, group, seconds, T=64, memory=1 << 20):
    """Rows of the suite systems, of widths that differ."""
    mode = "training" if group == systems.STEP else "inference"
    return [
        synthetic.timed(
            Row.of(systems.NAME, group, own_name(name), SystemWorkload(name, T, 8, W, W, mode, stage=group)), s, memory
        )
        for W, (name, s) in zip((64, 72, 80), seconds.items(), strict=False)
    ]


def test_a_hybrid_is_held_against_both_of_which_it_is_made(synthetic):
    def found(hybrid, loss):
        rows = of_systems(synthetic, systems.STEP, {"LSTM": 1.0, "GPT": 2.0, "hybrid": hybrid})
        for name, value in {"LSTM": 1.5, "GPT": 2.0, "hybrid": loss}.items():
            rows.append(told(systems, systems.TEXT, own_name(name), TextExperiment(name, 64, 8, 64, 64), value))
        recalled = {statements.LSTMS: 0.2, statements.DECODER: 0.9, statements.HYBRID: 0.9}
        rows += [on_its_own(statements.RECALL, name, value, 16) for name, value in recalled.items()]
        return verdict(Results({"device": "cpu"}, {"suites": [systems.NAME, statements.NAME]}, rows), "hybrid")

    slower = found(1.5, 1.4)
    assert slower.state == PARTLY
    assert "time of a training step, as good as the better one: does not hold here, T = 64" in slower.verdict
    assert "loss on a text after equal time, below the better one: holds for T = 64" in slower.verdict
    assert "recall at T = 16: fastseq LSTMs 20%, fastseq decoder 90%" in slower.figures
    assert found(1.01, 1.4).state == HOLDS
    loses = found(1.01, 1.6)
    assert "below the better one: does not hold here, T = 64" in loses.verdict and "fastseq hybrid 1.6" in loses.figures
    assert "below the better one: undecided" in found(1.01, 1.5).verdict


def test_overhead_of_whole_systems(synthetic):
    """A window costs T, all keys T²."""
    rows = []
    for T in (64, 128, 256):
        rows += of_systems(synthetic, systems.STEP, {"BERT": T * T / 128, "Longformer": 1.0 * T}, T, 1 << 20)
    found = verdict(results_of(systems.NAME, *rows), "overhead")
    assert "time, Longformer beside BERT: holds only from T = 256 on, measured to 256" in found.verdict
    assert "memory, Longformer beside BERT: undecided" in found.verdict and "Reformer" not in found.verdict
    assert "256 s against 512 s at T = 256" in found.figures and "equal parameters" in found.findings[0].sizes


def test_sizes_are_judged_apart(synthetic):
    """A verdict is never taken from rows of different batches, widths or precisions."""
    results = synthetic.lengths({"attention block": square, "torch.nn.LSTM": linear})
    other = synthetic.lengths({"attention block": linear, "torch.nn.LSTM": square})
    for row in other.rows:
        row.dtype = "bfloat16"
    results.rows += other.rows
    found = verdict(results, "train-faster")
    assert [f.sizes.split(", ")[2] for f in found.findings] == ["float32", "bfloat16"]
    assert found.verdict.count("holds only") == 2 and found.as_dict()["findings"][0]["crossovers"][0]["at"] == pytest.approx(100)
