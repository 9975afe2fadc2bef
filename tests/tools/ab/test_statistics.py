"""Verdicts on synthetic rounds. Each test states how often it would fail by chance
and what it would miss."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vllm_specplugin.tools.ab.statistics import (
    FEW_ROUNDS,
    _student_quantile,
    compare,
    interval,
    rounds_needed,
)

NOISES = {
    "normal": lambda rng, n: rng.normal(0, 0.05, n),
    "heavy tails": lambda rng, n: 0.03 * rng.standard_t(3, n),
    # one round in twelve is disturbed by up to a factor of two or three
    "spikes": lambda rng, n: (
        rng.normal(0, 0.04, n) + (rng.random(n) < 0.08) * rng.normal(0, 0.8, n)
    ),
}


def experiments(noise: str, rounds: int, count: int, effect: float = 0.0):
    rng = np.random.default_rng(rounds)
    for _ in range(count):
        shared = np.exp(rng.normal(0, 0.3, rounds))  # what slows both sides
        ours = shared * np.exp(NOISES[noise](rng, rounds) + math.log1p(effect))
        yield compare(ours, shared)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("rounds", [5, 8, 10])
def test_a_variant_against_itself_is_no_difference_in_19_of_20_cells(noise, rounds):
    """200 cells at 99%: 2 wrong expected; 10 would be 19 of 20. 7 are allowed: a
    true 1.5% passes in 99% of such tests, a true 6% (plain percentiles) in 9%."""
    results = list(experiments(noise, rounds, 200))
    wrong = sum(result.verdict != "no difference" for result in results)
    assert wrong <= 7


def test_plain_percentiles_would_fail_the_test_above():
    """The bug planted: without moving the percentiles out, 5 rounds say
    'different' for 6% and more of equal pairs."""
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(400):
        x = rng.normal(0, 0.05, 5)
        means = x[rng.integers(0, 5, (1000, 5))].mean(axis=1)
        low, high = np.quantile(means, [0.005, 0.995])
        wrong += not low <= 0 <= high
    assert wrong > 20


@pytest.mark.parametrize(("spread", "least"), [(0.015, 0.98), (0.03, 0.7)])
def test_a_planted_slowdown_of_5_percent_is_found_with_10_rounds(spread, least):
    """Round-to-round noise of 1.5%: found in at least 98% of runs; of 3%: 70%."""
    rng = np.random.default_rng(2)
    found = [
        compare(0.95 * np.exp(rng.normal(0, spread, 10)), np.ones(10)).verdict for _ in range(100)
    ]
    assert found.count("slower") >= least * 100
    assert "faster" not in found


def test_where_noise_hides_5_percent_the_rounds_it_takes_are_said():
    """Noise of 10%: 10 rounds mostly miss 5%, and what is said to be needed finds
    it in about 80% of runs (60% to 97% allowed over 30 runs: 2.5 sigma)."""
    rng = np.random.default_rng(3)
    needed = []
    for _ in range(20):
        first = compare(0.95 * np.exp(rng.normal(0, 0.1, 10)), np.ones(10))
        assert first.rounds_for_5_percent > 10
        needed.append(first.rounds_for_5_percent)
    rounds = int(np.median(needed))
    assert 30 < rounds < 120
    found = [
        compare(np.exp(rng.normal(-math.log(1.05), 0.1, rounds)), np.ones(rounds))
        for _ in range(30)
    ]
    share = sum(result.verdict == "slower" for result in found) / 30
    assert 0.6 <= share <= 0.97


def test_one_disturbed_round_in_twenty_does_not_decide():
    speeds = [1.5, 1.52, 1.49, 1.51, 1.48] * 4
    speeds[7] = 0.1  # Student's interval reaches below 1 then
    result = compare(speeds, [1.0] * 20)
    assert result.value == pytest.approx(1.5, abs=0.02)
    assert result.verdict == "faster"


def test_the_interval_is_reproducible_and_turns_with_the_sides():
    rng = np.random.default_rng(4)
    a, b = rng.uniform(1, 2, (2, 12))
    assert compare(a, b) == compare(a, b)
    there, back = compare(a, b), compare(b, a)
    assert there.value == pytest.approx(1 / back.value)
    assert there.low == pytest.approx(1 / back.high, rel=0.02)


def test_eight_rounds_that_agree_are_enough_however_far_one_is_off():
    """Eight on one side have probability 1/128 below 1% by chance; seven do not."""
    speeds = [1.5, 1.52, 1.49, 1.51, 1.5, 1.48, 1.53, 20.0]
    assert compare(speeds, [1.0] * 8).verdict == "faster"
    assert compare(speeds[1:], [1.0] * 7).verdict == "no difference"
    assert compare([*speeds[1:], 0.9], [1.0] * 8).verdict == "no difference"


def test_two_rounds_say_nothing():
    result = compare([2.0, 2.1], [1.0, 1.0])
    assert result.verdict == "too few rounds"
    assert result.to_dict()["low"] == 0.0
    assert result.to_dict()["high"] is None
    assert result.to_dict()["rounds_for_5_percent"] is None


def test_few_rounds_reach_as_far_as_students_interval():
    x = np.array([0.1, 0.12, 0.09, 0.11])
    low, high = interval(x, 0.99)
    reach = 5.841 * x.std(ddof=1) / 2  # the table's t for 3 degrees of freedom
    assert low == pytest.approx(x.mean() - reach, abs=1e-4)
    assert high == pytest.approx(x.mean() + reach, abs=1e-4)
    many = np.tile(x, 5)
    assert len(many) >= FEW_ROUNDS
    low, high = interval(many, 0.99)
    assert x.min() <= low < high <= x.max()


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 63.657), (2, 9.925), (3, 5.841), (4, 4.604), (9, 3.250), (30, 2.750)],
)
def test_quantiles_of_students_t_are_those_of_the_tables(freedom, quantile):
    assert _student_quantile(0.005, freedom) == pytest.approx(-quantile, abs=6e-4)


def test_rounds_needed_grow_with_the_square_of_the_noise():
    few = rounds_needed(0.1, 20, 0.05, 0.99)
    many = rounds_needed(0.2, 20, 0.05, 0.99)
    assert 3.2 < many / few < 4.5
    assert rounds_needed(50.0, 20, 0.05, 0.99) is None
    assert rounds_needed(math.inf, 20, 0.05, 0.99) is None
