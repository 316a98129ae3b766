from __future__ import annotations

import math

import pytest

from fastseq.benchmarks.report.statistics import crossover, geometric_mean, local_exponents, power_law

LENGTHS = [32, 64, 128, 256, 512, 1024]


def test_power_law_of_an_exact_law():
    fit = power_law(LENGTHS, [3e-6 * T**1.5 for T in LENGTHS])
    assert fit.exponent == pytest.approx(1.5)
    assert fit.factor == pytest.approx(3e-6)
    assert fit.r2 == pytest.approx(1.0)


def test_power_law_looks_at_the_upper_half():
    """A constant overhead hides the law at small T."""
    values = [1.0 if T < 256 else (T / 256) ** 2 for T in LENGTHS]
    upper, whole = power_law(LENGTHS, values), power_law(LENGTHS, values, upper_half=False)
    assert upper.start == 256 and upper.exponent == pytest.approx(2.0)
    assert whole.start == 32 and whole.exponent < 1.5


def test_power_law_r2_falls_with_noise():
    values = [T * (1.5 if i % 2 else 1.0) for i, T in enumerate(LENGTHS)]
    assert 0.5 < power_law(LENGTHS, values, upper_half=False).r2 < 0.999


def test_power_law_without_enough_points():
    assert power_law([32], [1.0]) is None
    assert power_law(LENGTHS, [math.nan] * 5 + [1.0]) is None


def test_crossover_of_known_curves():
    """5 T and T² / 60 meet at T = 300."""
    found = crossover(LENGTHS, [T**2 / 60 for T in LENGTHS], [5 * T for T in LENGTHS])
    assert found.at == pytest.approx(300, rel=1e-6)
    assert (found.before, found.after, found.count) == ("a", "b", 1)


def test_crossover_the_other_way_round():
    found = crossover(LENGTHS, [5 * T for T in LENGTHS], [T**2 / 60 for T in LENGTHS])
    assert (found.before, found.after) == ("b", "a")


def test_a_crossover_has_the_interval_in_which_the_spread_decides_nothing():
    """T² / 60 against 5 T, each known to 10 %: between 300 / 1.21 and 300 * 1.21 either may be lower."""
    a, b = [T**2 / 60 for T in LENGTHS], [5 * T for T in LENGTHS]
    spread = [(p / q / 1.21, p / q * 1.21) for p, q in zip(a, b, strict=True)]
    for found in (crossover(LENGTHS, a, b, spread=spread), crossover(LENGTHS, b, a, spread=[(1 / h, 1 / w) for w, h in spread])):
        assert (found.low, found.at, found.high) == pytest.approx((300 / 1.21, 300, 300 * 1.21), rel=1e-6)


def test_without_spread_the_interval_is_the_tolerance():
    found = crossover(LENGTHS, [T**2 / 60 for T in LENGTHS], [5 * T for T in LENGTHS], tolerance=0.05)
    assert (found.low, found.high) == pytest.approx((300 * math.exp(-0.05), 300 * math.exp(0.05)), rel=1e-6)


def test_an_interval_ends_where_the_measurement_ends():
    found = crossover([32, 64], [1.0, 3.0], [2.0, 2.0], spread=[(0.1, 9.0)] * 2)
    assert (found.low, found.high) == (32, 64) and 32 < found.at < 64


def test_no_crossover_tells_who_is_lower():
    found = crossover(LENGTHS, [1.0] * 6, [2.0] * 6)
    assert (found.at, found.before, found.after, found.first, found.last) == (None, "a", "a", 32, 1024)


def test_noise_below_the_tolerance_is_no_crossing():
    wobbling = [1.0 + 0.01 * (-1) ** i for i in range(6)]
    assert crossover(LENGTHS, wobbling, [1.0] * 6).before == "neither"
    mostly = [2.0, 2.0, 1.01, 0.99, 2.0, 2.0]
    assert crossover(LENGTHS, mostly, [1.0] * 6).at is None


def test_several_crossings_are_counted():
    found = crossover(LENGTHS, [1, 3, 1, 3, 3, 3], [2.0] * 6)
    assert found.count == 3
    assert found.after == "b"


def test_missing_points_take_no_part():
    found = crossover(LENGTHS, [1, 1, math.nan, 4, 4, 4], [2.0] * 6)
    assert 64 < found.at < 256
    assert crossover(LENGTHS, [math.nan] * 6, [1.0] * 6) is None


def test_geometric_mean():
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert math.isnan(geometric_mean([]))


def test_local_exponents():
    assert local_exponents([1, 2, 4], [1, 1, 4]) == [(1, 2, 0.0), (2, 4, pytest.approx(2.0))]
