"""Verdicts follow from the figures, whatever the figures are."""

from __future__ import annotations

import pytest

from fastseq.benchmarks import claims
from fastseq.benchmarks.claims import NOT_MEASURED, over_lengths
from fastseq.benchmarks.suites import sequential_vs_parallel


def verdict(results, claim):
    return next(v for v in claims.verdicts(results) if v.claim == claim)


def linear(T):
    return 1e-5 * T


def square(T):
    return 1e-7 * T**2


@pytest.mark.parametrize(
    ("holds", "text"),
    [
        ({32: True, 64: True}, "holds for T = 32…64"),
        ({32: False, 64: None}, "does not hold here, T = 32…64"),
        ({32: False, 64: True, 128: True}, "holds only from T = 64 on"),
        ({32: True, 64: None, 128: False}, "holds only up to T = 32"),
        ({32: False, 64: True, 128: False}, "holds only for T = 64…64"),
        ({32: True, 64: False, 128: True}, "holds only at T = 32, 128"),
    ],
)
def test_verdict_over_lengths(holds, text):
    assert over_lengths(holds) == text


def test_every_statement_has_a_verdict_and_none_without_figures(synthetic):
    found = claims.verdicts(synthetic.lengths({}))
    assert [v.claim for v in found] == list(claims.STATEMENTS)
    assert {v.verdict for v in found} == {NOT_MEASURED}
    assert not any(v.figures for v in found)


def test_overhead_follows_time_and_memory_of_one_program(synthetic):
    """A window costs T, everything T²: they meet at T = 256; blocks always cost more; memory is the same."""
    cost = {"full causal": lambda T: T * T / 256, "window": lambda T: 1.0 * T, "blocks": lambda T: 2.0 * T * T}
    results = synthetic.alone(
        lambda kind, provider, T: cost.get(kind, lambda T: 1.0)(T) * (1 if provider.startswith("fast") else 7)
    )
    found = verdict(results, "overhead")
    assert "time, sliding window: holds only from T = 512 on" in found.verdict
    assert "time, block-sparse: does not hold here, T = 128…512" in found.verdict
    assert "memory, sliding window: does not hold here" in found.verdict
    assert "512 s against 1024 s at T = 512" in found.figures
    assert verdict(synthetic.lengths({}), "overhead").verdict == NOT_MEASURED


def test_train_faster_holds_up_to_the_crossover(synthetic):
    """The block takes 1e-7 T², the LSTM 1e-5 T: they meet at T = 100."""
    results = synthetic.lengths({"attention block": square, "torch.nn.LSTM": linear})
    found = verdict(results, "train-faster")
    assert found.verdict == "holds only up to T = 64"
    assert "crossover at T ≈ 100" in found.figures
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
    assert verdict(synthetic.lengths(flat), "parallel-ops").verdict.startswith("holds for T = 32…512")
    bent = {"fused attention": lambda T: 1e-3 * max(1.0, T / 128), "torch.nn.LSTM": linear}
    found = verdict(synthetic.lengths(bent), "parallel-ops")
    assert found.verdict.startswith("holds only up to T = 128")
    assert "T^1.00" in found.figures and "10.0 µs per step" in found.figures


def test_parallel_ops_does_not_hold_where_attention_grows_at_once(synthetic):
    grown = {"fused attention": linear, "torch.nn.LSTM": linear}
    assert verdict(synthetic.lengths(grown), "parallel-ops").verdict.startswith("does not hold here")


def test_the_two_memory_claims_are_opposites(synthetic):
    names = ("naive attention", "fused attention", "torch.nn.LSTM")
    memory = {
        "naive attention": lambda T: 100 * T**2,
        "fused attention": lambda T: 5e3 * T,
        "torch.nn.LSTM": lambda T: 1e4 * T,
    }
    results = synthetic.lengths(dict.fromkeys(names, linear), memory)
    more, less = verdict(results, "memory-more"), verdict(results, "memory-less")
    assert more.verdict == "naive attention holds only from T = 128 on; fused attention does not hold here, T = 32…512"
    assert less.verdict == "naive attention holds only up to T = 64; fused attention holds for T = 32…512"
    assert "25.0 MiB" in more.figures


def test_wrong_rows_are_no_figures(synthetic):
    results = synthetic.lengths({"attention block": square, "torch.nn.LSTM": linear})
    for row in results.rows:
        if row.provider == "attention block":
            row.status = "wrong"
    assert verdict(results, "train-faster").verdict == NOT_MEASURED


def test_crossovers_and_exponents_of_the_suite(synthetic):
    results = synthetic.lengths({"fused attention": square, "torch.nn.GRU": linear})
    derived = sequential_vs_parallel.derive(results)
    fits = {(f["provider"], f["mode"], f["quantity"]): f["exponent"] for f in derived["fits"]}
    assert fits["fused attention", "training", "seconds"] == pytest.approx(2)
    assert fits["torch.nn.GRU", "inference", "seconds"] == pytest.approx(1)
    meeting = next(c for c in derived["crossovers"] if c["mode"] == "training")
    assert (meeting["a"], meeting["b"]) == ("fused attention", "torch.nn.GRU")
    assert meeting["at"] == pytest.approx(100)
    assert sequential_vs_parallel.crossover_text(meeting) == "T ≈ 100: above it recurrence is faster"
