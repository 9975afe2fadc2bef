"""What is expected of drafts a step before they are made."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_specplugin.step.forecast import ChainForecast, SurvivalForecast

SLOTS = np.arange(2)


def judged(one: ChainForecast, rates: list[float], steps: int = 400, length: int = 4) -> None:
    """Chains whose tokens are accepted at the given rates."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        right = rng.random((len(rates), length)) < np.array(rates)[:, None]
        accepted = right.cumprod(1).sum(1)
        one.observe(np.arange(len(rates)), np.full(len(rates), length), accepted)


def test_chains_go_by_each_requests_own_share() -> None:
    one = ChainForecast(2, 4)
    judged(one, [0.9, 0.2])
    good, bad = one.survival(SLOTS)
    assert good[0] == pytest.approx(0.9, abs=0.1)
    assert bad[0] == pytest.approx(0.25, abs=0.15)
    np.testing.assert_allclose(good, good[0] ** np.arange(1, 5))


def test_a_new_request_is_presumed_to_be_like_the_others() -> None:
    one = ChainForecast(2, 4)
    judged(one, [0.8, 0.8])
    one.admit(1)
    assert one.survival(SLOTS)[1, 0] == pytest.approx(0.8, abs=0.1)


def test_what_was_refused_long_ago_is_tried_again() -> None:
    one = ChainForecast(2, 4)
    judged(one, [0.0, 0.0])
    one.admit(1)
    before = one.survival(SLOTS)[1, 0]
    none = np.zeros(2, dtype=int)
    for _ in range(10):
        one.observe(SLOTS, none, none)
    assert one.survival(SLOTS)[1, 0] < before + 0.05
    for _ in range(1000):
        one.observe(SLOTS, none, none)
    assert one.survival(SLOTS)[1, 0] > 0.5


def told(one: SurvivalForecast, series: np.ndarray) -> None:
    for step in series:
        one.told(SLOTS, step)


def test_what_lasts_is_expected_again() -> None:
    one = SurvivalForecast(2, 2)
    told(one, np.array([[[0.9, 0.6], [0.1, 0.0]]] * 50))
    np.testing.assert_allclose(one.survival(SLOTS), [[0.9, 0.6], [0.1, 0.0]], atol=0.02)


def test_what_comes_and_goes_says_little() -> None:
    """Matches of 30% of the steps, each for itself."""
    rng = np.random.default_rng(1)
    one = SurvivalForecast(2, 1)
    told(one, (rng.random((600, 2, 1)) < 0.3) * 0.9)
    one.told(SLOTS, np.array([[0.9], [0.0]]))
    now, none = one.survival(SLOTS)[:, 0]
    assert now == pytest.approx(0.27, abs=0.12)
    assert none == pytest.approx(0.27, abs=0.12), "a step late is no reason to expect nothing"


def test_of_a_new_request_the_mean_is_expected() -> None:
    one = SurvivalForecast(2, 2)
    told(one, np.array([[[0.8, 0.4], [0.4, 0.2]]] * 50))
    one.admit(1)
    np.testing.assert_allclose(one.survival(SLOTS)[1], [0.6, 0.3], atol=0.03)


def test_flattering_proposers_are_corrected() -> None:
    one = SurvivalForecast(2, 2)
    for _ in range(200):
        one.told(SLOTS, np.full((2, 2), 0.8))
        one.observe(SLOTS, np.array([2, 2]), np.array([1, 0]))
    assert one.survival(SLOTS).sum(1) == pytest.approx([0.5, 0.5], abs=0.05)


def test_survival_never_grows_along_a_row() -> None:
    rng = np.random.default_rng(2)
    one = SurvivalForecast(2, 8)
    for _ in range(50):
        one.told(SLOTS, -np.sort(-rng.random((2, 8)), axis=1))
        found = one.survival(SLOTS)
        assert (np.diff(found, axis=1) <= 0).all()
        assert (found >= 0).all()
        assert (found <= 1).all()
