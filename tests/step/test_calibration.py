"""Estimates that are wrong are put right, from few observations."""

from __future__ import annotations

import numpy as np

from vllm_specplugin.step._calibration_numba import learn
from vllm_specplugin.step.calibration import Calibration


def feed(made, claimed, truth, steps, *, sampled=True, depth=1, request="a", seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        made.observe(
            np.full(1, claimed), np.full(1, depth), np.full(1, sampled),
            rng.random(1) < truth, np.zeros(1, dtype=int), [request],
        )  # fmt: skip


def applied(made, claimed, *, sampled=True, depth=1, request=None):
    factor = made.factors([request]) if request else np.ones(1)
    return float(made.apply(np.full(1, claimed), np.full(1, depth),
                            np.full(1, sampled), factor)[0])  # fmt: skip


def test_without_observations_estimates_stay_as_they_are():
    made = Calibration()
    for p in (0.03, 0.2, 0.5, 0.97):
        assert abs(applied(made, p) - p) < 1e-9


def test_confident_and_always_wrong_is_found_out():
    made = Calibration()
    feed(made, 0.97, 0.0, 20)
    assert applied(made, 0.97) < 0.15
    feed(made, 0.97, 0.0, 30)
    assert applied(made, 0.97) < 0.06


def test_modest_and_mostly_right_is_found_out_too():
    made = Calibration()
    feed(made, 0.15, 0.9, 60)
    assert 0.8 < applied(made, 0.15) < 0.95


def test_kinds_of_requests_are_kept_apart():
    made = Calibration()
    feed(made, 0.75, 0.1, 200, sampled=True)
    assert applied(made, 0.75, sampled=True) < 0.25
    assert applied(made, 0.75, sampled=False) == 0.75


def test_depths_refine_what_is_known_of_all():
    made = Calibration()
    feed(made, 0.5, 0.9, 200, depth=1)
    feed(made, 0.5, 0.2, 200, depth=5)
    shallow, deep, unseen = (applied(made, 0.5, depth=d) for d in (1, 5, 12))
    assert shallow > 0.8 and deep < 0.3
    assert deep < unseen < shallow


def test_a_request_harder_than_the_rest_is_known_as_such():
    made = Calibration()
    feed(made, 0.65, 0.7, 300, request="easy")
    feed(made, 0.65, 0.1, 40, request="hard", seed=1)
    assert applied(made, 0.65, request="hard") < 0.35
    assert applied(made, 0.65, request="easy") > 0.5
    made.release(["hard", "unknown"])
    assert made.factors(["hard"])[0] == 1.0


def test_the_error_reported_is_the_brier_score():
    made = Calibration()
    feed(made, 0.9, 0.3, 500)
    seen = made.snapshot()
    assert seen["observed"] == 500
    # By the claim: .3*(.1)^2 + .7*(.9)^2 = .57; calibrated: .3*.7 = .21.
    assert 0.5 < seen["brier_uncorrected"] < 0.64
    assert 0.17 < seen["brier"] < 0.27


def posterior_shift(trials, hits, claimed, above, prior):
    """As the module says it, for arrays."""
    mean = np.divide(claimed, trials, out=np.full_like(trials, 0.5), where=trials > 0)
    claim = np.log(mean / (1 - mean))
    expected = 1 / (1 + np.exp(-(claim + above)))
    share = np.clip((hits + prior * expected) / (trials + prior), 1e-4, 1 - 1e-4)
    return np.log(share / (1 - share)) - claim


def test_compiled_counting_and_fitting_is_the_formula():
    rng = np.random.default_rng(2)
    sums, shifts = rng.random((3, 2, 3, 4)), rng.normal(size=(2, 3, 4))
    sums[1:] *= sums[0]  # hits and claims are no more than trials
    claimed, cells = rng.uniform(0.01, 0.99, 30), rng.integers(0, 24, 30)
    hits, keep = rng.random(30) < 0.5, 0.9
    before = shifts.reshape(-1)[cells]
    odds = claimed / (1 - claimed) * np.exp(before)
    faded = keep ** np.bincount(cells, minlength=24)
    want = [
        total.reshape(-1) * faded + np.bincount(cells, weights=seen, minlength=24)
        for total, seen in zip(sums, (np.ones(30), hits, claimed))
    ]
    trials, hit, claim = (one.reshape(2, 3, 4) for one in want)
    pooled = posterior_shift(*(x.sum(1) for x in (trials, hit, claim)), 0.0, 2.0)
    fitted = posterior_shift(trials, hit, claim, pooled[:, None], 4.0)

    general = np.empty(30)
    learn(claimed, cells, hits, sums, shifts, general, keep, np.array([2.0, 4.0]),
          0.99, 1e-4)  # fmt: skip
    assert np.allclose(general, np.minimum(odds / (1 + odds), 0.99))
    assert np.allclose(sums.reshape(3, -1), want)
    assert np.allclose(shifts, fitted)
